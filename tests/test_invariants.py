"""What every method that borrows the model owes it: the model comes back as it went, and no call site changes a map."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_matex import FILM, PHRASES, REFERENCE_PHRASES, pairs, small_clip
from torch import Tensor, nn

from matex_pl.attribution import AttributionMethod, CenterMap, Matex, PriorOnly
from matex_pl.attribution.capture import borrowed, capture_attention
from matex_pl.attribution.matex import gradient_terms
from matex_pl.attribution.target import reference_mean
from matex_pl.clip import Clip, load_clip
from matex_pl.maps import AttributionMaps

MARGIN: dict[str, Any] = {"explain": "margin", "references": REFERENCE_PHRASES}
METHODS: list[AttributionMethod] = [
    Matex(),
    Matex.paper(spatial_weight="loosened", flow="rollout"),
    Matex.measured(references=REFERENCE_PHRASES),
    CenterMap(),
    PriorOnly(),
]
BORROWERS = METHODS[:3]


def named(method: AttributionMethod) -> str:
    return f"{type(method).__name__}{METHODS.index(method)}"


@pytest.fixture
def clip() -> Clip:
    """A copy that a test may train, break and freeze."""
    original = small_clip()
    return copy.deepcopy(original, {id(original.tokenizer): original.tokenizer})


def assert_same(one: AttributionMaps, other: AttributionMaps, tolerance: float = 1e-6) -> None:
    for name in ("image", "grid", "text", "score"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=tolerance, rtol=0)
    assert torch.equal(one.content, other.content)


# --- the contract


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_contract(method: AttributionMethod, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    maps = method.attribute(clip, images, tokens, phrases, FILM)
    count, size, grid = len(phrases), clip.image_size, clip.grid
    shapes = {"image": (count, *size), "grid": (count, *grid), "text": tuple(tokens.shape), "score": (count,)}
    for name, shape in shapes.items():
        values = getattr(maps, name)
        assert tuple(values.shape) == shape
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert not values.is_inference()
        if name != "score":
            assert values.min() >= 0
            assert values.max() <= 1
    assert torch.equal(maps.content, clip.content(tokens))
    assert (maps.text[~maps.content] == 0).all()
    torch.testing.assert_close(maps.score, clip.similarity(images, tokens).detach())
    assert isinstance(method.cost, str)
    assert method.deterministic
    assert method.serves_text == bool(maps.text.any())


@pytest.mark.parametrize("method", BORROWERS, ids=named)
def test_maps_span_the_range(method: AttributionMethod, clip: Clip) -> None:
    maps = method.attribute(clip, *pairs(clip), FILM)
    assert (maps.image.flatten(1).amax(1) == 1).all()
    assert (maps.image.flatten(1).amin(1) == 0).all()
    assert maps.text.amax(1).tolist() == [1, 1, 0, 1, 1]


def test_parts(clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    maps = Matex().attribute(clip, images, tokens, phrases)
    for name in ("grad", "flow", "consistency"):
        assert maps.parts[name].shape == maps.grid.shape
        text = maps.parts[f"text_{name}"]
        assert text.shape == tokens.shape
        assert (text[~maps.content] == 0).all()
    assert maps.parts["prior"].shape == maps.image.shape
    assert maps.parts["prior"].min() == 1
    assert maps.parts["prior"].max() == 2.5
    assert len(maps.parts["regions"]) == len(maps.parts["spans"]) == len(phrases)


def test_controls(clip: Clip) -> None:
    batch = pairs(clip)
    centre = CenterMap().attribute(clip, *batch).image[0]
    torch.testing.assert_close(centre, centre.flip(0).flip(1))
    corners = centre[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.zeros(4))
    assert centre.argmax() in [centre.shape[1] * y + x for y in (15, 16) for x in (23, 24)]
    prior = PriorOnly().attribute(clip, *batch, FILM).image
    drawn = Matex(lambda_s=2.0).attribute(clip, *batch, FILM).parts["prior"] - 1
    torch.testing.assert_close(prior, drawn)
    assert (prior[[1, 2]] == 0).all()
    with pytest.raises(ValueError, match="prior_shape must be one of"):
        PriorOnly(prior_shape="cone")


# --- one answer, whoever asks


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_batched_equals_single(method: AttributionMethod, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    together = method.attribute(clip, images, tokens, phrases, FILM)
    for b in range(len(phrases)):
        one = slice(b, b + 1)
        alone = method.attribute(clip, images[one], tokens[one], phrases[one], FILM[one])
        whole = AttributionMaps(*(getattr(together, n)[one] for n in ("image", "grid", "text", "content", "score")))
        assert_same(alone, whole, 1e-5)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_same_in_every_grad_mode(
    method: AttributionMethod, context: Callable[[], AbstractContextManager[Any]], clip: Clip
) -> None:
    expected = method.attribute(clip, *pairs(clip), FILM)
    with context():
        images, tokens, phrases = pairs(clip)
        assert_same(method.attribute(clip, images.clone(), tokens.clone(), phrases, FILM.clone()), expected)


def patchy(clip: Clip) -> Clip:
    """A copy with dropout of patches, which only training mode uses."""
    config = copy.deepcopy(clip.config)
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
    other = load_clip(json.dumps(config))
    other.load_state_dict(clip.state_dict())
    return other


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_same_inside_training(method: AttributionMethod, clip: Clip) -> None:
    expected = method.attribute(clip, *pairs(clip))
    training = patchy(clip).train()
    images, tokens, phrases = pairs(clip)
    training.similarity(images, tokens).sum().backward()
    before = [weight.grad.clone() for weight in training.parameters() if weight.grad is not None]
    assert_same(method.attribute(training, images, tokens, phrases), expected)
    after = [weight.grad for weight in training.parameters() if weight.grad is not None]
    assert all(map(torch.equal, before, after))
    assert all(module.training for module in training.modules())


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_same_from_frozen_weights(method: AttributionMethod, clip: Clip) -> None:
    expected = method.attribute(clip, *pairs(clip))
    for weight in clip.parameters():
        weight.requires_grad_(False)
    assert_same(method.attribute(clip, *pairs(clip)), expected)
    assert not any(weight.requires_grad for weight in clip.parameters())


def test_a_training_step_around_an_explanation_keeps_its_gradient(clip: Clip) -> None:
    """Under autocast, which keeps the weights it casts: those cast by the explanation must not cut the step's graph."""
    images, tokens, phrases = pairs(clip)

    def gradients(explain: bool) -> list[Tensor | None]:
        clip.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if explain:
                Matex().attribute(clip, images, tokens, phrases)
            clip.similarity(images, tokens).sum().backward()
        return [weight.grad for weight in clip.model.parameters()]

    for with_it, without in zip(gradients(True), gradients(False), strict=True):
        assert (with_it is None) == (without is None)
        if with_it is not None:
            torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_bfloat16_weights(method: AttributionMethod, clip: Clip) -> None:
    maps = method.attribute(clip.to(torch.bfloat16), *pairs(clip), FILM)
    for values in (maps.image, maps.grid, maps.text):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert values.min() >= 0
        assert values.max() <= 1


