"""Reading of weights from files, without running code: checks, and errors that name the weights."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.low_rank import merge_adapters
from matex_pl.clip.record import recorded_config, recorded_lora

# `ClipModule` stores the model under this prefix, and further tensors under others.
PREFIX = "clip.model."
# Entries of OpenAI's archives, next to the weights.
_OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|base_model\.model)\.")
_ADAPTERS = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+)\b")


@dataclass
class Weights:
    """Content of a file of weights.

    Args:
        path: Path of the file.
        state: Weights of the model by their plain names.
        config: Config of the model, if `matex fit` wrote the file.
        checkpoint: Whole content of the file, if `matex fit` wrote it, with its adapters merged.
        is_openai: Whether the file has the entries of OpenAI's archives.
    """

    path: str
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    is_openai: bool = False

    @property
    def files(self) -> dict[str, Tensor]:
        """Files of the tokenizer and the towers in the checkpoint; see `model_files`."""
        return dict(self.checkpoint.get("model_files") or {})


def why_unreadable(error: BaseException) -> str:
    """One-line reason why a file was not read, with the code that the file would run."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    return f"it would run {code[1]}" if code else first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if the message is empty; at most 400 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


@contextmanager
def reading_checkpoint(path: str) -> Iterator[None]:
    """Context for reading a checkpoint of `matex fit`: an error that does not name the file becomes `no_checkpoint`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Any other error.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at {path!r}. `matex fit` writes them below its log folder.")
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and path in str(error):
            raise
        raise no_checkpoint(path, error) from error


def no_checkpoint(path: str | Path, error: BaseException) -> ValueError:
    """Error for an unreadable checkpoint, with the file and the code or weights at fault."""
    return ValueError(f"{path} is no checkpoint of `matex fit`: {why_unreadable(error)}")


def plain_name(key: str) -> str:
    """Name of a weight without the prefixes of `torch.compile`, DDP and PEFT."""
    while (shorter := _WRAPPERS.sub(r"\1", key).removeprefix("module.")) != key:
        key = shorter
    own = key.removeprefix(PREFIX)
    return key if own == key else PREFIX + plain_name(own)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their plain names."""
    return {plain_name(key): value for key, value in state.items()}


