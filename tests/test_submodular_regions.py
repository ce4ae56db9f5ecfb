"""The greedy search for regions against its slow literal version, against brute force, and its cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from families import family
from reference import least_angles, raw_submodular_regions
from test_matex import REFERENCE_PHRASES, pairs
from torch import Tensor

from matex_pl.attribution import SubmodularRegions
from matex_pl.attribution.core.fill import fill_images
from matex_pl.attribution.submodular_regions import (
    Seen,
    Weights,
    angles_between,
    effectiveness,
    search,
    search_rounds,
)
from matex_pl.clip import Clip

# One of them explained, so that it is no class of its own.
REFERENCES = [*REFERENCE_PHRASES, "mass", "cardiomegaly"]
EQUAL = {"confidence": 1.0, "effectiveness": 1.0, "consistency": 1.0, "collaboration": 1.0}
SETTINGS: list[dict[str, Any]] = [
    {"regions": 6, "pending": 2},
    {"regions": 6, "pending": 1, "target": "margin", **EQUAL},
    {"regions": 6, "pending": 0, "target": "probability", **EQUAL, "confidence": 3.0},
    {"regions": 24, "pending": 3, "target": "probability"},
    {"regions": 24, "pending": 8, **EQUAL, "effectiveness": 5.0},
    {"regions": 6, "pending": 0, "target": "margin", "confidence": 0.0, "fill": "blur"},
]
PARTS = ("order", "insertion", "deletion", "gains", "region")


def small(clip: Clip, count: int = 3) -> tuple[Tensor, Tensor, list[str]]:
    images, tokens, phrases = pairs(clip)
    return images[:count], tokens[:count], phrases[:count]


CASES = [("native", settings) for settings in SETTINGS] + [("resnet", SETTINGS[i]) for i in (0, 2, 3)]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_against_the_reference(name: str, settings: dict[str, Any]) -> None:
    clip = family(name, torch.float64)
    images, tokens, phrases = (part[1 : 2 + (settings["regions"] == 6)] for part in pairs(clip))
    slow = {key: value for key, value in settings.items() if key != "fill"}
    fill = fill_images(settings.get("fill", "mean_image"), clip, images).expand_as(images)
    raw = raw_submodular_regions(clip, images, tokens, fill=fill, references=REFERENCES, **slow)
    expected = reference.finish(clip, raw, images, tokens)
    maps = SubmodularRegions(references=REFERENCES, **settings).attribute(clip, images, tokens, phrases)
    assert maps.parts.keys() == {*PARTS, "embeddings"}
    assert torch.equal(maps.parts["order"], raw["order"])
    assert torch.equal(maps.parts["region"], raw["region"])
    for part in ("insertion", "deletion", "gains"):
        torch.testing.assert_close(maps.parts[part], raw[part], atol=1e-9, rtol=0)
    for part in ("image", "grid", "text", "score"):
        torch.testing.assert_close(getattr(maps, part), expected[part], atol=1e-7, rtol=0, check_dtype=False)


def test_settings_are_no_easy_case() -> None:
    """Each argument changes the order of some pair."""
    clip = family("native", torch.float64)
    batch = small(clip, 2)

    def order(**changes: Any) -> Tensor:
        method = SubmodularRegions(**({"regions": 24, "references": REFERENCES, **EQUAL} | changes))
        return method.attribute(clip, *batch).parts["order"]

    usual = order()
    for changes in (
        *({name: 10.0} for name in EQUAL),
        {"pending": 0},
        {"pending": 2},
        {"target": "margin"},
        {"target": "probability"},
        {"fill": "blur"},
        {"references": REFERENCES[:2]},
    ):
        assert not torch.equal(order(**changes), usual), changes


def test_plain_search_is_brute_force() -> None:
    """Without a second end, every region in turn is the best of all that are left, as the scores themselves say."""
    clip = family("native", torch.float64)
    images, tokens, phrases = small(clip, 1)
    settings = {"regions": 6, "confidence": 0.0, "effectiveness": 0.0, "consistency": 1.0, "collaboration": 3.0}
    maps = SubmodularRegions(pending=0, **settings).attribute(clip, images, tokens, phrases)
    region = maps.parts["region"][0].view(clip.grid).repeat_interleave(8, 0).repeat_interleave(8, 1)
    fill = fill_images("mean_image", clip, images)[0]

    def score(subset: list[int]) -> float:
        shown = torch.where(torch.isin(region, torch.tensor(subset)), images[0], fill)
        return float(clip.similarity(shown[None], tokens).detach())

    def value(subset: list[int]) -> float:
        return score(subset) + 3 * (1 - score([i for i in range(6) if i not in subset]))

    order: list[int] = []
    while len(order) < 6:
        order.append(max((i for i in range(6) if i not in order), key=lambda i: value([*order, i])))
    assert maps.parts["order"][0].tolist() == order
    assert maps.parts["insertion"][0].tolist() == pytest.approx([score(order[:r]) for r in range(7)])
    assert maps.parts["deletion"][0].tolist() == pytest.approx([score(order[r:]) for r in range(7)])


# --- the search alone


def additive(gains: Tensor) -> Any:
    """Subsets whose score is the sum of the gains `(B, R)` of their regions."""

    def look_at(members: Tensor, candidates: Tensor) -> Seen:
        kept = (gains * members).sum(1, keepdim=True) + gains.gather(1, candidates)
        return Seen(kept, gains.sum(1, keepdim=True) - kept, torch.zeros_like(kept))

    return look_at


def apart(pairs: int, regions: int) -> Tensor:
    drawn = torch.randn(pairs, regions, 5, generator=torch.Generator().manual_seed(3)).double()
    return angles_between(torch.nn.functional.normalize(drawn, dim=2))


ONLY = Weights(0, 0, 1, 1)


@pytest.mark.parametrize("pending", [0, 1, 2, 3, 8, 100])
@pytest.mark.parametrize("regions", [1, 2, 3, 8, 9, 10, 11])
def test_a_sum_is_put_in_order(regions: int, pending: int) -> None:
    """From either end, with any number of pending ones: a proxy that is exact misses nothing."""
    gains = torch.randn(4, regions, generator=torch.Generator().manual_seed(1)).double()
    order, insertion, deletion = search(additive(gains), apart(4, regions), ONLY, pending)
    expected = gains.argsort(1, descending=True)
    assert torch.equal(order, expected)
    for r in range(1, regions):
        kept = gains.gather(1, expected[:, :r]).sum(1)
        torch.testing.assert_close(insertion[:, r], kept)
        torch.testing.assert_close(deletion[:, r], gains.sum(1) - kept)


@pytest.mark.parametrize("pending", [0, 1, 2, 8])
def test_equal_regions_keep_their_order(pending: int) -> None:
    """And the one that matters is the first, in whatever place it is; the others tie, from either end."""
    gains = torch.zeros(9, 9).double().fill_diagonal_(1.0)
    order, *_ = search(additive(gains), apart(9, 9), ONLY, pending)
    assert order[:, 0].tolist() == list(range(9))
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(9, -1))
    if not pending:
        assert order[4].tolist() == [4, 0, 1, 2, 3, 5, 6, 7, 8]


def test_a_score_of_one_region_ranks_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole method, with a tower that sees the brightness of one region of each image."""
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    places = [0, 2, 3, 5, 1]
    text = clip.encode_text(tokens).detach()
    towards = torch.nn.functional.normalize(text.sum(0), dim=0)
    brightness = [5.0 + b for b in range(5)]

    def encode(shown: Tensor) -> Tensor:
        """The common direction of all phrases where the region is kept, the other way where it is filled."""
        cells = shown[:, 0].reshape(len(shown), 2, 16, 3, 16).mean((2, 4)).flatten(1)
        there = (cells[:, places] - torch.tensor(brightness)).abs() < 1e-9
        return torch.where(there.any(1, keepdim=True), towards, -towards)

    for b, (place, value) in enumerate(zip(places, brightness, strict=True)):
        y, x = place // 3 * 16, place % 3 * 16
        images[b, :, y : y + 16, x : x + 16] = value
    monkeypatch.setattr(clip, "encode_image", encode)
    for pending in (0, 2):
        method = SubmodularRegions(regions=6, pending=pending, confidence=0)
        maps = method.attribute(clip, images, tokens, phrases)
        assert maps.parts["order"][:, 0].tolist() == places
        cosines = text @ towards
        torch.testing.assert_close(maps.parts["gains"][:, 0], 4 * cosines)
        # What the docstring says of the authors' rule.
        assert not maps.image.any()


