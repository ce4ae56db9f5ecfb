"""Attribution quality as torchmetrics: each is the mean of a per-study value over the studies that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl.metrics import functional


class StudyMean(Metric):
    """Mean over studies; NaN values do not count, and an empty mean is NaN."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        counted = values[~values.isnan()]
        self.total += counted.float().sum()
        self.count += len(counted)

    def compute(self) -> Tensor:
        """The mean of what was added, a float32 scalar."""
        return self.total / self.count


class ConfidenceDrop(StudyMean):
    """Mean loss of score, 100 * max(0, S - S'), when only what is highlighted is kept.

    Example:
        >>> metric = ConfidenceDrop()
        >>> metric.update(torch.tensor([0.30, 0.20]), torch.tensor([0.28, 0.25]))
        >>> round(float(metric.compute()), 4)
        1.0
    """

    higher_is_better = False

    def update(self, score: Tensor, kept_score: Tensor) -> None:
        """Add B pairs: the score as it is and with only the highlighted kept, `(B,)` each."""
        self._add(functional.confidence_drop(score, kept_score))


class ConfidenceIncrease(StudyMean):
    """Percentage of studies whose score rises when only what is highlighted is kept.

    Example:
        >>> metric = ConfidenceIncrease()
        >>> metric.update(torch.tensor([0.30, 0.20]), torch.tensor([0.28, 0.25]))
        >>> float(metric.compute())
        50.0
    """

    higher_is_better = True

    def update(self, score: Tensor, kept_score: Tensor) -> None:
        """Add B pairs: the score as it is and with only the highlighted kept, `(B,)` each."""
        self._add(functional.confidence_increase(score, kept_score))


class PointingGame(StudyMean):
    """Share of studies with boxes whose map has its maximum in one of them (Zhang et al. 2018).

    Example:
        >>> metric = PointingGame()
        >>> metric.update(torch.eye(2)[None].flip(2), [torch.tensor([[0.5, 0.0, 1.0, 0.5]])])
        >>> float(metric.compute())
        1.0
    """

    higher_is_better = True

    def update(self, maps: Tensor, boxes: Sequence[Tensor]) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame."""
        self._add(functional.pointing_game(maps, _masks(maps, boxes)))


class ContrastToNoise(StudyMean):
    """Mean signed contrast-to-noise ratio between inside and outside of the boxes (Boecking et al. 2022).

    Example:
        >>> metric = ContrastToNoise()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [0.5, 0.1]]]), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])])
        >>> round(float(metric.compute()), 4)
        2.7456
    """

    higher_is_better = True

    def update(self, maps: Tensor, boxes: Sequence[Tensor]) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame."""
        self._add(functional.contrast_to_noise(maps, _masks(maps, boxes)))


class MapMass(StudyMean):
    """Mean value of the maps. A map of all ones has a perfect confidence drop; its mass of 1 says so.

    Example:
        >>> metric = MapMass()
        >>> metric.update(torch.eye(2)[None])
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = None

    def update(self, maps: Tensor) -> None:
        """Add B maps `(B, H, W)` in [0, 1]."""
        self._add(maps.flatten(1).mean(1))


def _masks(maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    if len(maps) != len(boxes):
        raise ValueError(f"There are {len(maps)} maps, but boxes of {len(boxes)} studies.")
    return functional.box_masks(boxes, (maps.shape[1], maps.shape[2])).to(maps.device)
