"""Rules that the rows of a table of images must follow, as pure functions that name the broken rule."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matex_pl.data.pair import ImageTextPair

Box = tuple[float, float, float, float]

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""`train`, `val` or `test` by the names in files, in lower case."""

# Pixels by which a box may exceed its image, as scaled and rounded boxes do.
_TOLERANCE = 1.0
# Smallest height and width of a box in its image, in pixels: in single precision, smaller sizes may vanish.
_LEAST = 0.01


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, with the reason.

    Args:
        file: File of the row.
        line: Line in the file, from 1; 0 if the file has no lines.
        value: Value as written in the file.
        rule: Rule that the value breaks.
    """

    file: str
    line: int
    value: str
    rule: str

    def __str__(self) -> str:
        place = place_of((self.file, self.line))
        return f"{place}: {self.rule}, got {self.value!r}" if self.value else f"{place}: {self.rule}"


class RuleError(ValueError):
    """Error of a value that breaks a rule."""

    def __init__(self, value: Any, rule: str) -> None:
        super().__init__(f"{rule}, got {value!r}")
        shown = str(value)
        self.value = shown if len(shown) <= 200 else f"{shown[:200]}..."
        self.rule = rule

    def at(self, source: tuple[str, int]) -> BadRow:
        """The bad row at a file and line."""
        return BadRow(*source, self.value, self.rule)


def find_image(root: Path, name: str) -> Path:
    """The file of an image below `root`."""
    if not name:
        raise RuleError(name, "the image is missing")
    path = path_below(root, name)
    if not os.path.isfile(path):  # noqa: PTH113 - half the time of pathlib, which counts over many rows
        raise RuleError(name, f"there is no such file below {str(root)!r}")
    return path


def path_below(root: Path, name: str) -> Path:
    """A path below `root`, whether or not it exists; symbolic links stay as they are."""
    base = os.path.abspath(root)  # noqa: PTH100 - links stay as they are: data sets are often linked into a folder
    path = os.path.normpath(os.path.join(base, name.replace("\\", "/")))  # noqa: PTH118
    if "\0" in path or os.path.commonpath([base, path]) != base:
        raise RuleError(name, f"the path leads out of the root {str(root)!r}")
    return Path(path)


def check_phrase(phrase: str) -> str:
    """The phrase with single spaces."""
    if not phrase.strip():
        raise RuleError(phrase, "the phrase is empty")
    if "\N{REPLACEMENT CHARACTER}" in phrase or "\0" in phrase:
        raise RuleError(phrase, "the phrase holds characters of a wrong encoding")
    return " ".join(phrase.split())


def split_name(text: str) -> str:
    """`train`, `val` or `test`, from the name of a split in a file."""
    if text.lower() not in SPLIT_NAMES:
        raise RuleError(text, f"the split is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[text.lower()]


def boxes_of_json(cell: Any) -> list[Box]:
    """Boxes `(x0, y0, x1, y1)` from a list of lists, or its JSON text; none from an empty cell."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    try:
        listed = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        raise RuleError(cell, "the boxes are no JSON; write [[x0, y0, x1, y1], ...]") from None
    if not isinstance(listed, list) or not all(isinstance(box, list) and len(box) == 4 for box in listed):
        raise RuleError(cell, "the boxes are no list of [x0, y0, x1, y1]")
    return [_check_box(_four_numbers(box)) for box in listed]


def box_of_cells(cells: Sequence[Any]) -> list[Box]:
    """The box of `x, y, w, h`; none if all four are empty."""
    if all(cell is None or not str(cell).strip() for cell in cells):
        return []
    x, y, width, height = _four_numbers(cells)
    return [_check_box((x, y, x + width, y + height))]


def _four_numbers(cells: Sequence[Any]) -> Box:
    try:
        # Python reads `1_0` as ten.
        if any(isinstance(cell, bool) or "_" in str(cell) for cell in cells):
            raise TypeError
        one, two, three, four = (float(cell) for cell in cells)
    except (TypeError, ValueError, OverflowError):
        raise RuleError(list(cells), "a box is not four numbers") from None
    return one, two, three, four


def _check_box(box: Box) -> Box:
    if not all(map(math.isfinite, box)):
        raise RuleError(list(box), "a box is not finite")
    if box[2] < box[0] or box[3] < box[1]:
        raise RuleError(list(box), "a box is inverted: its right or lower edge comes before the left or upper one")
    if box[2] == box[0] or box[3] == box[1]:
        raise RuleError(list(box), "a box is empty: it has no width or no height")
    return box


def check_inside(boxes: Iterable[Box], size: tuple[int, int]) -> None:
    """Raise RuleError unless boxes, in pixels, lie in an image of this height and width, to within a pixel."""
    height, width = size
    for box in boxes:
        if min(box[:2]) < -_TOLERANCE or box[2] > width + _TOLERANCE or box[3] > height + _TOLERANCE:
            raise RuleError(list(box), f"a box (x0, y0, x1, y1) reaches outside of its image of {width} x {height}")
        inside = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
        if min(inside) < _LEAST:
            raise RuleError(list(box), f"a box (x0, y0, x1, y1) covers nothing of its image of {width} x {height}")


def drop_repeats(pairs: Sequence[ImageTextPair]) -> tuple[list[ImageTextPair], list[BadRow]]:
    """The first pair of each id, and the others as bad rows."""
    first_of: dict[str, ImageTextPair] = {}
    bad = []
    for pair in pairs:
        first = first_of.setdefault(pair.id, pair)
        if first is not pair:
            bad.append(BadRow(*pair.source, pair.id, f"the id is taken already by {place_of(first.source)}"))
    return list(first_of.values()), bad


def fill_splits(pairs: Sequence[ImageTextPair]) -> list[ImageTextPair]:
    """The pairs; those without a split get the split of other rows of their patient."""
    splits = {pair.patient_id: pair.split for pair in reversed(pairs) if pair.split}
    return [replace(pair, split=pair.split or splits.get(pair.patient_id, "")) for pair in pairs]


def drop_leaks(pairs: Sequence[ImageTextPair]) -> tuple[list[ImageTextPair], list[BadRow]]:
    """The pairs in the split of their patient's first pair, and the others as bad rows."""
    first: dict[str, ImageTextPair] = {}
    kept, bad = [], []
    for pair in pairs:
        known = first.setdefault(pair.patient_id, pair)
        if known.split == pair.split:
            kept.append(pair)
        else:
            rule = f"the patient is in two splits: {pair.split} here, {known.split} in {place_of(known.source)}"
            # Ids of patients must not be logged; file and line identify them.
            bad.append(BadRow(*pair.source, "", rule))
    return kept, bad


def place_of(source: tuple[str, int]) -> str:
    """Text of a file and line."""
    file, line = source
    return f"{file}, line {line}" if line else file


def image_name(root: Path, path: Path) -> str:
    """Path of an image relative to the root, with slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def fold(phrase: Any) -> str:
    """A phrase without case and with single spaces, for comparisons."""
    return " ".join(str(phrase).split()).casefold()


def text(cells: Mapping[str, Any], name: str) -> str:
    """A cell as stripped text; empty if missing. Values of JSON other than text and numbers break a rule."""
    cell = cells.get(name)
    if cell is None:
        return ""
    infinite = isinstance(cell, float) and not math.isfinite(cell)
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)) or infinite:
        raise RuleError(cell, f"the {name} is neither text nor a number")
    return str(cell).strip()
