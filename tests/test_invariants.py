"""What every method that borrows the model owes it: the model comes back as it went, and no call site changes a map."""

from __future__ import annotations

import copy
import gc
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, family
from test_matex import IMAGE, REFERENCE_PHRASES, pairs
from torch import Tensor, nn

from matex_pl.attribution import (
    AttributionMethod,
    CenterMap,
    Chefer,
    DenseSimilarity,
    GradCam,
    GradEclip,
    IntegratedGradients,
    KernelShap,
    LeGrad,
    M2ib,
    Matex,
    Nib,
    PriorOnly,
    RandomMap,
    Rise,
    Rollout,
    Saliency,
    SubmodularRegions,
    WordRegions,
)
from matex_pl.attribution.core.capture import GradBlock, borrowed, capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import gradients_of
from matex_pl.attribution.core.target import reference_embeddings, reference_mean
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.towers import Pooling
from matex_pl.maps import Attribution

MARGIN: dict[str, Any] = {"target": "margin", "references": REFERENCE_PHRASES}
METHODS: list[AttributionMethod] = [
    Matex(),
    Matex.paper(spatial_weight="loosened", flow="rollout"),
    Matex.recommended(references=REFERENCE_PHRASES),
    Chefer(),
    GradCam([-1, -2], variant="hires"),
    GradEclip(text_blocks=1),
    IntegratedGradients(steps=2),
    KernelShap(samples=24),
    LeGrad(),
    M2ib(steps=2, copies=2),
    DenseSimilarity(),
    DenseSimilarity("sclip"),
    Nib(steps=2),
    Rise(masks=4),
    Rollout(),
    Saliency(**MARGIN),
    SubmodularRegions(regions=2, pending=0),
    WordRegions(steps=2),
    CenterMap(),
    PriorOnly(),
    RandomMap(),
]
BORROWERS = METHODS[:-3]
# These take no gradient.
FORWARD_ONLY = (DenseSimilarity, KernelShap, Rise, Rollout, SubmodularRegions)
# These run the image tower, or a part of it, again.
RERUN = (DenseSimilarity, IntegratedGradients, KernelShap, LeGrad, M2ib, Nib, Rise, SubmodularRegions, WordRegions)


def named(method: AttributionMethod) -> str:
    return f"{type(method).__name__}{METHODS.index(method)}"


@pytest.fixture
def clip() -> Clip:
    """A copy that a test may train, break and freeze."""
    original = family("native")
    return copy.deepcopy(original, {id(original.tokenizer): original.tokenizer})


def assert_same(one: Attribution, other: Attribution, tolerance: float = 1e-6) -> None:
    for name in ("image", "grid", "text", "score"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=tolerance, rtol=0)
    assert torch.equal(one.content, other.content)


# --- the contract


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_contract(method: AttributionMethod, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    maps = method.attribute(clip, images, tokens, phrases, IMAGE)
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
    assert method.supports_text == bool(maps.text.any())


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_check_of_a_model_explains_nothing_and_changes_nothing(
    method: AttributionMethod, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(method), "attribute", None)
    clip.train()
    before, random = copy.deepcopy(clip.state_dict()), torch.get_rng_state()
    method.check_model(clip)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) or value.isnan().all() for name, value in clip.state_dict().items())
    assert clip.training
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_the_check_of_a_model_refuses_blocks_that_do_not_exist(clip: Clip) -> None:
    for method in (GradCam([12]), M2ib(block=12), Nib(block=12), Chefer(start_layer=12)):
        with pytest.raises(ValueError, match="Block 12 does not exist: the tower has"):
            method.check_model(clip)


