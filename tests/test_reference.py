"""The slow literal towers are those of the models, and the models are no easy case."""

from __future__ import annotations

from typing import Any

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


# --- the other methods

METHODS = (
    "grad_cam",
    "saliency",
    "integrated_gradients",
    "kernel_shap",
    "rise",
    "chefer",
    "grad_eclip",
    "rollout",
    "legrad",
    "dense_similarity",
    "m2ib",
    "nib",
)
TOKENS_ONLY = ("m2ib", "nib")


def both(name: str, number: int = 1, target: str = "cosine") -> tuple[reference.Side, reference.Side]:
    """The image side and the text side of one pair."""
    clip = family(name, torch.float64)
    images, tokens = pairs(clip)
    return reference.sides(clip, number, images[number], tokens[number], target, PHRASES[:2])[:2]


def material(name: str, method: str) -> dict[str, Any]:
    """Small settings, and what is random where a method needs it."""
    generator = torch.Generator().manual_seed(3)
    clip = family(name, torch.float64)

    def coins(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    if method == "rise":
        offsets = torch.randint(0, 4, (6, 2), generator=generator)
        return {"grids": coins(6, 3, 3), "offsets": offsets, "keep": coins(6, clip.context_length)}
    if method == "kernel_shap":
        patches, counts = len(both(name)[0].among), clip.content(pairs(clip)[1]).sum(1).tolist()
        return {"coalitions": coins(30, patches), "text_coalitions": [coins(20, count) for count in counts]}
    if method == "m2ib":
        shapes = ((2, 2, 40, side.run.stream[0].shape[1]) for side in both(name))
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return dict(zip(("noise", "text_noise"), drawn, strict=True))
    return {"integrated_gradients": {"steps": 3}, "nib": {"steps": 2}, "grad_cam": {"layers": [-1, -3]}}.get(method, {})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_speaks_of_every_family(method: str, name: str) -> None:
    clip = family(name, torch.float64)
    images, tokens = pairs(clip)
    call = getattr(reference, f"raw_{method}")
    if name == "resnet" and method in TOKENS_ONLY:
        with pytest.raises(ValueError, match="ResNet"):
            call(clip, images, tokens, **material(name, method))
        return
    raw = call(clip, images, tokens, **material(name, method))
    maps = reference.finish(clip, raw, images, tokens)
    assert all(z.isfinite().all() for z in {**raw, **maps}.values())
    # Of a few pairs, a ReLU leaves nothing.
    assert (raw["image"].flatten(1).std(1) > 0).any()
    assert maps["image"].shape == (len(images), *clip.image_size)
    assert maps["grid"].shape == (len(images), *clip.grid)
    assert not maps["text"][~clip.content(tokens)].any()
    assert not maps["text"][2].any()
    assert maps["text"][0].any() == (method != "dense_similarity")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tail_from_the_stream_gives_the_embedding(name: str) -> None:
    for side in both(name):
        for first, tokens in enumerate(side.run.stream):
            found = reference.tail(side.tower, tokens, first)
            torch.testing.assert_close(found.embedding, side.run.embedding, atol=1e-12, rtol=0)
            assert len(found.layers) == len(side.run.layers) - first


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_is_read_as_the_tower_is(name: str) -> None:
    for side in both(name, target="margin"):
        score, last = side.score(side.run), len(side.run.layers) - 1
        torch.testing.assert_close(reference.layer_score(side, last), score, atol=1e-12, rtol=0)
        if last:
            assert abs(reference.layer_score(side, 0) - score) > 1e-3


@pytest.mark.parametrize("name", ["native", "siglip", "biomedclip", "coca"])
def test_integrated_gradients_are_complete(name: str) -> None:
    """What is missing goes to 0 with the number of steps."""
    for side in both(name):
        base = torch.zeros_like(side.x)
        coarse, fine = (abs(reference.integrated(side, base, steps)[1]) for steps in (4, 256))
        assert fine < 1e-6
        assert fine < coarse


def test_shapley_values_are_those_of_the_kernel_regression() -> None:
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(2**5, generator=generator, dtype=torch.float64)

    def game(kept: Tensor) -> Tensor:
        return table[sum(2**f for f in range(5) if kept[f])]

    values = reference.exact_shapley(game, 5)
    torch.testing.assert_close(values.sum(), table[-1] - table[0])
    torch.testing.assert_close(reference.kernel_shap(game, 5, None, None), values)


def test_shapley_values_of_a_phrase() -> None:
    _, side = both("siglip")
    clip, count = side.clip, len(side.among)
    images, tokens = (z[1:2] for z in pairs(clip))
    exact = reference.exact_shapley(lambda kept: reference.kept_words(side, kept), count)
    raw = reference.raw_kernel_shap(clip, images, tokens, material("siglip", "kernel_shap")["coalitions"])
    torch.testing.assert_close(raw["text_values"][0, side.among], exact)


def test_one_feature_alone_is_the_whole_difference() -> None:
    values = reference.kernel_shap(lambda kept: kept.double().sum() * 3 + 1, 1, None, None)
    torch.testing.assert_close(values, torch.tensor([3.0]).double())


def test_patches_are_grouped_only_where_there_are_many() -> None:
    assert reference.patch_groups((2, 3), 64) == list(range(6))
    assert reference.patch_groups((8, 8), 64) == list(range(64))
    assert reference.patch_groups((3, 5), 6) == [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5]


def test_groups_that_go_take_their_pixels_along() -> None:
    side, _ = both("native")
    groups = reference.patch_groups(side.tower.grid, 6)
    assert groups == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 3, 3, 4, 4, 5, 5]
    base, kept = torch.ones_like(side.x), torch.tensor([True, True, True, True, False, True])
    image = side.x.detach().clone()
    image[:, 16:32, 16:32] = 1
    expected = side.score(reference.run(side.tower, image))
    torch.testing.assert_close(reference.kept_patches(side, base, groups, kept), expected)


