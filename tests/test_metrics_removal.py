"""Scores of images and phrases with parts taken away, one image at a time and against grad-cam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from families import family
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from torch import Tensor, nn

from matex_pl.attribution.core.fill import FILLS, fill_images
from matex_pl.clip import Clip
from matex_pl.metrics import ConfidenceDrop, ConfidenceIncrease
from matex_pl.metrics.removal import (
    dropped_tokens,
    end_scores,
    image_score,
    kept_pixels,
    patch_counts,
    patch_curve,
    text_score,
    text_scores,
)

PHRASES = ["left lower lobe nodule", "small right effusion", "mass of the upper lung"]
# A frame that is not square, an image tower whose cells no patch embedding makes, and one that averages.
MODELS = ["native", "resnet", "average"]
every_model = pytest.mark.parametrize("name", MODELS)


def _pairs(clip: Clip, count: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = clip.normalize(torch.rand(count, 3, *clip.image_size, generator=draw))
    return images, clip.tokenize([PHRASES[index % 3] for index in range(count)])


@torch.no_grad()
def _text(clip: Clip, tokens: Tensor) -> Tensor:
    return clip.encode_text(tokens)


def _grid(clip: Clip, count: int = 3) -> Tensor:
    """Maps with ties."""
    return torch.randint(0, 5, (count, *clip.grid), generator=torch.Generator().manual_seed(1)) / 4


@torch.no_grad()
def _slow_score(clip: Clip, image: Tensor, keep: Tensor, filled: Tensor, text: Tensor) -> float:
    """One image, one channel at a time."""
    kept = torch.stack([keep * plane + (1 - keep) * blank for plane, blank in zip(image, filled, strict=True)])
    return float(clip.encode_image(kept[None])[0] @ text)


def _highest(values: Sequence[float], places: Iterable[int], count: int) -> list[int]:
    """The places of the `count` highest values, of equal ones the first."""
    return sorted(places, key=lambda place: (-values[place], place))[:count]


def test_kept_pixels_against_a_loop() -> None:
    # So few values that ties are cut.
    maps = torch.randint(0, 4, (6, 5, 7), generator=torch.Generator().manual_seed(3)) / 4
    found = {rule: kept_pixels(maps, rule).flatten(1).tolist() for rule in ("map", "half", "rest")}
    for row, values in enumerate(maps.flatten(1).tolist()):
        places = range(35)
        half, fifth = _highest(values, places, 17), _highest(values, places, 7)
        assert found["map"][row] == values
        assert found["half"][row] == [place in half for place in places]
        assert found["rest"][row] == [place not in fifth for place in places]


def test_dropped_tokens_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(4)
    text_map, content = torch.randint(0, 4, (80, 14), generator=draw) / 4, torch.zeros(80, 14, dtype=torch.bool)
    for row in range(80):
        content[row, 1 : 1 + row % 12] = True
    found = {rule: dropped_tokens(text_map, content, rule).tolist() for rule in ("map", "half", "rest")}
    for row, values in enumerate(text_map.tolist()):
        # After BOS; EOT and pads follow.
        places = range(1, 1 + row % 12)
        middle = median([values[place] for place in places]) if places else 0
        half = _highest(values, places, len(places) // 2)
        fifth = _highest(values, places, max(1, len(places) // 5))
        assert found["map"][row] == [place in places and values[place] <= middle for place in range(14)]
        assert found["half"][row] == [place in places and place not in half for place in range(14)]
        assert found["rest"][row] == [place in fifth for place in range(14)]


@every_model
@pytest.mark.parametrize("fill", FILLS)
def test_image_score_against_a_loop(name: str, fill: str) -> None:
    clip = family(name)
    images, tokens = _pairs(clip)
    text = _text(clip, tokens)
    filled = fill_images(fill, clip, images).expand_as(images)
    draw = torch.Generator().manual_seed(2)
    soft = torch.rand(3, *clip.image_size, generator=draw)
    for keep in (soft, soft > 0.5):
        slow = [_slow_score(clip, *parts) for parts in zip(images, keep.float(), filled, text, strict=True)]
        found = image_score(clip, images, keep, fill, text)
        np.testing.assert_allclose(found.numpy(), slow, atol=1e-5)
        assert not found.requires_grad
    everything = image_score(clip, images, torch.ones_like(soft), fill, text)
    torch.testing.assert_close(everything, clip.similarity(images, tokens), atol=1e-5, rtol=0)
    assert (everything - torch.tensor(slow)).abs().max() > 1e-3


@every_model
def test_text_score_against_a_loop(name: str) -> None:
    clip = family(name)
    images, tokens = _pairs(clip)
    with torch.no_grad():
        image = clip.encode_image(images)
    drop = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    drop &= clip.content(tokens)
    found = text_score(clip, tokens, drop, image)
    for row in range(3):
        ids = [clip.pad_id if drop[row, place] else int(tokens[row, place]) for place in range(tokens.shape[1])]
        with torch.no_grad():
            wanted = float(clip.encode_text(torch.tensor([ids]))[0] @ image[row])
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)
    several = text_scores(clip, tokens, torch.stack([drop, torch.zeros_like(drop), drop]), image)
    torch.testing.assert_close(several[[0, 2]], found.expand(2, -1), atol=1e-6, rtol=0)
    whole = text_score(clip, tokens, torch.zeros_like(drop), image)
    torch.testing.assert_close(several[1], whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole, (image * _text(clip, tokens)).sum(-1), atol=1e-5, rtol=0)
    assert ((whole - found).abs() > 1e-4).any()


def _slow_curve(clip: Clip, image: Tensor, grid: Tensor, filled: Tensor, text: Tensor, kind: str) -> list[float]:
    """A forward per patch, each patch painted pixel by pixel."""
    rows, columns = grid.shape
    height, width = image.shape[1:]
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    order = sorted(cells, key=lambda cell: -float(grid[cell]))
    scores = []
    for count in range(len(cells) + 1):
        keep = torch.full((height, width), float(kind == "deletion"))
        for row, column in order[:count]:
            for y, x in np.ndindex(height, width):
                if y * rows // height == row and x * columns // width == column:
                    keep[y, x] = float(kind == "insertion")
        scores.append(_slow_score(clip, image, keep, filled, text))
    return scores


@pytest.mark.parametrize(("name", "fill"), [("native", "blur"), ("resnet", "mean_image"), ("square", "mean_color")])
@pytest.mark.parametrize("kind", ["insertion", "deletion"])
def test_patch_curve_against_a_loop(name: str, fill: str, kind: str) -> None:
    clip = family(name)
    images, tokens = _pairs(clip, 2)
    text, grid = _text(clip, tokens), _grid(clip, 2)
    filled = fill_images(fill, clip, images).expand_as(images)
    patches = grid[0].numel()
    slow = torch.tensor([_slow_curve(clip, *parts, kind) for parts in zip(images, grid, filled, text, strict=True)]).T
    shares, scores = patch_curve(clip, images, grid, fill, text, kind, steps=100)
    torch.testing.assert_close(shares, torch.arange(patches + 1) / patches)
    torch.testing.assert_close(scores, slow, atol=1e-5, rtol=0)
    assert (slow.amax(0) - slow.amin(0)).min() > 1e-3
    # Fewer steps pass over some numbers of patches, and chunks change nothing.
    counts = patch_counts(patches, 5)
    for chunk_size in (1, 4, 100):
        shares, scores = patch_curve(clip, images, grid, fill, text, kind, steps=5, chunk_size=chunk_size)
        torch.testing.assert_close(scores, slow[counts], atol=1e-5, rtol=0)
        torch.testing.assert_close(shares, counts / patches)


def test_counts_are_evenly_spread() -> None:
    assert patch_counts(16, 32).tolist() == list(range(17))
    assert patch_counts(49, 32).tolist()[::8] == [0, 12, 24, 36, 49]
    assert patch_counts(9, 1).tolist() == [0, 9]
    for patches in (7, 49, 196, 577):
        steps = patch_counts(patches, 32).diff()
        assert steps.max() - steps.min() <= 1


def test_insertion_is_deletion_of_the_reverse_read_backwards() -> None:
    clip = family("native")
    images, tokens = _pairs(clip)
    text = _text(clip, tokens)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    grid = order.view(3, *clip.grid).float()
    _, inserted = patch_curve(clip, images, grid, "blur", text, "insertion", steps=24)
    _, deleted = patch_curve(clip, images, -grid, "blur", text, "deletion", steps=24)
    torch.testing.assert_close(inserted, deleted.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fill", FILLS)
def test_ends_are_shared_between_kinds(fill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = family("native")
    images, tokens = _pairs(clip)
    text, grid = _text(clip, tokens), _grid(clip)
    ends = end_scores(clip, images, fill, text)
    _, inserted = patch_curve(clip, images, grid, fill, text, "insertion")
    _, deleted = patch_curve(clip, images, grid, fill, text, "deletion")
    for blank, full in ((inserted[0], inserted[-1]), (deleted[-1], deleted[0])):
        torch.testing.assert_close((blank, full), ends)
    torch.testing.assert_close(ends[1], clip.similarity(images, tokens), atol=1e-5, rtol=0)
    encoded: list[int] = []
    encode = Clip.encode_image
    monkeypatch.setattr(Clip, "encode_image", lambda self, batch: encoded.append(len(batch)) or encode(self, batch))
    _, again = patch_curve(clip, images, grid, fill, text, "deletion", ends=ends)
    torch.testing.assert_close(again, deleted)
    # 23 steps between the ends of three images, at most 32 images at a time.
    assert sum(encoded) == 23 * 3
    assert max(encoded) == 30


def test_one_step_has_only_its_ends() -> None:
    clip = family("native")
    images, tokens = _pairs(clip)
    text = _text(clip, tokens)
    shares, scores = patch_curve(clip, images, _grid(clip), "blur", text, "insertion", steps=1)
    assert shares.tolist() == [0, 1]
    torch.testing.assert_close(tuple(scores), end_scores(clip, images, "blur", text))


def test_what_cannot_be_scored_is_refused() -> None:
    clip = family("native")
    images, tokens = _pairs(clip)
    text, grid = _text(clip, tokens), _grid(clip)
    with pytest.raises(ValueError, match="kind must be one of insertion, deletion, got 'both'"):
        patch_curve(clip, images, grid, "blur", text, "both")
    with pytest.raises(ValueError, match="steps must be"):
        patch_curve(clip, images, grid, "blur", text, "insertion", steps=0)
    for score in (
        lambda: image_score(clip, images, grid, "grey", text),
        lambda: patch_curve(clip, images, grid, "grey", text, "insertion"),
    ):
        with pytest.raises(ValueError, match="fill must be one of"):
            score()


def test_the_model_is_scored_in_eval_mode_and_given_back() -> None:
    clip = family("average")
    images, tokens = _pairs(clip)
    text, grid = _text(clip, tokens), _grid(clip)
    keep = torch.rand(3, *clip.image_size) < 0.5
    drop = torch.zeros_like(tokens, dtype=torch.bool)
    calls: list[Any] = [
        lambda: image_score(clip, images, keep, "blur", text),
        lambda: text_score(clip, tokens, drop, text),
        lambda: patch_curve(clip, images, grid, "blur", text, "deletion", steps=4)[1],
    ]
    before = [call() for call in calls]
    clip.train()
    try:
        with torch.inference_mode():
            state = torch.random.get_rng_state()
            after = [call() for call in calls]
            assert torch.equal(torch.random.get_rng_state(), state)
        assert all(module.training for module in clip.modules())
    finally:
        clip.eval()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


class _Cosines(nn.Module):
    """Cosines of images with some phrases, as a classifier."""

    def __init__(self, clip: Clip, text: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.text = text

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images) @ self.text.T


@every_model
def test_confidence_against_grad_cam(name: str) -> None:
    clip = family(name)
    images, tokens = _pairs(clip, 8)
    text = _text(clip, tokens)
    maps = torch.rand(8, *clip.image_size, generator=torch.Generator().manual_seed(5))
    targets = [lambda output, index=index: output[index] for index in range(8)]
    model = _Cosines(clip, text).eval()
    drops = DropInConfidence()(images, maps.numpy(), targets, model)
    rises = IncreaseInConfidence()(images, maps.numpy(), targets, model)
    with torch.no_grad():
        score = clip.similarity(images, tokens)
    kept = image_score(clip, images, maps, "mean_color", text)
    drop, increase = ConfidenceDrop(), ConfidenceIncrease()
    drop.update(score, kept)
    increase.update(score, kept)
    assert 0 < rises.sum() < 8
    assert float(drop.compute()) == pytest.approx(100 * drops.mean(), abs=1e-3)
    assert float(increase.compute()) == pytest.approx(100 * rises.mean())
