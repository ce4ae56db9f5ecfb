"""CSV table of `matex predict`."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from matex_pl.files import check_output, whole_file

log = logging.getLogger(__name__)

# Begin of every table.
_HEADER = "id,phrase,cosine"


class PredictionWriter(BasePredictionWriter):
    """Write the predictions as one CSV: id, phrase, cosine, and the cosine with each finding's prompt.

    Args:
        path: Path of the file; `predictions.csv` in the trainer's log folder by default.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the table can be written, and replaces at most an earlier one."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            check_output(self._file(trainer), _HEADER)

    def _file(self, trainer: Trainer) -> Path:
        """Path of the table; all processes must call this together."""
        return Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.csv")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all rows, in the order of the images, under a temporary name until the file is complete."""
        rows = [row for batch in predictions for row in batch]
        if trainer.world_size > 1:
            places = [place for loader in batch_indices for batch in loader for place in batch]
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, list(zip(places, rows, strict=True)))
            # In prediction Lightning does not pad shards with repeated pairs.
            rows = [row for _, row in sorted((pair for part in parts for pair in part), key=itemgetter(0))]
        path = self._file(trainer)
        if not trainer.is_global_zero:
            return
        with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
        log.info(f"{len(rows)} predictions in {path}")
