"""Boxes of annotations in every form: numbers, polygons and masks, in pixels or as shares of the image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from matex_pl.data.images import read_size
from matex_pl.data.levels import Size
from matex_pl.data.masks import read_mask_file
from matex_pl.data.rle import decode_coco, decode_relative
from matex_pl.data.validation import Box, RuleError, is_inside

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""Order of the four numbers of a box, by torchvision's names: two corners, a corner and a size, a center and a size."""

BoxUnit = Literal["pixels", "normalized"]
"""Unit of boxes: pixels of the image, or shares of its width and height."""

RleFormat = Literal["coco", "siim"]
"""Form of run-length encoded masks: COCO's objects, or the relative pairs of SIIM-ACR Pneumothorax."""

_NUMBERS = {"xyxy": "[x0, y0, x1, y1]", "xywh": "[x, y, w, h]", "cxcywh": "[cx, cy, w, h]"}


def boxes_of_json(cell: Any, box_format: BoxFormat = "xyxy") -> list[Box]:
    """Boxes `(x0, y0, x1, y1)` from a list of lists, or its JSON text; none from an empty cell."""
    numbers = _NUMBERS[box_format]
    listed = _list_of(cell, f"the boxes are no JSON; write [{numbers}, ...]")
    if not isinstance(listed, list) or not all(isinstance(box, list) and len(box) == 4 for box in listed):
        raise RuleError(cell, f"the boxes are no list of {numbers}")
    return [_corners(_four_numbers(box), box_format) for box in listed]


def box_of_cells(cells: Sequence[Any]) -> list[Box]:
    """The box of `x, y, w, h`; none if all four are empty."""
    if all(cell is None or not str(cell).strip() for cell in cells):
        return []
    return [_corners(_four_numbers(cells), "xywh")]


def boxes_of_polygons(cell: Any) -> list[Box]:
    """The box around each polygon of a list, or of its JSON text; none from an empty cell.

    A polygon is a list of points `[x, y]`, or as in COCO a flat list of their numbers.
    """
    listed = _list_of(cell, "the polygons are no JSON; write [[[x, y], ...], ...]")
    if not isinstance(listed, list) or not all(isinstance(polygon, list) for polygon in listed):
        raise RuleError(cell, "the polygons are no list of lists of points [x, y]")
    return [_around(polygon) for polygon in listed]


def boxes_of_mask(mask: np.ndarray) -> list[Box]:
    """The box around each connected part of a mask `(h, w)` bool, from top to bottom; parts also connect at corners."""
    # Contours take a tenth of the time of labels. Without a parent they are outlines of parts, also of parts in a hole.
    contours, parents = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outlines = (
        [contour for contour, links in zip(contours, parents[0], strict=True) if links[3] < 0] if contours else []
    )
    rectangles = sorted(map(cv2.boundingRect, outlines), key=lambda rectangle: (rectangle[1], rectangle[0]))
    return [(float(x), float(y), float(x + width), float(y + height)) for x, y, width, height in rectangles]


def boxes_of_mask_file(path: Path, name: str, size: Size) -> list[Box]:
    """The box around each connected part of an image file that is not black, or in a JPEG not dark.

    Args:
        path: File of the mask.
        name: Name of the mask in the table.
        size: Height and width of the image.

    Raises:
        RuleError: The mask has another size than the image, or is a JPEG whose marks are too dark.
    """
    # From the header: a small file may hold very many pixels.
    check_mask_size(name, read_size(path), size)
    return boxes_of_mask(read_mask_file(path))


def boxes_of_rle(cell: Any, size: Size, rle_format: RleFormat = "coco") -> list[Box]:
    """The box around each connected part of run-length encoded masks; none from an empty cell.

    Args:
        cell: For `coco` an object with `size` and `counts`, a list of such objects, or the JSON text of either. The
            counts are a list or COCO's compressed text. For `siim` the text of the pairs, or -1 for no mask.
        size: Height and width of the image, which the masks must have.
        rle_format: Form of the masks.

    Raises:
        RuleError: The cell holds no such mask, or a mask has another size than the image.
    """
    if rle_format == "siim":
        runs = "" if cell is None else str(cell)
        return boxes_of_mask(decode_relative(runs, size)) if runs.strip() else []
    listed = _list_of(cell, 'the mask is no JSON; write {"size": [h, w], "counts": ...}')
    return [box for mask in (listed if isinstance(listed, list) else [listed]) for box in _coco_boxes(mask, size)]


