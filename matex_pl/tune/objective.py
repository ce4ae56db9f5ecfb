"""What the settings of MATEX are chosen by: metrics of the benchmark, of finished maps and on a raster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl.anatomy import named_side
from matex_pl.attribution import Matex
from matex_pl.attribution.core.fill import FILLS
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.study import StudyBatch
from matex_pl.evaluation.intervals import Detections, Score, Sums
from matex_pl.evaluation.pairs import embed_pairs, model_inputs, other_phrases, swapped_phrases, with_phrases
from matex_pl.maps import AttributionMaps, patch_mean
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
from matex_pl.tune import coarse


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
        ends: The two ends of every curve, as `removal.end_scores` gives them, where the objective draws one.
    """

    batch: StudyBatch
    parts: dict[str, Any]
    tokens: Tensor
    image: Tensor | None = None
    text: Tensor | None = None
    others: list[dict[str, Any]] = field(default_factory=list)
    thorax: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None


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
        beside = [found[place] for found in others]
        image, text = embed_pairs(clip, images, tokens) if objective.forwards else (None, None)
        ends = removal.end_scores(clip, images, objective.fill, text) if objective.curve and text is not None else None
        pairs.append(Pairs(batch, parts[place], tokens, image, text, beside, thorax, ends))
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


Scorer = Callable[..., Tensor]
"""Of rows of the pairs, a slice, and their fused maps under S settings `(b, S, P)`, then those beside them, what
`tally` takes, by default the value of each study `(b, S)`, where NaN does not count. Maps of cells or patches have any
scale, maps of words are finished.
"""


