"""Scores over pairs with bootstrap intervals over patients, whose pairs are drawn together."""

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
    """A score over n pairs as a ratio of sums; for a mean the denominator is 1 for each pair that counts.

    Args:
        above: `(n,)` summands of the numerator.
        below: `(n,)` summands of the denominator.
    """

    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sums:
        """Sums of the mean of values `(n,)` without NaN."""
        return cls(values.nan_to_num(0).double(), (~values.isnan()).double())

    def among(self, pairs: Tensor) -> Sums:
        """Sums restricted to some of the pairs, `(n,)` bool."""
        return Sums(self.above * pairs, self.below * pairs)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """Score `(1,)`, or `(R,)` if each pair is drawn `(R, n)` times.

        NaN if no pair counts, or if the denominator is not above 0, which is possible for a curve.
        """
        drawn = torch.ones(1, len(self.above), dtype=torch.float64) if drawn is None else drawn
        below = drawn @ self.below
        return (drawn @ self.above) / torch.where(below > 0, below, torch.nan)

    def spans(self, drawn: Tensor) -> bool:
        """Whether the denominator is above 0 in at least 97.5 % of the draws `(R, n)`, which the ratio needs."""
        return bool(((drawn @ self.below) > 0).double().mean() >= 0.975)

    @property
    def count(self) -> int:
        """Number of pairs that count."""
        return int((self.below != 0).sum())


@dataclass(frozen=True)
class Detections:
    """Average precision of d components as boxes, over n pairs.

    Args:
        score_of: `(d,)` score of each component, see `functional.detection_scores`.
        hit: `(d,)` bool mask of the components that match a box.
        pair: `(d,)` long, pair of each component.
        num_boxes: `(n,)` number of boxes of each pair.
    """

    score_of: Tensor
    hit: Tensor
    pair: Tensor
    num_boxes: Tensor

    @classmethod
    def of(cls, components: F.Components, boxes: Sequence[Tensor], pair_scores: Tensor) -> Detections:
        """Detections from the components of B maps, with the boxes and the scores `(B,)` of their pairs."""
        hit = F.match_components(components, [box.to(components.boxes) for box in boxes])
        num_boxes = torch.tensor([len(box) for box in boxes])
        scores = F.detection_scores(components, pair_scores)
        return cls(scores.cpu(), hit.cpu(), components.pair.cpu(), num_boxes)

    @classmethod
    def joined(cls, parts: Sequence[Detections]) -> Detections:
        """Detections of several batches, whose pairs follow each other."""
        starts = np.cumsum([0, *(len(part.num_boxes) for part in parts[:-1])]).tolist()
        return cls(
            score_of=torch.cat([part.score_of for part in parts]),
            hit=torch.cat([part.hit for part in parts]),
            pair=torch.cat([part.pair + start for part, start in zip(parts, starts, strict=True)]),
            num_boxes=torch.cat([part.num_boxes for part in parts]),
        )

    def among(self, pairs: Tensor) -> Detections:
        """Detections restricted to some of the pairs, `(n,)` bool."""
        kept = pairs[self.pair]
        return Detections(self.score_of[kept], self.hit[kept], self.pair[kept], self.num_boxes * pairs)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """Average precision `(1,)`, or `(R,)` if each pair is drawn `(R, n)` times; NaN without boxes."""
        drawn = torch.ones(1, len(self.num_boxes)) if drawn is None else drawn
        return F.average_precision(self.score_of, self.hit, self.pair, self.num_boxes, drawn)

    @property
    def count(self) -> int:
        """Number of pairs with boxes."""
        return int((self.num_boxes > 0).sum())


@dataclass(frozen=True)
class FindingMean:
    """Mean over findings of a score: each finding counts once, and a finding without a score is left out.

    Args:
        parts: Score of each finding.
    """

    parts: Sequence[Sums | Detections]

    @classmethod
    def of(cls, pairs: Sums | Detections, findings: Sequence[str]) -> FindingMean:
        """Mean over the findings of n pairs; pairs without a finding do not count."""
        names = sorted({*findings} - {""})
        return cls([pairs.among(torch.tensor([finding == name for finding in findings])) for name in names])

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """Score `(1,)`, or `(R,)` if each pair is drawn `(R, n)` times; NaN if no finding has a score."""
        return torch.stack([part.score(drawn) for part in self.parts]).nanmean(0)

    @property
    def count(self) -> int:
        """Number of pairs that count."""
        return sum(part.count for part in self.parts)


def draw_patients(patients: Sequence[str], resamples: int, seed: int) -> Tensor:
    """Number of times each pair is drawn, `(R, n)`, when patients are drawn with replacement, as many as there are."""
    names, place = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return torch.from_numpy(drawn[:, place]).double()


def estimate(
    pairs: Sums | Detections | FindingMean, drawn: Tensor, reference: Sums | Detections | None = None
) -> Score:
    """Score of pairs with its 95 % interval and the number of pairs, or its difference from a reference.

    Args:
        pairs: Values of the n pairs.
        drawn: `(R, n)` of `draw_patients`; draws without a score do not count.
        reference: Values of the same pairs under another setting or method, drawn together; None for no difference.
            A difference is over the pairs that count on both sides.
    """
    if isinstance(pairs, Sums) and isinstance(reference, Sums):
        both = (pairs.below != 0) & (reference.below != 0)
        pairs, reference = pairs.among(both), reference.among(both)
    value, scores = pairs.score()[0], pairs.score(drawn)
    if reference is not None:
        value, scores = value - reference.score()[0], scores - reference.score(drawn)
    scores = scores[~scores.isnan()]
    ends = torch.quantile(scores, torch.tensor([0.025, 0.975], dtype=scores.dtype)).tolist() if len(scores) else None
    low, high = ends or (None, None)
    return Score(value=plain(float(value)), low=low, high=high, n=pairs.count)


def plain(value: float) -> float | None:
    """The value, or None for NaN, which JSON lacks."""
    return None if isnan(value) else value
