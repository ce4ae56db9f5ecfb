"""Who works on which cell: a lease that runs out unless it is renewed, so that no cell is run twice or lost."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from matex_pl.files import write_text

SECONDS = 120.0
_LEASE, _RESULT = "lease.json", "result.json"


@contextmanager
def leased(root: Path, folder: Path, seconds: float = SECONDS) -> Iterator[bool]:
    """Work on a cell, if nobody else does and it has no result: gives True, and renews the lease until the end.

    Leases are taken and renewed under one lock of the plan, which the system lifts from a process that dies. A lease
    holds until it runs out; one of a process of this machine that is gone does not.

    Args:
        root: Folder of the plan.
        folder: Of the cell.
        seconds: How long a lease holds.
    """
    owner = uuid4().hex
    if not _take(root, folder, owner, seconds):
        yield False
        return
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(root, folder, owner, seconds, done), daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        done.set()
        renewing.join()
        with _locked(root):
            if _read(folder).get("owner") == owner:
                (folder / _LEASE).unlink()


def is_leased(folder: Path) -> bool:
    """Somebody works on the cell."""
    lease = _read(folder)
    if not lease or lease["until"] < time.time():
        return False
    return lease["host"] != socket.gethostname() or _is_alive(lease["pid"])


def _locked(root: Path) -> FileLock:
    return FileLock(root / ".lock")


def _take(root: Path, folder: Path, owner: str, seconds: float) -> bool:
    with _locked(root):
        if (folder / _RESULT).is_file() or is_leased(folder):
            return False
        _write(folder, owner, seconds)
        return True


def _renew(root: Path, folder: Path, owner: str, seconds: float, done: threading.Event) -> None:
    while not done.wait(seconds / 4):
        with _locked(root):
            if _read(folder).get("owner") != owner:
                return
            _write(folder, owner, seconds)


def _write(folder: Path, owner: str, seconds: float) -> None:
    lease = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "until": time.time() + seconds}
    write_text(folder / _LEASE, json.dumps(lease))


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _LEASE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
