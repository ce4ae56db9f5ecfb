"""NIH ChestX-ray14 with its radiologists' boxes, in the layout of the public distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.data.datamodule import split_patients
from matex_pl.data.images import read_size
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import TableDataModule, TableRow, read_table
from matex_pl.data.templates import label_phrase
from matex_pl.data.validation import (
    BadRow,
    Box,
    RowWarning,
    RuleError,
    check_overlap,
    odd_view,
    pair_warnings,
    place_of,
    text,
)

BOX_FILE, LABEL_FILE = "BBox_List_2017.csv", "Data_Entry_2017_v2020.csv"
_LABEL_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
_VIEW_COLUMN = "View Position"
# The box file's header is `Image Index,Finding Label,Bbox [x,y,w,h],,,`: brackets become part of the names.
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
BOX_FRAME = 1024
"""Side in pixels of the frame of the distribution's boxes."""

NO_FINDING = "No Finding"
# The box file writes Infiltrate where the label file writes Infiltration.
_NAMES = {
    "Effusion": "pleural effusion",
    "Infiltrate": "infiltration",
    "Pleural_Thickening": "pleural thickening",
    "Mass": "lung mass",
    "Nodule": "lung nodule",
    "Hernia": "hiatal hernia",
}
_WITHOUT_SIDE = {"cardiomegaly"}


Boxes = dict[str, dict[str, list[Box]]]


class BadBox(NamedTuple):
    """A bad row of the box file, and the image and the finding whose box it holds; both are empty if unknown."""

    row: BadRow
    pair: tuple[str, str]


