"""Where the thorax usually is on a phantom, from how phantoms are drawn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from matex_pl.data.phantom.canvas import Canvas, Field
from matex_pl.data.phantom.film import film_build
from matex_pl.data.phantom.thorax import SIDES, heart_outline, lung_outline


@lru_cache(maxsize=4)
def thorax_share(size: int = 192, *, seed: int = 0, num_films: int = 400) -> Field:
    """Share of the first films of a series on which pleural cavities or heart cover a place, `(size, size)` in [0, 1].

    Only outlines are drawn, no films: some hundred take a fraction of a second. The array is kept, and read-only.

    Args:
        size: Side of the films in pixels.
        seed: Which series.
        num_films: How many films are counted.
    """
    covered = np.zeros((size, size), np.int32)
    for index in range(num_films):
        build = film_build(index, seed)
        canvas = Canvas(size, midline=build.midline, tilt=build.tilt)
        organs = [heart_outline(build), *(lung_outline(build, side) for side in SIDES)]
        covered += canvas.fill(organs) > 0.5
    share = (covered / num_films).astype(np.float32)
    share.setflags(write=False)
    return share
