"""Scores over pairs and their intervals by bootstrap over patients: the pairs of a patient are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
import torch
from torch import Tensor

from matex_pl.metrics import functional as F
from matex_pl.report.results import Score


@dataclass(frozen=True)
class Sums:
    """A score over n pairs as a ratio of sums: the mean of a value has the weight 1 wherever it counts.

    Args:
        above: `(n,)` summands of the numerator.
        below: `(n,)` summands of the denominator.
    """

    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sums:
        """The mean of values `(n,)` without NaN."""
        return cls(values.nan_to_num(0).double(), (~values.isnan()).double())

    def among(self, pairs: Tensor) -> Sums:
        """The same over some of the pairs, `(n,)` bool."""
        return Sums(self.above * pairs, self.below * pairs)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """The score `(1,)`, or `(R,)` when each pair is drawn `(R, n)` times.

        NaN where no pair counts, or where the denominator, which a curve can make negative, is below 0.
        """
        drawn = torch.ones(1, len(self.above), dtype=torch.float64) if drawn is None else drawn
        below = drawn @ self.below
        return (drawn @ self.above) / torch.where(below > 0, below, torch.nan)

    def spans(self, drawn: Tensor) -> bool:
        """Whether the denominator is above 0 in 97.5 % of the draws `(R, n)`, so that the ratio means something."""
        return bool(((drawn @ self.below) > 0).double().mean() >= 0.975)

    @property
    def count(self) -> int:
        """Number of pairs that count."""
        return int((self.below != 0).sum())


@dataclass(frozen=True)
class Detections:
    """The average precision of d components as boxes, over n pairs.

    Args:
        peak: `(d,)` score of each.
        hit: `(d,)` bool, which of them match a box.
        pair: `(d,)` long, the pair of each.
        num_boxes: `(n,)` number of boxes of each pair.
    """

    peak: Tensor
    hit: Tensor
    pair: Tensor
    num_boxes: Tensor

    @classmethod
    def of(cls, components: F.Components, boxes: Sequence[Tensor]) -> Detections:
        """Components of B maps, and the boxes of their pairs."""
        hit = F.match_components(components, [box.to(components.boxes) for box in boxes])
        num_boxes = torch.tensor([len(box) for box in boxes])
        return cls(components.peak.cpu(), hit.cpu(), components.pair.cpu(), num_boxes)

    @classmethod
    def joined(cls, parts: Sequence[Detections]) -> Detections:
        """Those of several batches, whose pairs follow each other."""
        starts = np.cumsum([0, *(len(part.num_boxes) for part in parts[:-1])]).tolist()
        return cls(
            peak=torch.cat([part.peak for part in parts]),
            hit=torch.cat([part.hit for part in parts]),
            pair=torch.cat([part.pair + start for part, start in zip(parts, starts, strict=True)]),
            num_boxes=torch.cat([part.num_boxes for part in parts]),
        )

    def among(self, pairs: Tensor) -> Detections:
        """The same over some of the pairs, `(n,)` bool."""
        kept = pairs[self.pair]
        return Detections(self.peak[kept], self.hit[kept], self.pair[kept], self.num_boxes * pairs)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """The average precision `(1,)`, or `(R,)` when each pair is drawn `(R, n)` times; NaN without boxes."""
        drawn = torch.ones(1, len(self.num_boxes)) if drawn is None else drawn
        return F.average_precision(self.peak, self.hit, self.pair, self.num_boxes, drawn)

    @property
    def count(self) -> int:
        """Number of pairs with boxes."""
        return int((self.num_boxes > 0).sum())


def draw_patients(patients: Sequence[str], resamples: int, seed: int) -> Tensor:
    """How often each pair is drawn when as many patients are drawn as there are, with replacement: `(R, n)`."""
    names, place = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return torch.from_numpy(drawn[:, place]).double()


def estimate(pairs: Sums | Detections, drawn: Tensor, reference: Sums | Detections | None = None) -> Score:
    """The score of pairs with its 95 % interval and their number; above that of a reference, if there is one.

    Args:
        pairs: The n pairs.
        drawn: `(R, n)` of `draw_patients`; draws without a score do not count.
        reference: The same pairs under another setting or method, drawn together with them.
    """
    value, scores = pairs.score()[0], pairs.score(drawn)
    if reference is not None:
        value, scores = value - reference.score()[0], scores - reference.score(drawn)
    scores = scores[~scores.isnan()]
    ends = torch.quantile(scores, torch.tensor([0.025, 0.975], dtype=scores.dtype)).tolist() if len(scores) else None
    low, high = ends or (None, None)
    return Score(value=plain(float(value)), low=low, high=high, n=pairs.count)


def plain(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if isnan(value) else value
