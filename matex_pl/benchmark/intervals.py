"""Intervals by bootstrap over patients: the studies of a patient are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """A score over studies as a ratio of sums: the mean of a value has the weight 1 wherever it counts.

    Args:
        above: `(n,)` what each study adds above the line.
        below: `(n,)` what it adds below.
    """

    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sums:
        """The mean of values `(n,)`, of which NaN does not count."""
        return cls(values.nan_to_num(0).double(), (~values.isnan()).double())

    def among(self, studies: Tensor) -> Sums:
        """The same over some of the studies, `(n,)` bool."""
        return Sums(self.above * studies, self.below * studies)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """The score `(1,)`, or `(R,)` when each study is drawn `(R, n)` times; NaN where nothing counts.

        Also where what is below the line, which a curve can make negative, sums to less than 0.
        """
        drawn = torch.ones(1, len(self.above), dtype=torch.float64) if drawn is None else drawn
        below = drawn @ self.below
        return (drawn @ self.above) / torch.where(below > 0, below, torch.nan)

    def spans(self, drawn: Tensor) -> bool:
        """What is below the line is more than 0 in 97.5 % of the draws `(R, n)`: a ratio to it says something."""
        return bool(((drawn @ self.below) > 0).double().mean() >= 0.975)

    @property
    def count(self) -> int:
        """Number of studies that count."""
        return int((self.below != 0).sum())


def draw_patients(patients: Sequence[str], resamples: int, seed: int) -> Tensor:
    """How often each study is drawn when as many patients are drawn as there are, with replacement: `(R, n)`."""
    names, place = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return torch.from_numpy(drawn[:, place]).double()


def interval(scores: Tensor) -> tuple[float, float] | None:
    """The 2.5th and 97.5th percentile of scores `(R,)`; None where no draw has a score."""
    counted = scores[~scores.isnan()]
    if not len(counted):
        return None
    low, high = torch.quantile(counted, torch.tensor([0.025, 0.975], dtype=counted.dtype)).tolist()
    return low, high


def estimate(score: Tensor, drawn: Tensor, count: int) -> dict[str, float | int | None]:
    """A score, its 95 % interval and the number of studies behind it, for JSON: NaN becomes None."""
    low, high = interval(drawn) or (None, None)
    value = float(score)
    return {"value": None if value != value else value, "low": low, "high": high, "n": count}
