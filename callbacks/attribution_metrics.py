"""Attribution quality as scalars next to the loss."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MinMetric

from matex_pl.anatomy import named_side
from matex_pl.arguments import check_choices
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.core.fill import Fill, check_fill
from matex_pl.attribution.shipped import load_method
from matex_pl.clip.model import Clip
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.pairs import embed_pairs, other_phrases, swapped_phrases
from matex_pl.maps import Attribution
from matex_pl.metrics import (
    ConfidenceDrop,
    ConfidenceIncrease,
    ContrastToNoise,
    MapMass,
    OutsideMass,
    PointingGame,
    RankCorrelation,
    SideSensitivity,
)
from matex_pl.metrics.functional import border_mask
from matex_pl.metrics.removal import dropped_tokens, image_score, text_score


class AttributionMetrics(Callback):
    """Log the quality of a method's maps, over the first batches of validation and test.

    The scalars, with the prefix `attribution/`, are

    - `pointing_game` and `cnr`, over pairs with boxes
    - `confidence_drop` and `confidence_increase`
    - `mean_map_mass`
    - `text_confidence_drop` and `text_confidence_increase`, for methods that support text
    - `consistency_mean` and `consistency_min` over patches and pairs, for MATEX (if C is near 1 everywhere, it has no
      effect)
    - `outside_thorax_mass`, the share of the maps' mass outside lungs and heart, if the data module has a `thorax()`
    - `border_mass`, the share in the outer tenth of the image, if it has none

    `ModelCheckpoint(monitor="attribution/pointing_game")` works. The mass outside rises if a model reads something
    outside the patient. A prior draws the map to the named region and hides this: log a method without a prior.

    Args:
        method: An attribution method, the name of a shipped one (`m2ib`), or a YAML file; `Matex.recommended()` by
            default.
        name: Name between `attribution/` and the scalar that distinguishes several methods; empty for none.
        num_batches: Number of explained batches per validation (or test), in each process; -1 for all.
        fill: Replacement of removed pixels: `mean_image`, `mean_color` (as published) or `blur`.
        per_finding: Whether to log the pointing game, the mass outside and the prompt sensitivity of each finding too,
            as `pointing_game/<finding>`.
        sensitivity: Whether to log how maps follow the phrase, which takes two to three times as long.
            `prompt_sensitivity` is the rank correlation, over patches, of the maps under the true phrase and under that
            of another pair of the batch (see `other_phrases`); lower is better. `side_sensitivity` is the share of mass
            that moves to the other side of the patient when the phrase names that side, over phrases with a
            `named_side`; higher is better.
    """

    def __init__(
        self,
        method: AttributionMethod | str | None = None,
        name: str = "",
        num_batches: int = 4,
        fill: Fill = "mean_image",
        per_finding: bool = False,
        sensitivity: bool = False,
    ) -> None:
        check_choices(AttributionMetrics.__init__, locals())
        if num_batches < -1 or num_batches == 0:
            raise ValueError(
                f"num_batches must be positive, or -1 for all batches, got {num_batches}. To log no scalars, leave "
                "AttributionMetrics out."
            )
        self.method = load_method(method or Matex.recommended())
        self.name = name
        self.num_batches = num_batches
        self.fill = fill
        self.per_finding = per_finding
        self.sensitivity = sensitivity
        self.thorax: Tensor | None = None
        self.metrics: dict[str, Metric] = {}
        self._kept: dict[str, Metric] = {}
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the name, and read the thorax from the data module."""
        taken = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, AttributionMetrics) and other is not self and other.name == self.name
        ]
        if taken:
            raise ValueError(f"Two AttributionMetrics log under the name {self.name!r}. Give each a different name.")
        data = getattr(trainer, "datamodule", None)
        self.thorax = data.thorax() if isinstance(data, ChestXrayDataModule) else None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check the model and the fill; the model has its mean image at this point.

        Raises:
            NotImplementedError: The method does not support a tower of the model.
        """
        self.method.check_model(pl_module.clip)
        check_fill(self.fill, pl_module.clip)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the metrics, because Lightning does not reset those of a callback."""
        check_fill(self.fill, pl_module.clip)
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
        if self.method.supports_text:
            kinds |= {"text_confidence_drop": ConfidenceDrop, "text_confidence_increase": ConfidenceIncrease}
        if self.sensitivity:
            kinds |= {"prompt_sensitivity": RankCorrelation, "side_sensitivity": SideSensitivity}
        # Created on every process, for all findings: `compute` waits for all processes.
        kinds |= {
            f"{name}/{finding}": kinds[name]
            for finding in getattr(pl_module, "findings", ())
            for name in self._of_findings
            if name in kinds
        }
        for name, kind in kinds.items():
            self._metric(name, kind, pl_module.device)

    @property
    def _outside(self) -> str:
        return "border_mass" if self.thorax is None else "outside_thorax_mass"

    @property
    def _of_findings(self) -> tuple[str, ...]:
        """Names of the scalars that are logged per finding too."""
        return ("pointing_game", self._outside, "prompt_sensitivity") if self.per_finding else ()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the maps of the first batches."""
        if trainer.sanity_checking or 0 <= self.num_batches <= batch_idx:
            return
        clip, (images, tokens) = pl_module.clip, pl_module.inputs(batch)
        maps = self.method.attribute(clip, images, tokens, batch["phrase"], batch["content_box"])
        if self.thorax is None:
            inside = ~border_mask((maps.image.shape[1], maps.image.shape[2]), batch["content_box"])
        else:
            inside = self.thorax.to(maps.image.device).expand_as(maps.image)
        rows = list(range(len(maps.image)))
        self._add("pointing_game", batch, rows, maps.image, batch["boxes"])
        self._add("cnr", batch, rows, maps.image, batch["boxes"])
        self._add("mean_map_mass", batch, rows, maps.image)
        self._add(self._outside, batch, rows, maps.image, inside)
        if "consistency" in maps.parts:
            # `MapMass` is the mean over patches.
            self._metric("consistency_mean", MapMass).update(maps.parts["consistency"], ids=batch["id"])
            self._metric("consistency_min", MinMetric).update(maps.parts["consistency"])
        # The embeddings of the validation step would differ under autocast.
        image, text = embed_pairs(clip, images, tokens)
        score = (image * text).sum(-1)
        kept = {"confidence": image_score(clip, images, maps.image, self.fill, text)}
        if self.method.supports_text:
            drop = dropped_tokens(maps.text, maps.content, "map")
            kept["text_confidence"] = text_score(clip, tokens, drop, image)
        for name, kept_score in kept.items():
            self.metrics[f"{name}_drop"].update(score, kept_score, ids=batch["id"])
            self.metrics[f"{name}_increase"].update(score, kept_score, ids=batch["id"])
        if self.sensitivity:
            self._change_phrases(clip, images, maps, batch)

    def _change_phrases(self, clip: Clip, images: Tensor, maps: Attribution, batch: ImageTextBatch) -> None:
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
            boxes = batch["content_box"][rows]
            other = self.method.attribute(clip, images[rows], clip.tokenize(texts), texts, boxes)
            if name == "prompt_sensitivity":
                self._add(name, batch, rows, maps.grid[rows].flatten(1), other.grid.flatten(1))
            else:
                sides = [named_side(batch["phrase"][row]) for row in rows]
                self._add(name, batch, rows, maps.image[rows], other.image, sides, boxes)

    def _add(self, name: str, batch: ImageTextBatch, rows: list[int], *values: Any) -> None:
        """Add R rows of a batch to a scalar and to those of their findings; each of the `values` has length R."""
        ids = [batch["id"][row] for row in rows]
        self.metrics[name].update(*values, ids=ids)
        if name not in self._of_findings:
            return
        findings = [batch["finding"][row] for row in rows]
        for finding in sorted(set(findings) - {""}):
            places = [place for place, other in enumerate(findings) if other == finding]
            picked = [value[places] if isinstance(value, Tensor) else [value[k] for k in places] for value in values]
            self._metric(f"{name}/{finding}", type(self.metrics[name])).update(*picked, ids=[ids[k] for k in places])

    def _metric(self, name: str, kind: type[Metric], device: torch.device | None = None) -> Metric:
        """Metric of a scalar in this epoch, created on first use, because some scalars occur in some batches only."""
        if name not in self.metrics:
            # Reused in every epoch: torchmetrics objects refer to themselves, and Python frees them late.
            if name not in self._kept:
                self._kept[name] = kind()
            self.metrics[name] = self._kept[name].to(device or self.metrics["cnr"].device)
        return self.metrics[name]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars."""
        if trainer.sanity_checking:
            return
        if trainer.world_size > 1:
            # `compute` waits for all processes, so each needs all scalars in the same order.
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, {name: type(metric) for name, metric in self.metrics.items()})
            kinds = {name: kind for part in parts for name, kind in part.items()}
            self.metrics = {name: self._metric(name, kind) for name, kind in sorted(kinds.items())}
        prefix = "/".join(filter(None, ("attribution", self.name)))
        for name, metric in self.metrics.items():
            with warnings.catch_warnings():
                # The warning below names the scalar.
                warnings.simplefilter("ignore")
                value = metric.compute()
            if value.isnan() and "/" in name:
                # A finding may be missing in all batches; no warning is needed.
                continue
            if value.isnan() and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"The scalar {prefix}/{name} is NaN: no pair in the explained batches counts. The pairs may have "
                    "no boxes or no other phrase."
                )
            pl_module.log(f"{prefix}/{name}", value, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
