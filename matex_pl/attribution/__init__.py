"""Methods that say where a CLIP model looked and which words mattered."""

from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.controls import CenterMap, PriorOnly
from matex_pl.attribution.matex import Matex

__all__ = ["AttributionMethod", "CenterMap", "Matex", "PriorOnly"]
