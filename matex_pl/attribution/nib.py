"""A bottleneck without noise that narrows in the token stream of either tower (NIB)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution.core.relevance import gradients_of
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.attribution.m2ib import run_to_bottleneck
from matex_pl.clip.encoders import Reads
from matex_pl.console import progress
from matex_pl.maps import full_precision


class Nib(TwoTowerMethod):
    """NIB (Zhu et al. 2025, arXiv:2502.14889): gradients integrated while a bottleneck without noise narrows.

    After a block each token h becomes `z = lambda h`. One lambda serves all tokens and goes from 1 to 0. The value of a
    token is the sum over channels of `h` times the mean of dS/dz over `lambda = 1/steps, 2/steps, ..., 1`. The map is
    the signed value, min-maxed. Only the blocks after the bottleneck run again, for many lambdas at once, and all
    phrases of an image share these forwards. In phrases the bottleneck acts on the same tokens as in `M2ib`.

    The formula is that of the released code. The equations of the paper were not available for a check. By its reviews
    the paper derives an integral over lambda from a bottleneck of M2IB's form, whose noise goes to zero.

    Released code has the same sum, layer, number of steps and sign. Differences:

    - It runs one lambda at a time.
    - It min-maxes the special tokens of a phrase too.
    - It supports class tokens on 7 by 7 patches, and phrases without padding.

    Layer norms undo the scale until lambda is near 0. Therefore few steps can miss most of the score that the
    bottleneck takes away. After the last block of most towers, the values of patches are nearly 0.

    Args:
        block: Index of the block before the bottleneck, from 0 or from the end (-4: index 8 of 12). A negative index
            below the first block gives the first.
        steps: Number of values of lambda.
        chunk_size: Maximum number of samples in one forward and backward; the batch size if that is larger.
        kwargs: `target` and `references` of `TwoTowerMethod`.

    `parts` holds

    - `signed` `(B, N)` and `text_signed` `(B, T)`, the values of the patches and of the content tokens
    - `completeness_error` and `text_completeness_error` `(B,)`, the total of all tokens of the bottleneck minus S with
      an open bottleneck plus S with a closed one
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward, and `steps` forwards and backwards of the blocks after `block`"

    def __init__(self, block: int = -4, steps: int = 10, chunk_size: int = 80, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive(steps=steps, chunk_size=chunk_size)
        self.block = block
        self.steps = steps
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the tokens after the block."""
        stream, place, embedding, hidden, counted = run_to_bottleneck(tower, self.block)
        counted = counted[..., None]
        clean = full_precision(hidden)

        def embeddings(shares: Tensor, shift: Tensor) -> Tensor:
            """Unit embeddings `(k * B, D)` with `lambda h + shift` after the block, for k shares lambda."""
            narrowed = torch.where(counted, shares.view(-1, 1, 1, 1) * clean, clean) + shift
            with stream.resumed(place, narrowed.to(hidden).flatten(0, 1)):
                return tower.encode_stream(len(shares))

        def relevance_for(direction: Tensor) -> Relevance:
            total = torch.zeros_like(clean)
            steps = torch.arange(1, self.steps + 1).to(clean) / self.steps
            for shares in progress(steps.split(max(1, self.chunk_size // len(direction))), "steps"):
                # The gradient by a shift of all copies is the sum of their gradients.
                with torch.enable_grad():
                    shift = torch.zeros_like(clean).requires_grad_()
                    found = embeddings(shares, shift)
                total = total + gradients_of(found, [shift], direction, copies=len(shares))[0]
            signed = (clean * counted * total / self.steps).sum(-1, keepdim=True)
            closed = full_precision(embeddings(torch.zeros_like(steps[:1]), torch.zeros_like(clean)))
            gain = ((full_precision(embedding) - closed) * direction).sum(-1)
            error = signed.flatten(1).sum(1) - gain
            values = tower.tokens_of(signed)[..., 0] * tower.keep
            return Relevance(values, {"signed": values, "completeness_error": error})

        return Trace(embedding, relevance_for)
