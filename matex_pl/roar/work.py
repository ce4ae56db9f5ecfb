"""Work on the runs of a plan: each run by one process that holds its lock, with failures kept by name."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from matex_pl.clip.device import uses_cuda
from matex_pl.console import duration
from matex_pl.files import read_json, write_text
from matex_pl.roar.drop import make_maps
from matex_pl.roar.finetune import read_module, train_run
from matex_pl.roar.images import PlanImages
from matex_pl.roar.plan import Plan, Run
from matex_pl.training.module import ClipModule

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_LINE_SECONDS = 60.0
_LOCK, _PID, RESULT, _ERROR = ".lock", "pid", "result.json", "error.log"
_BROKEN = Path("maps", "broken.json")


def prepare_maps(plan: Plan) -> None:
    """Compute the maps of all methods once; other processes that need them wait.

    A method that does not support the model is recorded. If a method fails, its runs fail too, and the next call
    retries it.
    """
    with FileLock(plan.folder / ".maps.lock"):
        if has_maps(plan):
            return
        for part in (plan.folder / "maps").rglob(".*.part"):
            part.unlink()
        images = PlanImages(plan.folder)
        clip = read_module(plan.folder / "explained.safetensors", ClipModule).eval().clip
        if uses_cuda(plan.training.accelerator):
            clip = clip.to("cuda")
        refused, broken = {}, {}
        for method in plan.methods:
            try:
                if method.method is not None:
                    make_maps(plan, images, method, clip)
            except NotImplementedError as error:
                refused[method.name] = str(error)
            except Exception:
                broken[method.name] = traceback.format_exc()
        write_text(plan.folder / _BROKEN, json.dumps(broken))
        write_text(plan.folder / "refused.json", json.dumps(refused))
        if uses_cuda(plan.training.accelerator):
            # The memory goes to the processes that train.
            del clip
            gc.collect()
            torch.cuda.empty_cache()


def has_maps(plan: Plan) -> bool:
    """Whether all methods that support the model have their maps."""
    return (plan.folder / "refused.json").is_file() and not broken_maps(plan)


def broken_maps(plan: Plan) -> dict[str, str]:
    """Tracebacks by name of the methods whose maps failed."""
    path = plan.folder / _BROKEN
    return read_json(path) if path.is_file() else {}


def result(plan: Plan, run: Run) -> dict[str, Any] | None:
    """Scores and times of a run from `train_run`; None if the run has not ended.

    Raises:
        ValueError: If the file is damaged, for example by a full disk or a power loss.
    """
    path = plan.path(run) / RESULT
    return read_json(path) if path.is_file() else None


def failure(plan: Plan, run: Run) -> str | None:
    """Last line of a run's error log; None if the run has not failed or has a result."""
    path = plan.path(run) / _ERROR
    if not path.is_file() or (plan.path(run) / RESULT).is_file():
        return None
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no message"


def has_ended(plan: Plan, run: Run) -> bool:
    """Whether a run has a result or an error log."""
    return any((plan.path(run) / name).is_file() for name in (RESULT, _ERROR))


