"""Synthetic chest radiographs with exact boxes and the phrases that describe them."""

from typing import TYPE_CHECKING

from matex_pl import lazy_names

if TYPE_CHECKING:
    from matex_pl.data.phantom.cache import film_cache
    from matex_pl.data.phantom.film import Film, PlacedFinding, draw_film
    from matex_pl.data.phantom.findings import FINDINGS
    from matex_pl.data.phantom.phrases import write_phrase
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "film_cache": "cache",
            "Film": "film",
            "PlacedFinding": "film",
            "draw_film": "film",
            "FINDINGS": "findings",
            "write_phrase": "phrases",
        },
    )

__all__ = [
    "FINDINGS",
    "Film",
    "PlacedFinding",
    "draw_film",
    "film_cache",
    "write_phrase",
]