@dataclass(frozen=True)
class Objective:
    """What the settings are chosen by: a metric of the benchmark.

    Args:
        name: As the user writes it.
        metric: Its class, which knows the direction.
        value: Of a model, pairs, their finished maps and those beside them: what `over` makes a score of, by default
            the value of each study `(B,)`, where NaN does not count.
        tally: Of what `coarse` finds, C numbers of each setting `(S, C)` that add up over studies.
        settle: The score of such sums `(..., C)`.
        coarse: `value` on a raster, of pairs and its height and width: what scores many settings at once. None where
            each setting is scored on all pixels or words.
        peaks: Only the maximum of a map counts.
        patches: Only the means of patches count, `maps.grid`.
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
    tally: Callable[[Tensor], Tensor] = coarse.sum_and_count
    settle: Callable[[Tensor], Tensor] = coarse.mean
    coarse: Callable[[Pairs, tuple[int, int]], Scorer] | None = None
    peaks: bool = False
    patches: bool = False
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
    def curve(self) -> bool:
        """It is the area of a curve, whose ends no setting changes."""
        return self.metric in CURVES.values()

    @property
    def title(self) -> str:
        """The name in words, with the direction."""
        kind, _, detail = self.name.partition("/")
        words = CURVE_TITLES.get(kind, kind.replace("_", " "))
        words += f" above {detail}" * (kind in AT_THRESHOLD) + f" ({self.fill.replace('_', ' ')})" * bool(self.fill)
        return f"{words}, {'higher' if self.sign > 0 else 'lower'} is better"


Located = Callable[[Tensor, Tensor], Tensor]
LOCATED: dict[str, tuple[type[Metric], Located, Located]] = {
    "pointing_game": (PointingGame, F.pointing_game, coarse.hits),
    "cnr": (ContrastToNoise, F.contrast_to_noise, coarse.contrast),
    "miou": (MeanIoU, F.mean_iou, coarse.overlap),
    "energy_in_box": (EnergyInBox, F.energy_in_box, coarse.energy),
    "rank_accuracy": (RankAccuracy, F.rank_accuracy, coarse.ranked),
}
AT_THRESHOLD: dict[str, type[Metric]] = {"iou": ThresholdedIoU, "acc50": BoxAccuracy, "ap50": AveragePrecision50}
CURVES: dict[str, type[Metric]] = {"insertion": InsertionAUC, "deletion": DeletionAUC}
# Areas of a study between the curve and the score of the fill alone, not divided by what they could span.
CURVE_TITLES = {"insertion": "insertion gain", "deletion": "deletion area above the fill alone"}
STEPS = 16
CONFIDENCE: dict[str, type[Metric]] = {
    "confidence_drop": ConfidenceDrop,
    "confidence_increase": ConfidenceIncrease,
    "confidence_drop@50": ConfidenceDrop,
    "confidence_increase@50": ConfidenceIncrease,
    "top20_removal": RemovalDrop,
}


def find_objective(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    kind, _, fill = name.partition("/")
    words = name.removeprefix("text_")
    if name in LOCATED:
        metric, exact, rough = LOCATED[name]
        peaks = rough is coarse.hits
        found, sought = partial(_located, exact), partial(_in_boxes, rough)
        return Objective(name, metric, found, coarse=sought, peaks=peaks, boxed=True)
    if kind in AT_THRESHOLD and is_share(fill):
        return _find_at_threshold(name, kind, float(fill))
    if name in PLAIN:
        return PLAIN[name]
    known = name in (kind, *(f"{kind}/{known}" for known in FILLS))
    fill = fill or "mean_film"
    if kind in CONFIDENCE and known:
        return Objective(name, CONFIDENCE[kind], partial(_image_confidence, kind, fill), fill=fill, forwards=1)
    if kind in CURVES and known:
        return Objective(name, CURVES[kind], partial(_curve_gain, kind, fill), fill=fill, forwards=STEPS - 1)
    if name.startswith("text_") and words in CONFIDENCE:
        return Objective(name, CONFIDENCE[words], partial(_text_confidence, words), side="text", forwards=1)
    raise ValueError(
        f"No objective {name!r}. Take one of {', '.join([*LOCATED, *PLAIN])}; one of {', '.join(AT_THRESHOLD)} at a "
        f"threshold, as iou/0.3; one of {', '.join([*CONFIDENCE, *CURVES])}, which may name a fill, as "
        f"top20_removal/blur ({', '.join(FILLS)}); or, for the words, one of {', '.join(CONFIDENCE)} after text_."
    )


def boxless_objectives() -> list[str]:
    """Names of the objectives that need no boxes, with the fill that they have by default."""
    names = [*LOCATED, *PLAIN, *CONFIDENCE, *CURVES, *(f"text_{name}" for name in CONFIDENCE)]
    return [name for name in names if not find_objective(name).boxed]


def is_share(text: str) -> bool:
    """The text is a number in [0, 1)."""
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _find_at_threshold(name: str, kind: str, threshold: float) -> Objective:
    """The objective at a threshold."""
    metric, exact = AT_THRESHOLD[kind], partial(_at_threshold, kind, threshold)
    if kind == "ap50":
        rough, settle, over = partial(_detections, threshold), coarse.precision, Detections.joined
        return Objective(name, metric, exact, tally=Tensor.double, settle=settle, coarse=rough, boxed=True, over=over)
    overlap = partial(_in_boxes, partial(coarse.overlap, thresholds=(threshold,)))
    rough = overlap if kind == "iou" else partial(_box_accuracy, threshold)
    return Objective(name, metric, exact, coarse=rough, boxed=True)


def _at_threshold(kind: str, threshold: float, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor | Detections:
    """IoU, Acc@0.5, or what the average precision is made of, at one threshold."""
    boxes = [box.to(maps.image.device) for box in pairs.batch["boxes"]]
    if kind == "acc50":
        return F.box_accuracy(F.components(maps.image, threshold), boxes, len(boxes))
    if kind == "ap50":
        return Detections.of(F.components(maps.image, threshold), boxes)
    return _located(lambda image, inside: F.iou(image, inside, torch.tensor([threshold]))[:, 0], clip, pairs, maps)


def _in_boxes(metric: Located, pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """What a metric of maps and cells in boxes scores, of studies with boxes."""
    inside = coarse.cells_in_boxes(pairs.batch["boxes"], raster).flatten(1).to(_device(pairs))
    without = ~inside.any(1, keepdim=True)
    return lambda rows, fused: metric(fused, inside[rows]).masked_fill(without[rows], torch.nan)


def _box_accuracy(threshold: float, pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """Acc@0.5 at a threshold, of studies with boxes."""
    boxes = F.pad_boxes(pairs.batch["boxes"], pairs.parts["score"])
    without = torch.tensor([not len(box) for box in pairs.batch["boxes"]], device=boxes.device)[:, None]

    def score(rows: slice, fused: Tensor) -> Tensor:
        found = coarse.box_accuracy(fused, boxes[rows], raster, threshold)
        return found.masked_fill(without[rows], torch.nan)

    return score


def _detections(threshold: float, pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """What the average precision at a threshold is made of."""
    boxes = [box.to(_device(pairs)) for box in pairs.batch["boxes"]]

    def count(rows: slice, fused: Tensor) -> Tensor:
        return coarse.detections(fused, boxes[rows], raster, threshold)

    return count


def _device(pairs: Pairs) -> torch.device:
    return pairs.parts["score"].device


def _border(pairs: Pairs) -> Tensor:
    """The border of the films, `(B, H, W)` bool."""
    return F.border_mask(pairs.parts["size"], pairs.batch["film"])


def _around_thorax(pairs: Pairs) -> Tensor:
    """Where usually no lung and no heart is, `(1, H, W)` bool."""
    assert pairs.thorax is not None
    return ~pairs.thorax[None]


Zone = Callable[[Pairs], Tensor]


def _zone_mass(zone: Zone, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    return F.outside_mass(maps.image, ~zone(pairs))


def _coarse_zone_mass(zone: Zone, pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """Share of the mass in a zone; a cell on its edge counts by its share in it."""
    weight = patch_mean(zone(pairs).float(), raster).flatten(1).to(_device(pairs)).expand(len(pairs.tokens), -1)
    return lambda rows, fused: coarse.mass_share(fused, weight[rows])


def _map_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    return maps.image.flatten(1).mean(1)


def _coarse_map_mass(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    return lambda rows, fused: coarse.mean_mass(fused)


def _text_map_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    return F.text_mass(maps.text, maps.content)


def _text_map_masses(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """The metric itself, over all settings at once."""
    return lambda rows, fused: F.text_mass(*_as_rows(pairs, rows, fused)).view(fused.shape[:2])


def _prompt_sensitivity(clip: Clip, pairs: Pairs, maps: AttributionMaps, other: AttributionMaps) -> Tensor:
    """Rank correlation of the maps under both phrases; NaN where there is only one."""
    return F.spearman(maps.grid.flatten(1), other.grid.flatten(1)).masked_fill(_says_the_same(pairs), torch.nan)


def _coarse_prompt_sensitivity(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    same = _says_the_same(pairs)[:, None]
    return lambda rows, *fused: _mean_correlation(*fused).masked_fill(same[rows], torch.nan)


def _says_the_same(pairs: Pairs) -> Tensor:
    """Which studies have only one phrase, `(B,)` bool."""
    (other,) = pairs.others
    phrases = zip(pairs.parts["phrases"], other["phrases"], strict=True)
    return torch.tensor([one == another for one, another in phrases], device=_device(pairs))


def _side_sensitivity(clip: Clip, pairs: Pairs, maps: AttributionMaps, swapped: AttributionMaps) -> Tensor:
    return F.side_sensitivity(maps.image, swapped.image, _sides(pairs), pairs.batch["film"].to(maps.image.device))


def _coarse_side_sensitivity(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    sides = [F.OTHER_SIDE[side] for side in _sides(pairs)]
    half = F.side_half(raster, sides, pairs.batch["film"]).flatten(1).to(_device(pairs))
    return lambda rows, own, swapped: coarse.mass_share(swapped, half[rows]) - coarse.mass_share(own, half[rows])


def _sides(pairs: Pairs) -> list[str]:
    """The side that each phrase names."""
    return [named_side(phrase) for phrase in pairs.batch["phrase"]]


def _sanity(clip: Clip, pairs: Pairs, maps: AttributionMaps, *broken: AttributionMaps) -> Tensor:
    """Rank correlation with the maps under shuffled weights, the mean over the stages."""
    return torch.stack([F.spearman(after.grid.flatten(1), maps.grid.flatten(1)) for after in broken]).nanmean(0)


def _coarse_sanity(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    return lambda rows, *fused: _mean_correlation(*fused)


def _mean_correlation(fused: Tensor, *others: Tensor) -> Tensor:
    return coarse.correlations(fused, others).nanmean(0)


def _text_sanity(clip: Clip, pairs: Pairs, maps: AttributionMaps, *broken: AttributionMaps) -> Tensor:
    return torch.stack([F.spearman(after.text, maps.text, maps.content) for after in broken]).nanmean(0)


def _text_sanities(pairs: Pairs, raster: tuple[int, int]) -> Scorer:
    """The metric itself, over all settings at once."""

    def score(rows: slice, own: Tensor, *broken: Tensor) -> Tensor:
        maps, content = _as_rows(pairs, rows, own)
        found = torch.stack([F.spearman(after.flatten(0, 1), maps, content) for after in broken])
        return found.nanmean(0).view(own.shape[:2])

    return score


def _as_rows(pairs: Pairs, rows: slice, fused: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of words `(b, S, T)` as `(b * S, T)`, and likewise which tokens are content."""
    return fused.flatten(0, 1), pairs.parts["content"][rows].repeat_interleave(fused.shape[1], 0)


