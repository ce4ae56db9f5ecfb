"""Folders of transformers: `CLIPModel` and `SiglipModel` with their tokenizers and image processors."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX
from torch import Tensor

from matex_pl.clip.hf_config import model_settings, preprocess_settings
from matex_pl.clip.record import contradictions
from matex_pl.clip.weights import Weights, first_line, read_content

log = logging.getLogger(__name__)

OPEN_CLIP_CONFIG, CONFIG = "open_clip_config.json", "config.json"
_MODEL_TYPES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_HALVES = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_IMAGES = ("image_mean", "image_std", "size", "crop_size", "do_center_crop", "do_normalize", "do_rescale")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
# Weights by preference, each as one file or as an index of several.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Settings that decide the function of a model, and that configs of both libraries state.
_COMPARED = {"embed_dim", "mean", "std"}
_COMPARED |= {f"vision_cfg.{name}" for name in ("image_size", "patch_size", "width", "layers")}
_COMPARED |= {f"text_cfg.{name}" for name in ("context_length", "vocab_size", "width", "heads", "layers")}


class Repository:
    """A folder, or a repository of the hub, whose files are downloaded when they are first asked for.

    Args:
        name: `local-dir:folder`, `hf-hub:org/repo`, or the path of a folder.

    Raises:
        OSError: The repository cannot be reached, and the local cache does not hold it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repo = name.removeprefix(HF_HUB_PREFIX) if name.startswith(HF_HUB_PREFIX) else None
        if self.repo:
            patterns = ["*.json", "*.txt", "*.model"]
            self.path = Path(huggingface_hub.snapshot_download(self.repo, allow_patterns=patterns))
        else:
            self.path = Path(name.removeprefix(LOCAL_DIR_PREFIX))

    def file(self, name: str) -> Path | None:
        """Local path of a file; None if the repository lacks the file."""
        path = self.path / name
        if path.is_file() or self.repo is None:
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.repo, name))
        except EntryNotFoundError:
            return None

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file; empty if the repository lacks the file.

        Raises:
            ValueError: The file is no JSON, or holds no settings.
        """
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} of {self.name} is no JSON: {first_line(error)}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} of {self.name} holds no settings.")
        return content

    def content(self) -> str:
        """Names of the files, as text."""
        names = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if self.repo:
            # Only settings are downloaded, and without the hub their names are known alone.
            with suppress(OSError):
                names = sorted(huggingface_hub.list_repo_files(self.repo))
        return f"{', '.join(names[:12])}{', ...' * (len(names) > 12)}" if names else "no file"


def find_transformers(name: str) -> Repository | None:
    """The folder or repository of a name, if it holds a model of transformers; None if it holds one of open_clip.

    Raises:
        ValueError: It holds neither kind of config, or half a model, or both kinds, which contradict each other.
    """
    repository = Repository(name)
    kind = str(repository.json(CONFIG).get("model_type", ""))
    ours, theirs = (repository.path / OPEN_CLIP_CONFIG).is_file(), kind in _MODEL_TYPES
    if ours and theirs:
        if find_spec("transformers"):
            _refuse_contradiction(repository)
        else:
            log.info(
                f"{name} holds {OPEN_CLIP_CONFIG} and {CONFIG}. The former is read. Both are compared only with "
                "transformers: pip install 'matex_pl[hf]'."
            )
    if ours:
        return None
    if theirs:
        return repository
    if kind in _HALVES:
        raise ValueError(
            f"{name} holds half a model ({kind}). Give a folder with a whole CLIPModel or SiglipModel, an image and a "
            "text tower."
        )
    described = f" ({CONFIG} has model_type {kind!r})" if kind else ""
    raise ValueError(
        f"{name} holds neither {OPEN_CLIP_CONFIG} nor a {CONFIG} of CLIPModel or SiglipModel. It holds: "
        f"{repository.content()}{described}. Give a folder or repository of one of these models."
    )


def read_folder(repository: Repository, *, has_weights: bool) -> Weights:
    """A model of transformers: its config in the form of open_clip, the files of tokenizer and trunk, and the weights.

    The weights keep the names of transformers; see `hf_names.to_open_clip`.

    Args:
        repository: Folder or repository of the model.
        has_weights: Whether the weights are read.

    Raises:
        ImportError: The package transformers is missing.
        ValueError: A file is missing or damaged, or open_clip cannot express a setting; the message names it.
    """
    name = repository.name
    if find_spec("transformers") is None:
        raise ImportError(f"{name} is a model of transformers, which is not installed: pip install 'matex_pl[hf]'.")
    config = _config(repository)
    tokenizer, files = _tokenizer(repository)
    length = min(config.text_config.max_position_embeddings, tokenizer.model_max_length)
    model, trunk = model_settings(config, name, length)
    _check_tokenizer(tokenizer, config, name)
    size = config.vision_config.image_size
    preprocess, difference = preprocess_settings(_processor(repository), size, name)
    if difference:
        log.warning(f"{difference}.")
    if trunk is not None:
        files["timm/config.json"] = json.dumps(trunk).encode()
    model["text_cfg"]["hf_tokenizer_name"] = repository.repo or str(repository.path)
    packed = {key: torch.frombuffer(bytearray(data), dtype=torch.uint8) for key, data in files.items() if data}
    state = _state(repository, length) if has_weights else {}
    described = {"model_cfg": model, "preprocess_cfg": preprocess}
    return Weights(name, state, described, {"model_files": packed})


def _refuse_contradiction(repository: Repository) -> None:
    """Raise ValueError if both configs of a repository describe different models."""
    ours, config = repository.json(OPEN_CLIP_CONFIG), _config(repository)
    if not {"vision_cfg", "text_cfg"} <= ours.get("model_cfg", {}).keys():
        return
    try:
        model, _ = model_settings(config, repository.name, config.text_config.max_position_embeddings)
    except ValueError:
        # Such a model of transformers is not read, and open_clip's own config describes the other one.
        return
    theirs: dict[str, Any] = {"model_cfg": model}
    if any((repository.path / name).is_file() for name in _PROCESSORS):
        processor = _processor(repository)
        theirs["preprocess_cfg"] = {name: list(processor[f"image_{name}"]) for name in ("mean", "std")}
    is_trunk = "timm_model_name" in ours["model_cfg"]["vision_cfg"]
    compared = _COMPARED - {f"vision_cfg.{name}" for name in ("patch_size", "width", "layers") if is_trunk}
    compared |= {"quick_gelu"} if config.model_type == "clip" else set()
    found = {name: pair for name, pair in contradictions(theirs, ours).items() if name in compared}
    if found:
        pairs = "; ".join(f"{name} is {one!r} and {other!r}" for name, (one, other) in found.items())
        raise ValueError(
            f"{repository.name} holds two configs that contradict each other, {OPEN_CLIP_CONFIG} and {CONFIG}: "
            f"{pairs}. Remove the wrong one."
        )


def _config(repository: Repository) -> Any:
    from transformers import CLIPConfig, SiglipConfig

    settings = repository.json(CONFIG)
    kind = CLIPConfig if settings["model_type"] == "clip" else SiglipConfig
    try:
        return kind.from_dict(settings)
    # Each version of transformers checks its settings with errors of other types.
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"{CONFIG} of {repository.name} is no {kind.__name__}: {reason}.") from error


def _processor(repository: Repository) -> dict[str, Any]:
    """Settings of the image processor, with the defaults of its class."""
    from transformers import AutoImageProcessor

    if not any((repository.path / name).is_file() for name in _PROCESSORS):
        raise ValueError(
            f"{repository.name} holds no {_PROCESSORS[0]}, and mean, deviation and size of its images are unknown. "
            "Copy the file of the model that it was trained from, or save its processor there: "
            "AutoProcessor.from_pretrained(...).save_pretrained(FOLDER)."
        )
    # By version, transformers reads one file or the other.
    first, second = repository.json(_PROCESSORS[0]), repository.json(_PROCESSORS[1]).get("image_processor") or {}
    names = [name for name in _IMAGES if first and second and first.get(name) != second.get(name)]
    if names:
        pairs = "; ".join(f"{name} is {first.get(name)} and {second.get(name)}" for name in names)
        raise ValueError(
            f"{repository.name} holds two files that contradict each other, {_PROCESSORS[0]} and {_PROCESSORS[1]}: "
            f"{pairs}. Remove the wrong one."
        )
    with _reading(repository, "image processor"):
        return dict(AutoImageProcessor.from_pretrained(str(repository.path), trust_remote_code=False).to_dict())


def _tokenizer(repository: Repository) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer of a repository, and the files that it saves."""
    from transformers import AutoTokenizer

    if not any((repository.path / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"{repository.name} holds no tokenizer ({', '.join(_TOKENIZERS)}). Copy the files of the tokenizer of the "
            "model that it was trained from."
        )
    is_sentencepiece = not any((repository.path / name).is_file() for name in _TOKENIZERS[:2])
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    lacking = [package for package, module in packages.items() if not _is_installed(module)]
    if is_sentencepiece and lacking:
        raise ImportError(
            f"The tokenizer of {repository.name} needs {' and '.join(lacking)}: pip install 'matex_pl[hf]'."
        )
    with _reading(repository, "tokenizer"), tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(str(repository.path), trust_remote_code=False)
        tokenizer.save_pretrained(folder)
        return tokenizer, {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _check_tokenizer(tokenizer: Any, config: Any, source: str) -> None:
    """Raise ValueError if a tokenizer does not fit its text tower; log a warning if the text is read elsewhere."""
    text = config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} ids, and {CONFIG} a vocab_size of {text.vocab_size}. Give "
            "the tokenizer of this model."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of {source} has no pad_token. Set pad_token in tokenizer_config.json.")
    if config.model_type == "clip":
        if tokenizer.padding_side != "right":
            raise ValueError(
                f"The tokenizer of {source} pads on the left, which open_clip cannot mask. Set padding_side to right "
                "in tokenizer_config.json."
            )
        if text.eos_token_id not in (2, tokenizer.eos_token_id):
            log.warning(
                f"{CONFIG} of {source} has eos_token_id {text.eos_token_id}, and its tokenizer ends a text with "
                f"{tokenizer.eos_token_id}. As in transformers, a text without the former is read at its first token."
            )


@contextmanager
def _reading(repository: Repository, part: str) -> Iterator[None]:
    try:
        yield
    # transformers raises errors of many types for a damaged file.
    except Exception as error:
        raise ValueError(f"The {part} of {repository.name} cannot be read: {first_line(error)}.") from error


def _state(repository: Repository, length: int) -> dict[str, Tensor]:
    """Weights of a repository by the names of transformers, with the positions of `length` tokens.

    Raises:
        ValueError: The repository holds no weights, or lacks a file of its index, or a file would run code.
    """
    paths = _weight_files(repository)
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            content = read_content(str(path))
        except Exception as error:
            raise ValueError(f"{path.name} of {repository.name} cannot be read: {first_line(error)}.") from error
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path.name} of {repository.name} holds no tensors, or more than tensors.")
        state |= content
    # The tokenizer gives no more tokens, and open_clip has as many positions as tokens.
    name = "text_model.embeddings.position_embedding.weight"
    if name in state:
        state[name] = state[name][:length]
    return state


def _weight_files(repository: Repository) -> list[Path]:
    for name in _WEIGHTS:
        whole = repository.file(name)
        if whole:
            return [whole]
        index = repository.file(f"{name}.index.json")
        if index is None:
            continue
        parts = repository.json(index.name).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise ValueError(f"{index.name} of {repository.name} has no weight_map. Save the model again.")
        # A name that leads out of the folder is none of its files.
        names = sorted({str(part) for part in parts.values()})
        shards = {part: repository.file(part) if Path(part).name == part else None for part in names}
        missing = [part for part, path in shards.items() if path is None]
        if missing:
            raise ValueError(
                f"{repository.name} lacks {', '.join(missing[:3])}, {len(missing)} of the {len(shards)} files that "
                f"{index.name} lists. Copy the missing files into the folder."
            )
        return [path for path in shards.values() if path]
    raise ValueError(f"{repository.name} holds no weights ({', '.join(_WEIGHTS)}). It holds: {repository.content()}.")
