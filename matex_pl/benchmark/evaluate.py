"""Contribution of each pair to every metric of a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.benchmark.prepare import PreparedBatch
from matex_pl.clip.model import Clip
from matex_pl.clip.words import with_words
from matex_pl.console import progress
from matex_pl.data.chest import LUNGS
from matex_pl.evaluation.columns import AVERAGED, FINDINGS
from matex_pl.evaluation.intervals import Detections, FindingMean, Sums, estimate
from matex_pl.evaluation.pairs import model_inputs
from matex_pl.evaluation.store import MapStore
from matex_pl.evaluation.tensors import read_head, read_tensors, write_tensors
from matex_pl.evaluation.values import IN_BOXES, map_correlation
from matex_pl.maps import Attribution, Content
from matex_pl.metrics import functional as F
from matex_pl.metrics.removal import (
    RULES,
    confidence_values,
    dropped_tokens,
    image_score,
    kept_pixels,
    patch_curve,
    text_scores,
)
from matex_pl.metrics.sanity import randomized
from matex_pl.report.results import Score

# The published fills (blur for insertion), and the mean image, which does not look like a finding on a radiograph.
CONFIDENCE_FILLS = ("mean_color", "mean_image")
# Suffix of the metrics of text, and the tokens that they count.
CONTENTS: dict[str, Content] = {"": "tokens", "/words": "words"}
_SIDES = ("image", "text", "text/words")
CURVES = (("insertion", "blur"), ("insertion", "mean_image"), ("deletion", "mean_color"), ("deletion", "mean_image"))


def image_values(
    clip: Clip, store: MapStore, pairs: Sequence[PreparedBatch], threshold: float, thorax: Tensor | None, steps: int
) -> Values:
    """All metrics of the image maps except the sanity check.

    Args:
        clip: CLIP model.
        store: Maps of the pairs, and of their images with other phrases.
        pairs: Batches of pairs.
        threshold: Threshold for the IoU and the components.
        thorax: `(H, W)` bool, usual place of lungs and heart; None if unknown.
        steps: Maximum number of steps of the insertion and deletion curves.
    """
    structures = list(dict.fromkeys(name for batch in pairs for name in batch.batch["masks"]))
    scored, detections = [], []
    curves: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for batch in progress(pairs, "scoring images"):
        maps, (images, _) = _read_maps(store, batch, clip), model_inputs(clip, batch.batch)
        components = F.components(maps.image, threshold)
        detections.append(Detections.of(components, batch.batch["boxes"], batch.score))
        values = _map_values(store, batch, maps, components, threshold, thorax)
        values |= _anatomy_values(store, batch, maps.image, structures, thorax)
        keep = {rule: kept_pixels(maps.image, rule) for rule in RULES}
        for fill in CONFIDENCE_FILLS:
            left = {rule: image_score(clip, images, kept, fill, batch.text) for rule, kept in keep.items()}
            values |= {f"{name}/{fill}": value for name, value in confidence_values(batch.score, left).items()}
        scored.append(values)
        for kind, fill in CURVES:
            ends = batch.blank[fill], batch.score
            curve = patch_curve(clip, images, maps.grid, fill, batch.text, kind, steps=steps, ends=ends)
            curves[f"{kind}/{fill}"].append(curve)
    fields = vars(Detections.joined(detections))
    result = Values({f"detections/{name}": column for name, column in fields.items()}, threshold)
    result.add_sums(_joined_sums(scored))
    for name, parts in curves.items():
        shares, scores = parts[0][0], torch.cat([scores for _, scores in parts], 1)
        result.tensors[f"curves/{name}"] = torch.cat([shares[:, None], scores], 1)
        areas = F.curve_area(scores, *F.curve_ends(scores, name.partition("/")[0]), shares)
        result.add_sums({name: Sums(*(area.cpu().double() for area in areas))})
    return result


def _map_values(
    store: MapStore,
    batch: PreparedBatch,
    maps: Attribution,
    components: F.Components,
    threshold: float,
    thorax: Tensor | None,
) -> dict[str, Tensor]:
    """Metrics from boxes, from the frame, and from the maps under other phrases; `(B,)` each."""
    image, grid = maps.image, maps.grid
    boxes = [box.to(image.device) for box in batch.batch["boxes"]]
    masks, content_box = F.masks_of(image, boxes), batch.batch["content_box"].to(image.device)
    values = {name: metric(image, masks) for name, metric in IN_BOXES.items()}
    values["iou"] = F.iou(image, masks, (threshold,))[:, 0]
    values["acc50"] = F.map_accuracy(image, components, boxes)
    values["mean_map_mass"] = image.flatten(1).mean(1)
    if thorax is None:
        border = F.border_mask((image.shape[1], image.shape[2]), content_box)
        values["border_mass"] = F.outside_mass(image, ~border)
    other = store.read_units(batch.other_keys)["grid"].to(grid)
    same = torch.tensor([phrase is None for phrase in batch.other], device=grid.device)
    values["prompt_sensitivity"] = F.spearman(grid.flatten(1), other.flatten(1)).masked_fill(same, torch.nan)
    swapped = store.read(batch.swapped_keys).image.to(image)
    values["side_sensitivity"] = F.side_sensitivity(image, swapped, batch.sides, content_box)
    if maps.interactions is not None:
        values["word_laterality"] = F.word_laterality(maps.word_maps, maps.words, batch.batch["phrase"], content_box)
    return values


def _anatomy_values(
    store: MapStore, batch: PreparedBatch, image: Tensor, structures: Sequence[str], thorax: Tensor | None
) -> dict[str, Tensor]:
    """Shares of the maps `(B, H, W)` in the structures of any image, under the true and the shuffled phrases."""
    absent = torch.zeros_like(image, dtype=torch.bool)
    masks = {name: batch.batch["masks"].get(name, absent).to(image.device) for name in structures}
    values = F.anatomy_shares(image, masks, batch.batch["content_box"].to(image.device))
    if thorax is not None or set(LUNGS) <= masks.keys():
        values["outside_thorax_mass"] = F.outside_mass(image, F.thorax_zone(masks, image, thorax))
    if structures:
        shuffled = store.read(batch.shuffled_keys).image.to(image)
        same = torch.tensor([phrase is None for phrase in batch.shuffled], device=image.device)
        for name in structures:
            mass = F.mass_share(shuffled, masks[name]).masked_fill(same, torch.nan)
            values |= {f"shuffled_mass/{name}": mass, f"mass_gain/{name}": values[f"mass/{name}"] - mass}
    return values


def text_values(clip: Clip, store: MapStore, pairs: Sequence[PreparedBatch]) -> Values:
    """All metrics of the text maps except the sanity check, over content tokens and over those of words."""
    scored = []
    for batch in pairs:
        maps, (_, tokens) = _read_maps(store, batch, clip), model_inputs(clip, batch.batch)
        masks = {suffix: maps.content_mask(content) for suffix, content in CONTENTS.items()}
        drops = [dropped_tokens(maps.text, mask, rule) for mask in masks.values() for rule in RULES]
        left = text_scores(clip, tokens, torch.stack(drops), batch.image).unflatten(0, (len(masks), len(RULES)))
        columns: dict[str, Tensor] = {}
        for (suffix, mask), scores in zip(masks.items(), left, strict=True):
            found = confidence_values(batch.score, dict(zip(RULES, scores, strict=True)))
            found["mean_map_mass"] = F.text_mass(maps.text, mask)
            columns |= {name + suffix: value for name, value in found.items()}
        scored.append(columns)
    values = Values()
    values.add_sums(_joined_sums(scored))
    return values


def _read_maps(store: MapStore, batch: PreparedBatch, clip: Clip) -> Attribution:
    """Maps of the pairs, on the model's device."""
    maps = store.read(batch.keys)
    held: dict[str, Any] = {
        name: part.to(clip.std.device) for name, part in vars(maps).items() if isinstance(part, Tensor)
    }
    return with_words(replace(maps, **held), clip, clip.tokenize(batch.batch["phrase"]), batch.batch["phrase"])


