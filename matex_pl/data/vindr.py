"""VinDr-CXR: boxes of three readers per training image, in the layout of the public distribution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.data.boxes import boxes_of_json
from matex_pl.data.images import Size
from matex_pl.data.manifest import with_image_findings
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import (
    TableDataModule,
    TableRow,
    check_val_share,
    drop_broken,
    hold_out,
    parse_rows,
    read_frontal_size,
    read_table,
)
from matex_pl.data.templates import label_phrase
from matex_pl.data.validation import BadRow, Box, RuleError, check_inside, find_image, fold, text

FOLDER, FILES = "annotations", {"train": "annotations_train.csv", "test": "annotations_test.csv"}
NO_FINDING = "no finding"
FINDINGS = {
    "aortic enlargement": "aortic enlargement",
    "atelectasis": "atelectasis",
    "calcification": "calcification",
    "cardiomegaly": "cardiomegaly",
    "clavicle fracture": "clavicle fracture",
    "consolidation": "consolidation",
    "edema": "edema",
    "emphysema": "emphysema",
    "enlarged pa": "enlarged pulmonary artery",
    "ild": "interstitial lung disease",
    "infiltration": "infiltration",
    "lung cavity": "lung cavity",
    "lung cyst": "lung cyst",
    "lung opacity": "lung opacity",
    "mediastinal shift": "mediastinal shift",
    "nodule/mass": "lung nodule or mass",
    "other lesion": "other lesion",
    "pleural effusion": "pleural effusion",
    "pleural thickening": "pleural thickening",
    "pneumothorax": "pneumothorax",
    "pulmonary fibrosis": "pulmonary fibrosis",
    "rib fracture": "rib fracture",
}
"""The 22 local labels, folded, in the words of a report."""

_COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
_SUFFIXES = (".dicom", ".dcm")


class VinDrDataModule(TableDataModule):
    """VinDr-CXR: one pair per finding on an image, with its boxes, and one per image without a finding.

    The set needs a credentialed account and is not part of this package. `root` holds
    `annotations/annotations_train.csv` and `annotations_test.csv`, and the images as `train/<image_id>.dicom` and
    `test/<image_id>.dicom`. There are no reports: templates turn the label into a phrase. The files name no patients,
    so the training images are divided into train and val by image.

    Three readers read each training image alone. The test images have the consensus of five. Boxes of one finding by
    several readers belong together if they overlap by at least `overlap`, and become their mean:

    - `fused` keeps each finding of any reader. An image is normal if no reader has a finding;
    - `majority` keeps findings of more than half of the image's readers. An image is normal if more than half of the
      readers have no finding; images without an agreement are left out and counted;
    - `all` keeps all boxes as they are drawn;
    - the id of a reader, for example `R8`, keeps the boxes of this reader.

    Args:
        root: Folder of the distribution.
        readers: Boxes of training images to use: `fused`, `majority`, `all`, or the id of a reader.
        overlap: Intersection over union from which boxes of a finding belong together. 0.4 is the threshold of the
            VinBigData challenge on these images.
        skip_labels: Labels to leave out, for example `Other lesion`, which names no finding. Images without another
            finding are left out too.
        val_share: Share of the training images that are held out for validation.
        boxed_only: Whether to leave out images without a finding.
        kwargs: Arguments of `TableDataModule`, except `fractions`.
    """

    def __init__(
        self,
        root: str,
        readers: str = "fused",
        overlap: float = 0.4,
        skip_labels: Sequence[str] = (),
        val_share: float = 0.1,
        boxed_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(fractions=(1.0, 0.0, 0.0), **kwargs)
        check_val_share(val_share)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap must be greater than 0 and at most 1, got {overlap}.")
        unknown = [label for label in skip_labels if fold(label) not in FINDINGS]
        if unknown:
            raise ValueError(f"skip_labels names {unknown}. The labels are {', '.join(FINDINGS)}.")
        self.root = Path(root)
        self.readers = readers
        self.overlap = overlap
        self.skip_labels = [fold(label) for label in skip_labels]
        self.val_share = val_share
        self.boxed_only = boxed_only

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per finding on an image, and per image without a finding.

        Raises:
            FileNotFoundError: There is no file of annotations.
            ValueError: A file lacks a column, or no row is of the reader.
        """
        paths = {split: self.root / FOLDER / name for split, name in FILES.items()}
        missing = [path for path in paths.values() if not path.is_file()]
        if len(missing) == len(paths):
            raise FileNotFoundError(f"{missing[0]} is missing. data.root must hold {FOLDER}/, train/ and test/.")
        found: list[ImageTextPair] = []
        bad: list[BadRow] = []
        self.row_warnings = []
        for split, path in paths.items():
            if path.is_file():
                pairs, bad_rows = self._read(path, split)
                found, bad = found + pairs, bad + bad_rows
            else:
                rank_zero_warn(f"{path} is missing, so there are no images of it.")
        return with_image_findings(found), bad

    def _read(self, path: Path, split: str) -> tuple[list[ImageTextPair], list[BadRow]]:
        """Pairs and bad rows of one file."""
        rows, unread, warnings = read_table(path, {}, _COLUMNS)
        sizes: dict[str, Size] = {}
        pairs, bad, more = parse_rows(rows, lambda row: self._pair(row, split, sizes))
        self.row_warnings += [*warnings, *more]
        pairs, bad = drop_broken(pairs, bad, rows, _key)
        readers = {row.source: _reader(row) for row in rows}
        if any(readers.values()):
            pairs = self._agreed(pairs, readers, path)
        skipped = {FINDINGS[label] for label in self.skip_labels} | ({""} if self.boxed_only else set())
        pairs = [pair for pair in _merged(pairs) if pair.finding not in skipped]
        if split == "train":
            splits = hold_out((pair.patient_id for pair in pairs), self.val_share, self.seed)
            pairs = [replace(pair, split=splits[pair.patient_id]) for pair in pairs]
        return pairs, unread + bad

    def _pair(self, row: TableRow, split: str, sizes: dict[str, Size]) -> ImageTextPair:
        """The pair of a row, with its box; `sizes` holds the sizes of the images read so far."""
        image, label = text(row.cells, "image_id"), fold(text(row.cells, "class_name"))
        if label != NO_FINDING and label not in FINDINGS:
            raise RuleError(text(row.cells, "class_name"), f"the label is none of {', '.join(FINDINGS)}, {NO_FINDING}")
        finding = FINDINGS.get(label, "")
        path = find_dicom(self.root, split, image)
        cells = [row.cells.get(name) for name in _COLUMNS[2:]]
        boxes: list[Box] = []
        if any(cell is not None and str(cell).strip() for cell in cells):
            boxes = boxes_of_json([cells])
        if bool(boxes) != bool(finding):
            raise RuleError(cells, "a row with a finding needs a box, and a row without one has none")
        if boxes:
            if image not in sizes:
                sizes[image], warnings = read_frontal_size(path, row.source)
                self.row_warnings += warnings
            check_inside(boxes, sizes[image])
        return ImageTextPair(
            id=f"{image}-{finding.replace(' ', '_') or 'normal'}",
            patient_id=image,
            image_id=image,
            image=str(path),
            phrase=label_phrase(finding, image, self.seed),
            boxes=boxes,
            finding=finding,
            split=split,
            size=sizes.get(image) if boxes else None,
            source=row.source,
        )

    def _agreed(
        self, pairs: Sequence[ImageTextPair], reader_of: Mapping[tuple[str, int], str], path: Path
    ) -> list[ImageTextPair]:
        """The pairs, one per box and image, by the readers to use."""
        if self.readers not in ("fused", "majority", "all"):
            known = sorted(set(reader_of.values()))
            if self.readers not in known:
                choices = ", ".join(["fused", "majority", "all", *known])
                raise ValueError(f"readers must be one of {choices} with {path}, got {self.readers!r}.")
            return [pair for pair in pairs if reader_of[pair.source] == self.readers]
        of_image: dict[str, list[ImageTextPair]] = defaultdict(list)
        for pair in pairs:
            of_image[pair.image_id].append(pair)
        kept, unagreed = [], 0
        for members in of_image.values():
            agreed = self._of_image(members, [reader_of[pair.source] for pair in members])
            kept += agreed
            unagreed += not agreed
        if unagreed:
            rank_zero_warn(
                f"{unagreed} of {len(of_image)} images of {path} have no finding that most of their readers agree on, "
                "and are left out."
            )
        return kept

    def _of_image(self, pairs: Sequence[ImageTextPair], readers: Sequence[str]) -> list[ImageTextPair]:
        """The pairs of an image that its readers agree on, one per box; none without an agreement."""
        needed = len(set(readers)) // 2 + 1 if self.readers == "majority" else 1
        rows_of: dict[str, list[tuple[ImageTextPair, str]]] = defaultdict(list)
        for pair, reader in zip(pairs, readers, strict=True):
            rows_of[pair.finding].append((pair, reader))
        normal = rows_of.pop("", [])
        if self.readers == "all":
            kept = [pair for rows in rows_of.values() for pair, _ in rows]
        else:
            kept = []
            for rows in rows_of.values():
                fused = fuse_boxes(((pair.boxes[0], reader) for pair, reader in rows), self.overlap)
                kept += [replace(rows[0][0], boxes=[entry.box]) for entry in fused if len(entry.readers) >= needed]
        if kept or len({reader for _, reader in normal}) < needed:
            return kept
        return [normal[0][0]]


