"""Synthetic chest radiographs with exact boxes and the phrases that describe them."""

from typing import TYPE_CHECKING

from matex_pl import lazy_names

if TYPE_CHECKING:
    from matex_pl.data.phantom.cache import phantom_cache
    from matex_pl.data.phantom.findings import FINDINGS
    from matex_pl.data.phantom.image import Phantom, PlacedFinding, draw_phantom
    from matex_pl.data.phantom.phrases import write_phrase
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "phantom_cache": "cache",
            "Phantom": "image",
            "PlacedFinding": "image",
            "draw_phantom": "image",
            "FINDINGS": "findings",
            "write_phrase": "phrases",
        },
    )

__all__ = [
    "FINDINGS",
    "Phantom",
    "PlacedFinding",
    "draw_phantom",
    "phantom_cache",
    "write_phrase",
]
