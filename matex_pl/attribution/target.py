"""What is explained: the cosine of a pair, or its margin over reference phrases."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from matex_pl.clip import Clip

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
_PLACES = ("", "right", "left", "bilateral", "right upper lobe", "left upper lobe", "right lower lobe", "left lower lobe")

REFERENCES: tuple[str, ...] = ("cardiomegaly", *(f"{place} {name}".strip() for name in _PLACED for place in _PLACES))
"""Common findings by side and zone: the phrases that `explain="margin"` compares with unless told otherwise."""


def score_and_target(image: Tensor, text: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine of each pair and the scalar to explain, both `(B,)`.

    The margin is <f_i, f_t - mean of f_r>: all phrases of this field share a large common direction, which the cosine explains too.

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
    """Mean embedding of the reference phrases, `(D,)`; encoded once per weights of the text tower."""
    key = (tuple(references), *_fingerprint(clip))
    if clip.model not in _MEANS or _MEANS[clip.model][0] != key:
        _MEANS[clip.model] = key, clip.encode_text(clip.tokenize(references)).mean(0)
    return _MEANS[clip.model][1]


def _fingerprint(clip: Clip) -> tuple[object, ...]:
    """Changes when the text tower's weights do. By value: version counters do not see fused optimisers."""
    weights = [parameter for name, parameter in clip.model.named_parameters() if not name.startswith("visual.")]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(weights)])
    return weights[0].dtype, weights[0].device, torch.is_autocast_enabled(weights[0].device.type), *norms.tolist()
