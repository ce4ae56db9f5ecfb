"""Explanation targets: the cosine of a pair, or its margin over reference phrases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from matex_pl.clip.model import Clip
from matex_pl.clip.towers import original
from matex_pl.maps import full_precision, moved

Target = Literal["cosine", "margin"]

_PLACED = (
    "atelectasis",
    "consolidation",
    "edema",
    "lung opacity",
    "nodule",
    "pleural effusion",
    "pneumonia",
    "pneumothorax",
)
_LOBES = ("right upper lobe", "left upper lobe", "right lower lobe", "left lower lobe")
_PLACES = ("", "right", "left", "bilateral", *_LOBES)

REFERENCES: tuple[str, ...] = ("cardiomegaly", *(f"{place} {name}".strip() for name in _PLACED for place in _PLACES))
"""Common findings by side and zone: the default reference phrases of `target="margin"`."""


def directions(image: Tensor, text: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each pair, and the gradients of the target by either embedding.

    The cosine `<f_i, f_t>` and the margin `<f_i, f_t - mean of f_r>` are linear in each embedding. Their gradient is
    `f_t - mean of f_r` by the image embedding and `f_i` by the text embedding. The margin removes the large direction
    that all phrases of this field share, which the cosine explains too.

    Args:
        image: `(B, D)` L2-normalized embeddings, or `(1, D)` for all pairs.
        text: `(B, D)` L2-normalized embeddings.
        reference: `(D,)` mean embedding of the reference phrases; None explains the cosine.

    Returns:
        The cosine `(B,)`, and the gradients of the target by `image` and by `text`, `(B, D)` each.
    """
    score = (image * text).sum(-1)
    return score, text if reference is None else text - reference, image.expand_as(text)


_ENCODED: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Tensor, Tensor]] = WeakKeyDictionary()
# Number of compared entries per weight; a step of any optimizer changes more than a few of them.
_SAMPLED = 256
# Names in open_clip and transformers of parameters outside of the text tower.
_NOT_OF_TEXT = ("visual.", "_orig_mod.visual.", "logit_", "model.vision_model.", "model.visual_projection")


def reference_mean(clip: Clip, references: Sequence[str]) -> Tensor:
    """Mean embedding of the reference phrases, `(D,)`; see `reference_embeddings`."""
    return reference_embeddings(clip, references).mean(0)


@torch.no_grad()
def reference_embeddings(clip: Clip, references: Sequence[str]) -> Tensor:
    """Embedding of each reference phrase, `(R, D)`, float32 or better; encoded once per state of the text tower.

    Call it inside `borrowed`: the cached embeddings must not depend on dropout nor be inference tensors.
    """
    model, weights = original(clip.model), _sample(clip)
    key = (*references, clip.std.dtype, weights.device)
    if model in _ENCODED:
        known, sampled, embeddings = _ENCODED[model]
        if known == key and torch.equal(sampled, weights):
            return embeddings
    embeddings = full_precision(clip.encode_text(clip.tokenize(references)))
    _ENCODED[model] = key, weights, embeddings
    return embeddings


def _sample(clip: Clip) -> Tensor:
    """Vector of sampled entries of the text tower's weights and of the weights' versions.

    Both are needed: fused optimizers do not raise version counters, and the sample may miss a change by hand. Neither
    detects a change of single rows through `.data`.
    """
    named = original(clip.model).named_parameters()
    weights = [weight for name, weight in named if not name.startswith(_NOT_OF_TEXT)]
    spread = [full_precision(weight.flatten()[:: max(1, weight.numel() // _SAMPLED)]) for weight in weights]
    versions = torch.tensor([weight._version for weight in weights], dtype=spread[0].dtype)
    return torch.cat([*spread, moved(versions, spread[0].device)])
