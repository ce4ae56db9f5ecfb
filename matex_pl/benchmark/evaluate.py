"""The contribution of each pair to every metric of a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.benchmark.prepare import PreparedBatch
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.intervals import Detections, Sums, estimate
from matex_pl.evaluation.store import MapStore
from matex_pl.evaluation.tensors import read_head, read_tensors, write_tensors
from matex_pl.maps import Attribution
from matex_pl.metrics import functional as F
from matex_pl.metrics.removal import (
    RULES,
    confidence_values,
    dropped_tokens,
    image_score,
    kept_pixels,
    patch_curve,
    text_score,
)
from matex_pl.metrics.sanity import randomized
from matex_pl.report.results import Score

# The published form and the one that is no finding on a radiograph; insertion is published with a blurred image.
CONFIDENCE_FILLS = ("mean_color", "mean_image")
CURVES = (("insertion", "blur"), ("insertion", "mean_image"), ("deletion", "mean_color"), ("deletion", "mean_image"))


def image_values(
    clip: Clip, store: MapStore, pairs: Sequence[PreparedBatch], threshold: float, thorax: Tensor | None, steps: int
) -> Values:
    """All metrics of the image maps but the sanity check.

    Args:
        clip: The model.
        store: Holds the maps of the pairs, and of their images with other phrases.
        pairs: The pairs.
        threshold: Of the IoU and of the boxes.
        thorax: `(H, W)` bool, where lungs and heart usually are, if known.
        steps: Most steps of the insertion and deletion curves.
    """
    found, curves, detections = [], [], []
    for batch in progress(pairs, "scoring images"):
        maps = _on(store.read(batch.keys), clip)
        components = F.components(maps.image, threshold)
        detections.append(Detections.of(components, batch.batch["boxes"]))
        scored = _locate(maps.image, batch.batch, threshold, components) | _mass(maps.image, batch.batch, thorax)
        scored |= _confidence(clip, batch, maps.image) | _sensitivity(store, batch, maps)
        curves.append(_curves(clip, batch, maps.grid, steps))
        found.append(scored)
    values = Values(_joined_sums(found), threshold=threshold, detections=Detections.joined(detections))
    for name in curves[0]:
        shares, scores = curves[0][name][0], torch.cat([curve[name][1] for curve in curves], 1)
        values.curves[name] = shares, scores
        areas = F.curve_area(scores, *F.curve_ends(scores, name.partition("/")[0]), shares)
        values.sums[name] = Sums(*(part.double() for part in areas))
    return values


def _on(maps: Attribution, clip: Clip) -> Attribution:
    """The maps on the model's device."""
    fields = ("image", "grid", "text", "content", "score")
    return Attribution(*(getattr(maps, name).to(clip.std.device) for name in fields))


def _locate(maps: Tensor, batch: ImageTextBatch, threshold: float, components: F.Components) -> dict[str, Tensor]:
    boxes = [box.to(maps.device) for box in batch["boxes"]]
    masks = F.box_masks(boxes, (maps.shape[1], maps.shape[2])).to(maps.device)
    return {
        "pointing_game": F.pointing_game(maps, masks),
        "cnr": F.contrast_to_noise(maps, masks),
        "miou": F.mean_iou(maps, masks),
        "iou": F.iou(maps, masks, torch.tensor([threshold], device=maps.device))[:, 0],
        "acc50": F.box_accuracy(components, boxes, len(maps)),
        "energy_pointing_game": F.energy_pointing_game(maps, masks),
        "relevance_rank_accuracy": F.relevance_rank_accuracy(maps, masks),
    }


def _mass(maps: Tensor, batch: ImageTextBatch, thorax: Tensor | None) -> dict[str, Tensor]:
    mass = {"mean_map_mass": maps.flatten(1).mean(1)}
    if thorax is not None:
        return mass | {"outside_thorax_mass": F.outside_mass(maps, thorax[None].to(maps.device))}
    border = F.border_mask((maps.shape[1], maps.shape[2]), batch["content_box"].to(maps.device))
    return mass | {"border_mass": F.outside_mass(maps, ~border)}