class FusedBox(NamedTuple):
    """The mean of boxes that belong together, and the readers who drew them."""

    box: Box
    readers: frozenset[str]


def fuse_boxes(drawn: Iterable[tuple[Box, str]], overlap: float) -> list[FusedBox]:
    """Boxes of one finding on one image, fused as in weighted box fusion with equal weights.

    Each box joins the group whose mean it overlaps most, if by at least `overlap`, and else begins a group. Solovyev et
    al., *Weighted boxes fusion*, 2021.

    Args:
        drawn: Boxes, each with its reader.
        overlap: Least intersection over union of a box and the mean of its group.
    """
    groups: list[list[tuple[Box, str]]] = []
    for box, reader in drawn:
        ious = [_iou(box, _mean(group)) for group in groups]
        best = max(range(len(groups)), key=ious.__getitem__, default=-1)
        if best >= 0 and ious[best] >= overlap:
            groups[best].append((box, reader))
        else:
            groups.append([(box, reader)])
    return [FusedBox(_mean(group), frozenset(reader for _, reader in group)) for group in groups]


def _mean(group: Sequence[tuple[Box, str]]) -> Box:
    x0, y0, x1, y1 = (sum(sides) / len(group) for sides in zip(*(box for box, _ in group), strict=True))
    return x0, y0, x1, y1


