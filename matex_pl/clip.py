"""The project's thin wrapper over an open_clip model, and the one function that makes it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, load_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

CONFIG_FOLDER = Path(__file__).parent / "configs"


class Clip(nn.Module):
    """An open_clip model with what is needed to feed it and to read its tokens.

    Args:
        model: An open_clip model with `encode_image`, `encode_text` and `visual`.
        tokenizer: Its tokenizer.
        config: `{"model_cfg": ..., "preprocess_cfg": ...}` in the form of open_clip's `open_clip_config.json`; plain types
            only, so that a checkpoint can carry it and `load_clip` can rebuild the model from it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        preprocess = config["preprocess_cfg"]
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return _pair(self.model.visual.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch raster.

        Raises:
            NotImplementedError: The image tower has no raster of patches behind one class token.
        """
        visual = self.model.visual
        if not hasattr(visual, "grid_size"):
            raise NotImplementedError(_not_explained("image", visual, "it keeps no `grid_size`"))
        return _pair(visual.grid_size)

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
        rows = [self._tokenize_one(phrase) for phrase in phrases]
        return torch.stack(rows).to(self.logit_scale.device)

    @lru_cache(maxsize=65536)  # noqa: B019 - one wrapper lives as long as the run, and phrases repeat every epoch
    def _tokenize_one(self, phrase: str) -> Tensor:
        return self.tokenizer([phrase])[0]

    def count_tokens(self, phrase: str) -> int:
        """Number of tokens of the whole phrase with its special tokens, before it is cut to the context length."""
        return len(self.tokenizer.encode(phrase)) + 2

    def content(self, tokens: Tensor) -> Tensor:
        """Which tokens are content: `(B, T)` bool.

        Positions strictly between BOS and EOT for CLIP tokenizers (by position: their pad id is also the word piece "!"),
        ids that are not special elsewhere.
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

    def image_position(self, images: Tensor) -> Tensor:
        """Position of the token that the image embedding is pooled from, per image: `(B,)`.

        Raises:
            NotImplementedError: The image tower pools otherwise than from a class token.
        """
        visual = self.model.visual
        if getattr(visual, "pool_type", None) != "tok" or getattr(visual, "attn_pool", None) is not None:
            raise NotImplementedError(_not_explained("image", visual, "it does not pool from a class token"))
        return torch.zeros(len(images), dtype=torch.long, device=images.device)

    def text_position(self, tokens: Tensor) -> Tensor:
        """Position of the token that the text embedding is pooled from, per phrase: `(B,)`.

        Raises:
            NotImplementedError: The text tower pools otherwise than from one token.
        """
        tower = getattr(self.model, "text", self.model)
        rule = getattr(self.model, "text_pool_type", None) or getattr(tower, "pool_type", None)
        if rule == "argmax":
            return tokens.argmax(1)
        if rule == "eos":
            return (tokens == int(getattr(self.model, "text_eos_id", None) or tower.eos_id)).int().argmax(1)
        if rule in ("first", "last"):
            return torch.full_like(tokens[:, 0], 0 if rule == "first" else tokens.shape[1] - 1)
        raise NotImplementedError(_not_explained("text", tower, f"its pooling is {rule!r}"))

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised image embeddings of normalised images: `(B, 3, H, W)` to `(B, D)`."""
        return F.normalize(self.model.encode_image(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """L2-normalised text embeddings of tokens: `(B, T)` to `(B, D)`."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)

    def similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine of each pair: `(B, 3, H, W)` and `(B, T)` to `(B,)`."""
        return (self.encode_image(images) * self.encode_text(tokens)).sum(-1)


def load_clip(name: str, pretrained: str | None = None) -> Clip:
    """A CLIP model with its tokenizer and preprocessing, in eval mode on the CPU.

    Args:
        name: An open_clip name (`ViT-B-32`), `hf-hub:org/repo`, `local-dir:folder`, a path to a JSON model config (looked up
            as a file first, then among the shipped `configs/`), or the text of such a JSON.
        pretrained: A tag of open_clip (`openai`) or a checkpoint file: open_clip weights (`.pt`, `.bin`, `.safetensors`) or a
            Lightning checkpoint of `ClipModule`. Files are read without running code. Random weights when left out.

    Raises:
        ValueError: The name is unknown, or the weights do not fit, hold NaN or would run code; the message has the way out.
        FileNotFoundError: A named file or folder does not exist.
        ConnectionError: The weights have to be downloaded and cannot be.
    """
    config = _json_config(name)
    if config is not None:
        model, tokenizer = _from_config(config), _config_tokenizer(config["model_cfg"]["text_cfg"])
    else:
        model = _from_open_clip(name, None if _is_file(pretrained) else pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    if _is_file(pretrained) or (config is not None and pretrained):
        _load_weights(model, str(pretrained), name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    model_cfg = config["model_cfg"] if config is not None else _named_config(name, pretrained)
    return Clip(model, tokenizer, _plain({"model_cfg": model_cfg, "preprocess_cfg": preprocess})).eval()


def find_config(path: str) -> Path | None:
    """A config file by path, or else by its name among the shipped ones (`configs/` in front may be left out or kept)."""
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = CONFIG_FOLDER / path.removeprefix("configs/")
    return shipped if not candidate.is_absolute() and shipped.is_file() else None


def shipped_configs() -> list[str]:
    """Names of the YAML configs that are installed with the package."""
    return sorted(str(path.relative_to(CONFIG_FOLDER)) for path in CONFIG_FOLDER.rglob("*.yaml"))


def _json_config(name: str) -> dict[str, Any] | None:
    """The open_clip config behind a JSON text or file; None for any other name."""
    if name.lstrip().startswith("{"):
        config = json.loads(name)
    elif name.endswith(".json"):
        path = find_config(name)
        if path is None:
            raise FileNotFoundError(f"No model config at {name!r}, nor among the shipped configs in {CONFIG_FOLDER}.")
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        return None
    config = config if "model_cfg" in config else {"model_cfg": config}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    if missing:
        raise ValueError(f"The model config {name[:80]!r} lacks {sorted(missing)}; open_clip's configs show the form.")
    return config


def _from_config(config: dict[str, Any]) -> nn.Module:
    # `local-dir:` is open_clip's public way to build from a config of one's own without adding to its global registry.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        return open_clip.create_model(LOCAL_DIR_PREFIX + folder, pretrained_text=False)


def _config_tokenizer(text_cfg: dict[str, Any]) -> Any:
    length = text_cfg.get("context_length", 77)
    if text_cfg.get("hf_tokenizer_name"):
        return HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=length, **text_cfg.get("tokenizer_kwargs") or {})
    return SimpleTokenizer(context_length=length)


def _from_open_clip(name: str, tag: str | None) -> nn.Module:
    known = name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)) or open_clip.get_model_config(name) is not None
    if not known:
        raise ValueError(
            f"Unknown model {name!r}. Give an open_clip name (e.g. ViT-B-32; `open_clip.list_models()` lists them), "
            "hf-hub:org/repo, local-dir:folder, or a path to a JSON model config."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and not name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)) and tag not in tags:
        raise ValueError(f"pretrained={tag!r} is neither a file nor a tag of {name}. Its tags: {', '.join(tags) or 'none'}.")
    try:
        return open_clip.create_model(name, tag, force_quick_gelu=_uses_quick_gelu(name, tag))
    except Exception as error:
        if isinstance(error, FileNotFoundError) or name.startswith(LOCAL_DIR_PREFIX):
            raise
        raise ConnectionError(
            f"The weights of {name!r}{f' (tag {tag!r})' if tag else ''} are not in the local cache and could not be "
            f"downloaded: {_first_line(error)}. Connect once, or pass a checkpoint file as `pretrained`."
        ) from error


def _uses_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the weights of this tag were trained with QuickGELU; open_clip warns of a mismatch but does not mend it."""
    tagged = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    return bool(tagged.get("quick_gelu", False))


def _named_config(name: str, pretrained: str | None) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    if _uses_quick_gelu(name, pretrained):
        config["quick_gelu"] = True
    return config


def _load_weights(model: nn.Module, path: str, name: str) -> None:
    """Load a checkpoint file into the model, never running code from it, and refuse weights that do not fit or hold NaN."""
    if not _is_file(path):
        raise FileNotFoundError(f"No checkpoint file at {path!r} for the model {name[:80]!r}.")
    try:
        state = load_state_dict(path, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is no plain state dict ({_first_line(error)}). Only .safetensors and files that "
            "`torch.load(..., weights_only=True)` accepts are read, because any other could run code."
        ) from error
    state = {key.removeprefix("clip.model."): value for key, value in state.items() if key not in _MODULE_STATE}
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds NaN or Inf in {bad[:3]} ({len(bad)} tensors). Take an earlier checkpoint.")
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader resizes position embeddings and converts older layouts; it only takes files.
        plain = Path(folder) / "weights.pt"
        torch.save(state, plain)
        try:
            open_clip.load_checkpoint(model, str(plain))
        except RuntimeError as error:
            raise ValueError(f"The weights in {path} do not fit the model {name[:80]!r}: {error}") from error


# Buffers that `ClipModule` keeps beside the model.
_MODULE_STATE = {"mean_film"}


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def _plain(value: Any) -> Any:
    """The value in types that JSON has, so that a checkpoint with it loads without running code."""
    return json.loads(json.dumps(value, default=asdict))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _not_explained(side: str, tower: nn.Module, reason: str) -> str:
    return (
        f"Maps of the {side} tower {type(tower).__name__} are not supported: {reason}. "
        "Supported are open_clip's own ViT with a class token and its text transformer; training works with any tower."
    )
