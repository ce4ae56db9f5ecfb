"""Location of the map of a single word: whether the word "left" points to the patient's left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.anatomy import side_words
from matex_pl.maps import Word, moved
from matex_pl.metrics.functional.mass import half_share


def word_laterality(
    word_maps: Sequence[Tensor],
    words: Sequence[Sequence[Word]],
    phrases: Sequence[str],
    content_box: Tensor | None = None,
) -> Tensor:
    """Share of the positive map of a word of side that lies on that side of the patient, `(B,)` in [0, 1].

    The words are those of `anatomy.side_words`, "left" or "RLL". The value is the mean over the words of a phrase. An
    even map has 0.5. NaN for a phrase without such a word, and if no such word has a positive value.

    Args:
        word_maps: Signed maps of the words of B phrases, `(W, Gh, Gw)` each, from `Attribution.word_maps`.
        words: The words of the B phrases, from `Attribution.words`.
        phrases: The B phrases.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame; the whole frame by
            default.
    """
    found = [
        (row, maps[place], named[word.start])
        for row, (maps, those, phrase) in enumerate(zip(word_maps, words, phrases, strict=True))
        for named in [dict(side_words(phrase))]
        for place, word in enumerate(those)
        if word.start in named
    ]
    if not found:
        return torch.full((len(phrases),), torch.nan)
    owners, heats, sides = zip(*found, strict=True)
    heat = torch.stack(heats)
    rows = moved(torch.tensor(owners), heat.device)
    box = None if content_box is None else content_box.to(heat.device)[rows]
    share = half_share(heat.relu(), sides, box)
    # Mean over the words of each phrase that count.
    total = share.new_zeros(2, len(phrases))
    counted = torch.stack([share.nan_to_num(0), (~share.isnan()).to(share.dtype)])
    above, below = total.index_add(1, rows, counted)
    return above / below
