"""The slow literal towers are those of the models, and the models are no easy case."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, family
from torch import Tensor

from matex_pl.clip import Clip

# Cut to the context length, filled up with pad tokens, and without a word.
PHRASES = [
    "right apical pneumothorax and small bilateral pleural effusions with an enlarged heart, as before",
    "nodule of the lung",
    "",
]


def pairs(clip: Clip) -> tuple[Tensor, Tensor]:
    """An image and the tokens of each phrase, in the model's dtype."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(len(PHRASES), 3, *clip.image_size, generator=generator)
    return images.to(clip.std.dtype), clip.tokenize(PHRASES)


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_are_those_of_the_model(name: str) -> None:
    clip = family(name, torch.float64)
    images, tokens = pairs(clip)
    with torch.no_grad():
        expected = clip.encode_image(images), clip.encode_text(tokens)
        for b in range(len(PHRASES)):
            image, text = reference.encode_image(clip, images[b])[0], reference.encode_text(clip, tokens[b])[0]
            torch.testing.assert_close(image, expected[0][b], atol=1e-9, rtol=0)
            torch.testing.assert_close(text, expected[1][b], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_no_easy_case(name: str) -> None:
    """Attention peaks in every block and in what is read, and the gradient terms are of both signs."""
    clip = family(name, torch.float64)
    images, tokens = pairs(clip)
    content = clip.content(tokens)[0].nonzero()[:, 0].tolist()
    image, *image_side = reference.encode_image(clip, images[0].requires_grad_())
    text, *text_side = reference.encode_text(clip, tokens[0])
    for (layers, reading), among in ((image_side, image_side[1].patches), (text_side, content)):
        assert len(among) > 8
        rows = reference.rows(layers, reading)
        assert max(row.amax() * len(row) for row in rows) > 2
        for layer, row in zip(layers, rows, strict=True):
            torch.testing.assert_close(row.sum(), torch.ones_like(row[0]))
            assert layer.mean().amax() > 2 / len(row)
        for values in reference.gradient_maps(layers, (image * text).sum(), reading, among, 3, "softmax"):
            assert min(values) < 0 < max(values)


@pytest.mark.parametrize("name", FAMILIES)
def test_softmax_terms_are_complete(name: str) -> None:
    """Summed over all tokens of a block, the terms give <g, o> of the rows that count."""
    clip = family(name, torch.float64)
    images, tokens = pairs(clip)
    image, *image_side = reference.encode_image(clip, images[1].requires_grad_())
    text, *text_side = reference.encode_text(clip, tokens[1])
    score = (image * text).sum()
    for layers, reading in (image_side, text_side):
        for layer, rows in zip(layers, reference.counted(layers, reading), strict=True):
            gradient = torch.autograd.grad(score, layer.output, retain_graph=True)
            whole = sum((g[rows] * o[rows]).sum() for g, o in zip(gradient, layer.output, strict=True))
            terms = [reference.gradient_term(layer, gradient, rows, i) for i in range(len(layer.key[0]))]
            torch.testing.assert_close(sum(terms), whole, atol=1e-12, rtol=1e-9)
