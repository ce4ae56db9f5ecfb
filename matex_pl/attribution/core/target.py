"""What is explained: the cosine of a pair, or its margin over reference phrases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from matex_pl.clip.model import Clip
from matex_pl.clip.towers import original
from matex_pl.maps import full_precision

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
"""Common findings by side and zone: the phrases that `target="margin"` compares with by default."""


def directions(image: Tensor, text: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each pair, and what is explained as a direction in the embedding space of either side.

    The cosine <f_i, f_t> and the margin <f_i, f_t - mean of f_r> are linear in each embedding: their gradient is
    (f_t - mean of f_r) on the image side and f_i on the text side. The margin takes away the large common direction of
    all phrases of this field, which the cosine explains too.

    Args:
        image: `(B, D)` L2-normalized, or `(1, D)` for all.
        text: `(B, D)` L2-normalized.
        reference: `(D,)` mean embedding of the reference phrases; None explains the cosine.

    Returns:
        The cosine `(B,)`, and the gradients of what is explained by `image` and by `text`, `(B, D)` each.
    """
    score = (image * text).sum(-1)
    return score, text if reference is None else text - reference, image.expand_as(text)


_ENCODED: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Tensor, Tensor]] = WeakKeyDictionary()
# Entries of each weight that are compared: a step of any optimizer moves more than a few of them.
_SAMPLED = 256


def reference_mean(clip: Clip, references: Sequence[str]) -> Tensor:
    """Mean embedding of the reference phrases, `(D,)`; otherwise as `reference_embeddings`."""
    return reference_embeddings(clip, references).mean(0)


@torch.no_grad()
def reference_embeddings(clip: Clip, references: Sequence[str]) -> Tensor:
    """Embedding of each reference phrase, `(R, D)`, float32 or better; encoded once per weights of the text tower.

    Call it inside `borrowed`: what it keeps must neither depend on dropout nor be an inference tensor.
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
    """Entries spread over the text tower's weights, and the weights' versions, as one vector.

    By value and by version: fused optimizers leave version counters alone, a change by hand may miss the sample. A
    change of single rows through `.data` is seen by neither.
    """
    named = original(clip.model).named_parameters()
    weights = [weight for name, weight in named if not name.startswith(("visual.", "_orig_mod.visual.", "logit_"))]
    spread = [full_precision(weight.flatten()[:: max(1, weight.numel() // _SAMPLED)]) for weight in weights]
    versions = torch.tensor([weight._version for weight in weights], dtype=spread[0].dtype, device=spread[0].device)
    return torch.cat([*spread, versions])
