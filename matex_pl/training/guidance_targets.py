"""Targets of the guidance: the share of each patch that boxes, named regions or the anatomy cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matex_pl.anatomy.parser import parse_phrase
from matex_pl.data.chest import LUNGS
from matex_pl.data.masks import LUNGS_AND_HEART
from matex_pl.maps import moved, patch_mean


def box_share(boxes: Sequence[Tensor], grid: tuple[int, int], device: torch.device) -> Tensor:
    """Share of each patch inside the boxes of its sample, `(B, Gh, Gw)` in [0, 1].

    The shares of several boxes are added, at most to 1, which is exact for boxes that do not overlap.

    Args:
        boxes: B tensors `(K, 4)` of `x0, y0, x1, y1` in [0, 1] of the frame.
        grid: Rows and columns of patches.
        device: Device of the result.
    """
    # Padding has no area.
    padded = pad_sequence([part.to(device, torch.float32).reshape(-1, 4) for part in boxes], batch_first=True)
    across = _covered(padded[..., 0], padded[..., 2], grid[1])
    down = _covered(padded[..., 1], padded[..., 3], grid[0])
    return torch.einsum("brh,brw->bhw", down, across).clamp(max=1)


def _covered(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Share of each of `count` equal parts of [0, 1] between `low` and `high` `(B, R)`: `(B, R, count)`."""
    edges = torch.arange(count, device=low.device)
    start, stop = (low * count)[..., None], (high * count)[..., None]
    return (torch.minimum(stop, edges + 1) - torch.maximum(start, edges)).clamp(min=0)


def region_boxes(phrases: Sequence[str], content_box: Tensor) -> list[Tensor]:
    """Boxes of the regions that each phrase names, `(K, 4)` in [0, 1] of the frame; none for a phrase without regions.

    Args:
        phrases: The B phrases.
        content_box: `(B, 4)` rectangles of the images in the frame.
    """
    corner, side = content_box[:, :2].repeat(1, 2), (content_box[:, 2:] - content_box[:, :2]).repeat(1, 2)
    named = [named_regions(phrase) for phrase in phrases]
    # One copy to the device for all phrases.
    flat = torch.tensor([box for boxes in named for box in boxes], dtype=content_box.dtype).reshape(-1, 4)
    parts = moved(flat, content_box.device).split([len(boxes) for boxes in named])
    return [corner[row] + part * side[row] for row, part in enumerate(parts)]


@lru_cache(maxsize=65_536)
def named_regions(phrase: str) -> list[tuple[float, float, float, float]]:
    """Boxes of the regions that a phrase names, in [0, 1] of the image; none if it names no place."""
    # The patient's right, where u is 0, is on the left of the image.
    return sorted({region.box for region in parse_phrase(phrase).regions})


def anatomy_share(
    masks: Mapping[str, Tensor], count: int, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Share of each patch inside lungs and heart, `(B, Gh, Gw)`, and the samples with both lungs, `(B,)` bool.

    With one lung alone, a map in the other one would count as outside.

    Args:
        masks: `(B, H, W)` bool by structure; False everywhere for a sample without the structure.
        count: B, for a batch without masks.
        grid: Rows and columns of patches.
        device: Device of the result.
    """
    found = [masks[name] for name in LUNGS_AND_HEART if name in masks]
    if not set(LUNGS) <= masks.keys():
        return torch.zeros(count, *grid, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    lungs = torch.stack([masks[name].flatten(1).any(1) for name in LUNGS])
    return patch_mean(torch.stack(found).any(0).float(), grid), lungs.all(0)
