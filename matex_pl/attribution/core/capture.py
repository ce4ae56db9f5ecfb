"""Borrow a CLIP model: see every attention block, take gradients in the last ones, give the model back untouched.

Every tower that matters calls `torch.nn.functional.scaled_dot_product_attention`. Swapping that one function for the
time of a forward records q, k, v and the output of each block, in any family, with the fused kernel left in place.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling, image_depth, not_explained, original, text_tower
from matex_pl.maps import full_precision

_ATTENTION = "scaled_dot_product_attention"
_LOCK = threading.RLock()


@dataclass
class Block:
    """Attention of one block, for B samples and n tokens.

    Args:
        mean: `(B, r, n)` softmax attention averaged over heads. r is the number of queries, or 1 where only the row of
            the pooled token is recorded.
    """

    mean: Tensor


@dataclass
class GradBlock(Block):
    """A block that a backward reaches, for h heads and m queries of width d.

    Args:
        query: `(B, h, m, d)`, like `key` cut off from the graph.
        key: `(B, h, n, d)`.
        value: `(B, h, n, d)` on the graph.
        output: `(B, h, m, d)`, the attention's output before its projection, on the graph.
        attention: Softmax attention by head: `(B, h, m, n)`, or `(B, h, n)` of the queries at `(B,)` positions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    attention: Callable[..., Tensor]


def grad_blocks(blocks: Sequence[Block]) -> list[GradBlock]:
    """The blocks that were recorded with gradient, first block first."""
    return [block for block in blocks if isinstance(block, GradBlock)]


