"""Attribution metrics against slow, literal loops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from matex_pl.metrics import ConfidenceDrop, ConfidenceIncrease, ContrastToNoise, MapMass, PointingGame
from matex_pl.metrics.functional import (
    box_masks,
    confidence_drop,
    confidence_increase,
    contrast_to_noise,
    keep_highlighted,
    keep_relevant_tokens,
    pointing_game,
)

SIZE = (9, 7)
PAD, BOS, EOT = 0, 98, 99


def _maps(count: int = 8) -> Tensor:
    """Maps with ties, one of them constant."""
    maps = torch.randint(0, 6, (count, *SIZE), generator=torch.Generator().manual_seed(0)) / 5
    maps[-1] = 0.4
    return maps


def _boxes(count: int = 8) -> list[Tensor]:
    """None to three boxes per study, some overlapping, one over the whole frame."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    boxes = [torch.cat([corner.amin(1), corner.amax(1)], 1)[: n % 4] for n, corner in enumerate(corners)]
    boxes[2] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    return boxes


def _slow_mask(boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = (column + 0.5) / size[1], (row + 0.5) / size[0]
            mask[row, column] = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes.tolist())
    return mask


def test_box_masks_against_a_loop() -> None:
    masks = box_masks(_boxes(), SIZE)
    assert masks.dtype == torch.bool
    for mask, boxes in zip(masks, _boxes(), strict=True):
        np.testing.assert_array_equal(mask.numpy(), _slow_mask(boxes, SIZE))


def test_box_masks_frame_and_empty_cases() -> None:
    # x to the right, y down: the upper right quarter.
    mask = box_masks([torch.tensor([[0.5, 0.0, 1.0, 0.5]])], (4, 4))[0]
    assert mask[:2, 2:].all()
    assert mask.sum() == 4
    assert not box_masks([torch.zeros(0, 4)], (4, 4)).any()
    assert box_masks([], (4, 5)).shape == (0, 4, 5)
    assert box_masks([torch.tensor([[-1.0, -1.0, 2.0, 2.0]])], (4, 4)).all()


def test_pointing_game_against_a_loop() -> None:
    maps, masks = _maps(), box_masks(_boxes(), SIZE)
    for value, heat, mask in zip(pointing_game(maps, masks), maps.numpy(), masks.numpy(), strict=True):
        if not mask.any():
            assert value.isnan()
            continue
        row, column = next((r, c) for r in range(SIZE[0]) for c in range(SIZE[1]) if heat[r, c] == heat.max())
        assert value == float(mask[row, column])


def test_contrast_to_noise_against_a_loop() -> None:
    maps, masks = _maps(), box_masks(_boxes(), SIZE)
    counted = 0
    for value, heat, mask in zip(contrast_to_noise(maps, masks), maps, masks, strict=True):
        inside, outside = heat[mask].tolist(), heat[~mask].tolist()
        if not inside or not outside:
            assert value.isnan()
            continue
        noise = math.sqrt(statistics.pvariance(inside) + statistics.pvariance(outside))
        signal = statistics.fmean(inside) - statistics.fmean(outside)
        assert float(value) == pytest.approx(signal / noise if noise else signal, abs=1e-5)
        counted += 1
    assert counted >= 4


def test_contrast_to_noise_is_signed_and_zero_for_constant_maps() -> None:
    masks = box_masks([torch.tensor([[0.0, 0.0, 0.5, 1.0]])], (2, 4))
    heat = torch.tensor([[[0.9, 0.8, 0.1, 0.0], [0.7, 0.9, 0.2, 0.1]]])
    torch.testing.assert_close(contrast_to_noise(heat, masks), -contrast_to_noise(1 - heat, masks))
    assert contrast_to_noise(torch.full((1, 2, 4), 0.3), masks) == 0


def test_confidence_drop_and_increase_against_a_loop() -> None:
    score, kept = torch.tensor([0.3, 0.2, -0.1, 0.5]), torch.tensor([0.25, 0.4, -0.3, 0.5])
    drops, rises = confidence_drop(score, kept), confidence_increase(score, kept)
    for drop, rise, before, after in zip(drops, rises, score.tolist(), kept.tolist(), strict=True):
        assert float(drop) == pytest.approx(100 * max(0.0, before - after), abs=1e-4)
        assert float(rise) == 100.0 * (after > before)


def test_confidence_of_nan_is_nan() -> None:
    broken, fine = torch.tensor([torch.nan, 0.2]), torch.tensor([0.1, torch.nan])
    assert confidence_drop(broken, fine).isnan().all()
    assert confidence_increase(broken, fine).isnan().all()


