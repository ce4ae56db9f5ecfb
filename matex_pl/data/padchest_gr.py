"""PadChest-GR: sentences of reports with boxes of one or two readers, in the layout of the public distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.arguments import check_choices
from matex_pl.data.boxes import boxes_of_json, to_pixels
from matex_pl.data.images import GrayImage, read_size
from matex_pl.data.manifest import merge_boxes, with_ids, with_image_findings
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import Table, TableDataModule, TableRow, drop_broken, parse_rows, read_json_file, read_table
from matex_pl.data.transforms import ImageTransform
from matex_pl.data.validation import (
    BadRow,
    Box,
    RuleError,
    check_inside,
    check_phrase,
    find_by_stem,
    fold,
    images_by_stem,
    split_name,
    text,
)

REPORTS, MASTER_TABLE = "grounded_reports_*.json", "master_table.csv"
_LAYOUT = f"data.root must hold {REPORTS}, {MASTER_TABLE} and the images."
_TABLE_COLUMNS = ("ImageID", "PatientID", "split")
_PHOTOMETRIC = "PhotometricInterpretation_DICOM"
_BOX_KEYS = {"first": ("boxes",), "second": ("extra_boxes",), "both": ("boxes", "extra_boxes")}


class PadChestGrDataModule(TableDataModule):
    """PadChest-GR: one pair per sentence on an image, with its boxes.

    The set needs an account of BIMCV and is not part of this package. `root` holds `grounded_reports_20240819.json`,
    `master_table.csv` and the images, in any folder, as `.png` or `.jpg` of any size: boxes are shares of the image.
    Splits are those of the distribution. Equal sentences on one image make one pair. The finding of a pair is the first
    label of its sentence, and is empty for a sentence that states no abnormality.

    Args:
        root: Folder of the distribution.
        images: Folder of the images; `root` by default.
        language: Language of the sentences: `en` or `es`. The parser of MATEX reads English.
        readers: Boxes to use: those of the `first` reader, of the `second`, who saw some of the images, or of `both`.
        boxed_only: Whether to leave out sentences without a box, such as sentences without an abnormality.
        metadata_file: CSV with `ImageID` and `PhotometricInterpretation_DICOM`, as PadChest's
            `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv`, optionally gzipped; by default `master_table.csv`.
            The PNG files keep the stored values, so images of `MONOCHROME1` are inverted after reading.
        kwargs: Arguments of `TableDataModule`, except `fractions`.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        language: Literal["en", "es"] = "en",
        readers: Literal["first", "second", "both"] = "first",
        boxed_only: bool = False,
        metadata_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        # The master table names the split of each image, so there is no argument `fractions`.
        super().__init__(fractions=(1.0, 0.0, 0.0), **kwargs)
        check_choices(PadChestGrDataModule.__init__, locals())
        self.root = Path(root)
        self.images = Path(images) if images is not None else self.root
        self.language = language
        self.readers = readers
        self.boxed_only = boxed_only
        self.metadata_file = metadata_file
        self._inverted: set[str] = set()

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per sentence on an image.

        Raises:
            FileNotFoundError: A file of the distribution is missing.
            ValueError: A file cannot be read, or has another layout.
        """
        rows, unread, _ = read_reports(find_reports(self.root))
        table = self.root / MASTER_TABLE
        if not table.is_file():
            raise FileNotFoundError(f"{table} is missing. {_LAYOUT}")
        images, unread_table = read_master_table(table)
        self._inverted = self._find_inverted(images)
        files = images_by_stem(self.images)
        pairs, bad, self.row_warnings = parse_rows(rows, lambda row: self._pair(row, images, files))
        pairs, bad = drop_broken(pairs, bad, rows, self._key)
        pairs = with_image_findings(merge_boxes(with_ids(pairs, rows, _name, self._key)))
        return [pair for pair in pairs if pair.boxes or not self.boxed_only], unread + unread_table + bad

    def _key(self, row: TableRow) -> tuple[str, ...]:
        """Key of a sentence's pair: image, sentence and labels."""
        return _name(row), fold(row.cells.get(f"sentence_{self.language}")), str(row.cells.get("labels"))

    def _pair(
        self, row: TableRow, images: Mapping[str, Mapping[str, Any]], files: Mapping[str, list[Path]]
    ) -> ImageTextPair:
        cells = row.cells
        name = text(cells, "ImageID")
        path = find_by_stem(files, name)
        if name not in images:
            raise RuleError(name, f"the image is not in {MASTER_TABLE}")
        labels = _labels(cells)
        boxes = [box for key in _BOX_KEYS[self.readers] for box in boxes_of_json(cells.get(key))]
        size = read_size(path) if boxes else None
        return ImageTextPair(
            id="",
            patient_id=text(images[name], "PatientID"),
            image_id=path.stem,
            image=str(path),
            phrase=check_phrase(text(cells, f"sentence_{self.language}")),
            boxes=_in_image(boxes, size) if size else [],
            finding=labels[0] if labels else "",
            image_findings=tuple(labels),
            split=split_name(text(images[name], "split")),
            size=size,
            source=row.source,
        )

    def _find_inverted(self, images: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Ids of the images of MONOCHROME1; a warning if no table states it."""
        if self.metadata_file is not None:
            rows, _, _ = read_table(Path(self.metadata_file), {}, ("ImageID", _PHOTOMETRIC))
            images = {text(row.cells, "ImageID"): row.cells for row in rows}
        elif not any(_PHOTOMETRIC in cells for cells in images.values()):
            rank_zero_warn(
                f"{MASTER_TABLE} has no column {_PHOTOMETRIC}, so inverted images stay inverted. Give PadChest's own "
                "table as data.metadata_file."
            )
        return {Path(name).stem for name, cells in images.items() if text(cells, _PHOTOMETRIC) == "MONOCHROME1"}

    def read_image(self, pair: ImageTextPair) -> Any:
        """Pixels of an image, `(h, w)` uint8, with air in black."""
        pixels = super().read_image(pair)
        return 255 - pixels if pair.image_id in self._inverted else pixels

    def open_image(self, pair: ImageTextPair, transform: ImageTransform) -> GrayImage:
        """Image of a pair at the size that the transform needs, with air in black."""
        image = super().open_image(pair, transform)
        return replace(image, pixels=255 - image.pixels) if pair.image_id in self._inverted else image


def _in_image(boxes: list[Box], size: tuple[int, int]) -> list[Box]:
    boxes = to_pixels(boxes, size)
    check_inside(boxes, size)
    return boxes


def _labels(cells: Mapping[str, Any]) -> list[str]:
    """Labels of a sentence that states an abnormality; none of another sentence."""
    labels, abnormal = cells.get("labels") or [], cells.get("abnormal", False)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RuleError(labels, "the labels are no list of texts")
    if not isinstance(abnormal, bool):
        raise RuleError(abnormal, "abnormal is neither true nor false")
    return [" ".join(label.lower().split()) for label in labels if label.strip()] if abnormal else []


def _name(row: TableRow) -> str:
    return Path(str(row.cells.get("ImageID")).strip()).stem


def find_reports(root: Path) -> Path:
    """Path of the only file of grounded reports in `root`."""
    paths = sorted(root.glob(REPORTS))
    if not paths:
        raise FileNotFoundError(f"There is no {REPORTS} in {str(root)!r}. {_LAYOUT}")
    if len(paths) > 1:
        raise ValueError(f"{root} has several files of reports: {[path.name for path in paths]}. Leave one there.")
    return paths[0]


def read_reports(path: Path) -> Table:
    """Rows of the grounded reports, one per sentence, and bad rows; the source names the record and the sentence."""
    records = read_json_file(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} is no list of records with ImageID and findings. Give the file of PadChest-GR.")
    rows, bad = [], []
    for number, record in enumerate(records, start=1):
        place = f"{path}, record {number}"
        findings = record.get("findings") if isinstance(record, dict) and "ImageID" in record else None
        if not isinstance(findings, list) or not all(isinstance(finding, dict) for finding in findings):
            bad.append(BadRow(place, 0, str(record)[:200], "the record has no ImageID and list of findings"))
            continue
        for place_in, finding in enumerate(findings, start=1):
            source = (f"{place}, finding {place_in}", 0)
            rows.append(TableRow(source, {**finding, "ImageID": record["ImageID"]}))
    return Table(rows, bad, [])


def read_master_table(path: Path) -> tuple[dict[str, dict[str, Any]], list[BadRow]]:
    """The first row of each image, and the bad rows: malformed, or with another patient or split than the first."""
    rows, bad, _ = read_table(path, {}, _TABLE_COLUMNS)
    images: dict[str, dict[str, Any]] = {}
    for row in rows:
        first = images.setdefault(text(row.cells, "ImageID"), row.cells)
        other = [name for name in ("PatientID", "split") if row.cells.get(name) != first.get(name)]
        if other:
            # Ids of patients must not be logged.
            value = text(row.cells, "split") if other == ["split"] else ""
            bad.append(BadRow(*row.source, value, f"an earlier row of the image has another {' and '.join(other)}"))
    return images, bad
