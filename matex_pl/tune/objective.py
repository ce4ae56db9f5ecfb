"""Objectives of `matex tune`: any metric of the benchmark, as the values of a batch of pairs under one setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl import metrics
from matex_pl.anatomy import named_side
from matex_pl.attribution.core.fill import FILLS
from matex_pl.clip.model import Clip
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.intervals import Detections
from matex_pl.evaluation.pairs import embed_pairs, model_inputs, other_phrases, swapped_phrases, with_phrases
from matex_pl.maps import Attribution, patch_mean
from matex_pl.metrics import functional as F
from matex_pl.metrics import removal
from matex_pl.metrics.sanity import randomized

# Steps of an insertion or deletion curve; its two ends are the same under every setting.
STEPS = 16


@dataclass(frozen=True)
class PairBatch:
    """B pairs and the components that MATEX fuses under every setting.

    Args:
        clip: The model.
        batch: The pairs, as the loader gives them.
        parts: `parts` of `Matex.attribute`.
        references: `parts` of each map that the objective compares with: another phrase, shuffled weights.
        thorax: `(H, W)` bool, the usual place of lungs and heart, for an objective that needs it.
        fill: Replacement of removed pixels, for an objective that removes pixels.
    """

    clip: Clip
    batch: ImageTextBatch
    parts: dict[str, Any]
    references: list[dict[str, Any]]
    thorax: Tensor | None
    fill: str

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Normalized images `(B, 3, H, W)` and tokens `(B, T)`."""
        return model_inputs(self.clip, self.batch)

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Embeddings of images and phrases, `(B, D)` each."""
        return embed_pairs(self.clip, *self.inputs)

    @cached_property
    def curve_ends(self) -> tuple[Tensor, Tensor]:
        """Both ends of every curve, see `removal.end_scores`."""
        return removal.end_scores(self.clip, self.inputs[0], self.fill, self.embeddings[1])


Value = Callable[..., "Tensor | Detections"]
"""`(pairs, maps, *reference_maps)` to the value of each pair `(B,)`, where NaN does not count, or to `Detections`."""
References = Iterable[tuple[Clip, Sequence[ImageTextBatch]]]
"""A model and batches for each reference map."""


def _no_references(clip: Clip, batches: Sequence[ImageTextBatch], seed: int) -> References:
    return ()


@dataclass(frozen=True)
class Objective:
    """A metric of the benchmark that settings are chosen by.

    Args:
        name: Name on the command line; `text_` in front scores the text maps.
        metric: Class of the metric, which has the direction.
        value: Values of a batch from its maps.
        needs_boxes: Only pairs with boxes count.
        needs_thorax: The usual place of lungs and heart is needed.
        fill: Replacement of removed pixels; empty if none are removed.
        forwards: Forwards of the model per pair and setting; 0 if maps alone are scored.
        references: Pairs and models whose maps are compared with.
    """

    name: str
    metric: type[Metric]
    value: Value
    needs_boxes: bool = False
    needs_thorax: bool = False
    fill: str = ""
    forwards: int = 0
    references: Callable[[Clip, Sequence[ImageTextBatch], int], References] = _no_references

    @property
    def side(self) -> str:
        """`image` or `text`: the map that is scored."""
        return "text" if self.name.startswith("text_") else "image"

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1; of two masses the smaller is better."""
        return 1 if self.metric.higher_is_better else -1

    @property
    def title(self) -> str:
        """Name in words, with the direction."""
        kind, _, detail = self.name.partition("/")
        words = TITLES.get(kind, kind.replace("_", " "))
        words += f" above {detail}" * (kind in AT_THRESHOLD) + f" ({self.fill.replace('_', ' ')})" * bool(self.fill)
        return f"{words}, {'higher' if self.sign > 0 else 'lower'} is better"


