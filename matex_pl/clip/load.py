"""Loading of models and tokenizers by name, config or checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.hf_config import CLEAN
from matex_pl.clip.hf_folder import find_transformers, read_folder
from matex_pl.clip.hf_names import are_transformers, to_open_clip
from matex_pl.clip.hub import reading_files
from matex_pl.clip.model import Clip
from matex_pl.clip.record import assumed, contradictions, listed, unpacked, with_training_settings
from matex_pl.clip.tokenizer import TransformersTokenizer
from matex_pl.clip.weights import (
    Weights,
    are_openai,
    fit_names,
    load_weights,
    read_checkpoint,
    read_weights,
    reading_checkpoint,
    refuse_nan,
    short,
)
from matex_pl.files import CONFIG_FOLDER, find_config

log = logging.getLogger(__name__)

# Settings of open_clip's two tokenizers. A tokenizer of transformers would take any other, as `trust_remote_code`.
_HF_SETTINGS = ("clean", "language", "strip_sep_token")
_SIMPLE_SETTINGS = ("additional_special_tokens", "clean", "reduction_mask")


def load_clip(name: str, pretrained: str | None = None, image_size: int | Sequence[int] | None = None) -> Clip:
    """A CLIP model with its tokenizer and preprocessing, in eval mode on the CPU.

    A checkpoint of `matex fit`, as `name` or as `pretrained`, decides everything that the shapes of weights do not
    show, such as the activation and the mean of the images. For any other file of weights one line is logged, with the
    meaning that the model assumes.

    Args:
        name: An open_clip name (`ViT-B-32`), `hf-hub:org/repo`, a folder (`local-dir:folder` or its path), a checkpoint
            of `matex fit`, a path to a JSON model config, or the text of such a JSON. A path is looked up as a file
            first, then among the shipped `configs/`. Folders and repositories hold a model of open_clip, or a
            `CLIPModel` or `SiglipModel` of transformers.
        pretrained: Tag of open_clip (`openai`) or a checkpoint file: open_clip weights (`.pt`, `.bin`,
            `.safetensors`) or a Lightning checkpoint of `ClipModule`. Files are read without running code. By default
            folders, repositories and checkpoints get their own weights, all others random weights.
        image_size: Side of the square input in pixels, or height and width; the config's by default. Position
            embeddings of vision transformers are interpolated to it.

    Raises:
        ValueError: The name is unknown, or contradicts the checkpoint, or the weights do not fit, hold NaN or would run
            code; the message names the way out.
        FileNotFoundError: A named file or folder does not exist.
        ConnectionError: The weights cannot be downloaded.
    """
    size = None if image_size is None else list(towers.height_width(image_size))
    if size is not None and min(size) < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    if pretrained and not file and _prefixed(name).startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        raise ValueError(
            f"{name} brings its own weights; pretrained={pretrained!r} is no checkpoint file. Leave pretrained out."
        )
    stored, name = _stored(name, has_weights=file is None), _prefixed(name)
    weights = read_weights(file) if file else stored
    config = stored.config if stored else _json_config(name)
    if config is not None and pretrained and not file:
        raise FileNotFoundError(f"No checkpoint file at {pretrained!r} for the model {short(name)}. Check the path.")
    recorded = weights if weights is not None and weights.config is not None else stored
    if recorded is not None and recorded is not stored:
        config = _agreed(recorded, config or _stated_config(name), name, size)
    if config is None:
        model, tokenizer, config = _from_open_clip(name, None if file else pretrained, size, weights)
    else:
        config = config | _resized(config["model_cfg"], size, name)
        model, tokenizer = _from_config(config, name, recorded.files if recorded else {})
    towers.check_patches(model.visual, short(name))
    preprocess = open_clip.get_model_preprocess_cfg(model)
    described = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}
    # With JSON types only, a checkpoint that holds the config loads without running code.
    clip = Clip(model, tokenizer, json.loads(json.dumps(described, default=asdict))).eval()
    clip.files = recorded.files if recorded else {}
    if recorded is not None:
        clip.resize_mode = recorded.checkpoint.get("resize_mode") or clip.resize_mode
    if weights is not None:
        if weights is not recorded:
            fit_names(weights, model)
        if are_transformers(weights.state):
            weights.state = to_open_clip(weights.state, model, weights.path, other_size=size is not None)
        if weights is not recorded:
            _refuse_openai(weights, clip, name)
            log.info(
                f"{weights.path} does not record the meaning of its weights. Assumed, as of {short(name)}: "
                f"{assumed(model, clip.config)}."
            )
        load_weights(model, weights, name)
    refuse_nan(dict(model.named_parameters()), weights.path if weights else name)
    if weights is not None and weights is recorded:
        clip.refuse_tokenizer(weights.checkpoint, weights.path)
    return clip


def load_trained(ckpt_path: str) -> Clip:
    """The CLIP model of a checkpoint of `matex fit`, on the CPU in eval mode; no code of the file is run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of `matex fit`, or holds NaN; the message names the file.
    """
    state = read_checkpoint(ckpt_path).checkpoint["state_dict"]
    with reading_checkpoint(ckpt_path):
        clip = load_clip(ckpt_path)
        # A checkpoint of 0.1 names the mean image `mean_film`.
        image = state.get("clip.mean_image", state.get("clip.mean_film"))
        if image is not None:
            clip.mean_image.copy_(image)
    return clip


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, without loading the model; see `load_clip` for the names and the errors."""
    stored, name = _stored(name), _prefixed(name)
    config = stored.config if stored else _json_config(name)
    model = _known_config(name, None) if config is None else config["model_cfg"]
    with reading_files(name, None, model.get("text_cfg")):
        if config is None:
            return _open_clip_tokenizer(name)
        with unpacked(config, stored.files if stored else {}) as local:
            return _config_tokenizer(local["model_cfg"]["text_cfg"], name)


