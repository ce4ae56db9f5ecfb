"""Running the cells of a plan: each by whoever takes its lease first, none twice, and what fails is kept by name."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from matex_pl.files import write_text
from matex_pl.roar.cell import load_explained, run_cell
from matex_pl.roar.films import PlanFilms
from matex_pl.roar.lease import is_leased, leased
from matex_pl.roar.plan import Cell, Plan, read_plan
from matex_pl.roar.units import make_maps

_POLL_SECONDS = 1.0
_RESULT, _ERROR = "result.json", "error.log"


def prepare_maps(plan: Plan) -> None:
    """Make the maps of all methods, once; others that come meanwhile wait. A method that refuses the model is noted."""
    with FileLock(plan.folder / ".maps.lock"):
        if (plan.folder / "refused.json").is_file():
            return
        films, clip = PlanFilms(plan.folder), load_explained(plan).clip
        if plan.training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            clip = clip.to("cuda")
        refused = {}
        for row in plan.rows:
            try:
                if row.method is not None:
                    make_maps(plan, films, row, clip)
            except NotImplementedError as error:
                refused[row.name] = str(error)
        write_text(plan.folder / "refused.json", json.dumps(refused))


def result(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """What a cell found; None while it has no end."""
    path = plan.path(cell) / _RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def failure(plan: Plan, cell: Cell) -> str | None:
    """The last line of why a cell failed; None if it did not, or succeeded since."""
    path = plan.path(cell) / _ERROR
    if not path.is_file() or (plan.path(cell) / _RESULT).is_file():
        return None
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no message"


def work_here(plan: Plan, cells: Sequence[Cell]) -> None:
    """Run those of the cells that nobody else runs, one after the other, until all of them have ended somewhere."""
    films, pending, tried = PlanFilms(plan.folder), list(cells), set()
    bar = tqdm(total=len(cells), desc="cells", disable=None)
    while pending:
        for cell in pending:
            with leased(plan.folder, plan.path(cell)) as mine:
                if mine and cell not in tried:
                    tried.add(cell)
                    attempt(plan, films, cell)
        ended = [cell for cell in pending if cell in tried or _has_ended(plan, cell)]
        bar.update(len(ended))
        pending = [cell for cell in pending if cell not in ended]
        if pending:
            time.sleep(_POLL_SECONDS)
    bar.close()


def _has_ended(plan: Plan, cell: Cell) -> bool:
    return result(plan, cell) is not None or (failure(plan, cell) is not None and not is_leased(plan.path(cell)))


def attempt(plan: Plan, films: PlanFilms, cell: Cell) -> None:
    """Run a cell and keep its result, or why there is none."""
    folder = plan.path(cell)
    try:
        write_text(folder / _RESULT, json.dumps(run_cell(plan, films, cell), allow_nan=False))
    except Exception:
        # One broken cell must not take the others with it; it is named at the end, and never averaged over.
        write_text(folder / _ERROR, traceback.format_exc())


def work_in_processes(plan: Plan, cells: Sequence[Cell], processes: int) -> None:
    """The same in several processes of this machine."""
    context = get_context("spawn")
    workers = [context.Process(target=_worker, args=(plan.folder, list(cells))) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    broken = [worker.exitcode for worker in workers if worker.exitcode]
    if len(broken) == len(workers):
        raise RuntimeError(f"All {processes} processes ended early, with the exit codes {broken}.")


def _worker(folder: Path, cells: Sequence[Cell]) -> None:
    work_here(read_plan(folder), cells)
