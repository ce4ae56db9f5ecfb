"""Comparison of attribution methods on a checkpoint, the command `matex benchmark`."""

from matex_pl.benchmark.run import run_benchmark

__all__ = ["run_benchmark"]
