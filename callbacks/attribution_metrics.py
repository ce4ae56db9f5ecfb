"""Attribution quality as scalars beside the loss."""

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
    """Logs how good a method's maps are, over the first batches of validation and of test.

    Scalars, with `attribution/` in front: `pointing_game` and `cnr` over pairs with boxes, `confidence_drop` and
    `confidence_increase`, `mean_map_mass`, and for methods that serve text `text_confidence_drop` and
    `text_confidence_increase`; for MATEX also `consistency_mean` and `consistency_min`, over patches and pairs
    (near 1 everywhere, C does nothing). `ModelCheckpoint(monitor="attribution/pointing_game")` works.

    `outside_thorax_mass` is the share of the maps' mass where no lung and no heart is, if the trainer's data module
    knows (`thorax()`), otherwise `border_mass` the share in the outer tenth of the image. It rises where a model reads
    something beside the patient. A prior draws the map to what the phrase names and hides that: log a method without.

    Args:
        method: What makes the maps: a method, a shipped one by name (`m2ib`), or a YAML file; `Matex.recommended()` by
            default.
        name: Put between `attribution/` and the scalar, to have several methods side by side; empty for none.
        num_batches: Batches per validation (or test), in each process, that are explained; -1 for all.
        fill: What stands in for pixels that are not kept: `mean_image`, `mean_color` (as published) or `blur`.
        per_finding: Also log the pointing game and the mass outside (and the prompt sensitivity) of each finding, as
            `pointing_game/<finding>`.
        sensitivity: Also log how maps follow the phrase, which takes two to three times as long. `prompt_sensitivity`:
            the rank correlation, over patches, of the maps under the true phrase and under that of another pair of the
            batch (see `other_phrases`), lower is better. `side_sensitivity`: the share of mass that moves to the other
            side of the patient when the phrase names that one, over phrases with a `named_side`, higher is better.
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
                f"num_batches must be positive, or -1 for all; got {num_batches}. To switch it off, leave it out."
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before training starts, and ask the data module for the thorax."""
        taken = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, AttributionMetrics) and other is not self and other.name == self.name
        ]
        if taken:
            raise ValueError(f"Two AttributionMetrics log under the name {self.name!r}. Give each a name of its own.")
        data = getattr(trainer, "datamodule", None)
        self.thorax = data.thorax() if isinstance(data, ChestXrayDataModule) else None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a fill that the model has no pixels for."""
        check_fill(self.fill, pl_module.clip)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the metrics, which Lightning does not do for those of a callback."""
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
        # Made on every process, whatever findings its batches have: `compute` waits for all of them.
        kinds |= {
            f"{name}/{finding}": kinds[name]
            for finding in (getattr(pl_module, "findings", ()) if self.per_finding else ())
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
        """The scalars that each finding gets too, with `per_finding`."""
        return "pointing_game", self._outside, "prompt_sensitivity"

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the maps of the first batches."""
        if trainer.sanity_checking or 0 <= self.num_batches <= batch_idx:
            return
        clip, (images, tokens) = pl_module.clip, pl_module.inputs(batch)
        maps = self.method.attribute(clip, images, tokens, batch["phrase"], batch["content_box"])
        self._locate(maps.image, batch)
        if "consistency" in maps.parts:
            # The mean of what is one number per patch.
            self._metric("consistency_mean", MapMass).update(maps.parts["consistency"], ids=batch["id"])
            self._metric("consistency_min", MinMetric).update(maps.parts["consistency"])
        self._remove(clip, images, tokens, maps, batch["id"])
        if self.sensitivity:
            self._change_phrases(clip, images, maps, batch)

    def _locate(self, image_maps: Tensor, batch: ImageTextBatch) -> None:
        everyone = list(range(len(image_maps)))
        self._add("pointing_game", batch, everyone, image_maps, batch["boxes"])
        self._add("cnr", batch, everyone, image_maps, batch["boxes"])
        self._add("mean_map_mass", batch, everyone, image_maps)
        self._add(self._outside, batch, everyone, image_maps, self._inside(image_maps, batch["content_box"]))

    def _inside(self, image_maps: Tensor, content_box: Tensor) -> Tensor:
        """Where mass belongs, `(B, H, W)` bool: in the thorax, or off the border of the image."""
        if self.thorax is not None:
            return self.thorax.to(image_maps.device).expand_as(image_maps)
        return ~border_mask((image_maps.shape[1], image_maps.shape[2]), content_box)

    def _change_phrases(self, clip: Clip, images: Tensor, maps: Attribution, batch: ImageTextBatch) -> None:
        rows, other = self._under(clip, images, batch, other_phrases(batch["phrase"], batch["finding"]))
        if other is not None:
            self._add("prompt_sensitivity", batch, rows, maps.grid[rows].flatten(1), other.grid.flatten(1))
        rows, other = self._under(clip, images, batch, swapped_phrases(batch["phrase"]))
        if other is not None:
            named = [named_side(batch["phrase"][row]) for row in rows]
            self._add("side_sensitivity", batch, rows, maps.image[rows], other.image, named, batch["content_box"][rows])

    def _under(
        self, clip: Clip, images: Tensor, batch: ImageTextBatch, phrases: list[str | None]
    ) -> tuple[list[int], Attribution | None]:
        """The rows that get a phrase in place of their own, and their maps under it; None without rows."""
        chosen = {row: phrase for row, phrase in enumerate(phrases) if phrase is not None}
        rows, texts = list(chosen), list(chosen.values())
        if not rows:
            return rows, None
        tokens = clip.tokenize(texts)
        return rows, self.method.attribute(clip, images[rows], tokens, texts, batch["content_box"][rows])

    def _add(self, name: str, batch: ImageTextBatch, rows: list[int], *values: Any) -> None:
        """Add the pairs of these rows to a scalar, and to that of each one's finding where there is one.

        Args:
            name: The scalar.
            batch: The batch.
            rows: R rows of it.
            values: What the metric takes, each R long.
        """
        ids = [batch["id"][row] for row in rows]
        self.metrics[name].update(*values, ids=ids)
        if not self.per_finding or name not in self._of_findings:
            return
        named = [batch["finding"][row] for row in rows]
        for finding in sorted(set(named) - {""}):
            own = [k for k, other in enumerate(named) if other == finding]
            picked = [value[own] if isinstance(value, Tensor) else [value[k] for k in own] for value in values]
            self._metric(f"{name}/{finding}", type(self.metrics[name])).update(*picked, ids=[ids[k] for k in own])

    def _metric(self, name: str, kind: type[Metric], device: torch.device | None = None) -> Metric:
        """The scalar of this epoch, made when it first comes; some come with some batches only."""
        if name not in self.metrics:
            # Kept from epoch to epoch: torchmetrics' objects hold themselves, so that Python frees them late.
            if name not in self._kept:
                self._kept[name] = kind()
            self.metrics[name] = self._kept[name].to(device or self.metrics["cnr"].device)
        return self.metrics[name]

    def _remove(self, clip: Clip, images: Tensor, tokens: Tensor, maps: Attribution, ids: list[str]) -> None:
        """Confidence after removal."""
        # Not those of the validation step: under autocast they would differ from what is held against them.
        image, text = embed_pairs(clip, images, tokens)
        score = (image * text).sum(-1)
        self._update_confidence("confidence", score, image_score(clip, images, maps.image, self.fill, text), ids)
        if self.method.supports_text:
            drop = dropped_tokens(maps.text, maps.content, "map")
            self._update_confidence("text_confidence", score, text_score(clip, tokens, drop, image), ids)

    def _update_confidence(self, name: str, score: Tensor, kept: Tensor, ids: list[str]) -> None:
        self.metrics[f"{name}_drop"].update(score, kept, ids=ids)
        self.metrics[f"{name}_increase"].update(score, kept, ids=ids)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars."""
        if trainer.sanity_checking:
            return
        prefix = "/".join(part for part in ("attribution", self.name) if part)
        self._make_those_of_others(trainer)
        for name, metric in self.metrics.items():
            with warnings.catch_warnings():
                # The warning below names the scalar.
                warnings.simplefilter("ignore")
                value = metric.compute()
            if not value.isnan():
                pl_module.log(f"{prefix}/{name}", value, sync_dist=True)
                continue
            # A finding that none of the batches has is no reason to worry.
            if "/" not in name:
                rank_zero_warn(
                    f"{prefix}/{name} is NaN: none of the pairs in the explained batches counts (no boxes, or no "
                    "other phrase?)."
                )
                pl_module.log(f"{prefix}/{name}", value, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _make_those_of_others(self, trainer: Trainer) -> None:
        """Have the scalars that any process has, in one order: `compute` waits for all of them."""
        if trainer.world_size == 1:
            return
        found: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(found, {name: type(metric) for name, metric in self.metrics.items()})
        kinds = {name: kind for own in found for name, kind in own.items()}
        self.metrics = {name: self._metric(name, kind) for name, kind in sorted(kinds.items())}