def read_content(path: str) -> Any:
    """Content of a file of `torch.save` or safetensors; no code of the file is run.

    Raises:
        ValueError: The file is a TorchScript archive, which holds code.
    """
    if path.endswith(".safetensors"):
        return load_file(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(
            f"{path} is a TorchScript archive, the form of OpenAI's own downloads. It holds code and is not read. If "
            "you trust the file, convert it: torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt')."
        )
    # Mapped: the state of the optimizer in a checkpoint is not read.
    return torch.load(path, "cpu", weights_only=True, mmap=is_zip)


def read_weights(path: str) -> Weights:
    """Weights of a file, without running code from it.

    Raises:
        ValueError: The file holds no weights, would run code, or holds adapters of PEFT.
    """
    try:
        return _read(path)
    except Exception as error:
        if isinstance(error, ValueError) and path in str(error):
            raise
        raise ValueError(
            f"{path} is no plain state dict ({why_unreadable(error)}). Only .safetensors and files that "
            "`torch.load(..., weights_only=True)` accepts are read, because any other could run code."
        ) from error


def read_checkpoint(path: str) -> Weights:
    """Weights of a checkpoint of `matex fit`, with the config of their model; no code of the file is run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of `matex fit`.
    """
    with reading_checkpoint(path):
        weights = _read(path)
        if weights.config is None:
            raise ValueError(
                "it does not record the model of its weights. Give the model's name, and the file as pretrained."
            )
        return weights


def _read(path: str) -> Weights:
    content = read_content(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(part, Tensor) for part in state.values()):
        raise ValueError("it holds no tensors, or more than tensors")
    adapters, lora = [key for key in state if _ADAPTERS.search(key)], recorded_lora(content)
    if adapters and lora:
        state = merge_adapters(state, lora)
        content = {**content, "hyper_parameters": {**content["hyper_parameters"], "lora": None}}
    elif adapters:
        raise ValueError(
            f"{path} holds adapters of PEFT in {_some(adapters)}. Merge them before saving: `merge_and_unload()`."
        )
    state = plain_state(state)
    ours = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if ours:
        config = recorded_config(content)
        return Weights(path, ours, config, dict(content, state_dict=state) if config else {})
    weights = {key: value for key, value in state.items() if key not in _OPENAI_KEYS}
    return Weights(path, weights, is_openai=bool(_OPENAI_KEYS & state.keys()))


def are_openai(weights: Weights) -> bool:
    """Whether weights are OpenAI's: by their entries, or matrices of half precision next to embeddings of single.

    OpenAI published its matrices, and nothing else, in half precision, with a logit scale of 100. Weights that were
    trained further, or with mixed precision, have other values in their matrices.
    """
    if weights.is_openai:
        return True
    state = weights.state
    matrices = [value for key, value in state.items() if key.endswith(("attn.in_proj_weight", "text_projection"))]
    embedding, scale = state.get("token_embedding.weight"), state.get("logit_scale")
    if weights.config or not matrices or embedding is None or scale is None or abs(float(scale.exp()) - 100) > 0.1:
        return False
    return all(_is_half(part) for part in matrices) and not _is_half(embedding)


def _is_half(values: Tensor) -> bool:
    return values.dtype == torch.float16 or torch.equal(values, values.half().to(values.dtype))


def load_weights(model: nn.Module, weights: Weights, name: str) -> None:
    """Load weights into a model, with position embeddings of images interpolated to its size.

    Raises:
        ValueError: Keys are missing, extra or of another shape, or the text positions have another length.
    """
    refuse_context(model, weights)
    state = _interpolated(weights.state, model)
    source = f"{weights.path} does not fit the model {short(name)}"
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader resizes position embeddings and converts older layouts; it only takes files.
        plain = Path(folder) / "weights.pt"
        torch.save(state, plain)
        try:
            keys = open_clip.load_checkpoint(model, str(plain), strict=False)
            problem = misfit(keys.missing_keys, keys.unexpected_keys) if keys else ""
        except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
            problem = key_misfit(model.state_dict(), state) or first_line(error)
            raise ValueError(f"{source}: {problem}. Give the model that the weights belong to.") from error
    if problem:
        raise ValueError(f"{source}: {problem}. Give the model that the weights belong to.")


def key_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Text on keys that are missing in `state`, extra, or of another shape than in `own`; empty if all fit."""
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return misfit([key for key in own if key not in state], [key for key in state if key not in own], shapes)


def misfit(missing: Sequence[str], extra: Sequence[str], shapes: Sequence[str] = ()) -> str:
    """Text on missing keys, extra keys and other shapes: the count and the first five of each; empty without any."""
    parts = {"missing": missing, "extra": extra, "of another shape": shapes}
    return "; ".join(f"{kind}: {_some(keys)}" for kind, keys in parts.items() if keys)


def torch_misfit(error: BaseException) -> str:
    """`misfit` of torch's error for weights that do not fit a model; its first line for any other error."""
    parts = dict(re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", str(error)))
    names = {kind: re.findall(r'"([^"]+)"', text) for kind, text in parts.items()}
    shapes = re.findall(r"size mismatch for ([^:\s]+):", str(error))
    return misfit(names.get("Missing", []), names.get("Unexpected", []), shapes) or first_line(error)


def _some(keys: Sequence[str]) -> str:
    return f"{len(keys)} key{'s' * (len(keys) > 1)} ({', '.join(keys[:5])}{', ...' * (len(keys) > 5)})"


def refuse_context(model: Any, weights: Weights) -> None:
    """Raise ValueError if the text positions have another length than the model's: open_clip would interpolate them."""
    own, names = model.state_dict(), ("positional_embedding", "text.positional_embedding")
    before = next((weights.state[name] for name in names if name in weights.state), None)
    now = next((own[name] for name in names if name in own), None)
    if before is not None and now is not None and len(before) != len(now):
        raise ValueError(
            f"{weights.path} holds positions of {len(before)} tokens of text, the model has {len(now)}. Positions of "
            f"words are not interpolated. Set text_cfg.context_length to {len(before)}."
        )


def _interpolated(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights with a timm tower's position embeddings interpolated to the model; open_clip interpolates its own."""
    trunk = getattr(model.visual, "trunk", None)
    key = "visual.positional_embedding" if trunk is None else "visual.trunk.pos_embed"
    old, new = state.get(key), model.state_dict().get(key)
    if old is None or new is None or old.shape == new.shape:
        return state
    grid, prefix = towers.patch_grid(model.visual), getattr(trunk, "num_prefix_tokens", 1)
    patches = old.shape[-2] - prefix
    if isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"{key} holds positions of {patches} patches, which is no square raster and cannot be interpolated to the "
            f"model's {grid}. Set image_size to the height and width of the training."
        )
    if trunk is None:
        return state
    return state | {key: resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)}


def refuse_nan(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError with the names of the weights if some hold NaN or Inf."""
    bad = [key for key, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{short(source)} holds NaN or Inf in {', '.join(bad[:3])} ({len(bad)} tensors). Use earlier weights."
        )


def short(name: str) -> str:
    """A name or path in quotes; the text of a config is shortened."""
    return repr(f"{name[:77]}..." if name.lstrip().startswith("{") and len(name) > 80 else name)
