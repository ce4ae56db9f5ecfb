"""Pairs of a benchmark in batches, with the inputs that all methods share, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from matex_pl.anatomy import named_side
from matex_pl.attribution.core.fill import FILLS
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.pairs import embed_pairs, model_inputs, other_phrases_of, swapped_phrases, with_phrases
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
        sides: The single side that each phrase names, or an empty string.
        keys: Keys of the pairs in the map store.
        other_keys: Keys of the images with the other phrases; where these are None, with their own phrases.
        swapped_keys: Keys of the images with the swapped phrases; where these are None, with their own phrases.
        blank: Scores `(B,)` of the fill alone, by fill.
    """

    batch: ImageTextBatch
    image: Tensor
    text: Tensor
    other: list[str | None]
    swapped: list[str | None]
    sides: list[str]
    keys: list[str]
    other_keys: list[str]
    swapped_keys: list[str]
    blank: dict[str, Tensor]

    @property
    def score(self) -> Tensor:
        """Cosines `(B,)`."""
        return (self.image * self.text).sum(1)

    def part(self, start: int, end: int) -> PreparedBatch:
        """Pairs from `start` up to but excluding `end`."""
        nested = ("batch", "blank")
        cut: dict[str, Any] = {name: column[start:end] for name, column in vars(self).items() if name not in nested}
        for name in nested:
            cut[name] = {key: column[start:end] for key, column in getattr(self, name).items()}
        return PreparedBatch(**cut)

    def variants(self) -> tuple[ImageTextBatch, list[str]]:
        """One batch of the pairs and of their images with the other and the swapped phrases, and its keys."""
        repeated = {
            name: torch.cat([column] * 3) if isinstance(column, Tensor) else column * 3
            for name, column in cast(dict[str, Any], self.batch).items()
        }
        changed = [with_phrases(self.batch, phrases)["phrase"] for phrases in (self.other, self.swapped)]
        repeated["phrase"] = [*self.batch["phrase"], *changed[0], *changed[1]]
        return cast(ImageTextBatch, repeated), [*self.keys, *self.other_keys, *self.swapped_keys]


def prepare_pairs(clip: Clip, batches: Sequence[ImageTextBatch]) -> list[PreparedBatch]:
    """Embed the pairs, and select the phrases of the sensitivity metrics."""
    prepared = []
    for batch, other in zip(progress(batches, "embedding"), other_phrases_of(batches), strict=True):
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
                sides=[named_side(phrase) for phrase in batch["phrase"]],
                keys=pair_keys(batch),
                other_keys=pair_keys(with_phrases(batch, other)),
                swapped_keys=pair_keys(with_phrases(batch, swapped)),
                blank={fill: end_scores(clip, images, fill, text)[0] for fill in FILLS},
            )
        )
    return prepared
