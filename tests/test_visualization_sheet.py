import re

import numpy as np
import pytest
from families import worded

from matex_pl.visualization.draw import BACKGROUND, BOX_COLOR, FAINT_INK, INK, on_background, overlay
from matex_pl.visualization.sheet import Entry, contact_sheet

# Of three columns on 880 pixels, where a design unit is a pixel; WORDS is where the phrase stands under a tile.
SIDE, GAP, TOP, CELL, WORDS = 266, 20, 120, 411, 58


def arguments(entries=5, **changes):
    """A valid call: a gray 56-pixel image, no box, and so many methods that find nothing."""
    base = {
        "image": np.full((56, 56), 100, np.uint8),
        "boxes": np.zeros((0, 4)),
        "phrase": "Pleural effusion",
        "entries": [entry(f"Method{i}") for i in range(entries)] if isinstance(entries, int) else entries,
        "score": 0.312,
        "title": "Effusion",
        "subtitle": "ViT-B-16",
        "columns": 3,
        "width": 880,
    }
    return {**base, **changes}


def entry(name="M2ib", **changes):
    words = worded("Pleural effusion", [0.0, 1.0])
    return Entry(**{"name": name, "heat": np.zeros((56, 56)), "words": words, **changes})


def blob(row, column):
    rows, columns = np.mgrid[:56, :56]
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 50)


def cell(sheet, index):
    """A tile of three columns with what stands under it; 0 is the image."""
    left, top = GAP + index % 3 * (SIDE + GAP), TOP + index // 3 * (CELL + GAP)
    return sheet[top : top + CELL, left : left + SIDE]


def tile(sheet, index):
    return cell(sheet, index)[:SIDE]


def has(part, color):
    return (part == color).all(-1).any()


def test_size_depends_on_width_columns_lines_entries_and_aspect_alone():
    shape = contact_sheet(**arguments()).shape
    assert shape[1:] == (880, 3)
    phrase = "effusion " * 77
    long = [entry("A name that goes on and on " * 3, words=worded(phrase), note="a note " * 30) for _ in range(5)]
    assert contact_sheet(**arguments(long, phrase=phrase)).shape == shape
    nothing = [entry(heat=None, words=None, note="no attention weights " * 50) for _ in range(5)]
    assert contact_sheet(**arguments(nothing, boxes=[[0.1, 0.1, 0.4, 0.4]], title="", subtitle="")).shape == shape
    assert contact_sheet(**arguments(side_markers=False, score=-1.0)).shape == shape
    large = [entry(heat=np.zeros((112, 112))) for _ in range(5)]
    assert contact_sheet(**arguments(large, image=np.zeros((112, 112, 3), np.uint8))).shape == shape
    assert contact_sheet(**arguments(text_lines=1)).shape[0] < shape[0]


@pytest.mark.parametrize(("entries", "rows"), [(2, 1), (3, 2), (5, 2), (6, 3), (20, 7)])
def test_height_grows_by_equal_rows(entries, rows):
    row = CELL + GAP
    assert contact_sheet(**arguments(entries)).shape[0] == contact_sheet(**arguments(2)).shape[0] + (rows - 1) * row


def test_a_single_entry_fills_the_width():
    sheet = contact_sheet(**arguments(1, columns=6))
    np.testing.assert_array_equal(sheet, contact_sheet(**arguments(1, columns=2)))
    gray = np.nonzero((sheet[TOP + 100] == 100).all(-1))[0]
    assert len(gray) == 2 * 410


@pytest.mark.parametrize("columns", [1, 2, 5, 6])
def test_tiles_lie_within_the_sheet(columns):
    sheet = contact_sheet(**arguments(8, columns=columns, side_markers=False))
    assert sheet.shape[1] == 880
    gray = (sheet == 100).all(-1)
    rows, places = np.nonzero(gray)
    side = gray.any(0).sum() // columns
    assert gray.sum() == 9 * side**2
    assert places.min() <= 879 - places.max() <= places.min() + columns
    assert rows.max() < sheet.shape[0]


@pytest.mark.parametrize("size", [(56, 28), (28, 56), (3, 56), (56, 3), (1, 1)])
def test_tiles_have_the_images_aspect(size):
    heat = np.zeros(size)
    call = arguments([entry(heat=heat), entry(heat=None, note="why " * 20)], image=np.full(size, 100, np.uint8))
    sheet = contact_sheet(**call, side_markers=False)
    height = round(SIDE * size[0] / size[1])
    assert sheet.shape[0] - contact_sheet(**arguments(2)).shape[0] == height - SIDE
    assert (sheet == 100).all(-1).sum() == 2 * SIDE * height


