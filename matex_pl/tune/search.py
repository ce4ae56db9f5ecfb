"""Grid search over MATEX settings: components once per pair, then one fusion per pair and setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, isnan
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matex_pl.anatomy import parse_phrase
from matex_pl.attribution.matex import BlockCount, Matex
from matex_pl.clip.device import synchronize
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.intervals import Detections, Sums
from matex_pl.evaluation.pairs import model_inputs
from matex_pl.tune.objective import Objective, PairBatch

AXES = ("grad_layers", "flow", "flow_layers", "consistency_of", "prior_shape", "lambda_s", "lambda_c", "tau")
# The others are words or numbers of blocks.
NUMBERS = AXES[-3:]
BLOCKS = ("grad_layers", "flow_layers")
# Number of best settings that are scored again at every pixel.
FINALISTS = 10


@dataclass(frozen=True)
class Grid:
    """All combinations of the values of each setting.

    Args:
        method: MATEX to tune.
        depth: Number of blocks of the image and the text tower.
        axes: Values by setting, in the order of the axes of a score tensor.
        idle: Reason by setting without effect, which keeps the method's own value.
    """

    method: Matex
    depth: tuple[int, int]
    axes: dict[str, list[Any]]
    idle: dict[str, str]

    @property
    def varied(self) -> list[str]:
        """Settings with more than one value; all settings if there are none."""
        return [name for name, values in self.axes.items() if len(values) > 1] or list(self.axes)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All combinations, in the order of a flattened score tensor."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    @property
    def deepest(self) -> Matex:
        """MATEX with the components of every block that a combination or the method itself needs."""
        own, values = self.method, {name: [*tried, getattr(self.method, name)] for name, tried in self.axes.items()}
        image, text = zip(
            *(blocks("grad_layers", count, own, self.depth) for count in values["grad_layers"]), strict=True
        )
        flow_layers = max(values["flow_layers"], key=lambda count: blocks("flow_layers", count, own, self.depth))
        needed = {"grad_layers": max(image), "text_grad_layers": max(text), "flow_layers": flow_layers}
        if "rollout" in values["flow"]:
            needed["flow"] = "rollout"
        if "relevance" in (*values["flow"], *values["consistency_of"]):
            # Gives the components of the relevance flow too.
            needed["consistency_of"] = "relevance"
        return type(own)(**own.settings | needed)

    def place(self, method: Matex) -> tuple[int, ...] | None:
        """Index of the method's combination in a score tensor; None if the combination is not on the grid."""
        if any(getattr(method, name) not in values for name, values in self.axes.items()):
            return None
        return tuple(values.index(getattr(method, name)) for name, values in self.axes.items())

    def distance(self, method: Matex) -> float:
        """Distance of another setting from the method's own.

        The distance is the sum over the axes of the difference, as a share of the range of the values. `grad_layers`
        and `flow_layers` count in blocks. Another `flow`, `consistency_of` or `prior_shape` counts 1.
        """
        words = ("flow", "consistency_of", "prior_shape")
        total = float(sum(getattr(method, name) != getattr(self.method, name) for name in words))
        for name in (*BLOCKS, *NUMBERS):
            values = [getattr(self.method, name), getattr(method, name), *self.axes[name]]
            if name in BLOCKS:
                values = [sum(blocks(name, value, self.method, self.depth)) for value in values]
            own, other, *tried = values
            total += abs(other - own) / (max(own, *tried) - min(own, *tried) or 1)
        return total


def make_grid(
    method: Matex,
    objective: Objective,
    depth: tuple[int, int],
    tried: Mapping[str, Sequence[Any] | None],
    phrases: Sequence[str],
) -> Grid:
    """Grid of the values to try, each once and in ascending order.

    Args:
        method: MATEX to tune.
        objective: Objective by which settings are ranked.
        depth: Number of blocks of the image and the text tower. Of equivalent numbers of blocks only one is tried,
            preferably the method's own.
        tried: Values by setting; None for the method's own.
        phrases: Phrases of the pairs.
    """
    idle = _idle_settings(method, objective, tried, phrases)
    axes = {
        name: [getattr(method, name)] if values is None or name in idle else list(values)
        for name, values in tried.items()
    }
    for name, values in axes.items():
        if name in BLOCKS:
            same = {blocks(name, value, method, depth): value for value in reversed(values)}
            own = blocks(name, getattr(method, name), method, depth)
            same |= {own: getattr(method, name)} if own in same else {}
            axes[name] = [same[key] for key in sorted(same)]
        else:
            axes[name] = sorted(set(values)) if name in NUMBERS else list(dict.fromkeys(values))
    return Grid(method, depth, axes, idle)


def _idle_settings(
    method: Matex, objective: Objective, tried: Mapping[str, Sequence[Any] | None], phrases: Sequence[str]
) -> dict[str, str]:
    """Settings without effect on the objective for pairs with these phrases, each with the reason."""
    idle = {}
    if objective.side == "text":
        idle = dict.fromkeys(("lambda_s", "prior_shape"), "words have no place")
        if method.text_grad_layers is not None:
            idle["grad_layers"] = "the text tower has its own number of blocks"
    elif not any(parse_phrase(phrase, knowledge_prior=method.knowledge_prior).regions for phrase in phrases):
        idle = dict.fromkeys(("lambda_s", "prior_shape"), "no phrase of the validation pairs names a place")
    flows = tried["flow"] or [method.flow]
    weight = "text_beta" if objective.side == "text" and method.text_beta is not None else "beta"
    if "sum" not in flows:
        idle["tau"] = f"the flow {' or '.join(dict.fromkeys(flows))} has no temperature"
    if getattr(method, weight) == 0:
        idle |= dict.fromkeys(
            ["tau", *(["flow"] if tried["flow"] else [])], f"{weight} is 0, which gives the flow no weight"
        )
    return idle


