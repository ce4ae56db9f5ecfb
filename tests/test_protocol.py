"""Scores of the published grounding protocol against a slow literal reading of its steps, and pruned phrases."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from matex_pl.anatomy import prune_phrase
from matex_pl.benchmark.protocol import PROTOCOLS, GroundingProtocol
from matex_pl.data import ImageTextPair
from matex_pl.data.transforms import ImageTransform
from matex_pl.evaluation.intervals import Detections, FindingMean, Sums, draw_patients
from matex_pl.report.published import grounding_figures

# Height and width of the model's input, of its patch raster, and of the stored images.
INPUT, GRID = (32, 32), (4, 5)
SIZES = [(60, 40), (30, 50), (40, 40)]
BOXES = (
    ((2.0, 20.0, 18.0, 44.0), (25.0, 30.0, 39.0, 50.0)),
    ((20.0, 8.0, 34.0, 22.0),),
    ((0.0, 0.0, 12.0, 12.0),),
)


def pair(boxes=((0.0, 0.0, 1.0, 1.0),), finding="edema") -> ImageTextPair:
    return ImageTextPair("a", "p", "i", "i.png", "Edema.", boxes, finding)


def slow_smooth(grid: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of each axis, cut at four deviations, with the raster mirrored at its edges."""
    if not sigma:
        return grid
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-radius, radius + 1)]

    def line(values: np.ndarray) -> list[float]:
        number = len(values)
        mirrored = [*range(number), *reversed(range(number))]
        return [
            sum(w * values[mirrored[(i + j - radius) % (2 * number)]] for j, w in enumerate(weights)) / sum(weights)
            for i in range(number)
        ]

    rows = np.array([line(row) for row in grid])
    return np.array([line(column) for column in rows.T]).T


def slow_read(grid: np.ndarray, y: float, x: float) -> float:
    """Bilinear value at a place in [0, 1], between the centers of cells."""
    places = []
    for place, number in ((y, grid.shape[0]), (x, grid.shape[1])):
        at = min(max(place * number - 0.5, 0), number - 1)
        low = int(at)
        places.append([(low, 1 - at + low), (min(low + 1, number - 1), at - low)])
    return sum(grid[i, j] * a * b for i, a in places[0] for j, b in places[1])