def test_sheet_is_deterministic_and_leaves_its_inputs_alone():
    heat, boxes = blob(10, 40), np.array([[-0.1, 0.2, 0.5, 1.2]])
    call = arguments([entry(heat=heat)], boxes=boxes)
    before = [array.copy() for array in (call["image"], heat, boxes)]
    np.testing.assert_array_equal(contact_sheet(**call), contact_sheet(**call))
    for old, new in zip(before, (call["image"], heat, boxes), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_same_map_gives_the_same_pixels_in_every_place():
    same = [entry("A", heat=blob(10, 40)), entry("B", heat=blob(40, 10)), entry("C", heat=blob(10, 40))]
    sheet = contact_sheet(**arguments([*same, *same], boxes=[[0.2, 0.2, 0.5, 0.6]]))
    for first, second in ((1, 3), (1, 6), (2, 5)):
        np.testing.assert_array_equal(tile(sheet, first), tile(sheet, second))
    assert (tile(sheet, 1) != tile(sheet, 2)).any()
    np.testing.assert_array_equal(cell(sheet, 2), cell(sheet, 5))


def test_all_maps_are_on_one_scale():
    values = (0.2, 0.6, 1.0)
    sheet = contact_sheet(**arguments([entry(heat=np.full((56, 56), value)) for value in values]))
    for index, value in enumerate(values, start=1):
        expected = overlay(np.full((1, 1, 3), 100, np.uint8), np.full((1, 1), value, np.float32))
        assert (tile(sheet, index)[40:] == expected[0, 0]).all()


def test_image_comes_first_without_heat_or_words():
    sheet = contact_sheet(**arguments([entry(heat=blob(30, 30))] * 2), side_markers=False)
    assert (tile(sheet, 0) == 100).all()
    assert (tile(sheet, 1) != 100).any()
    assert has(cell(sheet, 0)[SIDE : SIDE + WORDS], INK)
    assert (cell(sheet, 0)[SIDE + WORDS :] == BACKGROUND).all()


def test_boxes_are_drawn_at_their_edges_on_every_tile():
    sheet = contact_sheet(**arguments(boxes=[[0.25, 0.5, 0.5, 0.75], [1.2, 0.1, 1.5, 0.5]]), side_markers=False)
    for index in range(6):
        rows, columns = np.nonzero((tile(sheet, index) == BOX_COLOR).all(-1))
        assert (columns.min(), columns.max() + 1) == (round(SIDE / 4), round(SIDE / 2))
        assert (rows.min(), rows.max() + 1) == (round(SIDE / 2), round(SIDE * 0.75))


def test_cross_stands_on_the_maximum_of_each_map():
    places = [(20, 40), (40, 12)]
    sheet = contact_sheet(**arguments([entry(heat=blob(*place)) for place in places]), side_markers=False)
    for index, (row, column) in enumerate(places, start=1):
        rows, columns = np.nonzero((tile(sheet, index) == INK).all(-1))
        assert abs(rows.mean() - (row + 0.5) / 56 * SIDE) <= 1
        assert abs(columns.mean() - (column + 0.5) / 56 * SIDE) <= 1


def test_patients_sides_are_marked_in_the_upper_corners_of_every_tile():
    sheet = contact_sheet(**arguments())
    for index in range(6):
        changed = (tile(sheet, index) != 100).any(-1)
        assert changed[:30, :30].any()
        assert changed[:30, -30:].any()
        changed[:30, :30] = changed[:30, -30:] = False
        assert not changed.any()


def test_words_are_shaded_by_their_own_methods_shares():
    entries = [entry(words=worded("Pleural effusion", shares)) for shares in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])]
    sheet = contact_sheet(**arguments(entries))
    hot = on_background(np.ones((1, 1), np.float32))[0, 0]
    lines = [cell(sheet, index)[SIDE + WORDS + 2] for index in (1, 2, 3)]
    left, right, none = (np.nonzero((line == hot).all(-1))[0] for line in lines)
    assert left.max() < right.min()
    assert not len(none)


def test_a_long_phrase_keeps_to_its_lines_and_shows_more_of_them_when_asked():
    phrase = " ".join(f"word{i}" for i in range(24))
    call = arguments(
        [entry(words=worded(phrase, np.linspace(0, 1, 24).tolist()))] * 2,
        phrase=phrase,
    )
    three, six = contact_sheet(**call), contact_sheet(**call, text_lines=6)
    np.testing.assert_array_equal(cell(three, 1)[: SIDE + WORDS + 50], cell(six, 1)[: SIDE + WORDS + 50])
    assert six.shape[0] == three.shape[0] + 3 * 29
    assert has(cell(three, 1)[-29:], INK)


