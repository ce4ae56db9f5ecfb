"""Relevance propagated from block to block (Chefer et al.)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.capture import capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import gradients_of, relevance_rows, weighted_attention
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads


class Chefer(TwoTowerMethod):
    """Transformer-MM-Explainability (Chefer, Gur and Wolf 2021).

    `R <- R + mean over heads of max(0, A * dS/dA) R`, starting at the first counted block. The map is the row of R at
    the pooled token (class token or end of text). One backward gives dS/dA of all blocks, as `<dS/do, v>`. An attention
    pool's query is not a token: the pool's row of `max(0, A * dS/dA)` starts the product.

    Released code differs:

    - It runs a backward per layer, in half precision on a GPU.
    - It explains the cosine times `exp(logit_scale)`, which is `target="logit"` here.
    - It divides the word relevance by its sum.
    - It supports only towers that pool the class token or the end of text.

    Args:
        start_layer: First block whose attention counts, by index from 0 or from the end; 0 counts all. The default -1,
            the last block, is that of the authors' CLIP code.
        target: `cosine`, `margin`, or `logit` (as the authors' code: the cosine times the model's logit scale). With
            several blocks the map depends on that scale, because each block adds to the identity.
        kwargs: `references` of `TwoTowerMethod`.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward and a backward through the blocks from start_layer on"

    def __init__(
        self,
        start_layer: int = -1,
        target: Literal["cosine", "margin", "logit"] = "cosine",
        **kwargs: Any,
    ) -> None:
        check_choices(Chefer.__init__, locals())
        super().__init__(**kwargs)
        self.target = target
        self.start_layer = start_layer

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the attention of the counted blocks."""
        start = block_index(self.start_layer, tower.depth)
        with capture_attention(tower.pooling, grad_from=start) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            scale = tower.clip.logit_scale.exp() if self.target == "logit" else 1
            counted = grad_blocks(blocks)
            gradients = gradients_of(embedding, [block.output for block in counted], direction * scale)
            pairs = zip(counted, gradients, strict=True)
            return Relevance(relevance_rows([weighted_attention(*pair) for pair in pairs], tower.pooling)[:, -1])

        return Trace(embedding, relevance_for)