def test_rise_masks() -> None:
    everything = reference.rise_mask(torch.ones(7, 7, dtype=torch.float64), torch.tensor([2, 1]), (20, 16))
    torch.testing.assert_close(everything, torch.ones(20, 16, dtype=torch.float64))
    grid = (torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    # 3 cells of 4 pixels in 12, drawn over 16.
    drawn = torch.nn.functional.interpolate(grid[None, None], size=(16, 16), mode="bilinear")[0, 0]
    torch.testing.assert_close(reference.rise_mask(grid, torch.tensor([3, 1]), (12, 11)), drawn[3:15, 1:12])


def test_rise_of_a_score_that_says_what_is_kept() -> None:
    """Centered, the mean over many masks is the share that each entry adds."""
    masks = list((torch.rand(4000, 3, generator=torch.Generator().manual_seed(1)) < 0.5).double())
    adds = torch.tensor([1.0, -2.0, 0.5]).double()
    found = reference.rise([(mask * adds).sum() + 3 for mask in masks], masks, 0.5, True)
    torch.testing.assert_close(found, adds * 0.5, atol=0.05, rtol=0)
    kept = reference.rise([torch.tensor(2.0)] * len(masks), masks, 0.5, False)
    torch.testing.assert_close(kept, torch.full((3,), 2.0).double(), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["square", "siglip", "coca", "prefixed", "biomedclip", "average"])
def test_a_patch_alone_is_read_as_it_would_stand_there(name: str) -> None:
    side, _ = both(name)
    last, kind = side.run.stream[-1], side.run.pooling.kind
    for i, value in list(zip(side.among, reference.dense_similarity(side, "patch"), strict=True))[:3]:
        if kind == "token":
            alone = torch.cat([last[i][None], last[1:]])
        elif kind == "query":
            alone = last[i][None]
        else:
            alone = torch.cat([last[: side.among[0]], last[i].expand(len(side.among), -1)])
        expected = side.score(reference.tail(side.tower, alone, len(side.tower.blocks)))
        torch.testing.assert_close(value, expected)


def test_the_bottleneck_counts_the_divergence_from_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, share = (torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.distributions.Normal(torch.zeros(3, 4).double(), 1)
    passed = torch.distributions.Normal(share * hidden, 1 - share)
    expected = torch.distributions.kl_divergence(passed, noise)
    torch.testing.assert_close(reference.information(hidden, share), expected)


def test_a_bottleneck_that_costs_much_closes() -> None:
    side, _ = both("square")
    noise = torch.randn(30, 1, *side.run.stream[0].shape, generator=torch.Generator().manual_seed(2)).double()
    everything = list(range(noise.shape[2]))
    hidden = side.run.stream[1].detach()
    opened = reference.m2ib(side, noise[:1], everything, -3, 0.1, 1.0, False)
    start = torch.full_like(hidden, 5).sigmoid()
    torch.testing.assert_close(opened, reference.information(hidden, start).sum(1))
    closed = reference.m2ib(side, noise, everything, -3, 1e6, 1.0, True)
    assert (closed < 0.1 * opened).all()


def test_blocks_are_named_from_either_end() -> None:
    assert [reference.block_number(number, 4) for number in (0, 3, -1, -4, -8)] == [0, 3, 3, 0, 0]


def test_logits_are_explained_as_scaled_cosines() -> None:
    clip = family("square", torch.float64)
    images, tokens = pairs(clip)
    cosine, logit = (reference.raw_chefer(clip, images, tokens, target=target) for target in ("cosine", "logit"))
    for which in ("image", "text"):
        # Of one layer alone, the relevance of all but the class token is linear in the scale.
        torch.testing.assert_close(logit[which], cosine[which] * clip.logit_scale.detach().exp())
