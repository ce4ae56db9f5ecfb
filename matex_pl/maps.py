"""What every attribution method returns, and the map arithmetic that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Attribution:
    """Maps of B image-phrase pairs.

    Args:
        image: `(B, H, W)` in [0, 1], the model's input frame, x to the right, y down.
        grid: `(B, Gh, Gw)` the same at patch resolution.
        text: `(B, T)` in [0, 1]; 0 on special and pad tokens.
        content: `(B, T)` bool, which tokens are content.
        score: `(B,)` cosine of the pair.
        parts: The method's components, by name; each method's docstring lists its own.
    """

    image: Tensor
    grid: Tensor
    text: Tensor
    content: Tensor
    score: Tensor
    parts: dict[str, Any] = field(default_factory=dict)


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better, which all map arithmetic is done in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounding(dtype: torch.dtype) -> float:
    """Share of its magnitude within which what a model computed in `dtype` counts as constant."""
    return max(1e-6, 4 * torch.finfo(dtype).eps)


def differ(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Whose scores `(S, B)`, products of unit vectors, are more than one number and its rounding; `(B,)` bool."""
    return scores.amax(0) - scores.amin(0) > rounding(dtype)


def min_max(z: Tensor, *, keep: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`norm` of the design: (z - min) / (max - min) per sample over all but the first axis; same shape, in [0, 1].

    A sample that is constant within max(1e-6, 4 eps of `dtype`) of its own magnitude gives zeros: the rest is rounding.

    Args:
        z: `(B, ...)`.
        keep: `(B, ...)` bool, the entries that take part; the others become 0. All by default.
        dtype: The dtype that the model computed in, which bounds the rounding in `z`.
    """
    flat = full_precision(z.flatten(1))
    low, high = _extremes(flat, keep)
    varies = high - low > rounding(dtype) * torch.maximum(low.abs(), high.abs())
    scaled = (flat - low) / torch.where(varies, high - low, torch.inf)
    return (scaled if keep is None else scaled.masked_fill(~keep.flatten(1), 0)).view_as(z)


def token_map(values: Tensor, content: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A finished text map `(B, T)`: `min_max` over the content tokens, 0 elsewhere; a single content token has 1.

    Args:
        values: `(B, T)` whatever is relevance.
        content: `(B, T)` bool.
        dtype: The dtype that the model computed in.
    """
    scaled = min_max(values, keep=content, dtype=dtype)
    return torch.where(content.sum(1, keepdim=True) == 1, content.to(scaled), scaled)


def _extremes(flat: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest entry of each row, `(B, 1)` each; 0 where nothing is kept."""
    if keep is None:
        low, high = flat.aminmax(dim=1, keepdim=True)
        return low, high
    mask = keep.flatten(1)
    low = flat.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = flat.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    some = mask.any(1, keepdim=True)
    return low.where(some, 0), high.where(some, 0)


def upsample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling with half-pixel centers: `(B, Gh, Gw)` to `(B, H, W)`, or C maps each `(B, C, Gh, Gw)`."""
    maps = grid if grid.ndim == 4 else grid[:, None]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).view(*grid.shape[:-2], *size)


def patch_mean(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of each patch: `(B, H, W)` to `(B, Gh, Gw)`."""
    return F.adaptive_avg_pool2d(image[:, None], grid)[:, 0]


# The name in 0.1.
AttributionMaps = Attribution
