"""Synthetic chest radiographs with exact boxes and the phrases that describe them."""

from matex_pl import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FINDINGS": "findings",
        "Phantom": "image",
        "PlacedFinding": "image",
        "draw_phantom": "image",
        "phantom_cache": "cache",
        "write_phrase": "phrases",
    },
)
