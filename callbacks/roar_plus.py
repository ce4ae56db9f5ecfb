"""Remove and retrain at the end of a training."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg

from matex_pl.arguments import check_choices
from matex_pl.attribution.shipped import load_method
from matex_pl.callbacks.loggers import log_images, log_session, log_text
from matex_pl.callbacks.reader import Reader
from matex_pl.console import duration
from matex_pl.data import ChestXrayDataModule
from matex_pl.report.results import RoarMethod, RoarResult
from matex_pl.report.roar import roar_figure, roar_tables
from matex_pl.roar.finetune import Stopwatch, read_module, write_module
from matex_pl.roar.foreign import GatheredPairs, module_of
from matex_pl.roar.make import check_plan_folder, make_plan, plan_methods
from matex_pl.roar.plan import Protocol, Training
from matex_pl.roar.run import write_results
from matex_pl.roar.work import prepare_maps, work_here
from matex_pl.training.module import ClipModule

log = logging.getLogger(__name__)

_BEFORE = "before.safetensors"


class RoarPlus(Stopwatch):
    """Run ROAR+ at the end of `fit`: remove the parts that the maps mark, retrain, and log the rise of the loss.

    The maps are those of the trained weights. The callback first logs the number of runs and their estimated time. The
    runs follow one after the other, with the trainer's accelerator and precision. The trainer's loggers get

    - a curve per method and modality, `roar/<modality>/<method>`: score over percent dropped, with the deviation over
      repeats as `/std`
    - a picture of the curves
    - the table as text
    - hyper-parameters with the final scores

    In a training with several processes the callback only writes the plan and prints the command that runs it.

    Args:
        methods: Names of shipped methods and YAML files.
        protocol: Removal protocol and number of repeats; pairs come from the data module of the training.
        training: Fine-tuning of each run; accelerator and precision are those of the trainer.
        start: Start weights of each run: those `before` the training, or `after` it.
        out: Folder of the plan; `roar` in the log folder by default. An existing plan is continued.
        reader: Where the model is in the LightningModule, and images and phrases in its batches. Without it, the module
            is a `ClipModule`, and the data module is one of this package. With it, the pairs are read from the loaders,
            in gray levels, and at most `protocol.num_pairs` of each split stay in memory.
        architecture: Name or config of the model in open_clip, for a model of open_clip in memory, which does not know
            its own.
    """

    def __init__(
        self,
        methods: list[str] | None = None,
        protocol: Protocol | None = None,
        training: Training | None = None,
        start: Literal["before", "after"] = "before",
        out: str | None = None,
        reader: Reader | None = None,
        architecture: str | None = None,
    ) -> None:
        super().__init__()
        check_choices(RoarPlus.__init__, locals())
        self.methods = methods or ["matex", "m2ib", "grad_cam", "chefer", "saliency"]
        self.protocol = protocol or Protocol()
        self.training = training or Training()
        self.start = start
        self.out = out
        self.reader = reader
        self.architecture = architecture
        self._folder = Path()
        # Refuses unknown and repeated names before the training.
        plan_methods(self.methods, boxed=0, pairs=0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module, data and folder, and save the weights before the training."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if self.reader is not None:
            self.reader.check(trainer, pl_module)
        elif not isinstance(data, ChestXrayDataModule) or not isinstance(pl_module, ClipModule):
            raise TypeError(
                "RoarPlus needs a ClipModule and a data module of matex_pl, got "
                f"{type(pl_module).__name__} and {type(data).__name__}. For other modules and loaders, name the places "
                "of model, images and phrases: RoarPlus(reader=Reader(...))."
            )
        # The log folder is broadcast, so all processes must read it.
        self._folder = Path(self.out or Path(trainer.log_dir or trainer.default_root_dir) / "roar")
        check_plan_folder(self._folder)
        # Refuses a foreign model before the training. A resumed training keeps the start weights of the first one,
        # because no checkpoint is restored yet.
        module = self._module(pl_module)
        if self.start == "before" and trainer.is_global_zero:
            write_module(module, self._folder / _BEFORE)

    def count(self, batch: Any) -> int:
        """Number of pairs in a batch of the training."""
        return super().count(batch) if self.reader is None else self.reader.count(batch)

    def _module(self, pl_module: Any) -> ClipModule:
        """The training's own module, or a copy of a foreign model as one."""
        return pl_module if self.reader is None else module_of(self.reader.clip_of(pl_module), self.architecture)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Name the methods that do not support the model, which ROAR+ leaves out.

        Raises:
            NotImplementedError: No method supports the model.
        """
        reasons = {}
        for name in self.methods:
            try:
                load_method(name).check_model((self.reader or Reader()).clip_of(pl_module))
            except NotImplementedError as error:
                reasons[name] = error
        if len(reasons) == len(self.methods):
            raise next(iter(reasons.values()))
        for name, reason in reasons.items():
            rank_zero_warn(f"RoarPlus: {name} does not support the model and will be left out: {reason}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the start weights of a training that was refused before its first step."""
        if trainer.is_global_zero and trainer.global_step == 0 and self._folder != Path():
            (self._folder / _BEFORE).unlink(missing_ok=True)
            with suppress(OSError):
                self._folder.rmdir()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the plan, run it and log the scores; with several processes, print the command that runs it."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        device, precision = trainer.strategy.root_device.type, str(trainer.precision)
        training = replace(self.training, accelerator=device, precision=precision)
        is_before = self.start == "before"
        explained = self._module(pl_module)
        start = read_module(self._folder / _BEFORE, ClipModule) if is_before else explained
        data = trainer.datamodule
        if self.reader is not None:
            data = GatheredPairs(self.reader.gather(trainer, pl_module, self.protocol.splits, self.protocol.num_pairs))
        origins = {"checkpoint": f"end of epoch {trainer.current_epoch}", "start_checkpoint": f"{self.start} training"}
        plan = make_plan(self._folder, data, explained, start, self.methods, self.protocol, training, origins)
        number, steps = len(plan.runs()), plan.steps()
        times = "."
        if self.pairs:
            seconds = self.seconds / self.pairs * steps * training.batch_size * number
            times = f", about {duration(seconds)} plus the time of the maps."
        log.info(f"ROAR+: {number} fine-tunings of {steps} steps{times}")
        if trainer.world_size > 1:
            log.info(f"The plan is in {plan.folder}. Run it with: matex roar run --plan {plan.folder}")
            return
        # Lightning has moved module and optimizer to the CPU by now.
        prepare_maps(plan)
        work_here(plan, plan.runs())
        result = write_results(plan)
        for failed in result.failed:
            rank_zero_warn(f"The run {failed.run} failed: {failed.error} See {plan.folder}/{failed.log}.")
        log_roar(trainer.loggers, result)


