"""The one record type of every data module, and the batch that comes out of their loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

Boxes = Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Study:
    """One phrase on one film, before any pixel is read.

    A film with three findings gives three studies, which share `film_id` and `film_findings`.

    Args:
        id: Unique over all splits.
        patient_id: Splits are made by patient.
        film_id: The radiograph; studies of one film share it.
        image: Where the pixels are: a path, or a row of a film cache.
        phrase: The sentence of the report.
        boxes: `(x0, y0, x1, y1)` each, in pixels of the film as it is stored; empty when there are none.
        finding: The finding that the phrase is about; empty when unknown.
        film_findings: All findings known to be on the film; zero-shot metrics count any of them as right.
        split: `train`, `val` or `test`.
        size: Height and width of the film as it is stored, where they are known without reading it.
        source: File and line that the record was read from, for messages; line 0 where there is none.
    """

    id: str
    patient_id: str
    film_id: str
    image: str | int
    phrase: str
    boxes: Boxes = ()
    finding: str = ""
    film_findings: tuple[str, ...] = ()
    split: str = "train"
    size: tuple[int, int] | None = None
    source: tuple[str, int] = ("", 0)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Study:
        """The study that `dataclasses.asdict` and JSON made a record of."""
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in record["boxes"])
        return cls(**{**record, "boxes": boxes, "film_findings": tuple(record["film_findings"])})


@dataclass(frozen=True)
class Sample:
    """A study with its pixels in the model's frame.

    Args:
        study: The record it came from.
        image: `(3, H, W)` uint8, the model's input size, before normalisation.
        boxes: `(K, 4)` float32 `x0, y0, x1, y1` in [0, 1] of the model's frame, x to the right, y down.
        film: `(4,)` float32 rectangle of the film in the same frame; it may reach outside [0, 1] when the film was
            cropped.
    """

    study: Study
    image: Tensor
    boxes: Tensor
    film: Tensor


class StudyBatch(TypedDict):
    """What a loader yields: B samples. Boxes stay a list because their number differs."""

    id: list[str]
    patient_id: list[str]
    film_id: list[str]
    image: Tensor
    phrase: list[str]
    boxes: list[Tensor]
    finding: list[str]
    film_findings: list[tuple[str, ...]]
    split: list[str]
    film: Tensor


_STUDY_FIELDS = ("id", "patient_id", "film_id", "phrase", "finding", "film_findings", "split")


def collate(samples: Sequence[Sample]) -> StudyBatch:
    """Batch of B samples: `image (B, 3, H, W)` uint8, `film (B, 4)`, `boxes` a list of `(K, 4)`, the rest lists."""
    batch: dict[str, Any] = {name: [getattr(sample.study, name) for sample in samples] for name in _STUDY_FIELDS}
    batch["image"] = torch.stack([sample.image for sample in samples])
    batch["film"] = torch.stack([sample.film for sample in samples])
    batch["boxes"] = [sample.boxes for sample in samples]
    return batch  # type: ignore[return-value]