def _iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one, other))
    return shared / (sum(areas) - shared)


def find_dicom(root: Path, split: str, image: str) -> Path:
    """The DICOM file of an image, `.dicom` as distributed, or `.dcm`."""
    if not image:
        raise RuleError(image, "the image_id is missing")
    for suffix in _SUFFIXES:
        try:
            return find_image(root, f"{split}/{image}{suffix}")
        except RuleError as error:
            if "no such file" not in error.rule:
                raise
    raise RuleError(image, f"there is no {split}/{image}{_SUFFIXES[0]} below {str(root)!r}")


def _merged(pairs: Iterable[ImageTextPair]) -> list[ImageTextPair]:
    """One pair per id, with all of its boxes."""
    groups: dict[str, list[ImageTextPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.id].append(pair)
    return [
        replace(group[0], boxes=list(dict.fromkeys(box for pair in group for box in pair.boxes)))
        for group in groups.values()
    ]


def _key(row: TableRow) -> tuple[str, ...]:
    """Key of a row's pair: image and label."""
    return str(row.cells.get("image_id")).strip(), fold(row.cells.get("class_name"))


def _reader(row: TableRow) -> str:
    """Reader of a row; empty in the file of the test images, and in files of a consensus."""
    return str(row.cells.get("rad_id") or row.cells.get("rad_ID") or "").strip()
