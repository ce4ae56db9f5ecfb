"""Attribution methods compared on a checkpoint: what `matex benchmark` runs."""

from matex_pl.benchmark.run import run_benchmark

__all__ = ["run_benchmark"]
