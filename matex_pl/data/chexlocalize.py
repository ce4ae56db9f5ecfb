"""CheXlocalize: segmentations on the validation and test images of CheXpert, in the layout of the distribution."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.arguments import check_choices
from matex_pl.data.boxes import boxes_of_polygons, boxes_of_rle, coco_size, is_size
from matex_pl.data.images import Size, read_size
from matex_pl.data.manifest import with_image_findings
from matex_pl.data.ms_cxr import scale_boxes
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import Table, TableDataModule, TableRow, parse_rows, read_json_file
from matex_pl.data.templates import label_phrase
from matex_pl.data.validation import BadRow, Box, RuleError, aspect_differs, find_image

FILES = {"segmentations": "gt_segmentations_{}.json", "polygons": "gt_annotations_{}.json"}
FINDINGS = {
    "Atelectasis": "atelectasis",
    "Cardiomegaly": "cardiomegaly",
    "Consolidation": "consolidation",
    "Edema": "edema",
    "Enlarged Cardiomediastinum": "enlarged cardiomediastinum",
    "Lung Lesion": "lung lesion",
    "Lung Opacity": "lung opacity",
    "Pleural Effusion": "pleural effusion",
    "Pneumothorax": "pneumothorax",
    "Support Devices": "support device",
}
"""The ten tasks in the words of a report."""

_KEY = re.compile(r"(patient\d+)_(study\d+)_(view\d+_(frontal|lateral))")
# Folders of CheXpert's images below the root, by the names of its distributions.
_FOLDERS = {"val": ("val", "valid"), "test": ("test",)}
_SETS = ("CheXpert", "CheXpert-v1.0", "CheXpert-v1.0-small", "")


class CheXlocalizeDataModule(TableDataModule):
    """CheXlocalize: one pair per task on a frontal image, with a box around each segmented part.

    The set needs an account of Stanford AIMI and is not part of this package. `root` holds `gt_segmentations_val.json`
    and `gt_segmentations_test.json`, or `gt_annotations_val.json` and `gt_annotations_test.json`, also in a folder
    `CheXlocalize`. The images are `CheXpert/val/patient1/study1/view1_frontal.jpg`, at any size. There are no reports:
    templates turn the task into a phrase. Lateral images, and images without a segmentation, are left out and counted.

    The set has no training images.

    Args:
        root: Folder of the distribution.
        annotations: `segmentations` reads masks, with a box around each connected part. `polygons` reads contours, with
            a box around each of them.
        splits: `file` takes the splits of the files, val and test, which are enough to score a model. `patients` draws
            train, val and test from all patients, by `fractions`.
        kwargs: Arguments of `TableDataModule`.
    """

    def __init__(
        self,
        root: str,
        annotations: Literal["segmentations", "polygons"] = "segmentations",
        splits: Literal["file", "patients"] = "file",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(CheXlocalizeDataModule.__init__, locals())
        self.root = Path(root)
        self.annotations = annotations
        self.splits = splits

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per task on an image.

        Raises:
            FileNotFoundError: There is no file of annotations of this kind.
            ValueError: A file has another layout.
        """
        rows: list[TableRow] = []
        bad: list[BadRow] = []
        for split, path in self._paths().items():
            more = read_annotations(path, split)
            rows, bad = rows + more.rows, bad + more.bad
        frontal = [row for row in rows if not row.cells["key"].endswith("_lateral")]
        pairs, bad_rows, self.row_warnings = parse_rows(frontal, self._pair)
        marked = with_image_findings([pair for pair in pairs if pair.boxes])
        self._warn_of_left_out(rows, frontal, pairs)
        return marked, bad + bad_rows

    def _paths(self) -> dict[str, Path]:
        """Paths of the existing files of annotations by split."""
        name = FILES[self.annotations]
        places = {
            split: [folder / name.format(split) for folder in (self.root, self.root / "CheXlocalize")]
            for split in _FOLDERS
        }
        paths = {split: next((path for path in listed if path.is_file()), None) for split, listed in places.items()}
        missing = [places[split][0] for split, path in paths.items() if path is None]
        if len(missing) == len(paths):
            other = next(kind for kind in FILES if kind != self.annotations)
            raise FileNotFoundError(
                f"{missing[0]} is missing. data.root must hold the files of CheXlocalize and CheXpert/. "
                f"data.annotations: {other} reads {FILES[other].format('val')}."
            )
        for path in missing:
            rank_zero_warn(f"{path} is missing, so there are no images of it.")
        return {split: path for split, path in paths.items() if path is not None}

    def _pair(self, row: TableRow) -> ImageTextPair:
        """The pair of a row; without boxes if nothing is segmented."""
        key, task, split = (row.cells[name] for name in ("key", "task", "split"))
        match = _KEY.fullmatch(key)
        if match is None:
            raise RuleError(key, "the key is not like patient64622_study1_view1_frontal")
        if task not in FINDINGS:
            raise RuleError(task, f"the task is none of {', '.join(FINDINGS)}")
        path = find_chexpert_image(self.root, split, match)
        size = read_size(path)
        return ImageTextPair(
            id=f"{key}-{FINDINGS[task].replace(' ', '_')}",
            patient_id=match[1],
            image_id=key,
            image=str(path),
            phrase=label_phrase(FINDINGS[task], key, self.seed),
            boxes=self._boxes(row.cells, size),
            finding=FINDINGS[task],
            split=split if self.splits == "file" else "",
            size=size,
            source=row.source,
        )

    def _boxes(self, cells: Mapping[str, Any], size: Size) -> list[Box]:
        """Boxes in pixels of the image, which may be a down-sized copy of the annotated image."""
        if self.annotations == "segmentations":
            annotated = coco_size(cells["annotation"])
            boxes = boxes_of_rle(cells["annotation"], annotated)
        else:
            annotated = _image_size(cells["img_size"])
            boxes = boxes_of_polygons(cells["annotation"])
        if aspect_differs(annotated, size):
            value = f"{annotated[1]} x {annotated[0]}"
            raise RuleError(value, f"the annotated image has another shape than its file of {size[1]} x {size[0]}")
        return scale_boxes(boxes, annotated, size)

    def _warn_of_left_out(
        self, rows: Sequence[TableRow], frontal: Sequence[TableRow], pairs: Sequence[ImageTextPair]
    ) -> None:
        images = {row.cells["key"] for row in rows}
        lateral = images - {row.cells["key"] for row in frontal}
        empty = {pair.image_id for pair in pairs} - {pair.image_id for pair in pairs if pair.boxes}
        for left_out, reason in ((lateral, "are lateral"), (empty, "have no segmentation")):
            if left_out:
                rank_zero_warn(f"{len(left_out)} of {len(images)} images of CheXlocalize {reason} and are left out.")

    def check_splits(self, stage: str, pairs: Mapping[str, Sequence[ImageTextPair]], *, training: bool) -> None:
        """Raise ValueError if a stage cannot start with these pairs, such as a training on val and test images."""
        if self.splits == "file" and TrainerFn(stage) is TrainerFn.FITTING:
            raise ValueError(
                "CheXlocalize has no training images. Score a model that was trained on other data, or draw train, val "
                "and test from its patients with data.splits: patients."
            )
        super().check_splits(stage, pairs, training=training)


