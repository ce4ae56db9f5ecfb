"""Runs on a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matex_pl.roar.plan import Plan, Run, Training, read_plan
from matex_pl.roar.work import POLL_SECONDS, Progress, note_death, work_alone

# Ray sends no usage statistics, and under `uv run` does not copy the working directory to the machines.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@dataclass
class RayOptions:
    """Options of a Ray cluster, whose machines all have this package and the plan under the same path.

    Args:
        address: Address of the cluster, `auto` or `ray://host:port`; a cluster on this machine by default.
        num_cpus: Number of CPUs per run; the training's threads by default.
        num_gpus: Number of GPUs per run; fractions are allowed.
        retries: Number of restarts of a run whose process or machine is lost.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float = 0.0
    retries: int = 2

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus", "retries"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"ray.{name} must not be negative, got {getattr(self, name)}.")


def check_gpus(training: Training, options: RayOptions) -> None:
    """Raise if runs train on a GPU that Ray does not assign to them."""
    if training.accelerator in ("gpu", "cuda") and not options.num_gpus:
        raise ValueError(
            f"training.accelerator is {training.accelerator!r}, but ray.num_gpus is 0. Set the number of GPUs per run, "
            "for example ray.num_gpus=1, or 0.5 for two runs on each GPU."
        )


def work_on_ray(plan: Plan, runs: Sequence[Run], options: RayOptions) -> None:
    """Work on runs as tasks of a Ray cluster, until all have ended on any machine; see `work_alone`.

    If the process of a task dies more often than `retries`, its run has failed.

    Raises:
        ConnectionError: If there is no cluster at the address.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    started, on_end = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if started:
        try:
            ray.init(**init_settings(options.address))
        except ConnectionError as error:
            raise ConnectionError(
                f"No Ray cluster answers at {options.address!r}. Check --ray.address, or leave it out to run on this "
                "machine."
            ) from error
    task = ray.remote(_work).options(
        num_cpus=plan.training.threads if options.num_cpus is None else options.num_cpus,
        num_gpus=options.num_gpus,
        max_retries=options.retries,
    )
    with Progress(plan, runs) as progress:
        waiting: dict[Any, Run] = {}
        try:
            for run in runs:
                waiting[task.remote(str(plan.folder.resolve()), run)] = run
            while waiting:
                ended, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
                for reference in ended:
                    run = waiting.pop(reference)
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayError as error:
                        # The task itself died. A failure within the run is already in its folder.
                        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                        note_death(plan, run, f"{error}\n{reason}")
                progress.show()
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if started:
                ray.shutdown()
                if threading.current_thread() is threading.main_thread():
                    # Ray replaces this handler and does not restore it.
                    signal.signal(signal.SIGTERM, on_end)


def init_settings(address: str | None) -> dict[str, Any]:
    """Arguments of `ray.init`; only a new cluster gets the option for its dashboard."""
    settings = {"address": address, "log_to_driver": False, "logging_level": logging.WARNING}
    return settings if address else settings | {"include_dashboard": False}


def _work(folder: str, run: Run) -> None:
    work_alone(read_plan(Path(folder)), [run])