def test_effectiveness() -> None:
    drawn = torch.nn.functional.normalize(torch.randn(1, 6, 4, dtype=torch.float64), dim=2)
    angles = angles_between(drawn)
    for members in ([], [2], [0, 3], [0, 2, 3, 5]):
        mask = torch.zeros(1, 6, dtype=torch.bool)
        mask[:, members] = True
        candidates = [i for i in range(6) if i not in members]
        expected = [least_angles([drawn[0, i] for i in [*members, v]]) for v in candidates]
        found = effectiveness(angles, mask, torch.tensor([candidates]))
        torch.testing.assert_close(found[0], torch.stack(expected))


# --- one answer, whoever asks


@pytest.mark.parametrize("target", ["cosine", "margin", "probability"])
def test_batched_equals_single(target: str) -> None:
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    together = [
        SubmodularRegions(12, pending=3, chunk_size=size, target=target, references=REFERENCES).attribute(
            clip, images, tokens, phrases
        )
        for size in (128, 7)
    ]
    method = SubmodularRegions(12, pending=3, target=target, references=REFERENCES)
    for b in range(len(phrases)):
        one = slice(b, b + 1)
        alone = method.attribute(clip, images[one], tokens[one], phrases[one])
        for maps in together:
            torch.testing.assert_close(alone.image, maps.image[one], atol=1e-6, rtol=0)
            torch.testing.assert_close(alone.grid, maps.grid[one], atol=1e-6, rtol=0)
            assert torch.equal(alone.parts["order"], maps.parts["order"][one])


