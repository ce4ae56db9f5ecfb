"""Boxes of a manifest in every form: orders of numbers, shares of the image, polygons and run-length encoded masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from matex_pl.data import ManifestDataModule
from matex_pl.data.boxes import boxes_of_json, boxes_of_mask, boxes_of_polygons, boxes_of_rle, to_pixels
from matex_pl.data.validation import RuleError

HEIGHT, WIDTH = 60, 80


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((HEIGHT, WIDTH), 20 * number, dtype=np.uint8))
    return tmp_path


def _read(root: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """Boxes by id, and the rules that bad rows break."""
    with (root / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pairs, bad = ManifestDataModule(str(root / "t.csv"), image_size=32, **settings).checked_rows()
    assert all(row.line and row.value for row in bad)
    return {pair.id: list(pair.boxes) for pair in pairs}, [row.rule for row in bad]


def _row(image: int = 0, **cells: Any) -> dict[str, Any]:
    return {"image": f"{image}.png", "phrase": "Left effusion.", **cells}


def _two_parts() -> np.ndarray:
    """A mask with two parts, of which one has a corner only."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[10:30, 20:50] = mask[40:45, 70:80] = 1
    mask[10:20, 20:30] = 0
    return mask


PARTS = [(20, 10, 50, 30), (70, 40, 80, 45)]


def _siim(mask: np.ndarray) -> str:
    """As the competition's own code: the distance from the end of the last run, down the columns."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {length}" for gap, length in zip(gaps, ends - starts, strict=True))


@pytest.mark.parametrize(
    ("box_format", "numbers"), [("xyxy", [8, 6, 40, 30]), ("xywh", [8, 6, 32, 24]), ("cxcywh", [24, 18, 32, 24])]
)
@pytest.mark.parametrize("box_unit", ["pixels", "normalized"])
def test_orders_and_units_of_numbers(root: Path, box_format: str, numbers: list[int], box_unit: str) -> None:
    scale = (WIDTH, HEIGHT, WIDTH, HEIGHT) if box_unit == "normalized" else (1, 1, 1, 1)
    cell = json.dumps([[number / side for number, side in zip(numbers, scale, strict=True)]])
    boxes, bad = _read(root, [_row(boxes=cell)], box_format=box_format, box_unit=box_unit)
    assert not bad
    assert boxes["0.png"] == [pytest.approx((8, 6, 40, 30))]


def test_a_box_per_row_may_be_normalized(root: Path) -> None:
    rows = [_row(x=0.1, y=0.2, w=0.5, h=0.25), _row(x=0, y=0, w=1, h=1)]
    boxes, bad = _read(root, rows, box_unit="normalized")
    assert not bad
    assert boxes == {"0.png": [pytest.approx((8, 12, 48, 27)), (0, 0, WIDTH, HEIGHT)]}


def test_the_unit_of_boxes_is_never_guessed(root: Path, messages: None, caplog: pytest.LogCaptureFixture) -> None:
    rows = [_row(boxes="[[0.1, 0.2, 0.5, 0.6]]")]
    boxes, bad = _read(root, rows)
    assert (boxes, bad) == ({"0.png": [(0.1, 0.2, 0.5, 0.6)]}, [])
    data = ManifestDataModule(str(root / "t.csv"), image_size=32)
    pairs, _ = data.checked_rows()
    assert [row.kind for row in data.list_warnings(pairs)] == ["box fraction", "one pair"]
    rows = [_row(boxes="[[8, 6, 40, 30]]"), _row(1, boxes="[[0, 0.5, 1.02, 1]]")]
    boxes, bad = _read(root, rows, box_unit="normalized")
    assert (boxes, bad) == ({}, ["a normalized box reaches outside of [0, 1]"] * 2)


@pytest.mark.parametrize(
    "polygons", [[[[20, 10], [50, 30], [20, 30]], [[70, 40], [80, 40], [80, 45.5]]], [[20, 10, 50, 10, 35, 30]]]
)
def test_polygons_of_points_and_of_flat_numbers(root: Path, polygons: list[Any]) -> None:
    boxes, bad = _read(root, [_row(polygons=json.dumps(polygons))])
    assert not bad
    assert boxes["0.png"] == [(20, 10, 50, 30), (70, 40, 80, 45.5)][: len(polygons)]


@pytest.mark.parametrize("is_compressed", [True, False])
def test_masks_of_coco(root: Path, is_compressed: bool) -> None:
    mask = _two_parts()
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    counts = coco.encode(np.asfortranarray(mask))["counts"].decode() if is_compressed else np.diff(edges).tolist()
    cell = json.dumps({"size": [HEIGHT, WIDTH], "counts": counts})
    boxes, bad = _read(root, [_row(rle=cell), _row(1, rle=""), _row(2, rle=f"[{cell}]")])
    assert not bad
    assert boxes == {"0.png": PARTS, "1.png": [], "2.png": PARTS}


def test_masks_of_siim_in_its_own_column(root: Path) -> None:
    """Relative, down the columns, a leading space in the column's name, -1 for none, and a row per part."""
    first, second = _two_parts(), _two_parts()
    first[:, 60:] = second[:, :60] = 0
    rows = [
        {"image": f"{image}.png", "phrase": phrase, " EncodedPixels": cell}
        for image, phrase, cell in [
            (0, "Pneumothorax.", f" {_siim(first)}"),
            (1, "No pneumothorax.", " -1"),
            (0, "Pneumothorax.", _siim(second)),
        ]
    ]
    for column in ("EncodedPixels", " EncodedPixels"):
        boxes, bad = _read(root, rows, columns={"rle": column}, rle_format="siim")
        assert not bad
        assert boxes == {"0.png": PARTS, "1.png": []}