def blocks(name: str, count: BlockCount, method: Matex, depth: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks of the image and the text tower under `grad_layers` or `flow_layers`.

    Args:
        name: `grad_layers` or `flow_layers`.
        count: Value of this setting.
        method: MATEX with the other settings.
        depth: Number of blocks of both towers.
    """
    changed = type(method)(**method.settings | {name: count})
    return (
        changed.depths(*depth)
        if name == "grad_layers"
        else (changed.flow_depth(depth[0]), changed.flow_depth(depth[1]))
    )


def attribute_pairs(
    clip: Clip, method: Matex, batches: Sequence[ImageTextBatch], objective: Objective, thorax: Tensor | None, seed: int
) -> tuple[list[PairBatch], float]:
    """Pairs with their components and those of the objective's reference maps, and the seconds of `attribute`.

    Args:
        clip: CLIP model.
        method: MATEX with the gradients of every block that a setting needs.
        batches: Batches of pairs.
        objective: Objective by which settings are ranked.
        thorax: `(H, W)` bool, usual place of lungs and heart, if the objective needs it.
        seed: Random seed of shuffled weights.
    """
    pairs, seconds = [], 0.0
    for batch, (parts, taken) in zip(batches, _components(clip, method, batches), strict=True):
        pairs.append(PairBatch(clip, batch, parts, [], thorax, objective.fill))
        seconds += taken
    for model, changed in objective.references(clip, batches, seed):
        for pair_batch, (parts, taken) in zip(pairs, _components(model, method, changed), strict=True):
            pair_batch.references.append(parts)
            seconds += taken
    return pairs, seconds


def _components(clip: Clip, method: Matex, batches: Sequence[ImageTextBatch]) -> Iterator[tuple[dict[str, Any], float]]:
    """Components of each batch, and the seconds for them."""
    for batch in progress(batches, "components"):
        images, tokens = model_inputs(clip, batch)
        synchronize(images.device)
        start = perf_counter()
        boxes = (batch[name].to(images.device) for name in ("content_box", "chest_box"))
        parts = method.attribute(clip, images, tokens, batch["phrase"], *boxes).parts
        synchronize(images.device)
        # The prior at every pixel is the largest part, and `fuse` computes it again.
        yield {name: part for name, part in parts.items() if name != "prior"}, perf_counter() - start


@dataclass(frozen=True)
class Scored:
    """MATEX with a setting, its score over all pairs (NaN if none counts), and its distance from the method's own."""

    method: Matex
    score: float
    distance: float


@dataclass(frozen=True)
class Choice:
    """Result of a search on validation pairs.

    Args:
        objective: Objective by which the winner was selected.
        grid: Grid of the tried settings.
        scores: Score of every setting, in the shape of the grid.
        raster: Height and width at which `scores` were computed; None for every pixel or word.
        best: Settings scored at every pixel or word, best first, including the method's own.
        seconds: Seconds for all `settings`, and for scoring `finalists` again after a raster.
    """

    objective: Objective
    grid: Grid
    scores: NDArray[np.float64]
    raster: tuple[int, int] | None
    best: list[Scored]
    seconds: dict[str, float]

    @property
    def winner(self) -> Scored:
        """The best setting."""
        return self.best[0]

    @property
    def own(self) -> Scored:
        """The method's own setting."""
        return next(scored for scored in self.best if scored.method.settings == self.grid.method.settings)


def choose_setting(pairs: Sequence[PairBatch], grid: Grid, objective: Objective, raster: tuple[int, int]) -> Choice:
    """Best setting of the grid, with the method's own; of equal ones the nearest to the method's own.

    Image maps are compared on a raster, and the best ones again at every pixel. An objective that runs the model scores
    all settings at every pixel.
    """
    own = grid.method
    methods = [type(own)(**own.settings | setting) for setting in grid.settings]

    def score(method: Matex, size: tuple[int, int] | None = None) -> Scored:
        return Scored(method, float(score_setting(pairs, method, objective, size).score()), grid.distance(method))

    def ranked(scored: Sequence[Scored]) -> list[Scored]:
        """Settings sorted best first, NaN last, and equal scores by distance."""
        return sorted(scored, key=lambda s: (inf if isnan(s.score) else -objective.sign * s.score, s.distance))

    start = perf_counter()
    best = [score(method, None if objective.forwards else raster) for method in progress(methods, "settings")]
    seconds = {"settings": perf_counter() - start}
    scores = np.array([scored.score for scored in best]).reshape([len(values) for values in grid.axes.values()])
    is_coarse = objective.side == "image" and not objective.forwards
    if is_coarse:
        finalists = ranked(best)[:FINALISTS]
        best = [score(scored.method) for scored in progress(finalists, "settings at every pixel")]
        seconds["finalists"] = perf_counter() - start - seconds["settings"]
    if all(scored.method.settings != own.settings for scored in best):
        best.append(score(own))
    return Choice(objective, grid, scores, raster if is_coarse else None, ranked(best), seconds)


def score_setting(
    pairs: Sequence[PairBatch], method: Matex, objective: Objective, size: tuple[int, int] | None = None
) -> Sums | Detections:
    """Values of the pairs under a setting, from maps of height and width `size`; at every pixel by default."""
    changes: dict[str, Any] = {} if size is None else {"size": size}
    values = []
    with torch.no_grad():
        for batch in pairs:
            maps = [type(method).fuse(parts | changes, **method.settings) for parts in (batch.parts, *batch.references)]
            values.append(objective.values(batch, *maps))
    if isinstance(values[0], Detections):
        return Detections.joined(cast(list[Detections], values))
    return Sums.of(torch.cat(cast(list[Tensor], values)).cpu())
