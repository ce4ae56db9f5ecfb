"""Small maps of words: one scale, two colors, as many rows as needed."""

from dataclasses import replace

import numpy as np
import pytest
from families import worded

from matex_pl.visualization.word_maps import word_tiles

PHRASE = "Left lower lobe consolidation with effusion and edema"
IMAGE = np.full((64, 64), 100, np.uint8)


def heats(count, **values):
    maps = np.zeros((count, 64, 64), np.float32)
    for place, value in values.items():
        maps[int(place[1:])] = value
    return maps


def tiles(picture, count, width=880):
    """Brightness of red minus blue in the middle of each tile of the first row."""
    side, gap = 130, 12
    lefts = [20 + k * (side + gap) for k in range(count)]
    return [
        int(picture[44 + side // 2, left + side // 2, 0]) - int(picture[44 + side // 2, left + side // 2, 2])
        for left in lefts
    ]


def test_signs_have_colors_and_words_one_scale():
    picture = word_tiles(image=IMAGE, heats=heats(8, w0=2.0, w1=-2.0, w2=1.0), words=worded(PHRASE))
    first, second, third, fourth = tiles(picture, 4)
    assert first > 2 * third / 1.5 > 0
    assert second < 0
    assert fourth == 0
    twice = word_tiles(image=IMAGE, heats=heats(8, w0=4.0, w1=-4.0, w2=2.0), words=worded(PHRASE))
    assert np.array_equal(picture, twice)


def test_long_phrases_take_more_rows():
    words = worded(PHRASE)
    rows = [word_tiles(image=IMAGE, heats=heats(n), words=words[:n]).shape[0] for n in (1, 6, 7, 8)]
    assert rows[0] == rows[1] < rows[2] == rows[3]
    # No words, and words that the model did not read.
    assert word_tiles(image=IMAGE, heats=heats(0), words=[]).shape[0] < rows[0]
    cut = [*words[:6], *(replace(word, cut=True) for word in words[6:])]
    assert word_tiles(image=IMAGE, heats=heats(8, w0=1.0), words=cut).shape[0] == rows[0]


def test_hidden_words_do_not_show():
    maps = heats(2, w0=1.0)
    hidden = [
        word_tiles(image=IMAGE, heats=maps, words=worded(text), show_text=False) for text in ("a b", "left right")
    ]
    assert np.array_equal(*hidden)


@pytest.mark.parametrize("maps", [heats(3), np.full((8, 64, 64), np.nan), np.zeros((8, 32, 64))])
def test_wrong_maps_are_refused(maps):
    with pytest.raises(ValueError, match=r"heats must hold a finite map \(64, 64\) for each of 8 words, got"):
        word_tiles(image=IMAGE, heats=maps, words=worded(PHRASE))