def _joined_sums(batches: Sequence[dict[str, Tensor]]) -> dict[str, Sums]:
    return {name: Sums.of(torch.cat([values[name] for values in batches]).cpu()) for name in batches[0]}


def chosen_threshold(store: MapStore, pairs: Sequence[PreparedBatch], size: tuple[int, int]) -> float:
    """Threshold with the highest mean IoU over pairs; the middle threshold if no pair has boxes."""
    thresholds = torch.tensor(F.THRESHOLDS)
    values = [
        F.iou(store.read(batch.keys).image, F.box_masks(batch.batch["boxes"], size), thresholds) for batch in pairs
    ]
    mean = torch.cat(values).nanmean(0) if values else torch.full_like(thresholds, torch.nan)
    return float(thresholds[len(thresholds) // 2] if mean.isnan().all() else thresholds[mean.argmax()])


def sanity_check(
    clip: Clip, method: AttributionMethod, store: MapStore, pairs: Sequence[PreparedBatch], seed: int, path: Path
) -> dict[str, dict[str, Tensor]]:
    """Rank correlation of the maps under shuffled weights with the maps of the model.

    Args:
        clip: CLIP model.
        method: Attribution method of the maps.
        store: Maps of the pairs under the weights of the model.
        pairs: Batches with the m pairs.
        seed: Random seed of the shuffling.
        path: Cache file for these pairs, method and weights; each stage is added to it, and cached stages are skipped.

    Returns:
        Correlations `(m,)` by stage, by `image` (over patches), `text` (over content tokens) and `text/words` (over
        those of words).
    """
    kept = {} if read_head(path) is None else read_tensors(path)[0]
    original = [_read_maps(store, batch, clip) for batch in pairs]
    stages = []
    for name, shuffled in progress(randomized(clip, seed), "randomizing"):
        stages.append(name)
        if f"{name}/image" in kept:
            continue
        maps = []
        for batch in pairs:
            images, tokens = model_inputs(shuffled, batch.batch)
            boxes = (batch.batch[place].to(images.device) for place in ("content_box", "chest_box"))
            maps.append(method.attribute(shuffled, images, tokens, batch.batch["phrase"], *boxes))
        for side in _SIDES:
            modality, _, content = side.partition("/")
            read = partial(map_correlation, side=modality, content=cast(Content, content or "tokens"))
            kept[f"{name}/{side}"] = torch.cat(list(map(read, maps, original))).cpu()
        write_tensors(path, kept, {})
    return {side: {name: kept[f"{name}/{side}"] for name in stages} for side in _SIDES}


@dataclass
class Values:
    """Contributions of the n pairs to the metrics of one modality of a method, as stored in its file.

    Args:
        tensors: `sums/METRIC` `(2, n)`, numerator and denominator; `curves/METRIC/FILL` `(S + 1, 1 + n)`, shares and
            scores; the fields of `Detections` as `detections/FIELD`; and `correlation` `(stages, m)`, the sanity check
            of the first m pairs.
        threshold: Threshold of the IoU, chosen on validation pairs.
        stages: Names of the stages of the sanity check.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    threshold: float | None = None
    stages: list[str] = field(default_factory=list)

    @property
    def sums(self) -> dict[str, Sums]:
        """Sums by metric, without the average precision."""
        return {name: Sums(*sums) for name, sums in tensors_below(self.tensors, "sums").items()}

    @property
    def curves(self) -> dict[str, Tensor]:
        """Shares and scores `(S + 1, 1 + n)` by name, for example `insertion/blur`."""
        return tensors_below(self.tensors, "curves")

    @property
    def detections(self) -> Detections | None:
        """Detections of the average precision; None for text maps."""
        fields = tensors_below(self.tensors, "detections")
        return Detections(**fields) if fields else None

    def add_sums(self, sums: Mapping[str, Sums]) -> None:
        """Add sums by metric."""
        self.tensors |= {f"sums/{name}": torch.stack([part.above, part.below]) for name, part in sums.items()}

    def add_sanity(self, stages: Mapping[str, Tensor], number: int, suffix: str = "") -> None:
        """Add the curve of the sanity check, and its mean over the stages as a metric of the checked pairs.

        Args:
            stages: Rank correlations `(m,)` by stage.
            number: Number n of pairs.
            suffix: Suffix of the metric, one of `CONTENTS`; the curve is that without a suffix.
        """
        correlation = torch.stack(list(stages.values()))
        if not suffix:
            self.stages = list(stages)
            self.tensors["correlation"] = correlation
        mean = torch.full((number,), torch.nan)
        mean[: correlation.shape[1]] = correlation.nanmean(0)
        self.add_sums({f"sanity{suffix}": Sums.of(mean)})

    def scores(self, pairs: Tensor, drawn: Tensor) -> dict[str, Score]:
        """Every metric with its interval, by name.

        Args:
            pairs: `(n,)` bool mask of the pairs that count.
            drawn: `(R, n)` of `draw_patients`.
        """
        scores, curves = {}, self.curves
        for name, sums in self.sums.items():
            part = sums.among(pairs)
            scores[name] = estimate(part, drawn) if name not in curves or part.spans(drawn) else Score(n=0)
        if self.detections is not None:
            scores["ap50"] = estimate(self.detections.among(pairs), drawn)
        return scores

    def finding_means(self, findings: Sequence[str], drawn: Tensor) -> dict[str, Score]:
        """Means over findings of the scores from boxes, with their intervals, by the name of the mean.

        Args:
            findings: Finding of each of the n pairs; empty if unknown. Without any there are no means.
            drawn: `(R, n)` of `draw_patients`.
        """
        averaged: dict[str, Sums | Detections] = {n: sums for n, sums in self.sums.items() if n in AVERAGED}
        if self.detections is not None:
            averaged["ap50"] = self.detections
        if not any(findings):
            return {}
        return {name + FINDINGS: estimate(FindingMean.of(sums, findings), drawn) for name, sums in averaged.items()}


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with `PREFIX/`, by the rest of the name."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
