"""Structure of the towers: the raster of patches, the blocks, and the pooling of tokens into an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models import beit, eva
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from matex_pl.clip.encoders import DualEncoder
from matex_pl.clip.wrapped import TransformersImageTower, TransformersTextTower


@dataclass(frozen=True)
class Pooling:
    """How one tower pools the tokens of B samples into embeddings.

    - `token` takes the token at `position` (class token, end of text).
    - `mean` averages the tokens in `pooled`.
    - `query` is an attention pool as the last block, read at its query 0 (SigLIP, CoCa).

    Args:
        kind: `token`, `mean` or `query`.
        length: Number of tokens of a map: the N patches of the image, or the T positions of the phrase.
        from_end: Whether the map's tokens are the last of a block (patches, after class and register tokens) or the
            first.
        position: `(B,)` pooled positions, for `token`.
        pooled: `(B, length)` bool mask of the averaged tokens, for `mean`.
    """

    kind: str
    length: int
    from_end: bool
    position: Tensor | None = None
    pooled: Tensor | None = None

    def to_map(self, values: Tensor) -> Tensor:
        """Values at the map's tokens `(..., length)`, from all tokens of a block `(..., n)`; 0 for missing tokens."""
        missing = self.length - values.shape[-1]
        return F.pad(values, (missing, 0) if self.from_end else (0, missing))

    def from_map(self, values: Tensor, tokens: int) -> Tensor:
        """Inverse of `to_map`: values of the map `(..., m)` at all `tokens` of a block; 0 at the other tokens."""
        missing = tokens - values.shape[-1]
        return F.pad(values, (missing, 0) if self.from_end else (0, missing))


def original(module: nn.Module) -> Any:
    """The module itself, without the wrapper of `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def text_tower(model: nn.Module) -> Any:
    """The text tower: a separate module, or the CLIP model itself if that holds the tower's parts."""
    return original(getattr(original(model), "text", model))


def image_weight(model: nn.Module) -> Tensor:
    """A weight of the image tower, whose device and dtype its images need: the first filter, or the first of all."""
    # Some models keep norms and embeddings in another precision.
    return next((weight for weight in model.parameters() if weight.ndim == 4), next(model.parameters()))


def patch_grid(visual: nn.Module) -> tuple[int, int]:
    """Rows and columns of the patches of an image tower.

    Raises:
        NotImplementedError: The tower keeps no raster of patches.
    """
    tower = original(visual)
    size = getattr(getattr(getattr(tower, "trunk", None), "patch_embed", tower), "grid_size", None)
    if isinstance(tower, ModifiedResNet):
        size = isqrt(len(tower.attnpool.positional_embedding) - 1)
    if size is None:
        raise NotImplementedError(not_explained("image", tower, "it keeps no raster of patches (`grid_size`)"))
    return height_width(size)


def image_pooling(visual: nn.Module, images: Tensor) -> Pooling:
    """How the image tower pools its tokens for `images` `(B, 3, H, W)`.

    Raises:
        NotImplementedError: The tower pools neither by a class token, nor by an average over patches, nor by one query;
            the message names its pooling.
    """
    tower, patches = original(visual), prod(patch_grid(visual))
    kind, reason = _image_kind(tower)
    if not kind:
        raise NotImplementedError(not_explained("image", tower, reason))
    position = images.new_zeros(len(images), dtype=torch.long) if kind == "token" else None
    pooled = images.new_ones(len(images), patches, dtype=torch.bool) if kind == "mean" else None
    return Pooling(kind, patches, True, position, pooled)


def _image_kind(tower: Any) -> tuple[str, str]:
    """Kind of pooling of an image tower, empty if unsupported, and the reason for that case."""
    if isinstance(tower, ModifiedResNet):
        return "token", ""
    if isinstance(tower, TransformersImageTower):
        return "token" if tower.attn_pool is None else "query", ""
    if isinstance(tower, VisionTransformer):
        if tower.attn_pool is None:
            return {"tok": "token", "avg": "mean"}.get(tower.pool_type, ""), f"its pooling is {tower.pool_type!r}"
        has_one_query = tower.attn_pool_contrastive is None and tower.pool_type == "tok"
        return "query" * has_one_query, "its attention pool is not read by one query of one stage"
    # By exact type: subclasses may pool or attend in other ways (DeiT has two class tokens).
    if isinstance(tower, TimmModel) and type(tower.trunk) in (timm_vit.VisionTransformer, eva.Eva, beit.Beit):
        return _timm_kind(tower)
    trunk = f" around {type(tower.trunk).__name__}" if hasattr(tower, "trunk") else ""
    return "", f"a tower{trunk} is none of the transformers and ResNets that are known"