def log_roar(loggers: Iterable[Any], result: RoarResult) -> None:
    """Log scores, curves, tables and hyper-parameters of ROAR+ to the loggers that accept them.

    Scalars are `roar/<modality>/<method>` and `roar/<modality>/<method>/std`, with the percent dropped as the step.
    Pictures are `roar/<modality>`, and the text is `roar/table`. TensorBoard gets the settings with the means over the
    fractions as a session of its own, `roar`, below that of the trainer, whose hyper-parameters do not change.
    """
    loggers = list(loggers)
    means: dict[str, float] = {}
    for modality in result.modalities:
        steps: dict[int, dict[str, float]] = defaultdict(dict)
        for tag, row in _tagged(result, modality).items():
            if row.mean.value is not None:
                means[f"{tag}/mean"] = row.mean.value
            for point in row.points:
                if point.value is not None:
                    scalars = steps[round(100 * point.fraction)]
                    scalars[tag] = point.value
                    if point.std is not None:
                        scalars[f"{tag}/std"] = point.std
        for step, scalars in steps.items():
            for logger in loggers:
                logger.log_metrics(scalars, step=step)
        canvas = FigureCanvasAgg(roar_figure(result, modality))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            canvas.draw()
        log_images(loggers, f"roar/{modality}", np.asarray(canvas.buffer_rgba())[..., :3].copy(), 0)
    text = roar_tables(result)
    settings = {
        f"roar/{name}": value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for name, value in (result.settings.plain() | {"explained": result.model.explained[:12]}).items()
        if value is not None
    }
    for logger in loggers:
        log_text(logger, "roar/table", text, 0)
        log_session(logger, "roar", settings, means)
        logger.save()


def _tagged(result: RoarResult, modality: str) -> dict[str, RoarMethod]:
    """Rows by a tag of letters, digits, `_`, `.` and `-`, which every logger accepts; each row has its own tag."""
    rows: dict[str, RoarMethod] = {}
    for row in result.methods(modality):
        tag = f"roar/{modality}/" + (re.sub(r"[^A-Za-z0-9.-]+", "_", row.name).strip("_") or "method")
        rows[tag if tag not in rows else f"{tag}-{len(rows)}"] = row
    return rows
