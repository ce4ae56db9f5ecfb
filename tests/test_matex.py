"""MATEX against its slow literal version, and against cases whose answer is known."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase
from matex_pl.attribution import Matex
from matex_pl.attribution.capture import borrowed, capture_attention
from matex_pl.attribution.matex import (
    attention_flow,
    attention_rollout,
    consistency,
    gradient_terms,
    layer_weights,
    spatial_weight,
)
from matex_pl.clip import Clip, load_clip
from matex_pl.maps import AttributionMaps, min_max

# Several lengths, one content token, none, none that names a place, and one that is cut to the context length.
PHRASES = [
    "left lower lobe consolidation",
    "mass",
    "",
    "right apical pneumothorax and small bilateral pleural effusions with an enlarged heart, as before",
    "nodule of the lung",
]
FILM = torch.tensor(
    [[0.1, 0.0, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.8, 0.9], [-0.2, -0.1, 1.2, 1.3], [0.0, 0.3, 1.0, 1.4]]
)
REFERENCE_PHRASES = ["cardiomegaly", "right pleural effusion", "no finding in the left upper lobe"]
KINDS = ("wide", "square", "bidirectional")


@cache
def small_clip(kind: str = "wide", dtype: torch.dtype = torch.float32) -> Clip:
    """A random CLIP of open_clip's own towers whose attention is far from uniform."""
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 4}
    if kind == "wide":
        vision |= {"image_size": [32, 48], "layers": 4}
    if kind == "bidirectional":
        text |= {"no_causal_mask": True, "layers": 2}
    torch.manual_seed(KINDS.index(kind))
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    clip = load_clip(json.dumps(config))
    with torch.no_grad():
        for name, weight in clip.model.named_parameters():
            if name == "logit_scale":
                continue
            spread = 0.3 if weight.ndim == 1 else 0.5 if "embedding" in name else 1.5 * weight[0].numel() ** -0.5
            weight.copy_(torch.randn_like(weight) * spread)
            if "ln_" in name and name.endswith("weight"):
                weight.add_(1)
    return clip.to(dtype)


def pairs(clip: Clip, phrases: list[str] = PHRASES) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(len(phrases), 3, *clip.image_size, generator=generator).to(clip.std.dtype)
    return images, clip.tokenize(phrases), phrases


def assert_agree(expected: dict[str, Tensor], maps: AttributionMaps, tolerance: float) -> None:
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
    {"grad_layers": 2, "text_grad_layers": 1},
    {"tau": 0.0},
    {"tau": 2.0},
    {"flow": "rollout"},
    {"kappa": 1},
    {"kappa": 7.5},
    {"alpha": 0.1, "beta": 0.7, "lambda_c": 0.6, "delta": 0.4, "lambda_s": 3.5},
    {"alpha": 0.0, "beta": 0.0, "lambda_c": 1.0, "delta": 0.0},
    {"fuse_at": "grid"},
    {"fusion": "product"},
    {"fusion": "product", "fuse_at": "grid", "prior_power": 1.0},
    {"explain": "margin", "references": REFERENCE_PHRASES},
    {"explain": "margin", "references": REFERENCE_PHRASES, "spatial_weight": "loosened", "flow": "rollout"},
    {"prior_shape": "gaussian"},
    {"prior_shape": "plateau", "laterality": "paper", "fuse_at": "grid"},
    {"laterality": "paper"},
]


# Every setting on a frame that is not square with films in it, the ones that touch the towers on the other two kinds.
CASES = [("wide", settings) for settings in SETTINGS]
CASES += [(kind, settings) for kind in KINDS[1:] for settings in ({}, SETTINGS[1], SETTINGS[7])]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_against_the_reference(kind: str, settings: dict[str, Any]) -> None:
    clip, film = small_clip(kind, torch.float64), FILM if kind == "wide" else None
    batch = pairs(clip)
    expected = reference.matex(clip, *batch, film, **settings)
    assert_agree(expected, Matex(**settings).attribute(clip, *batch, film), 1e-6)


