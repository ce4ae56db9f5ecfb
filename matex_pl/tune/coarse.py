"""Metrics of finished maps on a raster: of fused maps in any scale, of many settings at once.

Fused maps are `(B, S, P)`, of B studies, S settings and P cells; what is found of each is `(B, S)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from matex_pl.maps import min_max, varies
from matex_pl.metrics import functional as F

# Detections are counted by their score, in so many steps from 0 to 1; those of one step come together.
_STEPS = 1000


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
    return inside.gather(1, _peaks(fused)).float()


def _peaks(fused: Tensor) -> Tensor:
    """Where the maxima are: NumPy finds them several times faster than torch does on a CPU."""
    return torch.from_numpy(fused.cpu().numpy().argmax(-1)).to(fused.device)


def box_accuracy(fused: Tensor, boxes: Tensor, raster: tuple[int, int], threshold: float) -> Tensor:
    """Acc@0.5: whether the box around the cells above a threshold that hang together with the maximum finds a box.

    Of equal maxima the first counts; for the metric, that of the component which begins first.

    Args:
        fused: `(B, S, P)`.
        boxes: `(B, K, 4)` of `x0, y0, x1, y1` in [0, 1]; empty ones do not count.
        raster: Height and width, of P cells.
        threshold: In [0, 1).
    """
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    above = (fused > low + threshold * (high - low)) & varies(low, high, fused.dtype)
    label, _, found = F.label_components(above.flatten(0, 1).unflatten(-1, raster))
    own = label.flatten(1).gather(1, _peaks(fused).view(-1, 1)) - 1
    # A flat map has none, number -1: an empty one.
    whole = torch.cat([found, found.new_zeros(1, 4)])[own].unflatten(0, fused.shape[:2])
    return (F.box_iou(whole, boxes[:, None]) > 0.5).any(-1).float()


def detections(fused: Tensor, boxes: Sequence[Tensor], raster: tuple[int, int], threshold: float) -> Tensor:
    """What `precision` takes: how many components of each score hit and miss their study's boxes, and the boxes.

    Args:
        fused: `(B, S, P)`.
        boxes: B tensors `(K, 4)` of `x0, y0, x1, y1` in [0, 1].
        raster: Height and width, of P cells.
        threshold: In [0, 1).

    Returns:
        `(S, 2 * _STEPS + 1)`, which add up over studies.
    """
    settings = fused.shape[1]
    found = F.components(min_max(fused.flatten(0, 1)).unflatten(-1, raster), threshold)
    hit = F.match_components(found, [box for box in boxes for _ in range(settings)])
    place = (found.peak * _STEPS).long().clamp(max=_STEPS - 1) + _STEPS * ~hit
    counts = torch.bincount(found.study % settings * 2 * _STEPS + place, minlength=settings * 2 * _STEPS)
    number = counts.new_full((settings, 1), sum(map(len, boxes)))
    return torch.cat([counts.view(settings, -1), number], 1)


def precision(counts: Tensor) -> Tensor:
    """The average precision of what `detections` counts, `(..., 2 * _STEPS + 1)`; NaN without boxes."""
    place = torch.arange(2 * _STEPS, device=counts.device)
    # A row of counts is a resample: of studies with a detection each, and one with a box.
    boxes = (torch.arange(2 * _STEPS + 1, device=counts.device) == 2 * _STEPS).long()
    rows = counts.flatten(0, -2)
    found = F.average_precision(place % _STEPS / _STEPS, place < _STEPS, place, boxes, rows)
    return found.view(counts.shape[:-1])


def sum_and_count(values: Tensor) -> Tensor:
    """What `mean` takes of the values of studies `(B, S)`, where NaN does not count: `(S, 2)`, which add up."""
    return torch.stack([values.double().nansum(0), (~values.isnan()).sum(0)], -1)


def mean(sums: Tensor) -> Tensor:
    """The mean of `(..., 2)`, NaN where nothing counts."""
    total, count = sums.unbind(-1)
    return total / torch.where(count > 0, count, torch.nan)


def contrast(fused: Tensor, inside: Tensor) -> Tensor:
    """Contrast-to-noise ratio, which no scale changes."""
    halves = torch.stack([inside, ~inside], 1).float()
    weights = halves / halves.sum(2, keepdim=True)
    mean = _sums(weights, fused)
    noise = (_sums(weights, fused.square()) - mean.square()).clamp(min=0).sum(1).sqrt()
    return (mean[:, 0] - mean[:, 1]) / torch.where(noise > 0, noise, 1)


def _sums(weights: Tensor, fused: Tensor) -> Tensor:
    """Sums over cells, each by K weights `(B, K, P)`: `(B, K, S)`."""
    # The other way round it takes four times as long.
    return weights @ fused.mT


def mass_share(fused: Tensor, weight: Tensor) -> Tensor:
    """Share of the mass in a zone, of which each cell is a part `weight` `(B, P)` in [0, 1]; NaN for a flat map."""
    halves = torch.stack([weight, torch.ones_like(weight)], 1)
    common, mass = (_sums(halves, fused) - fused.amin(-1)[:, None] * halves.sum(2, keepdim=True)).unbind(1)
    return common / torch.where(mass > 0, mass, torch.nan)


def energy(fused: Tensor, inside: Tensor) -> Tensor:
    """Energy in box, 0 for a flat map."""
    return mass_share(fused, inside.float()).nan_to_num(0)


def mean_mass(fused: Tensor) -> Tensor:
    """Mean of the finished map, 0 for a flat one by the rule of `min_max`."""
    low, high = fused.amin(-1), fused.amax(-1)
    return (fused.mean(-1) - low) / torch.where(varies(low, high, fused.dtype), high - low, torch.inf)


def overlap(fused: Tensor, inside: Tensor, thresholds: Sequence[float] = F.MEAN_THRESHOLDS) -> Tensor:
    """Mean IoU over thresholds, by default those of the metric."""
    halves = torch.stack([inside, torch.ones_like(inside)], 1).float()
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    above, size, total = torch.empty_like(fused), inside.sum(1, keepdim=True), torch.zeros_like(low[..., 0])
    for threshold in thresholds:
        # Into numbers at once: sums over bool are slow.
        common, area = _sums(halves, torch.gt(fused, low + threshold * (high - low), out=above)).unbind(1)
        total += common / (area + size - common)
    return total / len(thresholds)


def ranked(fused: Tensor, inside: Tensor) -> Tensor:
    """Relevance rank accuracy; of equal values at the border none count."""
    ordered = _sorted(fused)
    size = inside.sum(1)
    place = (fused.shape[-1] - 1 - size).clamp(min=0)[:, None, None].expand(*fused.shape[:2], 1)
    # What was sorted is needed no more.
    common = _sums(inside.float()[:, None], torch.gt(fused, ordered.gather(2, place), out=ordered))
    return common[:, 0] / size[:, None]


def _sorted(values: Tensor) -> Tensor:
    """In order along the last axis: NumPy sorts many times faster than torch does on a CPU."""
    return torch.from_numpy(np.sort(values.cpu().numpy(), -1)).to(values.device)


def correlations(fused: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Rank correlation of maps with each of N others, `(N, B, S)`; NaN where one of both is flat."""
    number = fused.shape[-1]
    place = torch.arange(number, dtype=torch.int32, device=fused.device)
    order, own_crowded = _sorted_with(place, fused)
    ranks = torch.empty_like(order).scatter_(-1, order.long(), place.expand_as(order))
    found = []
    for other in others:
        ordered, crowded = _sorted_with(ranks, other)
        # Without ties, the squares of either side's ranks, less their mean, sum to a twelfth of this.
        alike = 12 * (ordered.float() @ (place - (number - 1) / 2)) / (number * (number**2 - 1))
        crowded |= own_crowded
        if crowded.any():
            alike[crowded] = F.spearman(fused[crowded], other[crowded])
        found.append(alike)
    return torch.stack(found)


def _sorted_with(numbers: Tensor, fused: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the cells in the order of the cells' values, and where that order is not good enough for ranks.

    A cell's value, in fine steps of the map's range, and its number are sorted as one whole number: NumPy does that
    several times faster than it finds the order of floats. Cells of one step stand in the order of their numbers; where
    they are few, that changes a correlation by 1e-3 and less.

    Args:
        numbers: 0 to P - 1, int32, one of each cell.
        fused: `(B, S, P)`.

    Returns:
        The numbers `(B, S, P)`, and which maps are crowded, `(B, S)`: more than a twentieth of the cells share a step.
    """
    cells = fused.shape[-1]
    bits = (cells - 1).bit_length()
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    # One bit is the sign, one is left free for rounding.
    steps = (fused - low).mul_(2 ** (30 - bits) / torch.where(high > low, high - low, torch.inf))
    keys = _sorted((steps.int() << bits).bitwise_or_(numbers))
    shared = ((keys[..., 1:] ^ keys[..., :-1]) < 2**bits).sum(-1, dtype=torch.int32)
    return keys.bitwise_and_(2**bits - 1), shared > cells // 20
