"""Maps of the model's frame on the pixels of the stored image, for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from matex_pl.clip.model import Clip
from matex_pl.explain.phrases import ExplainedImage
from matex_pl.viewer.placed import PlacedMap


def place_maps(clip: Clip, explained: ExplainedImage, method: str, settings: Mapping[str, Any]) -> Iterator[PlacedMap]:
    """The maps of an image on its stored pixels, one at a time, with the boxes and words of `explain.json`.

    Args:
        clip: CLIP model.
        explained: Image and maps.
        method: Name of the method.
        settings: Settings of a folder, see `folder_settings`.
    """
    threshold = settings["threshold"]
    shown = {name: settings[name] for name in ("version", "model", "method", "threshold")}
    image, maps = explained.image, explained.maps
    for row, numbers in enumerate(explained.numbers(threshold["value"])):
        content = maps.content[row]
        yield PlacedMap(
            heat=image.transform.map_on_image(explained.heats[row], image.size).clip(0, 1),
            phrase=explained.batch["phrase"][row],
            method=method,
            score=numbers["score"],
            threshold=threshold["value"],
            threshold_source=threshold["source"],
            boxes=np.array([[box[edge] for edge in ("x0", "y0", "x1", "y1")] for box in numbers["boxes"]]).reshape(
                -1, 4
            ),
            tokens=clip.pieces(explained.tokens[row][content]),
            relevance=maps.text[row][content].tolist(),
            words=[word["text"] for word in numbers["words"]],
            word_relevance=[word["share"] for word in numbers["words"]],
            word_maps=explained.shown_word_maps(row),
            settings=shown,
        )
