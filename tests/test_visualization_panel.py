from dataclasses import replace

import numpy as np
import pytest
from families import worded
from PIL import Image

from matex_pl.visualization.draw import BACKGROUND, BOX_COLOR, INK, font, on_background, overlay, picture_grid, save_png
from matex_pl.visualization.panel import CARD_WIDTH, panel
from matex_pl.visualization.words import contrast, ink_on, line_length, phrase_pieces, wrap

SIDE = 384
LEFT, RIGHT, TOP = 20, 420, 88


def arguments(**changes):
    """A valid call: a gray 112-pixel image, no heat, no box, a two-word phrase."""
    base = {
        "image": np.full((112, 112), 100, np.uint8),
        "heat": np.zeros((112, 112)),
        "boxes": np.zeros((0, 4)),
        "phrase": "Pleural effusion",
        "words": worded(changes.get("phrase", "Pleural effusion")),
        "score": 0.312,
        "title": "Effusion",
        "subtitle": "MATEX",
    }
    return {**base, **changes}


def pictures(image):
    """The two square pictures of a panel of the default width."""
    return [image[TOP : TOP + SIDE, left : left + SIDE] for left in (LEFT, RIGHT)]


def hot_pixel(row, column, size=112):
    heat = np.zeros((size, size))
    heat[row, column] = 1
    return heat


def test_size_depends_on_width_lines_and_aspect_alone():
    shape = panel(**arguments()).shape
    assert shape[1:] == (880, 3)
    long = arguments(phrase="effusion " * 77)
    assert panel(**long).shape == shape
    assert panel(**arguments(image=np.zeros((224, 224, 3), np.uint8), heat=np.zeros((224, 224)))).shape == shape
    assert panel(**arguments(boxes=[[0.1, 0.1, 0.4, 0.4]], title="", subtitle="", score=-1.0)).shape == shape
    assert panel(**arguments(), width=440).shape[1] == 440
    assert panel(**arguments(), text_lines=1).shape[0] < shape[0]
    tall = panel(**arguments(image=np.zeros((200, 100), np.uint8), heat=np.zeros((200, 100))))
    assert tall.shape[0] == shape[0] + SIDE


def test_a_stacked_panel_is_legible_in_the_cards_of_tensorboard(monkeypatch):
    sizes = []
    for room in ("draw", "panel", "words"):
        monkeypatch.setattr(f"matex_pl.visualization.{room}.font", lambda size: sizes.append(size) or font(size))
    call = arguments(heat=hot_pixel(3, 4), boxes=[[0.2, 0.2, 0.6, 0.6]])
    image = panel(**call, width=CARD_WIDTH, stacked=True)
    card = 350 / CARD_WIDTH
    assert min(sizes) * card >= 11
    # The gray of the image, row by row: the map and the image stand one above the other, each almost as wide as a card.
    widths = (image == 100).all(-1).sum(1)
    assert widths.max() * card > 0.75 * 350
    rows = np.flatnonzero(widths > 0.9 * widths.max())
    assert np.diff(rows).max() > 20
    assert len(rows) > 1.5 * widths.max()
    # The map, with its cross, is on top.
    tops = image[rows[0] : rows[0] + widths.max()], image[rows[-1] - widths.max() : rows[-1]]
    assert (tops[0] == INK).all(-1).sum() > (tops[1] == INK).all(-1).sum()


def test_panel_is_deterministic_and_leaves_its_inputs_alone():
    call = arguments(heat=hot_pixel(3, 4), boxes=np.array([[-0.1, 0.2, 0.5, 1.2]]))
    image, heat, boxes = call["image"].copy(), call["heat"].copy(), call["boxes"].copy()
    np.testing.assert_array_equal(panel(**call), panel(**call))
    for before, after in ((image, call["image"]), (heat, call["heat"]), (boxes, call["boxes"])):
        np.testing.assert_array_equal(before, after)


def test_patients_right_is_marked_on_the_left_of_both_pictures():
    marked, bare = panel(**arguments()), panel(**arguments(), side_markers=False)
    for with_markers, without in zip(pictures(marked), pictures(bare), strict=True):
        assert (without == 100).all()
        changed = (with_markers != without).any(-1)
        assert changed[:40, :40].any()
        assert changed[:40, -40:].any()
        assert not changed[40:].any()
        assert not changed[:, 40:-40].any()
        # An R has ink in its upper right quarter, an L has none.
        for corner, is_r in ((with_markers[:40, :40], True), (with_markers[:40, -40:], False)):
            ink = (corner == INK).all(-1)
            rows, columns = np.nonzero(ink)
            glyph = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            half_h, half_w = glyph.shape[0] // 2, glyph.shape[1] // 2
            assert glyph[:half_h, half_w + 1 :].any() == is_r


