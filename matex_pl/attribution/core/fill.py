"""What stands in for pixels that are taken away, and the tokens that stand in for words."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from matex_pl.arguments import check_choice
from matex_pl.clip.model import Clip

Fill = Literal["mean_film", "mean_colour", "blur"]
FILLS = get_args(Fill)


def check_fill(kind: str, clip: Clip) -> None:
    """Refuse a fill that this model has no pixels for.

    Raises:
        ValueError: It is the mean film, and the model carries none.
    """
    if kind == "mean_film" and clip.mean_film.isnan().any():
        raise ValueError(
            "fill='mean_film' needs the mean of the training films, which neither the checkpoint nor a data module "
            "gave to the model. Use fill='blur' or 'mean_colour', or set `clip.mean_film`."
        )


def fill_images(kind: str, clip: Clip, images: Tensor) -> Tensor:
    """What stands in for removed pixels, in the model's normalised frame; broadcasts to `images`.

    Args:
        kind: `mean_film` (position-wise mean of training films), `mean_colour` (0, as published) or `blur`. On
            radiographs a constant fill looks like a consolidation.
        clip: The model, which carries the mean film.
        images: `(B, 3, H, W)` normalised.

    Raises:
        ValueError: There is no such fill, or the model carries no mean film.
    """
    check_choice("fill", kind, FILLS)
    check_fill(kind, clip)
    if kind == "mean_film":
        return clip.normalise(clip.mean_film.expand(1, 3, -1, -1))
    if kind == "mean_colour":
        return torch.zeros_like(images[:1])
    sigma = min(images.shape[-2:]) / 16
    return gaussian_blur(images, [2 * int(2 * sigma) + 1] * 2, [sigma] * 2)


def drop_tokens(tokens: Tensor, drop: Tensor, pad_id: int) -> Tensor:
    """Tokens `(..., T)` with pads where `drop` `(..., T)` bool says so; what is left stays in its place."""
    return torch.where(drop, pad_id, tokens)
