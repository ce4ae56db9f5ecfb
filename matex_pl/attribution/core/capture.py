"""Temporary access to a CLIP model: attention of every block and gradients of the last ones, without lasting changes.

All supported towers call `torch.nn.functional.scaled_dot_product_attention`. Replacing this function during a forward
records q, k, v and the output of each block in any model family, and keeps the fused kernel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling, image_depth, not_explained, original, text_tower
from matex_pl.maps import full_precision

_ATTENTION = "scaled_dot_product_attention"
# Attribute of configs of transformers, below the property that also changes the configs within.
_IMPLEMENTATION = "_attn_implementation_internal"
_LOCK = threading.RLock()


@dataclass
class Block:
    """Attention of one block, for B samples and n tokens.

    Args:
        mean: `(B, r, n)` softmax attention averaged over heads. r is the number of queries, or 1 if only the row of the
            pooled token is recorded.
    """

    mean: Tensor


@dataclass
class GradBlock(Block):
    """Attention of one block that a backward reaches, for h heads and m queries of width d.

    Args:
        query: `(B, h, m, d)` queries, detached from the graph.
        key: `(B, h, n, d)` keys, detached from the graph.
        value: `(B, h, n, d)` values on the graph.
        output: `(B, h, m, d)` output of the attention before its projection, on the graph.
        attention: Function that returns the softmax attention by head: `(B, h, m, n)`, or `(B, h, n)` of the queries at
            `(B,)` positions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    attention: Callable[..., Tensor]


@dataclass
class FollowedBlock:
    """Attention of one block in a training forward, on its graph; the fields are those of `GradBlock`."""

    value: Tensor
    output: Tensor
    attention: Callable[..., Tensor]


def grad_blocks(blocks: Sequence[Block]) -> list[GradBlock]:
    """Blocks that were recorded with gradient, first block first."""
    return [block for block in blocks if isinstance(block, GradBlock)]


@contextmanager
def borrowed(clip: Clip) -> Iterator[None]:
    """Set the model to the state for explanations, and restore its own state on exit.

    The context works inside `fit`, `validate`, `test` and `predict` alike. Inside it

    - modules are in eval mode, without inference mode, gradient checkpointing and the native attention path
    - grad mode is off until a capture switches it on
    - autocast is off: the model computes in the dtype of its weights, whatever the caller's precision
    - modules wrapped by `torch.compile` run as written
    - models of transformers attend by `scaled_dot_product_attention`, also if another implementation is set

    On exit all of this and the RNG are restored, even after an exception. Some of these settings are global to the
    process, so explanations of several threads run one after another.

    Raises:
        ValueError: If the weights were made under `torch.inference_mode` and therefore cannot have gradients.
    """
    if any(parameter.is_inference() for parameter in clip.parameters()):
        raise ValueError(
            "The model was built or moved under torch.inference_mode(), which allows no gradients. Build the model "
            "outside of that context, then explain it."
        )
    with _LOCK, ExitStack() as stack:
        training = [module for module in clip.modules() if module.training]
        checkpointing = [module for module in clip.modules() if getattr(module, "grad_checkpointing", False) is True]
        devices = {parameter.device.index for parameter in clip.parameters() if parameter.device.type == "cuda"}
        for config in {id(config): config for config in map(_attention_config, clip.modules()) if config}.values():
            stack.callback(setattr, config, _IMPLEMENTATION, getattr(config, _IMPLEMENTATION))
            setattr(config, _IMPLEMENTATION, "sdpa")
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


def _attention_config(module: nn.Module) -> Any:
    """Config of a module of transformers whose attention is not the fused one of torch; None for any other module."""
    config = getattr(module, "config", None)
    return config if getattr(config, _IMPLEMENTATION, "sdpa") not in ("sdpa", None) else None


@contextmanager
def capture_attention(pooling: Pooling, *, grad_from: int | None = None, full: bool = False) -> Iterator[list[Block]]:
    """Record each attention block of one tower's forward, in order; the list is complete after the forward.

    Args:
        pooling: Pooling of the tower, which determines the rows of the attention that count.
        grad_from: Index of the first block with gradient. Its q, k and v are detached, a backward ends there, and grad
            mode is on from there until the context exits. None records no gradient.
        full: Whether to record the rows of all queries even if the row of the pooled token suffices.

    Raises:
        RuntimeError: If a capture is open already, because a hook of the model explains during an explanation.
    """
    attend: Callable[..., Tensor] = getattr(F, _ATTENTION)
    if attend.__module__ == __name__:
        raise RuntimeError(
            "A hook of the model requested an explanation while another explanation runs the model. Remove the hook, "
            "or explain after the forward."
        )
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


