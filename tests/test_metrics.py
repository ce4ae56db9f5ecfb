"""The pure functions of attribution metrics against slow, literal loops."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from matex_pl.anatomy import side_words
from matex_pl.clip.words import split_words
from matex_pl.metrics.functional import (
    THRESHOLDS,
    border_mask,
    box_contrast,
    box_masks,
    confidence_drop,
    confidence_increase,
    contrast_to_noise,
    curve_area,
    energy_pointing_game,
    half_share,
    iou,
    keep_highlighted,
    keep_relevant_tokens,
    mean_iou,
    outside_mass,
    pointing_game,
    relevance_rank_accuracy,
    side_sensitivity,
    spearman,
    top_ranked,
    top_share,
    word_laterality,
)

SIZE = (9, 7)
PAD, BOS, EOT = 0, 98, 99


def _maps(count: int = 8) -> Tensor:
    """Maps with ties, one of them constant."""
    maps = torch.randint(0, 6, (count, *SIZE), generator=torch.Generator().manual_seed(0)) / 5
    maps[-1] = 0.4
    return maps


def _boxes(count: int = 8) -> list[Tensor]:
    """None to three boxes per pair, some overlapping, one over the whole frame."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    boxes = [torch.cat([corner.amin(1), corner.amax(1)], 1)[: n % 4] for n, corner in enumerate(corners)]
    boxes[2] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    return boxes


