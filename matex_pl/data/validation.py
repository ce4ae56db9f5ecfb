"""Rules that the rows of a table of images must follow, as pure functions.

A value that breaks a rule makes a bad row, which is refused. A value that is plausible but probably wrong makes a
warning, and its row is used.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from matex_pl.data.pair import ImageTextPair

log = logging.getLogger(__name__)

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
# An image with a shorter side, or with a greater ratio of its sides, is no radiograph.
_SHORTEST_SIDE, _LARGEST_RATIO = 16, 4
# Difference of two ratios of sides that no rounding explains.
_ASPECT_TOLERANCE = 0.02
# Views of a chest from the front or the back, also lying on a side.
_FRONTAL = {"AP", "PA", "LLD", "RLD", "FRONTAL"}
_SHOWN = 3
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}

WARNINGS = {
    "cells": "The row has fewer or more cells than the header. Missing cells are read as empty",
    "phrase": "The phrase has no letter and no digit. The model reads nothing",
    "id": "The id has control characters. Names of files and tags show other characters",
    "box outside": "A box reaches outside of its image. The part outside is cut off",
    "box fraction": (
        "All sides of a box are within [0, 1]. Boxes are read in pixels, not as fractions of the image. A manifest "
        "reads fractions with box_unit: normalized"
    ),
    "box small": "A box is less than a pixel high or wide. Scores in such a box mean nothing",
    "annotated size": (
        "image_width and image_height contradict the shape of the file. The boxes are stretched to the file"
    ),
    "shape": "The image is a strip or has few pixels. A model of radiographs cannot read it",
    "constant": "All pixels of the image are equal. The image shows nothing",
    "view": "The view is not frontal, or not upright. Sides and regions are placed as on a frontal image",
    "mask quality": "Dice RCA (Mean) is below 0.7. The masks of the row count as missing",
    "mask row empty": "All masks of the row are empty. The masks of the row count as missing",
    "mask empty": "A mask is empty in the model's frame. Its structure counts as missing",
    "mask sides": "The left lung lies left of the right lung, as on a mirrored image. Check the names of both masks",
    "splits": "The same pixels are in two splits. Scores on held-out images are too good",
    "patients": "The same pixels belong to two patients. Splits by patient do not separate them",
    "one pair": "The split has one pair. Its contrastive loss is 0, and its recall is 1",
    "one phrase": "All pairs of the split have the same phrase. Nothing distinguishes its images",
}
"""Plausible but wrong values by the name of their kind, each with its consequence."""


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
        if self.rule.endswith("."):
            # A message of several sentences.
            return f"{place}, {self.value!r}: {self.rule}" if self.value else f"{place}: {self.rule}"
        return f"{place}: {self.rule}, got {self.value!r}" if self.value else f"{place}: {self.rule}"


@dataclass(frozen=True)
class RowWarning:
    """A row that is used, although one of its values is probably wrong.

    Args:
        file: File of the row.
        line: Line in the file, from 1; 0 if the file has no lines.
        value: Value as written in the file; empty if it must not be logged.
        kind: Name of the kind, a key of `WARNINGS`.
    """

    file: str
    line: int
    value: str
    kind: str

    @property
    def rule(self) -> str:
        """Fault and consequence."""
        return WARNINGS[self.kind]

    def __str__(self) -> str:
        place = place_of((self.file, self.line))
        return f"{place}: {shorten(self.value)!r}" if self.value else place


class RuleError(ValueError):
    """Error of a value that breaks a rule."""

    def __init__(self, value: Any, rule: str) -> None:
        super().__init__(f"{rule}, got {value!r}")
        self.value = shorten(str(value))
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


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """All images below a folder, `.png` and `.jpg`, by their names without the suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Check the path.")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            found[path.stem].append(path)
    return found


def find_by_stem(images: Mapping[str, Sequence[Path]], name: str) -> Path:
    """The file of an image among `images_by_stem`, whatever its suffix and its folder."""
    if not name:
        raise RuleError(name, "the image is missing")
    paths = images.get(Path(name).stem, ())
    if not paths:
        raise RuleError(name, "there is no such file in the folder of the images, as .png or .jpg")
    if len(paths) > 1:
        several = ", ".join(map(str, paths[:_SHOWN]))
        raise RuleError(name, f"several files have this name; give the folder of one of them as images: {several}")
    return paths[0]


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


def check_inside(boxes: Iterable[Box], size: tuple[int, int]) -> None:
    """Raise RuleError unless boxes, in pixels, lie in an image of this height and width, to within a pixel."""
    height, width = size
    for box in boxes:
        if not is_inside(box, size):
            raise RuleError(list(box), f"a box (x0, y0, x1, y1) reaches outside of its image of {width} x {height}")
        check_overlap(box, size)