def test_without_a_map_a_frame_says_why():
    reason = "needs attention weights, which this tower does not have"
    sheet = contact_sheet(**arguments([entry(heat=None, note=reason), entry(heat=None), entry()]))
    told, bare = tile(sheet, 1), tile(sheet, 2)
    for part in (told, bare):
        assert (part[0] == FAINT_INK).all()
        assert (part[:, -1] == FAINT_INK).all()
        assert has(part[100:170], INK)
    assert has(told[2:-2, 2:-2], FAINT_INK)
    assert not has(bare[2:-2, 2:-2], FAINT_INK)
    # The words have their place still, and the neighbor is as it is without them.
    np.testing.assert_array_equal(cell(sheet, 1)[SIDE:], cell(sheet, 2)[SIDE:])
    np.testing.assert_array_equal(cell(sheet, 3), cell(contact_sheet(**arguments([entry()] * 3)), 3))


def test_without_words_that_is_said_in_faint_ink():
    sheet = contact_sheet(**arguments([entry(words=None), entry(words=None, heat=None), entry()]))
    for index, expected in ((1, True), (2, True), (3, False)):
        words = cell(sheet, index)[SIDE + WORDS :]
        assert has(words, FAINT_INK) == expected
        assert has(words, INK) != expected


def test_a_map_of_zeros_is_noted():
    entries = [entry(heat=np.zeros((56, 56))), entry(heat=blob(30, 30)), entry(note="13 forwards")]
    notes = [cell(contact_sheet(**arguments(entries)), index)[SIDE + 30 : SIDE + WORDS] for index in (1, 2, 3)]
    ink = [int((note != BACKGROUND).any(-1).sum()) for note in notes]
    assert ink[1] == 0 < ink[0] < ink[2]


def test_without_words_the_phrase_stands_alone():
    sheet = contact_sheet(**arguments([entry(words=[])] * 2))
    assert has(cell(sheet, 1)[SIDE + WORDS :], INK)


def test_a_long_name_is_written_smaller_before_it_is_cut():
    names = ("A name that just fits here", "A name a little wider than it", "A name a little wider than its tile " * 3)
    sheet = contact_sheet(**arguments([entry(name) for name in names]))
    shown = [(cell(sheet, index)[SIDE + 2 : SIDE + 32] != BACKGROUND).any(-1) for index in (1, 2, 3)]
    heights = [int(np.ptp(np.nonzero(ink)[0])) for ink in shown]
    assert heights[0] > heights[1] >= heights[2]


@pytest.mark.parametrize("text", ["肺 浸润 🫁", "выпот", "a\x00b\u200b\ud800\n\tc", "ﬂüssig ≥ 3 µm", "x" * 5000, ""])
def test_no_text_is_refused_or_changes_the_size(text):
    entries = [entry(text, note=text, words=worded(text), **heat) for heat in ({}, {"heat": None})]
    call = arguments(entries, title=text, subtitle=text, phrase=text)
    assert contact_sheet(**call).shape == contact_sheet(**arguments(2)).shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((56, 56))}, "image must be (H, W) or (H, W, 3) uint8, got (56, 56) float64"),
        ({"boxes": [[10, 10, 90, 90]]}, "boxes must be in [0, 1] of the frame"),
        ({"entries": []}, "contact_sheet needs at least one entry, got none"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        ({"text_lines": 0}, "text_lines must be at least 1, got 0"),
        ({"width": 395}, "A width of 395 pixels leaves 3 columns 119 pixels each, but a tile needs 120."),
        ({"heat": np.zeros((7, 7))}, "heat of 'Rise' must have the image's (H, W) = (56, 56), got (7, 7)"),
        ({"heat": np.full((56, 56), 1.5)}, "heat of 'Rise' must be in [0, 1], got values from 1.5 to 1.5"),
        ({"heat": np.full((56, 56), np.nan)}, "heat of 'Rise' must be in [0, 1], got values from nan"),
        ({"words": worded("Left base")}, "words of 'Rise' must be those of the phrase, got 'Left' at 0 to 4"),
        ({"words": worded("Pleural effusion", [0.5, 2.0])}, "Shares of words of 'Rise' must be in [0, 1]"),
    ],
)
def test_errors_name_what_is_wrong_and_the_entry(changes, message):
    own = {key: value for key, value in changes.items() if key in ("heat", "words")}
    rest = {key: value for key, value in changes.items() if key not in own}
    with pytest.raises(ValueError, match=re.escape(message)):
        contact_sheet(**arguments(**{"entries": [entry(), entry(), entry("Rise", **own)], **rest}))
