"""A map as arrays in an `.npz` file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from matex_pl import __version__
from matex_pl.files import MARK, whole_file
from matex_pl.viewer.placed import PlacedMap


def save_arrays(path: str | Path, placed: PlacedMap) -> Path:
    """Write a map as `.npz` and return its path. `numpy.load(path, allow_pickle=False)` reads it.

    The arrays:

    - `matex_pl`: version of the package, text.
    - `map`: `(h, w)` float32 in [0, 1], on the pixels of the stored image, x to the right, y down.
    - `boxes`: `(K, 4)` float64 `x0, y0, x1, y1` of the map at the threshold, in pixels of the stored image.
    - `threshold`, `threshold_source`: level of the boxes, and where it comes from.
    - `tokens`, `token_relevance`: `(T,)` word pieces and their relevance in [0, 1].
    - `words`, `word_relevance`: `(N,)` words and their relevance.
    - `word_maps`: `(N, h', w')` float32 signed maps of the words over the whole image, at most 384 pixels long;
      only for methods with interactions of words and patches.
    - `phrase`, `method`, `score`: phrase, name of the method, and cosine of the pair.
    - `settings`: JSON text.

    Args:
        path: Destination.
        placed: The map.
    """
    path = Path(path)
    arrays = {
        # The first member names this package: `check_output` recognizes the file by it.
        MARK: np.array(__version__),
        "map": placed.heat,
        "boxes": placed.boxes,
        "threshold": np.float64(placed.threshold),
        "threshold_source": np.array(placed.threshold_source),
        "tokens": np.array(list(placed.tokens), dtype=np.str_),
        "token_relevance": np.asarray(placed.relevance, np.float32),
        "words": np.array(list(placed.words), dtype=np.str_),
        "word_relevance": np.asarray(placed.word_relevance, np.float32),
        "phrase": np.array(placed.phrase),
        "method": np.array(placed.method),
        "score": np.float64(placed.score),
        "settings": np.array(placed.settings_text),
    }
    if placed.word_maps is not None:
        arrays["word_maps"] = placed.word_maps
    # By a handle: NumPy adds a suffix to names.
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path