# --- the model comes back as it went


def state(clip: Clip) -> dict[str, Any]:
    return {
        "grad": [None if weight.grad is None else weight.grad.clone() for weight in clip.parameters()],
        "requires_grad": [weight.requires_grad for weight in clip.parameters()],
        "values": [weight.detach().clone() for weight in clip.parameters()],
        "training": [module.training for module in clip.modules()],
        "checkpointing": [getattr(module, "grad_checkpointing", None) for module in clip.modules()],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in clip.modules()],
        "rng": torch.get_rng_state(),
        "attention": F.scaled_dot_product_attention,
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def assert_unchanged(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            assert_unchanged(one, other)
    else:
        assert before == after


def in_use(clip: Clip) -> Clip:
    """In the middle of training: mixed modes, partly frozen, checkpointed, with accumulated gradients."""
    images, tokens, _ = pairs(clip)
    clip.train()
    clip.model.ln_final.eval()
    clip.model.visual.transformer.resblocks[1].eval()
    clip.model.visual.conv1.weight.requires_grad_(False)
    clip.model.set_grad_checkpointing(True)
    clip.similarity(images, tokens).sum().backward()
    return clip


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad], ids=["grad", "no_grad"])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_given_back_after_success(
    method: AttributionMethod, context: Callable[[], AbstractContextManager[Any]], fastpath: bool, clip: Clip
) -> None:
    in_use(clip)
    with context(), fastpath_set(fastpath):
        before = state(clip)
        method.attribute(clip, *pairs(clip), FILM)
        after = state(clip)
        for name in before:
            assert_unchanged(before[name], after[name])


