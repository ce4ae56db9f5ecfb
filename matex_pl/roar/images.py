"""Images and phrases of a plan, decoded once and stored in the model's frame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from matex_pl.console import progress
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextBatch, ImageTextPair, Sample, collate
from matex_pl.data.transforms import ImageTransform
from matex_pl.evaluation.store import pair_keys
from matex_pl.files import read_json, whole_file, write_text

_IMAGES, _PAIRS = "images.npy", "pairs.json"
_READ_AT_ONCE = 64


def _read(
    data: ChestXrayDataModule, transform: ImageTransform, images: Sequence[list[ImageTextPair]]
) -> list[list[Sample]] | ValueError:
    """Samples of the pairs of each image, which is decoded once, or the error of an image.

    A loader's worker returns an error as a value. torch would put the worker's traceback into the message.
    """
    samples = []
    for pairs in images:
        try:
            image = data.open_image(pairs[0], transform)
            masks = data.open_masks(pairs[0], transform)
            samples.append([
                Sample(pair, *transform(image.pixels, pair.boxes, size=image.size, masks=masks)) for pair in pairs
            ])  # fmt: skip
        except (OSError, ValueError) as error:
            return ValueError(f"The image {pairs[0].image_id!r} ({pairs[0].image}) cannot be read: {error}")
    return samples


def write_images(data: ChestXrayDataModule, pairs: Sequence[ImageTextPair], folder: Path) -> None:
    """Decode the images of the pairs once, and write them with the pairs to `folder`.

    The files are `images.npy`, `(F, H, W)` uint8, and `pairs.json`. The data module must be prepared, which sets the
    model's frame.

    Raises:
        ValueError: If an image cannot be read, or a box covers no part of it.
    """
    images: dict[str, list[ImageTextPair]] = {}
    for pair in pairs:
        images.setdefault(pair.image_id, []).append(pair)
    transform = data.dataset(pairs[0].split).transform
    groups: Any = list(images.values())
    read = partial(_read, data, transform)
    loader: Any = DataLoader(groups, batch_size=_READ_AT_ONCE, num_workers=data.num_workers, collate_fn=read)
    records: list[dict[str, Any]] = []
    with whole_file(folder / _IMAGES) as part:
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(images), *transform.size))
        row = 0
        for group in progress(loader, "reading images"):
            if isinstance(group, ValueError):
                raise group
            for samples in group:
                pixels[row] = samples[0].image[0].numpy()
                records.extend(_record(sample, row) for sample in samples)
                row += 1
        pixels.flush()
    write_text(folder / _PAIRS, json.dumps(_without_patient_ids(records)))


def split_rows(pairs: Sequence[ImageTextPair], train_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the training and validation pairs, in order; the patients are drawn with the seed."""
    patients = list(dict.fromkeys(pair.patient_id for pair in pairs))
    number = round(train_share * len(patients))
    if not 0 < number < len(patients):
        raise ValueError(
            f"{len(pairs)} pairs of {len(patients)} patients cannot be split by patient with "
            f"train_share={train_share:g}. Use more pairs, or another share."
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = {patients[index] for index in order[:number]}
    train = [row for row, pair in enumerate(pairs) if pair.patient_id in chosen]
    return train, [row for row, pair in enumerate(pairs) if pair.patient_id not in chosen]


def _without_patient_ids(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with a running number for each patient. The splits need to know which pairs share a patient, not whom."""
    numbers: dict[str, int] = {}
    for record in records:
        pair = record["pair"]
        pair["patient_id"] = str(numbers.setdefault(pair["patient_id"], len(numbers)))
    return list(records)


def _record(sample: Sample, row: int) -> dict[str, Any]:
    """Pair of the plan as plain types: boxes in pixels of the stored image, key, content box and chest box."""
    height, width = sample.image.shape[1:]
    boxes = (sample.boxes.double().numpy() * [width, height, width, height]).tolist()
    pair = asdict(replace(sample.pair, image=row, boxes=boxes))
    batch = collate([sample])
    # JSON has no NaN.
    chest_box = None if batch["chest_box"].isnan().any() else batch["chest_box"][0].tolist()
    boxes = {"content_box": sample.content_box.tolist(), "chest_box": chest_box}
    return {"pair": pair, **boxes, "key": pair_keys(batch)[0]}


class PlanImages:
    """The n pairs of a plan, with their images on disk.

    Args:
        folder: Folder of the plan.

    Attributes:
        pairs: The n pairs; `image` is the row of the image.
        keys: Keys of the pairs in a map store.
        findings: Names of the findings that occur in the images.
    """

    def __init__(self, folder: Path) -> None:
        records = read_json(folder / _PAIRS)
        self.pairs = [ImageTextPair.from_record(record["pair"]) for record in records]
        self.keys = [record["key"] for record in records]
        self.findings = sorted({finding for pair in self.pairs for finding in pair.image_findings})
        self._content_boxes = torch.tensor([record["content_box"] for record in records])
        # Plans of earlier versions have no chest boxes.
        absent = [torch.nan] * 4
        self._chest_boxes = torch.tensor([record.get("chest_box") or absent for record in records])
        self._pixels = np.load(folder / _IMAGES, mmap_mode="r")

    def batch(self, rows: Sequence[int], drop: Mapping[str, Tensor] | None = None) -> ImageTextBatch:
        """Batch of these rows, with boxes in [0, 1] of the frame and the rows of the tensors in `drop`."""
        pixels = torch.from_numpy(self._pixels[[int(self.pairs[row].image) for row in rows]])
        images = pixels[:, None].expand(-1, 3, -1, -1)
        batch = collate([
            Sample(self.pairs[row], image, self.boxes(row), self._content_boxes[row])
            for row, image in zip(rows, images, strict=True)
        ])  # fmt: skip
        batch["chest_box"] = self._chest_boxes[list(rows)]
        return {**batch, **{name: part[list(rows)] for name, part in (drop or {}).items()}}  # type: ignore[typeddict-item]

    def boxes(self, row: int) -> Tensor:
        """Boxes of a pair, `(K, 4)`, in [0, 1] of the frame."""
        height, width = self._pixels.shape[1:]
        return torch.tensor(self.pairs[row].boxes).view(-1, 4) / torch.tensor([width, height, width, height])

    def loader(self, rows: Sequence[int], batch_size: int, drop: Mapping[str, Tensor], **settings: Any) -> DataLoader:
        """Loader of these rows, in order by default, with the rows of the tensors in `drop`."""
        # The images are stored in the model's frame, and worker processes would cost more time than they save.
        collate_fn = partial(self.batch, drop=drop)
        return DataLoader(list(rows), batch_size, num_workers=0, collate_fn=collate_fn, **settings)  # type: ignore[arg-type]
