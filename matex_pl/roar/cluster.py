"""Cells on a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matex_pl.roar.plan import Cell, Plan, Training
from matex_pl.roar.work import POLL_SECONDS, Progress, Stamp, note_death, work_alone

# Nothing is sent to Ray's makers, and `uv run` does not make Ray copy the working directory to the machines.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@dataclass
class RayOptions:
    """How cells are put on a Ray cluster, whose machines all have this package, and see the plan under the same path.

    Args:
        address: Of the cluster, `auto` or `ray://host:port`; one on this machine by default.
        num_cpus: CPUs of a cell; the training's threads by default.
        num_gpus: GPUs of a cell, also parts of one.
        retries: How often a cell is started again whose process or machine was lost.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float = 0.0
    retries: int = 2

    def __post_init__(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: Something is.
        """
        for name in ("num_cpus", "num_gpus", "retries"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"ray.{name} must not be negative, got {getattr(self, name)}.")


def check_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        ImportError: It is not installed.
    """
    if find_spec("ray") is None:
        raise ImportError("executor='ray' needs Ray: pip install 'matex_pl[ray]'.")


def check_gpus(training: Training, options: RayOptions) -> None:
    """Refuse cells that train on a GPU which Ray does not give them.

    Raises:
        ValueError: They do.
    """
    if training.accelerator in ("gpu", "cuda") and not options.num_gpus:
        raise ValueError(
            f"training.accelerator is {training.accelerator!r}, but ray.num_gpus is 0. Give the GPUs of a cell, as "
            "ray.num_gpus=1, or 0.5 for two cells on each."
        )


def work_on_ray(plan: Plan, cells: Sequence[Cell], options: RayOptions) -> None:
    """Run those of the cells that nobody else runs as tasks of a Ray cluster, until all have ended somewhere.

    A task whose process died more often than `retries` is its cell's failure.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at the address.
    """
    check_ray()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    started, on_end = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if started:
        ray.init(**init_settings(options.address))
    progress = Progress(plan, cells)
    task = ray.remote(_work).options(
        num_cpus=plan.training.threads if options.num_cpus is None else options.num_cpus,
        num_gpus=options.num_gpus,
        max_retries=options.retries,
    )
    waiting: dict[Any, Cell] = {}
    try:
        for cell in cells:
            waiting[task.remote(str(plan.folder.resolve()), cell, progress.before[cell])] = cell
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for one in ended:
                cell = waiting.pop(one)
                try:
                    ray.get(one)
                except ray.exceptions.RayError as error:
                    # What took the task itself down; what fails within a cell is in its folder by now.
                    note_death(plan, cell, f"{error}\n{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            progress.show()
    finally:
        for one in waiting:
            ray.cancel(one, force=True)
        if started:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                # Ray takes this signal and does not give it back.
                signal.signal(signal.SIGTERM, on_end)
        progress.close()


def init_settings(address: str | None) -> dict[str, Any]:
    """What `ray.init` is called with; a cluster that is there has its dashboard already, or none."""
    settings = {"address": address, "log_to_driver": False, "logging_level": logging.WARNING}
    return settings if address else settings | {"include_dashboard": False}


def _work(folder: str, cell: Cell, before: Stamp) -> None:
    """One cell, on a machine of the cluster."""
    work_alone(Path(folder), [cell], {cell: before})
