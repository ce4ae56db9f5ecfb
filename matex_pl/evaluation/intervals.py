"""Scores over pairs and their intervals by bootstrap over patients: the pairs of a patient are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from matex_pl.metrics import functional as F


class Score(Protocol):
    """A score over n pairs that can be drawn again."""

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """The score `(1,)`, or `(R,)` when each pair is drawn `(R, n)` times; NaN where nothing counts."""

    @property
    def count(self) -> int:
        """Number of pairs that count."""


@dataclass(frozen=True)
class Sums:
    """A score over pairs as a ratio of sums: the mean of a value has the weight 1 wherever it counts.

    Args:
        above: `(n,)` what each pair adds above the line.
        below: `(n,)` what it adds below.
    """

    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sums:
        """The mean of values `(n,)`, of which NaN does not count."""
        return cls(values.nan_to_num(0).double(), (~values.isnan()).double())

    def among(self, pairs: Tensor) -> Sums:
        """The same over some of the pairs, `(n,)` bool."""
        return Sums(self.above * pairs, self.below * pairs)

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """The score `(1,)`, or `(R,)` when each pair is drawn `(R, n)` times; NaN where nothing counts.

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
        """Number of pairs that count."""
        return int((self.below != 0).sum())


@dataclass(frozen=True)
class Detections:
    """The average precision of d components as boxes, over n pairs.

    Args:
        peak: `(d,)` score of each.
        hit: `(d,)` bool, which of them find a box.
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
        number = torch.tensor([len(box) for box in boxes])
        return cls(components.peak.cpu(), hit.cpu(), components.pair.cpu(), number)

    @classmethod
    def joined(cls, parts: Sequence[Detections]) -> Detections:
        """Those of several batches, whose pairs follow each other."""
        starts = np.cumsum([0, *(len(part.num_boxes) for part in parts[:-1])]).tolist()
        pair = [part.pair + start for part, start in zip(parts, starts, strict=True)]
        columns = zip(*((part.peak, part.hit, part.num_boxes) for part in parts), strict=True)
        peak, hit, num_boxes = map(torch.cat, map(list, columns))
        return cls(peak, hit, torch.cat(pair), num_boxes)

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


def interval(scores: Tensor) -> tuple[float, float] | None:
    """The 2.5th and 97.5th percentile of scores `(R,)`; None where no draw has a score."""
    counted = scores[~scores.isnan()]
    if not len(counted):
        return None
    low, high = torch.quantile(counted, torch.tensor([0.025, 0.975], dtype=counted.dtype)).tolist()
    return low, high


def estimate(score: Tensor, drawn: Tensor, count: int) -> dict[str, float | int | None]:
    """A score, its 95 % interval and the number of pairs behind it, for JSON: NaN becomes None."""
    low, high = interval(drawn) or (None, None)
    return {"value": plain(float(score)), "low": low, "high": high, "n": count}


def difference(mine: Score, theirs: Score, drawn: Tensor) -> dict[str, float | int | None]:
    """`estimate` of how much more mine is than theirs, on the same draws of patients `(R, n)`."""
    return estimate(mine.score()[0] - theirs.score()[0], mine.score(drawn) - theirs.score(drawn), mine.count)


def plain(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if value != value else value
