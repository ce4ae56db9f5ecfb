"""Components of maps, their boxes and their average precision against slow, literal loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from matex_pl.metrics.functional import (
    average_precision,
    best_box_iou,
    box_accuracy,
    components,
    match_components,
)

SIZE = (11, 8)
Box = tuple[float, float, float, float]


def _maps(count: int = 10) -> Tensor:
    """Specks and ties, some that touch at a corner or the edge of the frame; one map is empty and one is full."""
    maps = torch.randint(0, 8, (count, *SIZE), generator=torch.Generator().manual_seed(3)) / 7
    maps[4], maps[5] = 0, 1
    # As after the norm: the greatest value of most maps is the same.
    return maps


def _boxes(maps: Tensor, threshold: float = 0.6) -> list[Tensor]:
    """Boxes near what is in the maps, so that some are found, some twice; none in two of the pairs."""
    draw = torch.Generator().manual_seed(0)
    boxes = []
    for pair, heat in enumerate(maps.numpy()):
        found = torch.tensor([box for box, _ in _slow_components(heat, threshold)]).view(-1, 4)
        shifted = found + 0.03 * torch.randn(found.shape, generator=draw)
        boxes.append(torch.cat([shifted[: pair % 4], found[:1] * 0.9]) if pair % 5 else torch.zeros(0, 4))
    return boxes


def _slow_components(heat: np.ndarray, threshold: float) -> list[tuple[Box, float]]:
    """Box and maximum of each component, found by walking from pixel to pixel."""
    left = {place for place in np.ndindex(heat.shape) if heat[place] > threshold}
    found = []
    for start in np.ndindex(heat.shape):
        if start not in left:
            continue
        part, border = set(), [start]
        left.discard(start)
        while border:
            row, column = border.pop()
            part.add((row, column))
            near = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border.extend(near)
        rows, columns = [row for row, _ in part], [column for _, column in part]
        height, width = heat.shape
        box = (min(columns) / width, min(rows) / height, (max(columns) + 1) / width, (max(rows) + 1) / height)
        found.append((box, float(max(heat[place] for place in part))))
    return found


def _slow_iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)


def _slow_matches(found: list[tuple[Box, float]], boxes: list[Box]) -> list[bool]:
    """PASCAL VOC: in the order of the scores; a box that was found before makes a false positive."""
    hits, taken = [False] * len(found), set()
    for index in sorted(range(len(found)), key=lambda index: (-found[index][1], index)):
        overlaps = [_slow_iou(found[index][0], box) for box in boxes]
        if overlaps and max(overlaps) > 0.5 and overlaps.index(max(overlaps)) not in taken:
            taken.add(overlaps.index(max(overlaps)))
            hits[index] = True
    return hits


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 1.0])
def test_components_against_a_walk(threshold: float) -> None:
    maps = _maps()
    found = components(maps, threshold)
    slow = [(pair, *part) for pair, heat in enumerate(maps.numpy()) for part in _slow_components(heat, threshold)]
    assert found.pair.tolist() == [pair for pair, _, _ in slow]
    np.testing.assert_allclose(found.boxes.numpy(), np.array([box for _, box, _ in slow]).reshape(-1, 4), atol=1e-6)
    np.testing.assert_allclose(found.peak.numpy(), [peak for *_, peak in slow], atol=1e-6)
    assert (len(slow) > 20) == (0 < threshold < 1)


def test_components_of_neighboring_maps_do_not_touch() -> None:
    # The last row of one map, the first of the next, and corners that touch.
    maps = torch.zeros(3, 3, 3)
    maps[0, 2], maps[1, 0] = 0.5, 0.7
    maps[2, 0, 0] = maps[2, 1, 1] = 0.4
    maps[2, 2, 2] = 0.9
    found = components(maps, 0.3)
    assert found.pair.tolist() == [0, 1, 2]
    third = 1 / 3
    torch.testing.assert_close(
        found.boxes, torch.tensor([[0, 2 * third, 1, 1], [0, 0, 1, third], [0, 0, 1, 1]], dtype=torch.float32)
    )
    torch.testing.assert_close(found.peak, torch.tensor([0.5, 0.7, 0.9]))


def test_a_small_speck_apart_is_a_component_of_its_own() -> None:
    # A ring, and a pixel within it that a box of the ring encloses.
    maps = torch.ones(1, 5, 5)
    maps[0, 1:4, 1:4] = 0
    maps[0, 2, 2] = 0.8
    found = components(maps, 0.5)
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.6, 0.6]]))
    torch.testing.assert_close(found.peak, torch.tensor([1.0, 0.8]))


def test_best_box_against_a_loop() -> None:
    maps = _maps()
    boxes = _boxes(maps)
    slow = []
    for heat, theirs in zip(maps.numpy(), boxes, strict=True):
        found = _slow_components(heat, 0.6)
        best = max(found, key=lambda part: part[1])[0] if found else None
        overlaps = [_slow_iou(best, tuple(box)) if best else 0.0 for box in theirs.tolist()]
        slow.append(max(overlaps) if overlaps else math.nan)
    found = components(maps, 0.6)
    np.testing.assert_allclose(best_box_iou(found, boxes, len(maps)).numpy(), slow, atol=1e-5)
    assert len(set(slow)) > 4
    accuracy = box_accuracy(found, boxes, len(maps))
    np.testing.assert_array_equal(accuracy.numpy(), [math.nan if math.isnan(v) else float(v > 0.5) for v in slow])
    assert {0.0, 1.0} <= set(accuracy.tolist())


def test_best_box_needs_a_component_and_a_box() -> None:
    nothing = components(torch.zeros(2, 4, 4), 0.5)
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, 4)]
    np.testing.assert_array_equal(best_box_iou(nothing, boxes, 2).numpy(), [0, math.nan])
    np.testing.assert_array_equal(box_accuracy(nothing, boxes, 2).numpy(), [0, math.nan])
    with pytest.raises(ValueError, match="3 maps, but boxes of 2 pairs"):
        best_box_iou(nothing, boxes, 3)
    # Half is enough, also where rounding takes a bit of it.
    half = components(torch.tensor([[[1.0, 0.0]]]), 0.5)
    assert best_box_iou(half, boxes[:1], 1) == 0.5
    less = [torch.tensor([[0.0, 0.0, 1.0, 1.0 + 1e-7]])]
    for whole in (boxes[:1], less):
        assert box_accuracy(half, whole, 1) == 1
        assert match_components(half, whole).all()
    more = [torch.tensor([[0.0, 0.0, 1.0, 1.001]])]
    assert box_accuracy(half, more, 1) == 0
    assert not match_components(half, more).any()


def test_matches_against_a_loop() -> None:
    maps = _maps()
    boxes = _boxes(maps)
    slow = []
    for heat, theirs in zip(maps.numpy(), boxes, strict=True):
        slow += _slow_matches(_slow_components(heat, 0.6), [tuple(box) for box in theirs.tolist()])
    found = match_components(components(maps, 0.6), boxes)
    assert found.tolist() == slow
    assert 5 < sum(slow) < len(slow)


def test_each_box_is_found_once_and_by_the_highest() -> None:
    # Two parts that overlap the same box: a ring, and a bar with a higher peak through a wider hole.
    maps = torch.zeros(1, 9, 9)
    maps[0, 0], maps[0, 8], maps[0, :, 0], maps[0, :, 8] = 0.7, 0.7, 0.7, 0.7
    maps[0, 2:7, 2:7] = 0.9
    box = [torch.tensor([[0.1, 0.1, 0.9, 0.9]])]
    assert [round(float(value), 2) for value in _overlap_with(maps, box[0][0])] == [0.64, 0.48]
    box = [torch.tensor([[0.13, 0.13, 0.87, 0.87]])]
    assert all(value > 0.5 for value in _overlap_with(maps, box[0][0]))
    found = components(maps, 0.5)
    assert match_components(found, box).tolist() == [False, True]
    # With a box for each, both are found.
    assert match_components(found, [torch.cat([box[0], torch.tensor([[0.0, 0.0, 1.0, 1.0]])])]).tolist() == [True, True]


def _overlap_with(maps: Tensor, box: Tensor) -> list[float]:
    return [_slow_iou(tuple(ours), tuple(box.tolist())) for ours in components(maps, 0.5).boxes.tolist()]


def test_there_may_be_nothing_at_all() -> None:
    for maps, boxes in ((torch.zeros(0, 4, 4), []), (torch.zeros(2, 4, 4), [torch.zeros(0, 4)] * 2)):
        found = components(maps, 0.5)
        assert not len(found.pair)
        assert found.boxes.shape == (0, 4)
        assert not len(match_components(found, boxes))
        assert best_box_iou(found, boxes, len(maps)).isnan().all()


# --- average precision


def _slow_precision(scores: list[float], hits: list[bool], num_boxes: int) -> float:
    """At each score, all detections that have at least that; the best precision at least so far right counts."""
    if not num_boxes:
        return math.nan
    points = []
    for least in sorted(set(scores), reverse=True):
        seen = [hit for score, hit in zip(scores, hits, strict=True) if score >= least]
        points.append((sum(seen) / num_boxes, sum(seen) / len(seen)))
    area, reached = 0.0, 0.0
    for index, (recall, _) in enumerate(points):
        area += (recall - reached) * max(precision for _, precision in points[index:])
        reached = recall
    return area


def _detections(count: int = 60, pairs: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 15, (count,), generator=draw) / 14
    hits = torch.rand(count, generator=draw) < scores
    pair = torch.randint(0, pairs, (count,), generator=draw)
    number = torch.stack([hits[pair == index].sum() for index in range(pairs)])
    return scores, hits, pair, number + torch.randint(0, 3, (pairs,), generator=draw)


def test_average_precision_against_a_loop() -> None:
    scores, hits, pair, number = _detections()
    wanted = _slow_precision(scores.tolist(), hits.tolist(), int(number.sum()))
    assert 0.2 < wanted < 0.9
    assert float(average_precision(scores, hits, pair, number)) == pytest.approx(wanted, abs=1e-6)


def test_average_precision_of_resamples_is_that_of_the_pairs_drawn() -> None:
    scores, hits, pair, number = _detections()
    pairs = len(number)
    drawn = torch.randint(0, pairs, (7, pairs), generator=torch.Generator().manual_seed(2))
    weights = torch.stack([row.bincount(minlength=pairs) for row in drawn])
    found = average_precision(scores, hits, pair, number, weights)
    for value, rows in zip(found.tolist(), drawn.tolist(), strict=True):
        again = [index for row in rows for index in (pair == row).nonzero()[:, 0].tolist()]
        count = sum(int(number[row]) for row in rows)
        wanted = _slow_precision(scores[again].tolist(), hits[again].tolist(), count)
        assert value == pytest.approx(wanted, abs=1e-6)
    assert len({round(value, 4) for value in found.tolist()}) > 4
    once = average_precision(scores, hits, pair, number, torch.ones(1, pairs))
    torch.testing.assert_close(once[0], average_precision(scores, hits, pair, number))


def test_average_precision_of_many_resamples_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, hits, pair, number = _detections()
    weights = torch.randint(0, 3, (9, len(number)), generator=torch.Generator().manual_seed(4))
    whole = average_precision(scores, hits, pair, number, weights)
    monkeypatch.setattr("matex_pl.metrics.functional.detections._TABLE", 2 * len(scores))
    assert torch.equal(average_precision(scores, hits, pair, number, weights), whole)


def test_average_precision_does_not_depend_on_the_order() -> None:
    scores, hits, pair, number = _detections()
    value = average_precision(scores, hits, pair, number)
    for seed in range(5):
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(average_precision(scores[order], hits[order], pair[order], number), value)


def test_average_precision_of_known_cases() -> None:
    number, pair = torch.tensor([1, 1]), torch.tensor([0, 1])
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    scores = torch.tensor([0.9, 0.8])
    assert average_precision(scores, yes, pair, number) == 1
    assert average_precision(scores, no, pair, number) == 0
    # Found at half of the boxes, and nothing after it.
    assert average_precision(scores, torch.tensor([True, False]), pair, number) == 0.5
    # A false one before it, or at the same score.
    assert average_precision(scores, torch.tensor([False, True]), pair, number) == 0.25
    assert average_precision(torch.ones(2), torch.tensor([True, False]), pair, number) == 0.25
    nothing = torch.zeros(0)
    assert average_precision(nothing, nothing.bool(), nothing.long(), number) == 0
    assert average_precision(scores, no, pair, torch.tensor([0, 0])).isnan()
    weights = torch.tensor([[1, 0], [0, 1]])
    found = average_precision(scores, torch.tensor([True, False]), pair, torch.tensor([1, 0]), weights)
    np.testing.assert_array_equal(found.numpy(), [1, math.nan])
