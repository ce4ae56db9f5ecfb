"""Running the cells of a plan: each by whoever takes its lease first, none twice, and what fails is kept by name."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from matex_pl.files import write_text
from matex_pl.roar.cell import load_explained, run_cell
from matex_pl.roar.drop import make_maps
from matex_pl.roar.films import PlanFilms
from matex_pl.roar.lease import RESULT, Lease, is_leased, leased
from matex_pl.roar.plan import Cell, Plan, duration, read_plan

POLL_SECONDS = 1.0
_LINE_SECONDS = 60.0
_ERROR = "error.log"

# When the log of a cell's failure was written, and its inode: tells whether a cell failed since. None without a log.
Stamp = tuple[int, int] | None


def prepare_maps(plan: Plan) -> None:
    """Make the maps of all methods, once; others that come meanwhile wait.

    A method that refuses the model is noted. One that fails fails in each of its cells, and is tried again next time.
    """
    with FileLock(plan.folder / ".maps.lock"):
        if has_maps(plan):
            return
        for part in (plan.folder / "maps").rglob(".*.part"):
            part.unlink()
        films, clip = PlanFilms(plan.folder), load_explained(plan).clip
        if plan.training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            clip = clip.to("cuda")
        refused, broken = {}, {}
        for row in plan.rows:
            try:
                if row.method is not None:
                    make_maps(plan, films, row, clip)
            except NotImplementedError as error:
                refused[row.name] = str(error)
            except Exception:
                broken[row.name] = traceback.format_exc()
        write_text(_broken(plan), json.dumps(broken))
        write_text(plan.folder / "refused.json", json.dumps(refused))


def has_maps(plan: Plan) -> bool:
    """The maps of all methods that do not refuse the model are there."""
    return (plan.folder / "refused.json").is_file() and not broken_maps(plan)


def broken_maps(plan: Plan) -> dict[str, str]:
    """Why the maps of methods could not be made, as a traceback, by name."""
    path = _broken(plan)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _broken(plan: Plan) -> Path:
    return plan.folder / "maps" / "broken.json"


def result(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """What a cell found; None while it has no end.

    Raises:
        ValueError: The file is damaged, as by a disk that was full or a machine that lost power.
    """
    path = plan.path(cell) / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and run the plan again.") from error


def failure(plan: Plan, cell: Cell) -> str | None:
    """The last line of why a cell failed; None if it did not, or succeeded since."""
    path = plan.path(cell) / _ERROR
    if not path.is_file() or (plan.path(cell) / RESULT).is_file():
        return None
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no message"


class Progress:
    """How many of the cells have ended, here or elsewhere, since it was made.

    A bar on a terminal; elsewhere a line after the first cell, and then one a minute at most.

    Args:
        plan: The experiment.
        cells: Those of its cells that are counted.
        before: The failures of an earlier run, which do not count; those of now by default.
        has_bar: There is a bar, on a terminal.
    """

    def __init__(
        self, plan: Plan, cells: Sequence[Cell], before: Mapping[Cell, Stamp] | None = None, *, has_bar: bool = True
    ) -> None:
        self.plan = plan
        self.cells = cells
        self.before = {cell: _stamp(plan, cell) for cell in cells} if before is None else before
        self._bar = tqdm(total=len(cells), desc="cells", unit="cell", disable=None if has_bar else True)
        self._ended, self._start, self._next_line = 0, time.monotonic(), 0.0

    def pending(self) -> list[Cell]:
        """The cells that have not ended."""
        return [cell for cell in self.cells if not self.has_ended(cell)]

    def has_ended(self, cell: Cell) -> bool:
        """It has a result, or has failed since, and nobody tries it again."""
        return _has_result(self.plan, cell) or (self.has_failed(cell) and not is_leased(self.plan.path(cell)))

    def has_failed(self, cell: Cell) -> bool:
        """It has failed since."""
        return _stamp(self.plan, cell) != self.before[cell]

    def show(self) -> None:
        """Say how many have ended, if there are more than before."""
        ended = len(self.cells) - len(self.pending())
        self._bar.update(ended - self._ended)
        now, is_more, self._ended = time.monotonic(), ended > self._ended, ended
        if self._bar.disable and is_more and ended < len(self.cells) and now >= self._next_line:
            rest = (now - self._start) / ended * (len(self.cells) - ended)
            print(f"{ended} of {len(self.cells)} cells have ended, about {duration(rest)} left.", file=sys.stderr)
            self._next_line = now + _LINE_SECONDS

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _has_result(plan: Plan, cell: Cell) -> bool:
    return (plan.path(cell) / RESULT).is_file()


def _stamp(plan: Plan, cell: Cell) -> Stamp:
    try:
        status = (plan.path(cell) / _ERROR).stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def work_here(plan: Plan, cells: Sequence[Cell]) -> None:
    """Run those of the cells that nobody else runs, one after the other, until all of them have ended somewhere."""
    progress = Progress(plan, cells)
    try:
        _work(progress, is_shown=True)
    finally:
        progress.close()


def _work(progress: Progress, *, is_shown: bool) -> None:
    plan = progress.plan
    films = PlanFilms(plan.folder)
    while pending := progress.pending():
        for cell in pending:
            with leased(plan.folder, plan.path(cell)) as lease:
                if lease is not None and not progress.has_failed(cell):
                    attempt(plan, films, cell, lease)
            if is_shown:
                progress.show()
        if progress.pending():
            time.sleep(POLL_SECONDS)


def attempt(plan: Plan, films: PlanFilms, cell: Cell, lease: Lease) -> None:
    """Run a cell and keep its result, or why there is none."""
    broken = broken_maps(plan).get(cell.row)
    if broken is not None:
        lease.write(_ERROR, broken)
        return
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        lease.write(RESULT, json.dumps(run_cell(plan, films, cell), allow_nan=False))
    except Exception:
        # One broken cell must not take the others with it; it is named at the end, and never averaged over.
        lease.write(_ERROR, traceback.format_exc())
    except SIGTERMException:
        # A Trainer that a scheduler ends exits with status 0, as if all was done.
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as end:
        # What the Trainer makes of Ctrl-C, which it has the process ignore from then on.
        if isinstance(end.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        raise
    finally:
        # A Trainer and its module hold each other, and the weights: Python would let many of them pile up.
        gc.collect()


def note_death(plan: Plan, cell: Cell, why: str) -> None:
    """Keep why a process died within a cell, as soon as nobody runs it any more; a result from elsewhere stays."""
    while not _has_result(plan, cell):
        with leased(plan.folder, plan.path(cell)) as lease:
            if lease is not None:
                lease.write(_ERROR, why)
                return
        time.sleep(POLL_SECONDS)


def work_alone(folder: Path, cells: Sequence[Cell], before: Mapping[Cell, Stamp]) -> None:
    """The same in a process that another one started, which shows the progress.

    Args:
        folder: Of the plan.
        cells: Those to run.
        before: The failures of an earlier run, of `Progress.before`.
    """
    _work(Progress(read_plan(folder), cells, before, has_bar=False), is_shown=False)