def _confidence(clip: Clip, pairs: PreparedBatch, maps: Tensor) -> dict[str, Tensor]:
    """Scores when the map, or half of the pixels, are kept, and when the highest fifth is gone; with either fill."""
    images, _ = pairs.inputs(clip)
    keep = {rule: kept_pixels(maps, rule) for rule in RULES}
    scored: dict[str, Tensor] = {}
    for fill in CONFIDENCE_FILLS:
        left = {rule: image_score(clip, images, kept, fill, pairs.text) for rule, kept in keep.items()}
        scored |= {f"{name}/{fill}": values for name, values in confidence_values(pairs.score, left).items()}
    return scored


def _curves(clip: Clip, pairs: PreparedBatch, grid: Tensor, steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    images, _ = pairs.inputs(clip)
    return {
        f"{kind}/{fill}": patch_curve(
            clip, images, grid, fill, pairs.text, kind, steps=steps, ends=(pairs.blank[fill], pairs.score)
        )
        for kind, fill in CURVES
    }


def _sensitivity(store: MapStore, pairs: PreparedBatch, maps: Attribution) -> dict[str, Tensor]:
    """How much the map heeds the phrase: under another pair's, and with the sides exchanged."""
    grid = maps.grid
    other = store.read(pairs.other_keys).grid.to(grid)
    same = torch.tensor([phrase is None for phrase in pairs.other], device=grid.device)
    swapped = store.read(pairs.swapped_keys).image.to(grid)
    content_box = pairs.batch["content_box"].to(grid.device)
    return {
        "prompt_sensitivity": F.spearman(grid.flatten(1), other.flatten(1)).masked_fill(same, torch.nan),
        "side_sensitivity": F.side_sensitivity(maps.image, swapped, pairs.sides, content_box),
    }


def _joined_sums(found: Sequence[dict[str, Tensor]]) -> dict[str, Sums]:
    return {name: Sums.of(torch.cat([part[name] for part in found]).cpu()) for name in found[0]}


def text_values(clip: Clip, store: MapStore, pairs: Sequence[PreparedBatch]) -> Values:
    """All metrics of the text maps but the sanity check."""
    found = []
    for batch in pairs:
        maps = _on(store.read(batch.keys), clip)
        _, tokens = batch.inputs(clip)
        drop = {rule: dropped_tokens(maps.text, maps.content, rule) for rule in RULES}
        left = {rule: text_score(clip, tokens, dropped, batch.image) for rule, dropped in drop.items()}
        found.append(confidence_values(batch.score, left) | {"mean_map_mass": F.text_mass(maps.text, maps.content)})
    return Values(_joined_sums(found))


def chosen_threshold(store: MapStore, pairs: Sequence[PreparedBatch], size: tuple[int, int]) -> float:
    """The threshold with the highest mean IoU over pairs; the middle one where none of them has boxes."""
    thresholds = torch.tensor(F.THRESHOLDS)
    found = [
        F.iou(store.read(batch.keys).image, F.box_masks(batch.batch["boxes"], size), thresholds) for batch in pairs
    ]
    mean = torch.cat(found).nanmean(0) if found else torch.full_like(thresholds, torch.nan)
    return float(thresholds[len(thresholds) // 2] if mean.isnan().all() else thresholds[mean.argmax()])


def sanity_check(
    clip: Clip, method: AttributionMethod, store: MapStore, pairs: Sequence[PreparedBatch], seed: int, path: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Rank correlation of the maps under shuffled weights with those of the model, stage by stage.

    Args:
        clip: The model.
        method: What makes the maps.
        store: Holds the maps of the pairs under the weights of the model.
        pairs: The m pairs.
        seed: Of the shuffling.
        path: A file of these pairs, method and weights, where the stages are kept as they come. What it has is taken.

    Yields:
        Name of the stage, and of the m pairs `(m,)` over patches as `image` and over content tokens as `text`.
    """
    kept = {} if read_head(path) is None else read_tensors(path)[0]
    original = [_on(store.read(batch.keys), clip) for batch in pairs]
    for name, broken in progress(randomized(clip, seed), "randomizing"):
        if f"{name}/image" not in kept:
            for modality, correlation in _correlations(broken, method, pairs, original).items():
                kept[f"{name}/{modality}"] = correlation
            write_tensors(path, kept, {})
        yield name, {modality: kept[f"{name}/{modality}"] for modality in ("image", "text")}


def _correlations(
    clip: Clip, method: AttributionMethod, pairs: Sequence[PreparedBatch], original: Sequence[Attribution]
) -> dict[str, Tensor]:
    """Rank correlation of the model's maps of each batch with the original ones, `(m,)` by modality, on the CPU."""
    image, text = [], []
    for batch, before in zip(pairs, original, strict=True):
        images, tokens = batch.inputs(clip)
        content_box = batch.batch["content_box"].to(images.device)
        after = method.attribute(clip, images, tokens, batch.batch["phrase"], content_box)
        image.append(F.spearman(after.grid.flatten(1), before.grid.flatten(1)))
        text.append(F.spearman(after.text, before.text, before.content))
    return {"image": torch.cat(image).cpu(), "text": torch.cat(text).cpu()}


@dataclass
class Values:
    """The contributions of the n pairs to the metrics of one modality of a method.

    Args:
        sums: By metric.
        curves: By name as `insertion/blur`: shares `(S + 1,)` and scores `(S + 1, n)`.
        threshold: Of the IoU, chosen on validation.
        detections: For the average precision; None for text maps.
        stages: Names of the stages of the weight randomization.
        correlation: `(stages, m)` of the maps of each stage with the original ones, over the first m pairs.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    curves: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    threshold: float | None = None
    detections: Detections | None = None
    stages: list[str] = field(default_factory=list)
    correlation: Tensor | None = None

    def add_sanity(self, stages: Sequence[tuple[str, Tensor]], number: int) -> None:
        """Add the curve of the sanity check, and its mean over the stages as a metric of the pairs that took part.

        Args:
            stages: Name and rank correlations `(m,)` of each stage.
            number: Number n of pairs.
        """
        self.stages = [name for name, _ in stages]
        self.correlation = torch.stack([found for _, found in stages])
        mean = torch.full((number,), torch.nan)
        mean[: self.correlation.shape[1]] = self.correlation.nanmean(0)
        self.sums["sanity"] = Sums.of(mean)

    def scores(self, pairs: Tensor, drawn: Tensor) -> dict[str, Score]:
        """Every metric with its interval, by name.

        Args:
            pairs: `(n,)` bool, the pairs that count.
            drawn: `(R, n)` of `draw_patients`.
        """
        found: dict[str, Sums | Detections] = {name: sums.among(pairs) for name, sums in self.sums.items()}
        if self.detections is not None:
            found["ap50"] = self.detections.among(pairs)
        scores = {
            name: Score.model_validate(estimate(part.score()[0], part.score(drawn), part.count))
            for name, part in found.items()
        }
        empty = [name for name in self.curves if not self.sums[name].among(pairs).spans(drawn)]
        return scores | {name: Score(n=0) for name in empty}

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and the rest as plain types."""
        tensors = {f"sums/{name}": torch.stack([sums.above, sums.below]) for name, sums in self.sums.items()}
        for name, (shares, scores) in self.curves.items():
            tensors[f"curves/{name}"] = torch.cat([shares[:, None], scores], 1)
        if self.detections is not None:
            tensors |= {f"detections/{name}": column for name, column in vars(self.detections).items()}
        if self.correlation is not None:
            tensors["correlation"] = self.correlation
        return tensors, {"threshold": self.threshold, "stages": self.stages}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Values:
        """The values of which `packed` gave the tensors and the rest."""
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in tensors.items():
            kind, _, name = path.partition("/")
            parts[kind][name] = tensor
        return cls(
            sums={name: Sums(*sides) for name, sides in parts["sums"].items()},
            curves={name: (curve[:, 0], curve[:, 1:]) for name, curve in parts["curves"].items()},
            threshold=about["threshold"],
            detections=Detections(**parts["detections"]) if parts["detections"] else None,
            stages=about["stages"],
            correlation=tensors.get("correlation"),
        )