def find_objective(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ValueError: There is none; the message lists all.
    """
    kind, _, detail = name.partition("/")
    if name in PLAIN | TEXT:
        return (PLAIN | TEXT)[name]
    if kind in AT_THRESHOLD and _is_threshold(detail):
        metric, value = AT_THRESHOLD[kind]
        return Objective(name, metric, partial(value, float(detail)), needs_boxes=True)
    if kind in FILLED and (name == kind or detail in FILLS):
        return replace(FILLED[kind], name=name, fill=detail or "mean_image")
    raise ValueError(
        f"No objective {name!r}. Take one of {', '.join(PLAIN)}; one of {', '.join(AT_THRESHOLD)} at a threshold, as "
        f"iou/0.3; one of {', '.join(FILLED)}, which may name a fill, as top20_removal/blur "
        f"({', '.join(FILLS)}); or, for the words, one of {', '.join(TEXT)}."
    )


def boxless_objectives() -> list[str]:
    """Names of the objectives that need no boxes."""
    return [name for name, objective in (PLAIN | FILLED | TEXT).items() if not objective.needs_boxes]


def _is_threshold(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _in_boxes(metric: Callable[[Tensor, Tensor], Tensor], pairs: PairBatch, maps: Attribution) -> Tensor:
    return metric(maps.image, _masks(pairs, maps))


def _iou(threshold: float, pairs: PairBatch, maps: Attribution) -> Tensor:
    return F.iou(maps.image, _masks(pairs, maps), (threshold,))[:, 0]


def _box_accuracy(threshold: float, pairs: PairBatch, maps: Attribution) -> Tensor:
    return F.box_accuracy(F.components(maps.image, threshold), pairs.batch["boxes"], len(maps.image))


def _detections(threshold: float, pairs: PairBatch, maps: Attribution) -> Detections:
    return Detections.of(F.components(maps.image, threshold), pairs.batch["boxes"])


def _masks(pairs: PairBatch, maps: Attribution) -> Tensor:
    """Masks of the boxes, `(B, H, W)` bool; on a raster a box smaller than a cell keeps one."""
    size = _size(maps)
    masks = F.box_masks(pairs.batch["boxes"], size, keep_small=size != pairs.clip.image_size)
    return masks.to(maps.image.device)


def _border_mass(pairs: PairBatch, maps: Attribution) -> Tensor:
    return F.outside_mass(maps.image, ~F.border_mask(_size(maps), pairs.batch["content_box"]))


def _outside_thorax_mass(pairs: PairBatch, maps: Attribution) -> Tensor:
    assert pairs.thorax is not None
    return F.outside_mass(maps.image, patch_mean(pairs.thorax[None].float(), _size(maps)) > 0.5)


def _size(maps: Attribution) -> tuple[int, int]:
    return maps.image.shape[1], maps.image.shape[2]


def _map_mass(pairs: PairBatch, maps: Attribution) -> Tensor:
    return maps.image.flatten(1).mean(1)


def _text_map_mass(pairs: PairBatch, maps: Attribution) -> Tensor:
    return F.text_mass(maps.text, maps.content)


def _prompt_sensitivity(pairs: PairBatch, maps: Attribution, other: Attribution) -> Tensor:
    """Rank correlation of the maps under both phrases; NaN where both are the same phrase."""
    phrases = zip(maps.parts["phrases"], other.parts["phrases"], strict=True)
    same = torch.tensor([phrase == another for phrase, another in phrases], device=maps.grid.device)
    return F.spearman(maps.grid.flatten(1), other.grid.flatten(1)).masked_fill(same, torch.nan)


def _side_sensitivity(pairs: PairBatch, maps: Attribution, swapped: Attribution) -> Tensor:
    sides = [named_side(phrase) for phrase in pairs.batch["phrase"]]
    return F.side_sensitivity(maps.image, swapped.image, sides, pairs.batch["content_box"])


def _sanity(pairs: PairBatch, maps: Attribution, *shuffled: Attribution) -> Tensor:
    """Mean over the stages of the rank correlation with the maps under shuffled weights."""
    return torch.stack([F.spearman(after.grid.flatten(1), maps.grid.flatten(1)) for after in shuffled]).nanmean(0)


def _text_sanity(pairs: PairBatch, maps: Attribution, *shuffled: Attribution) -> Tensor:
    return torch.stack([F.spearman(after.text, maps.text, maps.content) for after in shuffled]).nanmean(0)


def _confidence(kind: str, pairs: PairBatch, maps: Attribution) -> Tensor:
    rule, change = removal.CONFIDENCE[kind]
    (images, _), (image, text) = pairs.inputs, pairs.embeddings
    kept = removal.kept_pixels(maps.image, rule)
    return change((image * text).sum(1), removal.image_score(pairs.clip, images, kept, pairs.fill, text))


def _text_confidence(kind: str, pairs: PairBatch, maps: Attribution) -> Tensor:
    rule, change = removal.CONFIDENCE[kind]
    (_, tokens), (image, text) = pairs.inputs, pairs.embeddings
    drop = removal.dropped_tokens(maps.text, maps.content, rule)
    return change((image * text).sum(1), removal.text_score(pairs.clip, tokens, drop, image))


def _curve_gain(kind: str, pairs: PairBatch, maps: Attribution) -> Tensor:
    """Numerator of the AUC; its denominator S_full - S_blank is the same under every setting."""
    (images, _), (_, text) = pairs.inputs, pairs.embeddings
    ends = pairs.curve_ends
    shares, scores = removal.patch_curve(pairs.clip, images, maps.grid, pairs.fill, text, kind, STEPS, ends=ends)
    return F.curve_area(scores, *F.curve_ends(scores, kind), shares)[0]


def _other_phrases(clip: Clip, batches: Sequence[ImageTextBatch], seed: int) -> References:
    """Each image with another pair's phrase."""
    phrases = [phrase for batch in batches for phrase in batch["phrase"]]
    others = iter(other_phrases(phrases, [finding for batch in batches for finding in batch["finding"]]))
    return [(clip, [with_phrases(batch, [next(others) for _ in batch["phrase"]]) for batch in batches])]


def _swapped_phrases(clip: Clip, batches: Sequence[ImageTextBatch], seed: int) -> References:
    """Each image with its phrase after right and left are exchanged."""
    return [(clip, [with_phrases(batch, swapped_phrases(batch["phrase"])) for batch in batches])]


def _shuffled_models(clip: Clip, batches: Sequence[ImageTextBatch], seed: int) -> References:
    """The pairs under more and more shuffled weights."""
    return ((shuffled, batches) for _, shuffled in randomized(clip, seed))


def _by_name(*objectives: Objective) -> dict[str, Objective]:
    return {objective.name: objective for objective in objectives}


PLAIN = _by_name(
    Objective("pointing_game", metrics.PointingGame, partial(_in_boxes, F.pointing_game), needs_boxes=True),
    Objective("cnr", metrics.ContrastToNoise, partial(_in_boxes, F.contrast_to_noise), needs_boxes=True),
    Objective("miou", metrics.MeanIoU, partial(_in_boxes, F.mean_iou), needs_boxes=True),
    Objective(
        "energy_pointing_game", metrics.EnergyPointingGame, partial(_in_boxes, F.energy_pointing_game), needs_boxes=True
    ),
    Objective(
        "relevance_rank_accuracy",
        metrics.RelevanceRankAccuracy,
        partial(_in_boxes, F.relevance_rank_accuracy),
        needs_boxes=True,
    ),
    Objective("border_mass", metrics.OutsideMass, _border_mass),
    Objective("outside_thorax_mass", metrics.OutsideMass, _outside_thorax_mass, needs_thorax=True),
    Objective("mean_map_mass", metrics.MapMass, _map_mass),
    Objective("prompt_sensitivity", metrics.RankCorrelation, _prompt_sensitivity, references=_other_phrases),
    Objective("side_sensitivity", metrics.SideSensitivity, _side_sensitivity, references=_swapped_phrases),
    Objective("sanity", metrics.RankCorrelation, _sanity, references=_shuffled_models),
)
AT_THRESHOLD: dict[str, tuple[type[Metric], Value]] = {
    "iou": (metrics.ThresholdedIoU, _iou),
    "acc50": (metrics.BoxAccuracy, _box_accuracy),
    "ap50": (metrics.AveragePrecision50, _detections),
}
CONFIDENCE: dict[str, type[Metric]] = {
    "confidence_drop": metrics.ConfidenceDrop,
    "confidence_increase": metrics.ConfidenceIncrease,
    "confidence_drop@50": metrics.ConfidenceDrop,
    "confidence_increase@50": metrics.ConfidenceIncrease,
    "top20_removal": metrics.RemovalDrop,
}
FILLED = _by_name(
    *(Objective(kind, metric, partial(_confidence, kind), forwards=1) for kind, metric in CONFIDENCE.items()),
    Objective("insertion", metrics.InsertionAUC, partial(_curve_gain, "insertion"), forwards=STEPS - 1),
    Objective("deletion", metrics.DeletionAUC, partial(_curve_gain, "deletion"), forwards=STEPS - 1),
)
TEXT = _by_name(
    Objective("text_mean_map_mass", metrics.MapMass, _text_map_mass),
    Objective("text_sanity", metrics.RankCorrelation, _text_sanity, references=_shuffled_models),
    *(
        Objective(f"text_{kind}", metric, partial(_text_confidence, kind), forwards=1)
        for kind, metric in CONFIDENCE.items()
    ),
)
TITLES = {"insertion": "insertion gain", "deletion": "deletion area above the fill alone"}
