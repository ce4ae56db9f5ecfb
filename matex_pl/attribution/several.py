"""Maps of several methods for the same pairs, with shared work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from matex_pl.attribution.base import AttributionMethod
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
) -> dict[str, Attribution]:
    """Maps of B pairs by each method; the arguments are those of `AttributionMethod.attribute`.

    Settings of MATEX that `Matex.fuse` can reach from earlier ones share their forward and backward.
    """
    maps: dict[str, Attribution] = {}
    for name, method in methods.items():
        maps[name] = _fused(method, maps.values()) or method.attribute(clip, images, tokens, phrases, content_box)
    return maps


def _fused(method: AttributionMethod, made: Iterable[Attribution]) -> Attribution | None:
    """Maps of MATEX from the parts of an earlier setting; None if there is no such setting."""
    if type(method) is not Matex:
        return None
    parts = (found.parts for found in made if "grad_blocks" in found.parts)
    return next((Matex.fuse(part, **method.settings) for part in parts if not method.lacks(part)), None)
