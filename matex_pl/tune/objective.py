"""Objectives of `matex tune`: metrics of the benchmark, as values of a batch of pairs under one setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from matex_pl.anatomy import named_side
from matex_pl.attribution.core.fill import FILLS
from matex_pl.clip.model import Clip
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.columns import METRICS
from matex_pl.evaluation.intervals import Detections
from matex_pl.evaluation.pairs import embed_pairs, model_inputs, other_phrases_of, swapped_phrases, with_phrases
from matex_pl.evaluation.values import IN_BOXES, map_correlation
from matex_pl.maps import Attribution, Content, patch_mean
from matex_pl.metrics import functional as F
from matex_pl.metrics import removal
from matex_pl.metrics.sanity import randomized

# Number of steps of an insertion or deletion curve; both ends are the same under every setting.
STEPS = 16
AT_THRESHOLD = ("iou", "acc50", "ap50")
PLAIN = (
    *IN_BOXES,
    *("border_mass", "outside_thorax_mass", "mean_map_mass", "prompt_sensitivity", "side_sensitivity", "sanity"),
)
FILLED = (*removal.CONFIDENCE, *removal.KINDS)
TEXT = tuple(f"text_{metric}" for metric in ("mean_map_mass", "sanity", *removal.CONFIDENCE))
WORDS = "words"
TITLES = {"insertion": "insertion gain", "deletion": "deletion area above the fill alone"}


@dataclass(frozen=True)
class PairBatch:
    """B pairs and the MATEX components that every setting fuses.

    Args:
        clip: CLIP model.
        batch: Batch of the loader.
        parts: `parts` of `Matex.attribute`.
        references: `parts` of each reference map of the objective: another phrase, or shuffled weights.
        thorax: `(H, W)` bool, usual place of lungs and heart, for an objective that needs it.
        fill: Replacement of removed pixels, for an objective that removes pixels.
    """

    clip: Clip
    batch: ImageTextBatch
    parts: dict[str, Any]
    references: list[dict[str, Any]]
    thorax: Tensor | None
    fill: str

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Normalized images `(B, 3, H, W)` and tokens `(B, L)`."""
        return model_inputs(self.clip, self.batch)

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Embeddings of images and phrases, `(B, D)` each."""
        return embed_pairs(self.clip, *self.inputs)

    @cached_property
    def curve_ends(self) -> tuple[Tensor, Tensor]:
        """Both ends of every curve; see `removal.end_scores`."""
        return removal.end_scores(self.clip, self.inputs[0], self.fill, self.embeddings[1])


@dataclass(frozen=True)
class Objective:
    """A metric of the benchmark by which settings are ranked.

    Args:
        name: Name on the command line.
        metric: Name of the metric in the benchmark, without side, threshold and fill.
        side: Scored map: `image` or `text`.
        threshold: Threshold of the maps, for a metric at a threshold.
        fill: Replacement of removed pixels; empty if no pixels are removed.
        content: Tokens of a phrase that count.
    """

    name: str
    metric: str
    side: str = "image"
    threshold: float = 0.0
    fill: str = ""
    content: Content = "tokens"

    @property
    def needs_boxes(self) -> bool:
        """Whether only pairs with boxes count."""
        return self.metric in IN_BOXES or self.metric in AT_THRESHOLD

    @property
    def forwards(self) -> int:
        """Number of model forwards per pair and setting; 0 if the maps alone are scored."""
        return STEPS - 1 if self.metric in removal.KINDS else int(self.metric in removal.CONFIDENCE)

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1."""
        return 1 if METRICS[self.metric].higher_is_better else -1

    @property
    def title(self) -> str:
        """Name in words, with the better direction."""
        kind, _, detail = self.name.partition("/")
        words = TITLES.get(kind, kind.replace("_", " "))
        words += f" above {detail}" * (kind in AT_THRESHOLD) + f" ({self.fill.replace('_', ' ')})" * bool(self.fill)
        words += " without punctuation" * (self.content == WORDS)
        return f"{words}, {'higher' if self.sign > 0 else 'lower'} is better"

    def references(
        self, clip: Clip, batches: Sequence[ImageTextBatch], seed: int
    ) -> Iterator[tuple[Clip, Sequence[ImageTextBatch]]]:
        """Model and batches of each reference map of the objective.

        Args:
            clip: CLIP model.
            batches: Batches of pairs.
            seed: Random seed of shuffled weights.
        """
        if self.metric == "prompt_sensitivity":
            phrases = other_phrases_of(batches)
            yield clip, [with_phrases(batch, others) for batch, others in zip(batches, phrases, strict=True)]
        elif self.metric == "side_sensitivity":
            yield clip, [with_phrases(batch, swapped_phrases(batch["phrase"])) for batch in batches]
        elif self.metric == "sanity":
            for _, shuffled in randomized(clip, seed):
                yield shuffled, batches

    def values(self, pairs: PairBatch, maps: Attribution, *references: Attribution) -> Tensor | Detections:
        """Value of each pair `(B,)`, NaN if the pair does not count, or the detections in the maps.

        Args:
            pairs: Batch of pairs.
            maps: Maps of the pairs, of any size.
            references: Maps of each of `references`.
        """
        if self.needs_boxes:
            return self._in_boxes(pairs, maps)
        if self.forwards:
            return self._removal(pairs, maps)
        size, content_box = (maps.image.shape[1], maps.image.shape[2]), pairs.batch["content_box"]
        if self.metric == "mean_map_mass":
            if self.side == "text":
                return F.text_mass(maps.text, maps.content_mask(self.content))
            return maps.image.flatten(1).mean(1)
        if self.metric == "border_mass":
            return F.outside_mass(maps.image, ~F.border_mask(size, content_box))
        if self.metric == "outside_thorax_mass":
            assert pairs.thorax is not None
            return F.outside_mass(maps.image, patch_mean(pairs.thorax[None].float(), size) > 0.5)
        if self.metric == "side_sensitivity":
            sides = [named_side(phrase) for phrase in pairs.batch["phrase"]]
            return F.side_sensitivity(maps.image, references[0].image, sides, content_box)
        if self.metric == "prompt_sensitivity":
            phrases = zip(maps.parts["phrases"], references[0].parts["phrases"], strict=True)
            same = torch.tensor([phrase == other for phrase, other in phrases], device=maps.grid.device)
            return map_correlation(maps, references[0], "image").masked_fill(same, torch.nan)
        # Mean of the sanity check over the stages.
        correlations = [map_correlation(shuffled, maps, self.side, self.content) for shuffled in references]
        return torch.stack(correlations).nanmean(0)

    def _in_boxes(self, pairs: PairBatch, attribution: Attribution) -> Tensor | Detections:
        maps, boxes = attribution.image, pairs.batch["boxes"]
        if self.metric == "acc50":
            return F.map_accuracy(maps, F.components(maps, self.threshold), boxes)
        if self.metric == "ap50":
            return Detections.of(F.components(maps, self.threshold), boxes, attribution.score)
        masks = F.masks_of(maps, boxes)
        if self.metric == "iou":
            return F.iou(maps, masks, (self.threshold,))[:, 0]
        return IN_BOXES[self.metric](maps, masks)

    def _removal(self, pairs: PairBatch, maps: Attribution) -> Tensor:
        (images, tokens), (image, text) = pairs.inputs, pairs.embeddings
        if self.metric in removal.KINDS:
            # Numerator of the AUC. The denominator S_full - S_blank is the same under every setting.
            shares, scores = removal.patch_curve(
                pairs.clip, images, maps.grid, self.fill, text, self.metric, STEPS, ends=pairs.curve_ends
            )
            return F.curve_area(scores, *F.curve_ends(scores, self.metric), shares)[0]
        rule, change = removal.CONFIDENCE[self.metric]
        if self.side == "text":
            drop = removal.dropped_tokens(maps.text, maps.content_mask(self.content), rule)
            left = removal.text_score(pairs.clip, tokens, drop, image)
        else:
            left = removal.image_score(pairs.clip, images, removal.kept_pixels(maps.image, rule), self.fill, text)
        return change((image * text).sum(1), left)


