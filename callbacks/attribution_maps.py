"""Panels of the same few pairs at every validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.callbacks.loggers import is_local, log_images
from matex_pl.callbacks.reader import Reader, rows_of
from matex_pl.data.datamodule import ChestXrayDataModule, PairDataset
from matex_pl.data.pair import ImageTextBatch, ImageTextPair
from matex_pl.explain import attribute_batch, draw_panels
from matex_pl.visualization.draw import Picture
from matex_pl.visualization.panel import CARD_WIDTH

log = logging.getLogger(__name__)


class AttributionMaps(Callback):
    """Log, for K fixed pairs, a panel of image, boxes, map, shaded phrase and score.

    Each pair has one tag, `maps/<name>/<id>`, for the whole run, and TensorBoard's slider moves through the training.
    The panels go to all loggers that accept images. The pairs are chosen once, in turn over the findings, and saved in
    the checkpoint. If the data changed since, other pairs are chosen, with a message.

    The maps are computed at the first batch. Callbacks that average weights therefore put the same weights into panels
    and scalars, in any order of the callbacks.

    With the loaders of a data module of this package, the pairs are chosen from the whole split. Of any other loader,
    the first pairs of the first validation are kept in memory and drawn again.

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
        reader: Where the model is in the LightningModule, and images and phrases in its batches; by default as in
            `ClipModule` and the data modules of this package.
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
        reader: Reader | None = None,
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
        self._content: dict[str, str] = {}
        self.reader = reader or Reader()
        # By whether they show words.
        self._panels: dict[bool, dict[str, Picture]] | None = None
        # Pairs of loaders of other data modules, by split, and the splits that have them all.
        self._taken: dict[str, list[ImageTextBatch]] = {}
        self._complete: set[str] = set()

    @property
    def state_key(self) -> str:
        """Key with the name, to support several instances."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Number of validations, the chosen pairs, and a hash of their content by split."""
        return {"validations": self.validations, "chosen": self.chosen, "content": self._content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the pairs of the checkpoint."""
        self.validations, self.chosen = state_dict["validations"], state_dict["chosen"]
        self._content = state_dict.get("content", {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model, and the ids of the pairs."""
        self.reader.check(trainer, pl_module)
        # Another call of the trainer may bring other loaders.
        self._taken, self._complete = {}, set()
        data = getattr(trainer, "datamodule", None)
        if self.pair_ids and isinstance(data, ChestXrayDataModule) and stage in ("fit", "validate", "test"):
            ids = {pair.id for pair in data.pairs["test" if stage == "test" else "val"]}
            missing = [name for name in self.pair_ids if name not in ids]
            if missing:
                raise ValueError(
                    f"AttributionMaps: there is no pair {missing[0]!r} among the {len(ids)} pairs of the split, e.g. "
                    f"{min(ids, default='none')!r}. Give pair_ids of this split."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the model, and compare the pairs of a checkpoint with the data, before the first step.

        Raises:
            NotImplementedError: The method does not support a tower of the model.
        """
        if self.every_n_validations and trainer.loggers:
            self.method.check_model(self.reader.clip_of(pl_module))
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ChestXrayDataModule):
            for split in tuple(self.chosen):
                self._choose(data.pairs[split], split)

    def _choose(self, pairs: Sequence[ImageTextPair], split: str) -> list[str]:
        """Ids of the pairs to draw: the given ones, or those of the checkpoint if the data still has them."""
        if self.pair_ids:
            self.chosen[split] = self.pair_ids
            return self.pair_ids
        kept = self.chosen.get(split)
        number = min(self.num_pairs, len(pairs))
        if kept is not None:
            gone = set(kept) - {pair.id for pair in pairs}
            changed = not gone and self._content.get(split) not in (None, _hash(pairs, kept))
            if not gone and not changed and len(kept) == number:
                self._content[split] = _hash(pairs, kept)
                return kept
            reason = f"{len(gone)} of the {len(kept)} pairs in the checkpoint are not in the data"
            reason = reason if gone else "the content of the pairs in the checkpoint changed"
            reason = reason if gone or changed else f"num_pairs is {self.num_pairs}, the checkpoint has {len(kept)}"
            log.info(f"AttributionMaps {self.name!r}: {reason}. It chooses {number} {split} pairs again.")
        self.chosen[split] = choose_pairs(pairs, self.num_pairs)
        self._content[split] = _hash(pairs, self.chosen[split])
        return self.chosen[split]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a batch of the validation, unless the sanity check did."""
        self.reader.check_loader(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the panels of every n-th validation, at its first batch."""
        if dataloader_idx == 0 and not trainer.sanity_checking and self._is_due():
            self._draw(trainer, pl_module, batch, batch_idx, trainer.val_dataloaders, "val")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels of every n-th validation."""
        if trainer.sanity_checking or not self.every_n_validations:
            return
        if self._is_due():
            self._log(trainer, pl_module, trainer.val_dataloaders, "val")
        self.validations += 1

    def _is_due(self) -> bool:
        return bool(self.every_n_validations) and self.validations % self.every_n_validations == 0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the panels of test pairs, at the first batch."""
        if dataloader_idx == 0 and self.every_n_validations:
            self._draw(trainer, pl_module, batch, batch_idx, trainer.test_dataloaders, "test")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels of test pairs."""
        if self.every_n_validations:
            self._log(trainer, pl_module, trainer.test_dataloaders, "test")

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: Any, split: str
    ) -> None:
        """Draw the panels of this process's share of the pairs, with words and without, as the loggers need them."""
        if not trainer.loggers:
            return
        if batch_idx == 0:
            self._panels = {show_text: {} for show_text in self._kinds(trainer)}
        data = getattr(loader, "dataset", None)
        if isinstance(data, PairDataset):
            share = self._choose(data.pairs, split)[trainer.global_rank :: trainer.world_size] if batch_idx == 0 else []
            due = [data.batch(share)] if share else []
        elif split in self._complete:
            due = self._taken.get(split, []) if batch_idx == 0 else []
        else:
            number = self._missing(trainer, split)
            pairs = self.reader.read(trainer, pl_module, batch, batch_idx) if number else None
            found = self._take(pairs, split, number) if pairs else None
            due = [found] if found else []
            self._taken.setdefault(split, []).extend(due)
        clip, subtitle = self.reader.clip_of(pl_module), f"{self.name} | epoch {trainer.current_epoch}"
        for pairs in due:
            maps, tokens = attribute_batch(clip, self.method, pairs)
            for show_text, panels in (self._panels or {}).items():
                drawn = draw_panels(clip, maps, pairs, tokens, subtitle, CARD_WIDTH, show_text=show_text, stacked=True)
                panels.update(zip(pairs["id"], drawn, strict=True))

    def _missing(self, trainer: Trainer, split: str) -> int:
        """Number of pairs that this process still takes from a loader."""
        wanted = self.pair_ids or self.chosen.get(split)
        share = len(wanted) if wanted else len(range(trainer.global_rank, self.num_pairs, trainer.world_size))
        return share - sum(len(pairs["id"]) for pairs in self._taken.get(split, []))

    def _take(self, batch: ImageTextBatch, split: str, number: int) -> ImageTextBatch | None:
        """Pairs of a batch that are still to be drawn, on the CPU: those of the wanted ids, or else the first ones."""
        wanted = self.pair_ids or self.chosen.get(split)
        rows = [row for row, name in enumerate(batch["id"]) if not wanted or name in wanted]
        return rows_of(batch, rows[:number]) if rows else None

    def _kinds(self, trainer: Trainer) -> list[bool]:
        """Whether panels show words: the kinds that the loggers need."""
        return sorted({self._shows_text(logger) for logger in trainer.loggers}, reverse=True)

    def _shows_text(self, logger: Any) -> bool:
        return is_local(logger) if self.show_text is None else self.show_text

    def _log(self, trainer: Trainer, pl_module: LightningModule, loader: Any, split: str) -> None:
        if not trainer.loggers:
            return
        is_own = isinstance(getattr(loader, "dataset", None), PairDataset)
        if self._panels is None and is_own:
            # A process without a batch has drawn nothing.
            self._draw(trainer, pl_module, None, 0, loader, split)
        panels, self._panels = self._panels or {}, None
        taken, shown = 0, 0
        for show_text in self._kinds(trainer):
            loggers = [logger for logger in trainer.loggers if self._shows_text(logger) is show_text]
            for pair, panel in sorted(_gathered(trainer, panels.get(show_text, {})).items()):
                taken += log_images(loggers, f"maps/{self.name}/{pair}", panel, trainer.global_step)
                shown += 1
        if not is_own and split not in self._complete:
            self._keep(trainer, split)
        if shown and not taken and trainer.is_global_zero:
            rank_zero_warn(
                "No logger of the trainer accepts images, so AttributionMaps shows no maps. Use a TensorBoardLogger."
            )

    def _keep(self, trainer: Trainer, split: str) -> None:
        """Keep the pairs that all processes took from a loader, or choose again if pairs of a checkpoint are gone."""
        own = {name for pairs in self._taken.get(split, []) for name in pairs["id"]}
        parts: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(parts, own)
        found = set().union(*parts)
        missing = sorted({*(self.pair_ids or self.chosen.get(split, []))} - found)
        if missing:
            again = "" if self.pair_ids else " It chooses others at the next validation."
            rank_zero_warn(f"AttributionMaps {self.name!r}: the loader has no pairs {', '.join(missing[:3])}.{again}")
        if missing and not self.pair_ids:
            self.chosen.pop(split)
            self._taken.pop(split, None)
            return
        self._complete.add(split)
        self.chosen[split] = sorted(found)


def _gathered(trainer: Trainer, panels: dict[str, Picture]) -> dict[str, Picture]:
    """Panels of all processes by pair, on the first process; empty on the others."""
    if trainer.world_size == 1:
        return panels
    parts: list[Any] = [None] * trainer.world_size
    dist.gather_object(panels, parts if trainer.is_global_zero else None)
    return {pair: panel for part in parts if part for pair, panel in part.items()}


def _hash(pairs: Sequence[ImageTextPair], ids: Sequence[str]) -> str:
    """Hash of the ids, images and phrases of the named pairs."""
    named = {pair.id: (pair.id, pair.image_id, pair.phrase) for pair in pairs}
    return blake2b(repr([named[name] for name in ids]).encode(), digest_size=8).hexdigest()


def choose_pairs(pairs: Sequence[ImageTextPair], number: int) -> list[str]:
    """Ids of up to `number` pairs: findings in turn, in the order of the split, pairs with boxes first."""
    queues: dict[str, list[str]] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.boxes):
        queues.setdefault(pair.finding, []).append(pair.id)
    turns = [queue[turn] for turn in range(number) for queue in queues.values() if turn < len(queue)]
    return turns[:number]
