"""Callbacks that explain the model while it learns."""

if __name__ != "matex_pl.callbacks":
    raise ImportError(f"Import matex_pl.callbacks, not {__name__}: otherwise each class would exist twice.")

from matex_pl.callbacks.attribution_maps import AttributionMaps
from matex_pl.callbacks.attribution_metrics import AttributionMetrics
from matex_pl.callbacks.map_writer import MapWriter
from matex_pl.callbacks.prediction_writer import PredictionWriter
from matex_pl.callbacks.roar_plus import RoarPlus

__all__ = ["AttributionMaps", "AttributionMetrics", "MapWriter", "PredictionWriter", "RoarPlus"]
