"""An information bottleneck in the token stream of either tower (M2IB)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.console import progress
from matex_pl.maps import full_precision


class M2ib(TwoTowerMethod):
    """M2IB (Wang, Rudner and Wilson 2023): information that each token must pass through a bottleneck.

    After a block each number h of the stream becomes `z = lambda h + (1 - lambda) eps`, with standard normal noise eps
    and `lambda = sigmoid(alpha)`. Adam optimizes alpha to lower `beta * (mean capacity) - (mean score over copies of
    z)`, with `capacity = -1/2 (1 + log((1 - lambda)^2) - (lambda h)^2 - (1 - lambda)^2)`. The map is the capacity
    summed over the channels. Only the blocks after the bottleneck run again, for all copies at once, and the other
    tower is encoded once. All pairs of a call share the noise.

    In phrases the bottleneck acts on the tokens up to the pooled one, or on all tokens but the padding if the first is
    pooled. Therefore padding does not change the map. Other tokens pass unchanged.

    Released code does the same for an image, pair by pair, with forwards of the whole model. Differences for phrases
    and in numerics:

    - It averages the capacity over all positions, padding included, and min-maxes over the special tokens too.
    - Its wrapper of OpenAI's weights reads the last position and not the end of text.
    - Its `log(1 - lambda)` can underflow to an infinite capacity; the one here cannot.

    Args:
        block: Index of the block before the bottleneck, from 0 or from the end (-3: index 9 of 12). A negative index
            below the first block gives the first.
        beta: Weight of the capacity.
        lr: Learning rate of Adam.
        steps: Number of steps of Adam.
        copies: Number of noise samples per step.
        after_last_update: Whether to use the capacity after the last step. As published it is that of the last forward,
            before the last update.
        seed: Random seed of the noise.
        chunk_size: Maximum number of copies in one forward and backward; the copies of one pair if that is larger.
        kwargs: `target` and `references` of `TwoTowerMethod`.

    `parts` holds `capacity` `(B,)` and `text_capacity` `(B,)`: mean capacity in nats per number of the stream.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward, and `steps` times `copies` forwards and backwards of the blocks after `block`"

    def __init__(
        self,
        block: int = -3,
        beta: float = 0.1,
        lr: float = 1.0,
        steps: int = 10,
        copies: int = 10,
        after_last_update: bool = False,
        seed: int = 0,
        chunk_size: int = 80,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive(beta=beta, lr=lr, steps=steps, copies=copies, chunk_size=chunk_size)
        self.block = block
        self.beta = beta
        self.lr = lr
        self.steps = steps
        self.copies = copies
        self.after_last_update = after_last_update
        self.seed = seed
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the tokens after the block."""
        stream, place, embedding, hidden, counted = run_to_bottleneck(tower, self.block)

        def relevance_for(direction: Tensor) -> Relevance:
            size = max(1, self.chunk_size // self.copies)
            chunks = []
            for rows in progress(torch.arange(len(direction), device=direction.device).split(size), "bottlenecks"):
                # All phrases share one image.
                inputs = rows.clamp(max=len(hidden) - 1)
                part = tower.rows(rows)
                chunks.append(self._capacity(part, stream, place, hidden[inputs], counted[inputs], direction[rows]))
            capacity = torch.cat(chunks)
            mean = capacity.sum((1, 2)) / (counted.sum(1) * capacity.shape[2])
            return Relevance(tower.tokens_of(capacity).sum(-1), {"capacity": mean})

        return Trace(embedding, relevance_for)

    def _capacity(
        self, tower: Tower, stream: Stream, place: int, hidden: Tensor, counted: Tensor, direction: Tensor
    ) -> Tensor:
        """Capacity `(B, n, C)` of each number of the stream, 0 for tokens without a bottleneck."""
        clean, counted = full_precision(hidden), counted[..., None]
        alpha = torch.full_like(clean, 5.0)
        optimizer = torch.optim.Adam([alpha], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        numbers = counted.sum((1, 2)) * clean.shape[2]
        # The noise of a phrase does not depend on the longest phrase of its batch.
        shape = self.copies, 1, max(clean.shape[1], tower.pooling.length), clean.shape[2]
        for _ in range(self.steps if self.after_last_update else self.steps - 1):
            noise = torch.randn(shape, generator=generator)[:, :, : clean.shape[1]].to(clean)
            with torch.enable_grad():
                alpha.requires_grad_()
                share = torch.where(counted, alpha.sigmoid(), 1)
                mixed = torch.lerp(noise, clean, share).to(hidden)
                with stream.resumed(place, mixed.flatten(0, 1)):
                    embedding = full_precision(tower.encode_stream(self.copies))
                score = (embedding * direction.repeat(self.copies, 1)).sum(-1)
                lost = (capacity_of(alpha, clean) * counted).sum((1, 2)) / numbers
                loss = (self.beta * lost).sum() - score.sum() / self.copies
            alpha.grad = torch.autograd.grad(loss, alpha)[0]
            alpha.requires_grad_(False)
            optimizer.step()
        return capacity_of(alpha, clean) * counted


def capacity_of(alpha: Tensor, hidden: Tensor) -> Tensor:
    """KL divergence of z from standard normal noise, in nats, elementwise (Schulz et al. 2020, eq. 6)."""
    kept, noise = alpha.sigmoid(), (-alpha).sigmoid()
    # log(1 - sigmoid(alpha)) in a form that does not underflow.
    return -0.5 * (1 + 2 * F.logsigmoid(-alpha) - (kept * hidden) ** 2 - noise**2)


def run_to_bottleneck(tower: Tower, block: int) -> tuple[Stream, int, Tensor, Tensor, Tensor]:
    """One forward of a tower that records the tokens of a bottleneck behind a block.

    Returns:
        The stream, the index of the block, the embedding `(B, D)`, the tokens `(B, n, C)` behind the block, and the
        mask `(B, n)` bool of the tokens in the bottleneck.
    """
    stream = tower.stream()
    # Refuses a tower of unknown pooling before its forward.
    _ = tower.pooling
    place = block_index(block, len(tower.blocks))
    with stream.capture():
        embedding = tower.encode()
    hidden = stream.behind[place]
    return stream, place, embedding, hidden, _counted(tower, hidden.shape[1])


def _counted(tower: Tower, tokens: int) -> Tensor:
    """Mask `(B, n)` bool of the tokens of a block that a bottleneck acts on."""
    place = torch.arange(tokens, device=tower.inputs.device)
    if isinstance(tower, ImageTower):
        return torch.ones(len(tower.inputs), tokens, dtype=torch.bool, device=place.device)
    position = tower.pooling.position
    if position is not None and (position > 0).all():
        return place <= position[:, None]
    return tower.inputs[:, :tokens] != tower.clip.pad_id
