"""Remove and retrain at the end of a training."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from matex_pl.arguments import check_choice
from matex_pl.callbacks.loggers import log_images, log_session, log_text
from matex_pl.console import duration
from matex_pl.data import ChestXrayDataModule
from matex_pl.report.results import RoarMethod, RoarResult
from matex_pl.report.roar import roar_figure, roar_tables
from matex_pl.roar.finetune import read_module, write_module
from matex_pl.roar.make import make_plan
from matex_pl.roar.plan import Plan, Protocol, Training
from matex_pl.roar.run import write_results
from matex_pl.roar.work import prepare_maps, work_here
from matex_pl.training.module import ClipModule

STARTS = ("before", "after")


class RoarPlus(Callback):
    """ROAR+ at the end of `fit`: what does the model lose when what the maps mark is removed and it is trained again?

    The maps are those of the trained weights. It says beforehand how many fine-tunings there will be and about how long
    they take, runs them one after the other with the trainer's accelerator and precision, and logs to the run's own
    loggers a curve per method and modality (`roar/<modality>/<method>`, score over percent dropped, with the deviation
    over repeats as `/std`), their picture, the table as text, and hyper-parameters with the final scores. In a
    training of several processes it writes the plan and prints the command that runs it.

    Args:
        methods: Names of shipped methods and YAML files.
        protocol: What is removed, and how often; pairs come from the data module of the training.
        training: The fine-tuning of each run; accelerator and precision are those of the trainer.
        start: The weights that each run starts from: those `before` the training, or `after` it.
        out: Folder of the plan; `roar` in the run's log folder by default. A plan that is there is gone on with.
    """

    def __init__(
        self,
        methods: list[str] | None = None,
        protocol: Protocol | None = None,
        training: Training | None = None,
        start: Literal["before", "after"] = "before",
        out: str | None = None,
    ) -> None:
        check_choice("start", start, STARTS)
        self.methods = methods or ["matex", "m2ib", "grad_cam", "chefer", "saliency"]
        self.protocol = protocol or Protocol()
        self.training = training or Training()
        self.start = start
        self.out = out
        self._folder = Path()
        self._seconds, self._pairs, self._begun = 0.0, 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and keep the weights before the training."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, ChestXrayDataModule) or not isinstance(pl_module, ClipModule):
            raise TypeError(
                "RoarPlus needs a ClipModule and a data module of matex_pl, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        # Processes agree on the log folder, so all of them ask for it, and here, where all of them are.
        self._folder = Path(self.out or Path(trainer.log_dir or trainer.default_root_dir) / "roar")
        # Before a checkpoint is restored, so that a resumed run has the same as the one that it goes on with.
        if self.start == "before" and trainer.is_global_zero:
            write_module(pl_module, self._folder / "before.safetensors")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the training, to say how long the runs will take."""
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the training, to say how long the runs will take."""
        self._seconds += time.perf_counter() - self._begun
        self._pairs += len(batch["id"])

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Make the plan, run it and log what came out; with several processes, say how to run it."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        plan = self._plan(trainer, pl_module)
        number, steps = len(plan.runs()), plan.steps()
        rank_zero_info(
            f"ROAR+: {number} fine-tunings of {steps} steps"
            + (f", about {duration(self._estimate(plan) * number)} and the time of the maps." if self._pairs else ".")
        )
        if trainer.world_size > 1:
            rank_zero_info(f"The plan is in {plan.folder}. Run it with: matex roar run --plan {plan.folder}")
            return
        prepare_maps(plan)
        work_here(plan, plan.runs())
        result = write_results(plan)
        for failed in result.failed:
            rank_zero_warn(f"The run {failed.run} failed: {failed.error} See {plan.folder}/{failed.log}.")
        log_roar(trainer.loggers, result)

    def _plan(self, trainer: Any, module: Any) -> Plan:
        folder = self._folder
        device = trainer.strategy.root_device.type
        training = replace(self.training, accelerator=device, precision=str(trainer.precision))
        start = read_module(folder / "before.safetensors") if self.start == "before" else module
        about = {"checkpoint": f"end of epoch {trainer.current_epoch}", "start_checkpoint": f"{self.start} training"}
        return make_plan(folder, trainer.datamodule, module, start, self.methods, self.protocol, training, about)

    def _estimate(self, plan: Plan) -> float:
        """Seconds of a run, by the pace of the training."""
        return self._seconds / self._pairs * plan.steps() * plan.training.batch_size


def log_roar(loggers: Iterable[Any], result: RoarResult) -> None:
    """Scores, curves, tables and hyper-parameters of ROAR+ to Lightning's loggers, each as far as it takes them.

    Scalars are `roar/<modality>/<method>` and `roar/<modality>/<method>/std` with the percent dropped as the step,
    pictures `roar/<modality>`, the text `roar/table`. TensorBoard gets the settings with the means over the fractions
    as a session of its own, `roar` beneath the run, so that the hyper-parameters of the run stay as they are.

    Args:
        loggers: E.g. `trainer.loggers`.
        result: Results of ROAR+.
    """
    loggers = list(loggers)
    means: dict[str, float] = {}
    for modality in result.modalities:
        tagged = _tagged(result, modality)
        means |= {f"{tag}/mean": row.mean.value for tag, row in tagged.items() if row.mean.value is not None}
        for step, scores in _steps(tagged).items():
            for logger in loggers:
                logger.log_metrics(scores, step=step)
        log_images(loggers, f"roar/{modality}", _pixels(roar_figure(result, modality)), 0)
    text = roar_tables(result)
    for logger in loggers:
        log_text(logger, "roar/table", text, 0)
        log_session(logger, "roar", _settings(result), means)
        logger.save()


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as `(h, w, 3)` uint8."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _tagged(result: RoarResult, modality: str) -> dict[str, RoarMethod]:
    """Rows by a tag of letters, digits, `_`, `.` and `-`, which every logger takes; each row has its own."""
    found: dict[str, RoarMethod] = {}
    for row in result.methods(modality):
        tag = f"roar/{modality}/" + (re.sub(r"[^A-Za-z0-9.-]+", "_", row.name).strip("_") or "method")
        found[tag if tag not in found else f"{tag}-{len(found)}"] = row
    return found


def _steps(tagged: Mapping[str, RoarMethod]) -> dict[int, dict[str, float]]:
    """Scalars by step, the percent dropped."""
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for tag, row in tagged.items():
        for point in row.points:
            if point.value is not None:
                scalars = steps[round(100 * point.fraction)]
                scalars[tag] = point.value
                if point.std is not None:
                    scalars[f"{tag}/std"] = point.std
    return steps


def _settings(result: RoarResult) -> dict[str, Any]:
    """The settings as flat texts and numbers."""
    plain = result.settings.plain() | {"explained": result.model.explained[:12]}
    return {
        f"roar/{name}": value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for name, value in plain.items()
        if value is not None
    }