def input_size(name: str) -> tuple[int, int]:
    """Height and width in pixels of a model's input, without loading the model; see `load_clip` for the names."""
    return towers.height_width(config_of(name)[0]["model_cfg"]["vision_cfg"].get("image_size", 224))


def config_of(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config of a model in the form of open_clip, and its `model_files`, without its weights; see `load_clip`."""
    stored, name = _stored(name), _prefixed(name)
    config = stored.config if stored else _json_config(name)
    return config or _stated_config(name), stored.files if stored else {}


def cut_text(tokenizer: Any, phrase: str) -> str:
    """The end of a phrase that the tokenizer cuts off at its context length; empty if the whole phrase fits."""
    limit = int(tokenizer.context_length)
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.decode(tokenizer.encode(phrase)[limit - 2 :]).strip()
    words = tokenizer.tokenizer
    if isinstance(tokenizer, HFTokenizer):
        phrase = tokenizer.clean_fn(phrase)
    ids = words(phrase, truncation=False, verbose=False, add_special_tokens=False).input_ids
    # WordPiece marks a piece within a word.
    return words.decode(ids[limit - words.num_special_tokens_to_add() :]).strip().removeprefix("##")


def _json_config(name: str) -> dict[str, Any] | None:
    """The open_clip config behind a JSON text or file; None for any other name."""
    text = name
    if name.endswith(".json"):
        path = find_config(name)
        if path is None:
            raise FileNotFoundError(
                f"No model config at {name!r}, nor among the shipped configs in {CONFIG_FOLDER}. Check the path."
            )
        text = path.read_text(encoding="utf-8")
    elif not name.lstrip().startswith("{"):
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The model config {short(name)} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"The model config {short(name)} is no mapping of names to values.")
    config = config if "model_cfg" in config else {"model_cfg": config}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    if missing:
        raise ValueError(
            f"The model config {short(name)} lacks {sorted(missing)}. Add these keys, as in open_clip's configs."
        )
    return config


def _prefixed(name: str) -> str:
    """The name, with open_clip's prefix if it is the path of a folder."""
    is_folder = name not in open_clip.list_models() and not name.lstrip().startswith("{") and Path(name).is_dir()
    return f"{LOCAL_DIR_PREFIX}{name}" if is_folder else name


def _stored(name: str, *, has_weights: bool = False) -> Weights | None:
    """The checkpoint of `matex fit`, or the model of transformers, that a name stands for; None for any other name.

    Args:
        name: Name of a model.
        has_weights: Whether to read the weights of a model of transformers.

    Raises:
        ValueError: The file is no checkpoint of `matex fit`, or the folder or repository holds no model.
    """
    path = _prefixed(name)
    # open_clip's error names a folder that does not exist.
    is_folder = path.startswith(LOCAL_DIR_PREFIX) and Path(path.removeprefix(LOCAL_DIR_PREFIX)).is_dir()
    if is_folder or path.startswith(HF_HUB_PREFIX):
        with reading_files(name, None, None):
            repository = find_transformers(name)
            return read_folder(repository, has_weights=has_weights) if repository else None
    is_config = name.endswith(".json") or name.lstrip().startswith("{")
    if is_config or name in open_clip.list_models() or not Path(name).is_file():
        return None
    return read_checkpoint(name)


def _stated_config(name: str) -> dict[str, Any]:
    """Config that a name of open_clip, of the hub or of a folder states, without defaults."""
    with reading_files(name, None, None):
        return {"model_cfg": _known_config(name, None) or open_clip.get_model_config(name)}


def _agreed(weights: Weights, given: dict[str, Any], name: str, size: list[int] | None) -> dict[str, Any]:
    """The config of a checkpoint, with the regularization of training that the config `given` states.

    Raises:
        ValueError: The config states another meaning of the weights than the checkpoint; the message names each.
    """
    recorded: dict[str, Any] = weights.config or {}
    found = contradictions(given, recorded)
    if size is not None:
        # Given in so many words: positions are interpolated to it.
        found.pop("vision_cfg.image_size", None)
    if found:
        raise ValueError(
            f"{weights.path} contradicts the model {short(name)}: {listed(found)}. Give {weights.path} as the name of "
            "the model too, or weights of this model."
        )
    return with_training_settings(recorded, given)


def _refuse_openai(weights: Weights, clip: Clip, name: str) -> None:
    """Raise ValueError if OpenAI's weights meet an architecture without QuickGELU, unless its config states GELU."""
    model = clip.config["model_cfg"]
    if are_openai(weights) and "quick_gelu" not in model:
        quick = f"{name}-quickgelu"
        way = f"Give the model {quick}" if quick in open_clip.list_models() else 'Add "quick_gelu": true to the config'
        raise ValueError(
            f"{weights.path} holds OpenAI's weights, which were trained with QuickGELU, and {short(name)} has GELU. "
            f"{way}."
        )


def _resized(config: dict[str, Any], size: list[int] | None, name: str) -> dict[str, Any]:
    """`{"model_cfg": ...}` with another size of the input; ValueError for a ResNet, whose size is fixed."""
    vision = config["vision_cfg"]
    if size is None or towers.height_width(vision.get("image_size", 224)) == tuple(size):
        return {"model_cfg": config}
    if isinstance(vision.get("layers"), list):
        raise ValueError(
            f"image_size={size} does not fit {short(name)}: its ResNet pools a raster of fixed size. Leave image_size "
            "out."
        )
    return {"model_cfg": {**config, "vision_cfg": {**vision, "image_size": size}}}


def _from_config(config: dict[str, Any], name: str, files: Mapping[str, Tensor]) -> tuple[nn.Module, Any]:
    """Model, with random weights, and tokenizer of a config; `files` are the `model_files` of a checkpoint."""
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    # `local-dir:` is open_clip's public way to build from a custom config without adding to its global registry.
    with (
        tempfile.TemporaryDirectory() as folder,
        unpacked(config, files) as local,
        _silent_open_clip(),
        reading_files(name, None, text),
    ):
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(local), encoding="utf-8")
        tokenizer = _config_tokenizer(local["model_cfg"]["text_cfg"], name)
        try:
            # A timm tower keeps its own size unless another is forced.
            size = vision.get("image_size") if "timm_model_name" in vision else None
            model = open_clip.create_model(LOCAL_DIR_PREFIX + folder, pretrained_text=False, force_image_size=size)
            if hasattr(model, "text_decoder"):
                # CoCa: open_clip leaves the projection of its decoder uninitialized.
                nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width**-0.5)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"open_clip cannot build the model config {short(name)}: {error}.") from error
    if isinstance(tokenizer, SimpleTokenizer) and text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ValueError(
            f"text_cfg.vocab_size of {short(name)} is {text['vocab_size']}, but CLIP's tokenizer gives "
            f"{tokenizer.vocab_size} ids. Set vocab_size to at least {tokenizer.vocab_size}."
        )
    return model, tokenizer


