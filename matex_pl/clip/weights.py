"""Reading of weights from files, without running code: checks, and errors that name the weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from matex_pl.clip import towers


def why_unreadable(error: BaseException) -> str:
    """One-line reason why a file was not read: the code that it would run, or the names of weights that do not fit."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it would run {code[1]}"
    weights = re.search(r"(size mismatch|Missing key|Unexpected key)[^\n]*", str(error))
    return weights[0] if weights else first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if the message is empty; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def reading_checkpoint(path: str) -> Iterator[None]:
    """Context for reading a checkpoint of `matex fit`: any error becomes FileNotFoundError or `no_checkpoint`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at {path!r}. `matex fit` writes them below its log folder.")
    try:
        yield
    except Exception as error:
        raise no_checkpoint(path, error) from error


def no_checkpoint(path: str | Path, error: BaseException) -> ValueError:
    """Error for an unreadable checkpoint, with the file and the code or weights at fault."""
    return ValueError(f"{path} is no checkpoint of `matex fit`: {why_unreadable(error)}")


def load_weights(model: nn.Module, path: str, name: str) -> bool:
    """Load a checkpoint file without running code from it; return whether it is a checkpoint of `ClipModule`."""
    try:
        state = load_state_dict(path, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors")
    except Exception as error:
        raise ValueError(
            f"{path} is no plain state dict ({why_unreadable(error)}). Only .safetensors and files that "
            "`torch.load(..., weights_only=True)` accepts are read, because any other could run code."
        ) from error
    # `ClipModule` stores the model under this prefix, and further tensors under others.
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
            raise ValueError(f"The weights in {path} do not fit the model {short(name)}: {error}") from error
    return bool(ours)


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
