"""The project's thin wrapper over an open_clip model, and the one function that makes it."""

from __future__ import annotations

import json
import logging
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import huggingface_hub.constants
import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, load_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from matex_pl import towers
from matex_pl.checkpoints import first_line, why_unreadable
from matex_pl.towers import Reading

CONFIG_FOLDER = Path(__file__).parent / "configs"
_KEPT_PHRASES = 65_536
# What tokenizers are told apart by: cases, numbers, hyphens, and words that are cut into pieces.
_PROBE = "No Pleural effusion; left lower-lobe opacity, 3 cm. Cardiomegaly?"


class Clip(nn.Module):
    """An open_clip model with what is needed to feed it and to read its tokens.

    Args:
        model: An open_clip model with `encode_image`, `encode_text` and `visual`.
        tokenizer: Its tokenizer.
        config: `{"model_cfg": ..., "preprocess_cfg": ...}` in the form of open_clip's `open_clip_config.json`; plain
            types only, so that a checkpoint can carry it and `load_clip` can rebuild the model from it.

    `mean_film` `(1, H, W)` in [0, 1] is the position-wise mean of the training films, which stands in for removed
    pixels; NaN until a data module gives it.
    """

    # Towers of five libraries answer to these names, and no type describes them all.
    model: Any
    mean: Tensor
    std: Tensor
    mean_film: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._rows: dict[str, Tensor] = {}
        preprocess = config["preprocess_cfg"]
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("mean_film", torch.full((1, *self.image_size), torch.nan))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return towers.pair(self.model.visual.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch raster.

        Raises:
            NotImplementedError: The image tower has no raster of patches.
        """
        return towers.patch_grid(self.model.visual)

    @property
    def context_length(self) -> int:
        """Number of tokens that a phrase is padded or cut to."""
        return int(self.tokenizer.context_length)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosines and logits, a scalar parameter."""
        return self.model.logit_scale

    @property
    def pad_id(self) -> int:
        """Token id that fills a phrase up to the context length."""
        tokenizer = getattr(self.tokenizer, "tokenizer", None)
        return int(getattr(tokenizer, "pad_token_id", None) or 0)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in the model's normalised frame: `(B, 3, H, W)` uint8, or float in [0, 1], to float.

        Raises:
            ValueError: The images have another size than the model's input.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}. "
                "Set the data module's image_size to the model's, or leave it out."
            )
        if images.dtype == torch.uint8:
            images = images / 255
        return ((images - self.mean) / self.std).to(self.std.dtype)

    def tokenize(self, phrases: Sequence[str]) -> Tensor:
        """Token ids of the phrases, padded and cut to the context length: `(B, T)` on the model's device."""
        # Phrases come again every epoch.
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._rows]
        if len(self._rows) + len(new) > _KEPT_PHRASES:
            self._rows, new = {}, list(dict.fromkeys(phrases))
        if new:
            self._rows.update(zip(new, self.tokenizer(new), strict=True))
        return torch.stack([self._rows[phrase] for phrase in phrases]).to(self.logit_scale.device)

    def tokenizer_mark(self) -> dict[str, Any]:
        """The tokenizer's name and what it makes of a sentence, in plain types, so that a checkpoint can carry it."""
        name = self.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") or "CLIP's"
        return {"name": name, "tokens": self.tokenize([_PROBE])[0].tolist()}

    def refuse_checkpoint(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Refuse the content of a `ClipModule`'s checkpoint that would load and be wrong.

        Raises:
            ValueError: Its weights hold NaN or Inf, or its tokenizer gives other tokens; the message names them.
        """
        model = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("clip.model.")}
        refuse_nan(model, source)
        mark, own = checkpoint.get("tokenizer"), self.tokenizer_mark()
        if mark is None:
            return
        # A phrase that is cut ends otherwise; weights may be loaded into another context length.
        length = min(len(mark["tokens"]), len(own["tokens"])) - 1
        if mark["tokens"][:length] != own["tokens"][:length]:
            raise ValueError(
                f"{_short(source)} was trained with the tokenizer {mark['name']}, this model has {own['name']}, which "
                f"gives other tokens ({own['tokens'][:4]}..., not {mark['tokens'][:4]}...). Take the model's name, or "
                "its JSON, that the checkpoint was trained with."
            )

    def count_tokens(self, phrase: str) -> int:
        """Number of tokens of the whole phrase with its special tokens, before it is cut to the context length."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return len(self.tokenizer.encode(phrase)) + 2
        if isinstance(self.tokenizer, HFTokenizer):
            phrase = self.tokenizer.clean_fn(phrase)
        return len(self.tokenizer.tokenizer(phrase, truncation=False, verbose=False).input_ids)

    def content(self, tokens: Tensor) -> Tensor:
        """Which tokens are content: `(B, T)` bool.

        Positions strictly between BOS and EOT for CLIP tokenizers (by position: their pad id is also the word piece
        "!"), ids that are not special elsewhere.
        """
        if isinstance(self.tokenizer, SimpleTokenizer):
            position = torch.arange(tokens.shape[1], device=tokens.device)
            return (position > 0) & (position < tokens.argmax(1, keepdim=True))
        special = torch.tensor(self.tokenizer.tokenizer.all_special_ids, device=tokens.device)
        return ~torch.isin(tokens, special)

    def pieces(self, tokens: Tensor) -> list[str]:
        """Word pieces of one row of tokens `(T,)`, as the tokenizer writes them (`</w>` or `##` tell words apart)."""
        ids = [int(token) for token in tokens]
        if isinstance(self.tokenizer, SimpleTokenizer):
            return [self._readable(self.tokenizer.decoder[index]) for index in ids]
        return list(self.tokenizer.tokenizer.convert_ids_to_tokens(ids))

    def _readable(self, piece: str) -> str:
        """A byte-level piece as text; `</w>` at the end of a word stays."""
        word, end = (piece[:-4], "</w>") if piece.endswith("</w>") else (piece, "")
        raw = bytes(self.tokenizer.byte_decoder[character] for character in word)
        return raw.decode("utf-8", errors="replace") + end

    def image_reading(self, images: Tensor) -> Reading:
        """How the image tower reads the embeddings of images from its tokens.

        Raises:
            NotImplementedError: In a way that maps do not know; the message names the tower and says why.
        """
        return towers.image_reading(self.model.visual, images)

    def text_reading(self, tokens: Tensor) -> Reading:
        """How the text tower reads the embeddings of tokens `(B, T)`.

        Raises:
            NotImplementedError: In a way that maps do not know; the message names the tower and says why.
        """
        return towers.text_reading(self.model, tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised image embeddings of normalised images: `(B, 3, H, W)` to `(B, D)`."""
        return F.normalize(self.model.encode_image(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """L2-normalised text embeddings of tokens: `(B, T)` to `(B, D)`; see `towers.encode_text`."""
        return F.normalize(towers.encode_text(self.model, tokens), dim=-1)

    def similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine of each pair: `(B, 3, H, W)` and `(B, T)` to `(B,)`."""
        return (self.encode_image(images) * self.encode_text(tokens)).sum(-1)


def load_clip(name: str, pretrained: str | None = None, image_size: int | Sequence[int] | None = None) -> Clip:
    """A CLIP model with its tokenizer and preprocessing, in eval mode on the CPU.

    Args:
        name: An open_clip name (`ViT-B-32`), `hf-hub:org/repo`, `local-dir:folder`, a path to a JSON model config
            (looked up as a file first, then among the shipped `configs/`), or the text of such a JSON.
        pretrained: A tag of open_clip (`openai`) or a checkpoint file: open_clip weights (`.pt`, `.bin`,
            `.safetensors`) or a Lightning checkpoint of `ClipModule`. Files are read without running code. When left
            out: the weights of the `hf-hub:` or `local-dir:`, random ones for any other name.
        image_size: Side of the square input in pixels, or height and width, where it is not the one of the config:
            position embeddings of vision transformers are interpolated to it.

    Raises:
        ValueError: The name is unknown, or the weights do not fit, hold NaN or would run code; the message has the way
            out.
        FileNotFoundError: A named file or folder does not exist.
        ConnectionError: The weights have to be downloaded and cannot be.
    """
    config = _json_config(name)
    size = None if image_size is None else list(towers.pair(image_size))
    if config is not None and pretrained and not _is_file(pretrained):
        raise FileNotFoundError(f"No checkpoint file at {pretrained!r} for the model {_short(name)}.")
    if config is not None:
        config |= _resized(config["model_cfg"], size, name)
        model, tokenizer = _from_config(config, name)
    else:
        model, tokenizer, config = _from_open_clip(name, pretrained, size)
    _check_patches(model, name)
    is_ours = pretrained is not None and _is_file(pretrained) and _load_weights(model, pretrained, name)
    refuse_nan(dict(model.named_parameters()), pretrained or name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    clip = Clip(model, tokenizer, _plain({"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess})).eval()
    if is_ours and pretrained:
        # Mapped, so that its weights are not read again.
        clip.refuse_checkpoint(torch.load(pretrained, "cpu", weights_only=True, mmap=True), pretrained)
    return clip


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, without the model; see `load_clip` for the names and the errors."""
    config = _json_config(name)
    if config is not None:
        text = config["model_cfg"]["text_cfg"]
        with _reading_files(name, None, text):
            return _config_tokenizer(text)
    named = {} if name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)) else _check_name(name, None)
    with _reading_files(name, None, named.get("text_cfg")):
        return open_clip.get_tokenizer(name)


def input_size(name: str) -> tuple[int, int]:
    """Height and width in pixels of what a model takes, without the model; see `load_clip` for the names."""
    config = _json_config(name)
    described = open_clip.get_model_config(name) if config is None else config["model_cfg"]
    return towers.pair(described["vision_cfg"].get("image_size", 224))


def cut_text(tokenizer: Any, phrase: str) -> str:
    """What of a phrase lies beyond the tokenizer's context length and is cut off; empty where all of it fits."""
    limit = int(tokenizer.context_length)
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.decode(tokenizer.encode(phrase)[limit - 2 :]).strip()
    words = tokenizer.tokenizer
    if isinstance(tokenizer, HFTokenizer):
        phrase = tokenizer.clean_fn(phrase)
    ids = words(phrase, truncation=False, verbose=False, add_special_tokens=False).input_ids
    return words.decode(ids[limit - words.num_special_tokens_to_add() :]).strip()


def find_config(path: str) -> Path | None:
    """A config file by path, or else by its name among the shipped ones (with or without `configs/` in front)."""
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = CONFIG_FOLDER / path.removeprefix("configs/")
    return shipped if not candidate.is_absolute() and shipped.is_file() else None


def shipped_configs() -> list[str]:
    """Names of the YAML configs for `matex fit` that are installed with the package."""
    return sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))


def _json_config(name: str) -> dict[str, Any] | None:
    """The open_clip config behind a JSON text or file; None for any other name."""
    text = name
    if name.endswith(".json"):
        path = find_config(name)
        if path is None:
            raise FileNotFoundError(f"No model config at {name!r}, nor among the shipped configs in {CONFIG_FOLDER}.")
        text = path.read_text(encoding="utf-8")
    elif not name.lstrip().startswith("{"):
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The model config {_short(name)} is no JSON: {error}.") from error
    config = config if "model_cfg" in config else {"model_cfg": config}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    if missing:
        raise ValueError(f"The model config {_short(name)} lacks {sorted(missing)}; open_clip's configs show the form.")
    return config


def _resized(config: dict[str, Any], size: list[int] | None, name: str) -> dict[str, Any]:
    """`{"model_cfg": ...}` with another size of the input.

    Raises:
        ValueError: The image tower is of one size only.
    """
    vision = config["vision_cfg"]
    if size is not None and towers.pair(vision.get("image_size", 224)) != tuple(size):
        if isinstance(vision.get("layers"), list):
            raise ValueError(
                f"image_size={size} does not fit {_short(name)}: its ResNet pools a raster of fixed size. Leave it out."
            )
        config = {**config, "vision_cfg": {**vision, "image_size": size}}
    return {"model_cfg": config}


def _check_patches(model: Any, name: str) -> None:
    """Refuse an input that is not a whole number of patches."""
    visual = model.visual
    patch = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", visual), "patch_size", None)
    if patch is None:
        return
    size, patch = towers.pair(visual.image_size), towers.pair(patch)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"The input of {_short(name)}, {size} pixels, is not a whole number of its {patch} patches.")


def _from_config(config: dict[str, Any], name: str) -> tuple[nn.Module, Any]:
    """Model, with random weights, and tokenizer of a config."""
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    # `local-dir:` is open_clip's public way to build from a config of one's own without adding to its global registry.
    with tempfile.TemporaryDirectory() as folder, _silent_open_clip(), _reading_files(name, None, text):
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = _config_tokenizer(text)
        try:
            # A timm tower has its own size until it is forced to another.
            size = vision.get("image_size") if "timm_model_name" in vision else None
            model = open_clip.create_model(LOCAL_DIR_PREFIX + folder, pretrained_text=False, force_image_size=size)
            if hasattr(model, "text_decoder"):
                # CoCa: open_clip leaves the projection of its decoder as it finds the memory.
                nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width**-0.5)
        except TypeError as error:
            raise ValueError(f"open_clip cannot build the model config {_short(name)}: {error}.") from error
    if isinstance(tokenizer, SimpleTokenizer) and text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ValueError(
            f"text_cfg.vocab_size of {_short(name)} is {text['vocab_size']}, but CLIP's tokenizer gives "
            f"{tokenizer.vocab_size} ids."
        )
    return model, tokenizer


def _config_tokenizer(text_cfg: dict[str, Any]) -> Any:
    length, settings = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs") or {}
    if text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **settings)
    return SimpleTokenizer(context_length=length, **settings)


def _from_open_clip(name: str, pretrained: str | None, size: list[int] | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model, tokenizer and `{"model_cfg": ...}` of one of open_clip's names; a checkpoint file is left to be loaded."""
    tag = None if _is_file(pretrained) else pretrained
    named = {} if name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)) else _check_name(name, tag)
    if not named and tag:
        raise ValueError(f"{name} brings its own weights; pretrained={tag!r} is no checkpoint file. Leave it out.")
    if named:
        _resized(named, size, name)
    quick_gelu = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    with _reading_files(name, tag, named.get("text_cfg")):
        model = open_clip.create_model(
            name,
            tag,
            # Where weights were trained with QuickGELU and the config has none, open_clip warns, but goes on without.
            force_quick_gelu=quick_gelu,
            force_image_size=size,
            load_weights=not _is_file(pretrained),
            pretrained_text=False,
            require_pretrained=not named and not _is_file(pretrained),
        )
        tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_config(name)
    return model, tokenizer, _resized({**config, "quick_gelu": True} if quick_gelu else config, size, name)


