"""Attribution quality as scalars beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MinMetric

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.base import check_choice
from matex_pl.attribution.fill import FILLS, check_fill, fill_images
from matex_pl.attribution.shipped import load_method
from matex_pl.data.record import StudyBatch
from matex_pl.maps import AttributionMaps
from matex_pl.metrics import ConfidenceDrop, ConfidenceIncrease, ContrastToNoise, MapMass, PointingGame
from matex_pl.metrics.functional import keep_highlighted, keep_relevant_tokens


class AttributionMetrics(Callback):
    """Logs how good a method's maps are, over the first batches of validation and of test.

    Scalars, with `attribution/` in front: `pointing_game` and `cnr` over studies with boxes, `confidence_drop` and
    `confidence_increase`, `mean_map_mass`, and for methods that serve text `text_confidence_drop` and
    `text_confidence_increase`; for MATEX also `consistency_mean` and `consistency_min`, over patches and studies
    (near 1 everywhere, C does nothing). `ModelCheckpoint(monitor="attribution/pointing_game")` works.

    Args:
        method: What makes the maps: a method, a shipped one by name (`m2ib`), or a YAML file; `Matex.measured()` by
            default.
        name: Put between `attribution/` and the scalar, to have several methods side by side; empty for none.
        num_batches: Batches per validation (or test) that are explained; -1 for all.
        fill: What stands in for pixels that are not kept: `mean_film`, `mean_colour` (as published) or `blur`.
        per_finding: Also log the pointing game of each finding, as `pointing_game/<finding>`.
    """

    def __init__(
        self,
        method: AttributionMethod | str | None = None,
        name: str = "",
        num_batches: int = 4,
        fill: str = "mean_film",
        per_finding: bool = False,
    ) -> None:
        if num_batches < -1 or num_batches == 0:
            raise ValueError(
                f"num_batches must be positive, or -1 for all; got {num_batches}. To switch it off, leave it out."
            )
        check_choice("fill", fill, FILLS)
        self.method = load_method(method or Matex.measured())
        self.name = name
        self.num_batches = num_batches
        self.fill = fill
        self.per_finding = per_finding
        self.metrics: dict[str, Metric] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before training starts."""
        taken = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, AttributionMetrics) and other is not self and other.name == self.name
        ]
        if taken:
            raise ValueError(f"Two AttributionMetrics log under the name {self.name!r}. Give each a name of its own.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before training starts."""
        self._check_fill(pl_module)

    def _check_fill(self, module: Any) -> None:
        check_fill(self.fill, module.clip)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: Lightning does not reset metrics that a callback owns."""
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._start(pl_module)

    def _start(self, module: Any) -> None:
        self._check_fill(module)
        metrics: dict[str, Metric] = {
            "pointing_game": PointingGame(),
            "cnr": ContrastToNoise(),
            "mean_map_mass": MapMass(),
            "confidence_drop": ConfidenceDrop(),
            "confidence_increase": ConfidenceIncrease(),
        }
        if self.method.serves_text:
            metrics |= {"text_confidence_drop": ConfidenceDrop(), "text_confidence_increase": ConfidenceIncrease()}
        self.metrics = {name: metric.to(module.device) for name, metric in metrics.items()}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: StudyBatch, batch_idx: int, *_: int
    ) -> None:
        """Explain the batch, if it is among the first."""
        self._update(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: StudyBatch, batch_idx: int, *_: int
    ) -> None:
        """Explain the batch, if it is among the first."""
        self._update(trainer, pl_module, outputs, batch, batch_idx)

    def _update(self, trainer: Trainer, module: Any, outputs: Any, batch: StudyBatch, batch_idx: int) -> None:
        if trainer.sanity_checking or 0 <= self.num_batches <= batch_idx:
            return
        images, tokens = module.inputs(batch)
        maps = self.method.attribute(module.clip, images, tokens, batch["phrase"], batch["film"])
        self._locate(maps.image, batch)
        if "consistency" in maps.parts:
            self._metric("consistency_mean", MeanMetric).update(maps.parts["consistency"])
            self._metric("consistency_min", MinMetric).update(maps.parts["consistency"])
        self._remove(trainer, module, images, tokens, maps, outputs)

    def _locate(self, image_maps: Tensor, batch: StudyBatch) -> None:
        self.metrics["pointing_game"].update(image_maps, batch["boxes"])
        self.metrics["cnr"].update(image_maps, batch["boxes"])
        self.metrics["mean_map_mass"].update(image_maps)
        if not self.per_finding:
            return
        boxed = [(row, finding) for row, finding in enumerate(batch["finding"]) if finding and len(batch["boxes"][row])]
        for finding in sorted({finding for _, finding in boxed}):
            rows = [row for row, name in boxed if name == finding]
            boxes = [batch["boxes"][row] for row in rows]
            self._metric(f"pointing_game/{finding}", PointingGame).update(image_maps[rows], boxes)

    def _metric(self, name: str, kind: type[Metric]) -> Metric:
        """A scalar that only some batches have, made when it first comes."""
        if name not in self.metrics:
            self.metrics[name] = kind().to(self.metrics["cnr"].device)
        return self.metrics[name]

    @torch.no_grad()
    def _remove(
        self,
        trainer: Trainer,
        module: Any,
        images: Tensor,
        tokens: Tensor,
        maps: AttributionMaps,
        outputs: dict[str, Tensor],
    ) -> None:
        """Confidence after removal; the embeddings of the whole pair come from the validation step."""
        fill = fill_images(self.fill, module.clip, images)
        image, text = outputs["image"], outputs["text"]
        score = (image * text).sum(-1)
        with trainer.precision_plugin.forward_context():
            kept = module.clip.encode_image(keep_highlighted(images, maps.image, fill))
        self._update_confidence("confidence", score, (kept * text).sum(-1))
        if self.method.serves_text:
            with trainer.precision_plugin.forward_context():
                kept = module.clip.encode_text(
                    keep_relevant_tokens(tokens, maps.text, maps.content, module.clip.pad_id)
                )
            self._update_confidence("text_confidence", score, (image * kept).sum(-1))

    def _update_confidence(self, name: str, score: Tensor, kept: Tensor) -> None:
        self.metrics[f"{name}_drop"].update(score.float(), kept.float())
        self.metrics[f"{name}_increase"].update(score.float(), kept.float())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars."""
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        prefix = "/".join(part for part in ("attribution", self.name) if part)
        for name, metric in self.metrics.items():
            value = metric.compute()
            if value.isnan():
                rank_zero_warn(
                    f"{prefix}/{name} is NaN: none of the studies in the explained batches counts (no boxes?)."
                )
            module.log(f"{prefix}/{name}", value)
