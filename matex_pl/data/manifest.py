"""Custom data: any table with an image and a phrase in each row."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matex_pl.arguments import check_choices
from matex_pl.data.boxes import (
    BoxFormat,
    BoxUnit,
    RleFormat,
    box_of_cells,
    boxes_of_json,
    boxes_of_mask_file,
    boxes_of_polygons,
    boxes_of_rle,
    to_pixels,
)
from matex_pl.data.masks import MASK_COLUMN, ListedMasks, add_masks
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import (
    TableDataModule,
    TableRow,
    drop_broken,
    flag_patient_leakage,
    parse_rows,
    read_frontal_size,
    read_table,
)
from matex_pl.data.validation import (
    BadRow,
    Box,
    RuleError,
    check_inside,
    check_phrase,
    find_image,
    fold,
    image_name,
    split_name,
    text,
)

REQUIRED = ("image", "phrase")
OPTIONAL = ("id", "patient_id", "boxes", "finding", "split", "mask", "polygons", "rle", "x", "y", "w", "h")
_BOX = ("x", "y", "w", "h")


class ManifestDataModule(TableDataModule):
    """Custom images, from a CSV file or JSON lines with a row per phrase.

    The required columns are `image` (a path below `root`) and `phrase`. The optional columns are

    - `id`: unique id of the pair. Without this column, ids are the images' paths, or digests of paths that contain the
      patient's id;
    - `patient_id`: splits are made by patient. Without this column, splits are made by image;
    - `finding`: finding of the phrase;
    - `split`: train, val or validation, test;
    - `boxes`: JSON `[[x0, y0, x1, y1], ...]`, or another order of numbers by `box_format`;
    - `x, y, w, h`: one box per row. Rows of one phrase on one image (and of one id, if there are ids) make one pair
      with several boxes;
    - `polygons`: JSON `[[[x, y], ...], ...]`, or COCO's flat lists, with one box around each polygon;
    - `mask`: image of the same size, with one box around each connected part that is not black (in JPEGs: above 127);
    - `rle`: run-length encoded masks in the form `rle_format`, with one box around each connected part. Rows of one
      phrase on one image make one pair, as with `x, y, w, h`;
    - `mask_left_lung`, `mask_right_lung`, `mask_heart`, and `mask_` with any other name: mask of this structure of the
      image. A cell holds the path of an image file below `root`, or a run-length code: pairs of start and length, row
      by row from 1, or the JSON of COCO.

    Boxes, polygons and masks are in pixels of the upright image. With `box_unit: normalized`, boxes and polygons are
    shares of its width and height.

    Args:
        manifest: CSV file with commas, semicolons or tabs, or JSON lines (`.jsonl`), in UTF-8, optionally gzipped.
        root: Folder of the images; the manifest's folder by default. Only symbolic links may lead out of the folder.
        columns: Names of the file's columns by the names above: `{phrase: caption, mask_heart: heart}`.
        box_format: Order of the numbers in `boxes`: `xyxy` two corners, `xywh` a corner, width and height, `cxcywh` a
            center, width and height.
        box_unit: Unit of `boxes`, `x, y, w, h` and `polygons`: `pixels`, or `normalized` to [0, 1] of the image.
        rle_format: Form of `rle`: `coco` for JSON `{"size": [h, w], "counts": ...}` or a list of these, with plain or
            compressed counts; `siim` for the relative, column-major pairs of SIIM-ACR Pneumothorax, -1 for no mask.
        kwargs: Arguments of `TableDataModule`.
    """

    def __init__(
        self,
        manifest: str,
        root: str | None = None,
        columns: dict[str, str] | None = None,
        box_format: BoxFormat = "xyxy",
        box_unit: BoxUnit = "pixels",
        rle_format: RleFormat = "coco",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(ManifestDataModule.__init__, locals())
        known = REQUIRED + OPTIONAL
        unknown = [name for name in columns or {} if name not in known and not MASK_COLUMN.fullmatch(name)]
        if unknown:
            raise ValueError(f"columns maps {unknown}. Map only the names {', '.join(known)}, mask_<structure>.")
        self.manifest = Path(manifest)
        self.root = Path(root) if root is not None else self.manifest.parent
        self.columns = dict(columns or {})
        self.box_format = box_format
        self.box_unit = box_unit
        self.rle_format = rle_format
        self._listed_masks = ListedMasks(self.root)
        # The table's own masks come before those of `anatomy`.
        self.mask_sources.insert(0, self._listed_masks)

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per row, or per group of rows with a box each."""
        rows, unread, self.row_warnings = read_table(self.manifest, self.columns, REQUIRED)
        # A column without any value is no column.
        present = {name for row in rows for name, cell in row.cells.items() if cell is not None and str(cell).strip()}
        missing = [name for name in _BOX if name not in present]
        if 0 < len(missing) < len(_BOX):
            raise ValueError(
                f"{self.manifest} has some of the columns x, y, w, h, but not {missing}. The columns are "
                f"{sorted(present)}."
            )
        joins_rows = not missing or "rle" in present
        self._listed_masks.clear()
        pairs, bad, warnings = parse_rows(rows, lambda row: self._pair(row, present))
        self.row_warnings += warnings
        key_of = partial(self._key, present=present) if joins_rows else _row_key
        pairs, bad = drop_broken(pairs, bad, rows, key_of)
        if "id" not in present:
            pairs = with_ids(pairs, rows, self._name, key_of)
        bad = flag_patient_leakage(pairs, bad, rows, _patient_and_split)
        return with_image_findings(merge_boxes(pairs) if joins_rows else pairs), unread + bad

    def _key(self, row: TableRow, present: set[str]) -> tuple[str, ...]:
        """Key of the pair to which a row's box belongs."""
        cells = row.cells
        if "id" in present:
            return (str(cells.get("id") or row.source),)
        return self._image(cells), fold(cells.get("phrase")), str(cells.get("finding") or "")

    def _image(self, cells: Mapping[str, Any]) -> str:
        """Path of a row's image relative to the root, whether or not the file exists."""
        path = Path(os.path.normpath(self.root / str(cells.get("image") or "").strip().replace("\\", "/")))
        return image_name(self.root, path)

    def _name(self, row: TableRow) -> str:
        """Start of the ids on a row's image: the path, or a digest of the path if it contains the patient's id."""
        image = self._image(row.cells)
        if not _names_patient(image, str(row.cells.get("patient_id") or "").strip()):
            return image
        return hashlib.sha256(image.encode(errors="replace")).hexdigest()[:12]

    def _pair(self, row: TableRow, present: set[str]) -> ImageTextPair:
        """The pair of a row; the id is empty without a column `id`."""
        cells = row.cells
        path = find_image(self.root, text(cells, "image"))
        image = image_name(self.root, path)
        boxes, size = self._boxes(row, path)
        warnings, size = add_masks(self._listed_masks, row, path, size)
        self.row_warnings += warnings
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

    def _boxes(self, row: TableRow, path: Path) -> tuple[list[Box], tuple[int, int] | None]:
        """Boxes in pixels of the image, and the size of the image if there are boxes or a mask."""
        cells = row.cells
        boxes = boxes_of_json(cells.get("boxes"), self.box_format) + box_of_cells([cells.get(name) for name in _BOX])
        boxes += boxes_of_polygons(cells.get("polygons"))
        mask, rle = text(cells, "mask"), cells.get("rle")
        if not boxes and not mask and not rle:
            return [], None
        size, warnings = read_frontal_size(path, row.source)
        self.row_warnings += warnings
        if self.box_unit == "normalized":
            boxes = to_pixels(boxes, size)
        if mask:
            boxes += boxes_of_mask_file(find_image(self.root, mask), mask, size)
        boxes += boxes_of_rle(rle, size, self.rle_format)
        check_inside(boxes, size)
        return boxes, size


