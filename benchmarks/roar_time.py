"""Time of a plan of `matex roar`: seconds per run, their change over the runs, and the share outside training.

python benchmarks/roar_time.py roar/phantom
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matex_pl.roar.plan import Plan, read_plan
from matex_pl.roar.work import RESULT, result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="Folder of the plan.")
    parser.add_argument("--processes", type=int, default=2, help="Number of processes that worked at the same time.")
    arguments = parser.parse_args()
    print(measured(read_plan(arguments.folder), arguments.processes))


class Times(NamedTuple):
    """Times of a plan in seconds.

    Attributes:
        runs: Seconds of each finished run, in the order of their ends.
        training: Sum over the training steps of all runs.
        maps: From the plan to the first run.
        work: From the first run to the last.
    """

    runs: np.ndarray
    training: float
    maps: float
    work: float


def times_of(plan: Plan) -> Times:
    """Times of a plan with finished runs."""
    ended = {plan.path(run) / RESULT: found for run in plan.runs() if (found := result(plan, run)) is not None}
    order = sorted(ended, key=lambda path: path.stat().st_mtime)
    begun, maps, last = (
        path.stat().st_mtime for path in (plan.folder / "plan.json", plan.folder / "refused.json", order[-1])
    )
    training = sum(ended[path]["training_seconds"] for path in order)
    return Times(np.array([ended[path]["seconds"] for path in order]), training, maps - begun, last - maps)


def outside_share(folder: str, processes: int = 2) -> str:
    """Share of the whole time that is no training step, with the maps."""
    times = times_of(read_plan(Path(folder)))
    return f"{1 - times.training / (processes * (times.maps + times.work)):.3f}"


def measured(plan: Plan, processes: int) -> str:
    """Times of all finished runs as text."""
    seconds, training, maps, work = times_of(plan)
    third = max(len(seconds) // 3, 1)
    return "\n".join(
        [
            f"{len(seconds)} of {len(plan.runs())} runs, {seconds.mean():.1f} s each (deviation {seconds.std():.1f}).",
            f"First third {seconds[:third].mean():.1f} s, last third {seconds[-third:].mean():.1f} s a run.",
            f"Outside of training steps: {1 - training / seconds.sum():.1%} of the runs' time,",
            f"{1 - training / (processes * work):.1%} from the first run to the last,",
            f"{1 - training / (processes * (maps + work)):.1%} with the maps, which took {maps:.0f} s.",
            f"{(maps + work) / 60:.1f} minutes from the plan to the last run.",
        ]
    )


if __name__ == "__main__":
    main()
