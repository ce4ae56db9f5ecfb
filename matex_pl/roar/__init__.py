"""ROAR+ (remove and retrain): the loss of a model retrained without the parts that a map marks; `matex roar`."""

from matex_pl.roar.cluster import RayOptions
from matex_pl.roar.plan import Protocol, Training
from matex_pl.roar.run import RunsFailedError, collect_roar, roar_status, run_roar

__all__ = ["Protocol", "RayOptions", "RunsFailedError", "Training", "collect_roar", "roar_status", "run_roar"]
