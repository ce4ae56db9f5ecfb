"""Attention multiplied through the layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from matex_pl.attribution.core.capture import capture_attention
from matex_pl.attribution.core.relevance import rollout_row
from matex_pl.attribution.core.two_tower import Look, Raw, Side, TwoSided


class Rollout(TwoSided):
    """Attention rollout (Abnar and Zuidema 2020): the product over layers of rownorm(mean over heads of A + I).

    It sees the attention alone: the map of a film is the same for every phrase, and that of a phrase for every film.
    What the embedding is read from begins the product: the pooled token, equal shares, or an attention pool's row.

    Released code: for text encoders, without a choice of row; copies of it for CLIP often start at the last layer, and
    then show that layer's attention.
    """

    cost: ClassVar[str] = "1 forward"

    def __init__(self) -> None:
        super().__init__()

    def look(self, side: Side) -> Look:
        """One forward, recording all attention."""
        with capture_attention(side.reading, full=True) as blocks:
            embedding = side.encode()

        def find(direction: Tensor) -> Raw:
            row = rollout_row([block.mean for block in blocks], side.reading)
            return Raw(row.expand(len(direction), -1))

        return embedding, find
