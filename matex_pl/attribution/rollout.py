"""Attention matrices multiplied through the layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from matex_pl.attribution.core.capture import capture_attention
from matex_pl.attribution.core.relevance import rollout_rows
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads


class Rollout(TwoTowerMethod):
    """Attention rollout (Abnar and Zuidema 2020): product over layers of `rownorm(mean over heads of A + I)`.

    The method uses the attention alone. The map of an image is the same for every phrase, and the map of a phrase for
    every image. The product starts at the pooled token, at equal shares, or at an attention pool's row.

    Released code is for text encoders, without a choice of row. Copies for CLIP often start at the last layer and then
    show the attention of that layer.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward"

    def __init__(self) -> None:
        super().__init__()

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording all attention."""
        with capture_attention(tower.pooling, full=True) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            row = rollout_rows([block.mean for block in blocks], tower.pooling)[:, -1]
            return Relevance(row.expand(len(direction), -1))

        return Trace(embedding, relevance_for)