def _timm_kind(tower: TimmModel) -> tuple[str, str]:
    trunk, pool = tower.trunk, tower.trunk.global_pool
    if hasattr(tower.head, "pool"):
        return "", f"its head pools by {type(tower.head.pool).__name__}"
    if getattr(trunk, "attn_pool", None) is not None:
        has_one_query = trunk.attn_pool.latent_len == 1 or trunk.attn_pool.pool == "token"
        return "query" * has_one_query, "its attention pool has several queries"
    if pool == "token" and trunk.num_prefix_tokens:
        return "token", ""
    if pool == "avg":
        is_patches_only = not getattr(trunk, "pool_include_prefix", False)
        return "mean" * is_patches_only, "its average includes class or register tokens"
    return "", f"its pooling is {pool!r}"


def image_blocks(visual: nn.Module) -> list[nn.Module]:
    """Transformer blocks of an image tower; none for a ResNet.

    Raises:
        NotImplementedError: The tower has no list of blocks, as Swin and ConvNeXt; the message names its class.
    """
    tower = original(visual)
    if isinstance(tower, ModifiedResNet):
        return []
    if isinstance(tower, VisionTransformer):
        return list(tower.transformer.resblocks)
    trunk = getattr(tower, "trunk", tower)
    if not hasattr(trunk, "blocks"):
        reason = f"a tower around {type(trunk).__name__} has no list of transformer blocks"
        raise NotImplementedError(not_explained("image", tower, reason))
    return list(trunk.blocks)


def image_depth(visual: nn.Module) -> int:
    """Number of attention blocks of an image tower with a known pooling, including its attention pool."""
    tower = original(visual)
    pool = isinstance(tower, ModifiedResNet) or getattr(getattr(tower, "trunk", tower), "attn_pool", None) is not None
    return len(image_blocks(tower)) + pool


def text_pooling(model: nn.Module, tokens: Tensor) -> Pooling:
    """How the text tower of a model pools its `tokens` `(B, T)`.

    Raises:
        NotImplementedError: The tower pools neither one token nor the average of all; the message names its pooling.
    """
    tower, length = text_tower(model), tokens.shape[1]
    if _text_rule(tower) == "MeanPooler":
        return Pooling("mean", length, False, pooled=tokens != tower.config.pad_token_id)
    return Pooling("token", length, False, position=_text_position(tower, tokens))


def _text_rule(tower: Any) -> str | None:
    """Pooling of a text tower by open_clip's name; `appended` for CoCa, the class name for poolers without a token."""
    if isinstance(tower, HFTextEncoder):
        pooler = type(tower.pooler).__name__
        return "first" if pooler in ("ClsPooler", "ClsLastHiddenStatePooler") else pooler
    if getattr(tower, "cls_emb", None) is not None:
        return "appended"
    return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)


def _text_position(tower: Any, tokens: Tensor) -> Tensor:
    rule = _text_rule(tower)
    fixed = {"first": 0, "last": tokens.shape[1] - 1, "appended": tokens.shape[1]}
    if rule == "argmax":
        return tokens.argmax(1)
    if rule == "eos":
        end = getattr(tower, "text_eos_id", None) or tower.eos_id
        return tokens.eq(end).int().argmax(1)
    if rule not in fixed:
        raise NotImplementedError(not_explained("text", tower, f"its pooling is {rule!r}"))
    return torch.full_like(tokens[:, 0], fixed[rule])


