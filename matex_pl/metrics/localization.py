"""Agreement of maps with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from matex_pl.maps import moved
from matex_pl.metrics import functional
from matex_pl.metrics.base import BoxMetric, check_boxes
from matex_pl.metrics.functional import THRESHOLDS, masks_of


class PointingGame(BoxMetric):
    """Share of pairs with boxes whose map has its maximum in a box or near one (Zhang et al. 2018).

    Args:
        tolerance: Largest distance from the maximum to the nearest pixel of a box, in pixels. Zhang et al. use 15.
        size: Size in pixels of the maps' longest side that `tolerance` refers to; the size of the given maps by
            default.

    Examples:
        >>> metric = PointingGame()
        >>> metric.update(torch.eye(2)[None].flip(2), [torch.tensor([[0.5, 0.0, 1.0, 0.5]])])
        >>> float(metric.compute())
        1.0
    """

    def __init__(self, tolerance: float = 0.0, size: int | None = None) -> None:
        super().__init__(tolerance, size)
        if not 0 <= tolerance < inf:
            raise ValueError(f"tolerance must be a number of pixels from 0, got {tolerance}.")
        if size is not None and size < 1:
            raise ValueError(f"size must be a number of pixels from 1, got {size}.")
        self.tolerance = tolerance
        self.size = size

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        scale = 1 if self.size is None else max(maps.shape[1:]) / self.size
        return functional.pointing_game(maps, masks_of(maps, boxes), self.tolerance * scale)


class ContrastToNoise(BoxMetric):
    """Mean signed contrast-to-noise ratio between inside and outside of the boxes (Boecking et al. 2022).

    Args:
        content_only: Whether to leave out the padding around the image; `update` then needs `content_box`.

    Examples:
        >>> metric = ContrastToNoise()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [0.5, 0.1]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        2.7456
    """

    plot_lower_bound = None
    plot_upper_bound = None

    def __init__(self, content_only: bool = False) -> None:
        super().__init__(content_only)
        self.content_only = content_only

    def update(
        self,
        maps: Tensor,
        boxes: Sequence[Tensor],
        ids: Sequence[str] | None = None,
        content_box: Tensor | None = None,
    ) -> None:
        """Add B maps `(B, H, W)`, their boxes `(K, 4)`, the pairs' ids, and the places `(B, 4)` of the images.

        Boxes and places are `x0, y0, x1, y1` in [0, 1] of the map's frame.

        Raises:
            ValueError: If `content_box` is missing with `content_only`.
        """
        check_boxes(maps, boxes)
        if self.content_only and content_box is None:
            raise ValueError("content_only=True needs the place of each image. Give content_box, (B, 4).")
        if not self.content_only:
            content_box = None
        counted = None if content_box is None else masks_of(maps, list(content_box[:, None]))
        self._add(functional.contrast_to_noise(maps, masks_of(maps, boxes), counted), ids)


class BoxContrast(BoxMetric):
    """Mean absolute contrast-to-noise ratio of single boxes, a form that some papers publish; see `box_contrast`.

    Examples:
        >>> metric = BoxContrast()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [0.5, 0.1]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        2.7456
    """

    plot_upper_bound = None

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        return functional.box_contrast(maps, boxes)


class EnergyPointingGame(BoxMetric):
    """Mean share of the map's mass inside the boxes (Wang et al. 2020); maps of zeros do not count.

    Examples:
        >>> metric = EnergyPointingGame()
        >>> metric.update(torch.tensor([[[0.9, 0.0], [0.6, 0.5]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        0.75
    """

    _score = staticmethod(functional.energy_pointing_game)


class RelevanceRankAccuracy(BoxMetric):
    """Mean share of the K highest pixels that lie inside boxes of K pixels (Arras et al. 2022).

    Examples:
        >>> metric = RelevanceRankAccuracy()
        >>> metric.update(torch.tensor([[[0.9, 0.6], [0.5, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        0.5
    """

    _score = staticmethod(functional.relevance_rank_accuracy)


class MeanIoU(BoxMetric):
    """Mean intersection over union of map and boxes, over the thresholds .1, .2, .3, .4, .5 and over pairs.

    Args:
        signed: Whether each map is rescaled to [-1, 1] first, as in published tables of zero-shot grounding.

    Examples:
        >>> metric = MeanIoU()
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        0.8667
    """

    def __init__(self, signed: bool = False) -> None:
        super().__init__(signed)
        self.signed = signed

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        return functional.mean_iou(maps, masks_of(maps, boxes), signed=self.signed)


class ThresholdedIoU(BoxMetric):
    """Mean intersection over union of the boxes and `map > threshold`, with one threshold for all pairs.

    Without a threshold, the best of `THRESHOLDS` is used. Do this on the validation split, and pass `best_threshold()`
    to the metric of the test split.

    Args:
        threshold: Threshold in [0, 1); the best of `THRESHOLDS` by default.

    Examples:
        >>> metric = ThresholdedIoU()
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute()), metric.best_threshold()
        (1.0, 0.3)
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__(threshold)
        if threshold is not None:
            check_threshold(threshold)
        self.thresholds = THRESHOLDS if threshold is None else (threshold,)
        self.columns = len(self.thresholds)

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        return functional.iou(maps, masks_of(maps, boxes), self.thresholds)

    def best_threshold(self) -> float:
        """Threshold with the highest mean, the lowest of equal ones; NaN if no pair counts.

        With several processes, all of them must call this method.
        """
        with self.sync_context():
            means = self._gathered("values")[self._counted()].nanmean(0)
        return float("nan") if means.isnan().all() else self.thresholds[int(means.argmax())]

    def _reduce(self, values: Tensor) -> Tensor:
        return values.nanmean(0).max()


class BoxAccuracy(BoxMetric):
    """Share of pairs with boxes whose map finds a box (Acc@0.5).

    The map's box encloses the connected component of `map > threshold` with the highest peak. It finds a box if their
    IoU reaches `iou`, see `functional.reaches`. Flat maps do not count.

    Args:
        threshold: Threshold of the map in [0, 1), to be chosen on the validation split (`ThresholdedIoU`).
        iou: IoU that the overlap must reach.

    Examples:
        >>> metric = BoxAccuracy(threshold=0.3)
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        1.0
    """

    def __init__(self, threshold: float = 0.5, iou: float = 0.5) -> None:
        super().__init__(threshold, iou)
        check_threshold(threshold)
        self.threshold = threshold
        self.iou = iou

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        return functional.map_accuracy(maps, functional.components(maps, self.threshold), boxes, self.iou)


class AveragePrecision50(BoxMetric):
    """Average precision of the maps' connected components as boxes (AP50).

    A component is a hit by the rule of PASCAL VOC, if its IoU reaches `iou`, see `functional.reaches`. Components rank
    by `functional.detection_scores` where `update` gets the scores of the pairs, otherwise by their peak. Maps in
    [0, 1] all peak at 1, so the peaks alone rank little. Components of equal score are added together.

    Args:
        threshold: Threshold of the components of `map > threshold`, in [0, 1), to be chosen on the validation split.
        iou: IoU that the overlap must reach.

    Examples:
        >>> metric = AveragePrecision50(threshold=0.3)
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        1.0
    """

    # Number of boxes and of components of each pair.
    columns = 2
    scores: list[Tensor]
    hits: list[Tensor]

    def __init__(self, threshold: float = 0.5, iou: float = 0.5) -> None:
        super().__init__(threshold, iou)
        check_threshold(threshold)
        self.threshold = threshold
        self.iou = iou
        for name in ("scores", "hits"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _empty(self) -> dict[str, Tensor]:
        nothing = torch.zeros(0, device=self.device)
        return super()._empty() | {"scores": nothing, "hits": nothing.bool()}

    def update(
        self,
        maps: Tensor,
        boxes: Sequence[Tensor],
        ids: Sequence[str] | None = None,
        pair_scores: Tensor | None = None,
    ) -> None:
        """Add B maps `(B, H, W)` in [0, 1], their boxes `(K, 4)`, and the pairs' ids and scores `(B,)` in [-1, 1]."""
        check_boxes(maps, boxes)
        found = functional.components(maps, self.threshold)
        number = moved(torch.tensor([len(box) for box in boxes]), maps.device)
        self._add(torch.stack([number, found.pair.bincount(minlength=len(maps))], 1), ids)
        scores = found.peak if pair_scores is None else functional.detection_scores(found, pair_scores)
        self.scores.append(scores.detach().float())
        self.hits.append(functional.match_components(found, boxes, self.iou))

    def _reduce(self, values: Tensor) -> Tensor:
        counted = self._counted()
        number = self._gathered("values")[:, 1].long()
        kept = counted.repeat_interleave(number)
        pair = torch.arange(len(values), device=values.device).repeat_interleave(number[counted])
        return functional.average_precision(
            self._gathered("scores")[kept], self._gathered("hits")[kept], pair, values[:, 0]
        )


def check_threshold(threshold: float) -> None:
    """Refuse a threshold outside [0, 1)."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}. Maps are in [0, 1].")