@contextmanager
def borrowed(clip: Clip) -> Iterator[None]:
    """The model in the state that explaining needs, inside `fit`, `validate`, `test` and `predict` alike.

    Eval mode, no inference mode, grad mode off until a capture switches it on, no autocast (the model computes in the
    dtype of its weights, so that a map does not depend on who asks for it), no native attention path, no gradient
    checkpointing, and modules that `torch.compile` has wrapped run as they were written. Leaving it restores all of
    them, and the RNG, even after an exception. Some of this belongs to the process: explanations of several threads
    wait for each other.

    Raises:
        ValueError: The weights were made under `torch.inference_mode`, and can have no gradients behind them.
    """
    if any(parameter.is_inference() for parameter in clip.parameters()):
        raise ValueError(
            "The model was built or moved under torch.inference_mode(). Build it outside, then explain it."
        )
    with _LOCK, ExitStack() as stack:
        training = [module for module in clip.modules() if module.training]
        checkpointing = [module for module in clip.modules() if getattr(module, "grad_checkpointing", False) is True]
        devices = {parameter.device.index for parameter in clip.parameters() if parameter.device.type == "cuda"}
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        stack.callback(_set_attribute, checkpointing, "grad_checkpointing", True)
        stack.callback(_set_attribute, training, "training", True)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=sorted(index or 0 for index in devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(clip.logit_scale.device.type, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        _set_attribute(checkpointing, "grad_checkpointing", False)
        _set_attribute(training, "training", False)
        yield


@contextmanager
def capture_attention(pooling: Pooling, *, grad_from: int | None = None, full: bool = False) -> Iterator[list[Block]]:
    """Record each attention block of one tower's forward, in order; the list is complete when the forward has ended.

    Args:
        pooling: How the tower pools: says which rows of the attention count.
        grad_from: Index of the first block with gradient: its q, k and v are cut off from what came before, so that a
            backward ends there, and grad mode is on from there until the context is left. None: no gradient at all.
        full: Record the rows of all queries even where that of the pooled token would do.

    Raises:
        RuntimeError: One is open already: a hook of the model explains while the model is explained.
    """
    attend: Callable[..., Tensor] = getattr(F, _ATTENTION)
    if attend.__module__ == __name__:
        raise RuntimeError("An explanation was asked for while another one runs the model, from one of its hooks.")
    blocks: list[Block] = []
    owner = threading.get_ident()

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        if threading.get_ident() != owner:
            return attend(q, k, v, *args, **kwargs)
        wants_grad = grad_from is not None and len(blocks) >= grad_from
        if grad_from is not None and len(blocks) == grad_from:
            torch.set_grad_enabled(True)
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        output = attend(q, k, v, *args, **kwargs)
        with torch.no_grad():
            query, key = q.detach(), k.detach()
            attention = partial(_attention, query, key, *_scale_and_bias(query, key, *args, **kwargs))  # type: ignore[arg-type]
            mean = _mean(attention, pooling.position, full)
        block = GradBlock(mean, query, key, v, output, attention) if wants_grad else Block(mean)
        blocks.append(block)
        return output

    with torch.no_grad():
        setattr(F, _ATTENTION, record)
        try:
            yield blocks
        finally:
            setattr(F, _ATTENTION, attend)


_BLOCKS: WeakKeyDictionary[nn.Module, tuple[int, int, int]] = WeakKeyDictionary()


def count_blocks(clip: Clip, images: Tensor, tokens: Tensor) -> tuple[int, int]:
    """Number of attention blocks of the image and the text tower, counted once per model by a forward of one sample.

    Raises:
        NotImplementedError: A tower calls no `scaled_dot_product_attention`, not once per block, or on windows of its
            patches; the message names the tower.
    """
    model = original(clip.model)
    modules = sum(1 for _ in model.modules())
    if model not in _BLOCKS or _BLOCKS[model][0] != modules:
        images, tokens = images[:1], tokens[:1]
        with capture_attention(clip.image_pooling(images), full=True) as blocks:
            clip.encode_image(images)
        with capture_attention(clip.text_pooling(tokens), full=True) as text_blocks:
            clip.encode_text(tokens)
        visual = original(model.visual)
        for side, tower, seen in (("image", visual, blocks), ("text", text_tower(model), text_blocks)):
            if not seen:
                raise NotImplementedError(
                    f"The {side} tower {type(tower).__name__} calls no {_ATTENTION}, so its maps cannot be computed. "
                    "Use a transformer tower, or switch fused attention on where the tower has an option for it."
                )
        patches, depth = clip.grid[0] * clip.grid[1], image_depth(visual)
        if any(len(block.mean) != 1 or block.mean.shape[-1] < patches for block in blocks):
            reason = f"its attention sees parts of its {patches} patches"
            raise NotImplementedError(not_explained("image", visual, reason))
        if len(blocks) != depth:
            reason = f"its {depth} blocks call {_ATTENTION} {len(blocks)} times"
            raise NotImplementedError(not_explained("image", visual, reason))
        _BLOCKS[model] = modules, len(blocks), len(text_blocks)
    return _BLOCKS[model][1:]


def _scale_and_bias(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: object,
) -> tuple[float, Tensor | None]:
    """Factor of the attention logits, and what is added to them as a view `(B, h, m, n)`; of the call's arguments."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    shape = (*query.shape[:3], key.shape[2])
    if is_causal:
        attn_mask = torch.ones(shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scale, None
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -torch.inf)
    return scale, full_precision(attn_mask).expand(shape)


def _attention(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None, positions: Tensor | None = None
) -> Tensor:
    """Softmax attention by head, float32 or better: `(B, h, m, n)`, or `(B, h, n)` of the queries at `positions`."""
    query, key = full_precision(query), full_precision(key)
    if positions is None:
        logits = query @ key.transpose(-1, -2) * scale
    else:
        logits = torch.einsum("bhd,bhnd->bhn", at(query, positions), key) * scale
        bias = None if bias is None else at(bias, positions)
    return (logits if bias is None else logits + bias).softmax(-1)


def _mean(attention: Callable[..., Tensor], position: Tensor | None, full: bool) -> Tensor:
    """Attention averaged over heads, `(B, r, n)`: all rows, or that of the pooled token alone; see `Block`."""
    if position is None:
        return attention().mean(1)
    row = attention(position).mean(1)
    if not full:
        return row[:, None]
    mean = attention().mean(1)
    # To the bit the row that is recorded alone.
    mean[torch.arange(len(mean), device=mean.device), position] = row
    return mean


def at(tensor: Tensor, positions: Tensor) -> Tensor:
    """`(B, h, n, m)` at one of the n positions per sample: `(B, h, m)`."""
    return tensor[torch.arange(len(tensor), device=tensor.device), :, positions]


def _set_attribute(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)
