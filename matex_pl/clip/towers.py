"""How the towers of open_clip's families are read: their raster of patches, and how tokens become an embedding."""

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


@dataclass(frozen=True)
class Pooling:
    """How the embeddings of B samples are read from the tokens of one tower.

    `token`: from the token at `position` (class token, end of text). `mean`: the average of the tokens in `pooled`.
    `query`: an attention pool, the last block, reads them by its query 0 (SigLIP, CoCa).

    Args:
        kind: `token`, `mean` or `query`.
        length: Number of tokens that a map has: the N patches of the image, or the T positions of the phrase.
        from_end: These are the last tokens of a block (patches, behind class and register tokens) or the first.
        position: `(B,)` the pooled position of `token`.
        pooled: `(B, length)` bool, the tokens of `mean`.
    """

    kind: str
    length: int
    from_end: bool
    position: Tensor | None = None
    pooled: Tensor | None = None

    def to_map(self, values: Tensor) -> Tensor:
        """Values of all tokens of a block `(..., n)` at the tokens of the map `(..., length)`; 0 where it has none."""
        missing = self.length - values.shape[-1]
        return F.pad(values, (missing, 0) if self.from_end else (0, missing))

    def from_map(self, values: Tensor, tokens: int) -> Tensor:
        """The inverse of `to_map`: values `(..., m)` at all n `tokens` of a block; 0 at the others."""
        missing = tokens - values.shape[-1]
        return F.pad(values, (missing, 0) if self.from_end else (0, missing))


def original(module: nn.Module) -> Any:
    """The module itself, where `torch.compile` has wrapped it."""
    return getattr(module, "_orig_mod", module)


def text_tower(model: nn.Module) -> Any:
    """The text tower: a module of its own, or the CLIP model that has its parts."""
    return original(getattr(original(model), "text", model))


def patch_grid(visual: nn.Module) -> tuple[int, int]:
    """Rows and columns of the patches of an image tower.

    Raises:
        NotImplementedError: It keeps no raster of patches.
    """
    tower = original(visual)
    size = getattr(getattr(getattr(tower, "trunk", None), "patch_embed", tower), "grid_size", None)
    if isinstance(tower, ModifiedResNet):
        size = isqrt(len(tower.attnpool.positional_embedding) - 1)
    if size is None:
        raise NotImplementedError(not_explained("image", tower, "it keeps no raster of patches (`grid_size`)"))
    return height_width(size)


def image_pooling(visual: nn.Module, images: Tensor) -> Pooling:
    """How the image tower reads the embeddings of `images` `(B, 3, H, W)`.

    Raises:
        NotImplementedError: Otherwise than from a class token, an average over patches or one query; says how.
    """
    tower, patches = original(visual), prod(patch_grid(visual))
    kind, reason = _image_kind(tower)
    if not kind:
        raise NotImplementedError(not_explained("image", tower, reason))
    position = images.new_zeros(len(images), dtype=torch.long) if kind == "token" else None
    pooled = images.new_ones(len(images), patches, dtype=torch.bool) if kind == "mean" else None
    return Pooling(kind, patches, True, position, pooled)


def _image_kind(tower: Any) -> tuple[str, str]:
    """Kind of pooling of an image tower, empty where it is unknown, and the reason for that case."""
    if isinstance(tower, ModifiedResNet):
        return "token", ""
    if isinstance(tower, VisionTransformer):
        if tower.attn_pool is None:
            return {"tok": "token", "avg": "mean"}.get(tower.pool_type, ""), f"its pooling is {tower.pool_type!r}"
        has_one_query = tower.attn_pool_contrastive is None and tower.pool_type == "tok"
        return "query" * has_one_query, "its attention pool is not read by one query of one stage"
    # By exact type: subclasses pool or attend in ways of their own (two class tokens of DeiT, for one).
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
    """The transformer blocks of an image tower with a known reading; a ResNet has none."""
    tower = original(visual)
    if isinstance(tower, ModifiedResNet):
        return []
    return list(tower.transformer.resblocks if isinstance(tower, VisionTransformer) else tower.trunk.blocks)


