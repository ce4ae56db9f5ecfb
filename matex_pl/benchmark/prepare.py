"""Pairs of a benchmark in batches, with the inputs that all methods share, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from matex_pl.anatomy import named_side
from matex_pl.attribution.core.fill import FILLS
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.pair import ImageTextBatch, rows_of
from matex_pl.evaluation.pairs import (
    embed_pairs,
    model_inputs,
    other_phrases_of,
    shuffled_phrases,
    swapped_phrases,
    with_phrases,
)
from matex_pl.evaluation.store import pair_keys
from matex_pl.metrics.removal import end_scores


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of B pairs, and the same images with other phrases.

    Args:
        batch: Batch of the loader, on the CPU.
        image: Image embeddings `(B, D)`.
        text: Text embeddings `(B, D)`.
        other: Phrase of another pair for each image; None if all phrases are equal.
        swapped: Each phrase with right and left exchanged; None if the phrase does not name a single side.
        shuffled: Phrase of another patient for each image, see `shuffled_phrases`; None without masks.
        sides: The single side that each phrase names, or an empty string.
        keys: Keys of the pairs in the map store.
        other_keys: Keys of the images with the other phrases; where these are None, with their own phrases.
        swapped_keys: Keys of the images with the swapped phrases; where these are None, with their own phrases.
        shuffled_keys: Keys of the images with the shuffled phrases; where these are None, with their own phrases.
        blank: Scores `(B,)` of the fill alone, by fill.
    """

    batch: ImageTextBatch
    image: Tensor
    text: Tensor
    other: list[str | None]
    swapped: list[str | None]
    shuffled: list[str | None]
    sides: list[str]
    keys: list[str]
    other_keys: list[str]
    swapped_keys: list[str]
    shuffled_keys: list[str]
    blank: dict[str, Tensor]

    @property
    def score(self) -> Tensor:
        """Cosines `(B,)`."""
        return (self.image * self.text).sum(1)

    def part(self, start: int, end: int) -> PreparedBatch:
        """Pairs from `start` up to but excluding `end`."""
        cut: dict[str, Any] = {
            name: column[start:end] for name, column in vars(self).items() if name not in ("batch", "blank")
        }
        cut["batch"] = rows_of(self.batch, range(len(self.keys))[start:end])
        return PreparedBatch(**cut, blank={fill: column[start:end] for fill, column in self.blank.items()})

    def variants(self) -> tuple[ImageTextBatch, list[str]]:
        """One batch of the pairs and of their images with all changed phrases, and its keys."""
        number = len(self.keys)
        phrases = [*([None] * number), *self.other, *self.swapped, *self.shuffled]
        keys = [*self.keys, *self.other_keys, *self.swapped_keys, *self.shuffled_keys]
        return with_phrases(rows_of(self.batch, [*range(number)] * 4), phrases), keys


def prepare_pairs(clip: Clip, batches: Sequence[ImageTextBatch], seed: int) -> list[PreparedBatch]:
    """Embed the pairs, and select the phrases of the sensitivity metrics, and of the control of the structures."""
    prepared = []
    shuffled = shuffled_phrases(batches, seed)
    if not any(batch["masks"] for batch in batches):
        shuffled = [[None] * len(batch["phrase"]) for batch in batches]
    changes = zip(other_phrases_of(batches), shuffled, strict=True)
    for batch, (other, mixed) in zip(progress(batches, "embedding"), changes, strict=True):
        images, tokens = model_inputs(clip, batch)
        image, text = embed_pairs(clip, images, tokens)
        swapped = swapped_phrases(batch["phrase"])
        prepared.append(
            PreparedBatch(
                batch=batch,
                image=image,
                text=text,
                other=other,
                swapped=swapped,
                shuffled=mixed,
                sides=[named_side(phrase) for phrase in batch["phrase"]],
                keys=pair_keys(batch),
                other_keys=pair_keys(with_phrases(batch, other)),
                swapped_keys=pair_keys(with_phrases(batch, swapped)),
                shuffled_keys=pair_keys(with_phrases(batch, mixed)),
                blank={fill: end_scores(clip, images, fill, text)[0] for fill in FILLS},
            )
        )
    return prepared