def _slow_mask(boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Pixels with their center in a box; a box without a center has the column, or the row, of its middle."""
    mask = np.zeros(size, dtype=bool)
    for x0, y0, x1, y1 in boxes.tolist():
        rows = [row for row in range(size[0]) if y0 <= (row + 0.5) / size[0] < y1]
        columns = [column for column in range(size[1]) if x0 <= (column + 0.5) / size[1] < x1]
        for row in rows or [int((y0 + y1) / 2 * size[0])]:
            for column in columns or [int((x0 + x1) / 2 * size[1])]:
                mask[row, column] = True
    return mask


def _is_flat(heat: Tensor) -> bool:
    return len(set(heat.flatten().tolist())) == 1


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


def test_every_box_keeps_a_pixel() -> None:
    generator = torch.Generator().manual_seed(5)
    middle, size = torch.rand(500, 2, generator=generator), 10 ** (-4 * torch.rand(500, 2, generator=generator))
    # Boxes of whole pixels lie on the borders of cells more often than chance would have it.
    middle[:200] = (middle[:200] * 32).round() / 32
    boxes = list(torch.cat([(middle - size / 2), (middle + size / 2)], 1).clamp(0, 1)[:, None])
    kept = box_masks(boxes, (16, 8))
    assert kept.flatten(1).any(1).all()
    # Not where rounding decides.
    for mask, box in zip(kept[200:], boxes[200:], strict=True):
        np.testing.assert_array_equal(mask.numpy(), _slow_mask(box, (16, 8)))
    # Of two boxes each keeps its own cell; a box too narrow for a column keeps all of its rows.
    tiny, flat = [0.43, 0.61, 0.431, 0.611], [0.43, 0.25, 0.431, 0.5]
    assert box_masks([torch.tensor([tiny])], (16, 8)).nonzero().tolist() == [[0, 9, 3]]
    both = box_masks([torch.tensor([tiny, flat]), torch.zeros(0, 4)], (16, 8))
    assert both.nonzero().tolist() == [[0, row, 3] for row in (4, 5, 6, 7, 9)]


def test_pointing_game_against_a_loop() -> None:
    maps, masks = _maps(), box_masks(_boxes(), SIZE)
    for value, heat, mask in zip(pointing_game(maps, masks), maps.numpy(), masks.numpy(), strict=True):
        if not mask.any() or _is_flat(torch.from_numpy(heat)):
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
        noise = max(noise, 0.01 * float(heat.max() - heat.min()))
        signal = statistics.fmean(inside) - statistics.fmean(outside)
        assert float(value) == pytest.approx(signal / noise if noise else 0, abs=1e-5)
        counted += 1
    assert counted >= 4


def test_contrast_to_noise_is_signed_and_zero_for_constant_maps() -> None:
    masks = box_masks([torch.tensor([[0.0, 0.0, 0.5, 1.0]])], (2, 4))
    heat = torch.tensor([[[0.9, 0.8, 0.1, 0.0], [0.7, 0.9, 0.2, 0.1]]])
    torch.testing.assert_close(contrast_to_noise(heat, masks), -contrast_to_noise(1 - heat, masks))
    assert contrast_to_noise(torch.full((1, 2, 4), 0.3), masks) == 0


def test_contrast_to_noise_has_a_floor() -> None:
    """Rounding in a constant map, and a single pixel of a binary one, once decided between 0 and millions."""
    masks = box_masks([torch.tensor([[0.2, 0.2, 0.6, 0.7]])], (224, 224))
    for constant in torch.rand(50, generator=torch.Generator().manual_seed(0)):
        assert contrast_to_noise(constant.expand(1, 224, 224), masks) == 0
    binary = masks.float()
    assert contrast_to_noise(binary, masks) == pytest.approx(100)
    binary[0, 0, 0] = 0.01
    assert contrast_to_noise(binary, masks) == pytest.approx(100, abs=0.1)


def test_contrast_to_noise_of_the_image_alone() -> None:
    maps, masks = _maps(), box_masks(_boxes(), SIZE)
    counted = torch.zeros_like(masks)
    counted[:, 1:-1, 2:] = True
    cut = contrast_to_noise(maps, masks, counted)
    torch.testing.assert_close(cut, contrast_to_noise(maps[:, 1:-1, 2:], masks[:, 1:-1, 2:]), equal_nan=True)


def test_box_contrast_is_the_mean_over_boxes_of_the_absolute_ratio() -> None:
    maps, boxes = _maps(), _boxes()
    for value, heat, own in zip(box_contrast(maps, boxes), maps, boxes, strict=True):
        if not len(own):
            assert value.isnan()
            continue
        ratios = [abs(float(contrast_to_noise(heat[None], box_masks([box[None]], SIZE)))) for box in own]
        assert float(value) == pytest.approx(statistics.fmean(ratios), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_in_boxes_take_any_precision(dtype: torch.dtype) -> None:
    """As in float32 of the same values."""
    maps, masks = _maps().to(dtype), box_masks(_boxes(), SIZE)
    for metric in (pointing_game, contrast_to_noise, energy_pointing_game, relevance_rank_accuracy, mean_iou):
        torch.testing.assert_close(metric(maps, masks), metric(maps.float(), masks), equal_nan=True)
    torch.testing.assert_close(iou(maps, masks, [0.35]), iou(maps.float(), masks, [0.35]), equal_nan=True)


@pytest.mark.parametrize("flat", [0.0, 0.4, 1.0, math.nan])
def test_flat_maps_have_no_score_that_needs_an_order(flat: float) -> None:
    maps, masks = torch.full((1, *SIZE), flat), box_masks([torch.tensor([[0.2, 0.2, 0.8, 0.8]])], SIZE)
    for metric in (pointing_game, relevance_rank_accuracy, mean_iou):
        assert metric(maps, masks).isnan().all()
    assert energy_pointing_game(maps, masks).isnan().all() == (flat == 0 or math.isnan(flat))


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


# --- order


def _values(rows: int = 6, columns: int = 30) -> tuple[Tensor, Tensor]:
    """Numbers with many ties, and which of them take part; in the last row none do."""
    draw = torch.Generator().manual_seed(0)
    among = torch.rand(rows, columns, generator=draw) < 0.7
    among[-1] = False
    return torch.randint(-3, 4, (rows, columns), generator=draw).float(), among


def _slow_top(values: list[float], among: list[bool], count: int) -> list[bool]:
    """The highest first, of equal ones the one further to the front."""
    ranked = sorted((-value, place) for place, value in enumerate(values) if among[place])
    top = {place for _, place in ranked[:count]}
    return [place in top for place in range(len(values))]


def test_top_ranked_against_a_sort() -> None:
    values, among = _values()
    # More than there are, and an entry as low as what stands for no entry elsewhere.
    counts = torch.tensor([0, 1, 7, 12, 99, 3])
    values[3, :20] = -torch.inf
    found = top_ranked(values, counts, among)
    for row, wanted in enumerate(counts.tolist()):
        assert found[row].tolist() == _slow_top(values[row].tolist(), among[row].tolist(), wanted)
    assert found.sum(1).tolist() == [min(n, m) for n, m in zip(counts.tolist(), among.sum(1).tolist(), strict=True)]
    everything = torch.ones_like(among)
    assert torch.equal(top_ranked(values, counts), top_ranked(values, counts, everything))


def test_top_ranked_takes_ties_in_raster_order() -> None:
    assert top_ranked(torch.ones(1, 5), torch.tensor([2])).tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize(
    ("share", "number", "wanted"),
    [(0.29, 100, 29), (0.1, 10, 1), (0.7, 10, 7), (0.57, 100, 57), (1 / 3, 3, 1), (0.5, 7, 3), (0, 9, 0), (1, 9, 9)],
)
def test_top_share_counts_like_the_number_that_is_meant(share: float, number: int, wanted: int) -> None:
    assert top_share(torch.rand(2, number), share).sum(1).tolist() == [wanted, wanted]


def test_top_share_is_no_matter_of_rounding() -> None:
    for number in (49, 77, 100, 196, 300):
        found = [int(top_share(torch.zeros(1, number), percent / 100).sum()) for percent in range(101)]
        assert found == [number * percent // 100 for percent in range(101)]


def test_top_share_is_of_those_that_take_part() -> None:
    values, among = _values()
    for at_least in (0, 2):
        found = top_share(values, 0.1, among, at_least)
        for row in range(len(values)):
            number = int(among[row].sum())
            count = max(number // 10, min(at_least, number))
            assert found[row].tolist() == _slow_top(values[row].tolist(), among[row].tolist(), count)
    with pytest.raises(ValueError, match="share must be in"):
        top_share(values, 50)


def _slow_ranks(values: list[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def _slow_spearman(a: list[float], b: list[float]) -> float:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(_slow_ranks(a), _slow_ranks(b))


def test_spearman_against_a_loop() -> None:
    a, among = _values()
    b = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) + 0.5 * a
    a[2], b[3] = 1.5, -0.2
    for taking, found in ((among, spearman(a, b, among)), (torch.ones_like(among), spearman(a, b))):
        wanted = [_slow_spearman(a[row][taking[row]].tolist(), b[row][taking[row]].tolist()) for row in range(len(a))]
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
        assert found[2:4].isnan().all()
        assert not found[:2].isnan().any()


def test_spearman_of_known_orders() -> None:
    rising = torch.arange(9.0)[None]
    assert spearman(rising, rising.exp()) == 1
    assert spearman(rising, -rising) == -1
    # What takes no part may be any number.
    among = torch.tensor([[True] * 8 + [False]])
    spoilt = rising.clone()
    spoilt[0, 8] = torch.nan
    assert spearman(rising, spoilt, among) == 1
    assert spearman(rising, spoilt).isnan()
    large = torch.arange(300_000.0)[None]
    assert spearman(large, large.flip(1)) == -1


# --- boxes as masks


def _boxed() -> tuple[Tensor, Tensor]:
    maps = _maps()
    maps[4] = 0
    return maps, box_masks(_boxes(), SIZE)


def _compare(found: Tensor, slow: list[float]) -> None:
    """Equal, NaN in the same places, and neither all NaN nor all one number."""
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-6)
    assert len({value for value in slow if not math.isnan(value)}) > 2
    assert any(math.isnan(value) for value in slow)


def test_iou_against_a_loop() -> None:
    maps, masks = _boxed()
    # 0.4 and 0.6 are values of the maps: the threshold itself is not above it.
    thresholds = (0.0, 0.25, 0.4, 0.6)
    found = iou(maps, masks, thresholds)
    assert found.shape == (8, 4)
    for column, threshold in enumerate(thresholds):
        slow = []
        for heat, mask in zip(maps.numpy(), masks.numpy(), strict=True):
            above = heat > np.float32(threshold)
            scored = mask.any() and not _is_flat(torch.from_numpy(heat))
            slow.append((above & mask).sum() / (above | mask).sum() if scored else math.nan)
        _compare(found[:, column], slow)
    torch.testing.assert_close(found, iou(maps, masks, torch.tensor(thresholds)), equal_nan=True)
    mean = torch.stack([iou(maps, masks, [step / 10])[:, 0] for step in range(1, 6)]).mean(0)
    torch.testing.assert_close(mean_iou(maps, masks), mean, equal_nan=True)


def test_iou_of_a_map_that_is_its_boxes_is_one() -> None:
    # Without the map of a box over the whole frame, which is flat.
    masks = box_masks(_boxes(), SIZE)[[1, 3]]
    assert (iou(masks.float(), masks, THRESHOLDS) == 1).all()
    assert len(THRESHOLDS) == 19
    assert THRESHOLDS[0] == 0.05
    assert THRESHOLDS[-1] == 0.95


def test_energy_in_box_against_a_loop() -> None:
    maps, masks = _boxed()
    masks[4, :2] = True
    slow = []
    for heat, mask in zip(maps.double().numpy(), masks.numpy(), strict=True):
        inside = sum(heat[place] for place in np.ndindex(SIZE) if mask[place])
        slow.append(inside / heat.sum() if mask.any() and heat.sum() else math.nan)
    _compare(energy_pointing_game(maps, masks), slow)
    assert math.isnan(slow[4])


def test_rank_accuracy_against_a_sort() -> None:
    maps, masks = _maps(16), box_masks(_boxes(16), SIZE)
    slow = []
    for heat, mask in zip(maps.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        top = _slow_top(heat, [True] * len(heat), sum(mask))
        hits = sum(one and other for one, other in zip(top, mask, strict=True))
        slow.append(hits / sum(mask) if any(mask) and len(set(heat)) > 1 else math.nan)
    _compare(relevance_rank_accuracy(maps, masks), slow)


# --- mass


def test_outside_mass_against_a_loop() -> None:
    maps, masks = _boxed()
    maps[4] = 0
    slow = []
    for heat, mask in zip(maps.double().numpy(), masks.numpy(), strict=True):
        outside = sum(heat[place] for place in np.ndindex(SIZE) if not mask[place])
        # An image without a zone does not count.
        slow.append(outside / heat.sum() if heat.sum() and mask.any() else math.nan)
    _compare(outside_mass(maps, masks), slow)
    # One zone for all.
    torch.testing.assert_close(outside_mass(maps[:2], masks[1:2])[1], outside_mass(maps[1:2], masks[1:2])[0])


def test_border_mask_against_a_loop() -> None:
    images = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.0, 0.8, 1.0], [-0.5, 0.1, 1.5, 0.6]])
    height, width = size = (20, 30)
    masks = border_mask(size, images, 0.13)
    for mask, (x0, y0, x1, y1) in zip(masks, images.tolist(), strict=True):
        for row, column in np.ndindex(size):
            across = ((column + 0.5) / width - x0) / (x1 - x0)
            down = ((row + 0.5) / height - y0) / (y1 - y0)
            assert bool(mask[row, column]) == (not (0.13 < across < 0.87 and 0.13 < down < 0.87))
    assert torch.equal(border_mask(size, width=0.13), masks[:1])
    # A tenth on each side leaves 8 by 8 of 10 by 10.
    assert (~border_mask((10, 10))).sum() == 64
    with pytest.raises(ValueError, match="width must be in"):
        border_mask(size, images, 10)


IMAGES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.0, 0.63, 1.0], [-0.5, 0.2, 1.2, 0.77]])


def test_half_share_against_a_loop_over_small_squares() -> None:
    maps = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    found = half_share(maps, ["right", "left", "right"], IMAGES)
    fine = 100
    for heat, side, (x0, y0, x1, y1), value in zip(
        maps, ("right", "left", "right"), IMAGES.tolist(), found, strict=True
    ):
        # The share of each pixel by counting: the right of the patient is on the left of the image.
        middle = (x0 + x1) / 2
        low, high = (x0, middle) if side == "right" else (middle, x1)
        across = (np.arange(SIZE[1] * fine) + 0.5) / (SIZE[1] * fine)
        down = (np.arange(SIZE[0] * fine) + 0.5) / (SIZE[0] * fine)
        inside = np.outer((down > y0) & (down < y1), (across > low) & (across < high))
        share = inside.reshape(SIZE[0], fine, SIZE[1], fine).mean((1, 3))
        assert float(value) == pytest.approx(float((heat.double().numpy() * share).sum() / heat.sum()), abs=0.01)


def test_half_share_of_known_maps() -> None:
    left_of_image = torch.zeros(1, 4, 5)
    left_of_image[:, :, :2] = 1
    assert half_share(left_of_image, ["right"]) == 1
    assert half_share(left_of_image, ["left"]) == 0
    # The middle column belongs to both halves.
    assert half_share(torch.ones(1, 4, 5), ["right"]) == 0.5
    # An image in the right half of the frame: the mass is outside of it.
    assert half_share(left_of_image, ["right"], torch.tensor([[0.5, 0.0, 1.0, 1.0]])) == 0
    assert half_share(left_of_image, [""]).isnan()
    assert half_share(torch.zeros(1, 4, 5), ["right"]).isnan()


def test_half_share_refuses_what_is_no_side() -> None:
    with pytest.raises(ValueError, match="'both'"):
        half_share(torch.rand(1, 4, 4), ["both"])
    with pytest.raises(ValueError, match="sides must hold one side for each of 2 maps, got 1"):
        half_share(torch.rand(2, 4, 4), ["left"])


def test_side_sensitivity_is_what_moves_to_the_other_side() -> None:
    maps = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0))
    swapped = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(1))
    sides = ["right", "left", "", "left"]
    found = side_sensitivity(maps, swapped, sides)
    other = half_share(swapped, ["left", "right", "", "right"]) - half_share(maps, ["left", "right", "", "right"])
    torch.testing.assert_close(found, other, equal_nan=True)
    assert found[2].isnan()
    # A map that follows the phrase, one that does not heed it, and one that does the opposite.
    right, left = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    right[..., :2], left[..., 2:] = 1, 1
    assert side_sensitivity(right, left, ["right"]) == 1
    assert side_sensitivity(right, right, ["right"]) == 0
    assert side_sensitivity(right, left, ["left"]) == -1
    # A mirror of everything changes nothing.
    mirrored = side_sensitivity(maps.flip(2), swapped.flip(2), ["left", "right", "", "right"])
    torch.testing.assert_close(mirrored, found, equal_nan=True)


def test_each_word_of_side_has_its_own_side() -> None:
    """The positive part counts; a word of a device, a denied place and other words have no side."""
    phrase = "Right effusion, RLL nodule, left mass, no left pneumothorax, left chest port"
    words = split_words(phrase)
    names = [word.text for word in words]
    maps = torch.zeros(len(words), 1, 2)
    # The patient's right is on the left of the image.
    maps[names.index("Right")] = torch.tensor([[0.6, -5.0]])
    maps[names.index("RLL")] = torch.tensor([[0.1, 0.3]])
    maps[names.index("left")] = torch.tensor([[0.0, 2.0]])
    assert [(phrase[start:].split()[0], side) for start, side in side_words(phrase)] == [
        ("Right", "right"),
        ("RLL", "right"),
        ("left", "left"),
    ]
    found = word_laterality([maps], [words], [phrase])
    assert float(found) == pytest.approx((1 + 0.25 + 1) / 3)
    # The image is the right half of the frame.
    inside = word_laterality([maps[[0]]], [words[:1]], [phrase], torch.tensor([[0.5, 0.0, 1.0, 1.0]]))
    assert float(inside) == 0
    nothing = word_laterality([-maps.abs()] * 2, [words] * 2, [phrase, "Effusion"])
    assert nothing.isnan().all()


# --- curves


def test_curve_area_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    curve, blank, full = torch.rand(5, 3, generator=draw), torch.rand(3, generator=draw), torch.rand(3, generator=draw)
    shares = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    for x, (gain, span) in (
        ([0.0, 0.25, 0.5, 0.75, 1.0], curve_area(curve, blank, full)),
        (shares.tolist(), curve_area(curve, blank, full, shares)),
    ):
        for pair in range(3):
            y = [float(score - blank[pair]) for score in curve[:, pair]]
            slow = sum((x[step + 1] - x[step]) * (y[step] + y[step + 1]) / 2 for step in range(4))
            assert float(gain[pair]) == pytest.approx(slow, abs=1e-6)
            assert float(span[pair]) == pytest.approx(float(full[pair] - blank[pair]))


def test_curve_area_of_straight_lines() -> None:
    blank, full = torch.tensor([0.1, 0.4]), torch.tensor([0.5, 0.2])
    line = blank + torch.linspace(0, 1, 9)[:, None] * (full - blank)
    gain, span = curve_area(line, blank, full)
    torch.testing.assert_close(gain / span, torch.full((2,), 0.5))


# The maxima are 0 to 7.1 pixels from the boxes.
@pytest.mark.parametrize(("tolerance", "count"), [(0.0, 1), (4.0, 2), (5.5, 4)])
def test_pointing_game_with_a_tolerance_against_a_loop(tolerance: float, count: int) -> None:
    maps, masks = _maps(), box_masks(_boxes(), SIZE)
    hits = []
    for value, heat, mask in zip(pointing_game(maps, masks, tolerance), maps.numpy(), masks.numpy(), strict=True):
        places = [(r, c) for r in range(SIZE[0]) for c in range(SIZE[1])]
        if not mask.any() or _is_flat(torch.from_numpy(heat)):
            assert value.isnan()
            continue
        peak = next(place for place in places if heat[place] == heat.max())
        hits.append(min(math.dist(peak, place) for place in places if mask[place]) <= tolerance)
        assert value == float(hits[-1])
    assert hits.count(True) == count < len(hits)


def test_mean_iou_of_maps_on_minus_one_to_one_against_a_loop() -> None:
    maps, masks = 3 * _maps() - 5, box_masks(_boxes(), SIZE)
    counted = 0
    for value, heat, mask in zip(mean_iou(maps, masks, signed=True), maps, masks, strict=True):
        if not mask.any() or _is_flat(heat):
            assert value.isnan()
            continue
        scaled = 2 * (heat.double() - heat.min()) / (heat.max() - heat.min()) - 1
        overlaps = []
        for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
            above = [float(v) > threshold for v in scaled.flatten()]
            within = mask.flatten().tolist()
            overlaps.append(
                sum(a and b for a, b in zip(above, within, strict=True))
                / sum(a or b for a, b in zip(above, within, strict=True))
            )
        assert float(value) == pytest.approx(statistics.fmean(overlaps), abs=1e-6)
        counted += 1
    assert counted >= 3


def test_contrast_to_noise_without_a_floor() -> None:
    heat = torch.zeros(1, 8, 8)
    heat[:, :4] = 1
    heat[0, 0, 0] = 0.999
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[:, :4] = True
    noise = math.sqrt(statistics.pvariance([0.999, *[1.0] * 31]))
    assert float(contrast_to_noise(heat, masks, floor=0)) == pytest.approx((1 - 0.001 / 32) / noise, rel=1e-4)
    # Without noise the published ratio is 0.
    assert contrast_to_noise((heat > 0.5).float(), masks, floor=0) == 0
