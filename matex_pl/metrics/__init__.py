"""Attribution quality: pure functions in `functional`, torchmetrics classes over them here.

`removal` runs the model on images and phrases with parts taken away, `sanity` on randomized parameters.
"""

from matex_pl.metrics.confidence import ConfidenceDrop, ConfidenceIncrease, DeletionAUC, InsertionAUC, RemovalDrop
from matex_pl.metrics.localization import (
    AveragePrecision50,
    BoxAccuracy,
    ContrastToNoise,
    EnergyPointingGame,
    MeanIoU,
    PointingGame,
    RelevanceRankAccuracy,
    ThresholdedIoU,
)
from matex_pl.metrics.sensitivity import MapMass, OutsideMass, RankCorrelation, SideSensitivity

# Names of before 0.2.
EnergyInBox, RankAccuracy = EnergyPointingGame, RelevanceRankAccuracy

__all__ = [
    "AveragePrecision50",
    "BoxAccuracy",
    "ConfidenceDrop",
    "ConfidenceIncrease",
    "ContrastToNoise",
    "DeletionAUC",
    "EnergyPointingGame",
    "InsertionAUC",
    "MapMass",
    "MeanIoU",
    "OutsideMass",
    "PointingGame",
    "RankCorrelation",
    "RelevanceRankAccuracy",
    "RemovalDrop",
    "SideSensitivity",
    "ThresholdedIoU",
]
