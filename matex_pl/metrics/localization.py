"""How maps agree with boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.metrics import functional
from matex_pl.metrics.base import BoxMean, PairMean, PairMetric, masks_of
from matex_pl.metrics.functional import THRESHOLDS


class PointingGame(BoxMean):
    """Share of pairs with boxes whose map has its maximum in one of them (Zhang et al. 2018).

    Example:
        >>> metric = PointingGame()
        >>> metric.update(torch.eye(2)[None].flip(2), [torch.tensor([[0.5, 0.0, 1.0, 0.5]])])
        >>> float(metric.compute())
        1.0
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        return functional.pointing_game(maps, masks)


class ContrastToNoise(BoxMean):
    """Mean signed contrast-to-noise ratio between inside and outside of the boxes (Boecking et al. 2022).

    Example:
        >>> metric = ContrastToNoise()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [0.5, 0.1]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        2.7456
    """

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        return functional.contrast_to_noise(maps, masks)


class EnergyPointingGame(BoxMean):
    """Mean share of the map's mass that lies in the boxes (Wang et al. 2020); 0 for a map of zeros.

    Example:
        >>> metric = EnergyPointingGame()
        >>> metric.update(torch.tensor([[[0.9, 0.0], [0.6, 0.5]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        0.75
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        return functional.energy_pointing_game(maps, masks)


class RelevanceRankAccuracy(BoxMean):
    """Mean share of the K highest pixels that lie in the boxes of K pixels (Arras et al. 2022).

    Example:
        >>> metric = RelevanceRankAccuracy()
        >>> metric.update(torch.tensor([[[0.9, 0.6], [0.5, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        0.5
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        return functional.relevance_rank_accuracy(maps, masks)


class MeanIoU(BoxMean):
    """Mean intersection over union of map and boxes, over the thresholds .1, .2, .3, .4, .5 and over pairs.

    Example:
        >>> metric = MeanIoU()
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        0.8667
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        return functional.mean_iou(maps, masks)


class ThresholdedIoU(PairMetric):
    """Mean intersection over union of the boxes and `map > threshold`, at one threshold for all pairs.

    Without one, all of `THRESHOLDS` are tried and the best is taken: do this on the validation split, and give
    `best_threshold()` to the metric of the test split.

    Args:
        threshold: In [0, 1).

    Example:
        >>> metric = ThresholdedIoU()
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute()), metric.best_threshold()
        (1.0, 0.3)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        if threshold is not None:
            check_threshold(threshold)
        self.thresholds = THRESHOLDS if threshold is None else (threshold,)
        self.columns = len(self.thresholds)

    def update(self, maps: Tensor, boxes: Sequence[Tensor], ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame; and the pairs' ids."""
        self._add(functional.iou(maps, masks_of(maps, boxes), self.thresholds), ids)

    def best_threshold(self) -> float:
        """The threshold with the highest mean, the lowest of equal ones; NaN if no pair counts.

        Among processes all have to call it.
        """
        with self.sync_context():
            means = self._gathered("values")[self._counted()].nanmean(0)
        return float("nan") if means.isnan().all() else self.thresholds[int(means.argmax())]

    def _reduce(self, values: Tensor) -> Tensor:
        return values.nanmean(0).max()


class BoxAccuracy(PairMean):
    """Share of pairs with boxes one of which the map finds (Acc@0.5).

    The map's box is that of the connected component of `map > threshold` with the highest peak; it has to overlap one
    of the boxes with an IoU above `iou`.

    Args:
        threshold: In [0, 1); to be chosen on the validation split (`ThresholdedIoU`).
        iou: What the overlap has to exceed.

    Example:
        >>> metric = BoxAccuracy(threshold=0.3)
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        1.0
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, threshold: float = 0.5, iou: float = 0.5) -> None:
        super().__init__()
        check_threshold(threshold)
        self.threshold = threshold
        self.iou = iou

    def update(self, maps: Tensor, boxes: Sequence[Tensor], ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame; and the pairs' ids."""
        found = functional.components(maps, self.threshold)
        self._add(functional.box_accuracy(found, boxes, len(maps), self.iou), ids)


class AveragePrecision50(PairMetric):
    """Average precision of the maps' connected components as boxes, scored by their maximum (AP50).

    A component is right by the rule of PASCAL VOC, with an IoU above `iou`; those of equal score enter together.

    Args:
        threshold: Components are those of `map > threshold`, in [0, 1); to be chosen on the validation split.
        iou: What the overlap has to exceed.

    Example:
        >>> metric = AveragePrecision50(threshold=0.3)
        >>> metric.update(torch.tensor([[[0.9, 0.3], [0.9, 0.0]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> float(metric.compute())
        1.0
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    # Number of boxes and of components of each pair.
    columns = 2
    scores: list[Tensor]
    hits: list[Tensor]

    def __init__(self, threshold: float = 0.5, iou: float = 0.5) -> None:
        super().__init__()
        check_threshold(threshold)
        self.threshold = threshold
        self.iou = iou
        for name in ("scores", "hits"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _empty(self) -> dict[str, Tensor]:
        nothing = torch.zeros(0, device=self.device)
        return super()._empty() | {"scores": nothing, "hits": nothing.bool()}

    def update(self, maps: Tensor, boxes: Sequence[Tensor], ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame; and the pairs' ids."""
        if len(maps) != len(boxes):
            raise ValueError(f"There are {len(maps)} maps, but boxes of {len(boxes)} pairs.")
        found = functional.components(maps, self.threshold)
        number = torch.tensor([len(box) for box in boxes], device=maps.device)
        self._add(torch.stack([number, found.pair.bincount(minlength=len(maps))], 1), ids)
        self.scores.append(found.peak.detach().float())
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
    """Refuse a threshold that is none of maps in [0, 1].

    Raises:
        ValueError: It is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}. Maps are in [0, 1].")
