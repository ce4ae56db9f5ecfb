"""A map on the pixels of its stored image, with the words and numbers that belong to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matex_pl.visualization.draw import single_line

RESEARCH = "Research, not for diagnosis"


@dataclass(frozen=True)
class PlacedMap:
    """A map on the pixels of its stored image.

    Args:
        heat: `(h, w)` float32 map in [0, 1], x to the right, y down; 0 where the model saw nothing of the image.
        phrase: Phrase that the map explains.
        method: Name of the attribution method.
        score: Cosine of image and phrase.
        threshold: Level in (0, 1) of the outlines and boxes.
        threshold_source: Where the threshold comes from, such as "default".
        boxes: `(K, 4)` boxes `x0, y0, x1, y1` of the map at the threshold, in pixels of the stored image.
        tokens: The T word pieces of the phrase.
        relevance: T values in [0, 1].
        words: The N words of the phrase as written.
        word_relevance: N values in [0, 1].
        word_maps: `(N, h', w')` float32 signed maps of the words over the whole image, smaller than `heat`; None for
            methods without them.
        settings: Values for JSON: settings of the method, the model, the fit of the image.
    """

    heat: NDArray[np.float32]
    phrase: str
    method: str
    score: float
    threshold: float
    threshold_source: str = "default"
    boxes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    tokens: Sequence[str] = ()
    relevance: Sequence[float] = ()
    words: Sequence[str] = ()
    word_relevance: Sequence[float] = ()
    word_maps: NDArray[np.float32] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level_text(self) -> str:
        """The threshold and its source in words."""
        return f"outlines and boxes at {self.threshold:.2f} of the map ({self.threshold_source})"

    @property
    def settings_text(self) -> str:
        """The settings as JSON in one line."""
        return json.dumps(self.settings, sort_keys=True)

    def text(self, length: int) -> str:
        """Phrase and method in one line of at most `length` bytes; see `shorten`."""
        return shorten(f"{self.method}: {self.phrase}", length)


def shorten(text: str, length: int) -> str:
    """A text in one line of at most `length` bytes in UTF-8, without backslashes, which separate values in DICOM."""
    line = single_line(text).replace("\\", "/")
    if len(line.encode()) <= length:
        return line
    # Some programs count bytes, not characters. A character that is cut apart goes.
    return line.encode()[: length - 3].decode(errors="ignore").rstrip() + "..."