def text_blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks of a text tower.

    Raises:
        NotImplementedError: A Hugging Face tower does not store its blocks as BERT does.
    """
    tower = text_tower(model)
    if isinstance(tower, TransformersTextTower):
        return tower.blocks
    if isinstance(tower, DualEncoder):
        raise NotImplementedError(not_explained("text", tower, "a function shows no blocks"))
    if not isinstance(tower, HFTextEncoder):
        return list(tower.transformer.resblocks)
    layers = getattr(getattr(tower.transformer, "encoder", None), "layer", None)
    if layers is None:
        reason = f"the blocks of a {type(tower.transformer).__name__} are not where BERT has them (`encoder.layer`)"
        raise NotImplementedError(not_explained("text", tower, reason))
    return list(layers)


def block_norm(block: Any) -> nn.Module | None:
    """Norm between a block's residual stream and its attention; None if the stream itself is normalized, as in BERT."""
    # Names in open_clip, timm and transformers.
    return next((getattr(block, name) for name in ("ln_1", "norm1", "layer_norm1") if hasattr(block, name)), None)


def token_embedding(model: nn.Module) -> nn.Module:
    """Token embedding table of a text tower."""
    tower = text_tower(model)
    if isinstance(tower, HFTextEncoder):
        return tower.transformer.get_input_embeddings()
    return tower.token_embedding


_ON_HOST = WeakTensorKeyDictionary()


def keep_on_host(tokens: Tensor, host: Tensor) -> None:
    """Keep the CPU tensor behind `tokens` on another device, for `on_host`, which then waits for no device."""
    if not tokens.is_inference():
        _ON_HOST[tokens] = host, tokens._version


def on_host(tokens: Tensor) -> Tensor:
    """The same tokens on the CPU if they are known there, unless they were changed in place; else the tokens."""
    host, version = _ON_HOST.get(tokens, (tokens, None))
    return host if version is not None and not tokens.is_inference() and tokens._version == version else tokens


def copied(tokens: Tensor) -> Tensor:
    """A copy of the tokens on their device; `on_host` finds its CPU tensor too."""
    copy, host = tokens.clone(), on_host(tokens)
    if host is not tokens:
        keep_on_host(copy, host)
    return copy


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Text embeddings `(B, D)` of `tokens` `(B, T)`, normalized or not, as the tower returns them.

    Positions after the longest phrase of the batch are left out if no pooled token attends to them. This is the case in
    causal towers that pool at the end of text, and in Hugging Face towers, which mask the padding.
    """
    tower = text_tower(model)
    if tower is not getattr(model, "text", model):
        # A compiled tower is called with the one shape it was compiled for.
        return model.encode_text(tokens)
    if isinstance(tower, HFTextEncoder):
        filled = (on_host(tokens) != tower.config.pad_token_id).any(0)
        used = int((filled * torch.arange(1, len(filled) + 1, device=filled.device)).max())
        return model.encode_text(tokens[:, : used or len(filled)])
    if isinstance(tower, TransformersTextTower):
        # SigLIP's end of text is its last position.
        used = int(_text_position(tower, on_host(tokens)).max()) + 1 if tower.is_causal else tokens.shape[1]
        return model.encode_text(tokens[:, :used])
    mask = getattr(tower, "attn_mask", None)
    if mask is None or _text_rule(tower) not in ("argmax", "eos"):
        return model.encode_text(tokens)
    used = int(_text_position(tower, on_host(tokens)).max()) + 1
    shorter = {"attn_mask": mask[:used, :used]}
    if isinstance(tower, TextTransformer):
        pooled = functional_call(tower, shorter, (tokens[:, :used],))
        return pooled[0] if isinstance(pooled, tuple) else pooled
    shorter["positional_embedding"] = tower.positional_embedding[:used]
    output = functional_call(tower, shorter, (None, tokens[:, :used]))
    return output["text_features"] if isinstance(output, dict) else output[1]


def check_patches(visual: Any, name: str) -> None:
    """Raise ValueError if the input of an image tower is not a whole number of patches; `name` is in the message."""
    trunk = getattr(visual, "trunk", None)
    patch = height_width(getattr(getattr(trunk, "patch_embed", visual), "patch_size", None) or 1)
    size = height_width(visual.image_size)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f"The input of {name}, {size} pixels, is not a whole number of its {patch} patches. Set image_size to a "
            "multiple of the patch size."
        )


def not_explained(side: str, tower: Any, reason: str) -> str:
    """Message for a tower without maps: the reason, and the supported towers."""
    return (
        f"Maps of the {side} tower {type(tower).__name__} are not supported: {reason}. Supported towers: transformers "
        "of open_clip, timm and transformers that pool by a class token, an average or an attention pool, "
        "ModifiedResNet, open_clip's text transformers and Hugging Face text towers. Training works with any tower."
    )


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
