"""What the settings of MATEX are chosen by: metrics of the benchmark, of finished maps and on a raster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl.anatomy import named_side
from matex_pl.attribution import Matex
from matex_pl.attribution.base import progress
from matex_pl.attribution.fill import FILLS
from matex_pl.benchmark.intervals import Detections, Score, Sums
from matex_pl.clip import Clip
from matex_pl.data.record import StudyBatch
from matex_pl.maps import AttributionMaps
from matex_pl.metrics import (
    AveragePrecision50,
    BoxAccuracy,
    ConfidenceDrop,
    ConfidenceIncrease,
    ContrastToNoise,
    DeletionAUC,
    EnergyInBox,
    InsertionAUC,
    MapMass,
    MeanIoU,
    OutsideMass,
    PointingGame,
    RankAccuracy,
    RankCorrelation,
    RemovalDrop,
    SideSensitivity,
    ThresholdedIoU,
    removal,
)
from matex_pl.metrics import functional as F
from matex_pl.metrics.sanity import randomised
from matex_pl.pairs import embed_pairs, model_inputs, other_phrases, swapped_phrases, with_phrases


@dataclass(frozen=True)
class Pairs:
    """A batch of B pairs, and what any setting of MATEX is fused from.

    Args:
        batch: As the loader gave it.
        parts: Of `Matex.attribute`, of all blocks that a setting may ask for.
        tokens: `(B, T)`.
        image: `(B, D)` embeddings, where the objective asks the model.
        text: `(B, D)` embeddings, likewise.
        others: Parts of the same films under what the objective holds beside them: another phrase, other weights.
        thorax: `(H, W)` bool, where lungs and heart usually are, if the data module knows.
    """

    batch: StudyBatch
    parts: dict[str, Any]
    tokens: Tensor
    image: Tensor | None = None
    text: Tensor | None = None
    others: list[dict[str, Any]] = field(default_factory=list)
    thorax: Tensor | None = None


def gather_pairs(
    clip: Clip,
    method: Matex,
    batches: Sequence[StudyBatch],
    objective: Objective,
    *,
    thorax: Tensor | None = None,
    seed: int = 0,
) -> tuple[list[Pairs], float]:
    """What the settings are fused from, and the seconds that `attribute` took for it.

    Args:
        clip: The model.
        method: With the gradients of all blocks that a setting may ask for.
        batches: The pairs.
        objective: Says what else it takes.
        thorax: `(H, W)` bool, where lungs and heart usually are.
        seed: Of what the objective draws.
    """
    parts, seconds = _components(clip, method, batches)
    others: list[list[dict[str, Any]]] = []
    for model, changed in objective.beside(clip, batches, seed):
        found, spent = _components(model, method, changed)
        others.append(found)
        seconds += spent
    pairs = []
    for place, batch in enumerate(batches):
        images, tokens = model_inputs(clip, batch)
        image, text = embed_pairs(clip, images, tokens) if objective.forwards else (None, None)
        pairs.append(Pairs(batch, parts[place], tokens, image, text, [found[place] for found in others], thorax))
    return pairs, seconds


def _components(clip: Clip, method: Matex, batches: Iterable[StudyBatch]) -> tuple[list[dict[str, Any]], float]:
    """The parts of each batch, and the seconds that `attribute` took for them."""
    found, seconds = [], 0.0
    for batch in progress(batches, "components"):
        images, tokens = model_inputs(clip, batch)
        start = time.perf_counter()
        parts = method.attribute(clip, images, tokens, batch["phrase"], batch["film"].to(images.device)).parts
        seconds += time.perf_counter() - start
        # Maps of pixels, which every setting draws anew.
        found.append({name: part for name, part in parts.items() if name != "prior"})
    return found, seconds


Beside = Iterable[tuple[Clip, Sequence[StudyBatch]]]


def _nothing(clip: Clip, batches: Sequence[StudyBatch], seed: int) -> Beside:
    """Only the pairs themselves."""
    return ()


def _other_phrases(clip: Clip, batches: Sequence[StudyBatch], seed: int) -> Beside:
    """Each film with another study's phrase."""
    phrases = [phrase for batch in batches for phrase in batch["phrase"]]
    others = iter(other_phrases(phrases, [finding for batch in batches for finding in batch["finding"]]))
    return [(clip, [with_phrases(batch, [next(others) for _ in batch["phrase"]]) for batch in batches])]