@pytest.mark.parametrize("method", BORROWERS, ids=named)
def test_maps_span_the_range(method: AttributionMethod, clip: Clip) -> None:
    maps = method.attribute(clip, *pairs(clip), IMAGE)
    # A phrase without words has no interactions.
    has_map = maps.content.any(1) if maps.interactions is not None else torch.ones(len(maps.image), dtype=torch.bool)
    assert (maps.image[has_map].flatten(1).amax(1) == 1).all()
    assert (maps.image.flatten(1).amin(1) == 0).all()
    has_text = torch.ones(len(maps.text), dtype=torch.bool)
    if maps.interactions is not None:
        # The sums over the patches of a phrase can all be negative. A single word has 1 in any case.
        has_text = ((maps.interactions.sum(2) * maps.content).amax(1) > 0) | (maps.content.sum(1) == 1)
    expected = torch.tensor([1, 1, 0, 1, 1] if method.supports_text else [0] * 5)
    assert maps.text.amax(1).tolist() == (expected * has_text).tolist()


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
    center = CenterMap().attribute(clip, *batch).image[0]
    torch.testing.assert_close(center, center.flip(0).flip(1))
    corners = center[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.zeros(4))
    assert center.argmax() in [center.shape[1] * y + x for y in (15, 16) for x in (23, 24)]
    prior = PriorOnly().attribute(clip, *batch, IMAGE).image
    drawn = Matex(lambda_s=2.0).attribute(clip, *batch, IMAGE).parts["prior"] - 1
    torch.testing.assert_close(prior, drawn)
    assert (prior[[1, 2]] == 0).all()
    with pytest.raises(ValueError, match="prior_shape must be one of"):
        PriorOnly(prior_shape="cone")


