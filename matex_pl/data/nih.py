"""NIH ChestX-ray14 with its radiologists' boxes, in the layout of the public distribution."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from matex_pl.data.films import SPLITS, ChestXrayDataModule
from matex_pl.data.record import Study

BOX_FILE, LABEL_FILE = "BBox_List_2017.csv", "Data_Entry_2017_v2020.csv"
BOX_FRAME = 1024
"""Side in pixels of the frame in which the distribution gives its boxes."""

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
_TEMPLATES = ("{}.", "There is {}.", "Findings consistent with {}.", "Frontal chest radiograph with {}.", "Evidence of {}.")
_NORMAL = ("No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "The lungs are clear.")


class NihDataModule(ChestXrayDataModule):
    """The NIH films: one study per film and label, with a box where a radiologist drew one.

    There are no reports; phrases come from templates over the label. `root` holds `BBox_List_2017.csv`,
    `Data_Entry_2017_v2020.csv` and `images/` (searched below, `.png` or `.jpg` at any size; matched by stem). Rows whose image is
    not there are left out and counted. Splits are made by patient.

    Args:
        root: Folder of the distribution.
        boxed_only: Leave out films without a box, and labels without one on films that have some.
        name_side: Put the side of the box into the phrase. It then tells a map where to look: report results with and without.
        fractions: Shares of the patients in train, val and test.
        image_size: See `ChestXrayDataModule`, like all that follow.
        batch_size: Pairs per batch.
        num_workers: Processes that read and augment films.
        geometry: `pad` or `squash`.
        augment: Mild geometric and intensity changes in training.
        seed: Of shuffling, augmentation, splits and templates.
    """

    def __init__(
        self,
        root: str,
        boxed_only: bool = False,
        name_side: bool = False,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 64,
        num_workers: int = 1,
        geometry: str = "pad",
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers, geometry, augment, seed)
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be three shares that sum to 1, got {list(fractions)}.")
        self.root = Path(root)
        self.boxed_only = boxed_only
        self.name_side = name_side
        self.fractions = fractions

    def list_studies(self) -> list[Study]:
        """One study per film and label.

        Raises:
            FileNotFoundError: A CSV file is missing, or no film of it is below `root`.
            ValueError: A row cannot be read; the message names file and line.
        """
        labels, boxes, files = read_labels(self.root / LABEL_FILE), read_boxes(self.root / BOX_FILE), self._find_files()
        here = [row for row in labels if Path(row["image"]).stem in files]
        if not here:
            raise FileNotFoundError(
                f"None of the {len(labels)} films of {LABEL_FILE} is below {self.root} as .png or .jpg. "
                "Unpack the distribution's images there, or set data.root to the folder that holds both CSV files."
            )
        if len(here) < len(labels):
            rank_zero_warn(f"{len(labels) - len(here)} of {len(labels)} films of {LABEL_FILE} are not below {self.root}; left out.")
        splits = split_patients((row["patient"] for row in here), self.fractions, self.seed)
        return [
            study
            for row in here
            for study in self._studies_of(row, boxes[row["image"]], files[Path(row["image"]).stem], splits[row["patient"]])
        ]

    def _find_files(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root {str(self.root)!r} is not a folder. It should hold {LABEL_FILE} and images/.")
        return {path.stem: path for path in sorted(self.root.rglob("*")) if path.suffix.lower() in {".png", ".jpg", ".jpeg"}}

    def _studies_of(
        self, row: dict[str, Any], boxes: dict[str, list[tuple[float, ...]]], path: Path, split: str
    ) -> Iterator[Study]:
        film = Path(row["image"]).stem
        scaled = _scale_boxes(boxes, path) if boxes else {}
        found = [finding_name(label) for label in row["labels"] if label != NO_FINDING]
        named = sorted({*found, *scaled})
        for finding in [name for name in named if name in scaled or not self.boxed_only] or ([] if self.boxed_only else [""]):
            drawn = scaled.get(finding, [])
            yield Study(
                id=f"{film}-{finding.replace(' ', '_') or 'normal'}",
                patient_id=row["patient"],
                film_id=film,
                image=str(path),
                phrase=self._phrase(film, finding, drawn, path),
                boxes=drawn,
                finding=finding,
                film_findings=tuple(named),
                split=split,
            )

    def _phrase(self, film: str, finding: str, boxes: list[tuple[float, float, float, float]], path: Path) -> str:
        rng = np.random.default_rng([self.seed, *f"{film}/{finding}".encode()])
        if not finding:
            return str(rng.choice(_NORMAL))
        side = _side_word(boxes, path) if self.name_side and boxes and finding != "cardiomegaly" else ""
        text = str(rng.choice(_TEMPLATES)).format(f"{side} {finding}".strip())
        return text[0].upper() + text[1:]

    def read_film(self, study: Study) -> np.ndarray:
        """Pixels of a film, `(h, w)` uint8."""
        film = cv2.imread(str(study.image), cv2.IMREAD_GRAYSCALE)
        if film is None:
            raise ValueError(f"Study {study.id!r}: {study.image} is no readable image. Copy the file anew or take its row out.")
        return film


def finding_name(label: str) -> str:
    """The distribution's label in the words of a report."""
    return _NAMES.get(label, label.lower().replace("_", " "))


