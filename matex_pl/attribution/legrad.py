"""Gradients by the attention of each layer, one layer at a time (LeGrad)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution.core.capture import GradBlock, capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import gradient_by_attention, gradients_of
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads


class LeGrad(TwoTowerMethod):
    """LeGrad (Bousselham et al. 2024): mean over blocks, heads and queries of `max(0, ds_l/dA_l)`.

    s_l is the score of the tower's own head on the tokens after block l. A_l is the attention of that block alone. An
    attention pool counts as one more block.

    Released code differs:

    - It uses the last two blocks by default.
    - It reads each layer of CLIP as the mean of all tokens; here each layer is read as the tower pools.
    - Under an attention pool it differentiates the attention of the pool alone.
    - It does not support text.

    Args:
        num_blocks: Number of last blocks that count; all by default.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward, 1 backward, and the tower's head once per block"

    def __init__(self, num_blocks: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive(num_blocks=1 if num_blocks is None else num_blocks)
        self.num_blocks = num_blocks

    def trace(self, tower: Tower) -> Trace:
        """Run one forward with the graph cut before each block, which isolates the attention of each block."""
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
    """Map rows `(B, length)`, one per block."""
    gradients = gradients_of(embedding, [block.output for block in blocks], direction, copies=copies)
    pairs = zip(blocks, gradients, strict=True)
    return [tower.pooling.to_map(gradient_by_attention(*pair).relu().mean((1, 2))) for pair in pairs]
