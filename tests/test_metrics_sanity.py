"""Parameters randomized in stages: which, in what order, and that nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, family
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from matex_pl.attribution import Matex
from matex_pl.attribution.core.capture import borrowed, count_blocks
from matex_pl.attribution.core.target import reference_mean
from matex_pl.clip import Clip, towers
from matex_pl.metrics.functional import spearman
from matex_pl.metrics.sanity import randomized, stages

PHRASES = ["left lower lobe nodule", "small right effusion"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def _weights(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}


def _inputs(clip: Clip) -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    return clip.normalize(images), clip.tokenize(PHRASES)


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@every_family
def test_every_parameter_changes_and_stages_only_add(name: str) -> None:
    clip = family(name)
    before, state = _weights(clip), torch.random.get_rng_state()
    parameters = dict(clip.named_parameters())
    seen: set[str] = set()
    last: dict[str, Tensor] = before
    for stage, copied in randomized(clip):
        weights = _weights(copied)
        changed = _changed(last, weights)
        # What an earlier stage has changed stays as that left it.
        assert changed
        assert not changed & seen
        assert changed <= set(stages(clip)[stage])
        seen |= changed
        last = weights
    differing = {key for key, weight in parameters.items() if len(weight.unique()) > 1}
    assert seen == differing
    assert len(differing) > 0.9 * len(parameters)
    for key in differing:
        assert torch.equal(last[key].flatten().sort().values, before[key].flatten().sort().values)
    assert not _changed(before, _weights(clip))
    assert torch.equal(torch.random.get_rng_state(), state)


@every_family
def test_stages_name_every_parameter_once(name: str) -> None:
    clip = family(name)
    found = [key for names in stages(clip).values() for key in names]
    kept = {"model.logit_scale", "model.logit_bias"}
    assert sorted(found) == sorted(key for key, _ in clip.named_parameters() if key not in kept)


def _blocks(clip: Clip) -> list[list[nn.Module]]:
    visual: Any = clip.model.visual
    resnet = isinstance(visual, ModifiedResNet)
    image = [visual.layer1, visual.layer2, visual.layer3, visual.layer4] if resnet else towers.image_blocks(visual)
    return [image, towers.text_blocks(clip.model)]


@torch.no_grad()
def _stream(clip: Clip, tower: int) -> list[Tensor]:
    """What enters the first block of a tower, and what leaves each."""
    seen: list[Tensor] = []
    blocks = _blocks(clip)[tower]
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda _, __, output: seen.append(_tensor(output))))
    images, tokens = _inputs(clip)
    if tower:
        clip.encode_text(tokens)
    else:
        clip.encode_image(images)
    for hook in hooks:
        hook.remove()
    return seen


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@every_family
@pytest.mark.parametrize("tower", [0, 1])
def test_stages_go_from_the_output_to_the_input(name: str, tower: int) -> None:
    clip = family(name)
    whole = _stream(clip, tower)
    depth = len(whole) - 1
    with torch.no_grad():
        score = clip.similarity(*_inputs(clip))
    for index, (stage, copied) in enumerate(randomized(clip)):
        stream = _stream(copied, tower)
        # The stage `block -k` is the k-th after the head; what enters that block is still as it was.
        reached = depth + 1 if stage == "embeddings" else min(index, depth)
        same = [torch.equal(one, other) for one, other in zip(whole, stream, strict=True)]
        assert same == [place <= depth - reached for place in range(depth + 1)]
        if stage == "head":
            with torch.no_grad():
                assert (copied.similarity(*_inputs(clip)) - score).abs().max() > 1e-3


def test_names_of_the_stages() -> None:
    assert list(stages(family("square"))) == ["head", "block -1", "block -2", "block -3", "block -4", "embeddings"]
    of_resnet = stages(family("resnet"))
    assert next(name for name in of_resnet["block -4"] if "visual" in name).startswith("model.visual.layer1")
    assert any("attnpool.positional_embedding" in name for name in of_resnet["head"])


def test_the_seed_decides() -> None:
    clip = family("square")

    def last(seed: int) -> dict[str, Tensor]:
        return _weights(list(randomized(clip, seed))[-1][1])

    first = last(0)
    assert not _changed(first, last(0))
    other = _changed(first, last(1))
    assert len(other) > 0.9 * len([weight for weight in clip.parameters() if len(weight.unique()) > 1])


def test_a_parameter_of_two_numbers_changes_too() -> None:
    clip = copy.deepcopy(family("square"))
    clip.model.visual.ln_post.bias.data.fill_(0)
    clip.model.visual.ln_post.bias.data[3] = 1
    for seed in range(40):
        _, copied = next(randomized(clip, seed))
        bias = copied.model.visual.ln_post.bias
        assert bias[3] == 0
        assert bias.sum() == 1
    # All equal: nothing to shuffle.
    clip.model.visual.ln_post.bias.data.fill_(1)
    assert (next(randomized(clip))[1].model.visual.ln_post.bias == 1).all()


def test_the_same_weights_are_shuffled_alike_when_compiled() -> None:
    clip = family("square")
    compiled = copy.deepcopy(clip)
    compiled.model.visual = torch.compile(compiled.model.visual)
    before = _weights(compiled)
    for (stage, one), (other_stage, other) in zip(randomized(clip), randomized(compiled), strict=True):
        assert stage == other_stage
        plain = {key.replace("_orig_mod.", ""): tensor for key, tensor in _weights(other).items()}
        assert not _changed(_weights(one), plain)
    assert not _changed(before, _weights(compiled))


@pytest.mark.parametrize("trainable", [True, False])
def test_copies_are_like_the_model(trainable: bool) -> None:
    clip = copy.deepcopy(family("biomedclip")).requires_grad_(trainable)
    with torch.inference_mode():
        copies = [copied for _, copied in randomized(clip)]
    for copied in copies:
        assert not any(weight.is_inference() for weight in copied.parameters())
        assert {weight.requires_grad for weight in copied.parameters()} == {trainable}
        assert all(weight.is_leaf for weight in copied.parameters())
        assert not any(module.training for module in copied.modules())
        assert copied.tokenizer is clip.tokenizer
        assert torch.equal(copied.mean_image, clip.mean_image)
    ours = {weight.data_ptr() for weight in clip.parameters()}
    assert not ours & {weight.data_ptr() for copied in copies for weight in copied.parameters()}


@pytest.mark.parametrize("name", ["native", "biomedclip", "siglip"])
def test_what_is_kept_by_weights_does_not_leak_between_copies(name: str) -> None:
    clip = family(name)
    method = Matex(target="margin", references=["small nodule", "right upper lobe mass"])

    def fresh(model: Clip) -> Clip:
        """The same weights in a model that nothing has seen."""
        return copy.deepcopy(model)

    images, tokens = _inputs(clip)
    original = method.attribute(clip, images, tokens, PHRASES)
    for _, copied in randomized(clip):
        for model in (copied, clip):
            with borrowed(model), torch.no_grad():
                known = reference_mean(model, PHRASES)
                wanted = fresh(model)
                assert torch.equal(known, reference_mean(wanted, PHRASES))
                assert torch.equal(known, wanted.encode_text(wanted.tokenize(PHRASES)).mean(0))
                assert count_blocks(model, images, tokens) == count_blocks(clip, images, tokens)
        maps = method.attribute(copied, images, tokens, PHRASES)
        again = method.attribute(fresh(copied), images, tokens, PHRASES)
        assert torch.equal(maps.image, again.image)
        assert torch.equal(maps.text, again.text)
    # The last copy has other maps, and the model the same.
    assert (spearman(maps.parts["flow"].flatten(1), original.parts["flow"].flatten(1)) < 0.9).all()
    assert torch.equal(method.attribute(clip, images, tokens, PHRASES).image, original.image)