@contextmanager
def locked(plan: Plan, run: Run, pool: str = "") -> Iterator[bool]:
    """Hold the lock of a run unless another process does; yields whether the lock is held.

    The system frees the lock when the process ends for any reason. Meanwhile the file `pid` names the process. If
    another process of the `pool` died in the run, the run is left to the parent process.
    """
    folder = plan.path(run)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    is_held = not pool or _holder(plan, run).partition(" ")[2] != f"{socket.gethostname()} {pool}"
    try:
        if is_held:
            _remove_leftovers(folder)
            write_text(folder / _PID, _process(os.getpid(), pool))
        yield is_held
    finally:
        if is_held:
            (folder / _PID).unlink(missing_ok=True)
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove the files that a killed process left in the folder of a run. The caller holds the lock."""
    for path in (folder / _PID, *folder.glob(".*.part")):
        path.unlink(missing_ok=True)


def _process(pid: int, pool: str) -> str:
    return f"{pid} {socket.gethostname()} {pool}"


def _holder(plan: Plan, run: Run) -> str:
    """Process that works on a run or died in it; empty if there is none."""
    path = plan.path(run) / _PID
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def state(plan: Plan, run: Run) -> str:
    """State of a run: `done`, `running`, `failed`, `died` (the process ended before the run) or `left`."""
    folder = plan.path(run)
    if (folder / RESULT).is_file():
        return "done"
    if not _holder(plan, run):
        return "failed" if (folder / _ERROR).is_file() else "left"
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return "died"
    except (PermissionError, Timeout):
        # Another user can read a plan, but cannot test its locks.
        return "running"


def note_death(plan: Plan, run: Run, reason: str) -> None:
    """Record why a process died in a run, as soon as no process works on the run; an existing result is kept."""
    while not has_ended(plan, run):
        with locked(plan, run) as is_held:
            if is_held and not has_ended(plan, run):
                write_text(plan.path(run) / _ERROR, reason)
        if not is_held:
            time.sleep(POLL_SECONDS)


class Progress:
    """Context that shows the number of ended runs, in this process or another one.

    Runs that failed before are retried. On a terminal it shows a bar. Elsewhere it logs a line after the first run, and
    then at most one per minute. The line of a minute without an ended run comes within the run.
    """

    def __init__(self, plan: Plan, runs: Sequence[Run]) -> None:
        self.plan = plan
        self.runs = runs
        for run in runs:
            (plan.path(run) / _ERROR).unlink(missing_ok=True)
        self._bar = tqdm(total=len(runs), desc="runs", unit="run", disable=None)
        self._ended, self._start = 0, time.monotonic()
        # Times of the next line, if a run has ended since the last one and if not.
        self._next_line, self._next_sign = 0.0, self._start + _LINE_SECONDS

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for run in self.plan.runs():
            if _holder(self.plan, run):
                with suppress(Timeout), FileLock(self.plan.path(run) / _LOCK, timeout=0):
                    _remove_leftovers(self.plan.path(run))

    def pending(self) -> list[Run]:
        """Runs that have not ended."""
        return [run for run in self.runs if not has_ended(self.plan, run)]

    def show(self) -> None:
        """Show the number of ended runs."""
        ended = len(self.runs) - len(self.pending())
        self._bar.update(ended - self._ended)
        now, is_more, self._ended = time.monotonic(), ended > self._ended, ended
        if self._bar.disable and ended < len(self.runs) and now >= (self._next_line if is_more else self._next_sign):
            left = f", about {duration((now - self._start) / ended * (len(self.runs) - ended))} left" if ended else ""
            log.info("%d of %d runs have ended%s.", ended, len(self.runs), left)
            self._next_line = self._next_sign = now + _LINE_SECONDS

    def tick(self) -> None:
        """Show the number within a run, once a minute."""
        if self._bar.disable and time.monotonic() >= self._next_sign:
            self.show()


def work_here(plan: Plan, runs: Sequence[Run]) -> None:
    """Work on runs in this process, with a progress bar; see `work_alone`."""
    with Progress(plan, runs) as progress:
        work_alone(plan, runs, progress.show, progress.tick)


def work_alone(
    plan: Plan,
    runs: Sequence[Run],
    show: Callable[[], None] = lambda: None,
    tick: Callable[[], None] = lambda: None,
    pool: str = "",
) -> None:
    """Work on the runs that no other process has, one after the other, until all have ended in any process.

    `show` is called after each run, `tick` after each step. `pool` is as in `locked`.
    """
    images = PlanImages(plan.folder)
    while pending := [run for run in runs if not has_ended(plan, run)]:
        for run in pending:
            with locked(plan, run, pool) as is_held:
                # Another process may have ended the run in the meantime.
                if is_held and not has_ended(plan, run):
                    _attempt(plan, images, run, tick)
            show()
        if not all(has_ended(plan, run) for run in pending):
            time.sleep(POLL_SECONDS)


def _attempt(plan: Plan, images: PlanImages, run: Run, tick: Callable[[], None]) -> None:
    """Train a run, and write its result or its error."""
    folder, on_interrupt = plan.path(run), signal.getsignal(signal.SIGINT)
    broken = broken_maps(plan).get(run.method)
    if broken is not None:
        write_text(folder / _ERROR, broken)
        return
    try:
        write_text(folder / RESULT, json.dumps(train_run(plan, images, run, tick), allow_nan=False))
    except Exception:
        # One failed run must not stop the others. It is named at the end and never averaged over.
        write_text(folder / _ERROR, traceback.format_exc())
    except SIGTERMException:
        # On SIGTERM a Trainer would exit with status 0, as after success.
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as end:
        # The Trainer turns Ctrl-C into SystemExit, and makes the process ignore further Ctrl-C.
        if isinstance(end.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        raise
    finally:
        # A Trainer and its module refer to each other; without a collection their weights would accumulate.
        gc.collect()


def gpu_shares(plan: Plan, processes: int) -> list[dict[str, str]]:
    """Environment variable per process that shows it one of the n visible GPUs: i modulo n; empty without GPUs."""
    if not uses_cuda(plan.training.accelerator):
        return [{}] * processes
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = visible.split(",") if visible else list(map(str, range(count)))
    # One process sees one slice of a GPU (MIG) at most.
    names = names if names[0].startswith("MIG-") else names[:count]
    return [{"CUDA_VISIBLE_DEVICES": names[place % len(names)]} for place in range(processes)]


def work_in_processes(plan: Plan, runs: Sequence[Run], shard: str, processes: int) -> None:
    """Work on a shard in several processes of this machine, which end with this process; see `work_alone`.

    If a process dies in a run, for example for lack of memory, the run has failed, and a new process takes over. `runs`
    are the runs of the shard without a result.
    """
    # Not forked: a fork of a process with threads, or with a GPU in use, may hang. A worker ends when its standard
    # input closes, therefore with this process. A new session keeps Ctrl-C from the workers.
    command = [sys.executable, "-m", "matex_pl.roar", str(plan.folder), shard]

    environments = [os.environ | chosen for chosen in gpu_shares(plan, min(processes, len(runs)))]

    def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)

    with Progress(plan, runs) as progress:
        workers, codes = {start(environment): environment for environment in environments}, []
        try:
            while workers:
                time.sleep(POLL_SECONDS)
                for worker in [worker for worker in workers if worker.poll() is not None]:
                    environment = workers.pop(worker)
                    codes.append(code := worker.returncode)
                    name = _process(worker.pid, str(os.getpid()))
                    run = next((run for run in progress.pending() if _holder(plan, run) == name), None)
                    if code and run:
                        reason = f"with the exit code {code}"
                        if code < 0:
                            signal_name = signal.Signals(-code).name
                            reason = f"by the signal {signal_name}; the system kills processes if memory runs out"
                        note_death(plan, run, f"The process of this run ended early, {reason}.")
                        workers[start(environment)] = environment
                progress.show()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if progress.pending():
        raise ChildProcessError(
            f"All processes ended before their first run, with the exit codes {codes}. Read the reason in their output "
            "above."
        )
