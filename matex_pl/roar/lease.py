"""Who works on which cell: a lease that runs out unless it is renewed, so that no cell is run twice or lost."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from matex_pl.files import write_text

# Long beside the difference of the clocks of two machines, by which a lease seems shorter or longer.
SECONDS = 120.0
LEASE, RESULT = "lease.json", "result.json"


@dataclass(frozen=True)
class Lease:
    """The right to write a cell's files, for as long as nobody else has taken it.

    Args:
        root: Folder of the plan.
        folder: Of the cell.
        owner: Tells this lease from others.
    """

    root: Path
    folder: Path
    owner: str

    def write(self, name: str, text: str) -> bool:
        """Write a file of the cell. A process that slept until its lease went to another one writes nothing."""
        with _locked(self.root):
            if not self._holds():
                return False
            write_text(self.folder / name, text)
            return True

    def renew(self, seconds: float) -> bool:
        """Hold it from now on; False if another one has it."""
        with _locked(self.root):
            if not self._holds():
                return False
            _write(self.folder, self.owner, seconds)
            return True

    def give_up(self) -> None:
        """Let others take the cell."""
        with _locked(self.root):
            if self._holds():
                (self.folder / LEASE).unlink()

    def _holds(self) -> bool:
        return _read(self.folder).get("owner") == self.owner


@contextmanager
def leased(root: Path, folder: Path, seconds: float = SECONDS) -> Iterator[Lease | None]:
    """Work on a cell, if nobody else does and it has no result: gives the lease, which is renewed until the end.

    Leases are taken and renewed under one lock of the plan, which the system lifts from a process that dies. A lease
    holds until it runs out; one of a process of this machine that is gone does not.

    Args:
        root: Folder of the plan.
        folder: Of the cell.
        seconds: How long a lease holds.
    """
    lease = _take(root, folder, seconds)
    if lease is None:
        yield None
        return
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, seconds, done), daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        done.set()
        renewing.join()
        lease.give_up()


def is_leased(folder: Path) -> bool:
    """Somebody works on the cell."""
    lease = _read(folder)
    if not lease or lease["until"] < time.time():
        return False
    return lease["host"] != socket.gethostname() or _is_alive(lease["pid"])


def is_leased_by(folder: Path, pid: int) -> bool:
    """The lease of the cell, whether it holds or not, is of this process of this machine."""
    lease = _read(folder)
    return lease.get("pid") == pid and lease["host"] == socket.gethostname()


def sweep(root: Path, folders: Sequence[Path]) -> None:
    """Remove what processes that died have left in the folders of cells: their leases, and files half written."""
    with _locked(root):
        for folder in folders:
            if not is_leased(folder):
                _clear(folder)


def _locked(root: Path) -> FileLock:
    return FileLock(root / ".lock")


def _take(root: Path, folder: Path, seconds: float) -> Lease | None:
    with _locked(root):
        if (folder / RESULT).is_file() or is_leased(folder):
            return None
        _clear(folder)
        lease = Lease(root, folder, uuid4().hex)
        _write(folder, lease.owner, seconds)
        return lease


def _clear(folder: Path) -> None:
    # All that is written here is written under the lock: what is half written under it is of a process that died.
    for path in [folder / LEASE, *folder.glob(".*.part")]:
        path.unlink(missing_ok=True)


def _renew(lease: Lease, seconds: float, done: threading.Event) -> None:
    while not done.wait(seconds / 4) and lease.renew(seconds):
        pass


def _write(folder: Path, owner: str, seconds: float) -> None:
    lease = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "until": time.time() + seconds}
    write_text(folder / LEASE, json.dumps(lease))


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / LEASE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        # A machine that loses power may leave an empty file.
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