def test_keep_highlighted_keeps_what_is_highlighted() -> None:
    images, fill = torch.rand(2, 3, 4, 4), torch.full((3, 4, 4), -9.0)
    maps = torch.zeros(2, 4, 4)
    maps[:, :2] = 1
    maps[:, 2] = 0.25
    kept = keep_highlighted(images, maps, fill)
    torch.testing.assert_close(kept[:, :, :2], images[:, :, :2])
    torch.testing.assert_close(kept[:, :, 2], 0.25 * images[:, :, 2] - 9 * 0.75)
    assert (kept[:, :, 3] == -9).all()


def test_keep_relevant_tokens_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, content, heat = [], [], torch.randint(0, 5, (12, 10), generator=draw) / 4
    for length in range(12):
        inner = min(length, 8)
        rows.append([BOS, *range(1, inner + 1), EOT, *[PAD] * (8 - inner)])
        content.append([0 < place <= inner for place in range(10)])
    tokens, is_content = torch.tensor(rows), torch.tensor(content)
    kept = keep_relevant_tokens(tokens, heat, is_content, PAD)
    for row in range(12):
        values = [heat[row, place].item() for place in range(10) if content[row][place]]
        median = statistics.median(values) if values else None
        for place in range(10):
            dropped = content[row][place] and heat[row, place].item() <= median
            assert kept[row, place] == (PAD if dropped else tokens[row, place])


def test_keep_relevant_tokens_keeps_the_upper_half_and_the_ends() -> None:
    tokens = torch.tensor([[BOS, 5, 6, 7, 8, EOT, PAD]])
    content = torch.tensor([[False, True, True, True, True, False, False]])
    heat = torch.tensor([[0.0, 0.1, 0.9, 0.8, 0.2, 0.0, 0.0]])
    assert keep_relevant_tokens(tokens, heat, content, PAD).tolist() == [[BOS, PAD, 6, 7, PAD, EOT, PAD]]
    level = torch.full_like(heat, 0.5)
    assert keep_relevant_tokens(tokens, level, content, PAD).tolist() == [[BOS, PAD, PAD, PAD, PAD, EOT, PAD]]
    assert torch.equal(keep_relevant_tokens(tokens, heat, torch.zeros_like(content), PAD), tokens)


def _scores(rows: slice) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(8, generator=draw)[rows], torch.rand(8, generator=draw)[rows]


CASES: list[tuple[type[Metric], Callable[[slice], tuple], Callable[..., Tensor]]] = [
    (ConfidenceDrop, _scores, confidence_drop),
    (ConfidenceIncrease, _scores, confidence_increase),
    (PointingGame, lambda rows: (_maps()[rows], _boxes()[rows]), lambda m, b: pointing_game(m, box_masks(b, SIZE))),
    (
        ContrastToNoise,
        lambda rows: (_maps()[rows], _boxes()[rows]),
        lambda m, b: contrast_to_noise(m, box_masks(b, SIZE)),
    ),
    (MapMass, lambda rows: (_maps()[rows],), lambda maps: maps.flatten(1).mean(1)),
]


@pytest.mark.parametrize(("metric", "inputs", "function"), CASES)
def test_classes_are_means_over_updates_and_processes(
    metric: type[Metric], inputs: Callable[[slice], tuple], function: Callable[..., Tensor]
) -> None:
    whole = function(*inputs(slice(None))).nanmean()
    twice, first, second = metric(), metric(), metric()
    for rows, half in ((slice(0, 5), first), (slice(5, 8), second)):
        twice.update(*inputs(rows))
        half.update(*inputs(rows))
    first.merge_state(second)
    torch.testing.assert_close(twice.compute(), whole)
    torch.testing.assert_close(first.compute(), whole)
    assert first.compute().dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [case[0] for case in CASES])
def test_nothing_seen_is_nan(metric: type[Metric]) -> None:
    assert metric().compute().isnan()


def test_nothing_that_counts_is_nan() -> None:
    for metric in (PointingGame(), ContrastToNoise()):
        metric.update(torch.rand(2, 4, 4), [torch.zeros(0, 4)] * 2)
        assert metric.compute().isnan()
        metric.update(torch.rand(0, 4, 4), [])
        assert metric.compute().isnan()


def test_studies_without_boxes_do_not_count() -> None:
    peak = torch.zeros(2, 4, 4)
    peak[:, 0, 0] = 1
    metric = PointingGame()
    metric.update(peak, [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 0.5, 0.5]])])
    assert metric.compute() == 1


def test_maps_and_boxes_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 maps, but boxes of 1 studies"):
        PointingGame().update(torch.rand(2, 4, 4), [torch.zeros(0, 4)])


def test_directions() -> None:
    assert [metric.higher_is_better for metric in (ConfidenceDrop, ConfidenceIncrease, PointingGame)] == [
        False,
        True,
        True,
    ]
