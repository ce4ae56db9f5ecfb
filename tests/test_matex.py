"""MATEX against its slow literal version, and against cases whose answer is known."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES, family
from torch import Tensor

from matex_pl.anatomy import parse_phrase
from matex_pl.attribution import Chefer, Matex, PriorOnly
from matex_pl.attribution.core.capture import borrowed, capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import (
    attention_rows,
    gradients_of,
    loosened_term,
    rollout_rows,
    row_shares,
    row_weights,
    softmax_term,
)
from matex_pl.attribution.matex import attention_flow, consistency, layer_weights
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.towers import Pooling
from matex_pl.maps import Attribution, min_max

# Several lengths, one content token, none, none that names a place, and one that is cut to the context length.
PHRASES = [
    "left lower lobe consolidation",
    "mass",
    "",
    "right apical pneumothorax and small bilateral pleural effusions with an enlarged heart, as before",
    "nodule of the lung",
]
IMAGE = torch.tensor(
    [[0.1, 0.0, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.8, 0.9], [-0.2, -0.1, 1.2, 1.3], [0.0, 0.3, 1.0, 1.4]]
)
REFERENCE_PHRASES = ["cardiomegaly", "right pleural effusion", "no finding in the left upper lobe"]


def pairs(clip: Clip, phrases: list[str] = PHRASES) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(len(phrases), 3, *clip.image_size, generator=generator).to(clip.std.dtype)
    return images, clip.tokenize(phrases), phrases


def assert_agree(expected: dict[str, Tensor], maps: Attribution, tolerance: float) -> None:
    for name, wanted in expected.items():
        got = getattr(maps, name, None)
        got = maps.parts[name] if got is None else got
        torch.testing.assert_close(
            got.to(wanted), wanted, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"spatial_weight": "loosened"},
    {"grad_layers": 1},
    {"grad_layers": 12},
    {"grad_layers": "all", "skip_layers": 1},
    {"grad_layers": "all", "skip_layers": 9, "text_grad_layers": 2},
    {"grad_layers": 2, "skip_layers": 3, "text_grad_layers": "all"},
    {"grad_layers": 2, "text_grad_layers": 1},
    {"tau": 0.0},
    {"tau": 2.0},
    {"flow": "rollout"},
    {"flow": "rollout", "flow_layers": 2},
    {"flow_layers": 2, "tau": 1.0},
    {"flow": "relevance"},
    {"flow": "relevance", "flow_layers": 1, "consistency_of": "relevance"},
    {"consistency_of": "relevance", "flow_layers": 2, "grad_layers": 3},
    {"flow": "relevance", "flow_layers": 99, "grad_layers": 1, "fusion": "product", "beta": 1.0},
    {"kappa": 1},
    {"kappa": 7.5},
    {"alpha": 0.1, "beta": 0.7, "lambda_c": 0.6, "delta": 0.4, "lambda_s": 3.5},
    {"alpha": 0.0, "beta": 0.0, "lambda_c": 1.0, "delta": 0.0},
    {"text_beta": 0.0},
    {"beta": 0.0, "text_beta": 1.5},
    {"fuse_at": "grid"},
    {"fusion": "product"},
    {"fusion": "product", "fuse_at": "grid", "prior_power": 1.0},
    {"fusion": "product", "delta": 0.0},
    {"target": "margin", "references": REFERENCE_PHRASES},
    {"target": "margin", "references": REFERENCE_PHRASES, "spatial_weight": "loosened", "flow": "rollout"},
    {"prior_shape": "gaussian"},
    {"prior_shape": "plateau", "laterality": "paper", "fuse_at": "grid"},
    {"laterality": "paper"},
]


# Every setting on a frame that is not square with images in it, the ones that touch the towers on every family.
CASES = [("native", settings) for settings in SETTINGS]
TOWERS: list[dict[str, Any]] = [
    {},
    {"grad_layers": 12, "kappa": 1},
    {"spatial_weight": "loosened", "text_grad_layers": 1},
    {"flow": "rollout", "fuse_at": "grid"},
    {"target": "margin", "references": REFERENCE_PHRASES, "fusion": "product"},
    {"flow": "relevance", "consistency_of": "relevance", "grad_layers": 1, "beta": 1.0},
    {"flow": "relevance", "flow_layers": 2, "spatial_weight": "loosened"},
]
CASES += [(name, settings) for name in FAMILIES if name != "native" for settings in TOWERS]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_against_the_reference(name: str, settings: dict[str, Any]) -> None:
    clip, content_box = family(name, torch.float64), IMAGE
    batch = pairs(clip)
    if name != "native":
        # The literal version is slow on towers of timm's size.
        batch, content_box = (batch[0][:3], batch[1][:3], batch[2][:3]), IMAGE[:3]
    expected = reference.matex(clip, *batch, content_box, **settings)
    assert_agree(expected, Matex(**settings).attribute(clip, *batch, content_box), 1e-6)


PAPER: dict[str, Any] = {"kappa": 1, "laterality": "paper", "fuse_at": "grid"}
MEASURED: dict[str, Any] = {"grad_layers": "all", "skip_layers": 1, "target": "margin", "fusion": "product"}
MEASURED |= {"references": REFERENCE_PHRASES, "text_beta": 2.0}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [(Matex.paper(), PAPER), (Matex(), {}), (Matex.recommended(references=REFERENCE_PHRASES), MEASURED)],
    ids=["paper", "default", "measured"],
)
def test_presets_in_float32(method: Matex, settings: dict[str, Any], name: str) -> None:
    """The library in float32 against the equations in float64, on the same weights."""
    clip, exact = family(name), family(name, torch.float64)
    images, tokens, phrases = (part[3:] for part in pairs(clip))
    expected = reference.matex(exact, images.double(), tokens, phrases, IMAGE[3:], **settings)
    # The norm of a map magnifies the rounding of its towers, most where they are deep.
    tolerance = 1e-5 if name == "native" else 5e-5
    assert_agree(expected, method.attribute(clip, images, tokens, phrases, IMAGE[3:]), tolerance)


def test_small_models_are_no_easy_case() -> None:
    """Attention peaks, maps vary, and gradients are of both signs: agreement says something."""
    clip = family("native")
    batch = pairs(clip)
    maps = Matex().attribute(clip, *batch)
    assert maps.content.sum(1).tolist() == [4, 1, 0, 14, 6]
    assert (maps.image.flatten(1).std(1) > 0.05).all()
    assert maps.parts["flow"].amax() > 2 / maps.parts["flow"][0].numel()
    assert 0.05 < (maps.parts["grad"] == 0).float().mean() < 0.6
    assert maps.parts["consistency"].std() > 0.03


# --- closed cases


@pytest.mark.parametrize("name", FAMILIES)
def test_softmax_terms_are_complete(name: str) -> None:
    """Summed over all tokens before the ReLU, the terms give <g_l, o_l> over the rows that are read, on both sides."""
    clip = family(name, torch.float64)
    images, tokens, _ = pairs(clip)
    with borrowed(clip):
        for encode, inputs, reading in (
            (clip.encode_image, images, clip.image_pooling(images)),
            (clip.encode_text, tokens, clip.text_pooling(tokens)),
        ):
            with capture_attention(reading, grad_from=0) as blocks:
                embedding = encode(inputs)
            direction = torch.linspace(-1, 1, embedding.shape[1]).to(embedding).expand_as(embedding)
            recorded = grad_blocks(blocks)
            outputs = [block.output for block in recorded]
            handles = outputs if reading.kind == "token" else [block.value for block in recorded]
            both = gradients_of(embedding, [*outputs, *handles], direction)
            gradients, by_handle = both[: len(blocks)], both[len(blocks) :]
            for block, gradient, handle in zip(recorded, gradients, by_handle, strict=True):
                whole = gradient * block.output
                if reading.kind == "token":
                    assert reading.position is not None
                    whole = whole[torch.arange(len(whole)), :, reading.position]
                total = softmax_term(block, handle, reading).sum(1)
                torch.testing.assert_close(total, whole.flatten(1).sum(1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_a_share_of_all_attention(name: str) -> None:
    """What is read in each layer is a weighted mean of attention rows: with what prefix tokens get, it sums to 1."""
    clip = family(name)
    images = pairs(clip)[0]
    with borrowed(clip), capture_attention(clip.image_pooling(images), full=True) as blocks:
        clip.encode_image(images)
    reading = clip.image_pooling(images)
    rows = attention_rows(blocks, reading)
    assert rows.shape == (len(images), len(blocks), clip.grid[0] * clip.grid[1])
    assert (rows.sum(2) <= 1 + 1e-5).all()
    assert (rows.sum(2) > 0).all()
    for weight in row_weights(blocks, reading):
        if weight is not None:
            torch.testing.assert_close(weight.sum(1), torch.ones(len(images)))


def test_flow_without_temperature_is_the_layer_mean() -> None:
    rows = torch.rand(2, 5, 3, 7).flatten(2).softmax(-1).unflatten(2, (3, 7))
    torch.testing.assert_close(attention_flow(rows, tau=1e-9), rows.mean(1))
    torch.testing.assert_close(attention_flow(rows, tau=100.0), rows[:, -1])
    weights = layer_weights(12, 0.2)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[-3:].sum()) == pytest.approx(0.5, abs=0.02)


def test_consistency_bounds() -> None:
    assert (consistency(torch.rand(2, 1, 7), 1.0) == 1).all()
    extreme = torch.tensor([0.0, 1.0])[None, :, None]
    assert float(consistency(extreme, 1.0)) == pytest.approx(2 / 3)
    stable = consistency(torch.rand(3, 6, 50) ** 4, 1.0)
    assert ((stable >= 2 / 3) & (stable <= 1)).all()


def test_consistency_of_one_layer_is_one() -> None:
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    clip = load_clip(json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}))
    maps = Matex().attribute(clip, *pairs(clip, ["left base", "edema"]))
    assert (maps.parts["consistency"] == 1).all()
    assert torch.equal(maps.parts["text_consistency"], maps.content.float())


def test_rollout_of_one_layer_is_its_row() -> None:
    attention = torch.rand(2, 5, 5).softmax(-1)
    position = torch.tensor([0, 3])
    reading, identity = Pooling("token", 5, False, position=position), torch.eye(5)
    expected = torch.stack([(attention[b, p] + identity[p]) / 2 for b, p in enumerate(position)])
    torch.testing.assert_close(rollout_rows([attention], reading)[:, 0], expected)
    both = rollout_rows([attention.flip(0), attention], reading)
    torch.testing.assert_close(both[:, 0], expected)
    torch.testing.assert_close(both.sum(2), torch.ones(2, 2))


@pytest.mark.parametrize("target", ["cosine", "margin"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_relevance_flow_alone_is_the_map_of_chefer(name: str, target: str) -> None:
    clip = family(name)
    batch, explained = pairs(clip), {"target": target, "references": REFERENCE_PHRASES}
    alone = {"alpha": 0.0, "beta": 1.0, "lambda_c": 0.0, "delta": 0.0, "flow": "relevance", "fuse_at": "grid"}
    parts = Matex(**alone, **explained).attribute(clip, *batch).parts
    layers = parts["attention_layers"].shape[1]
    for number in range(1, layers + 1):
        expected = Chefer(start_layer=-number, **explained).attribute(clip, *batch)
        maps = Matex.fuse(parts, flow_layers=number)
        assert torch.equal(maps.grid, expected.grid)
        assert torch.equal(maps.image, expected.image)
        # The text tower may have fewer blocks.
        assert torch.equal(maps.text, expected.text)
    assert torch.equal(Matex.fuse(parts).image, Chefer(start_layer=0, **explained).attribute(clip, *batch).image)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_relevance_are_shares(name: str) -> None:
    """As those of attention: with what prefix tokens get they sum to 1, and to 0 where nothing raises the score."""
    clip = family(name)
    parts = Matex(consistency_of="relevance").attribute(clip, *pairs(clip)).parts
    rows = parts["relevance_layers"]
    assert rows.shape == parts["attention_layers"].shape
    assert (rows >= 0).all()
    assert (rows.flatten(2).sum(2) <= 1 + 1e-5).all()
    assert (rows.flatten(2).sum(2) > 0).any()
    of_attention = consistency(parts["attention_layers"], clip.grid[0] * clip.grid[1])
    # Of a single layer C is 1.
    assert torch.allclose(parts["consistency"], of_attention) == (rows.shape[1] == 1)


def test_an_attention_without_gradient_has_no_relevance() -> None:
    """Zeros stay zeros, and C is 1 there."""
    assert (row_shares(torch.zeros(2, 3, 5)) == 0).all()
    shared = row_shares(torch.tensor([[0.0, 0.0], [1e-30, 3e-30]]))
    torch.testing.assert_close(shared, torch.tensor([[0.0, 0.0], [0.25, 0.75]]))


@pytest.mark.parametrize("fusion", ["sum", "product"])
def test_without_delta_there_is_no_prior(fusion: str) -> None:
    clip = family("native")
    images, tokens, phrases = pairs(clip)
    maps = Matex(fusion=fusion, delta=0.0).attribute(clip, images, tokens, phrases)
    nowhere = Matex(fusion=fusion, delta=0.0).attribute(clip, images, tokens, ["finding"] * len(phrases))
    torch.testing.assert_close(maps.image, nowhere.image)
    if fusion == "product":
        torch.testing.assert_close(maps.image, Matex.fuse(maps.parts, delta=0.2, lambda_s=1.0).image)


@pytest.mark.parametrize("settings", [{"lambda_s": 1.0}, {"fusion": "product", "lambda_s": 1.0}], ids=str)
def test_a_prior_of_strength_one_is_no_prior(settings: dict[str, Any]) -> None:
    clip = family("native")
    images, tokens, phrases = pairs(clip)
    maps = Matex(**settings).attribute(clip, images, tokens, phrases)
    assert (maps.parts["prior"] == 1).all()
    nowhere = ["finding"] * len(phrases)
    without = Matex(**(settings | {"lambda_s": 3.0})).attribute(clip, images, tokens, nowhere)
    assert (without.parts["prior"] == 1).all()
    torch.testing.assert_close(maps.image, without.image)
    torch.testing.assert_close(maps.text, without.text)


def test_a_image_outside_the_frame_is_no_prior() -> None:
    clip = family("native")
    outside = torch.tensor([[1.0, 0.0, 2.0, 1.0]] * len(PHRASES))
    assert (Matex().attribute(clip, *pairs(clip), outside).parts["prior"] == 1).all()
    with pytest.raises(ValueError, match=r"left lower lobe consolidation.*has no size"):
        Matex().attribute(clip, *pairs(clip), torch.zeros(len(PHRASES), 4))


@pytest.mark.parametrize("laterality", ["patient", "paper"])
def test_mirrored_phrases_mirror_the_prior(laterality: str) -> None:
    clip = family("native")
    maps = Matex(laterality=laterality).attribute(clip, *pairs(clip, ["right apex opacity", "left apex opacity"]))
    right, left = maps.parts["prior"]
    torch.testing.assert_close(right.flip(1), left)
    strongest = int(right.sum(0).argmax())
    assert (strongest < right.shape[1] / 2) == (laterality == "patient")


def test_knowledge_prior_gives_a_finding_its_usual_place() -> None:
    clip = family("square")
    batch = pairs(clip, ["pulmonary edema", "left base opacity"])
    for method in (Matex, PriorOnly):
        silent, knowing = (method(knowledge_prior=value).attribute(clip, *batch) for value in (False, True))
        assert not torch.equal(silent.image[0], knowing.image[0])
        assert torch.equal(silent.image[1], knowing.image[1])
    assert {region.zone for region in Matex(knowledge_prior=True).attribute(clip, *batch).parts["regions"][0]} == {
        "hilar"
    }


def test_constant_maps_are_zeros() -> None:
    for value in (0.0, 1e-12, 0.3, -5e7):
        assert (min_max(torch.full((2, 3, 4), value)) == 0).all()
    noise = 1 + torch.rand(1, 50) * 5e-7
    assert (min_max(noise) == 0).all()
    assert (min_max(1 + torch.rand(1, 50) * 1e-2, dtype=torch.bfloat16) == 0).all()
    assert min_max(1e-20 * torch.rand(1, 50)).max() == 1


def test_min_max_of_what_is_kept() -> None:
    z = torch.tensor([[5.0, 1.0, 3.0, -9.0], [2.0, 2.0, 2.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    keep = torch.tensor([[True, True, True, False], [True, True, True, False], [False] * 4])
    torch.testing.assert_close(min_max(z, keep=keep), torch.tensor([[1.0, 0, 0.5, 0], [0.0] * 4, [0.0] * 4]))


def test_without_a_gradient_the_flow_is_left() -> None:
    """A score that no patch moves: G is constant, and the map is the attention flow alone."""
    clip = family("square")
    parts = Matex(fuse_at="grid").attribute(clip, *pairs(clip)).parts
    maps = Matex.fuse(parts | {"grad_blocks": torch.zeros_like(parts["grad_blocks"])})
    torch.testing.assert_close(maps.grid, min_max(parts["flow"]))


@pytest.mark.parametrize("name", ["native", "siglip", "average"])
def test_loosened_weight_of_equal_keys_is_one(name: str) -> None:
    clip = family(name)
    images, _, _ = pairs(clip)
    reading = clip.image_pooling(images)
    with borrowed(clip), capture_attention(reading, grad_from=0) as blocks:
        clip.encode_image(images)
    block, weight = grad_blocks(blocks)[0], row_weights(blocks, reading)[0]
    block.key = block.key[:, :, :1].expand_as(block.key)
    gradient = torch.randn_like(block.value)
    keep = torch.ones(len(images), reading.length, dtype=torch.bool)
    read = gradient.sum(2) if weight is not None else gradient[:, :, 0]
    expected = torch.einsum("bhd,bhnd->bn", read, block.value.detach())
    torch.testing.assert_close(loosened_term(block, gradient, weight, reading, keep), reading.to_map(expected))


# --- fused again, and many phrases on one image


CHANGES: list[dict[str, Any]] = [
    {"alpha": 0.1, "beta": 0.6, "lambda_c": 0.2, "delta": 0.5},
    {"lambda_s": 1.0},
    {"lambda_s": 3.5, "prior_shape": "plateau", "laterality": "paper"},
    {"tau": 1.0, "kappa": 1.0},
    {"grad_layers": 1},
    {"skip_layers": 3},
    {"text_grad_layers": 1, "fuse_at": "grid"},
    {"fusion": "product", "prior_power": 1.0},
    {"flow": "sum"},
    {"flow": "sum", "flow_layers": 2},
    {"flow_layers": 1},
    {"flow": "relevance", "consistency_of": "attention"},
    {"flow": "relevance", "flow_layers": 2},
    {"knowledge_prior": True},
]


@pytest.mark.parametrize("name", ["native", "siglip"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_fused_again_is_what_another_forward_gives(changes: dict[str, Any], name: str) -> None:
    clip = family(name)
    made = {"flow": "rollout", "grad_layers": 2, "beta": 0.4, "consistency_of": "relevance"}
    parts = Matex(**made).attribute(clip, *pairs(clip), IMAGE).parts
    before = {key: value.clone() for key, value in parts.items() if isinstance(value, Tensor)}
    expected = Matex(**(made | changes)).attribute(clip, *pairs(clip), IMAGE)
    elsewhere = Matex.fuse(parts, alpha=0.9, tau=0.9, lambda_s=1.5, laterality="paper").parts
    back = {"alpha": 0.5, "tau": 0.2, "lambda_s": 2.5, "laterality": "patient"} | changes
    for again in (Matex.fuse(parts, **changes), Matex.fuse(elsewhere, **back)):
        assert again.parts["settings"] == expected.parts["settings"]
        for field in ("image", "grid", "text", "content", "score"):
            assert torch.equal(getattr(again, field), getattr(expected, field))
        for key in ("grad", "flow", "consistency", "prior", "text_grad", "text_flow", "text_consistency"):
            assert torch.equal(again.parts[key], expected.parts[key])
    assert all(torch.equal(value, parts[key]) for key, value in before.items())


def test_what_cannot_be_fused_again_says_so() -> None:
    clip = family("native")
    parts = Matex(grad_layers=2).attribute(clip, *pairs(clip)).parts
    for changes, message in (
        ({"flow": "rollout"}, "hold no rollout"),
        ({"flow": "relevance"}, "hold no relevance"),
        ({"consistency_of": "relevance", "flow_layers": 1}, "hold no relevance"),
        ({"grad_layers": 3}, "gradients of 2 image and 2 text blocks, but 3 and 3 are needed"),
        ({"text_grad_layers": 4}, "but 2 and 4 are needed"),
        ({"grad_layers": "all", "skip_layers": 1}, "but 3 and 4 are needed"),
        ({"spatial_weight": "loosened"}, "made with spatial_weight='softmax' and cannot be fused with 'loosened'"),
        ({"target": "margin"}, "made with target='cosine'"),
        ({"lambda_s": 0.5}, "lambda_s must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Matex.fuse(parts, **changes)
    with pytest.raises(ValueError, match=r"The parts hold grad, not the components of MATEX. Give the `parts` of"):
        Matex.fuse({"grad": parts["grad"]})
    with pytest.raises(ValueError, match=r"different numbers of pairs: {'score': 2, 'grad_blocks': 5"):
        Matex.fuse(parts | {"score": parts["score"][:2]})
    with pytest.raises(TypeError, match="lambda_x"):
        Matex.fuse(parts, lambda_x=1)
    parts = Matex(flow="relevance", flow_layers=2).attribute(clip, *pairs(clip)).parts
    assert Matex.fuse(parts, flow_layers=1).image.isfinite().all()
    with pytest.raises(ValueError, match="relevance over 2 image and 2 text blocks, but 3 and 3 are needed"):
        Matex.fuse(parts, flow_layers=3)
    with pytest.raises(ValueError, match="Call `attribute` with flow_layers='all'"):
        Matex.fuse(parts, flow="sum", consistency_of="relevance", flow_layers="all")
    assert Matex.fuse(parts, flow="sum", flow_layers="all").image.isfinite().all()
    assert Matex.fuse(Matex(grad_layers=4).attribute(clip, *pairs(clip)).parts, grad_layers=12).image.isfinite().all()


@pytest.mark.parametrize(
    "method",
    [
        Matex(),
        Matex(spatial_weight="loosened", flow="rollout"),
        Matex.recommended(references=REFERENCE_PHRASES),
        Matex(flow="relevance", consistency_of="relevance", grad_layers=1),
    ],
    ids=["default", "loosened rollout", "measured", "relevance"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_phrases_on_one_image_are_pairs(name: str, method: Matex) -> None:
    # In float64: the rounding of convolutions depends on the size of the batch, and the ResNet makes much of it.
    clip = family(name, torch.float64)
    images, tokens, phrases = pairs(clip)
    together = images[:1].expand(len(phrases), -1, -1, -1)
    expected = method.attribute(clip, together, tokens, phrases, IMAGE[3].expand(len(phrases), 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = method.attribute_phrases(clip, images[0], phrases, IMAGE[3])
    for field in ("image", "grid", "text", "content", "score"):
        torch.testing.assert_close(getattr(maps, field), getattr(expected, field), atol=1e-9, rtol=0)
    alone = method.attribute_phrases(clip, images[0], phrases[:1], IMAGE[3])
    torch.testing.assert_close(alone.image[0], maps.image[0], atol=1e-9, rtol=0)
    assert Matex.fuse(maps.parts).image.equal(maps.image)


def test_phrases_are_checked() -> None:
    clip = family("square")
    image = pairs(clip)[0][0]
    with pytest.raises(ValueError, match=r"sample 0 \('edema'\) holds NaN"):
        Matex().attribute_phrases(clip, image * torch.nan, ["edema", "mass"])


def test_phrases_of_a_control() -> None:
    clip = family("square")
    maps = PriorOnly().attribute_phrases(clip, pairs(clip)[0][0], ["left base", "right apex"])
    assert not torch.equal(maps.image[0], maps.image[1])


def test_refuses_at_construction() -> None:
    for settings, message in (
        ({"spatial_weight": "raw"}, "spatial_weight must be one of softmax, loosened, got 'raw'"),
        ({"flow": "max"}, "flow must be one of sum, rollout, relevance, got 'max'"),
        ({"flow_layers": 0}, "flow_layers must be at least 1, or 'all', got 0"),
        ({"flow_layers": "most"}, "flow_layers must be one of all, any int, got 'most'"),
        ({"consistency_of": "flow"}, "consistency_of must be one of attention, relevance, got 'flow'"),
        ({"kappa": "patches"}, "kappa must be one of tokens, any float, got 'patches'"),
        ({"kappa": -1.0}, "kappa"),
        ({"grad_layers": 0}, "grad_layers must be at least 1, or 'all', got 0"),
        ({"grad_layers": -1}, "set grad_layers='all' and skip_layers=1"),
        ({"grad_layers": "most"}, "grad_layers must be one of all, any int, got 'most'"),
        ({"text_grad_layers": 0}, "text_grad_layers must be at least 1"),
        ({"skip_layers": -1}, "skip_layers must be at least 0, got -1"),
        ({"lambda_s": 0.5}, "lambda_s"),
        ({"lambda_s": float("nan")}, "lambda_s"),
        ({"lambda_s": float("inf")}, "lambda_s must be a finite number"),
        ({"tau": float("nan")}, "tau must be a finite number"),
        ({"kappa": float("inf")}, "kappa"),
        ({"grad_layers": 2.5}, "grad_layers must be one of all, any int, got 2.5"),
        ({"alpha": 0, "beta": 0, "lambda_c": 0, "fusion": "product"}, "are all 0, which gives an empty map"),
        ({"prior_shape": "cone"}, "prior_shape"),
        ({"laterality": "viewer"}, "laterality"),
        ({"fuse_at": "patch"}, "fuse_at"),
        ({"fusion": "mean"}, "fusion"),
        ({"target": "logit"}, "target"),
        ({"target": "margin", "references": []}, "references"),
    ):
        with pytest.raises(ValueError, match=message):
            Matex(**settings)  # type: ignore[arg-type]


def test_parts_name_what_was_read() -> None:
    clip = family("native")
    parts = Matex().attribute(clip, *pairs(clip)).parts
    for phrase, regions, spans in zip(PHRASES, parts["regions"], parts["spans"], strict=True):
        assert regions == parse_phrase(phrase).regions
        assert spans == parse_phrase(phrase).spans
