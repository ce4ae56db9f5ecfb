"""Metrics of finished maps on a raster: of fused maps in any scale, of many settings at once.

Fused maps are `(B, S, P)`, of B studies, S settings and P cells; what is found of them is `(B, S)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from matex_pl.maps import rounding
from matex_pl.metrics import functional as F


def cells_in_boxes(boxes: Sequence[Tensor], raster: tuple[int, int]) -> Tensor:
    """Which cells of a raster have their centre in a box; a box smaller than a cell has the one that it lies in.

    Args:
        boxes: B tensors `(K, 4)` of `x0, y0, x1, y1` in [0, 1].
        raster: Height and width.

    Returns:
        `(B, *raster)` bool.
    """
    # A hair more than a cell: by rounding, a box of exactly one could hold no centre.
    least = 1.0001 / torch.tensor([raster[1], raster[0]])
    grown = []
    for box in boxes:
        box = box.cpu().view(-1, 4).clamp(0, 1)
        middle, half = (box[:, :2] + box[:, 2:]) / 2, torch.maximum(box[:, 2:] - box[:, :2], least) / 2
        grown.append(torch.cat([middle - half, middle + half], 1))
    return F.box_masks(grown, raster)


def hits(fused: Tensor, inside: Tensor) -> Tensor:
    """Pointing game, with which cells `(B, P)` bool lie in boxes."""
    # NumPy finds the maximum several times faster than torch does on a CPU.
    peaks = torch.from_numpy(fused.cpu().numpy().argmax(-1)).to(inside.device)
    return inside.gather(1, peaks).float()


def contrast(fused: Tensor, inside: Tensor) -> Tensor:
    """Contrast-to-noise ratio, which no scale changes."""
    halves = torch.stack([inside, ~inside], 2).float()
    weights = halves / halves.sum(1, keepdim=True)
    mean = fused @ weights
    noise = ((fused.square() @ weights) - mean.square()).clamp(min=0).sum(-1).sqrt()
    return (mean[..., 0] - mean[..., 1]) / torch.where(noise > 0, noise, 1)


def mass_share(fused: Tensor, weight: Tensor) -> Tensor:
    """Share of the mass in a zone, of which each cell is a part `weight` `(B, P)` in [0, 1]; NaN for a flat map."""
    halves = torch.stack([weight, torch.ones_like(weight)], 2)
    common, mass = ((fused @ halves) - fused.amin(-1, keepdim=True) * halves.sum(1, keepdim=True)).unbind(-1)
    return common / torch.where(mass > 0, mass, torch.nan)


def energy(fused: Tensor, inside: Tensor) -> Tensor:
    """Energy in box, 0 for a flat map."""
    return mass_share(fused, inside.float()).nan_to_num(0)


def mean_mass(fused: Tensor) -> Tensor:
    """Mean of the finished map, 0 for a flat one by the rule of `min_max`."""
    low, high = fused.amin(-1), fused.amax(-1)
    varies = high - low > rounding(fused.dtype) * torch.maximum(low.abs(), high.abs())
    return (fused.mean(-1) - low) / torch.where(varies, high - low, torch.inf)


def overlap(fused: Tensor, inside: Tensor, thresholds: Sequence[float] = F.MEAN_THRESHOLDS) -> Tensor:
    """Mean IoU over thresholds, by default those of the metric."""
    halves = torch.stack([inside, torch.ones_like(inside)], 2).float()
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    above, size, total = torch.empty_like(fused), inside.sum(1, keepdim=True), torch.zeros_like(low[..., 0])
    for threshold in thresholds:
        # Into numbers at once: sums over bool are slow.
        common, area = (torch.gt(fused, low + threshold * (high - low), out=above) @ halves).unbind(-1)
        total += common / (area + size - common)
    return total / len(thresholds)


def ranked(fused: Tensor, inside: Tensor) -> Tensor:
    """Relevance rank accuracy; of equal values at the border none count."""
    # NumPy sorts many times faster than torch does on a CPU.
    ordered = torch.from_numpy(np.sort(fused.cpu().numpy(), -1)).to(fused.device)
    size = inside.sum(1)
    place = (fused.shape[-1] - 1 - size).clamp(min=0)[:, None, None].expand(*fused.shape[:2], 1)
    # What was sorted is needed no more.
    common = torch.gt(fused, ordered.gather(2, place), out=ordered) @ inside.float()[..., None]
    return common[..., 0] / size[:, None]


def correlations(fused: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Rank correlation of maps with each of N others, `(N, B, S)`; NaN where one of both is flat."""
    own, own_ties = _centred_ranks(fused)
    number = fused.shape[-1]
    found = []
    for other in others:
        ranks, ties = _centred_ranks(other)
        # Without ties, the squares of either side's ranks sum to a twelfth of this.
        alike = 12 * (own * ranks).sum(-1) / (number * (number**2 - 1))
        ties |= own_ties
        if ties.any():
            alike[ties] = F.spearman(fused[ties], other[ties])
        found.append(alike)
    return torch.stack(found)


def _centred_ranks(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the cells less their mean `(B, S, P)`, and which maps have equal cells, `(B, S)`: their ranks differ.

    A cell's value, in fine steps of the map's range, and its place are sorted as one whole number: NumPy does that
    several times faster than it finds the order of floats. Cells of one step stand in raster order.
    """
    number = fused.shape[-1]
    bits = (number - 1).bit_length()
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    # One bit is the sign, one is left free for rounding.
    steps = (fused - low).mul_(2 ** (30 - bits) / torch.where(high > low, high - low, torch.inf))
    place = torch.arange(number, dtype=torch.int32, device=fused.device)
    keys = np.sort((steps.int() << bits | place).cpu().numpy(), -1)
    order = torch.from_numpy(keys & (2**bits - 1)).to(fused.device).long()
    ranks = torch.empty_like(fused).scatter_(-1, order, (place - (number - 1) / 2).to(fused).expand_as(fused))
    ties = torch.from_numpy((keys[..., 1:] ^ keys[..., :-1]).min(-1, initial=2**bits) < 2**bits).to(fused.device)
    # Most of these are near each other, not equal.
    ties[ties.clone()] = (fused[ties].gather(-1, order[ties]).diff() == 0).any(-1)
    return ranks, ties
