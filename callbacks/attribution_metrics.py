"""Attribution quality as scalars next to the loss."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MinMetric

from matex_pl.anatomy import named_side
from matex_pl.arguments import argument_names, check_choices, nearest
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.core.fill import Fill, check_fill
from matex_pl.attribution.several import attribute_methods
from matex_pl.attribution.shipped import load_method
from matex_pl.callbacks.reader import Reader
from matex_pl.callbacks.scalars import describe_scalars
from matex_pl.clip.model import Clip
from matex_pl.clip.words import with_words
from matex_pl.data.chest import LUNGS
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.pairs import embed_pairs, other_phrases, swapped_phrases
from matex_pl.maps import Attribution, Content
from matex_pl.metrics import (
    ConfidenceDrop,
    ConfidenceIncrease,
    ContrastToNoise,
    MapMass,
    OutsideMass,
    PointingGame,
    RankCorrelation,
    SideSensitivity,
    WordLaterality,
)
from matex_pl.metrics.functional import border_mask, mass_shares, thorax_zone
from matex_pl.metrics.removal import dropped_tokens, image_score, text_score

log = logging.getLogger(__name__)

_OF_BOXES = ("pointing_game", "cnr")

MethodChoice = AttributionMethod | str | dict[str, Any]
"""A method, the name of a shipped one or a YAML file, or changed settings of the first method."""


class AttributionMetrics(Callback):
    """Log the quality of the maps of some methods, over the first batches of validation and test.

    The scalars begin with `attribution/`, or with `attribution_<name>/` for a method with a name. They are

    - `pointing_game` and `cnr`, over pairs with boxes
    - `confidence_drop` and `confidence_increase`
    - `mean_map_mass`
    - `text_confidence_drop` and `text_confidence_increase`, for methods that support text
    - `word_laterality`, the share of the map of a word of side ("left") on that side, for methods with interactions
    - `consistency_mean` and `consistency_min` over patches and pairs, for MATEX (if C is near 1 everywhere, it has no
      effect)
    - `mass/<structure>`, the share of the maps' mass in each structure that images have masks of, and `part/<name>`,
      the shares of a partition into left lung, right lung, the heart outside of the lungs, and the rest
    - `outside_thorax_mass`, the share of the maps' mass outside lungs and heart, by the masks of the image, or else by
      the `thorax()` of the data module
    - `border_mass`, the share in the outer tenth of the image, if the data module has no `thorax()`

    `ModelCheckpoint(monitor="attribution/pointing_game")` works. The mass outside rises if a model reads something
    outside the patient. A prior draws the map to the named region and hides this: log a method without a prior.

    The methods share the embeddings of the pairs, and several settings of MATEX share one forward and one backward. In
    TensorBoard, the tab CUSTOM SCALARS has a chart per scalar with all methods, and the tab TEXT explains the scalars.

    Args:
        methods: Methods by name, the main method first, under the empty name. Each is an attribution method, the name
            of a shipped one (`m2ib`), a YAML file, or changed settings of the first method, as `{lambda_s: 1.0}`.
            A single method gets the empty name. `Matex.recommended()` by default.
        num_batches: Number of explained batches per validation (or test), in each process; -1 for all.
        fill: Replacement of removed pixels: `mean_image`, `mean_color` (as published) or `blur`. By default
            `mean_image`, and `mean_color` for a model without a mean of the training images.
        per_finding: Whether to log the pointing game, the mass outside and the prompt sensitivity of each finding too,
            as `pointing_game/<finding>`.
        sensitivity: Whether to log how maps follow the phrase, which takes two to three times as long.
            `prompt_sensitivity` is the rank correlation, over patches, of the maps under the true phrase and under that
            of another pair of the batch (see `other_phrases`); lower is better. `side_sensitivity` is the share of mass
            that moves to the other side of the patient when the phrase names that side, over phrases with a
            `named_side`; higher is better.
        reader: Where the model is in the LightningModule, and images and phrases in its batches; by default as in
            `ClipModule` and the data modules of this package. Batches without boxes have no `pointing_game` and `cnr`.
        content: Tokens that `text_confidence_drop` and `text_confidence_increase` rank: all content `tokens`, as in the
            paper, or those of `words`, without punctuation.

    Raises:
        ValueError: A method is unknown, a name has other characters than letters, digits, `_`, `.` and `-`, or
            `num_batches` is 0.
    """

    def __init__(
        self,
        methods: AttributionMethod | str | dict[str, MethodChoice] | None = None,
        num_batches: int = 2,
        fill: Fill | None = None,
        per_finding: bool = False,
        sensitivity: bool = False,
        reader: Reader | None = None,
        content: Content = "tokens",
    ) -> None:
        check_choices(AttributionMetrics.__init__, locals())
        if num_batches < -1 or num_batches == 0:
            raise ValueError(
                f"num_batches must be positive, or -1 for all batches, got {num_batches}. To log no scalars, leave "
                "AttributionMetrics out."
            )
        self.methods = _named_methods(methods)
        self.num_batches = num_batches
        self.fill = fill
        self.per_finding = per_finding
        self.sensitivity = sensitivity
        self.content = content
        self.reader = reader or Reader()
        self.thorax: Tensor | None = None
        self.metrics: dict[str, Metric] = {}
        self._kept: dict[str, Metric] = {}
        self._warned: set[str] = set()
        self._is_described = False
        self._fill: Fill = "mean_image"
        self._is_boxed = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the names and the model, and read the thorax from the data module."""
        self.reader.check(trainer, pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            taken = self.methods.keys() & other.methods.keys() if isinstance(other, AttributionMetrics) else set()
            if taken and other is not self:
                raise ValueError(
                    f"Two AttributionMetrics log under the name {min(taken)!r}. Give both methods to one of them, with "
                    "different names."
                )
        self._is_described = False
        data = getattr(trainer, "datamodule", None)
        self.thorax = data.thorax() if isinstance(data, ChestXrayDataModule) else None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check the model and the fill; the model has its mean image at this point.

        Raises:
            NotImplementedError: The method does not support a tower of the model.
        """
        clip = self.reader.clip_of(pl_module)
        for method in self.methods.values():
            method.check_model(clip)
        if self.fill:
            check_fill(self.fill, clip)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a batch of the validation, unless the sanity check did."""
        self.reader.check_loader(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the metrics, because Lightning does not reset those of a callback."""
        self._fill = self._chosen_fill(self.reader.clip_of(pl_module))
        self._is_boxed = True
        self.metrics = {}
        for metric in self._kept.values():
            metric.reset()
        kinds: dict[str, type[Metric]] = {
            "pointing_game": PointingGame,
            "cnr": ContrastToNoise,
            "mean_map_mass": MapMass,
            self._outside: OutsideMass,
            "confidence_drop": ConfidenceDrop,
            "confidence_increase": ConfidenceIncrease,
        }
        if self.sensitivity:
            kinds |= {"prompt_sensitivity": RankCorrelation, "side_sensitivity": SideSensitivity}
        texts = {"text_confidence_drop": ConfidenceDrop, "text_confidence_increase": ConfidenceIncrease}
        # Created on every process, for all findings: `compute` waits for all processes.
        kinds |= {
            f"{name}/{finding}": kinds[name]
            for finding in getattr(pl_module, "findings", ())
            for name in self._of_findings
            if name in kinds
        }
        for method, explained in self.methods.items():
            for name, kind in (kinds | texts if explained.supports_text else kinds).items():
                self._metric(f"{_prefix(method)}/{name}", kind, pl_module.device)

    def _chosen_fill(self, clip: Clip) -> Fill:
        """The given fill, or else the mean image if the model has it."""
        if self.fill:
            check_fill(self.fill, clip)
            return self.fill
        if not clip.mean_image.isnan().any():
            return "mean_image"
        if not self._is_described:
            log.info("The model has no mean of the training images. AttributionMetrics fills with the mean color.")
        return "mean_color"

    @property
    def _outside(self) -> str:
        return "border_mass" if self.thorax is None else "outside_thorax_mass"

    @property
    def _of_findings(self) -> tuple[str, ...]:
        """Names of the scalars that are logged per finding too."""
        outside = ("border_mass", "outside_thorax_mass")
        return ("pointing_game", *outside, "prompt_sensitivity") if self.per_finding else ()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the maps of the first batches."""
        if trainer.sanity_checking or 0 <= self.num_batches <= batch_idx:
            return
        clip = self.reader.clip_of(pl_module)
        self._is_boxed &= self.reader.has_boxes(batch)
        batch = self.reader.read(trainer, pl_module, batch, batch_idx, dataloader_idx)
        images, tokens = clip.inputs(batch)
        boxes = batch["content_box"], batch["chest_box"]
        maps = attribute_methods(self.methods, clip, images, tokens, batch["phrase"], *boxes)
        # The embeddings of the validation step would differ under autocast.
        known = [found.parts["embeddings"] for found in maps.values() if "embeddings" in found.parts]
        image, text = known[0] if known else embed_pairs(clip, images, tokens)
        score = (image * text).sum(-1)
        for method, found in maps.items():
            prefix = _prefix(method)
            self._localize(prefix, found, batch)
            kept = {"confidence": image_score(clip, images, found.image, self._fill, text)}
            if self.methods[method].supports_text:
                worded = with_words(found, clip, tokens, batch["phrase"])
                drop = dropped_tokens(found.text, worded.content_mask(self.content), "map")
                kept["text_confidence"] = text_score(clip, tokens, drop, image)
            if found.interactions is not None:
                worded = with_words(found, clip, tokens, batch["phrase"])
                laterality = self._metric(f"{prefix}/word_laterality", WordLaterality)
                given = worded.word_maps, worded.words, batch["phrase"], batch["content_box"]
                laterality.update(*given, ids=batch["id"])
            for name, kept_score in kept.items():
                for change in ("drop", "increase"):
                    self.metrics[f"{prefix}/{name}_{change}"].update(score, kept_score, ids=batch["id"])
        if self.sensitivity:
            self._change_phrases(clip, images, maps, batch)

    def _localize(self, prefix: str, maps: Attribution, batch: ImageTextBatch) -> None:
        """Score where the maps of one method lie."""
        rows = list(range(len(maps.image)))
        self._add(prefix, "pointing_game", batch, rows, maps.image, batch["boxes"])
        self._add(prefix, "cnr", batch, rows, maps.image, batch["boxes"])
        self._add(prefix, "mean_map_mass", batch, rows, maps.image)
        if self.thorax is None:
            inside = ~border_mask((maps.image.shape[1], maps.image.shape[2]), batch["content_box"])
            self._add(prefix, "border_mass", batch, rows, maps.image, inside)
        if self.thorax is not None or set(LUNGS) <= batch["masks"].keys():
            zone = thorax_zone(batch["masks"], maps.image, self.thorax)
            self._metric(f"{prefix}/outside_thorax_mass", OutsideMass)
            self._add(prefix, "outside_thorax_mass", batch, rows, maps.image, zone)
        for name, share in mass_shares(maps.image, batch["masks"]).items():
            self._metric(f"{prefix}/{name}", MapMass).update(share[:, None], ids=batch["id"])
        if "consistency" in maps.parts:
            # `MapMass` is the mean over patches.
            self._metric(f"{prefix}/consistency_mean", MapMass).update(maps.parts["consistency"], ids=batch["id"])
            self._metric(f"{prefix}/consistency_min", MinMetric).update(maps.parts["consistency"])

    def _change_phrases(
        self, clip: Clip, images: Tensor, maps: Mapping[str, Attribution], batch: ImageTextBatch
    ) -> None:
        """Compare the maps with those under other phrases, for pairs that have another phrase."""
        changed = {
            "prompt_sensitivity": other_phrases(batch["phrase"], batch["finding"]),
            "side_sensitivity": swapped_phrases(batch["phrase"]),
        }
        for name, phrases in changed.items():
            rows = [row for row, phrase in enumerate(phrases) if phrase is not None]
            if not rows:
                continue
            texts = [phrase for phrase in phrases if phrase is not None]
            boxes, chest = batch["content_box"][rows], batch["chest_box"][rows]
            others = attribute_methods(self.methods, clip, images[rows], clip.tokenize(texts), texts, boxes, chest)
            for method, other in others.items():
                true, prefix = maps[method], _prefix(method)
                if name == "prompt_sensitivity":
                    self._add(prefix, name, batch, rows, true.grid[rows].flatten(1), other.grid.flatten(1))
                else:
                    sides = [named_side(batch["phrase"][row]) for row in rows]
                    self._add(prefix, name, batch, rows, true.image[rows], other.image, sides, boxes)

    def _add(self, prefix: str, name: str, batch: ImageTextBatch, rows: list[int], *values: Any) -> None:
        """Add R rows of a batch to a scalar and to those of their findings; each of the `values` has length R."""
        ids, tag = [batch["id"][row] for row in rows], f"{prefix}/{name}"
        self.metrics[tag].update(*values, ids=ids)
        if name not in self._of_findings:
            return
        findings = [batch["finding"][row] for row in rows]
        for finding in sorted(set(findings) - {""}):
            places = [place for place, other in enumerate(findings) if other == finding]
            picked = [value[places] if isinstance(value, Tensor) else [value[k] for k in places] for value in values]
            self._metric(f"{tag}/{finding}", type(self.metrics[tag])).update(*picked, ids=[ids[k] for k in places])

    def _metric(self, tag: str, kind: type[Metric], device: torch.device | None = None) -> Metric:
        """Metric of a scalar in this epoch, created on first use, because some scalars occur in some batches only."""
        if tag not in self.metrics:
            # Reused in every epoch: torchmetrics objects refer to themselves, and Python frees them late.
            if tag not in self._kept:
                self._kept[tag] = kind()
            self.metrics[tag] = self._kept[tag].to(device or next(iter(self.metrics.values())).device)
        return self.metrics[tag]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars."""
        if trainer.sanity_checking:
            return
        if trainer.world_size > 1:
            # `compute` waits for all processes, so each needs all scalars in the same order.
            parts: list[Any] = [None] * trainer.world_size
            own = {tag: type(metric) for tag, metric in self.metrics.items()}
            dist.all_gather_object(parts, (own, self._is_boxed))
            kinds = {tag: kind for part, _ in parts for tag, kind in part.items()}
            self._is_boxed = all(is_boxed for _, is_boxed in parts)
            self.metrics = {tag: self._metric(tag, kind) for tag, kind in sorted(kinds.items())}
        for tag, metric in self.metrics.items():
            with warnings.catch_warnings():
                # The warning below names the scalar.
                warnings.simplefilter("ignore")
                value = metric.compute()
            scalar = tag.split("/")[1]
            if value.isnan() and (tag.count("/") > 1 or (scalar in _OF_BOXES and not self._is_boxed)):
                # A finding may be missing in all batches; no warning is needed.
                continue
            if value.isnan() and tag not in self._warned:
                self._warned.add(tag)
                rank_zero_warn(
                    f"The scalar {tag} is NaN: no pair in the explained batches counts. The pairs may have no boxes or "
                    "no other phrase."
                )
            pl_module.log(tag, value, sync_dist=True)
        others = [other for other in trainer.callbacks if isinstance(other, AttributionMetrics)]  # type: ignore[attr-defined]
        if self._is_described:
            return
        self._is_described = True
        if not self._is_boxed:
            log.info(f"The batches have no boxes: AttributionMetrics leaves out {' and '.join(_OF_BOXES)}.")
        if self is others[0]:
            named = [(name, method) for other in others for name, method in other.methods.items()]
            methods = {_prefix(name): type(method).__name__ for name, method in named}
            tags = [tag for other in others for tag in other.metrics]
            describe_scalars(trainer.loggers, tags, methods, trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _prefix(method: str) -> str:
    """Start of the tags of a method: TensorBoard sorts groups of tags, and the method without a name comes first."""
    return f"attribution_{method}" if method else "attribution"


def _named_methods(
    methods: AttributionMethod | str | dict[str, MethodChoice] | None,
) -> dict[str, AttributionMethod]:
    """Methods by name, built from their choices."""
    if methods is None or isinstance(methods, (AttributionMethod, str)):
        return {"": load_method(methods or Matex.recommended())}
    if not methods:
        raise ValueError("methods is empty. Name a method, or leave AttributionMetrics out.")
    found: dict[str, AttributionMethod] = {}
    for name, choice in methods.items():
        if not re.fullmatch(r"[\w.-]*", name):
            raise ValueError(f"The name {name!r} of a method has other characters than letters, digits, _, . and -.")
        if isinstance(choice, (AttributionMethod, str)):
            found[name] = load_method(choice)
            continue
        first = next(iter(found.values()), None)
        if first is None:
            raise ValueError(f"The settings {choice} of {name!r} change the first method. Name a method first.")
        known = list(argument_names(type(first)))
        unknown = [setting for setting in choice if setting not in known]
        if unknown:
            raise ValueError(
                f"{type(first).__name__} has no setting {unknown[0]!r}, which {name!r} changes."
                f"{nearest(unknown[0], known)}"
            )
        found[name] = type(first)(**(first.settings | choice))
    return found