def _swapped_phrases(clip: Clip, batches: Sequence[StudyBatch], seed: int) -> Beside:
    """Each film with its phrase's right and left exchanged."""
    return [(clip, [with_phrases(batch, swapped_phrases(batch["phrase"])) for batch in batches])]


def _broken_models(clip: Clip, batches: Sequence[StudyBatch], seed: int) -> Iterator[tuple[Clip, Sequence[StudyBatch]]]:
    """The pairs under ever more shuffled weights."""
    for _, broken in randomised(clip, seed):
        yield broken, batches


def mean_of(values: Sequence[Tensor]) -> Sums:
    """The mean over the studies of all batches, `(B,)` each; NaN does not count."""
    return Sums.of(torch.cat(list(values)).cpu())


@dataclass(frozen=True)
class Objective:
    """What the settings are chosen by: a metric of the benchmark.

    Args:
        name: As the user writes it.
        metric: Its class, which knows the direction.
        value: Of a model, pairs, their finished maps and those beside them: what `over` makes a score of, by default
            the value of each study `(B,)`, where NaN does not count.
        coarse: The same on a raster: fused maps `(B, S, P)`, in any scale, of S settings and P cells, and which cells
            lie in boxes `(B, P)` bool, to `(B, S)`. None where each setting is scored on all pixels.
        peaks: Only the maximum of a map counts.
        side: `image` or `text`: whose map is scored.
        fill: What stands in for pixels that are taken away, if any are.
        boxed: Only studies with boxes count.
        forwards: Of the model, per pair and setting.
        needs_thorax: The data module has to know where the thorax is.
        beside: Of a model, batches and a seed: models and batches whose maps the pairs' own are held against.
        over: Of the values of all batches, the score.
    """

    name: str
    metric: type[Metric]
    value: Callable[..., Any]
    coarse: Callable[[Tensor, Tensor], Tensor] | None = None
    peaks: bool = False
    side: str = "image"
    fill: str = ""
    boxed: bool = False
    forwards: int = 0
    needs_thorax: bool = False
    beside: Callable[[Clip, Sequence[StudyBatch], int], Beside] = _nothing
    over: Callable[[Sequence[Any]], Score] = mean_of

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1: of two masses that of the smaller map."""
        return 1 if self.metric.higher_is_better else -1

    @property
    def title(self) -> str:
        """The name in words, with the direction."""
        words = self.name.partition("/")[0].replace("_", " ") + f" ({self.fill.replace('_', ' ')})" * bool(self.fill)
        return f"{words}, {'higher' if self.sign > 0 else 'lower'} is better"


def _hits(fused: Tensor, inside: Tensor) -> Tensor:
    """Pointing game."""
    # NumPy finds the maximum several times faster than torch does on a CPU.
    peaks = torch.from_numpy(fused.cpu().numpy().argmax(-1)).to(inside.device)
    return inside.gather(1, peaks).float()


def _contrast(fused: Tensor, inside: Tensor) -> Tensor:
    """Contrast-to-noise ratio, which no scale changes."""
    halves = torch.stack([inside, ~inside], 2).float()
    weights = halves / halves.sum(1, keepdim=True)
    mean = fused @ weights
    noise = ((fused.square() @ weights) - mean.square()).clamp(min=0).sum(-1).sqrt()
    return (mean[..., 0] - mean[..., 1]) / torch.where(noise > 0, noise, 1)


def _energy(fused: Tensor, inside: Tensor) -> Tensor:
    """Energy in box."""
    halves = torch.stack([inside, torch.ones_like(inside)], 2).float()
    common, mass = ((fused @ halves) - fused.amin(-1, keepdim=True) * halves.sum(1, keepdim=True)).unbind(-1)
    return common / torch.where(mass > 0, mass, 1)


def _overlap(fused: Tensor, inside: Tensor) -> Tensor:
    """Mean IoU over the thresholds of the metric."""
    halves = torch.stack([inside, torch.ones_like(inside)], 2).float()
    low, high = fused.amin(-1, keepdim=True), fused.amax(-1, keepdim=True)
    above, size, total = torch.empty_like(fused), inside.sum(1, keepdim=True), torch.zeros_like(low[..., 0])
    for threshold in F.MEAN_THRESHOLDS:
        # Into numbers at once: sums over bool are slow.
        common, area = (torch.gt(fused, low + threshold * (high - low), out=above) @ halves).unbind(-1)
        total += common / (area + size - common)
    return total / len(F.MEAN_THRESHOLDS)


def _ranked(fused: Tensor, inside: Tensor) -> Tensor:
    """Relevance rank accuracy; of equal values at the border none count."""
    # NumPy sorts many times faster than torch does on a CPU.
    ordered = torch.from_numpy(np.sort(fused.cpu().numpy(), -1)).to(fused.device)
    size = inside.sum(1)
    place = (fused.shape[-1] - 1 - size).clamp(min=0)[:, None, None].expand(*fused.shape[:2], 1)
    # What was sorted is needed no more.
    common = torch.gt(fused, ordered.gather(2, place), out=ordered) @ inside.float()[..., None]
    return common[..., 0] / size[:, None]


Located = Callable[[Tensor, Tensor], Tensor]
LOCATED: dict[str, tuple[type[Metric], Located, Located]] = {
    "pointing_game": (PointingGame, F.pointing_game, _hits),
    "cnr": (ContrastToNoise, F.contrast_to_noise, _contrast),
    "miou": (MeanIoU, F.mean_iou, _overlap),
    "energy_in_box": (EnergyInBox, F.energy_in_box, _energy),
    "rank_accuracy": (RankAccuracy, F.rank_accuracy, _ranked),
}
AT_THRESHOLD: dict[str, type[Metric]] = {"iou": ThresholdedIoU, "acc50": BoxAccuracy, "ap50": AveragePrecision50}
CURVES: dict[str, type[Metric]] = {"insertion": InsertionAUC, "deletion": DeletionAUC}
STEPS = 16
CONFIDENCE: dict[str, type[Metric]] = {
    "confidence_drop": ConfidenceDrop,
    "confidence_increase": ConfidenceIncrease,
    "fixed_drop": ConfidenceDrop,
    "fixed_increase": ConfidenceIncrease,
    "remove": RemovalDrop,
}


def find_objective(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    kind, _, fill = name.partition("/")
    words = name.removeprefix("text_")
    if name in LOCATED:
        metric, exact, coarse = LOCATED[name]
        return Objective(name, metric, partial(_located, exact), coarse, peaks=coarse is _hits, boxed=True)
    if kind in AT_THRESHOLD and is_share(fill):
        over = Detections.joined if kind == "ap50" else mean_of
        return Objective(name, AT_THRESHOLD[kind], partial(_at_threshold, kind, float(fill)), boxed=True, over=over)
    if name in PLAIN:
        return PLAIN[name]
    known = name in (kind, *(f"{kind}/{known}" for known in FILLS))
    fill = fill or "mean_film"
    if kind in CONFIDENCE and known:
        return Objective(name, CONFIDENCE[kind], partial(_image_confidence, kind, fill), fill=fill, forwards=1)
    if kind in CURVES and known:
        return Objective(name, CURVES[kind], partial(_curve_gain, kind, fill), fill=fill, forwards=STEPS + 1)
    if name.startswith("text_") and words in CONFIDENCE:
        return Objective(name, CONFIDENCE[words], partial(_text_confidence, words), side="text", forwards=1)
    raise ValueError(
        f"No objective {name!r}. Take one of {', '.join([*LOCATED, *PLAIN])}; one of {', '.join(AT_THRESHOLD)} at a "
        f"threshold, as iou/0.3; one of {', '.join([*CONFIDENCE, *CURVES])}, which may name a fill, as remove/blur "
        f"({', '.join(FILLS)}); or, for the words, one of {', '.join(CONFIDENCE)} after text_."
    )


def is_share(text: str) -> bool:
    """The text is a number in [0, 1)."""
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _at_threshold(kind: str, threshold: float, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor | Detections:
    """IoU, Acc@0.5, or what the average precision is made of, at one threshold."""
    boxes = [box.to(maps.image.device) for box in pairs.batch["boxes"]]
    if kind == "acc50":
        return F.box_accuracy(F.components(maps.image, threshold), boxes, len(boxes))
    if kind == "ap50":
        return Detections.of(F.components(maps.image, threshold), boxes)
    return _located(lambda image, inside: F.iou(image, inside, torch.tensor([threshold]))[:, 0], clip, pairs, maps)


def _border_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    film = pairs.batch["film"].to(maps.image.device)
    return F.outside_mass(maps.image, ~F.border_mask((maps.image.shape[1], maps.image.shape[2]), film))


def _outside_thorax_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    assert pairs.thorax is not None
    return F.outside_mass(maps.image, pairs.thorax[None])


def _map_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    return maps.image.flatten(1).mean(1)


def _text_map_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    return F.text_mass(maps.text, maps.content)


def _prompt_sensitivity(clip: Clip, pairs: Pairs, maps: AttributionMaps, other: AttributionMaps) -> Tensor:
    """Rank correlation of the maps under both phrases; NaN where there is only one."""
    phrases = zip(pairs.parts["phrases"], other.parts["phrases"], strict=True)
    same = torch.tensor([one == another for one, another in phrases], device=maps.grid.device)
    return F.spearman(maps.grid.flatten(1), other.grid.flatten(1)).masked_fill(same, torch.nan)


def _side_sensitivity(clip: Clip, pairs: Pairs, maps: AttributionMaps, swapped: AttributionMaps) -> Tensor:
    sides = [named_side(phrase) for phrase in pairs.batch["phrase"]]
    return F.side_sensitivity(maps.image, swapped.image, sides, pairs.batch["film"].to(maps.image.device))


def _sanity(clip: Clip, pairs: Pairs, maps: AttributionMaps, *broken: AttributionMaps) -> Tensor:
    """Rank correlation with the maps under shuffled weights, the mean over the stages."""
    return torch.stack([F.spearman(after.grid.flatten(1), maps.grid.flatten(1)) for after in broken]).nanmean(0)


def _text_sanity(clip: Clip, pairs: Pairs, maps: AttributionMaps, *broken: AttributionMaps) -> Tensor:
    return torch.stack([F.spearman(after.text, maps.text, maps.content) for after in broken]).nanmean(0)


PLAIN = {
    objective.name: objective
    for objective in (
        Objective("border_mass", OutsideMass, _border_mass),
        Objective("outside_thorax_mass", OutsideMass, _outside_thorax_mass, needs_thorax=True),
        Objective("mean_map_mass", MapMass, _map_mass),
        Objective("text_mean_map_mass", MapMass, _text_map_mass, side="text"),
        Objective("prompt_sensitivity", RankCorrelation, _prompt_sensitivity, beside=_other_phrases),
        Objective("side_sensitivity", SideSensitivity, _side_sensitivity, beside=_swapped_phrases),
        Objective("sanity", RankCorrelation, _sanity, beside=_broken_models),
        Objective("text_sanity", RankCorrelation, _text_sanity, side="text", beside=_broken_models),
    )
}


def _curve_gain(kind: str, fill: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    """What a study adds above the line of the AUC; what is below it, S_full - S_blank, no setting changes."""
    images, _ = model_inputs(clip, pairs.batch)
    assert pairs.text is not None
    shares, scores = removal.patch_curve(clip, images, maps.grid, fill, pairs.text, kind, steps=STEPS)
    return F.curve_area(scores, *F.curve_ends(scores, kind), shares)[0]


def _located(metric: Located, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    size = (maps.image.shape[1], maps.image.shape[2])
    return metric(maps.image, F.box_masks(pairs.batch["boxes"], size).to(maps.image.device))


def _image_confidence(kind: str, fill: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    images, _ = model_inputs(clip, pairs.batch)
    assert pairs.image is not None
    assert pairs.text is not None
    rule, change = removal.CONFIDENCE[kind]
    left = removal.image_score(clip, images, removal.kept_pixels(maps.image, rule), fill, pairs.text)
    return change((pairs.image * pairs.text).sum(1), left)


def _text_confidence(kind: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    assert pairs.image is not None
    assert pairs.text is not None
    rule, change = removal.CONFIDENCE[kind]
    drop = removal.dropped_tokens(maps.text, maps.content, rule)
    return change((pairs.image * pairs.text).sum(1), removal.text_score(clip, pairs.tokens, drop, pairs.image))


def score_setting(clip: Clip, pairs: Sequence[Pairs], method: Matex, objective: Objective) -> Score:
    """What the studies score under a method, by `Matex.fuse` at the model's size."""
    fuse = partial(type(method).fuse, **method.settings)
    with torch.no_grad():
        return objective.over(
            [objective.value(clip, batch, *map(fuse, (batch.parts, *batch.others))) for batch in pairs]
        )