PAPER = {"kappa": 1, "laterality": "paper", "fuse_at": "grid"}
MEASURED = {"grad_layers": 12, "explain": "margin", "fusion": "product"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [(Matex.paper(), PAPER), (Matex(), {}), (Matex.measured(), MEASURED)],
    ids=["paper", "default", "measured"],
)
def test_presets_in_float32(method: Matex, settings: dict[str, Any]) -> None:
    """The library in float32 against the equations in float64, on the same weights."""
    clip, exact = small_clip("wide"), small_clip("wide", torch.float64)
    images, tokens, phrases = pairs(clip)
    expected = reference.matex(exact, images.double(), tokens, phrases, FILM, **settings)
    assert_agree(expected, method.attribute(clip, images, tokens, phrases, FILM), 1e-5)


def test_reference_towers_are_open_clips() -> None:
    for kind in KINDS:
        clip = small_clip(kind, torch.float64)
        images, tokens, _ = pairs(clip)
        for b in range(len(images)):
            torch.testing.assert_close(reference.encode_image(clip, images[b])[0], clip.encode_image(images)[b])
            torch.testing.assert_close(reference.encode_text(clip, tokens[b])[0], clip.encode_text(tokens)[b])


def test_small_models_are_no_easy_case() -> None:
    """Attention peaks, maps vary, and gradients are of both signs: agreement says something."""
    clip = small_clip("wide")
    batch = pairs(clip)
    maps = Matex().attribute(clip, *batch)
    assert maps.content.sum(1).tolist() == [4, 1, 0, 14, 6]
    assert (maps.image.flatten(1).std(1) > 0.05).all()
    assert maps.parts["flow"].amax() > 2 / maps.parts["flow"][0].numel()
    assert 0.05 < (maps.parts["grad"] == 0).float().mean() < 0.6
    assert maps.parts["consistency"].std() > 0.03


# --- closed cases


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_terms_are_complete(kind: str) -> None:
    """Summed over all tokens before the ReLU, the terms give <g_l[p], o_l[p]>, on both sides."""
    clip = small_clip(kind, torch.float64)
    images, tokens, phrases = pairs(clip)
    with borrowed(clip):
        position, end = clip.image_position(images), clip.text_position(tokens)
        with capture_attention(position, grad_from=0) as blocks:
            image = clip.encode_image(images)
        with capture_attention(end, grad_from=0) as text_blocks:
            text = clip.encode_text(tokens)
        with torch.enable_grad():
            score = (image * text).sum()
        for seen, at in ((blocks, position), (text_blocks, end)):
            gradients = torch.autograd.grad(score, [block.output for block in seen], retain_graph=True)  # type: ignore[misc]
            terms = gradient_terms(seen, gradients, at, torch.ones_like(seen[0].row[:, 0], dtype=torch.bool), "softmax")
            for block, gradient, term in zip(seen, gradients, terms, strict=True):
                assert block.output is not None
                for b in range(len(phrases)):
                    whole = (gradient[b, :, at[b]] * block.output[b, :, at[b]]).sum()
                    torch.testing.assert_close(term[b].sum(), whole, atol=1e-12, rtol=1e-9)


def test_flow_without_temperature_is_the_layer_mean() -> None:
    rows = torch.rand(5, 2, 7).softmax(-1)
    torch.testing.assert_close(attention_flow(rows, tau=1e-9), rows.mean(0))
    torch.testing.assert_close(attention_flow(rows, tau=100.0), rows[-1])
    weights = layer_weights(12, 0.2)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[-3:].sum()) == pytest.approx(0.5, abs=0.02)


def test_consistency_bounds() -> None:
    assert (consistency(torch.rand(1, 2, 7), 1.0) == 1).all()
    extreme = torch.tensor([0.0, 1.0])[:, None, None]
    assert float(consistency(extreme, 1.0)) == pytest.approx(2 / 3)
    stable = consistency(torch.rand(6, 3, 50) ** 4, 1.0)
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
    identity = torch.eye(5)
    expected = torch.stack([(attention[b, p] + identity[p]) / 2 for b, p in enumerate(position)])
    torch.testing.assert_close(attention_rollout([attention], position), expected)
    both = attention_rollout([attention, attention.flip(0)], position)
    torch.testing.assert_close(both.sum(1), torch.ones(2))


