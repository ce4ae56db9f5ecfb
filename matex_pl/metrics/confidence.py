"""Change of the score when the image or the phrase is partly kept or removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.metrics import functional
from matex_pl.metrics.base import PairMetric


class ConfidenceDrop(PairMetric):
    """Mean loss of score, `100 * max(0, S - S')`, when only the highlighted region is kept.

    Examples:
        >>> metric = ConfidenceDrop()
        >>> metric.update(torch.tensor([0.30, 0.20]), torch.tensor([0.28, 0.25]))
        >>> round(float(metric.compute()), 4)
        1.0
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, score: Tensor, kept_score: Tensor, ids: Sequence[str] | None = None) -> None:
        """Add B pairs: score of the whole input and of the kept part, `(B,)` each, and the pairs' ids."""
        self._add(functional.confidence_drop(score, kept_score), ids)


class RemovalDrop(ConfidenceDrop):
    """Mean loss of score, `100 * max(0, S - S')`, when the top of the map is removed; higher is better.

    Examples:
        >>> metric = RemovalDrop()
        >>> metric.update(torch.tensor([0.30, 0.20]), torch.tensor([0.10, 0.20]))
        >>> round(float(metric.compute()), 4)
        10.0
    """

    higher_is_better = True


class ConfidenceIncrease(PairMetric):
    """Percentage of pairs whose score rises when only the highlighted region is kept.

    Examples:
        >>> metric = ConfidenceIncrease()
        >>> metric.update(torch.tensor([0.30, 0.20]), torch.tensor([0.28, 0.25]))
        >>> float(metric.compute())
        50.0
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 100.0

    def update(self, score: Tensor, kept_score: Tensor, ids: Sequence[str] | None = None) -> None:
        """Add B pairs: score of the whole input and of the kept part, `(B,)` each, and the pairs' ids."""
        self._add(functional.confidence_increase(score, kept_score), ids)


class CurveArea(PairMetric):
    """Area under the curves of many pairs relative to their span, sum(gain) / sum(span): a ratio of means.

    A mean of ratios would be dominated by the few pairs whose span S_full - S_blank is about 0. The result is NaN if
    the spans do not sum to more than 0: the model then scores the whole images no higher than the fill.
    """

    columns = 2
    kind: str

    def update(self, curve: Tensor, shares: Tensor | None = None, ids: Sequence[str] | None = None) -> None:
        """Add B curves `(S + 1, B)` and their shares `(S + 1,)`, from `removal.patch_curve`, and the pairs' ids.

        The shares are evenly spaced by default.
        """
        areas = functional.curve_area(curve, *functional.curve_ends(curve, self.kind), shares)
        self._add(torch.stack(areas, 1), ids)

    def _reduce(self, values: Tensor) -> Tensor:
        gain, span = values[~values.isnan().any(1)].sum(0)
        return torch.where(span > 0, gain / span, torch.nan)


class InsertionAUC(CurveArea):
    """Area under the score while patches are inserted in map order (Petsiuk et al. 2018); 0: blank, 1: whole image.

    Examples:
        >>> metric = InsertionAUC()
        >>> metric.update(torch.tensor([[0.1], [0.3], [0.3]]))
        >>> round(float(metric.compute()), 4)
        0.75
    """

    higher_is_better = True
    kind = "insertion"


class DeletionAUC(CurveArea):
    """Area under the score while patches are deleted in map order (Petsiuk et al. 2018); 0: blank, 1: whole image.

    Examples:
        >>> metric = DeletionAUC()
        >>> metric.update(torch.tensor([[0.3], [0.1], [0.1]]))
        >>> round(float(metric.compute()), 4)
        0.25
    """

    higher_is_better = False
    kind = "deletion"