PLAIN = {
    objective.name: objective
    for objective in (
        Objective("border_mass", OutsideMass, partial(_zone_mass, _border), coarse=partial(_coarse_zone_mass, _border)),
        Objective(
            "outside_thorax_mass",
            OutsideMass,
            partial(_zone_mass, _around_thorax),
            coarse=partial(_coarse_zone_mass, _around_thorax),
            needs_thorax=True,
        ),
        Objective("mean_map_mass", MapMass, _map_mass, coarse=_coarse_map_mass),
        Objective("text_mean_map_mass", MapMass, _text_map_mass, coarse=_text_map_masses, side="text"),
        Objective(
            "prompt_sensitivity",
            RankCorrelation,
            _prompt_sensitivity,
            coarse=_coarse_prompt_sensitivity,
            patches=True,
            beside=_other_phrases,
        ),
        Objective(
            "side_sensitivity",
            SideSensitivity,
            _side_sensitivity,
            coarse=_coarse_side_sensitivity,
            beside=_swapped_phrases,
        ),
        Objective("sanity", RankCorrelation, _sanity, coarse=_coarse_sanity, patches=True, beside=_broken_models),
        Objective(
            "text_sanity", RankCorrelation, _text_sanity, coarse=_text_sanities, side="text", beside=_broken_models
        ),
    )
}


def _curve_gain(kind: str, fill: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    """What a study adds above the line of the AUC; what is below it, S_full - S_blank, no setting changes."""
    images, _ = model_inputs(clip, pairs.batch)
    assert pairs.text is not None
    shares, scores = removal.patch_curve(clip, images, maps.grid, fill, pairs.text, kind, STEPS, ends=pairs.ends)
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
