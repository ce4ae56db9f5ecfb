"""The pairs of a benchmark on the device, with all that every method needs of them, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from matex_pl.anatomy import named_side, swap_sides
from matex_pl.attribution import AttributionMethod
from matex_pl.attribution.base import progress
from matex_pl.attribution.fill import FILLS
from matex_pl.clip import Clip
from matex_pl.data.record import Study, StudyBatch
from matex_pl.maps import AttributionMaps, full_precision
from matex_pl.metrics.removal import end_scores
from matex_pl.pairs import other_phrases
from matex_pl.store import MapStore, pair_keys


@dataclass(frozen=True)
class Pairs:
    """A batch of B pairs, and the same films with other phrases.

    Args:
        batch: As the loader gave it, on the CPU.
        image: `(B, D)` embeddings.
        text: `(B, D)` embeddings.
        keys: Of the pairs, in the map store.
        other: Each film with another study's phrase; None where all phrases are alike.
        swapped: Each film with its phrase's right and left exchanged; the phrase itself where it names no one side.
        sides: The one side that each phrase names; empty where none.
        blank: `(B,)` scores of what stands in for the whole film, by fill.
    """

    batch: StudyBatch
    image: Tensor
    text: Tensor
    keys: list[str]
    other: list[str | None]
    swapped: list[str]
    sides: list[str]
    blank: dict[str, Tensor]

    @property
    def score(self) -> Tensor:
        """Cosines `(B,)`."""
        return (self.image * self.text).sum(1)

    def inputs(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Normalised images `(B, 3, H, W)` and tokens `(B, T)`, on the model's device."""
        return clip.normalise(self.batch["image"].to(clip.std.device)), clip.tokenize(self.batch["phrase"])

    def head(self, number: int) -> Pairs:
        """The first `number` pairs."""
        cut: dict[str, Any] = {name: getattr(self, name)[:number] for name in ("image", "text", "keys", "other")}
        cut |= {"swapped": self.swapped[:number], "sides": self.sides[:number]}
        cut["batch"] = {name: column[:number] for name, column in self.batch.items()}  # type: ignore[index]
        return Pairs(**cut, blank={fill: score[:number] for fill, score in self.blank.items()})

    def keys_with(self, phrases: Sequence[str | None]) -> list[str]:
        """Keys of the films with other phrases; see `with_phrases`."""
        return pair_keys(self.with_phrases(phrases))

    def with_phrases(self, phrases: Sequence[str | None]) -> StudyBatch:
        """The films with other phrases; the own one in place of None."""
        own = self.batch["phrase"]
        return cast(StudyBatch, {**self.batch, "phrase": [new or old for new, old in zip(phrases, own, strict=True)]})


@torch.no_grad()
def prepare_pairs(clip: Clip, batches: Sequence[StudyBatch], studies: Sequence[Study]) -> list[Pairs]:
    """Embed the pairs, and choose the phrases that sensitivity is measured with."""
    phrases = [study.phrase for study in studies]
    others = dict(
        zip((study.id for study in studies), other_phrases(phrases, [s.finding for s in studies]), strict=True)
    )
    prepared = []
    for batch in progress(batches, "embedding"):
        images, tokens = clip.normalise(batch["image"].to(clip.std.device)), clip.tokenize(batch["phrase"])
        image, text = (full_precision(part) for part in (clip.encode_image(images), clip.encode_text(tokens)))
        sides = [named_side(phrase) for phrase in batch["phrase"]]
        prepared.append(
            Pairs(
                batch=batch,
                image=image,
                text=text,
                keys=pair_keys(batch),
                other=[others[study] for study in batch["id"]],
                swapped=[
                    swap_sides(phrase) if side else phrase for phrase, side in zip(batch["phrase"], sides, strict=True)
                ],
                sides=sides,
                blank={fill: end_scores(clip, images, fill, text)[0] for fill in FILLS},
            )
        )
    return prepared


def fill_store(clip: Clip, method: AttributionMethod, store: MapStore, batch: StudyBatch, size: int) -> None:
    """Make the maps of the pairs that the store does not have, and keep them as they come.

    Args:
        clip: The model.
        method: What makes the maps.
        store: Where they are kept.
        batch: The pairs; the same pair may come twice.
        size: Most pairs of one call; where the method's work is on the film, a call has all pairs of one film instead.
    """
    keys = pair_keys(batch)
    lacking = set(store.missing(keys))
    rows = list({key: row for row, key in enumerate(keys) if key in lacking}.values())
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    for group in _films(batch, rows) if method.repeats else chunks:
        store.write([keys[row] for row in group], _attribute(clip, method, batch, group))


def _films(batch: StudyBatch, rows: Sequence[int]) -> list[list[int]]:
    films: dict[str, list[int]] = {}
    for row in rows:
        films.setdefault(batch["film_id"][row], []).append(row)
    return list(films.values())


def _attribute(clip: Clip, method: AttributionMethod, batch: StudyBatch, rows: Sequence[int]) -> AttributionMaps:
    device = clip.std.device
    images = clip.normalise(batch["image"][rows].to(device))
    phrases, films = [batch["phrase"][row] for row in rows], batch["film"][rows].to(device)
    if method.repeats:
        return method.attribute_phrases(clip, images[0], phrases, films[0])
    return method.attribute(clip, images, clip.tokenize(phrases), phrases, films)


def joined(batches: Sequence[StudyBatch]) -> StudyBatch:
    """Several batches as one."""
    parts: dict[str, Any] = {}
    for name in batches[0]:
        columns = [cast(dict[str, Any], batch)[name] for batch in batches]
        parts[name] = (
            torch.cat(columns) if isinstance(columns[0], Tensor) else [item for part in columns for item in part]
        )
    return cast(StudyBatch, parts)