def _coco_boxes(mask: Any, size: Size) -> list[Box]:
    found = coco_size(mask)
    check_mask_size(f"{found[1]} x {found[0]}", found, size)
    return boxes_of_mask(decode_coco(mask["counts"], found))


def coco_size(mask: Any) -> Size:
    """Height and width of a mask of COCO, an object with `size` and `counts`."""
    size: Any = mask.get("size") if isinstance(mask, dict) else None
    if not is_size(size) or not isinstance(mask.get("counts"), str | list):
        raise RuleError(mask, 'a mask is no object {"size": [h, w], "counts": ...}')
    return size[0], size[1]


def is_size(value: Any) -> bool:
    """Whether a value of JSON is a list of a height and a width."""
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def check_mask_size(name: str, found: Size, size: Size) -> None:
    """Raise RuleError unless a mask has the size of its image."""
    if found != size:
        raise RuleError(name, f"the mask is {found[1]} x {found[0]} and its image {size[1]} x {size[0]}")


def to_pixels(boxes: Iterable[Box], size: Size) -> list[Box]:
    """Normalized boxes in pixels of an image of this height and width.

    Raises:
        RuleError: A box reaches outside of [0, 1], by more than a pixel of the image.
    """
    height, width = size
    scaled = []
    for box in boxes:
        x0, y0, x1, y1 = box
        scaled.append((x0 * width, y0 * height, x1 * width, y1 * height))
        if not is_inside(scaled[-1], size):
            raise RuleError(list(box), "a normalized box reaches outside of [0, 1]")
    return scaled


def _list_of(cell: Any, rule: str) -> Any:
    """The value of a cell, parsed if it is text; an empty list for an empty cell."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        raise RuleError(cell, rule) from None


def _around(polygon: list[Any]) -> Box:
    """The box around a polygon."""
    if polygon and not any(isinstance(point, list) for point in polygon) and len(polygon) % 2 == 0:
        polygon = [polygon[place : place + 2] for place in range(0, len(polygon), 2)]
    if len(polygon) < 3 or not all(isinstance(point, list) and len(point) == 2 for point in polygon):
        raise RuleError(polygon, "a polygon is no list of at least three points [x, y]")
    columns, rows = ([_number(point[axis], polygon) for point in polygon] for axis in (0, 1))
    return _check_box((min(columns), min(rows), max(columns), max(rows)))


def _number(value: Any, polygon: list[Any]) -> float:
    try:
        return _four_numbers([value] * 4)[0]
    except RuleError:
        raise RuleError(polygon, "a point of a polygon is not two numbers") from None


def _four_numbers(cells: Sequence[Any]) -> Box:
    try:
        # Python reads `1_0` as ten.
        if any(isinstance(cell, bool) or "_" in str(cell) for cell in cells):
            raise TypeError
        one, two, three, four = (float(cell) for cell in cells)
    except (TypeError, ValueError, OverflowError):
        raise RuleError(list(cells), "a box is not four numbers") from None
    return one, two, three, four


def _corners(box: Box, box_format: BoxFormat) -> Box:
    """The corners of a box, which must be finite and have a size."""
    if box_format == "xywh":
        x, y, width, height = box
        return _check_box((x, y, x + width, y + height))
    if box_format == "cxcywh":
        x, y, width, height = box
        return _check_box((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return _check_box(box)


def _check_box(box: Box) -> Box:
    if not all(map(math.isfinite, box)):
        raise RuleError(list(box), "a box is not finite")
    if box[2] < box[0] or box[3] < box[1]:
        raise RuleError(list(box), "a box is inverted: its right or lower edge comes before the left or upper one")
    if box[2] == box[0] or box[3] == box[1]:
        raise RuleError(list(box), "a box is empty: it has no width or no height")
    return box
