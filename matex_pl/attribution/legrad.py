"""Gradients by the attention of every layer, each read for itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution.core.capture import GradBlock, capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import gradient_by_attention, gradients_of
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod


class LeGrad(TwoTowerMethod):
    """LeGrad (Bousselham et al. 2024): mean over blocks, heads and queries of max(0, ds_l/dA_l).

    s_l is the score that the tower's own head gives when it reads the tokens behind block l, and A_l the attention of
    that block alone. An attention pool counts as one more block.

    Released code: takes the last two blocks unless told otherwise, reads CLIP's layers by the mean of all tokens, where
    this reads what the tower reads, and under an attention pool differentiates the pool's attention alone. No text.

    Args:
        num_blocks: Last blocks that count; all by default.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    cost: ClassVar[str] = "1 forward, 1 backward, and the tower's head once per block"

    def __init__(self, num_blocks: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive(num_blocks=1 if num_blocks is None else num_blocks)
        self.num_blocks = num_blocks

    def trace(self, tower: Tower) -> Trace:
        """One forward in which each block begins anew, so that its score depends on its own attention alone."""
        stream = Stream(tower.blocks)
        start = 0 if self.num_blocks is None else max(tower.depth - self.num_blocks, 0)
        own = range(start, len(tower.blocks))
        with stream.capture(cut=own), capture_attention(tower.pooling, grad_from=start) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            counted = grad_blocks(blocks)
            rows: list[Tensor] = []
            if own:
                with torch.enable_grad(), stream.resumed(own[-1], torch.cat(stream.behind[start:])):
                    reads = tower.encode_stream(len(own))
                rows += _rows(tower, counted[: len(own)], reads, direction, len(own))
            if tower.depth > len(tower.blocks):
                rows += _rows(tower, counted[-1:], embedding, direction)
            return Relevance(torch.stack(rows).mean(0))

        return Trace(embedding, relevance_for)


def _rows(tower: Tower, blocks: list[GradBlock], embedding: Tensor, direction: Tensor, copies: int = 1) -> list[Tensor]:
    """`(B, length)` per block."""
    gradients = gradients_of(embedding, [block.output for block in blocks], direction, copies=copies)
    pairs = zip(blocks, gradients, strict=True)
    return [tower.pooling.to_map(gradient_by_attention(*pair).relu().mean((1, 2))) for pair in pairs]
