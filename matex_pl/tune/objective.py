"""What the settings of MATEX are chosen by: metrics of the benchmark, of finished maps and on a raster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl.attribution import Matex
from matex_pl.attribution.base import progress
from matex_pl.attribution.fill import FILLS
from matex_pl.benchmark.evaluate import KEPT, REMOVED
from matex_pl.clip import Clip
from matex_pl.data.record import StudyBatch
from matex_pl.maps import AttributionMaps, full_precision
from matex_pl.metrics import (
    BoxAccuracy,
    ConfidenceDrop,
    ConfidenceIncrease,
    ContrastToNoise,
    DeletionAUC,
    EnergyInBox,
    InsertionAUC,
    MeanIoU,
    OutsideMass,
    PointingGame,
    RankAccuracy,
    RemovalDrop,
    ThresholdedIoU,
)
from matex_pl.metrics import functional as F
from matex_pl.metrics.removal import image_score, patch_curve, text_score


@dataclass(frozen=True)
class Pairs:
    """A batch of B pairs, and what any setting of MATEX is fused from.

    Args:
        batch: As the loader gave it.
        parts: Of `Matex.attribute`, of all blocks that a setting may ask for.
        tokens: `(B, T)`.
        image: `(B, D)` embeddings, where the objective asks the model.
        text: `(B, D)` embeddings, likewise.
    """

    batch: StudyBatch
    parts: dict[str, Any]
    tokens: Tensor
    image: Tensor | None = None
    text: Tensor | None = None


def gather_pairs(clip: Clip, method: Matex, batches: Sequence[StudyBatch], *, embed: bool) -> tuple[list[Pairs], float]:
    """The components of all pairs, and the seconds that `attribute` took for them."""
    pairs, seconds = [], 0.0
    for batch in progress(batches, "components"):
        images, tokens = clip.normalise(batch["image"].to(clip.std.device)), clip.tokenize(batch["phrase"])
        start = time.perf_counter()
        parts = method.attribute(clip, images, tokens, batch["phrase"], batch["film"].to(images.device)).parts
        seconds += time.perf_counter() - start
        # Maps of pixels, which every setting draws anew.
        parts = {name: part for name, part in parts.items() if name != "prior"}
        with torch.no_grad():
            encoded = (clip.encode_image(images), clip.encode_text(tokens)) if embed else ()
        pairs.append(Pairs(batch, parts, tokens, *map(full_precision, encoded)))
    return pairs, seconds


@dataclass(frozen=True)
class Objective:
    """What the settings are chosen by: the mean over studies of a metric of the benchmark.

    Args:
        name: As the user writes it.
        metric: Its class, which knows the direction.
        value: Of a model, pairs and their finished maps, the value of each study `(B,)`; NaN does not count.
        coarse: The same on a raster: fused maps `(B, S, P)`, in any scale, of S settings and P cells, and which cells
            lie in boxes `(B, P)` bool, to `(B, S)`. None where each setting is scored on all pixels.
        peaks: Only the maximum of a map counts.
        side: `image` or `text`: whose map is scored.
        fill: What stands in for pixels that are taken away, if any are.
        boxed: Only studies with boxes count.
        forwards: Of the model, per pair and setting.
    """

    name: str
    metric: type[Metric]
    value: Callable[[Clip, Pairs, AttributionMaps], Tensor]
    coarse: Callable[[Tensor, Tensor], Tensor] | None = None
    peaks: bool = False
    side: str = "image"
    fill: str = ""
    boxed: bool = False
    forwards: int = 0

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1."""
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
    common = (fused > ordered.gather(2, place)).float() @ inside.float()[..., None]
    return common[..., 0] / size[:, None]


