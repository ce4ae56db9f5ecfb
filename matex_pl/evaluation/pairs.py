"""Image-text pairs of an evaluation: a seeded selection from a split, read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from matex_pl.anatomy import named_side, swap_sides
from matex_pl.attribution.core.capture import borrowed
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.datamodule import ChestXrayDataModule, PairDataset
from matex_pl.data.pair import ImageTextBatch, ImageTextPair, collate_readable
from matex_pl.maps import full_precision

STAGE_OF = {"train": "fit", "val": "validate", "test": "test"}


def prepare_data(data: ChestXrayDataModule, image_size: tuple[int, int], *splits: str) -> None:
    """List the pairs of a data module, without a trainer.

    Args:
        data: Data module.
        image_size: Height and width of the model's input.
        splits: Names of the required splits.

    Raises:
        ValueError: If the data module has another image size, or one of the splits is empty.
    """
    if data.image_size not in (None, image_size):
        raise ValueError(
            f"The data module has image_size {data.image_size}, but the checkpoint takes {image_size}. Leave "
            "image_size out of the data module."
        )
    data.image_size = image_size
    data.prepare_data()
    for split in splits:
        data.setup(STAGE_OF[split])


def choose_pairs(
    data: ChestXrayDataModule, split: str, number: int, seed: int, *, boxed: bool = True
) -> list[ImageTextPair]:
    """Up to `number` pairs of a split, drawn with the seed, in the order of the split.

    Args:
        data: Data module, prepared.
        split: `train`, `val` or `test`.
        number: Maximum number of pairs; -1 for all.
        seed: Random seed of the draw.
        boxed: Whether to draw only pairs with boxes, if the split has any.
    """
    pairs = data.pairs[split]
    with_boxes = [pair for pair in pairs if pair.boxes]
    pairs = with_boxes if boxed and with_boxes else pairs
    if number < 0 or number >= len(pairs):
        return list(pairs)
    order = np.random.default_rng(seed).permutation(len(pairs))[:number]
    return [pairs[index] for index in sorted(order)]


def read_pairs(
    data: ChestXrayDataModule, split: str, pairs: list[ImageTextPair], batch_size: int
) -> list[ImageTextBatch]:
    """Pairs with their pixels as batches of up to `batch_size`, each image decoded once.

    Raises:
        ValueError: An image cannot be read.
    """
    images = PairDataset(data, pairs, data.dataset(split).transform)
    loader = DataLoader(images, batch_size=batch_size, num_workers=data.num_workers, collate_fn=collate_readable)
    batches = []
    for batch, unreadable in progress(loader, f"reading pairs, by {batch_size}"):
        if unreadable:
            raise unreadable[0].error()
        batches.append(batch)
    return batches


def model_inputs(clip: Clip, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
    """Normalized images `(B, 3, H, W)` and tokens `(B, T)`, on the model's device."""
    return clip.normalize(batch["image"].to(clip.std.device)), clip.tokenize(batch["phrase"])


def embed_pairs(clip: Clip, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of images and phrases, `(B, D)` each, in the precision of `metrics.removal`."""
    with borrowed(clip):
        return full_precision(clip.encode_image(images)), full_precision(clip.encode_text(tokens))


def with_phrases(batch: ImageTextBatch, phrases: Sequence[str | None]) -> ImageTextBatch:
    """Batch with other phrases; None keeps the phrase of the batch."""
    changed = [new or old for new, old in zip(phrases, batch["phrase"], strict=True)]
    return cast(ImageTextBatch, {**batch, "phrase": changed})


def swapped_phrases(phrases: Sequence[str]) -> list[str | None]:
    """Phrases with right and left exchanged; None for a phrase that does not name exactly one side."""
    return [swap_sides(phrase) if named_side(phrase) else None for phrase in phrases]


def other_phrases(phrases: Sequence[str], findings: Sequence[str]) -> list[str | None]:
    """Phrase of another pair for each of B pairs: that of the next pair, cyclic, with another finding.

    If no pair has another finding, or the finding is unknown, the next pair with another wording is used. None if all
    phrases are equal.

    Args:
        phrases: Phrase of each pair.
        findings: Finding that each phrase names; empty if unknown.

    Raises:
        ValueError: If the two differ in length.
    """
    if len(phrases) != len(findings):
        raise ValueError(
            f"There are {len(phrases)} phrases, but findings of {len(findings)} pairs. Give one finding per phrase."
        )
    chosen = []
    for row, (phrase, finding) in enumerate(zip(phrases, findings, strict=True)):
        following = [*range(row + 1, len(phrases)), *range(row)]
        reworded = [other for other in following if phrases[other] != phrase]
        about_another = [other for other in reworded if "" != findings[other] != finding != ""]
        chosen.append(next((phrases[other] for other in about_another or reworded), None))
    return chosen


def shuffled_phrases(batches: Sequence[ImageTextBatch], seed: int) -> list[list[str | None]]:
    """Phrases of all pairs, exchanged among the patients, by batch: no pair gets a phrase of its own patient.

    Every phrase is given once. If a patient has more than half of the pairs, some of them have no other phrase: None.

    Args:
        batches: Batches of pairs.
        seed: Random seed of the exchange.
    """
    phrases = [phrase for batch in batches for phrase in batch["phrase"]]
    patients = [patient for batch in batches for patient in batch["patient_id"]]
    number, counts = len(phrases), Counter(patients)
    rng = np.random.default_rng(seed)
    rank = dict(zip(sorted(counts), rng.permutation(len(counts)), strict=True))
    # The pairs of a patient stand together, so a shift by the longest run leaves every patient.
    order = sorted(rng.permutation(number).tolist(), key=lambda row: rank[patients[row]])
    shift = max(counts.values(), default=0)
    given: list[str | None] = [None] * number
    for place, row in enumerate(order):
        other = order[(place + shift) % number]
        given[row] = phrases[other] if patients[other] != patients[row] else None
    chosen = iter(given)
    return [[next(chosen) for _ in batch["phrase"]] for batch in batches]


def other_phrases_of(batches: Sequence[ImageTextBatch]) -> list[list[str | None]]:
    """`other_phrases` of all pairs, by batch."""
    phrases = [phrase for batch in batches for phrase in batch["phrase"]]
    chosen = iter(other_phrases(phrases, [finding for batch in batches for finding in batch["finding"]]))
    return [[next(chosen) for _ in batch["phrase"]] for batch in batches]
