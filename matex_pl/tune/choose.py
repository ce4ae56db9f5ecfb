"""The best setting on validation pairs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from matex_pl.attribution import Matex
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.evaluation.intervals import Score
from matex_pl.tune.grid import Grid, search
from matex_pl.tune.objective import Objective, Pairs, score_setting

Result = TypeVar("Result")
# So many settings are scored again on all pixels.
FINALISTS = 10


@dataclass(frozen=True)
class Scored:
    """A setting on all pixels.

    Args:
        method: MATEX with it.
        distance: From the method's own, see `Grid.distances`.
        found: What the studies score.
    """

    method: Matex
    distance: float
    found: Score

    @property
    def score(self) -> float:
        """Over all studies; NaN where none counts."""
        return float(self.found.score())


@dataclass(frozen=True)
class Choice:
    """What the validation pairs say.

    Args:
        objective: What was chosen by.
        grid: What was tried.
        scores: Of every setting, in the grid's shape.
        raster: Height and width of what they were scored on; None for all pixels or words.
        own: The method as it was.
        best: Settings that were scored by `score_setting`, the best first; the method's own is one of them.
        seconds: Of the settings, and of the finalists where all settings were scored at once.
    """

    objective: Objective
    grid: Grid
    scores: Tensor
    raster: tuple[int, int] | None
    own: Scored
    best: list[Scored]
    seconds: dict[str, float]

    @property
    def winner(self) -> Scored:
        """The best."""
        return self.best[0]


def choose_setting(
    clip: Clip,
    pairs: Sequence[Pairs],
    method: Matex,
    grid: Grid,
    distances: Tensor,
    objective: Objective,
    raster: tuple[int, int],
) -> Choice:
    """Score all settings, at once if the objective can (on a raster, or over all words), and the best of them exactly.

    Args:
        clip: The model.
        pairs: Of the validation split.
        method: The method as it is.
        grid: What is tried.
        distances: Of each combination from the method's own; of equal scores the nearest wins.
        objective: What is chosen by.
        raster: Height and width.
    """
    methods = [type(method)(**method.settings | setting) for setting in grid.settings()]
    own = Scored(method, 0.0, score_setting(clip, pairs, method, objective))
    score = partial(_score_all, clip, pairs, methods, distances, objective, own)
    if objective.coarse is None:
        _announce(len(methods), sum(len(batch.tokens) for batch in pairs), objective)
        best, seconds = _timed(score, range(len(methods)))
        scores = _scores(best)
        spent, cells = {"settings": seconds}, None
    else:
        found, seconds = _timed(search, pairs, method, grid, objective, raster)
        scores = found.flatten()
        best, again = _timed(score, best_first(scores, distances, objective.sign)[:FINALISTS])
        spent, cells = {"settings": seconds, "finalists": again}, raster if objective.side == "image" else None
    best = best if any(scored.found is own.found for scored in best) else [*best, own]
    nearest = torch.tensor([scored.distance for scored in best], dtype=torch.float64)
    ranked = [best[place] for place in best_first(_scores(best), nearest, objective.sign)]
    return Choice(objective, grid, scores.view(grid.shape), cells, own, ranked, spent)


def _timed(call: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    return call(*arguments), time.perf_counter() - start


def _score_all(
    clip: Clip,
    pairs: Sequence[Pairs],
    methods: Sequence[Matex],
    distances: Tensor,
    objective: Objective,
    own: Scored,
    places: Sequence[int],
) -> list[Scored]:
    """The methods at some places on all pixels; the own is not scored again."""
    scored = []
    for place in progress(places, "settings on all pixels"):
        same = methods[place].settings == own.method.settings
        found = own.found if same else score_setting(clip, pairs, methods[place], objective)
        scored.append(Scored(methods[place], float(distances[place]), found))
    return scored


def _scores(scored: Sequence[Scored]) -> Tensor:
    return torch.tensor([one.score for one in scored], dtype=torch.float64)


def best_first(scores: Tensor, distances: Tensor, sign: int) -> list[int]:
    """Places of scores `(S,)`, the best first, of equal ones the nearest, and what is NaN last.

    Args:
        scores: `(S,)`.
        distances: `(S,)`.
        sign: 1 if higher is better, else -1.
    """
    order = np.lexsort((distances.numpy(), (-sign * scores).nan_to_num(torch.inf).numpy()))
    return [int(place) for place in order]


def _announce(settings: int, pairs: int, objective: Objective) -> None:
    print(
        f"{objective.name} asks the model: {settings} settings of {pairs} pairs take "
        f"{settings * pairs * objective.forwards} forwards of the {objective.side} tower.",
        file=sys.stderr,
    )
