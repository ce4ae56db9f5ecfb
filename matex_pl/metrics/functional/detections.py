"""Connected components of a thresholded map as boxes, matched to the boxes of the pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor

from matex_pl.maps import moved
from matex_pl.metrics.functional.localization import has_order
from matex_pl.training.distributed import first_of_each

# Maximum size of one table of resamples by detections.
_TABLE = 2**24
# A box of half the size of another has an IoU of exactly one half with it, up to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Components:
    """The n components of B maps, sorted by pair and then by first pixel in raster order.

    Args:
        pair: `(n,)` long, index of the map.
        boxes: `(n, 4)` boxes `x0, y0, x1, y1` in [0, 1] of the map's frame.
        peak: `(n,)` maximum of the map in the component.
    """

    pair: Tensor
    boxes: Tensor
    peak: Tensor


def components(maps: Tensor, threshold: float) -> Components:
    """8-connected components of `map > threshold`, for maps `(B, H, W)` of any floating type."""
    maps = maps.float()
    number, height, width = maps.shape
    if not maps.numel():
        return Components(torch.zeros(0, dtype=torch.long, device=maps.device), maps.new_zeros(0, 4), maps.new_zeros(0))
    # OpenCV gets all masks as one image on the CPU, with an empty row between them.
    stacked = torch.nn.functional.pad((maps > threshold).to(torch.uint8), (0, 0, 0, 1)).flatten(0, 1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(stacked.cpu().numpy(), connectivity=8, ltype=cv2.CV_32S)
    # Number of each pixel's component, from 1; 0 outside.
    label = torch.from_numpy(labels).to(maps.device).view(number, height + 1, width)[:, :-1].long().flatten()
    left, top, across, down = torch.from_numpy(stats[1:, :4]).to(maps.device).long().T
    pair = top // (height + 1)
    top = top - pair * (height + 1)
    corners = torch.stack([left, top, left + across, top + down], 1)
    boxes = corners / moved(torch.tensor([width, height, width, height]), maps.device)
    place = torch.arange(label.numel(), device=maps.device)
    first = place.new_full((len(pair) + 1,), label.numel()).scatter_reduce(0, label, place, "amin")[1:]
    peak = maps.new_zeros(len(pair) + 1).scatter_reduce(0, label, maps.flatten(), "amax", include_self=False)[1:]
    order = first.argsort()
    return Components(pair[order], boxes.to(maps.dtype)[order], peak[order])


def best_box_iou(components: Components, boxes: Sequence[Tensor], number: int) -> Tensor:
    """IoU of the highest component's box with the pair's best box, `(B,)`.

    The highest component is that with the highest peak, the first of equal ones. The IoU is 0 without a component and
    NaN without boxes. `boxes` holds `(K, 4)` boxes for each of the `number` maps, `x0, y0, x1, y1` in [0, 1].

    Raises:
        ValueError: If the number of box lists differs from that of the maps.
    """
    if len(boxes) != number:
        raise ValueError(f"There are {number} maps, but boxes of {len(boxes)} pairs. Give one tensor of boxes per map.")
    order = components.peak.argsort(descending=True, stable=True)
    best = _overlaps(components, boxes).amax(1)[order] if len(order) else components.peak
    pair = components.pair[order]
    leads = first_of_each(pair)
    result = components.peak.new_zeros(number).scatter(0, pair[leads], best[leads])
    without = moved(torch.tensor([not len(box) for box in boxes], dtype=torch.bool), result.device)
    return result.masked_fill(without, torch.nan)


def reaches(overlap: Tensor, iou: float) -> Tensor:
    """Overlaps of at least `iou`, up to rounding: the rule of every metric that compares boxes."""
    return overlap >= iou - _ROUNDING


def box_accuracy(components: Components, boxes: Sequence[Tensor], number: int, iou: float = 0.5) -> Tensor:
    """1 if `best_box_iou` `reaches` `iou`, else 0; NaN without boxes. `(B,)`."""
    best = best_box_iou(components, boxes, number)
    return reaches(best, iou).to(best).masked_fill(best.isnan(), torch.nan)


def map_accuracy(maps: Tensor, components: Components, boxes: Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """`box_accuracy` of maps `(B, H, W)` with their components; also NaN for flat maps. `(B,)`."""
    found = box_accuracy(components, boxes, len(maps), iou)
    return found.masked_fill(~has_order(maps).to(found.device), torch.nan)


def match_components(components: Components, boxes: Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """Mask `(n,)` bool of the components that hit a box, by the rule of PASCAL VOC (Everingham et al. 2010).

    In order of descending peak, each component is assigned to the box of its pair that it overlaps most. It hits the
    box if their IoU `reaches` `iou` and no earlier component has hit that box. See `best_box_iou` for `boxes`.
    """
    if not len(components.pair):
        return torch.zeros_like(components.pair, dtype=torch.bool)
    overlap, target = _overlaps(components, boxes).max(1)
    order = components.peak.argsort(descending=True, stable=True)
    order = order[reaches(overlap, iou)[order]]
    most = max(len(box) for box in boxes) + 1
    takes = order[first_of_each((components.pair * most + target)[order])]
    return torch.zeros_like(components.pair, dtype=torch.bool).scatter(0, takes, True)


def detection_scores(components: Components, pair_scores: Tensor) -> Tensor:
    """Score of each component `(n,)` in [0, 1]: its peak times (1 + s) / 2, with the score s of its pair in [-1, 1].

    Maps in [0, 1] have a peak of 1 in every pair. By the peak alone, a detection in a pair that the model finds alike
    ranks no higher than one in a pair that it does not.

    Args:
        components: Components of B maps.
        pair_scores: `(B,)` cosines of the pairs, for example `Attribution.score`.
    """
    return components.peak * (1 + pair_scores.to(components.peak)[components.pair]).clamp(min=0) / 2


def average_precision(
    scores: Tensor, hits: Tensor, pair: Tensor, num_boxes: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Area under the precision envelope over all detections (PASCAL VOC 2010), a scalar or `(R,)`; NaN without boxes.

    Detections of equal score are added together, because their order must not matter.

    Args:
        scores: `(n,)` score of each detection, for example from `detection_scores`.
        hits: `(n,)` bool mask of the detections that hit a box.
        pair: `(n,)` long, pair of each detection.
        num_boxes: `(B,)` number of boxes of each pair.
        weights: `(R, B)` counts of each pair in each of R bootstrap resamples; 1 by default.
    """
    if weights is None:
        return average_precision(scores, hits, pair, num_boxes, torch.ones_like(num_boxes)[None])[0]
    weights = weights.float()
    order = scores.argsort(descending=True)
    scores, hits, pair = scores[order], hits[order], pair[order]
    last = torch.ones_like(hits)
    last[:-1] = scores[1:] != scores[:-1]
    rows = weights.split(max(1, _TABLE // max(1, len(scores))))
    area = torch.cat([_envelope_area(drawn[:, pair], hits, last) for drawn in rows])
    return area / (weights @ num_boxes.float())


def _envelope_area(counts: Tensor, hits: Tensor, last: Tensor) -> Tensor:
    """Sum over hits `(n,)` of the best precision from each hit on, `(R,)`: AP times the number of boxes.

    `counts` `(R, n)` holds the count of each detection, by descending score. `last` `(n,)` marks the last of equal
    scores.
    """
    correct, seen = counts * hits, counts.cumsum(1)
    precision = correct.cumsum(1) / torch.where(seen > 0, seen, torch.ones_like(seen))
    envelope = (precision * last).flip(1).cummax(1).values.flip(1)
    return (correct * envelope).sum(1)


def _overlaps(components: Components, boxes: Sequence[Tensor]) -> Tensor:
    """IoU of each component's box with each box of its pair, `(n, K)`, K at least 1; 0 for missing boxes."""
    padded = torch.nn.utils.rnn.pad_sequence([box.to(components.boxes).view(-1, 4) for box in boxes], batch_first=True)
    own, targets = components.boxes[:, None], torch.nn.functional.pad(padded, (0, 0, 0, 1))[components.pair]
    low, high = torch.maximum(own[..., :2], targets[..., :2]), torch.minimum(own[..., 2:], targets[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common / (_area(own) + _area(targets) - common)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)
