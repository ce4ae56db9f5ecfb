"""The films and phrases of a plan, decoded once and kept in the model's frame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from matex_pl.console import progress
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.study import Sample, Study, StudyBatch, collate
from matex_pl.data.transforms import FilmTransform
from matex_pl.evaluation.store import pair_keys
from matex_pl.files import whole_file, write_text

_FILMS, _PAIRS = "films.npy", "pairs.json"
_READ_AT_ONCE = 64


class _Films(Dataset[list[Sample]]):
    """Films with the samples of all their studies, each decoded once."""

    def __init__(self, data: ChestXrayDataModule, films: Sequence[list[Study]], transform: FilmTransform) -> None:
        self.data = data
        self.films = films
        self.transform = transform

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index: int) -> list[Sample]:
        studies = self.films[index]
        try:
            film = self.data.open_film(studies[0], self.transform)
            return [Sample(study, *self.transform(film.pixels, study.boxes, size=film.size)) for study in studies]
        except (OSError, ValueError) as error:
            raise ValueError(f"Film {studies[0].film_id!r} ({studies[0].image}): {error}") from error


def write_films(data: ChestXrayDataModule, studies: Sequence[Study], folder: Path) -> None:
    """Decode the films of the studies once, and write them with the studies to `folder`.

    Args:
        data: Data module that reads the films; prepared, so that it knows the model's frame.
        studies: The pairs.
        folder: Folder for `films.npy`, `(F, H, W)` uint8, and `pairs.json`.

    Raises:
        ValueError: A film cannot be read, or a box covers nothing of it; the message names it.
    """
    films: dict[str, list[Study]] = {}
    for study in studies:
        films.setdefault(study.film_id, []).append(study)
    dataset = _Films(data, list(films.values()), data.dataset(studies[0].split).transform)
    loader = DataLoader(dataset, batch_size=_READ_AT_ONCE, num_workers=data.num_workers, collate_fn=list)
    pairs: list[dict[str, Any]] = []
    with whole_file(folder / _FILMS) as part:
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(films), *dataset.transform.size))
        samples_of_films = (samples for group in progress(loader, "reading films") for samples in group)
        for row, samples in enumerate(samples_of_films):
            pixels[row] = samples[0].image[0].numpy()
            pairs.extend(_pair(sample, row) for sample in samples)
        pixels.flush()
    write_text(folder / _PAIRS, json.dumps(pairs))


def split_rows(studies: Sequence[Study], train_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and to validate on, in order. The patients are drawn by the seed.

    Raises:
        ValueError: There are too few patients for both.
    """
    patients = list(dict.fromkeys(study.patient_id for study in studies))
    number = round(train_share * len(patients))
    if not 0 < number < len(patients):
        raise ValueError(
            f"{len(studies)} pairs of {len(patients)} patients cannot be split by patient with "
            f"train_share={train_share:g}. Take more pairs, or another share."
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = {patients[index] for index in order[:number]}
    train = [row for row, study in enumerate(studies) if study.patient_id in chosen]
    return train, [row for row, study in enumerate(studies) if study.patient_id not in chosen]


def _pair(sample: Sample, row: int) -> dict[str, Any]:
    """A study of the plan as plain types: its boxes in pixels of the stored film, its key, and the film's rectangle."""
    height, width = sample.image.shape[1:]
    boxes = (sample.boxes.double().numpy() * [width, height, width, height]).tolist()
    study = asdict(replace(sample.study, image=row, boxes=boxes))
    return {"study": study, "film": sample.film.tolist(), "key": pair_keys(collate([sample]))[0]}


class PlanFilms:
    """The n pairs of a plan, with their films on disk.

    Args:
        folder: Folder of the plan.

    Attributes:
        studies: The n studies; `image` is the row of the film.
        keys: Their keys in a map store.
        findings: Names of the findings that some film has.
    """

    def __init__(self, folder: Path) -> None:
        pairs = json.loads((folder / _PAIRS).read_text(encoding="utf-8"))
        self.studies = [Study.from_record(pair["study"]) for pair in pairs]
        self.keys = [pair["key"] for pair in pairs]
        self.findings = sorted({finding for study in self.studies for finding in study.film_findings})
        self._film = torch.tensor([pair["film"] for pair in pairs])
        self._pixels = np.load(folder / _FILMS, mmap_mode="r")

    def batch(self, rows: Sequence[int], drop: Mapping[str, Tensor] = MappingProxyType({})) -> StudyBatch:
        """The pairs of these rows, with boxes in [0, 1] of the frame, and their rows of the tensors in `drop`."""
        pixels = torch.from_numpy(self._pixels[[int(self.studies[row].image) for row in rows]])
        images = pixels[:, None].expand(-1, 3, -1, -1)
        batch = collate([
            Sample(self.studies[row], image, self.boxes(row), self._film[row])
            for row, image in zip(rows, images, strict=True)
        ])  # fmt: skip
        return {**batch, **{name: part[list(rows)] for name, part in drop.items()}}  # type: ignore[typeddict-item]

    def boxes(self, row: int) -> Tensor:
        """The boxes of a pair, `(K, 4)`, in [0, 1] of the frame."""
        height, width = self._pixels.shape[1:]
        return torch.tensor(self.studies[row].boxes).view(-1, 4) / torch.tensor([width, height, width, height])

    def split(self, train_share: float, seed: int) -> tuple[list[int], list[int]]:
        """Rows to train on and to validate on; see `split_rows`."""
        return split_rows(self.studies, train_share, seed)

    def loader(self, rows: Sequence[int], batch_size: int, drop: Mapping[str, Tensor], **settings: Any) -> DataLoader:
        """Batches of these rows, in order by default, with the rows of the tensors in `drop`."""
        # The films are on disk as the model takes them: a worker process would cost more than it gives.
        collate_fn = partial(self.batch, drop=drop)
        return DataLoader(list(rows), batch_size, num_workers=0, collate_fn=collate_fn, **settings)  # type: ignore[arg-type]