def slow_values(grid, boxes, size, transform: ImageTransform, protocol: GroundingProtocol) -> dict[str, float]:
    """Pixel by pixel: its place in the image, then in the model's input, then on the raster."""
    smooth, side = slow_smooth(grid, protocol.smooth_sigma), protocol.size
    shown = transform.target_size(size)
    corner = [(frame - part) // 2 for frame, part in zip(transform.size, shown, strict=True)]
    square = int(protocol.kept * side)
    heat, mask = {}, {}
    for row in range(side):
        for column in range(side):
            pixel = [
                (at + 0.5) * max(size) / side - (max(size) - stored) / 2
                for at, stored in zip((row, column), size, strict=True)
            ]
            y, x = (
                (start + at * part / stored) / frame
                for start, at, part, stored, frame in zip(corner, pixel, shown, size, transform.size, strict=True)
            )
            mask[row, column] = any(x0 <= pixel[1] < x1 and y0 <= pixel[0] < y1 for x0, y0, x1, y1 in boxes)
            counts = all((side - square) // 2 <= at < (side - square) // 2 + square for at in (row, column))
            if counts and -1e-9 <= y <= 1 + 1e-9 and -1e-9 <= x <= 1 + 1e-9:
                heat[row, column] = slow_read(smooth, y, x)
    low, high = min(heat.values()), max(heat.values())
    scaled = {place: 2 * (value - low) / (high - low) - 1 for place, value in heat.items()}
    overlaps = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        above = {place for place, value in scaled.items() if value > threshold}
        within = {place for place in scaled if mask[place]}
        overlaps.append(len(above & within) / len(above | within))
    inside, outside = ([v for place, v in scaled.items() if mask[place] == side] for side in (True, False))
    noise = math.sqrt(statistics.pvariance(inside) + statistics.pvariance(outside))
    peak = max(scaled, key=scaled.__getitem__)
    away = min(math.dist(peak, place) for place, is_box in mask.items() if is_box)
    return {
        "miou": statistics.fmean(overlaps),
        "cnr": (statistics.fmean(inside) - statistics.fmean(outside)) / noise,
        "pointing_game": float(mask[peak]),
        "pointing_game_near": float(away <= protocol.tolerance),
    }


@pytest.mark.parametrize("mode", ["longest", "shortest", "squash"])
@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_scores_against_a_slow_reading_of_the_steps(mode: str, sigma: float) -> None:
    protocol = GroundingProtocol("ms-cxr", smooth_sigma=sigma, size=41, tolerance=6)
    transform = ImageTransform(INPUT, mode)
    grid = torch.rand(3, *GRID, generator=torch.Generator().manual_seed(4))
    framed = [transform(np.zeros(size, np.uint8)) for size in SIZES]
    pairs = [pair(boxes) for boxes in BOXES]
    found = protocol.values(grid, torch.stack([frame.content_box for frame in framed]), pairs, SIZES)
    slow = [
        slow_values(heat.double().numpy(), boxes, size, transform, protocol)
        for heat, boxes, size in zip(grid, BOXES, SIZES, strict=True)
    ]
    for name, values in found.items():
        assert values.tolist() == pytest.approx([row[name] for row in slow], abs=1e-3), name
    assert {0.0, 1.0} & {*found["pointing_game_near"].tolist()}


def test_a_padded_map_is_enlarged_as_in_the_public_code() -> None:
    """A Gaussian on the raster, bilinear enlargement to 518 px, and 453 px in the middle."""
    grid = torch.rand(2, 37, 37, generator=torch.Generator().manual_seed(0))
    content_box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.0, 0.9, 1.0]])
    heat, counted = GroundingProtocol("ms-cxr").place(grid, content_box, [(700, 700), (1000, 800)])
    smooth = torch.from_numpy(np.stack([ndimage.gaussian_filter(one, 1.5) for one in grid.numpy()]))
    large = torch.nn.functional.interpolate(smooth[:, None], size=(518, 518), mode="bilinear", align_corners=False)
    torch.testing.assert_close(heat, large[:, 0], atol=1e-4, rtol=0)
    assert (int(counted[0].sum()), counted[0].nonzero().aminmax()) == (453**2, (32, 484))
    assert torch.equal(counted[0], counted[1])


def test_a_crop_leaves_out_what_the_model_did_not_see() -> None:
    protocol = GroundingProtocol("ms-cxr", size=80)
    # A portrait whose upper and lower quarters are cut.
    _, counted = protocol.place(torch.rand(1, 4, 4), torch.tensor([[0.0, -0.5, 1.0, 1.5]]), [(80, 40)])
    assert counted[0].nonzero().tolist() == [[y, x] for y in range(20, 60) for x in range(20, 60)]


def test_pairs_of_other_findings_do_not_count() -> None:
    protocol = GroundingProtocol("padchest-gr", size=32)
    pairs = [pair(((4.0, 4.0, 20.0, 20.0),), finding) for finding in ("nodule", "fracture")]
    values = protocol.values(torch.rand(2, 4, 4), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), pairs, [(32, 32)] * 2)
    for value in values.values():
        assert value.isnan().tolist() == [False, True]


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_flat_maps_and_pairs_without_boxes_do_not_count(value: float) -> None:
    protocol = GroundingProtocol("ms-cxr", size=32)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    flat = protocol.values(torch.full((1, 4, 4), value), box, [pair(((4.0, 4.0, 20.0, 20.0),))], [(32, 32)])
    assert {name: float(score) for name, score in flat.items() if not score.isnan()} == {"cnr": 0.0}
    bare = protocol.values(torch.rand(1, 4, 4), box, [pair(())], [(32, 32)])
    assert all(score.isnan() for score in bare.values())