@pytest.mark.parametrize("settings", [{"lambda_s": 1.0}, {"fusion": "product", "lambda_s": 1.0}], ids=str)
def test_a_prior_of_strength_one_is_no_prior(settings: dict[str, Any]) -> None:
    clip = small_clip()
    images, tokens, phrases = pairs(clip)
    maps = Matex(**settings).attribute(clip, images, tokens, phrases)
    assert (maps.parts["prior"] == 1).all()
    nowhere = ["finding"] * len(phrases)
    without = Matex(**(settings | {"lambda_s": 3.0})).attribute(clip, images, tokens, nowhere)
    assert (without.parts["prior"] == 1).all()
    torch.testing.assert_close(maps.image, without.image)
    torch.testing.assert_close(maps.text, without.text)


def test_a_film_outside_the_frame_is_no_prior() -> None:
    clip = small_clip()
    outside = torch.tensor([[1.0, 0.0, 2.0, 1.0]] * len(PHRASES))
    assert (Matex().attribute(clip, *pairs(clip), outside).parts["prior"] == 1).all()
    with pytest.raises(ValueError, match=r"left lower lobe consolidation.*has no size"):
        Matex().attribute(clip, *pairs(clip), torch.zeros(len(PHRASES), 4))


@pytest.mark.parametrize("laterality", ["patient", "paper"])
def test_mirrored_phrases_mirror_the_prior(laterality: str) -> None:
    clip = small_clip()
    maps = Matex(laterality=laterality).attribute(clip, *pairs(clip, ["right apex opacity", "left apex opacity"]))
    right, left = maps.parts["prior"]
    torch.testing.assert_close(right.flip(1), left)
    strongest = int(right.sum(0).argmax())
    assert (strongest < right.shape[1] / 2) == (laterality == "patient")


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


def test_a_model_without_a_gradient_leaves_the_flow() -> None:
    """A score that no patch moves: G is constant, and the map is the attention flow alone."""
    clip = small_clip("square")
    batch = pairs(clip)
    maps = Matex(fuse_at="grid", fusion="sum").attribute(clip, *batch)
    raw = maps.parts | {"grad": torch.zeros_like(maps.parts["grad"])}
    _, raster = Matex(fuse_at="grid").fuse_image(raw)
    torch.testing.assert_close(raster, min_max(raw["flow"]))


def test_loosened_weight_of_equal_keys_is_one() -> None:
    clip = small_clip()
    images, _, _ = pairs(clip)
    with borrowed(clip), capture_attention(torch.zeros(len(images), dtype=torch.long), grad_from=0) as blocks:
        clip.encode_image(images)
    block = blocks[0]
    assert block.key is not None
    block.key = block.key[:, :, :1].expand_as(block.key)
    keep = torch.ones_like(block.row[:, 0], dtype=torch.bool)
    assert (spatial_weight(block, keep, "loosened") == 1).all()


def test_refuses_at_construction() -> None:
    for settings, message in (
        ({"spatial_weight": "raw"}, "spatial_weight must be one of softmax, loosened, got 'raw'"),
        ({"flow": "max"}, "flow"),
        ({"kappa": "patches"}, "kappa"),
        ({"kappa": -1.0}, "kappa"),
        ({"grad_layers": 0}, "grad_layers"),
        ({"text_grad_layers": 0}, "grad_layers"),
        ({"lambda_s": 0.5}, "lambda_s"),
        ({"lambda_s": float("nan")}, "lambda_s"),
        ({"prior_shape": "cone"}, "prior_shape"),
        ({"laterality": "viewer"}, "laterality"),
        ({"fuse_at": "patch"}, "fuse_at"),
        ({"fusion": "mean"}, "fusion"),
        ({"explain": "logit"}, "explain"),
        ({"explain": "margin", "references": []}, "references"),
    ):
        with pytest.raises(ValueError, match=message):
            Matex(**settings)  # type: ignore[arg-type]


def test_parts_name_what_was_read() -> None:
    clip = small_clip()
    parts = Matex().attribute(clip, *pairs(clip)).parts
    for phrase, regions, spans in zip(PHRASES, parts["regions"], parts["spans"], strict=True):
        assert regions == parse_phrase(phrase).regions
        assert spans == parse_phrase(phrase).spans
