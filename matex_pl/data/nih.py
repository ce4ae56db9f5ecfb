"""NIH ChestX-ray14 with its radiologists' boxes, in the layout of the public distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.data.datamodule import ImageFilesDataModule, check_fractions, split_patients
from matex_pl.data.images import read_size
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import TableRow, read_table
from matex_pl.data.validation import Box, RowWarning, RuleError, check_overlap, odd_view, place_of, text

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
_TEMPLATES = (
    "{}.",
    "There is {}.",
    "Findings consistent with {}.",
    "Frontal chest radiograph with {}.",
    "Evidence of {}.",
)
_WITHOUT_SIDE = {"cardiomegaly"}
_NORMAL = ("No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "The lungs are clear.")


class NihDataModule(ImageFilesDataModule):
    """The NIH images: one pair per image and label, with a box where a radiologist drew one.

    There are no reports: templates turn the label into a phrase. `root` holds `BBox_List_2017.csv`,
    `Data_Entry_2017_v2020.csv` and `images/`. Images are searched in all folders below `root`, as `.png` or `.jpg` of
    any size, and matched by stem. Rows without an image are left out and counted. Splits are made by patient.

    Args:
        root: Folder of the distribution.
        boxed_only: Whether to leave out images without a box, and labels without a box on images that have boxes.
        name_side: Whether phrases name the side of the box. The phrase then reveals where the box is: report results
            with and without.
        fractions: Shares of the patients in train, val and test.
        kwargs: Arguments of `ImageFilesDataModule`.
    """

    # Boxes refer to the stored pixels.
    apply_exif_orientation = False

    def __init__(
        self,
        root: str,
        boxed_only: bool = False,
        name_side: bool = False,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_fractions(fractions)
        self.root = Path(root)
        self.boxed_only = boxed_only
        self.name_side = name_side
        self.fractions = fractions
        self._view_warnings: list[RowWarning] = []

    def list_pairs(self) -> list[ImageTextPair]:
        """One pair per image and label.

        Raises:
            FileNotFoundError: A CSV file is missing, or no image of it is below `root`.
            ValueError: A row cannot be read, or a box covers nothing of its image; the message names file and line.
        """
        labels, boxes = read_labels(self.root / LABEL_FILE), read_boxes(self.root / BOX_FILE)
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
        self._view_warnings = [
            RowWarning(row["source"][0], row["source"][1], view, "view")
            for row in rows
            if (view := odd_view(row["view"]))
        ]
        splits = split_patients((row["patient"] for row in rows), self.fractions, self.seed)
        return [
            pair
            for row in rows
            for pair in self._pairs_of(row, boxes.get(row["image"], {}), files[row["image"]], splits[row["patient"]])
        ]

    def list_warnings(self, pairs: Sequence[ImageTextPair]) -> list[RowWarning]:
        """Warnings about the pairs, and about views that are not frontal."""
        return [*super().list_warnings(pairs), *self._view_warnings]

    def _pairs_of(
        self, row: dict[str, Any], boxes: dict[str, list[Box]], path: Path, split: str
    ) -> Iterator[ImageTextPair]:
        image = row["image"]
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
        rng = np.random.default_rng([self.seed, *f"{image}/{finding}".encode()])
        if not finding:
            return str(rng.choice(_NORMAL))
        side = side_word(boxes) if self.name_side and finding not in _WITHOUT_SIDE else ""
        phrase = str(rng.choice(_TEMPLATES)).format(f"{side} {finding}".strip())
        return phrase[0].upper() + phrase[1:]


def finding_name(label: str) -> str:
    """The distribution's label in the words of a report."""
    return _NAMES.get(label, label.lower().replace("_", " "))


def read_labels(path: Path) -> list[dict[str, Any]]:
    """Rows of the label file: `image`, `patient`, `labels`, `view` (empty without the column) and `source`."""
    rows = []
    for row, (image, labels, patient) in _rows(path, _LABEL_COLUMNS):
        if not (image and labels and patient):
            cells = dict(zip(_LABEL_COLUMNS, (image, labels, patient), strict=True))
            raise ValueError(f"{place_of(row.source)}: A cell is empty in {cells}. Fill the cell, or remove the row.")
        kept = {"image": Path(image).stem, "patient": patient, "labels": labels.split("|")}
        rows.append({**kept, "view": text(row.cells, _VIEW_COLUMN), "source": row.source})
    return rows


def read_boxes(path: Path) -> dict[str, dict[str, list[Box]]]:
    """Boxes by image and finding, `(x0, y0, x1, y1)` in pixels of the 1024 x 1024 frame."""
    boxes: dict[str, dict[str, list[Box]]] = {}
    for row, (image, label, *cells) in _rows(path, _BOX_COLUMNS):
        place = place_of(row.source)
        try:
            x, y, width, height = (float(cell) for cell in cells)
        except ValueError:
            raise ValueError(f"{place}: The box {cells} is not four numbers x, y, w, h. Correct the row.") from None
        if not (np.isfinite([x, y, width, height]).all() and width > 0 and height > 0):
            raise ValueError(f"{place}: The box {cells} has no positive, finite size. Correct the row.")
        try:
            check_overlap((x, y, x + width, y + height), (BOX_FRAME, BOX_FRAME))
        except RuleError as error:
            raise ValueError(f"{error.at(row.source)}. Correct the row.") from None
        of_image = boxes.setdefault(Path(image).stem, {})
        of_image.setdefault(finding_name(label), []).append((x, y, x + width, y + height))
    return boxes


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[TableRow, list[str]]]:
    """Rows, each with its cells of the named columns; missing cells are empty."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. data.root must hold {LABEL_FILE}, {BOX_FILE} and images/.")
    rows, bad, _ = read_table(path, {}, columns)
    if bad:
        raise ValueError(f"{bad[0]}.")
    yield from ((row, [text(row.cells, name) for name in columns]) for row in rows)


def side_word(boxes: list[Box]) -> str:
    """The patient's side of boxes in the 1024 x 1024 frame: the patient's right is on the left of the image."""
    sides = {"right" if (x0 + x1) / 2 < BOX_FRAME / 2 else "left" for x0, _, x1, _ in boxes}
    return "bilateral" if len(sides) == 2 else "".join(sides)