class NihDataModule(TableDataModule):
    """The NIH images: one pair per image and label, with a box where a radiologist drew one.

    There are no reports: templates turn the label into a phrase. `root` holds `BBox_List_2017.csv`,
    `Data_Entry_2017_v2020.csv` and `images/`. Images are searched in all folders below `root`, as `.png` or `.jpg` of
    any size, and matched by stem. Rows without an image are left out and counted. Splits are made by patient. A bad row
    of the box file makes the pairs of its image and label bad too.

    Args:
        root: Folder of the distribution.
        boxed_only: Whether to leave out images without a box, and labels without a box on images that have boxes.
        name_side: Whether phrases name the side of the box. The phrase then reveals where the box is: report results
            with and without.
        kwargs: Arguments of `TableDataModule`.
    """

    # Boxes refer to the stored pixels.
    apply_exif_orientation = False

    def __init__(
        self,
        root: str,
        boxed_only: bool = False,
        name_side: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.boxed_only = boxed_only
        self.name_side = name_side

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per image and label.

        Raises:
            FileNotFoundError: A CSV file is missing, or no image of it is below `root`.
            ValueError: A file cannot be read, or lacks a column.
        """
        labels, bad = read_labels(self.root / LABEL_FILE)
        boxes, bad_boxes = read_boxes(self.root / BOX_FILE)
        paths = sorted(self.root.rglob("*"))
        files = {path.stem: path for path in paths if path.suffix.lower() in {".png", ".jpg", ".jpeg"}}
        rows = [row for row in labels if row["image"] in files]
        if not rows:
            raise FileNotFoundError(
                f"None of the {len(labels)} images of {LABEL_FILE} is below {self.root} as .png or .jpg. "
                "Unpack the distribution's images there, or set data.root to the folder that holds both CSV files."
            )
        if len(rows) < len(labels):
            missing = len(labels) - len(rows)
            rank_zero_warn(
                f"{missing} of {len(labels)} images of {LABEL_FILE} are not below {self.root} and are left out."
            )
        broken = {pair: place_of((row.file, row.line)) for row, pair in reversed(bad_boxes)}
        splits = split_patients((row["patient"] for row in rows), self.fractions, self.seed)
        pairs: list[ImageTextPair] = []
        for row in rows:
            try:
                of_row = list(self._pairs_of(row, boxes, files[row["image"]], splits[row["patient"]]))
            except (OSError, ValueError) as error:
                file, line = row["source"]
                bad.append(BadRow(file, line, row["image"], str(error)))
                continue
            for pair in of_row:
                if place := broken.get((pair.image_id, pair.finding)):
                    bad.append(BadRow(*pair.source, "", f"a box of the pair is bad: {place}"))
                else:
                    pairs.append(pair)
            view = odd_view(row["view"])
            if view:
                file, line = row["source"]
                self.row_warnings.append(RowWarning(file, line, view, "view"))
        self.row_warnings += pair_warnings(pairs)
        return pairs, [*bad, *(row for row, _ in bad_boxes)]

    def _pairs_of(self, row: dict[str, Any], all_boxes: Boxes, path: Path, split: str) -> Iterator[ImageTextPair]:
        image, boxes = row["image"], all_boxes.get(row["image"], {})
        named = sorted({finding_name(label) for label in row["labels"] if label != NO_FINDING} | boxes.keys())
        findings = [finding for finding in named if finding in boxes] if self.boxed_only else named or [""]
        size = read_size(path, apply_exif_orientation=False) if boxes else None
        y, x = (size[0] / BOX_FRAME, size[1] / BOX_FRAME) if size else (0.0, 0.0)
        for finding in findings:
            drawn = boxes.get(finding, [])
            yield ImageTextPair(
                id=f"{image}-{finding.replace(' ', '_') or 'normal'}",
                patient_id=row["patient"],
                image_id=image,
                image=str(path),
                phrase=self._phrase(image, finding, drawn),
                boxes=[(x0 * x, y0 * y, x1 * x, y1 * y) for x0, y0, x1, y1 in drawn],
                finding=finding,
                image_findings=tuple(named),
                split=split,
                size=size,
                source=row["source"],
            )

    def _phrase(self, image: str, finding: str, boxes: list[Box]) -> str:
        """A sentence about the finding, whose boxes are in the 1024 x 1024 frame."""
        side = side_word(boxes) if self.name_side and finding and finding not in _WITHOUT_SIDE else ""
        return label_phrase(finding, image, self.seed, side)


def finding_name(label: str) -> str:
    """The distribution's label in the words of a report."""
    return _NAMES.get(label, label.lower().replace("_", " "))


def read_labels(path: Path) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """Rows of the label file, and its bad rows.

    A row has `image`, `patient`, `labels`, `view` (empty without the column) and `source`.
    """
    table, bad = _rows(path, _LABEL_COLUMNS)
    rows = []
    for row, (image, labels, patient) in table:
        if image and labels and patient:
            kept = {"image": Path(image).stem, "patient": patient, "labels": labels.split("|")}
            rows.append({**kept, "view": text(row.cells, _VIEW_COLUMN), "source": row.source})
        else:
            cells = dict(zip(_LABEL_COLUMNS, (image, labels, patient), strict=True))
            missing = [name for name, cell in cells.items() if not cell]
            bad.append(BadRow(*row.source, image, f"the cell of {', '.join(missing)} is empty"))
    return rows, bad


def read_boxes(path: Path) -> tuple[Boxes, list[BadBox]]:
    """Boxes by image and finding, `(x0, y0, x1, y1)` in pixels of the 1024 x 1024 frame, and the bad rows."""
    table, unread = _rows(path, _BOX_COLUMNS)
    boxes: Boxes = {}
    bad = [BadBox(row, ("", "")) for row in unread]
    for row, (image, label, *cells) in table:
        pair = Path(image).stem, finding_name(label)
        try:
            box = _box(cells)
        except RuleError as error:
            bad.append(BadBox(error.at(row.source), pair))
        else:
            boxes.setdefault(pair[0], {}).setdefault(pair[1], []).append(box)
    return boxes, bad


def _box(cells: Sequence[str]) -> Box:
    try:
        x, y, width, height = (float(cell) for cell in cells)
    except ValueError:
        raise RuleError(list(cells), "the box is not four numbers x, y, w, h") from None
    if not (np.isfinite([x, y, width, height]).all() and width > 0 and height > 0):
        raise RuleError(list(cells), "the box has no positive, finite size")
    box = (x, y, x + width, y + height)
    check_overlap(box, (BOX_FRAME, BOX_FRAME))
    return box


def _rows(path: Path, columns: Sequence[str]) -> tuple[list[tuple[TableRow, list[str]]], list[BadRow]]:
    """Rows, each with its cells of the named columns, where missing cells are empty; and the malformed rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. data.root must hold {LABEL_FILE}, {BOX_FILE} and images/.")
    rows, bad, _ = read_table(path, {}, columns)
    return [(row, [text(row.cells, name) for name in columns]) for row in rows], bad


def side_word(boxes: list[Box]) -> str:
    """The patient's side of boxes in the 1024 x 1024 frame: the patient's right is on the left of the image."""
    sides = {"right" if (x0 + x1) / 2 < BOX_FRAME / 2 else "left" for x0, _, x1, _ in boxes}
    return "bilateral" if len(sides) == 2 else "".join(sides)