@pytest.mark.parametrize(
    ("cells", "settings", "rule"),
    [
        ({"boxes": "[[8, 6, 32]]"}, {"box_format": "xywh"}, r"the boxes are no list of \[x, y, w, h\]"),
        ({"boxes": "[[8, 6, -2, 3]]"}, {"box_format": "xywh"}, "a box is inverted"),
        ({"polygons": "[[[1, 2], [3, 4]]]"}, {}, "a polygon is no list of at least three points"),
        ({"polygons": "[[1, 2, 3, 4, 5]]"}, {}, "a polygon is no list of at least three points"),
        ({"polygons": '[[[1, 2], [3, "a"], [5, 6]]]'}, {}, "a point of a polygon is not two numbers"),
        ({"polygons": "[[[1, 2], [3, 2], [5, 2]]]"}, {}, "a box is empty"),
        ({"polygons": "[[[1, 2], [300, 2], [5, 9]]]"}, {}, "reaches outside of its image of 80 x 60"),
        ({"polygons": "[[1, 2"}, {}, "the polygons are no JSON"),
        ({"polygons": "{}"}, {}, "the polygons are no list of lists"),
        ({"rle": '{"size": [60, 80]}'}, {}, "a mask is no object"),
        ({"rle": "5 6"}, {}, "the mask is no JSON"),
        ({"rle": "-1"}, {}, "a mask is no object"),
        ({"rle": '{"size": [6, 8], "counts": [40, 8]}'}, {}, "the mask is 8 x 6 and its image 80 x 60"),
        ({"rle": '{"size": [60, 80], "counts": [4000, 801]}'}, {}, "the counts do not sum"),
        ({"rle": "4000 801"}, {"rle_format": "siim"}, "the runs of the mask reach beyond the 4800 pixels"),
        ({"rle": "5"}, {"rle_format": "siim"}, "the number of values is odd"),
    ],
)
def test_bad_cells_are_named(root: Path, cells: dict[str, str], settings: dict[str, Any], rule: str) -> None:
    boxes, bad = _read(root, [_row(**cells), _row(1, **dict.fromkeys(cells, ""))], **settings)
    assert list(boxes) == ["1.png"]
    with pytest.raises(ValueError, match=rule):
        raise ValueError(bad[0])


def test_wrong_names_of_forms_are_refused(root: Path) -> None:
    for name, value in (("box_format", "xyhw"), ("box_unit", "percent"), ("rle_format", "kaggle")):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            ManifestDataModule(str(root / "t.csv"), **{name: value})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "a"]), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUES)
def test_any_value_is_boxes_or_a_bad_row(value: Any) -> None:
    readers = [
        lambda cell: to_pixels(boxes_of_json(cell, "cxcywh"), (HEIGHT, WIDTH)),
        boxes_of_polygons,
        lambda cell: boxes_of_rle(cell, (HEIGHT, WIDTH)),
        lambda cell: boxes_of_rle(cell, (HEIGHT, WIDTH), "siim"),
    ]
    for read in readers:
        for cell in (value, json.dumps(value)):
            try:
                boxes = read(cell)
            except RuleError:
                continue
            assert all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in boxes)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_parts_are_those_of_connected_components(share: float) -> None:
    """Also parts in a hole of another, and parts that touch at a corner or at the border."""
    for seed in range(20):
        mask = np.random.default_rng(seed).random((24, 31)) < share
        _, _, parts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        expected = [(x, y, x + width, y + height) for x, y, width, height, _ in parts[1:].tolist()]
        assert sorted(boxes_of_mask(mask)) == sorted(expected)
    assert boxes_of_mask(np.zeros((5, 4), dtype=bool)) == []
    assert boxes_of_mask(np.ones((5, 4), dtype=bool)) == [(0, 0, 4, 5)]
