"""Cells in several processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from matex_pl.roar.lease import is_leased_by
from matex_pl.roar.plan import Cell, Plan
from matex_pl.roar.work import POLL_SECONDS, Progress, Stamp, note_death, work_alone


def work_in_processes(plan: Plan, cells: Sequence[Cell], processes: int) -> None:
    """Run those of the cells that nobody else runs, some at a time, until all of them have ended somewhere.

    A process that dies within a cell (it takes more memory than there is, say) is that cell's failure; another one
    takes its place.

    Raises:
        ChildProcessError: All processes ended outside of a cell.
    """
    progress = Progress(plan, cells)
    workers = [_start(progress) for _ in range(min(processes, len(cells)))]
    codes = []
    try:
        while workers:
            connection.wait([worker.sentinel for worker in workers], POLL_SECONDS)
            # Asking lets the system forget those that ended: until then their leases are of a process that is there.
            for worker in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(worker)
                codes.append(worker.exitcode)
                if worker.exitcode and _note_death(progress, worker):
                    workers.append(_start(progress))
            progress.show()
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        progress.close()
    if progress.pending():
        raise ChildProcessError(f"All processes ended before their first cell, with the exit codes {codes}; see above.")


def _start(progress: Progress) -> BaseProcess:
    # Not forked: a fork of a process with threads, or with a GPU in use, may hang.
    worker = get_context("spawn").Process(target=_run, args=(progress.plan.folder, progress.cells, progress.before))
    worker.start()
    return worker


def _run(folder: Path, cells: Sequence[Cell], before: Mapping[Cell, Stamp]) -> None:
    """What a process does: Ctrl-C is for the one that started it, with which it ends, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work_alone(folder, cells, before)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _note_death(progress: Progress, worker: BaseProcess) -> bool:
    """Say so in the log of the cell that the process ran; False if it ran none."""
    plan = progress.plan
    for cell in progress.pending():
        if worker.pid is not None and is_leased_by(plan.path(cell), worker.pid):
            note_death(plan, cell, f"The process of this cell ended early, {_reason(worker.exitcode)}.")
            return True
    return False


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"with the exit code {code}"
    return f"by the signal {signal.Signals(-code).name}; the system ends what takes more memory than there is"