@pytest.mark.parametrize("target", ["cosine", "probability"])
@pytest.mark.parametrize("fill", ["mean_image", "blur"])
def test_phrases_of_one_image(fill: str, target: str) -> None:
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    method = SubmodularRegions(6, pending=2, fill=fill, target=target, references=REFERENCES)
    pairwise = method.attribute(clip, images[:1].expand(5, -1, -1, -1), tokens, phrases)
    together = method.attribute_phrases(clip, images[0], phrases)
    torch.testing.assert_close(together.image, pairwise.image, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.text, pairwise.text)
    for part in PARTS:
        torch.testing.assert_close(together.parts[part], pairwise.parts[part])


def test_the_phrase_is_one_class() -> None:
    """Named once more among the references, in whatever batch, it counts once; with no other class it is certain."""
    clip = family("native", torch.float64)
    images, tokens, phrases = small(clip)

    def found(references: list[str]) -> Any:
        method = SubmodularRegions(6, target="probability", references=references)
        return method.attribute(clip, images, tokens, phrases)

    with_it, without = found([*REFERENCE_PHRASES, phrases[1]]), found(REFERENCE_PHRASES)
    torch.testing.assert_close(with_it.parts["insertion"][1], without.parts["insertion"][1])
    assert not torch.equal(with_it.parts["insertion"][0], without.parts["insertion"][0])
    alone = found([phrases[1]])
    torch.testing.assert_close(alone.parts["insertion"][1], torch.ones(7).double())
    assert not alone.image[1].any()
    assert alone.image[0].any()