Located = Callable[[Tensor, Tensor], Tensor]
LOCATED: dict[str, tuple[type[Metric], Located, Located]] = {
    "pointing_game": (PointingGame, F.pointing_game, _hits),
    "cnr": (ContrastToNoise, F.contrast_to_noise, _contrast),
    "miou": (MeanIoU, F.mean_iou, _overlap),
    "energy_in_box": (EnergyInBox, F.energy_in_box, _energy),
    "rank_accuracy": (RankAccuracy, F.rank_accuracy, _ranked),
}
AT_THRESHOLD: dict[str, type[Metric]] = {"iou": ThresholdedIoU, "acc50": BoxAccuracy}
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
        return Objective(name, AT_THRESHOLD[kind], partial(_at_threshold, kind, float(fill)), boxed=True)
    if name == "border_mass":
        return Objective(name, OutsideMass, _border_mass)
    known = name in (kind, *(f"{kind}/{known}" for known in FILLS))
    fill = fill or "mean_film"
    if kind in CONFIDENCE and known:
        return Objective(name, CONFIDENCE[kind], partial(_image_confidence, kind, fill), fill=fill, forwards=1)
    if kind in CURVES and known:
        return Objective(name, CURVES[kind], partial(_curve_gain, kind, fill), fill=fill, forwards=STEPS + 1)
    if name.startswith("text_") and words in CONFIDENCE:
        return Objective(name, CONFIDENCE[words], partial(_text_confidence, words), side="text", forwards=1)
    raise ValueError(
        f"No objective {name!r}. Take one of {', '.join(LOCATED)}, border_mass; one of {', '.join(AT_THRESHOLD)} at a "
        f"threshold, as iou/0.3; one of {', '.join([*CONFIDENCE, *CURVES])}, which may name a fill, as remove/blur "
        f"({', '.join(FILLS)}); or, for the words, one of {', '.join(CONFIDENCE)} after text_."
    )


def is_share(text: str) -> bool:
    """The text is a number in [0, 1)."""
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _at_threshold(kind: str, threshold: float, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    """IoU, or Acc@0.5, at one threshold."""
    if kind == "acc50":
        boxes = [box.to(maps.image.device) for box in pairs.batch["boxes"]]
        return F.box_accuracy(F.components(maps.image, threshold), boxes, len(boxes))
    return _located(lambda image, inside: F.iou(image, inside, torch.tensor([threshold]))[:, 0], clip, pairs, maps)


def _border_mass(clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    film = pairs.batch["film"].to(maps.image.device)
    return F.outside_mass(maps.image, ~F.border_mask((maps.image.shape[1], maps.image.shape[2]), film))


def _curve_gain(kind: str, fill: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    """What a study adds above the line of the AUC; what is below it, S_full - S_blank, no setting changes."""
    images = clip.normalise(pairs.batch["image"].to(clip.std.device))
    assert pairs.text is not None
    shares, scores = patch_curve(clip, images, maps.grid, fill, pairs.text, kind, steps=STEPS)
    blank, full = (scores[0], scores[-1]) if kind == "insertion" else (scores[-1], scores[0])
    return F.curve_area(scores, blank, full, shares)[0]


def _located(metric: Located, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    size = (maps.image.shape[1], maps.image.shape[2])
    return metric(maps.image, F.box_masks(pairs.batch["boxes"], size).to(maps.image.device))


def _image_confidence(kind: str, fill: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    flat = maps.image.flatten(1)
    keep: Tensor = maps.image
    if kind.startswith("fixed"):
        keep = F.top_share(flat, KEPT).view_as(keep)
    elif kind == "remove":
        keep = ~F.top_share(flat, REMOVED).view_as(keep)
    images = clip.normalise(pairs.batch["image"].to(clip.std.device))
    assert pairs.text is not None
    return _change(kind, pairs, image_score(clip, images, keep, fill, pairs.text))


def _text_confidence(kind: str, clip: Clip, pairs: Pairs, maps: AttributionMaps) -> Tensor:
    if kind.startswith("fixed"):
        drop = maps.content & ~F.top_share(maps.text, KEPT, maps.content)
    elif kind == "remove":
        drop = F.top_share(maps.text, REMOVED, maps.content, at_least=1)
    else:
        drop = F.keep_relevant_tokens(pairs.tokens, maps.text, maps.content, clip.pad_id) != pairs.tokens
    assert pairs.image is not None
    return _change(kind, pairs, text_score(clip, pairs.tokens, drop, pairs.image))


def _change(kind: str, pairs: Pairs, changed: Tensor) -> Tensor:
    assert pairs.image is not None
    assert pairs.text is not None
    score = (pairs.image * pairs.text).sum(1)
    return F.confidence_increase(score, changed) if kind.endswith("increase") else F.confidence_drop(score, changed)


def score_setting(clip: Clip, pairs: Sequence[Pairs], method: Matex, objective: Objective) -> Tensor:
    """The value of each study under a method, by `Matex.fuse` at the model's size, `(n,)` float64."""
    with torch.no_grad():
        maps = ((batch, type(method).fuse(batch.parts, **method.settings)) for batch in pairs)
        return torch.cat([objective.value(clip, batch, found) for batch, found in maps]).cpu().double()
