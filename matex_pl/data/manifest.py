"""Images of one's own: any table with an image and a phrase in each row."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import cv2

from matex_pl.data.images import is_jpeg, read_image, read_levels, read_size
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import TableDataModule, TableRow, drop_broken, flag_patient_leakage, parse_rows, read_table
from matex_pl.data.validation import (
    BadRow,
    Box,
    RuleError,
    box_of_cells,
    boxes_of_json,
    check_inside,
    check_phrase,
    find_image,
    fold,
    image_name,
    split_name,
    text,
)

REQUIRED = ("image", "phrase")
OPTIONAL = ("id", "patient_id", "boxes", "finding", "split", "mask", "x", "y", "w", "h")
_BOX = ("x", "y", "w", "h")


class ManifestDataModule(TableDataModule):
    """Images of one's own, from a CSV file or JSON lines with a row per phrase.

    Columns: `image` (a path below `root`) and `phrase`; as far as there are any, `id`, `patient_id` (splits are made by
    patient; each image its own without), `finding`, `split` (train, val or validation, test), and the ground truth in
    pixels of the image as a viewer shows it, upright: `boxes` as JSON `[[x0, y0, x1, y1], ...]`; or `x, y, w, h`, where
    rows of one phrase on one image (of one id, if there are ids) make one pair of several boxes; or `mask`, an image
    of the image's size whose connected parts, all that is not black (in JPEGs: above 127), give the boxes.

    Without the column `id`, ids are the images' paths, or digests of these where the patient's id is a part of them.

    Args:
        manifest: CSV with commas, semicolons or tabs, or JSON lines (`.jsonl`), UTF-8, also gzipped.
        root: Folder that paths start from and none leads out of, but by symbolic links that you put there; the
            manifest's own by default.
        columns: The file's names of columns, by ours: `{phrase: caption}`.
        kwargs: Arguments of `TableDataModule`.
    """

    def __init__(
        self,
        manifest: str,
        root: str | None = None,
        columns: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        unknown = [name for name in columns or {} if name not in REQUIRED + OPTIONAL]
        if unknown:
            raise ValueError(f"columns maps {unknown}; names here are {', '.join(REQUIRED + OPTIONAL)}.")
        self.manifest = Path(manifest)
        self.root = Path(root) if root is not None else self.manifest.parent
        self.columns = dict(columns or {})

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per row, or per group of rows with a box each."""
        rows, bad = read_table(self.manifest, self.columns, REQUIRED)
        present = {name for row in rows for name in row.cells}
        one_box = _one_box_per_row(present, self.manifest)
        pairs, wrong = parse_rows(rows, lambda row: self._pair(row, present))
        key_of = partial(self._key, present=present) if one_box else _own_key
        pairs, wrong = drop_broken(pairs, wrong, rows, key_of)
        if "id" not in present:
            pairs = with_ids(pairs, rows, self._name, key_of)
        wrong = flag_patient_leakage(pairs, wrong, rows, _owner)
        return with_image_findings(merge_boxes(pairs) if one_box else pairs), bad + wrong

    def _key(self, row: TableRow, present: set[str]) -> tuple[str, ...]:
        """What rows share whose boxes make one pair."""
        cells = row.cells
        if "id" in present:
            return (str(cells.get("id") or row.source),)
        return self._image(cells), fold(cells.get("phrase")), str(cells.get("finding") or "")

    def _image(self, cells: Mapping[str, Any]) -> str:
        """The path of a row's image from the root on, also where there is no such image."""
        path = Path(os.path.normpath(self.root / str(cells.get("image") or "").strip().replace("\\", "/")))
        return image_name(self.root, path)

    def _name(self, row: TableRow) -> str:
        """What ids of a row's image begin with: its path, or a digest of it where the patient's id is a part."""
        image = self._image(row.cells)
        if not _names_patient(image, str(row.cells.get("patient_id") or "").strip()):
            return image
        return hashlib.sha256(image.encode(errors="replace")).hexdigest()[:12]

    def _pair(self, row: TableRow, present: set[str]) -> ImageTextPair:
        """The pair of a row; its id is empty without a column for it.

        Raises:
            RuleError: The row breaks a rule.
            ValueError: The image is no readable image.
        """
        cells = row.cells
        path = find_image(self.root, text(cells, "image"))
        image = image_name(self.root, path)
        boxes, size = self._boxes(cells, path)
        return ImageTextPair(
            id=_needed(cells, "id", present),
            patient_id=_needed(cells, "patient_id", present) or image,
            image_id=image,
            image=str(path),
            phrase=check_phrase(text(cells, "phrase")),
            boxes=boxes,
            finding=text(cells, "finding"),
            split=split_name(text(cells, "split")) if "split" in present else "",
            size=size,
            source=row.source,
        )

    def _boxes(self, cells: dict[str, Any], path: Path) -> tuple[list[Box], tuple[int, int] | None]:
        """Boxes in pixels of the image, and its size if it has some."""
        boxes = boxes_of_json(cells.get("boxes")) + box_of_cells([cells.get(name) for name in _BOX])
        mask = text(cells, "mask")
        if not boxes and not mask:
            return [], None
        size = read_size(path)
        if mask:
            boxes += _mask_boxes(find_image(self.root, mask), mask, size)
        check_inside(boxes, size)
        return boxes, size


