"""The single-pass methods that MATEX is measured against, as published, on open_clip's own vision transformer.

Each explains <f_i, direction>: the embedding of the phrase, or that less the mean of the references (the margin).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from matex_pl.attribution.capture import Block, borrowed, capture_attention
from matex_pl.attribution.relevance import attention_rollout, gradients_of, loosened_term
from matex_pl.clip import Clip


def image_maps(clip: Clip, images: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Maps of B images by the name of the method, `(B, Gh, Gw)`, or `(B, H, W)` for `saliency`; not normalised."""
    with borrowed(clip):
        reading = clip.image_reading(images)
        with capture_attention(reading, grad_from=0, full=True) as blocks, _block_outputs(clip) as hidden:
            embedding = clip.encode_image(images)
        by_layer = legrad(clip, hidden, blocks, direction)
        *gradients, last_input = gradients_of(embedding, [*(block.output for block in blocks), hidden[-2]], direction)
        attention = [_attention(block) for block in blocks]
        by_attention = [_by_attention(block, gradient) for block, gradient in zip(blocks, gradients, strict=True)]
        keep = torch.ones(len(images), reading.length, dtype=torch.bool)
        start = torch.eye(attention[0].shape[-1]).to(attention[0])[:1].expand(len(images), -1)
        relevance = [(a * g).relu().mean(1) for a, g in zip(attention, by_attention, strict=True)]
        tokens = {
            "attention of the last block": blocks[-1].row.mean(1),
            "rollout (Abnar and Zuidema)": attention_rollout([a.mean(1) for a in attention], start),
            "Chefer, last block": chefer(relevance[-1:]),
            "Chefer, all blocks": chefer(relevance),
            "LeGrad": by_layer,
            "Grad-CAM, last block": grad_cam(hidden[-2], last_input),
            "Grad-ECLIP": F.pad(loosened_term(blocks[-1], gradients[-1], None, reading, keep).relu(), (1, 0)),
            "patch similarity": (_readout(clip, hidden[-1]) * direction[:, None]).sum(-1),
        }
        maps = {name: row.detach()[:, 1:].unflatten(1, clip.grid) for name, row in tokens.items()}
        return maps | {"saliency": saliency(clip, images, direction)}


def chefer(relevance: Sequence[Tensor]) -> Tensor:
    """Class row of R <- R + mean_h max(0, A * dS/dA) R (Chefer, Gur and Wolf 2021), from `(B, n, n)` per block."""
    mixed = torch.eye(relevance[0].shape[-1]).to(relevance[0]).expand_as(relevance[0])
    for block in relevance:
        mixed = mixed + block @ mixed
    return mixed[:, 0]


def legrad(clip: Clip, hidden: Sequence[Tensor], blocks: Sequence[Block], direction: Tensor) -> Tensor:
    """Mean over blocks, heads and queries of max(0, ds_l / dA_l), s_l read from block l (Bousselham et al. 2024)."""
    rows = []
    for state, block in zip(hidden[1:], blocks, strict=True):
        with torch.enable_grad():
            read = _readout(clip, state[:, 0])
        gradient = torch.autograd.grad(read, block.output, direction, retain_graph=True)[0]
        rows.append(_by_attention(block, gradient).relu().mean((1, 2)))
    return torch.stack(rows).mean(0)


def grad_cam(tokens: Tensor, gradient: Tensor) -> Tensor:
    """max(0, sum over channels of the mean gradient over patches times the token) (Selvaraju et al. 2017), `(B, n)`."""
    return (gradient[:, 1:].mean(1, keepdim=True) * tokens).sum(-1).relu()


def saliency(clip: Clip, images: Tensor, direction: Tensor) -> Tensor:
    """Largest over channels of abs(dS/dx) (Simonyan et al. 2014), `(B, H, W)`."""
    with torch.enable_grad():
        pixels = images.clone().requires_grad_()
        embedding = clip.encode_image(pixels)
    return torch.autograd.grad(embedding, pixels, direction)[0].abs().amax(1)


def _readout(clip: Clip, tokens: Tensor) -> Tensor:
    """Unit embeddings of tokens, `(..., C)` to `(..., D)`, as the tower reads its class token."""
    visual = clip.model.visual
    return F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)


def _attention(block: Block) -> Tensor:
    return (block.query @ block.key.transpose(-1, -2) / block.query.shape[-1] ** 0.5).softmax(-1)


def _by_attention(block: Block, gradient: Tensor) -> Tensor:
    """Gradient by each attention weight, `(B, h, n, n)`, from that by the block's output."""
    return gradient @ block.value.detach().transpose(-1, -2)


@contextmanager
def _block_outputs(clip: Clip) -> Iterator[list[Tensor]]:
    """The tokens before the first block and after each."""
    states: list[Tensor] = []
    blocks = clip.model.visual.transformer.resblocks
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, __, output: states.append(output)) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
