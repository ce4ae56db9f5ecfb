"""Cells on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from matex_pl.roar.plan import Cell, Plan, read_plan
from matex_pl.roar.work import work_here


@dataclass
class RayOptions:
    """How cells are put on a Ray cluster, whose machines all see the plan's folder under the same path.

    Args:
        address: Of the cluster, `auto` or `ray://host:port`; one on this machine by default.
        num_cpus: CPUs of a cell; the training's threads by default.
        num_gpus: GPUs of a cell, also parts of one.
        retries: How often a cell is started again whose machine was lost.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float = 0.0
    retries: int = 2


def work_on_ray(plan: Plan, cells: Sequence[Cell], options: RayOptions) -> None:
    """Run the cells as tasks of a Ray cluster, and wait for all of them.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("executor='ray' needs Ray: pip install 'matex_pl[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=options.address, log_to_driver=False, include_dashboard=False)
    try:
        task = ray.remote(_work).options(
            num_cpus=plan.training.threads if options.num_cpus is None else options.num_cpus,
            num_gpus=options.num_gpus,
            max_retries=options.retries,
        )
        waiting: list[Any] = [task.remote(str(plan.folder.resolve()), cell) for cell in cells]
        bar = tqdm(total=len(cells), desc="cells", disable=None)
        while waiting:
            ended, waiting = ray.wait(waiting)
            # Raises what took the task itself down; what fails within a cell is kept in its folder.
            ray.get(ended)
            bar.update(len(ended))
        bar.close()
    finally:
        if started:
            ray.shutdown()


def _work(folder: str, cell: Cell) -> None:
    """One cell, on a machine of the cluster."""
    work_here(read_plan(Path(folder)), [cell])
