"""Relevance that is passed from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.capture import capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import first_row, gradient_by_attention, gradients_of
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.towers import Pooling


class Chefer(TwoTowerMethod):
    """Transformer-MM-Explainability (Chefer, Gur and Wolf 2021).

    R <- R + mean over heads of max(0, A * dS/dA) times R, from the first of the blocks on; the map is what is read of R
    (the class token's or the end of text's row). dS/dA of all blocks comes from one backward, as <dS/do, v>. An
    attention pool's query is no token: its row of max(0, A * dS/dA) begins the product.

    Released code: a backward per layer, half precision on a GPU, and the cosine times exp(logit_scale), which is
    `target="logit"`; it divides the words by their sum. Only class tokens and ends of text are read there.

    Args:
        start_layer: First block whose attention counts, by index from 0 or from the end; -1, the last block, is the
            default of the authors' CLIP code, 0 takes all.
        target: `cosine`, `margin`, or `logit` (as the authors' code: the cosine times the model's logit scale). With
            several blocks the map depends on that scale, because each block adds to the identity.
        kwargs: `references` of `TwoTowerMethod`.
    """

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
        """One forward, recording the attention of the blocks that count."""
        start = block_index(self.start_layer, tower.depth)
        with capture_attention(tower.pooling, grad_from=start) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            scale = tower.clip.logit_scale.exp() if self.target == "logit" else 1
            counted = grad_blocks(blocks)
            gradients = gradients_of(embedding, [block.output for block in counted], direction * scale)
            # Mean over heads of max(0, A * dS/dA), `(B, m, n)`.
            passed = [
                (block.attention() * gradient_by_attention(block, gradient)).relu().mean(1)
                for block, gradient in zip(counted, gradients, strict=True)
            ]
            return Relevance(_relevance(passed, tower.pooling))

        return Trace(embedding, relevance_for)


def _relevance(passed: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """What is read of R at the tokens of the map, `(B, length)`.

    Where tokens are averaged it is that of R - I: the identity gives each of them the same, which drowns the rest.
    """
    start, passed = first_row(passed, pooling)
    row = start if pooling.kind == "query" else torch.zeros_like(start)
    for matrix in reversed(passed):
        step = torch.einsum("bn,bnm->bm", start, matrix)
        start, row = start + step, row + step
    return pooling.to_map(row)
