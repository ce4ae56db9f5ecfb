"""The record type of all data modules, and the batch of their loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from matex_pl.data.chest import chest_boxes

Boxes = Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class ImageTextPair:
    """One phrase on one image, before any pixel is read.

    An image with three findings gives three pairs, which share `image_id` and `image_findings`.

    Args:
        id: Id, unique over all splits.
        patient_id: Id of the patient, by whom splits are made.
        image_id: Id of the radiograph, which several pairs may share.
        image: Location of the pixels: a path, or a row of an image cache.
        phrase: Sentence of the report.
        boxes: Boxes `(x0, y0, x1, y1)` in pixels of the stored image.
        finding: Finding of the phrase; empty if unknown.
        image_findings: All known findings of the image; zero-shot metrics count any of them as correct.
        split: `train`, `val` or `test`.
        size: Height and width of the stored image, if known.
        source: File and line of the record, for messages; line 0 if the file has no lines.
    """

    id: str
    patient_id: str
    image_id: str
    image: str | int
    phrase: str
    boxes: Boxes = ()
    finding: str = ""
    image_findings: tuple[str, ...] = ()
    split: str = "train"
    size: tuple[int, int] | None = None
    source: tuple[str, int] = ("", 0)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ImageTextPair:
        """The pair of a record from `dataclasses.asdict`, also after a round trip through JSON."""
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in record["boxes"])
        return cls(**{**record, "boxes": boxes, "image_findings": tuple(record["image_findings"])})


@dataclass(frozen=True)
class Sample:
    """A pair with its pixels in the model's frame.

    Args:
        pair: The pair without pixels.
        image: `(3, H, W)` uint8 pixels, before normalization.
        boxes: `(K, 4)` float32 boxes `x0, y0, x1, y1` in [0, 1] of the model's frame, x to the right, y down.
        content_box: `(4,)` float32 rectangle of the image in the same frame; beyond [0, 1] if the image is cropped.
        masks: `(H, W)` bool masks of the image by structure: `left_lung`, `right_lung`, `heart`, and others.
    """

    pair: ImageTextPair
    image: Tensor
    boxes: Tensor
    content_box: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class UnreadablePair(NamedTuple):
    """A pair whose image cannot be read, with the reason and the type of the error."""

    pair: ImageTextPair
    reason: str
    kind: type[Exception]

    def error(self) -> Exception:
        """Error that names the pair and its image."""
        return self.kind(f"Pair {self.pair.id!r} ({self.pair.image}): {self.reason}")


class ImageTextBatch(TypedDict):
    """A batch of B samples; boxes are a list because their number differs.

    `masks` holds `(B, H, W)` bool by structure. A mask is False everywhere for a sample without that structure.
    `chest_box` holds the rectangles around both lungs, see `chest_boxes`; NaN for a sample without their masks.
    """

    id: list[str]
    patient_id: list[str]
    image_id: list[str]
    image: Tensor
    phrase: list[str]
    boxes: list[Tensor]
    finding: list[str]
    image_findings: list[tuple[str, ...]]
    split: list[str]
    content_box: Tensor
    chest_box: Tensor
    masks: dict[str, Tensor]


_BITS = "box_bits"
_PAIR_FIELDS = ("id", "patient_id", "image_id", "phrase", "finding", "image_findings", "split")


def collate(samples: Sequence[Sample]) -> ImageTextBatch:
    """Batch of B samples: `image (B, 3, H, W)` uint8, `content_box (B, 4)`, `boxes` a list of `(K, 4)`, else lists.

    `masks` has the structures of any sample, `(B, H, W)` bool each, and `chest_box (B, 4)` is around the lungs.
    """
    for sample in samples:
        if isinstance(sample, UnreadablePair):
            raise sample.error()
    batch: dict[str, Any] = {name: [getattr(sample.pair, name) for sample in samples] for name in _PAIR_FIELDS}
    batch["image"] = torch.stack([sample.image for sample in samples])
    batch["content_box"] = torch.stack([sample.content_box for sample in samples])
    batch["boxes"] = [sample.boxes for sample in samples]
    structures = dict.fromkeys(name for sample in samples for name in sample.masks)
    absent = torch.zeros(samples[0].image.shape[1:], dtype=torch.bool)
    batch["masks"] = {name: torch.stack([sample.masks.get(name, absent) for sample in samples]) for name in structures}
    batch["chest_box"] = chest_boxes(batch["masks"], len(samples))
    return batch  # type: ignore[return-value]


def with_bits(batch: ImageTextBatch) -> ImageTextBatch:
    """The batch with the bits of its boxes as int32 in addition, which no precision of a trainer rounds."""
    bits = {
        "boxes": [box.view(torch.int32) for box in batch["boxes"]],
        "content_box": batch["content_box"].view(torch.int32),
        "chest_box": batch["chest_box"].view(torch.int32),
    }
    return cast(ImageTextBatch, {**batch, _BITS: bits})


def from_bits(batch: Mapping[str, Any]) -> ImageTextBatch:
    """The batch with the boxes that `with_bits` kept, if it kept some."""
    whole = dict(batch)
    bits = whole.pop(_BITS, None)
    if bits is not None:
        whole["boxes"] = [box.view(torch.float32) for box in bits["boxes"]]
        whole |= {name: bits[name].view(torch.float32) for name in ("content_box", "chest_box")}
    return cast(ImageTextBatch, whole)


def rows_of(batch: ImageTextBatch, rows: Iterable[int]) -> ImageTextBatch:
    """Some rows of a batch, in their order, with tensors on the CPU; a row may be repeated."""
    chosen = list(rows)

    def kept(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: kept(value) for name, value in part.items()}
        return part[chosen].cpu() if isinstance(part, Tensor) else [part[row] for row in chosen]

    return cast(ImageTextBatch, kept(batch))


def collate_readable(
    samples: Sequence[Sample | UnreadablePair],
) -> tuple[ImageTextBatch | None, list[UnreadablePair]]:
    """Batch of the samples, None without any, and the pairs whose images cannot be read."""
    readable = [sample for sample in samples if isinstance(sample, Sample)]
    unreadable = [sample for sample in samples if isinstance(sample, UnreadablePair)]
    return collate(readable) if readable else None, unreadable


# The names in 0.1.
Study, StudyBatch = ImageTextPair, ImageTextBatch
