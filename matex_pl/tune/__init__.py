"""The settings of MATEX that suit a model and its images: what `matex tune` runs."""

from matex_pl.tune.run import tune_matex

__all__ = ["tune_matex"]
