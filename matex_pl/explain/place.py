"""Maps of the model's frame on the pixels of the stored image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matex_pl.clip.model import Clip
from matex_pl.data.images import Size
from matex_pl.data.transforms import ImageTransform
from matex_pl.maps import Attribution
from matex_pl.metrics.functional import components
from matex_pl.viewer.placed import PlacedMap

DEFAULT_THRESHOLD = 0.5
"""Level of outlines and boxes where none was chosen on validation pairs."""


def place_maps(
    maps: Attribution,
    transform: ImageTransform,
    size: Size,
    clip: Clip,
    tokens: Tensor,
    phrases: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
    threshold: float = DEFAULT_THRESHOLD,
    threshold_source: str = "default",
) -> list[PlacedMap]:
    """The maps of one image on its stored pixels, with their boxes and words.

    Args:
        maps: Maps of P phrases of one image.
        transform: Transform that placed the image in the model's frame.
        size: Height and width of the stored image.
        clip: CLIP model.
        tokens: `(P, T)` tokens of the phrases.
        phrases: The P phrases.
        method: Name of the method.
        settings: Values for JSON.
        threshold: Level of outlines and boxes.
        threshold_source: Where the threshold comes from.
    """
    placed = []
    for row, phrase in enumerate(phrases):
        heat = transform.map_on_image(maps.image[row].float().cpu().numpy(), size).clip(0, 1)
        found = components(torch.from_numpy(heat)[None], threshold).boxes.double().numpy()
        # Methods from elsewhere may leave the words out.
        words = maps.words[row] if maps.phrases else []
        placed.append(
            PlacedMap(
                heat=heat,
                phrase=phrase,
                method=method,
                score=float(maps.score[row]),
                threshold=threshold,
                threshold_source=threshold_source,
                boxes=found * np.array([size[1], size[0]] * 2),
                tokens=clip.pieces(tokens[row][maps.content[row]]),
                relevance=maps.text[row][maps.content[row]].tolist(),
                words=[word.text for word in words],
                word_relevance=[word.share for word in words],
                settings=settings,
            )
        )
    return placed