def merge_boxes(pairs: Sequence[ImageTextPair]) -> list[ImageTextPair]:
    """Pairs of one phrase on one image, and of one id, as one with all their boxes, in the place of the first.

    Phrases that differ by case and white space are one, spelt as in the first row.
    """
    groups: dict[tuple[str, ...], list[ImageTextPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.id, pair.image_id, fold(pair.phrase), pair.finding, pair.split, pair.patient_id].append(pair)
    return [
        replace(
            group[0],
            boxes=list(dict.fromkeys(box for pair in group for box in pair.boxes)),
            size=next((pair.size for pair in group if pair.size), None),
        )
        for group in groups.values()
    ]


def with_ids(
    pairs: Sequence[ImageTextPair],
    rows: Sequence[TableRow],
    name_of: Callable[[TableRow], str],
    key_of: Callable[[TableRow], Sequence[str]],
) -> list[ImageTextPair]:
    """The pairs with ids: the name of the image, and a number where an image has several, in the order of the rows.

    Bad rows count: when they are corrected, no other pair gets another id.

    Args:
        pairs: One per row that is right.
        rows: All rows.
        name_of: The name of a row's image.
        key_of: What rows of one pair share.
    """
    names = {row.source: name_of(row) for row in rows}
    images = set(names.values())
    last: dict[str, int] = {}
    ids: dict[tuple[str, ...], str] = {}
    places = {}
    for row in rows:
        name = names[row.source]
        key = (name, *key_of(row))
        if key not in ids:
            last[name] = _next_number(name, last.get(name, 0), images)
            ids[key] = f"{name}-{last[name]}" if last[name] > 1 else name
        places[row.source] = ids[key]
    return [replace(pair, id=places[pair.source]) for pair in pairs]


def _next_number(name: str, last: int, images: set[str]) -> int:
    """The next number of an image's pairs with which its id is not the name of another image."""
    return next(number for number in count(last + 1) if number == 1 or f"{name}-{number}" not in images)


def with_image_findings(pairs: Sequence[ImageTextPair]) -> list[ImageTextPair]:
    """The pairs, each knowing all findings of its image."""
    findings: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        findings[pair.image_id] |= {pair.finding} - {""}
    return [replace(pair, image_findings=tuple(sorted(findings[pair.image_id]))) for pair in pairs]


def _one_box_per_row(present: set[str], manifest: Path) -> bool:
    """Whether boxes stand in the columns `x, y, w, h`.

    Raises:
        ValueError: Some of these are missing.
    """
    missing = [name for name in _BOX if name not in present]
    if 0 < len(missing) < len(_BOX):
        raise ValueError(f"{manifest} has some of the columns x, y, w, h, but not {missing}; it has {sorted(present)}.")
    return not missing


def _needed(cells: dict[str, Any], name: str, present: set[str]) -> str:
    """A cell that may not be empty if there is a column for it."""
    cell = text(cells, name)
    if name in present and not cell:
        raise RuleError("", f"the {name} is missing")
    return cell


def _owner(row: TableRow) -> tuple[str, str]:
    """Patient and split of a row, empty where it names none."""
    split = text(row.cells, "split")
    return text(row.cells, "patient_id"), split_name(split) if split else ""


def _own_key(row: TableRow) -> tuple[str, ...]:
    """A key that no other row has."""
    return tuple(map(str, row.source))


def _names_patient(image: str, patient: str) -> bool:
    """Whether the path of an image contains its patient's id; a short id counts only as a whole word or number."""
    image, patient = image.lower(), patient.lower().lstrip("0") or patient
    words = {word.lstrip("0") or word for word in re.findall(r"\d+|[^\W\d_]+", image)}
    return patient in image if len(patient) > 3 else patient in words


def _mask_boxes(path: Path, name: str, size: tuple[int, int]) -> list[Box]:
    """The box of each connected part of a mask, which is what is not black; none of a black one.

    In JPEGs what is darker than half is noise.

    Raises:
        RuleError: The mask is of another size than its image, or a JPEG that has noise alone.
    """
    noisy = is_jpeg(path)
    levels = read_image(path).pixels if noisy else read_levels(path)
    if levels.shape != size:
        raise RuleError(name, f"the mask is {levels.shape[1]} x {levels.shape[0]} and its image {size[1]} x {size[0]}")
    marked = levels > (127 if noisy else 0)
    if noisy and levels.any() and not marked.any():
        raise RuleError(name, "the mask is a JPEG without a pixel above 127: save it as PNG")
    _, _, parts, _ = cv2.connectedComponentsWithStats(marked.astype("uint8"))
    return [(float(x), float(y), float(x + width), float(y + height)) for x, y, width, height, _ in parts[1:].tolist()]
