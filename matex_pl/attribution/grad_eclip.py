"""Gradients times values with a loosened spatial weight (Grad-ECLIP)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.capture import capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import gradients_of, loosened_term, row_weights
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads


class GradEclip(TwoTowerMethod):
    """Grad-ECLIP (Zhao et al. 2024): sum over channels of `dS/do * v_i`, weighted by `norm(cos(q, k_i))`, clipped at 0.

    q, k, v and o (the attention's output before its projection) are the concatenated heads of a block. The gradient is
    that of the pooled row. Over several blocks, the clipped maps of an image are summed, and the sum of a phrase's maps
    is clipped, as in the released code. Released code differs:

    - It explains a copy of the tower whose last blocks attend with one head over the full width; here the heads stay as
      deployed.
    - For phrases it computes `norm()` over all positions, here over the content, and divides by the sum.

    Args:
        image_blocks: Number of last blocks of the image tower that count.
        text_blocks: Number of last blocks of the text tower that count; all blocks if the tower has fewer.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward and a backward through image_blocks and text_blocks blocks"

    def __init__(
        self,
        image_blocks: int = 1,
        text_blocks: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive(image_blocks=image_blocks, text_blocks=text_blocks)
        self.image_blocks = image_blocks
        self.text_blocks = text_blocks

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording q, k, v and o of the last blocks."""
        number = self.image_blocks if isinstance(tower, ImageTower) else self.text_blocks
        start = block_index(-number, tower.depth)
        with capture_attention(tower.pooling, grad_from=start) as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            counted = grad_blocks(blocks)
            gradients = gradients_of(embedding, [block.output for block in counted], direction)
            weights = row_weights(blocks, tower.pooling)[start:]
            triples = zip(counted, gradients, weights, strict=True)
            terms = torch.stack([loosened_term(*triple, tower.pooling, tower.keep) for triple in triples])
            return Relevance(terms.relu().sum(0) if isinstance(tower, ImageTower) else terms.sum(0).relu())

        return Trace(embedding, relevance_for)