def is_inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box, in pixels, lies in an image of this height and width, to within a pixel."""
    return _overhang(box, size) <= _TOLERANCE


def check_overlap(box: Box, size: tuple[int, int]) -> None:
    """Raise RuleError if a box, in pixels, covers nothing of an image of this height and width."""
    height, width = size
    inside = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
    if min(inside) < _LEAST:
        raise RuleError(list(box), f"a box (x0, y0, x1, y1) covers nothing of its image of {width} x {height}")


def _overhang(box: Sequence[float], size: tuple[int, int]) -> float:
    """Pixels by which a box exceeds an image of this height and width; not positive if it is inside."""
    return max(-box[0], -box[1], box[2] - size[1], box[3] - size[0])


def pair_warnings(pairs: Iterable[ImageTextPair]) -> list[RowWarning]:
    """Warnings about phrases, and about boxes and shapes of images of known size."""
    found = []
    for pair in pairs:
        if pair.phrase and not any(map(str.isalnum, pair.phrase)):
            found.append(RowWarning(*pair.source, pair.phrase, "phrase"))
        if pair.size:
            found += shape_warnings(pair, pair.size)
    return found


def shape_warnings(pair: ImageTextPair, size: tuple[int, int]) -> list[RowWarning]:
    """Warnings about the boxes of a pair, and about the shape of its image, in an image of this height and width."""
    found = []
    if min(size) < _SHORTEST_SIDE or max(size) > _LARGEST_RATIO * min(size):
        found.append(RowWarning(*pair.source, f"{size[1]} x {size[0]}", "shape"))
    for box in pair.boxes:
        value = str([round(float(side), 3) for side in box])
        if _overhang(box, size) > _LEAST:
            found.append(RowWarning(*pair.source, value, "box outside"))
        if max(box) <= 1:
            found.append(RowWarning(*pair.source, value, "box fraction"))
        elif min(box[2] - box[0], box[3] - box[1]) < 1:
            found.append(RowWarning(*pair.source, value, "box small"))
    return found


def set_warnings(pairs: Sequence[ImageTextPair]) -> list[RowWarning]:
    """Warnings about ids, and about splits without contrast."""
    found, splits = [], defaultdict(list)
    for pair in pairs:
        splits[pair.split].append(pair)
        if not pair.id.isprintable():
            found.append(RowWarning(*pair.source, pair.id, "id"))
        elif not pair.patient_id.isprintable():
            # Ids of patients must not be logged.
            found.append(RowWarning(*pair.source, "", "id"))
    for split, members in splits.items():
        first = members[0]
        if len(members) == 1:
            found.append(RowWarning(*first.source, split, "one pair"))
        elif all(pair.phrase == first.phrase for pair in members):
            found.append(RowWarning(*first.source, first.phrase, "one phrase"))
    return found


def aspect_differs(annotated: tuple[float, float], size: tuple[int, int]) -> bool:
    """Whether two heights and widths have another ratio, beyond the rounding of a down-sized copy."""
    ratio = annotated[0] / annotated[1] * size[1] / size[0]
    return abs(math.log(ratio)) > _ASPECT_TOLERANCE + 1 / min(size)


def odd_view(view: str, orientation: Sequence[str] = ()) -> str:
    """A view that is not frontal, or turned or mirrored, as it is written; empty if it is frontal or unknown.

    Args:
        view: View position, as in DICOM's ViewPosition or MIMIC's metadata.
        orientation: DICOM's PatientOrientation: directions to the right and to the bottom of the image, such as L, F.
    """
    words = set(view.upper().replace("_", " ").split())
    if words and not words & _FRONTAL:
        return view
    directions = [direction[:1].upper() for direction in orientation]
    if directions and not (directions[0] in ("L", "") and directions[1:2] in ([], ["F"], [""])):
        return "PatientOrientation " + "\\".join(orientation)
    return ""


def by_kind(found: Iterable[RowWarning]) -> dict[str, list[RowWarning]]:
    """The warnings of each kind, each once, in the order of `WARNINGS`, then of files and lines."""
    kinds = list(WARNINGS)
    groups: dict[str, list[RowWarning]] = defaultdict(list)
    for warning in sorted(set(found), key=lambda row: (kinds.index(row.kind), row.file, row.line, row.value)):
        groups[warning.kind].append(warning)
    return groups


@rank_zero_only
def log_warnings(found: Iterable[RowWarning]) -> None:
    """Log one warning per kind, with a count and the first rows."""
    for kind, rows in by_kind(found).items():
        lines = [f"{WARNINGS[kind]} ({len(rows)} row{'s' * (len(rows) > 1)}):", *map(str, rows[:_SHOWN])]
        lines += [f"and {len(rows) - _SHOWN} more, see `matex check-data`"] if len(rows) > _SHOWN else []
        log.warning("\n  ".join(lines))


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


def shorten(value: str) -> str:
    """The value for a message, cut after 200 characters."""
    return value if len(value) <= 200 else f"{value[:200]}..."


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
