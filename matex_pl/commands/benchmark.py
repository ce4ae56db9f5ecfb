"""`matex benchmark`: comparison of attribution methods on a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from matex_pl.benchmark import run_benchmark
from matex_pl.commands.options import run_on_data


def main(words: Sequence[str]) -> None:
    """`matex benchmark --config FILE --ckpt_path FILE --out FOLDER`: compare methods and print a summary."""
    print(run_on_data("benchmark", run_benchmark, words))