@contextmanager
def fastpath_set(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def fail(*_: object) -> None:
    """Draw from the RNG, then raise."""
    torch.rand(3)
    raise RuntimeError("injected")


@pytest.mark.parametrize("place", ["first image block", "last image block", "last text block", "backward"])
@pytest.mark.parametrize("method", BORROWERS, ids=named)
def test_given_back_after_an_exception(
    method: AttributionMethod, place: str, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = method.attribute(clip, *pairs(clip))
    in_use(clip)
    blocks = clip.model.visual.transformer.resblocks if "image" in place else clip.model.transformer.resblocks
    before = state(clip)
    if place == "backward":
        monkeypatch.setattr(torch.autograd, "grad", fail)
    else:
        hook = blocks[0 if "first" in place else -1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="injected"):
        method.attribute(clip, *pairs(clip))
    monkeypatch.undo()
    if place != "backward":
        hook.remove()
    after = state(clip)
    for name in before:
        assert_unchanged(before[name], after[name])
    assert_same(method.attribute(clip, *pairs(clip)), expected)


def test_nothing_is_kept(clip: Clip) -> None:
    """No graph hangs on what comes back, and no tensor of the call survives it."""
    Matex().attribute(clip, *pairs(clip))
    gc.collect()
    before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    maps = Matex().attribute(clip, *pairs(clip))
    assert all(value.grad_fn is None for value in maps.parts.values() if isinstance(value, Tensor))
    del maps
    gc.collect()
    assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) == before


# --- the reference phrases of the margin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_mean_follows_a_fused_optimiser(dtype: torch.dtype, clip: Clip) -> None:
    clip.to(dtype)
    optimiser = torch.optim.AdamW(clip.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        before = reference_mean(clip, REFERENCE_PHRASES)
        assert reference_mean(clip, REFERENCE_PHRASES) is before
        clip.similarity(*pairs(clip)[:2]).sum().backward()
        optimiser.step()
        after = reference_mean(clip, REFERENCE_PHRASES)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, clip.encode_text(clip.tokenize(REFERENCE_PHRASES)).float().mean(0))


def test_reference_mean_follows_a_change_of_sign(clip: Clip) -> None:
    """Which leaves every norm as it was."""
    before = reference_mean(clip, REFERENCE_PHRASES)
    with torch.no_grad():
        clip.model.text_projection.neg_()
    assert not torch.allclose(before, reference_mean(clip, REFERENCE_PHRASES))
    assert not torch.allclose(before, reference_mean(clip, ["edema"]))


def test_reference_mean_is_kept_while_only_the_image_tower_learns(clip: Clip) -> None:
    before = reference_mean(clip, REFERENCE_PHRASES)
    with torch.no_grad():
        clip.model.visual.proj.add_(0.1)
        clip.logit_scale.add_(0.1)
    assert reference_mean(clip, REFERENCE_PHRASES) is before


# --- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_broken_input_is_named(method: AttributionMethod, value: float, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    images[3, 1, 2, 5] = value
    with pytest.raises(ValueError, match=r"sample 3 \('right apical.*NaN or Inf"):
        method.attribute(clip, images, tokens, phrases)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "weight", ["visual.proj", "visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "text_projection"]
)
def test_broken_weights_are_an_error(weight: str, value: float, clip: Clip) -> None:
    with torch.no_grad():
        clip.model.get_parameter(weight).view(-1)[3] = value
    for method in METHODS:
        with pytest.raises(ValueError, match=r"Sample 0 \('left lower.*NaN or Inf"):
            method.attribute(clip, *pairs(clip))


def test_a_word_that_is_broken_only_concerns_its_phrase(clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    with torch.no_grad():
        clip.model.token_embedding.weight[tokens[1, 1]] = torch.nan
    with pytest.raises(ValueError, match=r"Sample 1 \('mass'\)"):
        Matex().attribute(clip, images, tokens, phrases)


def test_a_broken_reference_phrase_is_an_error(clip: Clip) -> None:
    """The scores are fine then, but not what is explained: the norm of its NaN would be a map of zeros."""
    with torch.no_grad():
        clip.model.token_embedding.weight[clip.tokenize(["cardiomegaly"])[0, 1]] = torch.nan
    with pytest.raises(ValueError, match="Sample 0"):
        Matex(**MARGIN).attribute(clip, *pairs(clip, ["left base"]))


def test_lengths_must_agree(clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    with pytest.raises(ValueError, match=r"one of each, got.*'images': 4"):
        Matex().attribute(clip, images[:4], tokens, phrases)
    with pytest.raises(ValueError, match="'film': 2"):
        Matex().attribute(clip, images, tokens, phrases, FILM[:2])


def variant(side: str, **changes: Any) -> Clip:
    config = copy.deepcopy(small_clip("square").config)
    config["model_cfg"][f"{side}_cfg"].update(changes)
    return load_clip(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}, "class token"),
        ({"pool_type": "avg"}, "class token"),
        ({"layers": [1, 1, 1, 1], "width": 16}, "class token"),
    ],
    ids=["attentional pool", "average pool", "ResNet"],
)
def test_unsupported_image_towers_are_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    other = variant("vision", **changes)
    with pytest.raises(NotImplementedError, match=f"image tower {type(other.model.visual).__name__}.*{reason}"):
        Matex().attribute(other, *pairs(other))


