"""Borrow a CLIP model: see every attention block, take gradients in the last ones, give the model back untouched.

Every tower that matters calls `torch.nn.functional.scaled_dot_product_attention`. Swapping that one function for the
time of a forward records q, k, v and the output of each block, in any family, with the fused kernel left in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matex_pl.clip import Clip
from matex_pl.maps import full_precision

_ATTENTION = "scaled_dot_product_attention"


@dataclass
class Block:
    """What one attention block did, for B samples, h heads, n tokens of width d; p is the pooled position.

    Args:
        row: `(B, h, n)` softmax attention of the token at p.
        mean: `(B, n, n)` softmax attention averaged over heads; only where full matrices were asked for.
        query: `(B, h, d)` query of the token at p; None in blocks without gradient, like the two below.
        key: `(B, h, n, d)`.
        value: `(B, h, n, d)`.
        output: `(B, h, n, d)` the attention's output before its projection, on the graph.
    """

    row: Tensor
    mean: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None


@contextmanager
def borrowed(clip: Clip) -> Iterator[None]:
    """The model in the state that explaining needs, inside `fit`, `validate`, `test` and `predict` alike.

    Eval mode, no inference mode, grad mode off until a capture switches it on, no autocast (the model computes in the
    dtype of its weights, so that a map does not depend on who asks for it), no native attention path and no gradient
    checkpointing. Leaving it restores all of them, and the RNG, even after an exception.
    """
    training = [module for module in clip.modules() if module.training]
    checkpointing = [module for module in clip.modules() if getattr(module, "grad_checkpointing", False) is True]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {parameter.device.index for parameter in clip.parameters() if parameter.device.type == "cuda"}
    kind = clip.logit_scale.device.type
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        stack.callback(_set_attribute, checkpointing, "grad_checkpointing", True)
        stack.callback(_set_attribute, training, "training", True)
        stack.enter_context(torch.random.fork_rng(devices=sorted(index or 0 for index in devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        _set_attribute(checkpointing, "grad_checkpointing", False)
        _set_attribute(training, "training", False)
        yield


@contextmanager
def capture_attention(positions: Tensor, *, grad_from: int | None = None, full: bool = False) -> Iterator[list[Block]]:
    """Record each attention block of one tower's forward, in order; the list is complete when the forward has ended.

    Args:
        positions: `(B,)` pooled position of each sample.
        grad_from: Index of the first block with gradient: its q, k and v are cut off from what came before, so that a
            backward ends there, and grad mode is on from there until the context is left. None: no gradient at all.
        full: Also record the head-averaged attention matrices.
    """
    attend = getattr(F, _ATTENTION)
    blocks: list[Block] = []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        wants_grad = grad_from is not None and len(blocks) >= grad_from
        if grad_from is not None and len(blocks) == grad_from:
            torch.set_grad_enabled(True)
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        output = attend(q, k, v, *args, **kwargs)
        with torch.no_grad():
            block = _read(q.detach(), k.detach(), positions, full, *args, **kwargs)  # type: ignore[arg-type]
            if wants_grad:
                block.query = _at(q.detach(), positions)
                block.key, block.value, block.output = k.detach(), v.detach(), output
        blocks.append(block)
        return output

    with torch.no_grad():
        setattr(F, _ATTENTION, record)
        try:
            yield blocks
        finally:
            setattr(F, _ATTENTION, attend)


_BLOCKS: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def count_blocks(clip: Clip, images: Tensor, tokens: Tensor) -> tuple[int, int]:
    """Number of attention blocks of the image and the text tower, counted once per model by a forward of one sample.

    Raises:
        NotImplementedError: A tower calls no `scaled_dot_product_attention`; the message names it.
    """
    if clip.model not in _BLOCKS:
        found = {}
        for side, encode, inputs in (("image", clip.encode_image, images[:1]), ("text", clip.encode_text, tokens[:1])):
            with capture_attention(torch.zeros(1, dtype=torch.long, device=inputs.device)) as blocks:
                encode(inputs)
            if not blocks:
                tower = getattr(clip.model, "visual" if side == "image" else "text", clip.model)
                raise NotImplementedError(
                    f"The {side} tower {type(tower).__name__} calls no {_ATTENTION}, so its maps cannot be computed. "
                    "Use a transformer tower, or switch fused attention on where the tower has an option for it."
                )
            found[side] = len(blocks)
        _BLOCKS[clip.model] = found
    counts = _BLOCKS[clip.model]
    return counts["image"], counts["text"]


def _read(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    full: bool,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: object,
) -> Block:
    """The attention row at the pooled positions, from the arguments of the attention call; float32 or better."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = _bias(attn_mask, is_causal, (*q.shape[:3], k.shape[2]), q.device)
    query, key = full_precision(q), full_precision(k)
    logits = torch.einsum("bhd,bhnd->bhn", _at(query, positions), key) * scale
    if bias is not None:
        logits = logits + _at(bias, positions)
    block = Block(row=logits.softmax(-1))
    if full:
        matrix = query @ key.transpose(-1, -2) * scale
        block.mean = (matrix if bias is None else matrix + bias).softmax(-1).mean(1)
    return block


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """`(B, h, n, m)` at one of the n positions per sample: `(B, h, m)`."""
    return tensor[torch.arange(len(tensor), device=tensor.device), :, positions]


def _bias(mask: Tensor | None, is_causal: bool, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """What is added to the attention logits, as a view of `shape` (B, h, n, n)."""
    if is_causal:
        mask = torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return full_precision(mask).expand(shape)


def _set_attribute(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)
