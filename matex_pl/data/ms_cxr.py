"""MS-CXR on MIMIC-CXR-JPG: phrases of reports with radiologists' boxes, in the layout of the public distributions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.arguments import check_choices
from matex_pl.data.boxes import box_of_cells
from matex_pl.data.manifest import merge_boxes, with_ids, with_image_findings
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import (
    Table,
    TableDataModule,
    TableRow,
    drop_broken,
    flag_patient_leakage,
    parse_rows,
    read_frontal_size,
    read_json,
    read_table,
    read_text,
)
from matex_pl.data.validation import (
    SPLIT_NAMES,
    BadRow,
    Box,
    RowWarning,
    RuleError,
    aspect_differs,
    check_inside,
    check_phrase,
    fill_splits,
    find_image,
    fold,
    odd_view,
    split_name,
    text,
)

ANNOTATIONS = "MS_CXR_Local_Alignment_*"
SPLIT_FILE, METADATA_FILE = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
COLUMNS = ("category_name", "label_text", "path", "x", "y", "w", "h", "dicom_id", "image_width", "image_height")
_PATIENT = re.compile(r"(?:^|/)p(\d+)/s\d+/")
# Down-sized copies may be of another kind.
_SUFFIXES = (".jpg", ".png", ".jpeg", ".dcm")


class MsCxrDataModule(TableDataModule):
    """MS-CXR 1.0 and 1.1: one pair per phrase and category on an image, with all of its boxes.

    MS-CXR and MIMIC-CXR-JPG need a credentialed account and are not part of this package. `root` is the folder of
    MIMIC-CXR-JPG and holds `files/p10/p10000032/s50414267/....jpg` (or starts at `p10/`). The images may be down-sized
    copies: boxes are scaled by the file's size over `image_width` and `image_height`. The patient is read from the
    path.

    Args:
        root: Folder of the images.
        annotations: CSV or COCO-style JSON of MS-CXR; by default the only `MS_CXR_Local_Alignment_*` in `root`.
        split_file: MIMIC's `mimic-cxr-2.0.0-split.csv`, optionally gzipped. Its splits override those of MS-CXR; a
            warning names the phrases whose split changes.
        metadata_file: MIMIC's `mimic-cxr-2.0.0-metadata.csv`, optionally gzipped; by default the file of this name in
            `root`, if there is one. Its view positions give warnings about images that are not frontal.
        splits: `file` takes the splits of the files, and draws missing ones by patient; `patients` draws all.
        kwargs: Arguments of `TableDataModule`.
    """

    def __init__(
        self,
        root: str,
        annotations: str | None = None,
        split_file: str | None = None,
        metadata_file: str | None = None,
        splits: Literal["file", "patients"] = "file",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(MsCxrDataModule.__init__, locals())
        if splits == "patients" and split_file is not None:
            raise ValueError("splits: patients draws the splits. Leave split_file out, or set splits: file.")
        self.root = Path(root)
        self.annotations = annotations
        self.split_file = split_file
        self.metadata_file = metadata_file
        self.splits = splits

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per phrase and category on an image."""
        path = find_annotations(self.root, self.annotations)
        rows, unread, self.row_warnings = read_coco(path) if path.suffix == ".json" else read_table(path, {}, COLUMNS)
        official = read_splits(Path(self.split_file)) if self.split_file else None
        views = self._views()
        pairs, bad, warnings = parse_rows(rows, lambda row: self._pair(row, official))
        odd = ((pair, odd_view(views.get(pair.image_id, ""))) for pair in pairs)
        self.row_warnings += [*warnings, *(RowWarning(*pair.source, view, "view") for pair, view in odd if view)]
        pairs, bad = drop_broken(fill_splits(pairs), bad, rows, _key)
        bad = flag_patient_leakage(pairs, bad, rows, lambda row: self._patient_and_split(row.cells, official))
        pairs = merge_boxes(with_ids(pairs, rows, _image, _key))
        if official is not None:
            _warn_of_other_splits(pairs, {_image(row): str(row.cells.get("split") or "").strip() for row in rows})
        return with_image_findings(pairs), unread + bad

    def _views(self) -> Mapping[str, str]:
        """View position of each image in MIMIC's metadata; empty without the file."""
        path = Path(self.metadata_file) if self.metadata_file else plain_or_gzipped(self.root / METADATA_FILE)
        return read_views(path)[0] if self.metadata_file or path.is_file() else {}

    def _pair(self, row: TableRow, official: Mapping[str, str] | None) -> ImageTextPair:
        cells = row.cells
        path, image = find_mimic_image(self.root, text(cells, "path")), text(cells, "dicom_id")
        size, warnings = read_frontal_size(path, row.source)
        self.row_warnings += warnings
        boxes = scale_boxes(
            box_of_cells([cells.get(name) for name in "xywh"]),
            (cells.get("image_height"), cells.get("image_width")),
            size,
        )
        annotated = float(cells["image_height"]), float(cells["image_width"])
        if aspect_differs(annotated, size):
            value = f"{annotated[1]:g} x {annotated[0]:g}, and the file {size[1]} x {size[0]}"
            self.row_warnings.append(RowWarning(*row.source, value, "annotated size"))
        if not image:
            raise RuleError("", "the dicom_id is missing")
        patient, split = self._patient_and_split(cells, official)
        return ImageTextPair(
            id="",
            patient_id=patient,
            image_id=image,
            image=str(path),
            phrase=check_phrase(text(cells, "label_text")),
            boxes=boxes,
            finding=text(cells, "category_name").lower(),
            split=split,
            size=size,
            source=row.source,
        )

    def _patient_and_split(self, cells: Mapping[str, Any], official: Mapping[str, str] | None) -> tuple[str, str]:
        """Patient and split of a row; the split is empty if it is to be drawn."""
        image, path = text(cells, "dicom_id"), text(cells, "path")
        patient = _PATIENT.search(path)
        if patient is None:
            raise RuleError(path, "the path names no patient and study as in files/p10/p10000032/s50414267/")
        if official is not None and image not in official:
            raise RuleError(image, f"the image is not in {self.split_file}")
        annotated = text(cells, "split") if self.splits == "file" else ""
        split = official[image] if official is not None else annotated
        return patient[1], split_name(split) if split else ""