def read_annotations(path: Path, split: str) -> Table:
    """Rows of a file of annotations, one per task on an image, and bad rows; the source names the record.

    The cells are `key`, `task`, `annotation`, `split` and, for polygons, `img_size`.
    """
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no object of images by patient, study and view. Give the file of CheXlocalize.")
    rows, bad = [], []
    for number, (key, tasks) in enumerate(content.items(), start=1):
        place = f"{path}, record {number}"
        if not isinstance(tasks, dict):
            bad.append(BadRow(place, 0, key, "the record is no object of annotations by task"))
            continue
        for task, annotation in tasks.items():
            if task != "img_size":
                cells = {"key": key, "task": task, "annotation": annotation, "split": split}
                rows.append(TableRow((f"{place}, {task}", 0), {**cells, "img_size": tasks.get("img_size")}))
    return Table(rows, bad, [])


def find_chexpert_image(root: Path, split: str, key: re.Match[str]) -> Path:
    """The file of an image, whose key has underscores for the slashes of its path."""
    patient, study, view = key[1], key[2], key[3]
    for folder in _SETS:
        for part in _FOLDERS[split]:
            try:
                return find_image(root, "/".join(filter(None, (folder, part, patient, study, f"{view}.jpg"))))
            except RuleError as error:
                if "no such file" not in error.rule:
                    raise
    expected = "/".join((_SETS[0], split, patient, study, f"{view}.jpg"))
    raise RuleError(key[0], f"there is no {expected} below {str(root)!r}")


def _image_size(value: Any) -> Size:
    if not is_size(value):
        raise RuleError(value, "img_size is no list of the height and width of the image")
    return value[0], value[1]