def image_depth(visual: nn.Module) -> int:
    """Number of attention blocks that an image tower with a known pooling is made of, its attention pool included."""
    tower = original(visual)
    pool = isinstance(tower, ModifiedResNet) or getattr(getattr(tower, "trunk", tower), "attn_pool", None) is not None
    return len(image_blocks(tower)) + pool


def text_pooling(model: nn.Module, tokens: Tensor) -> Pooling:
    """How the text tower of a model reads the embeddings of `tokens` `(B, T)`.

    Raises:
        NotImplementedError: Otherwise than from one token or the average of all; says how.
    """
    tower, length = text_tower(model), tokens.shape[1]
    if _text_rule(tower) == "MeanPooler":
        return Pooling("mean", length, False, pooled=tokens != tower.config.pad_token_id)
    return Pooling("token", length, False, position=_text_position(tower, tokens))


def _text_rule(tower: Any) -> str | None:
    """Which token a text tower pools, as open_clip names it; `appended` for CoCa's, the pooler's name if it is none."""
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
    """The transformer blocks of a text tower, which its tokens run through.

    Raises:
        NotImplementedError: They are not where those of BERT are.
    """
    tower = text_tower(model)
    if not isinstance(tower, HFTextEncoder):
        return list(tower.transformer.resblocks)
    layers = getattr(getattr(tower.transformer, "encoder", None), "layer", None)
    if layers is None:
        reason = f"the blocks of a {type(tower.transformer).__name__} are not where BERT has them (`encoder.layer`)"
        raise NotImplementedError(not_explained("text", tower, reason))
    return list(layers)


def block_norm(block: Any) -> nn.Module | None:
    """The norm between a block's stream and its attention; None where the stream itself is normed, as in BERT."""
    return getattr(block, "ln_1", getattr(block, "norm1", None))


def token_embedding(model: nn.Module) -> nn.Module:
    """The table that a text tower looks its tokens up in."""
    tower = text_tower(model)
    if isinstance(tower, HFTextEncoder):
        return tower.transformer.get_input_embeddings()
    return tower.token_embedding


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Text embeddings of `tokens` `(B, T)`, `(B, D)`, not normalized or normalized, as the tower gives them.

    What comes after the longest phrase of the batch is left out where no pooled token attends to it: in causal towers
    that pool at the end of text, and in Hugging Face towers, which mask the padding. Phrases of this field fill a
    fifth of CLIP's 77 positions.
    """
    tower = text_tower(model)
    if tower is not getattr(model, "text", model):
        # A compiled tower is called with the one shape it was compiled for.
        return model.encode_text(tokens)
    if isinstance(tower, HFTextEncoder):
        filled = (tokens != tower.config.pad_token_id).any(0)
        return model.encode_text(tokens[:, : int(filled.nonzero().max()) + 1] if filled.any() else tokens)
    mask = getattr(tower, "attn_mask", None)
    if mask is None or _text_rule(tower) not in ("argmax", "eos"):
        return model.encode_text(tokens)
    used = int(_text_position(tower, tokens).max()) + 1
    shorter = {"attn_mask": mask[:used, :used]}
    if isinstance(tower, TextTransformer):
        pooled = functional_call(tower, shorter, (tokens[:, :used],))
        return pooled[0] if isinstance(pooled, tuple) else pooled
    shorter["positional_embedding"] = tower.positional_embedding[:used]
    output = functional_call(tower, shorter, (None, tokens[:, :used]))
    return output["text_features"] if isinstance(output, dict) else output[1]


def not_explained(side: str, tower: nn.Module, reason: str) -> str:
    """Why the maps of a tower are refused, and what works."""
    return (
        f"Maps of the {side} tower {type(tower).__name__} are not supported: {reason}. Supported are transformers of "
        "open_clip and timm that pool by a class token, an average or an attention pool, ModifiedResNet, open_clip's "
        "text transformers and Hugging Face text towers. Training works with any tower."
    )


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