def _config_tokenizer(text_cfg: dict[str, Any], name: str) -> Any:
    length, settings = text_cfg.get("context_length", 77), _tokenizer_settings(text_cfg, name)
    source = text_cfg.get("hf_tokenizer_name")
    if source and settings.get("clean") == CLEAN:
        return TransformersTokenizer.from_folder(source, length)
    if source:
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(source, length, tokenizer_mode=mode, trust_remote_code=False, **settings)
    return _simple_tokenizer(length, json.dumps(settings))


@lru_cache(maxsize=8)
def _simple_tokenizer(context_length: int, settings: str) -> SimpleTokenizer:
    """CLIP's tokenizer, whose tables take longer than a small model; `settings` are JSON, and nothing changes it."""
    return SimpleTokenizer(context_length=context_length, **json.loads(settings))


def _open_clip_tokenizer(name: str) -> Any:
    """Tokenizer of a name of open_clip, of the hub or of a folder."""
    text = open_clip.get_model_config(name)["text_cfg"]
    _tokenizer_settings(text, name)
    # Without the setting, transformers may ask at the keyboard whether to run code.
    return open_clip.get_tokenizer(name, **({"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}))


def _tokenizer_settings(text_cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`tokenizer_kwargs` of a text config; ValueError for other settings than those of open_clip's tokenizers."""
    settings = text_cfg.get("tokenizer_kwargs") or {}
    known = _HF_SETTINGS if text_cfg.get("hf_tokenizer_name") else _SIMPLE_SETTINGS
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(
            f"The config of {short(name)} has the settings {', '.join(unknown)} in text_cfg.tokenizer_kwargs. Accepted "
            f"are {', '.join(known)}, because others could run code of the model. Remove the others."
        )
    return dict(settings)


def _from_open_clip(
    name: str, tag: str | None, size: list[int] | None, weights: Weights | None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model, tokenizer and `{"model_cfg": ...}` of a name of open_clip, without the weights of a checkpoint file."""
    named = _known_config(name, tag)
    if named:
        _resized(named, size, name)
    has_file = weights is not None
    released = open_clip.get_pretrained_cfg(name, tag) if tag else _released(name) if has_file else {}
    quick_gelu = bool(released.get("quick_gelu"))
    # open_clip warns of random weights, although a file or a checkpoint may follow. `matex fit` logs random weights.
    quiet = nullcontext() if tag else _silent_open_clip()
    with quiet, reading_files(name, tag, named.get("text_cfg")):
        tokenizer = _open_clip_tokenizer(name)
        model = open_clip.create_model(
            name,
            tag,
            # If weights were trained with QuickGELU and the config has none, open_clip only warns.
            force_quick_gelu=quick_gelu,
            force_image_size=size,
            force_preprocess_cfg={key: released[key] for key in ("mean", "std", "resize_mode") if key in released},
            load_weights=not has_file,
            pretrained_text=False,
            require_pretrained=not named and not has_file,
        )
        config = open_clip.get_model_config(name)
    return model, tokenizer, _resized({**config, "quick_gelu": True} if quick_gelu else config, size, name)


def _released(name: str) -> dict[str, Any]:
    """Activation, mean, std and resize mode that all released weights of an open_clip name share; may be empty.

    A file without a tag has the same meaning as the tag, if there is only one.
    """
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    values = {key: [config.get(key) for config in configs] for key in ("quick_gelu", "mean", "std", "resize_mode")}
    return {
        key: found[0] for key, found in values.items() if found and found[0] and found.count(found[0]) == len(found)
    }


def _known_config(name: str, tag: str | None) -> dict[str, Any]:
    """Config that open_clip has for a name; empty for `hf-hub:` and `local-dir:` models, which bring their own."""
    if name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        return {}
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), n=3) or ["ViT-B-32"]
        raise ValueError(
            f"Unknown model {name!r}. Give an open_clip name (e.g. {', '.join(near)}; `open_clip.list_models()` lists "
            "them), hf-hub:org/repo, the path of a folder, or a path to a JSON model config."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise ValueError(
            f"pretrained={tag!r} is neither a file nor a tag of {name}. Its tags: {', '.join(tags) or 'none'}. Give a "
            "tag or the path of a checkpoint file."
        )
    return config


@contextmanager
def _silent_open_clip() -> Iterator[None]:
    """Drop open_clip's messages to the root logger; other messages pass."""
    root, folder, stand_in = logging.getLogger(), str(Path(open_clip.__file__).parent), logging.NullHandler()

    def is_others(record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(folder)

    root.addFilter(is_others)
    # If the root logger has no handler, `logging.warning` would install one for good.
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeFilter(is_others)
        root.removeHandler(stand_in)
