"""Maps of a whole split on disk, from any number of processes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.callbacks.reader import Reader
from matex_pl.evaluation.store import MapStore, pair_keys, weight_hash
from matex_pl.files import check_folder, remove_abandoned_parts

log = logging.getLogger(__name__)


class MapWriter(Callback):
    """Write the maps of all pairs of `validate`, `test` or `predict` to a `MapStore`.

    Each process writes a file per batch. At the end they form one store that contains each pair once. Pairs that have
    maps of these weights, settings, pixels and words are not explained again. Therefore a stopped run continues, with
    any number of processes. To read the store:

        MapStore(Path("maps"), weight_hash(module.clip), method).read(pair_keys(batch))

    The callback does nothing within `fit`, where the weights change from validation to validation.

    Args:
        method: An attribution method, the name of a shipped one (`m2ib`), or a YAML file; `Matex.recommended()` by
            default.
        root: Folder of the stores; each store is named after the method and a hash of its settings and the weights.
        reader: Where the model is in the LightningModule, and images and phrases in its batches; by default as in
            `ClipModule` and the data modules of this package.
    """

    def __init__(
        self, method: AttributionMethod | str | None = None, root: str = "maps", reader: Reader | None = None
    ) -> None:
        self.method = load_method(method or Matex.recommended())
        self.root = Path(root)
        self.reader = reader or Reader()
        self.store: MapStore | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model, and that the folder is writable."""
        self.store = None
        self.reader.check(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            check_folder(self.root)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the store of these weights and this method."""
        if trainer.state.fn != TrainerFn.FITTING:
            # Lightning broadcasts the weights of the first process.
            self.store = MapStore(self.root, weight_hash(self.reader.clip_of(pl_module)), self.method)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the missing maps of a batch."""
        if self.store is None:
            return
        clip = self.reader.clip_of(pl_module)
        batch = self.reader.read(trainer, pl_module, batch, batch_idx, dataloader_idx)
        rows = {key: row for row, key in enumerate(pair_keys(batch))}
        missing = self.store.missing(list(rows))
        if missing:
            chosen = [rows[key] for key in missing]
            images, tokens = clip.inputs(batch)
            phrases = [batch["phrase"][row] for row in chosen]
            boxes = batch["content_box"][chosen], batch["chest_box"][chosen]
            maps = self.method.attribute(clip, images[chosen], tokens[chosen], phrases, *boxes)
            self.store.write(missing, maps)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the files of all processes into one store."""
        if self.store is None:
            return
        trainer.strategy.barrier("maps are written")
        if trainer.is_global_zero:
            self.store.drop_repeats()
            remove_abandoned_parts(self.store.folder)
        trainer.strategy.barrier("maps are merged")
        self.store.refresh()
        if trainer.is_global_zero:
            log.info(f"{len(self.store)} maps in {self.store.folder}")

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
