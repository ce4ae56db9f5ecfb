"""Maps of several methods for the same pairs, with shared work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.controls import Control
from matex_pl.attribution.matex import Matex
from matex_pl.clip.model import Clip
from matex_pl.maps import Attribution


def attribute_methods(
    methods: Mapping[str, AttributionMethod],
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    phrases: Sequence[str],
    content_box: Tensor | None = None,
    chest_box: Tensor | None = None,
) -> dict[str, Attribution]:
    """Maps of B pairs by each method; the arguments are those of `AttributionMethod.attribute`.

    Settings of MATEX that `Matex.fuse` can reach from earlier ones share their forward and backward. Controls take the
    embeddings of an earlier method.
    """
    maps: dict[str, Attribution] = {}
    for name, method in methods.items():
        made = [found.parts for found in maps.values()]
        embeddings = [parts["embeddings"] for parts in made if "embeddings" in parts]
        components = [parts for parts in made if type(method) is Matex and "grad_blocks" in parts]
        fusable = [parts for parts in components if not method.lacks(parts)]  # type: ignore[attr-defined]
        if fusable:
            maps[name] = Matex.fuse(fusable[0], **method.settings)
        elif embeddings and isinstance(method, Control):
            maps[name] = method.draw(clip, images, tokens, phrases, content_box, embeddings[0], chest_box)
        else:
            maps[name] = method.attribute(clip, images, tokens, phrases, content_box, chest_box)
    return maps
