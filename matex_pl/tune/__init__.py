"""Tuning of MATEX settings for a model and its images, the command `matex tune`."""

from matex_pl.tune.run import tune_matex

__all__ = ["tune_matex"]
