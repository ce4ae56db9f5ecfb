"""Metrics of attribution quality: torchmetrics classes, over pure functions in `functional`.

`removal` scores images and phrases with parts removed, `sanity` randomizes the model's parameters.
"""

from matex_pl.metrics.confidence import ConfidenceDrop, ConfidenceIncrease, DeletionAUC, InsertionAUC, RemovalDrop
from matex_pl.metrics.localization import (
    AveragePrecision50,
    BoxAccuracy,
    BoxContrast,
    ContrastToNoise,
    EnergyPointingGame,
    MeanIoU,
    PointingGame,
    RelevanceRankAccuracy,
    ThresholdedIoU,
)
from matex_pl.metrics.sensitivity import MapMass, OutsideMass, RankCorrelation, SideSensitivity, WordLaterality

# Names before 0.2.
EnergyInBox, RankAccuracy = EnergyPointingGame, RelevanceRankAccuracy

__all__ = [
    "AveragePrecision50",
    "BoxAccuracy",
    "BoxContrast",
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
    "WordLaterality",
]