def read_labels(path: Path) -> list[dict[str, Any]]:
    """Rows of the label file: `image`, `patient` and `labels`."""
    rows = []
    for line, row in _rows(path, ("Image Index", "Finding Labels", "Patient ID")):
        if not row["Image Index"] or not row["Patient ID"]:
            raise ValueError(f"{path}, line {line}: the image or the patient is empty.")
        rows.append(
            {"image": row["Image Index"], "patient": row["Patient ID"], "labels": row["Finding Labels"].split("|")}
        )
    return rows


def read_boxes(path: Path) -> defaultdict[str, dict[str, list[tuple[float, ...]]]]:
    """Boxes by image and finding, `(x0, y0, x1, y1)` in pixels of the 1024 x 1024 frame."""
    boxes: defaultdict[str, dict[str, list[tuple[float, ...]]]] = defaultdict(dict)
    for line, row in _rows(path, ("Image Index", "Finding Label")):
        cells = list(row.values())[2:6]
        try:
            x, y, width, height = (float(cell) for cell in cells)
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {line}: the box {cells} is not four numbers x, y, w, h.") from None
        if not (np.isfinite([x, y, width, height]).all() and width > 0 and height > 0):
            raise ValueError(f"{path}, line {line}: the box {cells} has no positive, finite size.")
        boxes[row["Image Index"]].setdefault(finding_name(row["Finding Label"]), []).append((x, y, x + width, y + height))
    return boxes


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; unnamed columns get their place as a name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. data.root should hold {LABEL_FILE}, {BOX_FILE} and images/.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name or f"column {place}" for place, name in enumerate(next(reader, []))]
        if not set(needed) <= set(header):
            raise ValueError(f"{path} lacks the columns {sorted(set(needed) - set(header))}; it has {header}.")
        for cells in reader:
            yield reader.line_num, dict(zip(header, cells, strict=False))


def split_patients(patients: Iterable[str], fractions: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Split of each patient: a seeded shuffle of the names, cut at the fractions."""
    names = sorted(set(patients))
    order = np.random.default_rng(seed).permutation(len(names))
    bounds = np.round(np.cumsum(fractions) * len(names))
    return {names[index]: SPLITS[int(np.searchsorted(bounds, rank, side="right"))] for rank, index in enumerate(order)}


def _scale_boxes(
    boxes: dict[str, list[tuple[float, ...]]], path: Path
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Boxes in pixels of the stored file."""
    with Image.open(path) as image:
        x, y = image.width / BOX_FRAME, image.height / BOX_FRAME
    return {name: [(a * x, b * y, c * x, d * y) for a, b, c, d in found] for name, found in boxes.items()}


def _side_word(boxes: list[tuple[float, float, float, float]], path: Path) -> str:
    """The patient's side of the boxes: the patient's right is on the left of the film."""
    with Image.open(path) as image:
        middle = image.width / 2
    sides = {"right" if (box[0] + box[2]) / 2 < middle else "left" for box in boxes}
    return "bilateral" if len(sides) == 2 else sides.pop()