def _check_name(name: str, tag: str | None) -> dict[str, Any]:
    """The config behind a name that open_clip knows, if it knows the tag too."""
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), n=3) or ["ViT-B-32"]
        raise ValueError(
            f"Unknown model {name!r}. Give an open_clip name (e.g. {', '.join(near)}; `open_clip.list_models()` lists "
            "them), hf-hub:org/repo, local-dir:folder, or a path to a JSON model config."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise ValueError(
            f"pretrained={tag!r} is neither a file nor a tag of {name}. Its tags: {', '.join(tags) or 'none'}."
        )
    return config


@contextmanager
def _reading_files(name: str, tag: str | None, text_cfg: Mapping[str, Any] | None) -> Iterator[None]:
    """Where open_clip fetches and reads files: each failure is one error, at once when the hub does not answer."""
    if name.startswith(LOCAL_DIR_PREFIX):
        with _reading_folder(name), _needing_transformers(name):
            yield
    elif tag or name.startswith(HF_HUB_PREFIX) or any(key.startswith("hf_") for key in text_cfg or ()):
        with _downloading(_short(name) + (f" (tag {tag!r})" if tag else "")), _needing_transformers(name):
            yield
    else:
        yield


@contextmanager
def _reading_folder(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{name} holds no weights that fit and are read without running code: {error}\n"
            "Give a checkpoint file as `pretrained`, or the path of the folder's JSON to start from random weights."
        ) from error


@contextmanager
def _needing_transformers(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if "transformers" not in str(error) or find_spec("transformers") is not None:
            raise
        raise ImportError(
            f"The text tower or the tokenizer of {_short(name)} needs one more package: pip install 'matex_pl[hf]'."
        ) from error


@contextmanager
def _downloading(what: str) -> Iterator[None]:
    constants: Any = huggingface_hub.constants
    was_offline = constants.HF_HUB_OFFLINE
    # The hub's client would try again for most of a minute per file before it takes what is in the cache.
    constants.HF_HUB_OFFLINE = was_offline or not _answers(constants.ENDPOINT)
    try:
        yield
    except (OSError, RuntimeError) as error:
        state = "are not in the local cache, and the hub does not answer or HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            state = f"could not be had: {first_line(error)}"
        raise ConnectionError(
            f"The files of {what} {state}. Connect once, or pass a checkpoint file as `pretrained`, or a folder "
            "that holds the model as local-dir:folder."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _answers(address: str) -> bool:
    """Whether a web server answers, through the proxies of the environment, within seconds."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


@contextmanager
def _silent_open_clip() -> Iterator[None]:
    """Drop what open_clip writes to the root logger; whatever others write stays as it is."""
    root, folder = logging.getLogger(), str(Path(open_clip.__file__).parent)

    def is_others(record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(folder)

    # Where the root logger has no handler, `logging.warning` would install one for good.
    stand_in = None if root.handlers else logging.lastResort
    root.addFilter(is_others)
    if stand_in:
        root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeFilter(is_others)
        if stand_in:
            root.removeHandler(stand_in)


def _load_weights(model: nn.Module, path: str, name: str) -> bool:
    """Load a checkpoint file into the model, never running code from it, and refuse weights that do not fit.

    Returns:
        Whether it is a checkpoint of `ClipModule`.
    """
    try:
        state = load_state_dict(path, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors")
    except Exception as error:
        raise ValueError(
            f"{path} is no plain state dict ({why_unreadable(error)}). Only .safetensors and files that "
            "`torch.load(..., weights_only=True)` accepts are read, because any other could run code."
        ) from error
    # `ClipModule` keeps the model under this name, and more beside it.
    prefix = "clip.model."
    ours = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = _interpolated(ours or state, model)
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader resizes position embeddings and converts older layouts; it only takes files.
        plain = Path(folder) / "weights.pt"
        torch.save(state, plain)
        try:
            open_clip.load_checkpoint(model, str(plain))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"The weights in {path} do not fit the model {_short(name)}: {error}") from error
    return bool(ours)


def _interpolated(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The weights, with a timm tower's position embeddings at the model's raster; open_clip does that for its own."""
    visual = model.visual
    trunk = getattr(visual, "trunk", None)
    key = "visual.positional_embedding" if trunk is None else "visual.trunk.pos_embed"
    old, new = state.get(key), getattr(visual if trunk is None else trunk, key.split(".")[-1], None)
    if old is None or new is None or old.shape == new.shape:
        return state
    prefix = getattr(trunk, "num_prefix_tokens", 1)
    patches = old.shape[-2] - prefix
    if isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"{key} holds positions of {patches} patches, which is no square raster and cannot be interpolated to the "
            f"model's {towers.patch_grid(visual)}. Set image_size to the height and width that it was trained with."
        )
    if trunk is None:
        return state
    return state | {key: resample_abs_pos_embed(old, list(towers.patch_grid(visual)), num_prefix_tokens=prefix)}


def refuse_nan(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ValueError: One holds NaN or Inf; the message names it.
    """
    bad = [key for key, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{_short(source)} holds NaN or Inf in {', '.join(bad[:3])} ({len(bad)} tensors). Take earlier weights."
        )


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def _short(name: str) -> str:
    """A name or a path in quotes; the text of a config is cut."""
    return repr(f"{name[:77]}..." if name.lstrip().startswith("{") and len(name) > 80 else name)


def _plain(value: Any) -> Any:
    """The value in types that JSON has, so that a checkpoint with it loads without running code."""
    return json.loads(json.dumps(value, default=asdict))
