"""ChestX-Det and ChestX-Det10: boxes on images of NIH ChestX-ray14, in the layout of the public distributions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.data.boxes import boxes_of_json
from matex_pl.data.images import read_size
from matex_pl.data.ms_cxr import scale_boxes
from matex_pl.data.nih import finding_name
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import Table, TableDataModule, TableRow, check_val_share, hold_out, parse_rows, read_json_file
from matex_pl.data.templates import label_phrase
from matex_pl.data.validation import BadRow, RuleError, find_by_stem, images_by_stem, text

FRAME = (1024, 1024)
"""Height and width in pixels of the frame of the distribution's boxes."""

LABELS = (
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "Diffuse Nodule",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Fracture",
    "Mass",
    "Nodule",
    "Pleural Thickening",
    "Pneumothorax",
)
"""The labels of ChestX-Det; ChestX-Det10 has ten of them."""

_FINDINGS = {label: finding_name(label) for label in LABELS} | {"Diffuse Nodule": "diffuse lung nodularity"}
_FILES = ("ChestX_Det_{}.json", "{}.json")
# Names of NIH ChestX-ray14 begin with the patient.
_NIH_NAME = re.compile(r"(\d{8})_\d{3}")


class ChestXDetDataModule(TableDataModule):
    """ChestX-Det: one pair per label on an image, with its boxes, and one per image without a label.

    `root` holds `ChestX_Det_train.json` and `ChestX_Det_test.json`, or `train.json` and `test.json` of ChestX-Det10,
    and the images in any folder, as `.png` or `.jpg` of any size: boxes are in a frame of 1024 x 1024. There are no
    reports: templates turn the label into a phrase. Polygons are not read, because the set has a box for each of them.
    The training images are divided into train and val by the patients of NIH ChestX-ray14, or by image if their names
    are not those of NIH.

    Args:
        root: Folder of the distribution.
        images: Folder of the images; `root` by default.
        val_share: Share of the training patients that are held out for validation.
        boxed_only: Whether to leave out images without a box.
        kwargs: Arguments of `TableDataModule`, except `fractions`.
    """

    # Boxes refer to the stored pixels.
    apply_exif_orientation = False

    def __init__(
        self,
        root: str,
        images: str | None = None,
        val_share: float = 0.1,
        boxed_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(fractions=(1.0, 0.0, 0.0), **kwargs)
        check_val_share(val_share)
        self.root = Path(root)
        self.images = Path(images) if images is not None else self.root
        self.val_share = val_share
        self.boxed_only = boxed_only

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per label on an image, and per image without a label.

        Raises:
            FileNotFoundError: There is no file of annotations.
            ValueError: A file has another layout.
        """
        paths = {split: find_annotations(self.root, split) for split in ("train", "test")}
        if not any(paths.values()):
            raise FileNotFoundError(
                f"{self.root / _FILES[0].format('train')} is missing. data.root must hold the JSON files of ChestX-Det "
                "and the images."
            )
        tables = []
        for split, path in paths.items():
            if path is None:
                rank_zero_warn(f"{self.root / _FILES[0].format(split)} is missing, so there are no {split} images.")
            else:
                tables.append(read_annotations(path, split))
        files = images_by_stem(self.images)
        rows = [row for table in tables for row in table.rows if row.cells["boxes"] or not self.boxed_only]
        pairs, bad, self.row_warnings = parse_rows(rows, lambda row: self._pair(row, files))
        splits = hold_out((pair.patient_id for pair in pairs if pair.split == "train"), self.val_share, self.seed)
        pairs = [replace(pair, split=splits[pair.patient_id]) if pair.split == "train" else pair for pair in pairs]
        return pairs, [row for table in tables for row in table.bad] + bad

    def _pair(self, row: TableRow, files: Mapping[str, list[Path]]) -> ImageTextPair:
        cells = row.cells
        label, name = cells["label"], text(cells, "file_name")
        if label and label not in LABELS:
            raise RuleError(label, f"the label is none of {', '.join(LABELS)}")
        path = find_by_stem(files, name)
        boxes = boxes_of_json(cells["boxes"])
        size = read_size(path, apply_exif_orientation=False) if boxes else None
        patient = _NIH_NAME.fullmatch(path.stem)
        finding = _FINDINGS.get(label, "")
        return ImageTextPair(
            id=f"{path.stem}-{finding.replace(' ', '_') or 'normal'}",
            patient_id=patient[1] if patient else path.stem,
            image_id=path.stem,
            image=str(path),
            phrase=label_phrase(finding, path.stem, self.seed),
            boxes=scale_boxes(boxes, FRAME, size) if size else [],
            finding=finding,
            image_findings=tuple(sorted(_FINDINGS.get(name, name) for name in cells["labels"])),
            split=cells["split"],
            size=size,
            source=row.source,
        )


def find_annotations(root: Path, split: str) -> Path | None:
    """Path of the annotations of a split, of ChestX-Det or else of ChestX-Det10; None if there is neither."""
    return next((path for name in _FILES if (path := root / name.format(split)).is_file()), None)


def read_annotations(path: Path, split: str) -> Table:
    """Rows of a file of annotations, one per label on an image, and bad rows; the source names the record.

    The cells are `file_name`, `label` (empty for an image without one), `boxes`, `labels` (all of the image), `split`.
    """
    records = read_json_file(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} is no list of records with file_name, syms and boxes. Give the file of ChestX-Det.")
    rows, bad = [], []
    for number, record in enumerate(records, start=1):
        place = f"{path}, record {number}"
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        labels, boxes = fields.get("syms"), fields.get("boxes")
        if (
            not isinstance(labels, list)
            or not isinstance(boxes, list)
            or "file_name" not in fields
            or not all(isinstance(label, str) for label in labels)
        ):
            bad.append(BadRow(place, 0, str(record)[:200], "the record has no file_name, syms and boxes"))
        elif len(labels) != len(boxes):
            value = f"{len(labels)} syms, {len(boxes)} boxes"
            bad.append(BadRow(place, 0, value, "the numbers of syms and boxes differ"))
        else:
            for label in dict.fromkeys(labels or [""]):
                drawn = [box for name, box in zip(labels, boxes, strict=True) if name == label]
                cells = {"label": label, "boxes": drawn, "labels": sorted(set(labels)), "split": split}
                source = (f"{place}, {label}" if label else place, 0)
                rows.append(TableRow(source, {**cells, "file_name": fields["file_name"]}))
    return Table(rows, bad, [])
