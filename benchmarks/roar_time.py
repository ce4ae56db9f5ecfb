"""Time of a plan of `matex roar`: seconds per run, their change over the runs, and the share outside training.

python benchmarks/roar_time.py roar/phantom
"""

from __future__ import annotations

import argparse
from pathlib import Path

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


def measured(plan: Plan, processes: int) -> str:
    """Times of all finished runs as text."""
    ended = {plan.path(run) / RESULT: found for run in plan.runs() if (found := result(plan, run)) is not None}
    order = sorted(ended, key=lambda path: path.stat().st_mtime)
    seconds = np.array([ended[path]["seconds"] for path in order])
    training = sum(ended[path]["training_seconds"] for path in order)
    third = max(len(seconds) // 3, 1)
    begun, maps, last = (
        path.stat().st_mtime for path in (plan.folder / "plan.json", plan.folder / "refused.json", order[-1])
    )
    return "\n".join(
        [
            f"{len(order)} of {len(plan.runs())} runs, {seconds.mean():.1f} s each (deviation {seconds.std():.1f}).",
            f"First third {seconds[:third].mean():.1f} s, last third {seconds[-third:].mean():.1f} s a run.",
            f"Outside of training steps: {1 - training / seconds.sum():.1%} of the runs' time,",
            f"{1 - training / (processes * (last - maps)):.1%} from the first run to the last,",
            f"{1 - training / (processes * (last - begun)):.1%} with the maps, which took {maps - begun:.0f} s.",
            f"{(last - begun) / 60:.1f} minutes from the plan to the last run.",
        ]
    )


if __name__ == "__main__":
    main()
