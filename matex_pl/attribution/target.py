"""What is explained: the cosine of a pair, or its margin over reference phrases."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from matex_pl.clip import Clip
from matex_pl.maps import full_precision

TARGETS = ("cosine", "margin")

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
"""Common findings by side and zone: the phrases that `explain="margin"` compares with unless told otherwise."""


def score_and_target(image: Tensor, text: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine of each pair and the scalar to explain, both `(B,)`.

    The margin is <f_i, f_t - mean of f_r>: all phrases of this field share a large common direction, which the cosine
    explains too.

    Args:
        image: `(B, D)` L2-normalised.
        text: `(B, D)` L2-normalised.
        reference: `(D,)` mean embedding of the reference phrases; None explains the cosine.
    """
    score = (image * text).sum(-1)
    return score, score if reference is None else score - image @ reference


_MEANS: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def reference_mean(clip: Clip, references: Sequence[str]) -> Tensor:
    """Mean embedding of the reference phrases, `(D,)`, float32 or better; encoded once per weights of the text tower.

    Call it inside `borrowed`: what it keeps must neither depend on dropout nor be an inference tensor.
    """
    key = (tuple(references), *_fingerprint(clip))
    if clip.model not in _MEANS or _MEANS[clip.model][0] != key:
        _MEANS[clip.model] = key, full_precision(clip.encode_text(clip.tokenize(references))).mean(0)
    return _MEANS[clip.model][1]


def _fingerprint(clip: Clip) -> tuple[object, ...]:
    """Changes when the text tower's weights do.

    Both by value and by version: fused optimisers leave version counters alone, a change of sign leaves the norm.
    """
    named = clip.model.named_parameters()
    weights = [weight for name, weight in named if not name.startswith(("visual.", "logit_"))]
    # A norm in bfloat16 would not move with one step of an optimiser.
    norms = [
        torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights
    ]
    return weights[0].dtype, weights[0].device, *(w._version for w in weights), *torch.stack(norms).tolist()