def find_objective(name: str) -> Objective:
    """Objective of the given name.

    Raises:
        ValueError: If there is none; the message lists all.
    """
    metric, _, detail = name.partition("/")
    if name in PLAIN:
        return Objective(name, name)
    if name in TEXT or (metric in TEXT and detail == WORDS):
        return Objective(name, metric.removeprefix("text_"), side="text", content="words" if detail else "tokens")
    if metric in AT_THRESHOLD and _is_threshold(detail):
        return Objective(name, metric, threshold=float(detail))
    if metric in FILLED and (name == metric or detail in FILLS):
        return Objective(name, metric, fill=detail or "mean_image")
    raise ValueError(
        f"There is no objective {name!r}. Use one of the following. Without an addition: {', '.join(PLAIN)}. "
        f"At a threshold, as iou/0.3: {', '.join(AT_THRESHOLD)}. With an optional fill ({', '.join(FILLS)}), as "
        f"top20_removal/blur: {', '.join(FILLED)}. For the words: {', '.join(TEXT)}, without punctuation as "
        f"text_top20_removal/{WORDS}."
    )


def boxless_objectives() -> list[str]:
    """Names of the objectives that need no boxes."""
    return [name for name in (*PLAIN, *FILLED, *TEXT) if not find_objective(name).needs_boxes]


def _is_threshold(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