class Recurrence(nn.Module):
    """A block without attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return x + x.cumsum(1).tanh()


@pytest.mark.parametrize("side", ["image", "text"])
def test_towers_without_attention_are_refused_by_name(side: str, clip: Clip) -> None:
    transformer = clip.model.visual.transformer if side == "image" else clip.model.transformer
    transformer.resblocks = nn.ModuleList([Recurrence()])
    transformer.get_cast_dtype = lambda: torch.float32
    name = "VisionTransformer" if side == "image" else "CLIP"
    with pytest.raises(NotImplementedError, match=f"{side} tower {name} calls no scaled_dot_product_attention"):
        Matex().attribute(clip, *pairs(clip))


# --- the capture


@pytest.mark.parametrize("changes", [{}, {"block_type": "custom", "qk_norm": True}], ids=["native", "custom block"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_capture_sees_the_real_attention(changes: dict[str, Any], custom_text: bool) -> None:
    """Rows give back each block's own output at p, whatever its mask and scale; the cut gradient is the full one."""
    config = copy.deepcopy(small_clip("square").config)
    config["model_cfg"]["vision_cfg"].update(changes)
    config["model_cfg"]["text_cfg"].update(changes, no_causal_mask=custom_text)
    config["model_cfg"]["custom_text"] = custom_text
    other = load_clip(json.dumps(config))
    images, tokens, phrases = pairs(other)
    with borrowed(other):
        ends = (other.image_position(images), other.text_position(tokens))
        for encode, inputs, at in zip((other.encode_image, other.encode_text), (images, tokens), ends, strict=True):
            with capture_attention(at, grad_from=0) as blocks:
                embedding = encode(inputs)
            with capture_attention(at, grad_from=1) as cut:
                again = encode(inputs)
            torch.testing.assert_close(embedding, again)
            torch.testing.assert_close(embedding, encode(inputs))
            assert cut[0].output is None
            with torch.enable_grad():
                direction = torch.linspace(-1, 1, embedding.shape[1])
                full = torch.autograd.grad((embedding @ direction).sum(), [block.output for block in blocks])  # type: ignore[misc]
                part = torch.autograd.grad((again @ direction).sum(), [block.output for block in cut[1:]])  # type: ignore[misc]
            for one, two in zip(full[1:], part, strict=True):
                torch.testing.assert_close(one, two)
            samples = torch.arange(len(phrases))
            for block in blocks:
                assert block.output is not None
                assert block.value is not None
                remade = torch.einsum("bhn,bhnd->bhd", block.row, block.value)
                torch.testing.assert_close(remade, block.output[samples, :, at].detach(), atol=1e-5, rtol=1e-4)
            everything = torch.ones_like(blocks[0].row[:, 0], dtype=torch.bool)
            assert gradient_terms(blocks, full, at, everything, "softmax").isfinite().all()


def test_full_matrices_hold_the_rows(clip: Clip) -> None:
    tokens = clip.tokenize(PHRASES)
    with borrowed(clip), capture_attention(clip.text_position(tokens), full=True) as blocks:
        clip.encode_text(tokens)
    for block in blocks:
        assert block.mean is not None
        torch.testing.assert_close(block.mean[torch.arange(len(tokens)), clip.text_position(tokens)], block.row.mean(1))
        torch.testing.assert_close(block.mean.sum(-1), torch.ones(tokens.shape))
