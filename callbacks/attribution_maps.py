"""Panels of the same few pairs at every validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.callbacks.loggers import is_local, log_images
from matex_pl.data.datamodule import ChestXrayDataModule, PairDataset
from matex_pl.data.pair import ImageTextPair
from matex_pl.explain import explain_batch
from matex_pl.visualization.draw import Picture


class AttributionMaps(Callback):
    """Log, for K fixed pairs, a panel of image, boxes, map, shaded phrase and score.

    Each pair has one tag, `maps/<name>/<id>`, for the whole run, and TensorBoard's slider moves through the training.
    The panels go to all loggers that accept images. The pairs are chosen once, in turn over the findings, and saved in
    the checkpoint.

    Args:
        method: An attribution method, the name of a shipped one (`m2ib`), or a YAML file; `Matex.recommended()` by
            default.
        name: Part of the tag that distinguishes several methods.
        num_pairs: Number K of pairs, unless `pair_ids` is given.
        pair_ids: Ids of the pairs, which must be in the validated or tested split.
        every_n_validations: Interval of the panels: the first validation, then every n-th; 0 switches the callback off.
        show_text: Whether to write phrases and findings in the panels; with `false`, shaded bars replace the words. By
            default, only loggers that write to local disks get words (see `is_local`). Panels never contain patient
            ids, and always the id of the pair.
        log_text: Deprecated name of `show_text`.
    """

    def __init__(
        self,
        method: AttributionMethod | str | None = None,
        name: str = "matex",
        num_pairs: int = 8,
        pair_ids: list[str] | None = None,
        every_n_validations: int = 1,
        show_text: bool | None = None,
        log_text: bool | None = None,
    ) -> None:
        if num_pairs < 1 or every_n_validations < 0:
            raise ValueError(
                "AttributionMaps: num_pairs must be at least 1 and every_n_validations at least 0, "
                f"got {num_pairs} and {every_n_validations}."
            )
        self.method = load_method(method or Matex.recommended())
        self.name = name
        self.num_pairs = num_pairs
        self.pair_ids = pair_ids
        self.every_n_validations = every_n_validations
        self.show_text = log_text if show_text is None else show_text
        self.validations = 0
        self.chosen: dict[str, list[str]] = {}

    @property
    def state_key(self) -> str:
        """Key with the name, to support several instances."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Number of validations, and the chosen pairs."""
        return {"validations": self.validations, "chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the pairs of the checkpoint."""
        self.validations, self.chosen = state_dict["validations"], state_dict["chosen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the ids of the pairs."""
        data = getattr(trainer, "datamodule", None)
        if self.pair_ids and isinstance(data, ChestXrayDataModule) and stage in ("fit", "validate", "test"):
            ids = {pair.id for pair in data.pairs["test" if stage == "test" else "val"]}
            missing = [name for name in self.pair_ids if name not in ids]
            if missing:
                raise ValueError(
                    f"AttributionMaps: there is no pair {missing[0]!r} among the {len(ids)} pairs of the split, e.g. "
                    f"{min(ids, default='none')!r}. Give pair_ids of this split."
                )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels at every n-th validation."""
        if trainer.sanity_checking or not self.every_n_validations:
            return
        self.validations += 1
        if (self.validations - 1) % self.every_n_validations == 0:
            self._log(trainer, pl_module, trainer.val_dataloaders, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels of test pairs."""
        if self.every_n_validations:
            self._log(trainer, pl_module, trainer.test_dataloaders, "test")

    def _log(self, trainer: Trainer, module: Any, loader: Any, split: str) -> None:
        if not trainer.loggers:
            return
        data = getattr(loader, "dataset", None)
        if not isinstance(data, PairDataset):
            raise TypeError(
                f"AttributionMaps needs the loader of a matex_pl data module, got a loader of {type(data).__name__}."
            )
        if split not in self.chosen:
            self.chosen[split] = self.pair_ids or choose_pairs(data.pairs, self.num_pairs)
        taken = 0
        for show_text in (True, False):
            loggers = [
                logger
                for logger in trainer.loggers
                if (is_local(logger) if self.show_text is None else self.show_text) is show_text
            ]
            panels = self._panels(trainer, module, data, self.chosen[split], show_text) if loggers else {}
            for pair, panel in panels.items() if trainer.is_global_zero else ():
                taken += log_images(loggers, f"maps/{self.name}/{pair}", panel, trainer.global_step)
        if not taken:
            rank_zero_warn(
                "No logger of the trainer accepts images, so AttributionMaps shows no maps. Use a TensorBoardLogger."
            )

    def _panels(
        self, trainer: Trainer, module: Any, data: PairDataset, pairs: list[str], show_text: bool
    ) -> dict[str, Picture]:
        """Panels by pair, all of them on the first process; each process explains its share."""
        share = pairs[trainer.global_rank :: trainer.world_size]
        panels: dict[str, Picture] = {}
        if share:
            subtitle = f"{self.name} | epoch {trainer.current_epoch}"
            batch = data.batch(share)
            pictures = explain_batch(module, self.method, batch, subtitle, show_text=show_text)
            panels.update(zip(batch["id"], pictures, strict=True))
        if trainer.world_size == 1:
            return panels
        parts: list[Any] = [None] * trainer.world_size
        dist.gather_object(panels, parts if trainer.is_global_zero else None)
        return {pair: panel for part in parts if part for pair, panel in part.items()}


def choose_pairs(pairs: Sequence[ImageTextPair], number: int) -> list[str]:
    """Ids of up to `number` pairs: findings in turn, in the order of the split, pairs with boxes first."""
    queues: dict[str, list[str]] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.boxes):
        queues.setdefault(pair.finding, []).append(pair.id)
    turns = [queue[turn] for turn in range(number) for queue in queues.values() if turn < len(queue)]
    return turns[:number]
