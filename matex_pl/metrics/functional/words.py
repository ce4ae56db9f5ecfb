"""Location of the map of a single word: whether the word "left" points to the patient's left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.anatomy import side_words
from matex_pl.maps import Attribution
from matex_pl.metrics.functional.mass import half_share


def word_laterality(maps: Attribution, phrases: Sequence[str], content_box: Tensor | None = None) -> Tensor:
    """Share of the positive map of a word of side that lies on that side of the patient, `(B,)` in [0, 1].

    The words are those of `anatomy.side_words`, "left" or "RLL". Several words of a phrase are averaged. An even map
    has 0.5. NaN for a phrase without such a word, and if no word has a positive value.

    Args:
        maps: Maps with `interactions` and `phrases`.
        phrases: The B phrases.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame; the whole frame by
            default.

    Raises:
        ValueError: The maps hold no phrases, or the method has no interactions.
    """
    values = []
    for row, (heats, words, phrase) in enumerate(zip(maps.word_maps, maps.words, phrases, strict=True)):
        named = dict(side_words(phrase))
        found = [(heat, named[word.start]) for heat, word in zip(heats, words, strict=True) if word.start in named]
        if not found:
            values.append(heats.new_tensor(torch.nan))
            continue
        box = None if content_box is None else content_box[row : row + 1].expand(len(found), 4)
        values.append(half_share(torch.stack([heat.relu() for heat, _ in found]), [s for _, s in found], box).nanmean())
    return torch.stack(values)
