"""ROAR+: remove what a map marks, train again, and see what the model lost. What `matex roar` runs."""

from matex_pl.roar.cluster import RayOptions
from matex_pl.roar.plan import Protocol, Training
from matex_pl.roar.run import RunsFailedError, collect_roar, roar_status, run_roar

__all__ = ["Protocol", "RayOptions", "RunsFailedError", "Training", "collect_roar", "roar_status", "run_roar"]