@contextmanager
def follow_attention(first: int, depth: int, *, twice_from: int) -> Iterator[list[FollowedBlock]]:
    """Record the blocks `first` to `depth - 1` of a tower on the graph of a training forward, in order.

    Calls of other towers after these are left alone. Fused kernels have no second derivative.

    Args:
        first: Index of the first recorded block.
        depth: Number of blocks of the tower, the first that is called inside the context.
        twice_from: Index of the first block that a second derivative passes, whose kernel is replaced by plain algebra.
    """
    attend: Callable[..., Tensor] = getattr(F, _ATTENTION)
    blocks: list[FollowedBlock] = []
    owner, seen = threading.get_ident(), 0

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal seen
        if threading.get_ident() != owner:
            return attend(q, k, v, *args, **kwargs)
        place, seen = seen, seen + 1
        if not first <= place < depth:
            return attend(q, k, v, *args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH) if place >= twice_from else nullcontext():
            output = attend(q, k, v, *args, **kwargs)
        attention = partial(_attention, q, k, *_scale_and_bias(q, k, *args, **kwargs))  # type: ignore[arg-type]
        blocks.append(FollowedBlock(v, output, attention))
        return output

    with _LOCK:
        setattr(F, _ATTENTION, record)
        try:
            yield blocks
        finally:
            setattr(F, _ATTENTION, attend)


@contextmanager
def replaced_attention(replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Compute each attention of this thread inside the context by `replacement(fused, q, k, v, ...)`.

    Args:
        replacement: Function of the fused attention and of the arguments of a call, `(B, h, n, d)` each, that returns
            the output of the attention before its projection.
    """
    attend: Callable[..., Tensor] = getattr(F, _ATTENTION)
    owner = threading.get_ident()

    def replaced(*args: object, **kwargs: object) -> Tensor:
        if threading.get_ident() != owner:
            return attend(*args, **kwargs)
        return replacement(attend, *args, **kwargs)

    with _LOCK:
        setattr(F, _ATTENTION, replaced)
        try:
            yield
        finally:
            setattr(F, _ATTENTION, attend)


def sample(clip: Clip) -> tuple[Tensor, Tensor]:
    """A gray image `(1, 3, H, W)` and the tokens of a phrase `(1, T)`, for checks of the towers."""
    return clip.std.new_zeros(1, 3, *clip.image_size), clip.tokenize(["No finding."])


_ENCODING: WeakSet[nn.Module] = WeakSet()


def check_embeddings(clip: Clip, images: Tensor, tokens: Tensor) -> None:
    """Refuse towers that do not give one embedding per input; checked once per model by a forward of one sample.

    Raises:
        NotImplementedError: The output of a tower is no `(B, D)`, or the tower cannot run; the message names the tower.
    """
    model = original(clip.model)
    if model in _ENCODING:
        return
    for side, tower, encode, pooling, inputs in (
        ("image", original(model.visual), clip.encode_image, clip.image_pooling, images[:1]),
        ("text", text_tower(model), clip.encode_text, clip.text_pooling, tokens[:1]),
    ):
        try:
            found = encode(inputs).ndim
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            found = 0
        if found != 2:
            # Most of these towers have an unknown pooling, which this call refuses with the reason.
            pooling(inputs)
            reason = "it does not give one embedding per input" if found else "its parts do not fit each other"
            raise NotImplementedError(not_explained(side, tower, reason))
    _ENCODING.add(model)


_BLOCKS: WeakKeyDictionary[nn.Module, tuple[int, int, int]] = WeakKeyDictionary()


def count_blocks(clip: Clip, images: Tensor, tokens: Tensor) -> tuple[int, int]:
    """Number of attention blocks of the image and the text tower, counted once per model by a forward of one sample.

    Raises:
        NotImplementedError: If a tower does not call `scaled_dot_product_attention`, does not call it once per block,
            or calls it on windows of its patches; the message names the tower.
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
                    f"The {side} tower {type(tower).__name__} does not call {_ATTENTION}, which its maps need. "
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
    """Factor of the attention logits, and the bias added to them as a view `(B, h, m, n)`, from a call's arguments."""
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
    """Attention averaged over heads, `(B, r, n)`: all rows, or the row of the pooled token alone; see `Block`."""
    if position is None:
        return attention().mean(1)
    row = attention(position).mean(1)
    if not full:
        return row[:, None]
    mean = attention().mean(1)
    # Bit-identical to the row that is recorded alone.
    mean[torch.arange(len(mean), device=mean.device), position] = row
    return mean


def at(tensor: Tensor, positions: Tensor) -> Tensor:
    """`(B, h, m)`: entries of `(B, h, n, m)` at one of the n positions per sample."""
    return tensor[torch.arange(len(tensor), device=tensor.device), :, positions]


def _set_attribute(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)