def _key(row: TableRow) -> tuple[str, ...]:
    """Key of a row's pair: image, phrase and category."""
    return _image(row), fold(row.cells.get("label_text")), fold(row.cells.get("category_name"))


def _image(row: TableRow) -> str:
    return str(row.cells.get("dicom_id")).strip()


def find_annotations(root: Path, given: str | None) -> Path:
    """Path of the annotations: the given file, or else the only one in `root`, where CSV comes before JSON."""
    if given is not None:
        return Path(given)
    for suffix in (".csv", ".json"):
        paths = sorted(root.glob(ANNOTATIONS + suffix))
        if len(paths) > 1:
            raise ValueError(
                f"{root} has several MS-CXR files: {[path.name for path in paths]}. Choose one with data.annotations."
            )
        if paths:
            return paths[0]
    raise FileNotFoundError(
        f"There is no {ANNOTATIONS} (.csv or .json) in {str(root)!r}. Copy the file there, or give data.annotations."
    )


def read_coco(path: Path) -> Table:
    """Rows of the COCO-style JSON with the CSV's column names, and bad rows; the source names the annotation.

    The file may have several records of an image. Annotations refer to records by id; the path identifies the image.
    """
    try:
        content = read_json(read_text(path))
        categories = {record["id"]: str(record["name"]) for record in content["categories"]}
        images = {record["id"]: record for record in content["images"]}
        annotations = list(content["annotations"])
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeEncodeError) as error:
        line = f" The JSON ends or breaks in line {error.lineno}." if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"{path} is no COCO-style JSON with `categories`, `images` and `annotations`.{line} Give the JSON or CSV "
            "file of MS-CXR."
        ) from error
    rows, bad = [], []
    for number, annotation in enumerate(annotations):
        source = (f"{path}, annotation {number}", 0)
        try:
            rows.append(TableRow(source, _annotation_cells(annotation, images[annotation["image_id"]], categories)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(BadRow(*source, str(annotation)[:200], f"the annotation has no {error}"))
    return Table(rows, bad, [])


def _annotation_cells(annotation: Any, image: Any, categories: Mapping[Any, str]) -> dict[str, Any]:
    box = annotation.get("bbox")
    # Other values are reported later, with the other faults of the row.
    x, y, width, height = box if isinstance(box, list) and len(box) == 4 else ([box], None, None, None)
    return {
        "category_name": categories[annotation["category_id"]],
        "label_text": annotation["label_text"],
        "path": image["path"],
        "x": x,
        "y": y,
        "w": width,
        "h": height,
        "dicom_id": Path(image["path"]).stem,
        "image_width": image["width"],
        "image_height": image["height"],
        "split": annotation.get("split") or image.get("split"),
    }


def read_splits(path: Path) -> dict[str, str]:
    """Splits by `dicom_id`, from MIMIC's split file."""
    rows, bad, _ = read_table(path, {}, ("dicom_id", "split"))
    if bad:
        raise ValueError(str(bad[0]))
    return {text(row.cells, "dicom_id"): text(row.cells, "split") for row in rows}


def read_views(path: Path) -> tuple[dict[str, str], list[BadRow], list[RowWarning]]:
    """View positions by `dicom_id`, from MIMIC's metadata, with its bad rows and warnings."""
    rows, bad, warnings = read_table(path, {}, ("dicom_id", "ViewPosition"))
    return {text(row.cells, "dicom_id"): text(row.cells, "ViewPosition") for row in rows}, bad, warnings


def plain_or_gzipped(path: Path) -> Path:
    """The path, or the path with `.gz` if only that file exists."""
    gzipped = path.with_name(f"{path.name}.gz")
    return gzipped if gzipped.is_file() and not path.is_file() else path


def find_mimic_image(root: Path, path: str) -> Path:
    """The file of MIMIC's path below `root`, with or without `files/`, with any of the suffixes; see `find_image`."""
    for name in dict.fromkeys((path, path.removeprefix("files/"))):
        for suffix in dict.fromkeys((Path(name).suffix, *_SUFFIXES)):
            try:
                return find_image(root, str(Path(name).with_suffix(suffix)) if name else "")
            except RuleError as error:
                if "no such file" not in error.rule:
                    raise
    return find_image(root, path)


def scale_boxes(boxes: Sequence[Box], annotated: Sequence[Any], size: tuple[int, int]) -> list[Box]:
    """Boxes scaled from the annotated height and width of an image to the height and width `size` of its file."""
    try:
        height, width = (float(side) for side in annotated)
    except (TypeError, ValueError):
        height = width = 0.0
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise RuleError(list(annotated), "image_height and image_width are not two positive numbers")
    check_inside(boxes, (int(height), int(width)))
    y, x = size[0] / height, size[1] / width
    return [(x0 * x, y0 * y, x1 * x, y1 * y) for x0, y0, x1, y1 in boxes]


def _warn_of_other_splits(pairs: Sequence[ImageTextPair], annotated: Mapping[str, str]) -> None:
    known = [pair for pair in pairs if annotated.get(pair.image_id)]
    other = [pair for pair in known if SPLIT_NAMES.get(annotated[pair.image_id].lower()) != pair.split]
    if other:
        rank_zero_warn(
            f"{len(other)} of {len(known)} phrases are in another split in MS-CXR than in MIMIC's split file, which is "
            f"used: {', '.join(pair.id for pair in other[:3])}{', ...' if len(other) > 3 else ''}"
        )
