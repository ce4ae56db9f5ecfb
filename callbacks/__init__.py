"""Callbacks that explain the model during training."""

if __name__ != "matex_pl.callbacks":
    raise ImportError(f"The module {__name__} would define each class twice. Import matex_pl.callbacks instead.")

from matex_pl.callbacks.attribution_maps import AttributionMaps
from matex_pl.callbacks.attribution_metrics import AttributionMetrics
from matex_pl.callbacks.map_writer import MapWriter
from matex_pl.callbacks.prediction_writer import PredictionWriter
from matex_pl.callbacks.reader import Reader
from matex_pl.callbacks.roar_plus import RoarPlus

__all__ = ["AttributionMaps", "AttributionMetrics", "MapWriter", "PredictionWriter", "Reader", "RoarPlus"]