def test_probabilities_of_margins_are_those_of_cosines() -> None:
    """The confidence does not depend on what is explained: with it alone, the order is the same."""
    clip = family("native", torch.float64)
    weights = {"confidence": 1.0, "effectiveness": 0.0, "consistency": 0.0, "collaboration": 0.0}
    orders = [
        SubmodularRegions(6, **weights, target=target, references=REFERENCES)
        .attribute(clip, *small(clip))
        .parts["order"]
        for target in ("cosine", "margin", "probability")
    ]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    clip = family("square", dtype)
    maps = SubmodularRegions(references=REFERENCES).attribute(clip, *small(clip))
    assert maps.image.dtype == torch.float32
    assert (maps.image.flatten(1).amax(1) == 1).all()
    assert (maps.image.flatten(1).amin(1) == 0).all()
    assert not maps.text.any()


# --- what it costs


@pytest.mark.parametrize("pending", [0, 2, 8])
@pytest.mark.parametrize("regions", [2, 6, 24])
def test_forwards_are_counted(regions: int, pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = family("native")
    images, tokens, phrases = small(clip)
    # A model is checked once, by a forward of one sample.
    SubmodularRegions(regions).check_model(clip)
    sizes: list[int] = []
    encode = clip.encode_image

    def counted(shown: Tensor) -> Tensor:
        sizes.append(len(shown))
        return encode(shown)

    monkeypatch.setattr(clip, "encode_image", counted)
    method = SubmodularRegions(regions, pending=pending, chunk_size=10, references=REFERENCES)
    count = int(method.attribute(clip, images, tokens, phrases).parts["order"].shape[1])
    assert count == regions
    assert sum(sizes) == 3 * method.forwards() == 3 * method.forwards(regions)
    assert max(sizes) <= 10
    sizes.clear()
    method.attribute_phrases(clip, images[0], phrases)
    shared = 2 + 2 * regions
    assert sum(sizes) == shared + 3 * (method.forwards() - shared)


def test_the_forwards_that_are_stated() -> None:
    assert SubmodularRegions().forwards() == 1594
    assert "1594" in SubmodularRegions.cost
    assert SubmodularRegions(pending=0).forwards() == 2450
    assert SubmodularRegions().forwards(1) == 4
    assert search_rounds(49, 8) == [*((m, 8) for m in range(49, 8, -2)), *((m, 0) for m in range(7, 1, -1))]


def test_references_are_not_encoded_where_nothing_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = family("native", torch.float64)
    monkeypatch.setattr(clip, "tokenize", None)
    SubmodularRegions(4, confidence=0).attribute(clip, *small_without_words(clip))


def small_without_words(clip: Clip) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(1, 3, *clip.image_size, generator=generator).to(clip.std.dtype)
    return images, torch.tensor([[49406, 320, 49407] + [0] * 13]), ["a"]


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": 1}, "regions must be at least 2, got 1"),
        ({"pending": -1}, "pending must be at least 0, got -1"),
        ({"chunk_size": 0}, "chunk_size must be a number greater than 0, got 0"),
        ({"confidence": -0.5}, "The weight confidence must be a finite number of at least 0, got -0.5"),
        ({"effectiveness": float("nan")}, "The weight effectiveness must be a finite number .* got nan"),
        (
            {"confidence": 0, "effectiveness": 0, "consistency": 0, "collaboration": 0},
            "are all 0, which leaves no score to search for",
        ),
        ({"fill": "black"}, "fill must be one of mean_image, mean_color, blur, got 'black'"),
        ({"target": "logit"}, "target must be one of cosine, margin, probability, got 'logit'"),
        ({"references": []}, "references must name at least one phrase"),
    ],
    ids=str,
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubmodularRegions(**settings)


def test_a_model_without_the_fill_is_refused() -> None:
    source = family("square", torch.float64)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    clip.mean_image.fill_(torch.nan)
    with pytest.raises(ValueError, match="no mean of the training images, which fill='mean_image' needs"):
        SubmodularRegions().attribute(clip, *small(clip))
