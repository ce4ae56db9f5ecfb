"""Attention multiplied through the layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from matex_pl.attribution.core.capture import capture_attention
from matex_pl.attribution.core.relevance import rollout_row
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod


class Rollout(TwoTowerMethod):
    """Attention rollout (Abnar and Zuidema 2020): the product over layers of rownorm(mean over heads of A + I).

    It sees the attention alone: the map of an image is the same for every phrase, and that of a phrase for every image.
    What the embedding is read from begins the product: the pooled token, equal shares, or an attention pool's row.

    Released code: for text encoders, without a choice of row; copies of it for CLIP often start at the last layer, and
    then show that layer's attention.
    """

    cost: ClassVar[str] = "1 forward"

    def __init__(self) -> None:
        super().__init__()

    def trace(self, tower: Tower) -> Trace:
        """One forward, recording all attention."""
        with capture_attention(tower.pooling, full=True) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            row = rollout_row([block.mean for block in blocks], tower.pooling)
            return Relevance(row.expand(len(direction), -1))

        return Trace(embedding, relevance_for)