@pytest.mark.parametrize(
    ("phrase", "pruned"),
    [
        ("Small right apical pneumothorax", "right apical pneumothorax"),
        ("Mild edema", "edema"),
        ("A small to moderate, left-sided effusion, likely parapneumonic.", "A, left-sided effusion, parapneumonic."),
        ("Moderate-sized pneumothorax (possible).", "pneumothorax."),
        ("Opacity which may represent pneumonia.", "Opacity pneumonia."),
        ("Small to moderate-sized left effusion.", "left effusion."),
        ("Left small- to moderate-sized effusion", "Left effusion"),
        ("A small/moderate effusion", "A effusion"),
        ("Moderate or large effusion", "effusion"),
        ("Very small effusion, most consistent with edema.", "effusion, edema."),
        ("Very low volumes, moderate to the left.", "Very low volumes, to the left."),
        ("No large pneumothorax.", "No large pneumothorax."),
        ("Effusion without significant edema", "Effusion without significant edema"),
        ("Unchanged large-bore tube.", "Unchanged large-bore tube."),
        ("No pneumothorax.", "No pneumothorax."),
        ("Possibly small.", "Possibly small."),
    ],
)
def test_pruned_phrases(phrase: str, pruned: str) -> None:
    assert prune_phrase(phrase) == pruned
    assert prune_phrase(pruned) == pruned


def test_a_mean_over_findings_counts_each_finding_once() -> None:
    findings = ["a", "a", "b", "", "a", "b"]
    values = torch.tensor([1.0, 0.0, 0.5, 9.0, torch.nan, 1.0])
    mean = FindingMean.of(Sums.of(values), findings)
    assert float(mean.score()) == pytest.approx((0.5 + 0.75) / 2)
    assert mean.count == 4
    drawn = draw_patients(list("uvwxyz"), 50, 0)
    slow = []
    for row in drawn.long().tolist():
        means = []
        for name in ("a", "b"):
            picked = [
                float(v)
                for v, f, times in zip(values, findings, row, strict=True)
                for _ in range(times)
                if f == name and v == v
            ]
            means += [np.mean(picked)] if picked else []
        slow.append(np.mean(means) if means else np.nan)
    np.testing.assert_allclose(mean.score(drawn).numpy(), slow)


def test_a_mean_over_findings_of_detections() -> None:
    """One finding is found by its only detection, the other is missed."""
    found = Detections(torch.tensor([0.9, 0.8]), torch.tensor([True, False]), torch.tensor([0, 1]), torch.ones(2))
    assert float(FindingMean.of(found, ["a", "b"]).score()) == pytest.approx(0.5)
    assert float(FindingMean.of(found, ["a", "a"]).score()) == pytest.approx(float(found.score()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chexlocalize"}, "protocol must be one of ms-cxr, padchest-gr, got 'chexlocalize'"),
        ({"name": "ms-cxr", "smooth_sigma": -1.0}, "smooth_sigma must be a number of patches from 0, got -1.0"),
        ({"name": "ms-cxr", "smooth_sigma": math.inf}, "smooth_sigma must be a number of patches from 0, got inf"),
    ],
)
def test_wrong_settings_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingProtocol(**arguments)


@pytest.mark.parametrize(
    ("name", "pairs", "message"),
    [
        ("ms-cxr", [pair(())], "none of the 1 pairs of Data has a box"),
        ("ms-cxr", [pair(finding="")], "no pair of Data with a box has a finding"),
        ("padchest-gr", [pair(finding="fracture")], "padchest-gr is about alveolar pattern, .* are about fracture"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(name: str, pairs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingProtocol(name).check(pairs, "Data")
    GroundingProtocol(name).check([*pairs, pair(finding="nodule")], "Data")


def test_the_published_figures_are_those_of_the_page() -> None:
    """Every figure of the file stands in a row of the page, with its method."""
    page = (Path(__file__).parents[1] / "docs/results/published.md").read_text(encoding="utf-8")
    lines = [re.sub(r"\s+", " ", line) for line in page.splitlines()]
    figures = grounding_figures()
    assert figures["zero_shot"].keys() == PROTOCOLS.keys()
    for table in figures["zero_shot"].values():
        protocol = GroundingProtocol("ms-cxr").plain
        assert table["settings"].items() <= protocol.items()
        for row in table["rows"]:
            name = ", ".join(filter(None, [row["name"], row.get("rules")]))
            numbers = " | ".join(f"{row[key]:.3f}" for key in ("miou", "cnr", "pointing_game"))
            assert f"| {name} | {numbers} |" in lines
    for row in figures["supervised"]:
        assert any(row["name"] in line and f"{row['ap50']}" in line and f"{row['miou']}" in line for line in lines)