def merge_boxes(pairs: Sequence[ImageTextPair]) -> list[ImageTextPair]:
    """The pairs, merged by image, phrase and id: the first of each group gets all boxes of the group.

    Case and white space do not distinguish phrases.
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
    """The pairs with ids: the name of the image, with a number from the image's second pair (by key) on.

    Numbers follow the order of all rows, including bad rows, so correcting a row does not change other ids.
    """
    names = {row.source: name_of(row) for row in rows}
    images = set(names.values())
    last: dict[str, int] = {}
    ids: dict[tuple[str, ...], str] = {}
    id_of = {}
    for row in rows:
        name = names[row.source]
        key = (name, *key_of(row))
        if key not in ids:
            number = last.get(name, 0) + 1
            # An id must not be the name of another image.
            while number > 1 and f"{name}-{number}" in images:
                number += 1
            last[name] = number
            ids[key] = f"{name}-{number}" if number > 1 else name
        id_of[row.source] = ids[key]
    return [replace(pair, id=id_of[pair.source]) for pair in pairs]


def with_image_findings(pairs: Sequence[ImageTextPair]) -> list[ImageTextPair]:
    """The pairs, each with all findings of its image: of its phrases, and listed in `image_findings` already."""
    findings: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        findings[pair.image_id] |= {pair.finding, *pair.image_findings} - {""}
    return [replace(pair, image_findings=tuple(sorted(findings[pair.image_id]))) for pair in pairs]


def _needed(cells: dict[str, Any], name: str, present: set[str]) -> str:
    """Text of a cell; RuleError if the cell is empty and its column exists."""
    cell = text(cells, name)
    if name in present and not cell:
        raise RuleError("", f"the {name} is missing")
    return cell


def _patient_and_split(row: TableRow) -> tuple[str, str]:
    split = text(row.cells, "split")
    return text(row.cells, "patient_id"), split_name(split) if split else ""


def _row_key(row: TableRow) -> tuple[str, ...]:
    return tuple(map(str, row.source))


def _names_patient(image: str, patient: str) -> bool:
    """Whether an image's path contains its patient's id; ids of up to three characters count only as whole words."""
    image, patient = image.lower(), patient.lower().lstrip("0") or patient
    words = {word.lstrip("0") or word for word in re.findall(r"\d+|[^\W\d_]+", image)}
    return patient in image if len(patient) > 3 else patient in words
