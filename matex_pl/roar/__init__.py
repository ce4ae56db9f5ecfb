"""ROAR+: remove what a map marks, train again, and see what the model lost. What `matex roar` runs."""

from matex_pl.roar.run import CellsFailedError, collect_roar, roar_status, run_roar

__all__ = ["CellsFailedError", "collect_roar", "roar_status", "run_roar"]