# --- one answer, whoever asks


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_batched_equals_single(method: AttributionMethod, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    together = method.attribute(clip, images, tokens, phrases, IMAGE)
    for b in range(len(phrases)):
        one = slice(b, b + 1)
        alone = method.attribute(clip, images[one], tokens[one], phrases[one], IMAGE[one])
        whole = Attribution(*(getattr(together, n)[one] for n in ("image", "grid", "text", "content", "score")))
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
    expected = method.attribute(clip, *pairs(clip), IMAGE)
    with context():
        images, tokens, phrases = pairs(clip)
        assert_same(method.attribute(clip, images.clone(), tokens.clone(), phrases, IMAGE.clone()), expected)


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
    maps = method.attribute(clip.to(torch.bfloat16), *pairs(clip), IMAGE)
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
        "hooks before": [len(module._forward_pre_hooks) for module in clip.modules()],
        "forward": [vars(module).get("forward") for module in clip.modules()],
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
        method.attribute(clip, *pairs(clip), IMAGE)
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


def fail(*_: object, **__: object) -> None:
    """Draw from the RNG, then raise."""
    torch.rand(3)
    raise RuntimeError("injected")


@pytest.mark.parametrize("place", ["first image block", "last image block", "last text block", "backward"])
@pytest.mark.parametrize("method", BORROWERS, ids=named)
def test_given_back_after_an_exception(
    method: AttributionMethod, place: str, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "backward" and isinstance(method, FORWARD_ONLY):
        pytest.skip("no backward")
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


@pytest.mark.parametrize("place", ["visual.ln_post", "ln_final"])
@pytest.mark.parametrize("method", [method for method in METHODS if isinstance(method, RERUN)], ids=named)
def test_given_back_after_an_exception_in_a_later_forward(method: AttributionMethod, place: str, clip: Clip) -> None:
    """Which may begin behind a block, or at other token embeddings."""
    if place == "ln_final" and not method.supports_text:
        pytest.skip("the text tower runs once")
    expected = method.attribute(clip, *pairs(clip))
    in_use(clip)
    before, calls = state(clip), count()
    hook = clip.model.get_submodule(place).register_forward_pre_hook(lambda *_: fail() if next(calls) else None)
    with pytest.raises(RuntimeError, match="injected"):
        method.attribute(clip, *pairs(clip))
    hook.remove()
    after = state(clip)
    for name in before:
        assert_unchanged(before[name], after[name])
    assert_same(method.attribute(clip, *pairs(clip)), expected)


@pytest.mark.parametrize("name", ["biomedclip", "siglip", "resnet"])
def test_other_towers_are_given_back_after_an_exception(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = family(name)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer}).train()
    before = state(clip)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(RuntimeError, match="injected"):
        Matex().attribute(clip, *pairs(clip))
    after = state(clip)
    for key in before:
        assert_unchanged(before[key], after[key])


def test_threads_wait_for_each_other(clip: Clip) -> None:
    """Explanations of several models, beside forwards that nobody explains."""
    models = [clip, *(family(name) for name in ("square", "bidirectional", "avg_native"))]
    expected = [Matex().attribute(model, *pairs(model)) for model in models]
    bystander = family("native")
    images, tokens, _ = pairs(bystander)
    score = bystander.similarity(images, tokens)
    attention = F.scaled_dot_product_attention

    def explain(model: Clip) -> Attribution:
        return [Matex().attribute(model, *pairs(model)) for _ in range(6)][-1]

    def look_on() -> list[Tensor]:
        return [bystander.similarity(images, tokens).detach() for _ in range(12)]

    with ThreadPoolExecutor(5) as pool:
        seen = pool.submit(look_on)
        for maps, wanted in zip(pool.map(explain, models), expected, strict=True):
            assert_same(maps, wanted)
        for other in seen.result():
            torch.testing.assert_close(other, score.detach())
    assert F.scaled_dot_product_attention is attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_explanation_inside_an_explanation_is_refused(clip: Clip) -> None:
    batch = pairs(clip)
    hook = clip.model.visual.ln_post.register_forward_hook(lambda *_: Matex().attribute(clip, *batch) and None)
    with pytest.raises(RuntimeError, match="while another explanation runs the model"):
        Matex().attribute(clip, *batch)
    hook.remove()
    Matex().attribute(clip, *batch)


def test_blocks_are_counted_again_when_some_are_gone(clip: Clip) -> None:
    batch = pairs(clip)
    Matex(grad_layers=1).attribute(clip, *batch)
    del clip.model.visual.transformer.resblocks[-1]
    assert Matex(grad_layers=1).attribute(clip, *batch).parts["attention_layers"].shape[1] == 3


def test_one_forward_and_a_backward_that_ends_at_the_cut(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both maps of a batch, and many phrases on one image, from one forward of each tower."""
    images, tokens, phrases = pairs(clip)
    Matex().attribute(clip, images, tokens, phrases)
    calls: list[tuple[str, int, bool]] = []
    blocks = {"image": clip.model.visual.transformer.resblocks, "text": clip.model.transformer.resblocks}
    for side, listed in blocks.items():
        for block in listed:
            block.register_forward_hook(
                lambda _, args, output, side=side: calls.append((side, len(args[0]), output.requires_grad))
            )
    Matex(grad_layers=2).attribute(clip, images, tokens, phrases)
    cut = [False, False, True, True]
    assert calls == [("image", 5, grad) for grad in cut] + [("text", 5, grad) for grad in cut]
    calls.clear()
    Matex(grad_layers=1).attribute_phrases(clip, images[0], phrases)
    cut = [False, False, False, True]
    assert calls == [("image", 1, grad) for grad in cut] + [("text", 5, grad) for grad in cut]
    calls.clear()
    # The relevance needs more blocks, and no other forward or backward.
    backwards, backward = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: backwards.append(0) or backward(*args, **kwargs)
    )
    Matex(grad_layers=1, flow="relevance", flow_layers=3).attribute(clip, images, tokens, phrases)
    cut = [False, True, True, True]
    assert calls == [("image", 5, grad) for grad in cut] + [("text", 5, grad) for grad in cut]
    assert len(backwards) == 2


def test_nothing_is_kept(clip: Clip) -> None:
    """No graph hangs on what comes back, and no tensor of the call survives it."""
    for method in BORROWERS:
        method.attribute(clip, *pairs(clip))
    gc.collect()
    before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    for method in BORROWERS:
        maps = method.attribute(clip, *pairs(clip))
        assert all(value.grad_fn is None for value in maps.parts.values() if isinstance(value, Tensor))
    del maps
    gc.collect()
    assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) == before


# --- the reference phrases of the margin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_mean_follows_a_fused_optimizer(dtype: torch.dtype, clip: Clip) -> None:
    clip.to(dtype)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        before, embeddings = reference_mean(clip, REFERENCE_PHRASES), reference_embeddings(clip, REFERENCE_PHRASES)
        assert reference_embeddings(clip, REFERENCE_PHRASES) is embeddings
        clip.similarity(*pairs(clip)[:2]).sum().backward()
        optimizer.step()
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
    before = reference_embeddings(clip, REFERENCE_PHRASES)
    with torch.no_grad():
        clip.model.visual.proj.add_(0.1)
        clip.logit_scale.add_(0.1)
    assert reference_embeddings(clip, REFERENCE_PHRASES) is before


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
        with pytest.raises(ValueError, match=r"NaN or Inf for sample 0 \('left lower"):
            method.attribute(clip, *pairs(clip))


def test_a_word_that_is_broken_only_concerns_its_phrase(clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    with torch.no_grad():
        clip.model.token_embedding.weight[tokens[1, 1]] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or Inf for sample 1 \('mass'\)"):
        Matex().attribute(clip, images, tokens, phrases)


def test_a_broken_reference_phrase_is_an_error(clip: Clip) -> None:
    """The scores are fine then, but not what is explained: the norm of its NaN would be a map of zeros."""
    with torch.no_grad():
        clip.model.token_embedding.weight[clip.tokenize(["cardiomegaly"])[0, 1]] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf for sample 0"):
        Matex(**MARGIN).attribute(clip, *pairs(clip, ["left base"]))


def test_lengths_must_agree(clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    with pytest.raises(ValueError, match=r"the same length, at least 1, got .*'images': 0"):
        Matex().attribute(clip, images[:0], tokens[:0], [])
    with pytest.raises(ValueError, match=r"the same length, at least 1, got.*'images': 4"):
        Matex().attribute(clip, images[:4], tokens, phrases)
    with pytest.raises(ValueError, match="'content_box': 2"):
        Matex().attribute(clip, images, tokens, phrases, IMAGE[:2])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no pool": ("vision", {"pool_type": "none"}, r"image tower VisionTransformer.*its pooling is 'none'"),
    "pool in two stages": (
        "vision",
        {"attentional_pool": "cascade", "attn_pooler_queries": 4, "attn_pooler_heads": 4},
        r"image tower VisionTransformer.*not read by one query",
    ),
    "convolutions": (
        "vision",
        {"timm_model_name": "test_convnext", "image_size": 64, "timm_pool": "avg"},
        r"image tower TimmModel.*keeps no raster",
    ),
    "two class tokens": (
        "vision",
        {"timm_model_name": "deit_tiny_distilled_patch16_224", "image_size": 224, "timm_pool": "token"},
        r"image tower TimmModel.*a tower around VisionTransformerDistilled",
    ),
    "attention of its own": (
        "vision",
        {"timm_model_name": "cait_xxs24_224", "image_size": 224, "timm_pool": "token"},
        r"image tower TimmModel.*a tower around Cait",
    ),
    "two attentions per block": (
        "vision",
        {"timm_model_name": "vit_dwee_patch16_reg1_gap_256", "image_size": 256, "timm_pool": "avg"},
        r"image tower TimmModel.*its 14 blocks call scaled_dot_product_attention 28 times",
    ),
    "both pools": (
        "vision",
        {"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "avgmax"},
        r"image tower TimmModel.*its pooling is 'avgmax'",
    ),
    "windows": (
        "vision",
        {"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 224, "timm_pool": "avg"},
        r"image tower TimmModel.*none of the transformers",
    ),
    "no text pool": ("text", {"pool_type": "none"}, r"text tower CLIP.*its pooling is 'none'"),
}


def refused_tower(name: str) -> Clip:
    """A model with one of the towers above."""
    side, changes, _ = REFUSED[name]
    config = copy.deepcopy(family("square").config)
    if "timm_model_name" in changes:
        config["model_cfg"]["vision_cfg"] = {}
    config["model_cfg"][f"{side}_cfg"].update(changes)
    return load_clip(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_towers_are_refused_by_name(name: str) -> None:
    other = refused_tower(name)
    with pytest.raises(NotImplementedError, match=REFUSED[name][2]):
        Matex().attribute(other, *pairs(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutions", "windows"])
def test_methods_on_tokens_refuse_towers_without_blocks(name: str) -> None:
    other = refused_tower(name)
    for method in (GradCam(), LeGrad(), M2ib(steps=1), Nib(steps=1), DenseSimilarity()):
        with pytest.raises(NotImplementedError, match=r"image tower TimmModel.*(no list of transformer|no raster)"):
            method.attribute(other, *pairs(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no pool", "pool in two stages", "convolutions", "both pools", "no text pool"])
def test_every_method_refuses_a_tower_by_name_or_explains_it(name: str) -> None:
    other, message = refused_tower(name), REFUSED[name][2]
    other.mean_image.fill_(0.5)
    explained, reasons = [], []
    for method in METHODS:
        try:
            maps = method.attribute(other, *pairs(other, ["left base", "mass"]))
        except NotImplementedError as error:
            reasons.append(str(error))
            # The check before a training gives the same reason.
            with pytest.raises(NotImplementedError, match=re.escape(reasons[-1])):
                method.check_model(other)
            continue
        method.check_model(other)
        assert maps.image.isfinite().all()
        explained.append(type(method).__name__)
    assert all(message.partition(".*")[0] in reason for reason in reasons)
    # Only methods that read inputs and scores alone go on, where the tower gives one embedding per input.
    assert ("Saliency" in explained) == (name == "both pools")
    assert not {"Matex", "Chefer", "Rollout", "LeGrad"} & set(explained)


def test_a_text_tower_of_hugging_face_with_another_pool_is_refused() -> None:
    clip = family("biomedclip")
    pooler = clip.model.text.pooler
    try:
        clip.model.text.pooler = nn.Identity()
        with pytest.raises(NotImplementedError, match=r"text tower HFTextEncoder.*its pooling is 'Identity'"):
            Matex().attribute(clip, *pairs(clip))
    finally:
        clip.model.text.pooler = pooler


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_what_is_no_batch_of_the_model_is_refused(method: AttributionMethod, clip: Clip) -> None:
    images, tokens, phrases = pairs(clip)
    with pytest.raises(ValueError, match=r"must be \(5, 3, 32, 48\) torch.float32 .* got \(5, 3, 48, 32\)"):
        method.attribute(clip, images.transpose(2, 3), tokens, phrases)
    with pytest.raises(
        ValueError, match=r"got \(5, 3, 32, 48\) torch.float64. Convert the images with `clip.normalize`"
    ):
        method.attribute(clip, images.double(), tokens, phrases)
    with pytest.raises(ValueError, match="phrases must be a list, got the text 'mass!'"):
        method.attribute(clip, images, tokens, "mass!")
    with pytest.raises(ValueError, match=r"content_box must be \(5, 4\)"):
        method.attribute(clip, images, tokens, phrases, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="content_box of pair 'left lower lobe consolidation' has no size"):
        method.attribute(clip, images, tokens, phrases, torch.zeros(5, 4))
    for image, words, content_box, message in (
        (images[0], [], None, "at least one phrase"),
        (images[0], "mass", None, "at least one phrase, got 'mass'"),
        (images[:1], ["mass"], None, r"one image \(3, H, W\)"),
        (images[0], ["mass"], torch.zeros(3), r"one content_box \(4,\)"),
        (images[0, :, :8], ["mass"], None, r"must be \(1, 3, 32, 48\)"),
    ):
        with pytest.raises(ValueError, match=message):
            method.attribute_phrases(clip, image, words, content_box)


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        clip = load_clip(json.dumps(family("square").config))
    with pytest.raises(ValueError, match=r"built or moved under torch\.inference_mode"):
        Matex().attribute(clip, *pairs(clip))


class Windows(nn.Module):
    """Attention within halves of the tokens."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        halves = x[:, 1:].unflatten(1, (2, -1)).flatten(0, 1)[:, None]
        seen = F.scaled_dot_product_attention(halves, halves, halves)
        return torch.cat([x[:, :1], seen[:, 0].unflatten(0, (-1, 2)).flatten(1, 2)], 1)


def test_attention_within_windows_is_refused_by_name(clip: Clip) -> None:
    clip.model.visual.transformer.resblocks = nn.ModuleList([Windows()])
    with pytest.raises(NotImplementedError, match=r"image tower VisionTransformer.*sees parts of its 24 patches"):
        Matex().attribute(clip, *pairs(clip))


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
    with pytest.raises(NotImplementedError, match=f"{side} tower {name} does not call scaled_dot_product_attention"):
        Matex().attribute(clip, *pairs(clip))


# --- the capture


@pytest.mark.parametrize("changes", [{}, {"block_type": "custom", "qk_norm": True}], ids=["native", "custom block"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_capture_sees_the_real_attention(changes: dict[str, Any], custom_text: bool) -> None:
    """Rows give back each block's own output at p, whatever its mask and scale; the cut gradient is the full one."""
    config = copy.deepcopy(family("square").config)
    config["model_cfg"]["vision_cfg"].update(changes)
    config["model_cfg"]["text_cfg"].update(changes, no_causal_mask=custom_text)
    config["model_cfg"]["custom_text"] = custom_text
    check_capture(load_clip(json.dumps(config)))


@pytest.mark.parametrize("name", FAMILIES)
def test_capture_of_every_family(name: str) -> None:
    check_capture(family(name, torch.float64))


def check_capture(clip: Clip) -> None:
    images, tokens, _ = pairs(clip)
    with borrowed(clip):
        readings = (clip.image_pooling(images), clip.text_pooling(tokens))
        towers = zip((clip.encode_image, clip.encode_text), (images, tokens), readings, strict=True)
        for encode, inputs, reading in towers:
            with capture_attention(reading, grad_from=0, full=True) as blocks:
                embedding = encode(inputs)
            cut_at = min(1, len(blocks) - 1)
            with capture_attention(reading, grad_from=cut_at) as cut:
                again = encode(inputs)
            torch.testing.assert_close(embedding, again)
            torch.testing.assert_close(embedding, encode(inputs))
            assert grad_blocks(cut) == cut[cut_at:]
            direction = torch.linspace(-1, 1, embedding.shape[1]).to(embedding).expand_as(embedding)
            full = gradients_of(embedding, [block.output for block in grad_blocks(blocks)], direction)
            part = gradients_of(again, [block.output for block in grad_blocks(cut)], direction)
            for one, two in zip(full[cut_at:], part, strict=True):
                torch.testing.assert_close(one, two)
            for block in grad_blocks(blocks):
                check_rows(block, reading)


def check_rows(block: GradBlock, reading: Pooling) -> None:
    value, output = block.value.detach(), block.output.detach()
    torch.testing.assert_close(block.mean.sum(-1), torch.ones_like(block.mean[..., 0]))
    if reading.position is not None:
        samples = torch.arange(len(value))
        torch.testing.assert_close(block.mean[samples, reading.position], block.attention(reading.position).mean(1))
        remade = torch.einsum("bhn,bhnd->bhd", block.attention(reading.position), value)
        torch.testing.assert_close(remade, output[samples, :, reading.position], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_cut_where_nothing_attends_to_it(name: str) -> None:
    """Short phrases are encoded without what follows them, to the same embedding and gradients."""
    clip = family(name, torch.float64)
    tokens = clip.tokenize(["mass", "left base"])
    short, whole = clip.encode_text(tokens), F.normalize(clip.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(short, whole)
    with torch.no_grad(), borrowed(clip), capture_attention(clip.text_pooling(tokens), full=True) as blocks:
        clip.encode_text(tokens)
    shortened = name not in ("bidirectional", "siglip", "coca")
    assert (blocks[0].mean.shape[-1] < tokens.shape[1]) == shortened
    weights = [weight for key, weight in clip.model.named_parameters() if "positional" in key or "pos_embed" in key]
    one, two = (torch.autograd.grad(z.sum(), weights, allow_unused=True) for z in (short, whole))
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


# --- whatever the model is wrapped in


COMPILED: dict[str, Callable[[Clip], None]] = {
    "model": lambda clip: setattr(clip, "model", torch.compile(clip.model, backend="eager")),
    "towers": lambda clip: (
        [
            setattr(clip.model, name, torch.compile(getattr(clip.model, name), backend="eager"))
            for name in ("visual", "text", "transformer")
            if hasattr(clip.model, name)
        ]
        and None
    ),
    "in place": lambda clip: clip.model.visual.compile(backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("name", ["native", "biomedclip"])
def test_compiled_modules_are_explained_as_written(name: str, wrap: Callable[[Clip], None]) -> None:
    source = family(name)
    images, tokens, phrases = pairs(source)
    method = Matex.recommended(references=REFERENCE_PHRASES)
    expected = method.attribute(source, images, tokens, phrases)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    wrap(clip)
    assert_same(method.attribute(clip, images, tokens, phrases), expected, 1e-5)
    with torch.no_grad():
        # Now it is compiled for real, and explained again.
        torch.testing.assert_close(clip.similarity(images, tokens), expected.score, atol=1e-5, rtol=0)
    assert_same(method.attribute(clip, images, tokens, phrases), expected, 1e-5)
    torch.compiler.reset()


def test_under_ddp_a_training_step_keeps_its_gradient(clip: Clip, tmp_path: Path) -> None:
    """Explained between the forward and the backward of a step, the module inside its wrapper."""
    images, tokens, phrases = pairs(clip)
    clip.logit_scale.requires_grad_(False)
    expected_maps = Matex().attribute(clip, images, tokens, phrases)
    clip.similarity(images, tokens).sum().backward()
    expected = [weight.grad for weight in clip.parameters()]
    clip.zero_grad()

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = clip

        def forward(self) -> Tensor:
            return self.clip.similarity(images, tokens)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Pairs())
        loss = wrapped().sum()
        assert_same(Matex().attribute(wrapped.module.clip, images, tokens, phrases), expected_maps)
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for weight, gradient in zip(clip.parameters(), expected, strict=True):
        assert (weight.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "method", [Matex(), LeGrad(), M2ib(steps=2, copies=2)], ids=lambda method: type(method).__name__
)
def test_every_family_is_given_back(method: AttributionMethod, name: str) -> None:
    """From frozen weights, in training mode and checkpointed, as from the model at rest."""
    if name == "resnet" and isinstance(method, M2ib):
        pytest.skip("no stream of tokens")
    source = family(name)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    batch = pairs(clip)
    expected = method.attribute(clip, *batch, IMAGE)
    clip.train().requires_grad_(False)
    clip.model.set_grad_checkpointing(True)
    before = state(clip)
    assert_same(method.attribute(clip, *batch, IMAGE), expected)
    after = state(clip)
    for key in before:
        assert_unchanged(before[key], after[key])
