"""Every attribution method: the contract, its slow literal version, those of others, and cases with known answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam
import reference
import torch
import torch.nn.functional as F
from families import FAMILIES, family
from test_matex import IMAGE, PHRASES, REFERENCE_PHRASES, assert_agree, pairs
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from matex_pl import attribution
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
from matex_pl.attribution.core.capture import borrowed
from matex_pl.attribution.core.fill import fill_images
from matex_pl.attribution.core.two_tower import ImageTower, TextTower
from matex_pl.attribution.kernel_shap import coalitions, patch_groups, shapley_regression
from matex_pl.attribution.m2ib import capacity_of
from matex_pl.clip import Clip
from matex_pl.maps import Attribution, min_max, patch_mean

MARGIN: dict[str, Any] = {"target": "margin", "references": REFERENCE_PHRASES[:2]}
# One row per class, as cheap as still says something.
METHODS: dict[str, AttributionMethod] = {
    type(method).__name__: method
    for method in (
        CenterMap(),
        Chefer(),
        DenseSimilarity(),
        GradCam(),
        GradEclip(),
        IntegratedGradients(steps=2, chunk_size=5),
        KernelShap(samples=24, chunk_size=30),
        LeGrad(),
        M2ib(steps=3, copies=3, chunk_size=6),
        Matex(),
        Nib(steps=3, chunk_size=6),
        PriorOnly(),
        RandomMap(),
        Rise(masks=12, chunk_size=7),
        Rollout(),
        Saliency(),
        SubmodularRegions(regions=4, pending=1),
        WordRegions(steps=2, chunk_size=5),
    )
}
NEED_A_STREAM = ("M2ib", "Nib", "WordRegions")


def batch(clip: Clip) -> tuple[Tensor, Tensor, list[str]]:
    """One word, none, more than there is room for, and a few that end before it: each of them padded otherwise."""
    return pairs(clip, PHRASES[1:])


def assert_close_maps(one: Attribution, other: Attribution, tolerance: float = 1e-8) -> None:
    for name in ("image", "grid", "text", "score"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=tolerance, rtol=0)
    assert torch.equal(one.content, other.content)
    assert one.parts.keys() == other.parts.keys()
    for name, part in one.parts.items():
        if isinstance(part, Tensor):
            torch.testing.assert_close(part, other.parts[name], atol=tolerance, rtol=0)


def rows(maps: Attribution, among: slice) -> Attribution:
    """The maps of some of the pairs, without parts."""
    return Attribution(*(getattr(maps, name)[among] for name in ("image", "grid", "text", "content", "score")))


# --- the contract


def test_the_table_is_complete() -> None:
    public = {name: getattr(attribution, name) for name in attribution.__all__}
    methods = {name for name, kind in public.items() if issubclass(kind, AttributionMethod)}
    assert METHODS.keys() == {name for name in methods if not inspect.isabstract(public[name])}
    assert all(type(method) is public[name] for name, method in METHODS.items())


def test_settings_have_the_arguments_of_parents_behind_their_own() -> None:
    assert list(LeGrad(2, **MARGIN).settings.items()) == [("num_blocks", 2), *MARGIN.items()]
    assert Saliency(**MARGIN).settings == MARGIN
    assert Rollout().settings == {}
    with pytest.raises(TypeError, match="targets"):
        LeGrad(targets="margin")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_contract(method: AttributionMethod, name: str) -> None:
    clip = family(name, torch.float64)
    images, tokens, phrases = batch(clip)
    if name == "resnet" and type(method).__name__ in NEED_A_STREAM:
        with pytest.raises(NotImplementedError, match="image tower ModifiedResNet"):
            method.attribute(clip, images, tokens, phrases)
        return
    maps = method.attribute(clip, images, tokens, phrases, IMAGE[1:])
    check_form(method, clip, maps, images, tokens)
    assert_close_maps(method.attribute(clip, images, tokens, phrases, IMAGE[1:]), maps, 0)
    for b in (0, 3):
        one = slice(b, b + 1)
        alone = method.attribute(clip, images[one], tokens[one], phrases[one], IMAGE[1:][one])
        assert_close_maps(rows(alone, slice(None)), rows(maps, one))
    together = method.attribute(clip, images[:1].expand_as(images), tokens, phrases, IMAGE[3].expand(4, 4))
    assert_close_maps(method.attribute_phrases(clip, images[0], phrases, IMAGE[3]), together)
    for module in clip.modules():
        assert not {**module._forward_hooks, **module._forward_pre_hooks}
        assert "forward" not in vars(module)


def check_form(method: AttributionMethod, clip: Clip, maps: Attribution, images: Tensor, tokens: Tensor) -> None:
    """Shapes, ranges, dtypes, content and score."""
    count, content = len(images), clip.content(tokens)
    shapes = {"image": (count, *clip.image_size), "grid": (count, *clip.grid), "text": tokens.shape, "score": (count,)}
    for name, shape in shapes.items():
        values = getattr(maps, name)
        assert values.shape == shape
        assert values.dtype in (torch.float32, torch.float64)
        assert not values.requires_grad
    for values in (maps.image, maps.grid, maps.text):
        assert values.min() >= 0
        assert values.max() <= 1
    # A map has its whole range, where a ReLU left anything of it.
    assert maps.image.flatten(1).amax(1).max() == 1
    assert (maps.image.flatten(1).amin(1) == 0).all()
    assert torch.equal(maps.content, content)
    assert not maps.text[~content].any()
    assert not maps.text[1].any()
    assert (maps.text[0].sum() == 1) == method.supports_text == bool(maps.text[2:].any())
    torch.testing.assert_close(maps.score, clip.similarity(images, tokens).detach(), atol=1e-12, rtol=0)
    assert all(
        len(part) == count for key, part in maps.parts.items() if isinstance(part, Tensor) and key != "content_box"
    )


# --- the slow literal versions


def slow_name(kind: type[AttributionMethod]) -> str:
    """`raw_grad_cam` for `GradCam`."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__)
    return "raw" + name.replace("le_grad", "legrad")


