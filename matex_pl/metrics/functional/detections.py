"""The connected parts of a map above a threshold as boxes, held against the boxes of the pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor

from matex_pl.training.distributed import first_of_each

# Numbers in one table of resamples by detections.
_TABLE = 2**24


@dataclass(frozen=True)
class Components:
    """The n components of B maps, by pair and there in raster order of their first pixels.

    Args:
        pair: `(n,)` long, the index of the map.
        boxes: `(n, 4)` `x0, y0, x1, y1` in [0, 1] of the map's frame.
        peak: `(n,)` the map's maximum in the component.
    """

    pair: Tensor
    boxes: Tensor
    peak: Tensor


def components(maps: Tensor, threshold: float) -> Components:
    """The 8-connected components of `map > threshold`, of maps `(B, H, W)`."""
    label, pair, boxes = label_components(maps > threshold)
    label, place = label.flatten(), torch.arange(label.numel(), device=maps.device)
    first = place.new_full((len(pair) + 1,), label.numel()).scatter_reduce(0, label, place, "amin")[1:]
    peak = maps.new_zeros(len(pair) + 1).scatter_reduce(0, label, maps.flatten(), "amax", include_self=False)[1:]
    order = first.argsort()
    return Components(pair[order], boxes.to(maps.dtype)[order], peak[order])


def label_components(above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 8-connected components of masks.

    Args:
        above: `(B, H, W)` bool.

    Returns:
        Of each cell the number of its component, from 1, or 0 `(B, H, W)`; of each of the n components the index of its
        mask `(n,)`, and its box `(n, 4)` `x0, y0, x1, y1` in [0, 1].
    """
    number, height, width = above.shape
    if not above.numel():
        return above.long(), above.new_zeros(0, dtype=torch.long), torch.zeros(0, 4, device=above.device)
    # One image of all masks, with an empty row between; to OpenCV on the CPU.
    stacked = torch.nn.functional.pad(above.to(torch.uint8), (0, 0, 0, 1)).flatten(0, 1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(stacked.cpu().numpy(), connectivity=8, ltype=cv2.CV_32S)
    label = torch.from_numpy(labels).to(above.device).view(number, height + 1, width)[:, :-1].long()
    left, top, across, down = torch.from_numpy(stats[1:, :4]).to(above.device).long().T
    pair = top // (height + 1)
    top = top - pair * (height + 1)
    corners = torch.stack([left, top, left + across, top + down], 1)
    return label, pair, corners / torch.tensor([width, height, width, height], device=above.device)


def best_box_iou(components: Components, boxes: Sequence[Tensor], number: int) -> Tensor:
    """IoU of the box of the component with the highest peak with the pair's best box, `(B,)`.

    0 without a component, NaN without boxes; of equal peaks the first component counts.

    Args:
        components: Components of `number` maps.
        boxes: B tensors `(K, 4)`, `x0, y0, x1, y1` in [0, 1].
        number: B.

    Raises:
        ValueError: There are not B lists of boxes.
    """
    if len(boxes) != number:
        raise ValueError(f"There are {number} maps, but boxes of {len(boxes)} pairs.")
    order = _by_peak(components)
    best = _overlaps(components, boxes).amax(1)[order] if len(order) else components.peak
    pair = components.pair[order]
    leads = first_of_each(pair)
    result = components.peak.new_zeros(number).scatter(0, pair[leads], best[leads])
    without = torch.tensor([not len(box) for box in boxes], dtype=torch.bool, device=result.device)
    return result.masked_fill(without, torch.nan)


def box_accuracy(components: Components, boxes: Sequence[Tensor], number: int, iou: float = 0.5) -> Tensor:
    """1 where `best_box_iou` exceeds `iou`, else 0; NaN without boxes. `(B,)`."""
    best = best_box_iou(components, boxes, number)
    return (best > iou).to(best).masked_fill(best.isnan(), torch.nan)


def match_components(components: Components, boxes: Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """Which components find a box, `(n,)` bool, by the rule of PASCAL VOC (Everingham et al. 2010).

    By descending peak, each component points at the box of its pair that it overlaps most; it hits if their IoU
    exceeds `iou` and no component before it has hit that box.

    Args:
        components: Components of B maps.
        boxes: B tensors `(K, 4)`, `x0, y0, x1, y1` in [0, 1].
        iou: What their overlap has to exceed.
    """
    if not len(components.pair):
        return torch.zeros_like(components.pair, dtype=torch.bool)
    overlap, target = _overlaps(components, boxes).max(1)
    order = _by_peak(components)
    order = order[(overlap > iou)[order]]
    most = max(len(box) for box in boxes) + 1
    takes = order[first_of_each((components.pair * most + target)[order])]
    return torch.zeros_like(components.pair, dtype=torch.bool).scatter(0, takes, True)


def average_precision(
    scores: Tensor, hits: Tensor, pair: Tensor, num_boxes: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Area under the precision envelope over all detections (PASCAL VOC 2010), a scalar or `(R,)`; NaN without boxes.

    Detections of equal score enter together: a map in [0, 1] has a component of score 1 in every pair, and their order
    must not matter.

    Args:
        scores: `(n,)` score of each detection.
        hits: `(n,)` bool, which of them find a box.
        pair: `(n,)` long, the pair of each.
        num_boxes: `(B,)` number of boxes of each pair.
        weights: `(R, B)` how often each pair counts in each of R resamples (bootstrap); once by default.
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
    """Sum over hits of the best precision from there on, `(R,)`: AP times the number of boxes.

    Args:
        counts: `(R, n)` how often each detection counts, by descending score.
        hits: `(n,)` bool.
        last: `(n,)` bool, the last of equal scores.
    """
    found = counts * hits
    seen = counts.cumsum(1)
    precision = found.cumsum(1) / torch.where(seen > 0, seen, torch.ones_like(seen))
    envelope = (precision * last).flip(1).cummax(1).values.flip(1)
    return (found * envelope).sum(1)


def _by_peak(components: Components) -> Tensor:
    """The order of descending peaks, equal ones as they come."""
    return components.peak.argsort(descending=True, stable=True)


def _overlaps(components: Components, boxes: Sequence[Tensor]) -> Tensor:
    """IoU of each component's box with each box of its pair, `(n, K)`; 0 where a pair has fewer, K at least 1."""
    return box_iou(components.boxes[:, None], pad_boxes(boxes, components.boxes)[components.pair])


def pad_boxes(boxes: Sequence[Tensor], like: Tensor) -> Tensor:
    """The boxes of B pairs `(B, K, 4)`, filled up with empty ones, at least one each."""
    padded = torch.nn.utils.rnn.pad_sequence([box.to(like).view(-1, 4) for box in boxes], batch_first=True)
    return torch.nn.functional.pad(padded, (0, 0, 0, 1))


def box_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """IoU of boxes `(..., 4)` with others, by the rules of broadcasting; NaN of two empty ones."""
    sides = (torch.minimum(ours[..., 2:], theirs[..., 2:]) - torch.maximum(ours[..., :2], theirs[..., :2])).clamp(min=0)
    common = sides.prod(-1)
    return common / (_area(ours) + _area(theirs) - common)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)
