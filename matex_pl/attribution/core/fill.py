"""Replacement of removed pixels, and of removed words by pad tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from matex_pl.arguments import check_choice
from matex_pl.clip.model import Clip

Fill = Literal["mean_image", "mean_color", "blur"]
FILLS = get_args(Fill)


def check_fill(kind: str, clip: Clip) -> None:
    """Refuse a fill whose pixels the model lacks.

    Raises:
        ValueError: If the fill is the mean image and the model has none.
    """
    if kind == "mean_image" and clip.mean_image.isnan().any():
        raise ValueError(
            "The model has no mean of the training images, which fill='mean_image' needs: neither the checkpoint nor "
            "a data module set it. Use fill='blur' or 'mean_color', or set `clip.mean_image`."
        )


def fill_images(kind: str, clip: Clip, images: Tensor) -> Tensor:
    """Replacement pixels in the model's normalized frame, of a shape that broadcasts to `images`.

    Args:
        kind: `mean_image` (position-wise mean of training images), `mean_color` (0, as published) or `blur`. On
            radiographs a constant fill looks like a consolidation.
        clip: CLIP model, which carries the mean image.
        images: `(B, 3, H, W)` normalized images.

    Raises:
        ValueError: If there is no such fill, or the model has no mean image.
    """
    check_choice("fill", kind, FILLS)
    check_fill(kind, clip)
    if kind == "mean_image":
        return clip.normalize(clip.mean_image.to(images.device).expand(1, 3, -1, -1))
    if kind == "mean_color":
        return torch.zeros_like(images[:1])
    sigma = min(images.shape[-2:]) / 16
    return gaussian_blur(images, [2 * int(2 * sigma) + 1] * 2, [sigma] * 2)


def drop_tokens(tokens: Tensor, drop: Tensor, pad_id: int) -> Tensor:
    """Tokens `(..., T)` with pads where `drop` `(..., T)` bool is true; the other tokens keep their position."""
    return torch.where(drop, pad_id, tokens)
