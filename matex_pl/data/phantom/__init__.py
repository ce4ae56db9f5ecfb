"""Synthetic chest radiographs with exact boxes and the phrases that describe them."""

from matex_pl.data.phantom.cache import film_cache
from matex_pl.data.phantom.film import Film, PlacedFinding, draw_film
from matex_pl.data.phantom.findings import FINDINGS
from matex_pl.data.phantom.phrases import write_phrase

__all__ = ["FINDINGS", "Film", "PlacedFinding", "draw_film", "film_cache", "write_phrase"]
