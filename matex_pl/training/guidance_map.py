"""The image map of a training step, on the graph of its forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matex_pl.attribution.core.capture import FollowedBlock
from matex_pl.attribution.core.relevance import softmax_term
from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling, original
from matex_pl.maps import full_precision, moved
from matex_pl.training.distributed import gather_rows
from matex_pl.training.loss import phrase_keys


def margin_directions(text: Tensor, phrases: Sequence[str]) -> Tensor:
    """Gradient of each pair's margin by the image embedding, `(B, D)`, without a graph.

    The margin is the cosine minus the mean cosine of the other phrases of the batch, of all processes. A pair without
    another phrase has its cosine.

    Args:
        text: `(B, D)` unit embeddings of the phrases.
        phrases: The B phrases.
    """
    own, keys = full_precision(text.detach()), moved(phrase_keys(phrases), text.device)
    others = (keys[:, None] != gather_rows(keys)[None]).to(own)
    return own - others @ gather_rows(own) / others.sum(1, keepdim=True).clamp(min=1)


def guided_map(
    blocks: Sequence[FollowedBlock], image: Tensor, direction: Tensor, pooling: Pooling, *, second_order: bool
) -> Tensor:
    """Image map of each pair on the graph, `(B, N)` of at least 0: A_grad of MATEX (eqs. 6 and 8) of the given blocks.

    Call it outside of autocast.

    Args:
        blocks: Blocks of the forward that gave `image`.
        image: `(B, D)` unit embeddings of the images.
        direction: `(B, D)` directions of the score.
        pooling: Pooling of the image tower.
        second_order: Whether the gradients are on the graph.
    """
    score = (full_precision(image) * direction).sum()
    handles = [block.value if pooling.position is None else block.output for block in blocks]
    gradients = torch.autograd.grad(score, handles, create_graph=second_order, retain_graph=True)
    terms = [
        pooling.to_map(softmax_term(block, gradient, pooling))
        for block, gradient in zip(blocks, gradients, strict=True)
    ]
    return torch.stack(terms).relu().mean(0)


@contextmanager
def kept_patches(clip: Clip) -> Iterator[list[Tensor]]:
    """Record the places `(B, k)` of the patches that patch dropout keeps in a training forward; none without it.

    The layer gives no places. It is called on a column of places first, with the same random numbers.
    """
    patches, kept = clip.grid[0] * clip.grid[1], []

    def replay(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens = inputs[0].shape[1]
        places = torch.arange(tokens, dtype=torch.float32, device=inputs[0].device).expand(len(inputs[0]), -1)
        devices = [inputs[0].device] if inputs[0].is_cuda else []
        with torch.random.fork_rng(devices=devices):
            found: Any = module.forward(places[..., None])
        # Some layers return their places too, in another frame.
        found = found[0] if isinstance(found, tuple) else found
        prefix = tokens - patches
        kept.append(found[:, prefix:, 0].long() - prefix)

    with ExitStack() as stack:
        for module in original(clip.model.visual).modules():
            if type(module).__name__.startswith("PatchDropout") and module.training and module.prob:
                stack.enter_context(module.register_forward_pre_hook(replay))
        yield kept
