"""Worker process of `matex roar run --processes`: `python -m matex_pl.roar FOLDER SHARD`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from matex_pl.roar.plan import read_plan, take_shard
from matex_pl.roar.work import work_alone


def main(folder: str, shard: str) -> None:
    """Work on the runs of a plan until all have ended or the parent process ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plan = read_plan(Path(folder))
    work_alone(plan, take_shard(plan.runs(), shard), pool=str(os.getppid()))


def _end_with_parent() -> None:
    # The other end of this pipe closes when the parent ends, for any reason.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
