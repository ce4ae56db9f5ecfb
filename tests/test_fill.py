"""What stands in for removed pixels and words."""

from __future__ import annotations

import copy

import pytest
import torch
from families import family

from matex_pl.attribution.core.fill import FILLS, drop_tokens, fill_images
from matex_pl.clip import Clip
from matex_pl.metrics.functional import keep_highlighted


@pytest.fixture
def clip() -> Clip:
    source = family("native")
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    clip.mean_image.copy_(torch.rand(clip.mean_image.shape))
    return clip


def test_fills(clip: Clip) -> None:
    images = torch.randn(2, 3, *clip.image_size)
    mean_image = fill_images("mean_image", clip, images)
    torch.testing.assert_close(mean_image[0] * clip.std + clip.mean, clip.mean_image.expand(3, -1, -1))
    assert (fill_images("mean_color", clip, images) == 0).all()
    blurred = fill_images("blur", clip, images)
    assert blurred.shape == images.shape
    assert blurred.var() < images.var() / 4
    flat = torch.full_like(images, 0.7)
    torch.testing.assert_close(fill_images("blur", clip, flat), flat)
    with pytest.raises(ValueError, match="mean_image, mean_color, blur, got 'black'"):
        fill_images("black", clip, images)


def test_a_model_without_a_mean_image_is_refused(clip: Clip) -> None:
    clip.mean_image.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"mean of the training images.*fill='blur' or 'mean_color'"):
        fill_images("mean_image", clip, torch.randn(2, 3, *clip.image_size))


@pytest.mark.parametrize("kind", FILLS)
def test_fill_broadcasts_to_the_images(kind: str, clip: Clip) -> None:
    images = torch.randn(2, 3, *clip.image_size)
    fill = fill_images(kind, clip, images)
    nothing_kept = keep_highlighted(images, torch.zeros(2, *clip.image_size), fill)
    torch.testing.assert_close(nothing_kept, fill.expand_as(images))


def test_dropped_tokens_leave_the_others_in_place() -> None:
    tokens = torch.tensor([[9, 4, 5, 8]])
    assert drop_tokens(tokens, torch.tensor([[False, True, False, False]]), 0).tolist() == [[9, 0, 5, 8]]