def test_boxes_are_drawn_at_their_edges_on_both_pictures():
    image = panel(**arguments(boxes=[[0.25, 0.5, 0.5, 0.75]]), side_markers=False)
    for picture in pictures(image):
        rows, columns = np.nonzero((picture == BOX_COLOR).all(-1))
        assert (columns.min(), columns.max() + 1) == (SIDE // 4, SIDE // 2)
        assert (rows.min(), rows.max() + 1) == (SIDE // 2, SIDE * 3 // 4)
        assert (picture[240, 144] == 100).all()


@pytest.mark.parametrize(
    "box", [[-0.5, -0.5, 1.5, 1.5], [0, 0, 1, 1], [0.9999, 0.9999, 1, 1], [0.5, 0.5, 0.5001, 0.5001]]
)
def test_boxes_at_the_limits_stay_visible_and_inside(box):
    image = panel(**arguments(boxes=[box]), side_markers=False)
    inside = np.zeros(image.shape[:2], bool)
    for left in (LEFT, RIGHT):
        inside[TOP : TOP + SIDE, left : left + SIDE] = True
        assert (image[TOP : TOP + SIDE, left : left + SIDE] == BOX_COLOR).all(-1).any()
    assert not (image == BOX_COLOR).all(-1)[~inside].any()


def test_boxes_that_show_nothing_are_as_no_box():
    for boxes in ([], np.zeros((0, 4)), [[1.2, 0.1, 1.5, 0.5]]):
        np.testing.assert_array_equal(panel(**arguments(boxes=boxes)), panel(**arguments()))


def test_heat_shows_only_where_the_map_is_positive_and_only_on_the_right():
    heat = np.zeros((112, 112))
    heat[56:, :56] = 0.6
    image, mapped = pictures(panel(**arguments(heat=heat), side_markers=False))
    assert (image == 100).all()
    changed = (mapped != 100).any(-1)
    assert changed[SIDE // 2 + 4 :, : SIDE // 2 - 4].all()
    assert not changed[: SIDE // 2 - 14].any()
    assert not changed[:, SIDE // 2 + 4 :].any()


def test_overlay_gets_stronger_with_the_map():
    image = np.full((1, 5, 3), 60, np.uint8)
    heat = np.linspace(0, 1, 5, dtype=np.float32)[None]
    mixed = overlay(image, heat)
    np.testing.assert_array_equal(mixed[0, 0], image[0, 0])
    distance = np.abs(mixed.astype(int) - 60).sum(-1)[0]
    assert (np.diff(distance) > 0).all()


@pytest.mark.parametrize(("row", "column"), [(20, 90), (90, 20)])
def test_cross_stands_on_the_maximum(row, column):
    _, mapped = pictures(panel(**arguments(heat=hot_pixel(row, column)), side_markers=False))
    rows, columns = np.nonzero((mapped == INK).all(-1))
    assert abs(rows.mean() - (row + 0.5) / 112 * SIDE) <= 1
    assert abs(columns.mean() - (column + 0.5) / 112 * SIDE) <= 1


def test_words_are_shaded_in_reading_order():
    image = panel(**arguments(words=worded("Pleural effusion", [0.0, 0.4])))
    line = image[TOP + SIDE + 48 + 1]
    assert (line[LEFT : LEFT + 60] == BACKGROUND).all()
    columns = np.nonzero((line == shade(1.0)).all(-1))[0]
    assert LEFT + 60 < columns.min() < columns.max() < LEFT + 200


def shade(value):
    return tuple(on_background(np.array([[value]], np.float32))[0, 0].tolist())


def test_ink_is_readable_on_every_shade():
    shades = [shade(value) for value in np.linspace(0, 1, 101)]
    assert min(contrast(ink_on(color), color) for color in shades) > 4
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_pieces_read_like_the_phrase_and_punctuation_has_no_shade():
    phrase = "Right  basilar\n(lower-lobe) opacity, \u2265 3.5 cm."
    pieces = phrase_pieces(phrase, worded(phrase, [0.1, 0.2, 0.0, 0.4, 0.05, 0.2]))
    assert [(piece.text, piece.after_space, piece.relevance) for piece in pieces] == [
        ("Right", False, 0.25),
        ("basilar", True, 0.5),
        ("(", True, 0.0),
        ("lower-lobe", False, 0.0),
        (")", False, 0.0),
        ("opacity", True, 1.0),
        (",", False, 0.0),
        ("\u2265", True, 0.0),
        ("3.5", True, 0.125),
        ("cm", True, 0.5),
        (".", False, 0.0),
    ]


def test_a_cut_phrase_ends_in_an_ellipsis():
    no, acute, process, here = worded("No acute process here.", [0.5, 0.0, 0.5, 0.0])
    words = [no, acute, replace(process, cut=True), replace(here, cut=True)]
    assert [p.text for p in phrase_pieces("No acute process here.", words)] == ["No", "acute", "process", "\u2026"]
    unread = [no, acute, replace(process, share=0.0, cut=True), replace(here, cut=True)]
    assert [p.text for p in phrase_pieces("No acute process here.", unread)] == ["No", "acute", "\u2026"]


def test_without_words_the_phrase_stands_alone():
    assert [(p.text, p.relevance) for p in phrase_pieces("no (ef)fusion", [])] == [("no", 0.0), ("(ef)fusion", 0.0)]
    assert phrase_pieces("", []) == []


def test_wrapped_lines_fit_and_the_last_ends_in_an_ellipsis():
    phrase = "effusion " * 40 + "x" * 300
    pieces = phrase_pieces(phrase, worded(phrase))
    lines = wrap(pieces, 400, 20, 3)
    assert len(lines) == 3
    assert lines[-1][-1].text == "…"
    assert all(line_length(line, 20) <= 400 for line in lines)
    everything = wrap(pieces, 400, 20, 99)
    assert all(line_length(line, 20) <= 400 for line in everything)
    assert everything[-1][-1].text.endswith("…")


@pytest.mark.parametrize("text", ["肺 浸润 🫁", "выпот", "a\x00b\u200b\ud800\n\tc", "ﬂüssig ≥ 3 µm", "x" * 5000, ""])
def test_no_text_is_refused_or_changes_the_size(text):
    call = arguments(title=text, subtitle=text, phrase=text)
    assert panel(**call).shape == panel(**arguments()).shape


def test_one_font_writes_the_signs_of_reports():
    glyphs = {bytes(font(24).getmask(sign)) for sign in "äßéłşğ≥≤°µαβ“”→↑½²ČΔж"}
    assert len(glyphs) == 21
    assert bytes(font(24).getmask("肺")) not in glyphs


def test_missing_letters_are_marked_and_panels_without_text_are_bars():
    bars = [panel(**arguments(phrase=phrase), show_text=False) for phrase in ("肺 肺", "lung gone.")]
    np.testing.assert_array_equal(*bars)
    assert (panel(**arguments(title="肺")) != panel(**arguments(title=""))).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": np.zeros((112, 112))},
            r"image must be \(H, W\) or \(H, W, 3\) uint8, got \(112, 112\) float64",
        ),
        ({"image": np.zeros((3, 112, 112), np.uint8)}, r"image must be .* got \(3, 112, 112\)"),
        ({"heat": np.zeros((7, 7))}, r"heat must have the image's .*\(112, 112\), got \(7, 7\)"),
        ({"heat": np.full((112, 112), 1.5)}, r"heat must be in \[0, 1\], got values from 1.5 to 1.5"),
        ({"heat": np.full((112, 112), np.nan)}, r"heat must be in \[0, 1\], got values from nan"),
        ({"boxes": [0.1, 0.1, 0.2, 0.2]}, r"boxes must be \(K, 4\)"),
        ({"boxes": [[0.5, 0.1, 0.2, 0.2]]}, "x0 <= x1"),
        ({"boxes": [[10, 10, 90, 90]]}, r"boxes must be in \[0, 1\] of the frame"),
        ({"words": worded("No effusion")}, "words must be those of the phrase, got 'No' at 0 to 2 of 'Pleural eff"),
        ({"words": worded("Pleural effusion", [0.5, 2.0])}, r"Shares of words must be in \[0, 1\]"),
        ({"width": 100}, "width must be at least 200"),
        ({"text_lines": 0}, "text_lines must be at least 1"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        panel(**arguments(**changes))


def test_a_grid_places_pictures_row_by_row():
    images = [np.full((10 + i, 20), 50 * i + 5, np.uint8) for i in range(3)]
    sheet = picture_grid(images, columns=2, gap=4)
    assert sheet.shape == (4 + 2 * (12 + 4), 4 + 2 * (20 + 4), 3)
    assert [int(sheet[y, x, 0]) for y, x in ((10, 14), (10, 38), (26, 14))] == [5, 55, 105]
    assert tuple(sheet[26, 38]) == BACKGROUND


def test_a_grid_names_what_is_wrong():
    image = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="at least one picture"):
        picture_grid([], columns=2)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        picture_grid([image], columns=0)


def test_save_png_makes_folders_and_reads_back(tmp_path):
    image = panel(**arguments(heat=hot_pixel(5, 5)))
    path = save_png(tmp_path / "deep" / "er" / "panel.png", image)
    np.testing.assert_array_equal(np.array(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["panel.png"]


def test_save_png_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save_png(tmp_path / "panel.png", np.zeros((4, 4, 3), np.uint8))
    before = path.read_bytes()

    def fail(self, target, *_, **__):
        target.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, np.ones((4, 4, 3), np.uint8))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]
