"""One run: fine-tuning on training pairs with dropped parts."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from matex_pl.attribution.core.fill import drop_tokens, fill_images
from matex_pl.clip.device import synchronize, uses_cuda
from matex_pl.clip.low_rank import merge_adapters
from matex_pl.clip.record import model_files, unpacked
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.tensors import read_tensors, write_tensors
from matex_pl.metrics.removal import enlarge_grid
from matex_pl.roar.drop import drop_of
from matex_pl.roar.images import PlanImages, split_rows
from matex_pl.roar.plan import Plan, Run, Training
from matex_pl.training.lora import Lora
from matex_pl.training.module import EARLIER_SETTINGS, ClipModule

_FILES = "model_files/"

Module = TypeVar("Module", bound=ClipModule)


class Stopwatch(Callback):
    """Callback that measures the seconds in training steps and counts their pairs.

    A step lasts from the batch on its device to the updated weights. The last step of an epoch also waits for the work
    that is left on a GPU. `tick` is called after each step.
    """

    def __init__(self, tick: Callable[[], None] = lambda: None) -> None:
        self.seconds, self.pairs, self._start = 0.0, 0, 0.0
        self._tick = tick

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        if trainer.is_last_batch:
            synchronize(pl_module.device)
        self.seconds += time.perf_counter() - self._start
        self.pairs += self.count(batch)
        self._tick()

    def count(self, batch: Any) -> int:
        """Number of pairs in a batch."""
        return len(batch["id"])


class RoarModule(ClipModule):
    """`ClipModule` that fills dropped patches and replaces dropped tokens.

    Patches are filled in the model's normalized frame. A batch may hold `drop_patches` `(B, Gh, Gw)` and `drop_tokens`
    `(B, T)` bool.
    """

    fill: str = "mean_image"

    def inputs(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Normalized images `(B, 3, H, W)` with dropped patches filled, tokens `(B, T)` with pads for dropped ones."""
        images, tokens = super().inputs(batch)
        patches, words = batch.get("drop_patches"), batch.get("drop_tokens")
        if isinstance(patches, Tensor):
            filled = fill_images(self.fill, self.clip, images)
            images = torch.where(enlarge_grid(patches, images)[:, None], filled, images)
        if isinstance(words, Tensor):
            tokens = drop_tokens(tokens, words, self.clip.pad_id)
        return images, tokens


def train_run(plan: Plan, images: PlanImages, run: Run, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Fine-tune from the plan's weights and validate; the scores depend on the plan and the run alone.

    `tick` is called after each step.

    Returns:
        `loss` of validation, the other validation scores as `metrics`, `units` dropped per pair, and times.

    Raises:
        ValueError: If the loss is not finite.
    """
    start = time.perf_counter()
    protocol, training = plan.protocol, plan.training
    with _isolated(training):
        seed = protocol.seed + run.repeat
        torch.manual_seed(seed)
        train, val = split_rows(images.pairs, protocol.train_share, seed)
        drop = drop_of(plan, images, run)
        module, stopwatch = build_module(plan, images.findings), Stopwatch(tick)
        trainer = Trainer(
            # If a loss is not finite, the last weights before it are saved here.
            default_root_dir=plan.path(run),
            accelerator=training.accelerator,
            # The GPU of the training that RoarPlus follows.
            devices=[torch.cuda.current_device()] if uses_cuda(training.accelerator) else 1,
            precision=training.precision,  # type: ignore[arg-type]
            max_epochs=training.epochs,
            check_val_every_n_epoch=training.epochs,
            gradient_clip_val=training.gradient_clip_val or None,
            num_sanity_val_steps=0,
            callbacks=[stopwatch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            images.loader(
                train,
                training.batch_size,
                drop,
                shuffle=True,
                generator=torch.Generator().manual_seed(seed),
                # Leave out an incomplete last batch, unless it is the only one.
                drop_last=len(train) >= training.batch_size,
            ),
            images.loader(val, training.batch_size, drop if protocol.corrupt_val else {}),
        )
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not math.isfinite(scores["val/loss"]):
        raise ValueError(f"The validation loss of {run.id} is {scores['val/loss']}. Lower training.lr.")
    # A score may be undefined on few images, for example an AUROC if all have the finding.
    known = {name: value for name, value in scores.items() if name.startswith("val/") and math.isfinite(value)}
    return {
        "run": run.id,
        "loss": known.pop("val/loss"),
        "metrics": known,
        "train_loss": scores["train/loss"],
        "units": sum(part[train].flatten(1).sum(1).double().mean().item() for part in drop.values()),
        "train_pairs": len(train),
        "val_pairs": len(val),
        "steps": trainer.global_step,
        "seconds": time.perf_counter() - start,
        "training_seconds": stopwatch.seconds,
    }


def build_module(plan: Plan, findings: Sequence[str] = ()) -> RoarModule:
    """Module that a run trains, with the plan's start weights; `findings` are used if the weights have none."""
    training = plan.training
    module = read_module(
        plan.folder / "start.safetensors",
        RoarModule,
        lr=training.lr,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        freeze="all-but-head" if training.finetune == "head" else "none",
        grad_checkpointing=training.grad_checkpointing,
        # It would guide by boxes on removed patches, and only the models that were trained with it.
        guidance=None,
    )
    module.fill = plan.protocol.fill
    module.hparams["findings"] = module.hparams["findings"] or list(findings)
    if training.finetune == "lora":
        module.add_adapters(Lora(r=training.lora_rank, alpha=2 * training.lora_rank))
        module.train()
    return module


def write_module(module: ClipModule, path: Path) -> None:
    """Write weights (adapters merged) and settings of a module, and the files of its tokenizer, for `read_module`."""
    weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    settings = dict(module.hparams)
    if settings["lora"]:
        weights, settings["lora"] = merge_adapters(weights, settings["lora"]), None
    files = {f"{_FILES}{name}": data for name, data in model_files(module.clip).items()}
    write_tensors(path, weights | files, {"settings": settings})


def read_module(path: Path, kind: type[Module], **settings: Any) -> Module:
    """Module from a file of `write_module`, with some settings replaced."""
    tensors, about = read_tensors(path)
    settings = EARLIER_SETTINGS | about["settings"] | settings
    files = {name.removeprefix(_FILES): data for name, data in tensors.items() if name.startswith(_FILES)}
    config = json.loads(settings["name"])
    with unpacked(config, files) as local:
        module = kind(**settings | {"name": json.dumps(local), "betas": tuple(settings["betas"])})
    # The files of the temporary folder are the module's own.
    module.clip.config, module.clip.files = config, files
    module.hparams["name"] = settings["name"]
    module.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(_FILES)})
    return module


@contextmanager
def _isolated(training: Training) -> Iterator[None]:
    """Context with its own random numbers and number of threads, and a silent Trainer; restored at the end."""
    threads_before, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(training.threads)
    try:
        with isolate_rng(include_cuda=uses_cuda(training.accelerator)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        torch.set_num_threads(threads_before)
        logger.setLevel(level)