def expected_of(method: Any, clip: Clip, images: Tensor, tokens: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Finished maps and parts by the slow version, which is given what is random."""
    slow = getattr(reference, slow_name(type(method)))
    settings = {key: value for key, value in settings.items() if key in inspect.signature(slow).parameters | MARGIN}
    if hasattr(method, "fill"):
        settings["fill"] = fill_images(method.fill, clip, images).expand_as(images)
    raw = slow(clip, images, tokens, **settings, **material(method, clip, images, tokens))
    return reference.finish(clip, raw, images, tokens)


def material(method: Any, clip: Clip, images: Tensor, tokens: Tensor) -> dict[str, Any]:
    """What a method draws, as its slow version takes it."""
    generator = torch.Generator().manual_seed(getattr(method, "seed", 0))
    if isinstance(method, Rise):
        grids, offsets = method.bank(clip.image_size)
        keep = torch.rand(method.masks, tokens.shape[1], generator=generator) < method.keep_probability
        return {"grids": grids, "offsets": offsets, "keep": keep}
    if isinstance(method, KernelShap):
        return shap_material(method, clip, tokens)
    if isinstance(method, M2ib):
        both = reference.sides(clip, 0, images[0], tokens[0], "cosine", None)[:2]
        shapes = ((method.copies, 1, *side.run.stream[0].shape) for side in both)
        names = ("noise", "text_noise")
        return {name: noise(method, shape)[:, :, 0] for name, shape in zip(names, shapes, strict=True)}
    return {}


def shap_material(method: KernelShap, clip: Clip, tokens: Tensor) -> dict[str, Any]:
    """One bank for all images; of a phrase its own rows, at its content."""
    present, content = torch.ones(1, int(patch_groups(clip.grid).max()) + 1, dtype=torch.bool), clip.content(tokens)
    keep, weight = coalitions(present, method.samples, method.seed)
    text_keep, text_weight = coalitions(content, method.samples, method.seed)
    used = [row > 0 for row in text_weight.T]
    return {
        "coalitions": keep[:, 0],
        "weights": weight[:, 0],
        "text_coalitions": [text_keep[rows, b][:, content[b]] for b, rows in enumerate(used)],
        "text_weights": [text_weight[rows, b] for b, rows in enumerate(used)],
    }


def noise(method: M2ib, shape: Sequence[int]) -> Tensor:
    """Of each step `(steps, copies, 1, n, C)`."""
    generator = torch.Generator().manual_seed(method.seed)
    return torch.stack([torch.randn(*shape, generator=generator) for _ in range(method.steps)])


Case = tuple[type[AttributionMethod], dict[str, Any]]
# On every family.
CHEAP: list[Case] = [
    (GradCam, {}),
    (GradCam, {"layers": [-1, -2], "at": "input"}),
    (GradCam, {"layers": [-1, -3], "variant": "hires", **MARGIN}),
    (Saliency, {}),
    (Saliency, MARGIN),
    (IntegratedGradients, {"steps": 3}),
    (IntegratedGradients, {"steps": 2, "fill": "mean_image", **MARGIN}),
    (Chefer, {}),
    (Chefer, {"start_layer": 0, "target": "logit"}),
    (Chefer, {"start_layer": -2, **MARGIN}),
    (GradEclip, {}),
    (GradEclip, {"image_blocks": 2, "text_blocks": 2, **MARGIN}),
    (Rollout, {}),
    (LeGrad, {}),
    (LeGrad, {"num_blocks": 2, **MARGIN}),
    (DenseSimilarity, {}),
    (DenseSimilarity, {"variant": "maskclip"}),
    (DenseSimilarity, {"variant": "sclip", **MARGIN}),
    (DenseSimilarity, {"variant": "patch"}),
    (Rise, {"masks": 4}),
    (M2ib, {"steps": 2, "copies": 2}),
    (Nib, {"steps": 2}),
    (WordRegions, {"steps": 2}),
]
# On a few: an end of text, a pool, BERT, a text that is seen to its end, a ResNet.
DEAR: list[Case] = [
    (GradCam, {"variant": "hires"}),
    (GradCam, {"layers": [0, -9], **MARGIN}),
    (IntegratedGradients, {"steps": 3, "fill": "blur", "chunk_size": 4}),
    (KernelShap, {"samples": 24}),
    (KernelShap, {"samples": 11, "fill": "mean_color", "seed": 3, **MARGIN}),
    (Rise, {"masks": 8, "keep_probability": 0.3, "centered": True, "fill": "blur", "grid_size": 3, "seed": 1} | MARGIN),
    (M2ib, {"steps": 4, "copies": 2, **MARGIN}),
    (WordRegions, {"steps": 2, "image_block": None, "text_block": None, "chunk_size": 3}),
    (WordRegions, {"steps": 2, "image_block": 0, "text_block": -2, "fill": "mean_image"}),
    (M2ib, {"block": 0, "beta": 0.5, "lr": 0.7, "steps": 3, "copies": 3, "after_last_update": True, "seed": 2}),
    (Nib, {"steps": 3, "chunk_size": 4, **MARGIN}),
    (Nib, {"block": 0, "steps": 2}),
]
FEW = ("native", "siglip", "biomedclip", "coca", "resnet")
CASES = [(name, *case) for case in CHEAP for name in FAMILIES] + [(name, *case) for case in DEAR for name in FEW]


@pytest.mark.parametrize(("name", "kind", "settings"), CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_against_the_reference(name: str, kind: type[AttributionMethod], settings: dict[str, Any]) -> None:
    needs_a_stream = kind.__name__ in NEED_A_STREAM and settings.get("image_block", -1) is not None
    if name == "resnet" and (needs_a_stream or settings.get("variant") == "patch"):
        pytest.skip("no stream of tokens")
    clip, method = family(name, torch.float64), kind(**settings)
    # One that is cut to the context length, and one with padding.
    images, tokens, phrases = (part[3:] for part in pairs(clip))
    expected = expected_of(method, clip, images, tokens, settings)
    raw = {key: expected.pop(key) for key in list(expected) if key not in ("image", "grid", "text", "score")}
    maps = method.attribute(clip, images, tokens, phrases)
    # The masks of RISE are drawn in float32, and the terms of NIB nearly cancel.
    assert_agree(expected, maps, {Rise: 1e-6, Nib: 1e-9}.get(kind, 1e-11))
    assert_agree(raw, maps, 1e-12)
    assert raw.keys() <= {*maps.parts, "interactions"}


# --- the versions of others


def scores_of(side: reference.Side) -> Callable[[Tensor], Tensor]:
    """S of many images, or of the embeddings of many phrases' tokens."""
    return lambda many: torch.stack([side.score(reference.run(side.tower, x)) for x in many])


def both_sides(name: str, number: int = 3) -> tuple[Clip, reference.Side, reference.Side]:
    clip = family(name, torch.float64)
    images, tokens, _ = pairs(clip)
    return clip, *reference.sides(clip, number, images[number], tokens[number], "margin", REFERENCE_PHRASES)[:2]


OUTSIDE: dict[str, Any] = {"target": "margin", "references": REFERENCE_PHRASES}


@pytest.mark.parametrize("name", ["native", "siglip", "biomedclip"])
def test_saliency_is_that_of_captum(name: str) -> None:
    clip, content_box, phrase = both_sides(name)
    images, tokens, phrases = (part[3:4] for part in pairs(clip))
    maps = Saliency(**OUTSIDE).attribute(clip, images, tokens, phrases)
    pixels, words = (captum.attr.Saliency(scores_of(side)).attribute(side.x[None])[0] for side in (content_box, phrase))
    torch.testing.assert_close(maps.image[0], reference.norm(pixels.amax(0)), atol=1e-9, rtol=0)
    found = reference.finished_text(words.norm(dim=1), phrase.among, tokens.shape[1])
    torch.testing.assert_close(maps.text[0], found, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["native", "siglip", "biomedclip"])
def test_integrated_gradients_are_those_of_captum(name: str) -> None:
    clip, content_box, phrase = both_sides(name)
    images, tokens, phrases = (part[3:4] for part in pairs(clip))
    parts = IntegratedGradients(steps=5, **OUTSIDE).attribute(clip, images, tokens, phrases).parts
    blank = tokens[0].clone()
    blank[phrase.among] = clip.pad_id
    bases = (torch.zeros_like(content_box.x), reference.word_embeddings(clip, blank))
    # The nodes and weights of captum are float32.
    for side, base, prefix in zip((content_box, phrase), bases, ("", "text_"), strict=True):
        ours = captum.attr.IntegratedGradients(scores_of(side))
        arguments = {"n_steps": 5, "method": "gausslegendre", "return_convergence_delta": True}
        values, delta = ours.attribute(side.x[None], base[None], **arguments)
        channels = 0 if prefix == "" else 1
        torch.testing.assert_close(parts[f"{prefix}signed"][0], values[0].sum(channels), atol=1e-7, rtol=0)
        torch.testing.assert_close(parts[f"{prefix}completeness_error"], delta, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["native", "siglip"])
def test_the_narrowing_bottleneck_is_captums_integral_from_tokens_of_zeros(name: str) -> None:
    clip, content_box, phrase = both_sides(name)
    images, tokens, phrases = (part[3:4] for part in pairs(clip))
    parts = Nib(block=1, steps=4, **OUTSIDE).attribute(clip, images, tokens, phrases).parts
    for side, prefix in ((content_box, ""), (phrase, "text_")):
        # No token stands behind the one that is read here: all of them are narrowed.
        hidden = side.run.stream[2].detach()[None]
        assert prefix == "" or side.run.pooling.pooled[-1] == len(hidden[0]) - 1
        ours = captum.attr.IntegratedGradients(tail_scores(side, 2))
        arguments = {"n_steps": 4, "method": "riemann_right", "return_convergence_delta": True}
        values, delta = ours.attribute(hidden, torch.zeros_like(hidden), **arguments)
        found = parts[f"{prefix}signed"][0] if prefix == "" else parts["text_signed"][0, side.among]
        torch.testing.assert_close(found, values[0, side.among].sum(1), atol=1e-7, rtol=0)
        torch.testing.assert_close(parts[f"{prefix}completeness_error"], delta, atol=1e-7, rtol=0)


def tail_scores(side: reference.Side, first: int) -> Callable[[Tensor], Tensor]:
    """S of many streams of tokens that enter a block."""
    return lambda many: torch.stack([side.score(reference.tail(side.tower, tokens, first)) for tokens in many])


class ImageEmbeddings(nn.Module):
    """What `grad-cam` can call."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images)


CAMS: dict[str, tuple[Any, dict[str, str], Callable[[Sequence[Any]], nn.Module]]] = {
    "the norm": (pytorch_grad_cam.GradCAM, {}, lambda blocks: blocks[-1].ln_1),
    "its input": (pytorch_grad_cam.GradCAM, {"at": "input"}, lambda blocks: blocks[-2]),
    "hires": (pytorch_grad_cam.HiResCAM, {"variant": "hires"}, lambda blocks: blocks[-1].ln_1),
}


@pytest.mark.parametrize("name", CAMS)
def test_cameras_are_those_of_grad_cam(name: str) -> None:
    """The mean of the gradients is without the class token at the norm, and with it at the norm's input."""
    source = family("square", torch.float64)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    images, tokens, phrases = pairs(clip)
    kind, settings, layer = CAMS[name]
    rows, columns = clip.grid
    with_class = "at" in settings
    shape = (rows * columns + 1, 1) if with_class else clip.grid
    targets = [lambda embedding, d=d: (embedding * d).sum() for d in clip.encode_text(tokens).detach()]
    camera = kind(
        ImageEmbeddings(clip),
        [layer(native_blocks(clip)[0])],
        reshape_transform=lambda stream: stream[:, not with_class :].transpose(1, 2).unflatten(2, shape),
    )
    # It enlarges by OpenCV; at the size of the raster it leaves the maps as they are.
    camera.get_target_width_height = lambda _: shape[::-1]
    found = torch.from_numpy(np.asarray(camera(images, targets))).flatten(1)[:, -rows * columns :]
    expected = min_max(found.unflatten(1, clip.grid))
    assert (expected.flatten(1).amax(1) == 1).any()
    maps = GradCam(**settings).attribute(source, images, tokens, phrases)
    torch.testing.assert_close(maps.grid, expected.double(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def cells() -> tuple[Clip, Tensor]:
    """A ResNet of nine cells, and its scores of the first pair with the cells of each binary number."""
    clip = family("resnet", torch.float64)
    images, tokens, _ = pairs(clip)
    kept = (torch.arange(2**9)[:, None] >> torch.arange(9)) & 1
    shown = kept.unflatten(1, clip.grid).repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].bool()
    content_box = fill_images("mean_image", clip, images)
    with torch.no_grad():
        parts = [clip.encode_image(torch.where(part, images[0], content_box)) for part in shown.split(64)]
        return clip, torch.cat(parts) @ clip.encode_text(tokens[:1])[0]


def code(kept: Tensor) -> Tensor:
    """The binary number of what is kept `(..., F)`."""
    return (kept.long() * 2 ** torch.arange(kept.shape[-1])).sum(-1)


def test_shapley_values_of_nine_cells(cells: tuple[Clip, Tensor]) -> None:
    clip, table = cells
    images, tokens, phrases = (part[:1] for part in pairs(clip))
    maps = KernelShap(samples=1022).attribute(clip, images, tokens, phrases)
    exact = reference.exact_shapley(lambda kept: table[code(kept)], 9)
    torch.testing.assert_close(maps.parts["values"][0], exact, atol=1e-9, rtol=0)
    _, _, phrase = both_sides("resnet", 0)
    phrase.direction = clip.encode_image(images)[0].detach()
    words = reference.exact_shapley(partial(reference.kept_words, phrase), len(phrase.among))
    torch.testing.assert_close(maps.parts["text_values"][0, phrase.among], words, atol=1e-9, rtol=0)


def test_drawn_coalitions_estimate_shapley_values(cells: tuple[Clip, Tensor]) -> None:
    """As well as those of captum do."""
    _, table = cells
    exact = reference.exact_shapley(lambda kept: table[code(kept)], 9)
    torch.manual_seed(0)
    explainer = captum.attr.KernelShap(lambda kept: table[code(kept)])
    arguments = {"n_samples": 2000, "perturbations_per_eval": 500}
    theirs = explainer.attribute(torch.ones(1, 9), torch.zeros(1, 9), **arguments)[0]
    present = torch.ones(1, 9, dtype=torch.bool)
    estimates = []
    for seed in range(4):
        keep, weight = coalitions(present, 500, seed)
        scores = table[code(keep)]
        estimates.append(shapley_regression(keep, weight, present, scores, table[:1], table[-1:])[0])
    ours = torch.stack(estimates).mean(0)
    scale = exact.abs().max()
    torch.testing.assert_close(ours.sum(), table[-1] - table[0])
    assert (theirs - exact).abs().max() < 0.15 * scale
    assert (ours - exact).abs().max() < 0.15 * scale


def test_few_features_give_all_coalitions() -> None:
    """Each of them once, whatever the others of the batch get."""
    present = torch.tensor([[True] * 12, [False, True] * 6, [True] + [False] * 11, [False] * 12])
    keep, weight = coalitions(present, 62, seed=1)
    assert keep.shape == (62, 4, 12)
    assert (weight[:, 0] == 1).all()
    assert torch.equal(keep[::2, 0], ~keep[1::2, 0])
    every, shares = reference.proper_coalitions(6)
    expected = dict(zip(code(every).tolist(), shares.tolist(), strict=True))
    found = dict(zip(code(keep[:, 1, 1::2]).tolist(), weight[:, 1].tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert not (keep & ~present).any()
    assert (weight[:, 2:] == 0).all()


def test_sizes_of_drawn_coalitions_follow_the_kernel() -> None:
    keep, weight = coalitions(torch.ones(1, 20, dtype=torch.bool), 20_000, seed=1)
    assert (weight == 1).all()
    sizes = keep.sum(2).flatten().bincount(minlength=20)[1:] / len(keep)
    shares = torch.tensor([1 / (s * (20 - s)) for s in range(1, 20)])
    torch.testing.assert_close(sizes, shares / shares.sum(), atol=0.01, rtol=0)
    together = torch.einsum("sbf,sbg->fg", keep.double(), keep.double()) / len(keep)
    apart = together[~torch.eye(20, dtype=torch.bool)]
    torch.testing.assert_close(apart, apart.mean().expand_as(apart), atol=0.02, rtol=0)


def test_the_bottleneck_is_that_of_a_hook_in_the_whole_model() -> None:
    """As released: each step runs all of the tower, with the output of the block replaced."""
    source = family("native", torch.float64)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    images, tokens, phrases = (part[:1] for part in pairs(clip))
    method = M2ib(steps=5, copies=3, seed=4)
    drawn = noise(method, (3, 25, 32)).double()
    alpha = torch.full((1, 25, 32), 5.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=1)
    for eps in drawn:
        capacities: list[Tensor] = []
        with native_blocks(clip)[0][1].register_forward_hook(bottleneck(alpha, eps, capacities)):
            embeddings = clip.encode_image(images.expand(3, -1, -1, -1))
        capacity = capacities[0]
        loss = 0.1 * capacity.mean() - (embeddings @ clip.encode_text(tokens)[0].detach()).mean()
        alpha.grad = torch.autograd.grad(loss, alpha)[0]
        optimizer.step()
    expected = reference.norm(capacity[0].sum(1)[1:].detach()).view(clip.grid)
    maps = method.attribute(source, images, tokens, phrases)
    torch.testing.assert_close(maps.grid[0], expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(maps.parts["capacity"], capacity.mean()[None].detach(), atol=1e-8, rtol=0)


def bottleneck(alpha: Tensor, eps: Tensor, capacities: list[Tensor]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        share, variance = alpha.sigmoid(), (1 - alpha.sigmoid()) ** 2
        capacities.append(-0.5 * (1 + variance.log() - (share * hidden[:1]) ** 2 - variance))
        return share * hidden + (1 - share) * eps

    return hook


# --- seeds, chunks and padding

CHUNKED: list[Callable[..., AttributionMethod]] = [
    partial(IntegratedGradients, steps=4),
    partial(KernelShap, samples=24),
    partial(Rise, masks=9),
    partial(M2ib, steps=3, copies=3),
    partial(Nib, steps=3),
    partial(SubmodularRegions, regions=6, pending=1),
    partial(WordRegions, steps=2),
]
RANDOM: list[Callable[..., AttributionMethod]] = [*CHUNKED[1:4], RandomMap]


def maker(make: Any) -> str:
    return getattr(make, "func", make).__name__


@pytest.mark.parametrize("make", CHUNKED, ids=maker)
@pytest.mark.parametrize("name", ["native", "siglip"])
def test_chunks_change_nothing(make: Callable[..., AttributionMethod], name: str) -> None:
    clip = family(name, torch.float64)
    one, other, whole = (make(chunk_size=size).attribute(clip, *pairs(clip)) for size in (1, 7, 1000))
    assert_close_maps(one, whole, 1e-9)
    assert_close_maps(other, whole, 1e-9)


@pytest.mark.parametrize("method", [KernelShap(samples=9), Rise(masks=9)], ids=lambda method: type(method).__name__)
def test_remainders_may_be_compared_in_parts(method: AttributionMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = family("native", torch.float64)
    expected = method.attribute(clip, *pairs(clip))
    monkeypatch.setattr("matex_pl.attribution.core.two_tower._MOST_TOKENS", 2 * 9 * 16)
    assert_close_maps(method.attribute(clip, *pairs(clip)), expected, 1e-9)


@pytest.mark.parametrize("make", RANDOM, ids=maker)
def test_a_seed_is_a_map(make: Callable[..., AttributionMethod]) -> None:
    """Whatever the state of the process's own generator, which is left alone."""
    clip = family("native", torch.float64)
    torch.manual_seed(0)
    one = make(seed=5).attribute(clip, *pairs(clip))
    before = torch.get_rng_state()
    torch.rand(3)
    same, other = (make(seed=seed).attribute(clip, *pairs(clip)) for seed in (5, 6))
    assert_close_maps(same, one, 0)
    for b in (0, 3, 4):
        assert (one.image[b] - other.image[b]).abs().max() > 1e-3
    # Of four words, KernelSHAP takes all coalitions.
    assert (one.text[3] - other.text[3]).abs().max() > 1e-3
    torch.set_rng_state(before)


PADDED = [method for name, method in METHODS.items() if name not in ("M2ib", "RandomMap", "Rise")]


@pytest.mark.parametrize("method", PADDED, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", ["native", "biomedclip", "average"])
def test_more_padding_changes_nothing(method: AttributionMethod, name: str) -> None:
    """Where the towers see none of it. What is random is drawn for a length."""
    clip = family(name, torch.float64)
    images, tokens, phrases = pairs(clip, ["left lower lobe", "nodule"])
    short = tokens[:, :9]
    assert torch.equal(clip.content(tokens).sum(1), clip.content(short).sum(1))
    maps, cut = (method.attribute(clip, images, words, phrases) for words in (tokens, short))
    assert not maps.text[:, 9:].any()
    torch.testing.assert_close(cut.text, maps.text[:, :9], atol=1e-9, rtol=0)
    torch.testing.assert_close(cut.image, maps.image, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", [Rise, KernelShap, M2ib])
def test_pairs_of_a_call_see_the_same_draws(kind: type[AttributionMethod]) -> None:
    """A pair twice in a batch has one map."""
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    twice = torch.tensor([3, 0, 3])
    maps = METHODS[kind.__name__].attribute(clip, images[twice], tokens[twice], [phrases[b] for b in twice])
    for name in ("image", "grid", "text"):
        one, _, other = getattr(maps, name)
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


# --- known answers


@pytest.mark.parametrize("samples", [10, 200])
def test_shapley_values_add_up(samples: int) -> None:
    """Exactly, however few coalitions they come from."""
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    parts = KernelShap(samples=samples, fill="mean_image").attribute(clip, images, tokens, phrases).parts
    content = clip.content(tokens)
    empty = tokens.masked_fill(content, clip.pad_id)
    with torch.no_grad():
        full = clip.similarity(images, tokens)
        blank = clip.normalize(clip.mean_image.expand(5, 3, -1, -1))
        torch.testing.assert_close(parts["values"].sum(1), full - clip.similarity(blank, tokens))
        torch.testing.assert_close(parts["text_values"].sum(1), full - clip.similarity(images, empty))
    assert not parts["text_values"][~content].any()


def test_patches_are_grouped_as_they_are_in_the_slow_version() -> None:
    for grid, most in (((8, 8), 64), ((9, 10), 64), ((2, 3), 64), ((5, 3), 4)):
        assert patch_groups(grid, most).flatten().tolist() == reference.patch_groups(grid, most)


def test_patches_of_a_group_share_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matex_pl.attribution.kernel_shap.patch_groups", partial(patch_groups, most=6))
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip, ["left lower lobe"])
    fill = fill_images("mean_image", clip, images)[0]
    expected = reference.raw_kernel_shap(clip, images, tokens, most=6, fill=fill)
    parts = KernelShap(samples=62).attribute(clip, images, tokens, phrases).parts
    torch.testing.assert_close(parts["values"], expected["values"], atol=1e-12, rtol=0)
    assert parts["values"].unique().numel() == 6


def test_integrated_gradients_become_complete() -> None:
    clip = family("siglip", torch.float64)
    batch_of_two = tuple(part[3:] for part in pairs(clip))
    found = [IntegratedGradients(steps=steps).attribute(clip, *batch_of_two).parts for steps in (2, 8, 64)]
    for key in ("completeness_error", "text_completeness_error"):
        coarse, better, fine = (parts[key].abs().max() for parts in found)
        assert coarse > better > fine
        assert fine < 1e-4


def test_the_narrowing_bottleneck_becomes_complete() -> None:
    """In proportion to the steps, where the layer norms leave the line from 0 smooth."""
    source = family("native", torch.float64)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    for module in clip.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1.0
    pair = tuple(part[3:4] for part in pairs(clip))
    found = [Nib(block=1, steps=steps).attribute(clip, *pair).parts for steps in (16, 64, 256)]
    for key in ("completeness_error", "text_completeness_error"):
        coarse, better, fine = (parts[key] for parts in found)
        torch.testing.assert_close(better, coarse / 4, atol=2e-3, rtol=0.1)
        torch.testing.assert_close(fine, better / 4, atol=1e-4, rtol=0.1)
        assert coarse.abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 7])
def test_a_narrowing_bottleneck_before_a_linear_head(steps: int) -> None:
    """A mean and a matrix: the gradient grows as 1 / lambda, and all values add up to 0."""
    source = family("avg_native", torch.float64)
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    clip.model.visual.ln_post = nn.Identity()
    images, tokens, phrases = pairs(clip)
    maps = Nib(block=-1, steps=steps).attribute(clip, images, tokens, phrases)
    seen: list[Tensor] = []
    with torch.no_grad(), native_blocks(clip)[0][-1].register_forward_hook(lambda *args: seen.append(args[2])):
        image, text = clip.encode_image(images), clip.encode_text(tokens)
    patches = seen[0][:, 1:] @ clip.model.visual.proj
    length = patches.mean(1).norm(dim=1)
    slope = (patches * (text - maps.score[:, None] * image)[:, None]).sum(2) / (patches.shape[1] * length[:, None])
    harmonic = sum(1 / step for step in range(1, steps + 1))
    torch.testing.assert_close(maps.parts["signed"], harmonic * slope, atol=1e-12, rtol=0)
    torch.testing.assert_close(maps.parts["signed"].sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)
    # The embedding of nothing has no direction.
    torch.testing.assert_close(maps.parts["completeness_error"], -maps.score, atol=1e-12, rtol=0)


def test_interactions_become_complete() -> None:
    clip = family("siglip", torch.float64)
    batch_of_two = tuple(part[3:] for part in pairs(clip))
    found = [WordRegions(steps=steps).attribute(clip, *batch_of_two).parts for steps in (1, 3, 12)]
    coarse, better, fine = (parts["completeness_error"].abs().max() for parts in found)
    assert coarse > better > fine
    assert fine < 1e-7


@pytest.mark.parametrize("name", ["siglip", "resnet"])
def test_sums_of_interactions_are_integrated_gradients(name: str) -> None:
    """Of one tower, in the direction of the change of the other tower's embedding."""
    clip = family(name, torch.float64)
    images, tokens, phrases = (part[3:] for part in pairs(clip))
    blank = tokens.masked_fill(clip.content(tokens), clip.pad_id)
    with torch.no_grad():
        seen = clip.encode_image(images) - clip.encode_image(torch.zeros_like(images))
        said = clip.encode_text(tokens) - clip.encode_text(blank)
    with borrowed(clip):
        towers = ImageTower(clip, images, lambda: 0), TextTower(clip, tokens, lambda: 0)
        first = [IntegratedGradients(steps=64).trace(tower).relevance_for for tower in towers]
        by_pixel, by_token = (side(way).parts["signed"] for side, way in zip(first, (said, seen), strict=True))
    errors = []
    for steps in (2, 16, 64):
        maps = WordRegions(None, None, steps=steps).attribute(clip, images, tokens, phrases)
        by_patch = patch_mean(by_pixel, clip.grid).flatten(1) * (by_pixel[0].numel() / maps.grid[0].numel())
        torch.testing.assert_close(maps.interactions.sum(2), maps.parts["text_signed"])
        torch.testing.assert_close(maps.interactions.sum(1), maps.parts["signed"])
        errors.append(
            max((maps.interactions.sum(2) - by_token).abs().max(), (maps.interactions.sum(1) - by_patch).abs().max())
        )
    assert errors[0] > errors[1] > errors[2]
    # A ResNet has kinks, where sums converge slowly.
    assert errors[2] < 2e-3


def test_the_map_of_a_word_is_the_sum_over_its_pieces() -> None:
    clip = family("native")
    images, tokens, phrases = (part[:2] for part in pairs(clip, ["Left pneumothorax.", "Zzyzx mass"]))
    maps = WordRegions(steps=2).attribute(clip, images, tokens, phrases)
    for row in range(2):
        owners = torch.tensor(maps.phrases[row].token_words)
        for word, found in enumerate(maps.word_maps[row]):
            expected = maps.interactions[row][owners == word].sum(0).view(clip.grid)
            torch.testing.assert_close(found, expected)
        assert (owners == len(maps.words[row]) - 1).any()
    with pytest.raises(ValueError, match="no interactions of words and patches"):
        _ = Chefer().attribute(clip, images, tokens, phrases).word_maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_image_that_is_its_fill_has_no_map(dtype: torch.dtype) -> None:
    """Rather than one of rounding."""
    clip = family("native", dtype)
    images = clip.normalize(clip.mean_image.expand(2, 3, -1, -1))
    _, tokens, phrases = pairs(clip, PHRASES[3:])
    for method in (
        Rise(masks=9, centered=True, chunk_size=4),
        KernelShap(samples=9, chunk_size=4),
        IntegratedGradients(steps=2, fill="mean_image"),
        SubmodularRegions(regions=4),
    ):
        assert not method.attribute(clip, images, tokens, phrases).image.any()


@pytest.mark.parametrize("name", ["native", "resnet", "biomedclip"])
def test_the_last_block_alone(name: str) -> None:
    """Of one block, LeGrad is the positive gradient of the row that is read, and Chefer that times the attention."""
    clip, content_box, phrase = both_sides(name)
    images, tokens, phrases = (part[3:4] for part in pairs(clip))
    both = [method.attribute(clip, images, tokens, phrases) for method in (LeGrad(1, **OUTSIDE), Chefer(**OUTSIDE))]
    for side in (content_box, phrase):
        layer, position = side.run.layers[-1], side.run.pooling.pooled[0]
        gradients = torch.autograd.grad(side.score(side.run), layer.attention, retain_graph=True)
        read = [gradient[position, side.among] for gradient in gradients]
        seen = [attention[position, side.among] for attention in layer.attention]
        rows = [sum(g.relu() for g in read), sum((g * a).relu() for g, a in zip(read, seen, strict=True))]
        for maps, row in zip(both, rows, strict=True):
            found = maps.grid[0].flatten() if side is content_box else maps.text[0, side.among]
            torch.testing.assert_close(found, reference.norm(row.detach()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["native", "siglip", "average", "resnet"])
def test_grad_eclip_is_a_part_of_matex(name: str) -> None:
    clip = family(name, torch.float64)
    maps = GradEclip(1, 1).attribute(clip, *pairs(clip))
    parts = Matex(grad_layers=1, spatial_weight="loosened").attribute(clip, *pairs(clip)).parts
    torch.testing.assert_close(maps.grid, min_max(parts["grad"]), atol=1e-9, rtol=0)
    several = maps.content.sum(1) > 1
    expected = min_max(parts["text_grad"], keep=parts["content"])
    torch.testing.assert_close(maps.text[several], expected[several], atol=1e-9, rtol=0)


def copied(name: str) -> Clip:
    source = family(name, torch.float64)
    return copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})


def last_attention(clip: Clip) -> nn.MultiheadAttention:
    """Attention of the last block of open_clip's own tower."""
    return clip.model.visual.transformer.resblocks[-1].attn


@torch.no_grad()
def test_with_equal_queries_and_keys_dense_attention_is_that_of_the_model() -> None:
    clip = copied("native")
    attention = last_attention(clip)
    for weight in (attention.in_proj_weight, attention.in_proj_bias):
        weight.chunk(3)[1].copy_(weight.chunk(3)[0])
    inputs = pairs(clip)
    # What ClearCLIP reads is what the attention adds in the model itself.
    added: list[Tensor] = []
    with attention.register_forward_hook(lambda _, __, output: added.append(output[0])):
        clip.encode_image(inputs[0])
    read = F.normalize(clip.model.visual.ln_post(added[0][:, 1:]) @ clip.model.visual.proj, dim=-1)
    expected = min_max((read * clip.encode_text(inputs[1])[:, None]).sum(-1).unflatten(1, clip.grid))
    torch.testing.assert_close(DenseSimilarity("clearclip").attribute(clip, *inputs).grid, expected)
    # SCLIP adds two equal attentions: twice the values, with half of the projection. Its bias is added once.
    attention.out_proj.bias.zero_()
    whole = DenseSimilarity("patch").attribute(clip, *inputs)
    attention.out_proj.weight /= 2
    twice = DenseSimilarity("sclip").attribute(clip, *inputs)
    torch.testing.assert_close(twice.grid, whole.grid, atol=1e-9, rtol=0)


@torch.no_grad()
def test_queries_without_a_direction_attend_to_all_patches_alike() -> None:
    clip = copied("native")
    attention = last_attention(clip)
    for weight in (attention.in_proj_weight, attention.in_proj_bias):
        weight.chunk(3)[0].zero_()
    assert not DenseSimilarity("clearclip").attribute(clip, *pairs(clip)).grid.any()
    for variant in ("maskclip", "sclip"):
        assert DenseSimilarity(variant).attribute(clip, *pairs(clip)).grid.any()


@torch.no_grad()
def test_maskclip_reads_each_token_without_the_others() -> None:
    """In a tower of one block without positions, a patch has the same value beside any other patches."""
    clip = copied("square")
    visual = clip.model.visual
    visual.transformer.resblocks = visual.transformer.resblocks[:1]
    visual.positional_embedding.zero_()
    kinds = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    drawn = torch.stack([torch.arange(16) % 3, (torch.arange(16) == 5).long() + 2 * (torch.arange(16) == 9)])
    images = torch.stack([kinds[row].view(4, 4, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 32, 32) for row in drawn])

    def values(variant: Any) -> Tensor:
        grid = DenseSimilarity(variant).attribute(clip, images, clip.tokenize(["mass"] * 2), ["mass"] * 2).grid
        places = torch.stack([(drawn == kind).long().argmax(1) for kind in range(3)], 1)
        return grid.flatten(1).gather(1, places)

    torch.testing.assert_close(*values("maskclip"), atol=1e-9, rtol=0)
    for variant in ("sclip", "clearclip", "patch"):
        one, other = values(variant)
        assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("variant", ["maskclip", "clearclip"])
def test_an_attention_that_cannot_be_separated_is_refused(variant: Any) -> None:
    clip = copied("biomedclip")
    blocks = clip.model.visual.trunk.blocks
    blocks[-1] = ResPostBlock(64, 2).eval().double()
    with pytest.raises(NotImplementedError, match=r"image tower TimmModel .*last block \(ResPostBlock\) cannot be sep"):
        DenseSimilarity(variant).attribute(clip, *pairs(clip))
    assert not any("forward" in vars(module) or module._forward_hooks for module in clip.modules())
    assert DenseSimilarity("sclip").attribute(clip, *pairs(clip)).grid.any()


def test_an_attention_that_is_not_fused_is_refused() -> None:
    clip = copied("biomedclip")
    clip.model.visual.trunk.blocks[-1].attn.fused_attn = False
    with pytest.raises(NotImplementedError, match="its last block calls the fused attention 0 times"):
        DenseSimilarity("sclip").attribute(clip, *pairs(clip))
    assert DenseSimilarity("patch").attribute(clip, *pairs(clip)).grid.any()


def test_a_failure_in_the_second_run_of_the_block_leaves_no_trace() -> None:
    clip = copied("native")
    block, fused, seen = clip.model.visual.transformer.resblocks[-1], F.scaled_dot_product_attention, []

    def fail_the_second_time(*_: object) -> None:
        seen.append(0)
        if len(seen) == 2:
            raise RuntimeError("injected")

    with block.attn.register_forward_hook(fail_the_second_time), pytest.raises(RuntimeError, match="injected"):
        DenseSimilarity("clearclip").attribute(clip, *pairs(clip))
    assert F.scaled_dot_product_attention is fused
    assert not any("forward" in vars(module) or module._forward_hooks for module in clip.modules())


def test_rollout_asks_for_no_phrase() -> None:
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    maps = Rollout().attribute(clip, images, tokens, phrases)
    other = Rollout().attribute(clip, images, tokens.flip(0), phrases[::-1])
    torch.testing.assert_close(maps.image, other.image, atol=1e-12, rtol=0)
    torch.testing.assert_close(maps.text, other.text.flip(0), atol=1e-12, rtol=0)


def opening(block: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """Divergence from noise of what passes behind a block at the start, `(B, n, C)`."""
    seen: list[Tensor] = []
    with torch.no_grad(), block.register_forward_hook(lambda *args: seen.append(args[2])):
        forward()
    share = torch.tensor(5.0).double().sigmoid()
    noise = torch.distributions.Normal(torch.zeros_like(seen[0]), 1)
    passed = torch.distributions.Normal(share * seen[0], (1 - share).expand_as(seen[0]))
    return torch.distributions.kl_divergence(passed, noise)


def native_blocks(clip: Clip) -> tuple[Any, Any]:
    return clip.model.visual.transformer.resblocks, clip.model.transformer.resblocks


def test_capacity_of_the_first_step_and_of_none() -> None:
    """Before the first update all is let through; what costs much is shut."""
    clip = family("native", torch.float64)
    images, tokens, phrases = pairs(clip)
    opened = M2ib(steps=1, copies=1).attribute(clip, images, tokens, phrases)
    content_box, words = (
        opening(blocks[1], partial(clip.similarity, images, tokens)) for blocks in native_blocks(clip)
    )
    torch.testing.assert_close(opened.parts["capacity"], content_box.mean((1, 2)))
    torch.testing.assert_close(opened.grid.flatten(1), min_max(content_box[:, 1:].sum(2)))
    # Of a phrase what stands before the end of text counts, and the end.
    ends = (tokens.argmax(1) + 1).tolist()
    expected = torch.stack([row[:end].mean() for row, end in zip(words, ends, strict=True)])
    torch.testing.assert_close(opened.parts["text_capacity"], expected)
    settings: dict[str, Any] = {"lr": 10.0, "steps": 2, "copies": 1, "after_last_update": True}
    shut = M2ib(beta=1e6, **settings).attribute(clip, images, tokens, phrases)
    assert shut.parts["capacity"].max() < 1e-8
    assert shut.parts["text_capacity"].max() < 1e-8
    free = M2ib(beta=1e-12, **settings).attribute(clip, images, tokens, phrases)
    assert (free.parts["capacity"] > 1e6 * shut.parts["capacity"]).all()


def test_capacity_does_not_underflow() -> None:
    """Where lambda rounds to 1 in float32, its capacity is as large as it is, not infinite."""
    alpha, hidden = torch.tensor([-60.0, 0.0, 40.0, 90.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    exact = [-0.5 * (1 - 2 * max(a, 0) - 4 * s**2 - (1 - s) ** 2) for a, s in ((-60, 0.0), (40, 1.0), (90, 1.0))]
    torch.testing.assert_close(capacity_of(alpha, hidden)[[0, 2, 3]], torch.tensor(exact))
    assert (capacity_of(alpha, hidden) >= 0).all()


# --- what a map costs


@contextmanager
def runs(clip: Clip) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Samples in each run of each block, of the image tower and of the text tower."""
    towers = native_blocks(clip)
    seen: tuple[list[list[int]], list[list[int]]] = tuple([[] for _ in blocks] for blocks in towers)  # type: ignore[assignment]
    with ExitStack() as stack:
        for blocks, lists in zip(towers, seen, strict=True):
            for block, found in zip(blocks, lists, strict=True):
                # A block that only passes tokens on calls none of its parts.
                hook = block.ln_1.register_forward_hook(lambda _, args, __, found=found: found.append(len(args[0])))
                stack.enter_context(hook)
        yield seen


def count_runs(method: AttributionMethod, phrases: list[str] | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """Of one call on three pairs, or on the phrases of one image."""
    clip = family("native")
    images, tokens, three = (part[:3] for part in pairs(clip))
    # Blocks are counted once per model.
    Chefer().attribute(clip, images, tokens, three)
    with runs(clip) as seen:
        if phrases is None:
            method.attribute(clip, images, tokens, three)
        else:
            method.attribute_phrases(clip, images[0], phrases)
    return seen


ONE_FORWARD = [Chefer(0), DenseSimilarity("patch"), GradCam(), GradEclip(), LeGrad(), Rollout(), Saliency()]


@pytest.mark.parametrize("method", ONE_FORWARD, ids=lambda method: type(method).__name__)
def test_one_forward_of_each_tower(method: AttributionMethod) -> None:
    assert count_runs(method) == ([[3]] * 4, [[3]] * 4)
    assert count_runs(method, ["mass", "left base"]) == ([[1]] * 4, [[2]] * 4)


@pytest.mark.parametrize("variant", ["maskclip", "sclip", "clearclip"])
def test_dense_embeddings_cost_the_last_block_once_more(variant: Any) -> None:
    method = DenseSimilarity(variant)
    assert count_runs(method) == ([[3]] * 3 + [[3, 3]], [[3]] * 4)
    assert count_runs(method, ["mass", "left base"]) == ([[1]] * 3 + [[1, 1]], [[2]] * 4)


def test_a_bottleneck_runs_what_is_behind_it() -> None:
    image, text = count_runs(M2ib(block=1, steps=3, copies=4))
    assert image == text == [[3], [3], [3, 12, 12], [3, 12, 12]]
    image, text = count_runs(M2ib(block=-1, steps=3, copies=4, after_last_update=True))
    assert image == text == [[3]] * 4
    image, _ = count_runs(M2ib(block=2, steps=2, copies=4, chunk_size=8), ["mass", "edema", "left base"])
    assert image == [[1]] * 3 + [[1, 8, 4]]


def test_a_narrowing_bottleneck_runs_what_is_behind_it() -> None:
    """The copies of one image serve all its phrases, and one more forward has the closed bottleneck."""
    image, text = count_runs(Nib(block=1, steps=4, chunk_size=6))
    assert image == text == [[3], [3], [3, 6, 6, 3], [3, 6, 6, 3]]
    image, text = count_runs(Nib(block=2, steps=4, chunk_size=6), ["mass", "edema", "left base"])
    assert image == [[1]] * 3 + [[1, 2, 2, 1]]
    assert text == [[3]] * 3 + [[3, 6, 6, 3]]
    image, text = count_runs(Nib(block=-1))
    assert image == text == [[3]] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_noise_of_an_image_is_the_same_in_every_precision(dtype: torch.dtype) -> None:
    clip, other = family("native"), family("native", dtype)
    pixels = torch.randint(0, 256, (2, 3, *clip.image_size), generator=torch.Generator().manual_seed(0)).byte()
    phrases = ["left effusion.", "right effusion."]
    noise = [
        RandomMap(blur=1.0)._draw(model, model.normalize(pixels), phrases, None).float() for model in (clip, other)
    ]
    assert torch.equal(*noise)
    changed = pixels.clone()
    changed[0, 0, 0, 0] ^= 1
    again = RandomMap(blur=1.0)._draw(clip, clip.normalize(changed), phrases, None)
    assert not torch.equal(again[0], noise[0][0])
    assert torch.equal(again[1], noise[0][1])


def test_random_masks_cost_a_forward_each() -> None:
    image, text = count_runs(Rise(masks=100, chunk_size=30))
    assert image[0] == [3, *[30] * 10]
    # Four words, one and none: what is left of them comes again.
    assert text[0] == [3, 16 + 2 + 1]


@pytest.mark.parametrize("method", [KernelShap(samples=40), Rise(masks=40)], ids=lambda method: type(method).__name__)
def test_phrases_share_what_is_seen_of_their_image(method: AttributionMethod) -> None:
    image, _ = count_runs(method, ["mass", "left base", "edema"])
    assert sum(image[0]) == 1 + 40 + isinstance(method, KernelShap)


def test_of_three_words_at_most_eight_phrases_are_left() -> None:
    image, text = count_runs(Rise(masks=4000, chunk_size=1000), ["left lower lobe"])
    assert image[0] == [1, *[1000] * 4]
    assert text[0] == [1, 8]


def test_coalitions_cost_a_forward_each() -> None:
    image, text = count_runs(KernelShap(samples=20, chunk_size=1000))
    assert image[0] == [3, 3 * 21]
    assert sum(image[0]) == 3 * (20 + 2)
    # All coalitions of four words, what one leaves, and none.
    assert text[0] == [3, 15 + 2 + 1]


def test_steps_cost_a_forward_each() -> None:
    image, text = count_runs(IntegratedGradients(steps=4, chunk_size=6))
    assert image[0] == text[0] == [3, 6, 6, 3]


def test_interactions_cost_the_last_blocks_for_each_token() -> None:
    method = WordRegions(steps=2, chunk_size=6)
    image, text = count_runs(method)
    # Input and reference.
    assert image[:-1] == [[1, 3]] * 3
    assert text[:-1] == [[3, 3]] * 3
    # One forward for all backwards of a chunk.
    assert image[-1] == [1, 3, 6]
    # A forward-mode derivative for each token that the reference lacks, or that reads one, and each node.
    assert text[-1][:2] == [3, 3]
    clip = family("native")
    ends = pairs(clip)[1][:3].argmax(1)
    assert sum(text[-1][2:]) == 3 * 2 * int(ends.max())
    image, text = count_runs(method, ["mass", "left base"])
    assert image[-1] == [1, 1, 2]
    assert sum(text[-1][2:]) == 2 * 2 * 3


# --- refusals


BAD: list[tuple[Callable[..., AttributionMethod], dict[str, Any], str]] = [
    (GradCam, {"variant": "hires", "at": "input"}, "variant='hires' is 0 at the input"),
    (GradCam, {"variant": "eigen"}, "variant must be one of gradcam, hires, got 'eigen'"),
    (GradCam, {"layers": []}, "layers must name at least one block"),
    (GradCam, {"target": "logit"}, "target must be one of cosine, margin, got 'logit'"),
    (Chefer, {"target": "probability"}, "target must be one of cosine, margin, logit, got 'probability'"),
    (Saliency, {"references": []}, "references must name at least one phrase"),
    (IntegratedGradients, {"steps": 0}, "steps must be a number greater than 0, got 0"),
    (IntegratedGradients, {"fill": "black"}, "fill must be one of mean_image, mean_color, blur, got 'black'"),
    (IntegratedGradients, {"chunk_size": -1}, "chunk_size must be a number greater than 0, got -1"),
    (KernelShap, {"samples": 0}, "samples must be a number greater than 0, got 0"),
    (KernelShap, {"fill": "zero"}, "fill must be one of"),
    (Rise, {"masks": 0}, "masks must be a number greater than 0, got 0"),
    (Rise, {"grid_size": 0}, "grid_size must be a number greater than 0, got 0"),
    (Rise, {"keep_probability": 1.0}, r"keep_probability must be between 0 and 1, both excluded, got 1\.0"),
    (Rise, {"keep_probability": float("nan")}, "keep_probability must be between 0 and 1, both excluded, got nan"),
    (Rise, {"fill": "grey"}, "fill must be one of"),
    (M2ib, {"beta": 0.0}, r"beta must be a number greater than 0, got 0\.0"),
    (M2ib, {"lr": float("inf")}, "lr must be finite, got inf"),
    (M2ib, {"copies": 0}, "copies must be a number greater than 0, got 0"),
    (M2ib, {"steps": -2}, "steps must be a number greater than 0, got -2"),
    (Nib, {"steps": 0}, "steps must be a number greater than 0, got 0"),
    (Nib, {"chunk_size": 0}, "chunk_size must be a number greater than 0, got 0"),
    (GradEclip, {"image_blocks": 0}, "image_blocks must be a number greater than 0, got 0"),
    (GradEclip, {"text_blocks": -1}, "text_blocks must be a number greater than 0, got -1"),
    (DenseSimilarity, {"variant": "csa"}, "variant must be one of maskclip, sclip, clearclip, patch, got 'csa'"),
    (WordRegions, {"steps": 0}, "steps must be a number greater than 0, got 0"),
    (WordRegions, {"chunk_size": 0}, "chunk_size must be a number greater than 0, got 0"),
    (WordRegions, {"fill": "black"}, "fill must be one of mean_image, mean_color, blur, got 'black'"),
    (LeGrad, {"num_blocks": 0}, "num_blocks must be a number greater than 0, got 0"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), BAD, ids=lambda part: getattr(part, "__name__", str(part)))
def test_bad_arguments(kind: Callable[..., AttributionMethod], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    "method",
    [GradCam([-1, 4]), Chefer(4), M2ib(block=4), Nib(block=4), WordRegions(4)],
    ids=lambda method: type(method).__name__,
)
def test_a_block_that_is_not_there(method: AttributionMethod) -> None:
    clip = family("native")
    with pytest.raises(ValueError, match="Block 4 does not exist: the tower has 4 blocks, counted from 0"):
        method.attribute(clip, *pairs(clip))


@pytest.mark.parametrize("kind", [KernelShap, Rise, partial(IntegratedGradients, fill="mean_image")], ids=maker)
def test_a_model_without_a_mean_image(kind: Callable[..., AttributionMethod]) -> None:
    source = family("native")
    clip = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
    clip.mean_image.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"mean of the training images.*fill='blur' or 'mean_color'"):
        kind().attribute(clip, *pairs(clip))
