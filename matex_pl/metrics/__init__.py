"""Attribution quality: pure functions in `functional`, torchmetrics classes over them here."""

from matex_pl.metrics.attribution import ConfidenceDrop, ConfidenceIncrease, ContrastToNoise, MapMass, PointingGame

__all__ = ["ConfidenceDrop", "ConfidenceIncrease", "ContrastToNoise", "MapMass", "PointingGame"]
