"""Contact sheet of many methods or many phrases on one image: the image, then a tile with map and words for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    DESIGN_WIDTH,
    FAINT_INK,
    INK,
    Page,
    Picture,
    blank_picture,
    check_heat,
    check_image,
    count_boxes,
    draw_color_bar,
    draw_frame,
    draw_tile,
    font,
    paste,
    picture_grid,
    resize,
    single_line,
    visible_boxes,
    write,
    write_header,
)
from matex_pl.visualization.words import Piece, check_words, phrase_lines, phrase_pieces, wrap, write_phrase

if TYPE_CHECKING:
    from matex_pl.maps import Word

SHEET_WIDTH, COLUMNS, TEXT_LINES = 1920, 6, 3
# Widths in design units: a sheet looks the same at every width.
TILE, PANEL_TILE = 240, 384
# Minimum width in pixels; the text of a narrower tile is not legible.
MIN_TILE = 120
LEGEND = "map and words on one scale, cross at the maximum of each map"


@dataclass(frozen=True, eq=False)
class Entry:
    """Result of one method on the pair, or of one phrase.

    Args:
        name: Name of the method or phrase; a long name is written smaller, then cut.
        heat: `(H, W)` map in [0, 1], in the image's frame; None if the method has none.
        words: Words of the phrase with their shares, from `Attribution.words`; None if the method has no word map.
        note: A few words below the name, e.g. "13 forwards". Without a map, the reason, shown in the tile.
        phrase: Phrase of `words`, by default that of the sheet.
    """

    name: str
    heat: ArrayLike | None
    words: Sequence[Word] | None
    note: str = ""
    phrase: str | None = None


def contact_sheet(
    *,
    image: Picture,
    boxes: ArrayLike,
    phrase: str,
    entries: Sequence[Entry],
    score: float | None = None,
    title: str = "",
    subtitle: str = "",
    columns: int = COLUMNS,
    width: int = SHEET_WIDTH,
    text_lines: int = TEXT_LINES,
    side_markers: bool = True,
) -> Picture:
    """Many methods on one pair, or many phrases on one image, as a picture `(h, width, 3)` uint8.

    h depends on `width`, `columns`, `text_lines`, the number of entries and the image's aspect alone. The first tile is
    the image with its boxes; the others are the entries. An entry shows the map over the image, the boxes and a cross
    at the maximum, then the method's name and note, then the phrase with each word shaded as on a `panel`. All share
    the color bar at the bottom.

    Args:
        image: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        boxes: `(K, 4)` boxes `x0, y0, x1, y1` in [0, 1] of the frame, as for `panel`.
        phrase: Phrase in the user's spelling; repeated below the subtitle, where a long one has more room.
        entries: Results of the methods, at least one.
        score: Cosine of image and phrase; None for several phrases.
        title: First line, e.g. finding and pair.
        subtitle: Second line, e.g. the model.
        columns: Maximum number of tiles per row.
        width: Width of the sheet in pixels.
        text_lines: Number of lines for the phrase below a tile; a longer phrase ends in an ellipsis.
        side_markers: Whether to draw R and L; False for lateral images.

    Raises:
        ValueError: If a shape, range or length does not fit; the message names the argument and the entry.
    """
    image, boxes = check_image(image), visible_boxes(boxes)
    page = _Sheet.of(width, columns, len(entries), image.shape[0] / image.shape[1], text_lines)

    small, no_heat = resize(image, page.tile), np.zeros(image.shape[:2], np.float32)
    picture = draw_tile(small, no_heat, boxes, page.marks, side_markers=side_markers)
    cells = [_cell(page, picture, "image", count_boxes(len(boxes)), [])]
    for entry in entries:
        pieces = None
        if entry.words is not None:
            own = phrase if entry.phrase is None else entry.phrase
            check_words(entry.words, own, name=f"words of {entry.name!r}")
            pieces = phrase_pieces(own, entry.words)
        if entry.heat is None:
            picture, note = _empty_tile(page, entry.note), ""
        else:
            heat = check_heat(entry.heat, image.shape[:2], name=f"heat of {entry.name!r}")
            picture = draw_tile(small, heat, boxes, page.marks, side_markers=side_markers)
            note = ", ".join(filter(None, (entry.note, "" if heat.max() > 0 else "all zero")))
        cells.append(_cell(page, picture, entry.name, note, pieces))
    return _compose(page, cells, phrase, title, subtitle, score)


@dataclass(frozen=True)
class _Sheet(Page):
    """Measures of a sheet."""

    # Width and height of each picture in pixels.
    tile: tuple[int, int]
    columns: int
    # Number of lines for the phrase below a tile.
    text_lines: int

    @classmethod
    def of(cls, width: int, columns: int, num_entries: int, aspect: float, text_lines: int) -> _Sheet:
        """Layout for an image of `aspect` = height / width and `num_entries` methods."""
        if num_entries < 1:
            raise ValueError("contact_sheet needs at least one entry, got none.")
        for name, value in (("columns", columns), ("text_lines", text_lines)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        columns = min(columns, num_entries + 1)
        # A sheet of one or two columns has the font size of a panel of its width, not a larger one.
        unit = width / max(columns * (TILE + 20) + 20, DESIGN_WIDTH)
        side = (width - (columns + 1) * Page(width, unit).margin) // columns
        if side < MIN_TILE:
            raise ValueError(
                f"A width of {width} pixels leaves {columns} columns {side} pixels each, but a tile needs {MIN_TILE}. "
                "Give fewer columns or more width."
            )
        return cls(width, unit, (side, max(1, round(side * aspect))), columns, text_lines)

    @property
    def marks(self) -> Page:
        """Measures of the marks on a tile, in proportion to the tile as on a panel."""
        # Below half a pixel per unit the cross falls apart. Above the unit of the sheet it would exceed the text.
        return Page(self.tile[0], max(min(self.tile[0] / PANEL_TILE, self.unit), 0.5))

    @property
    def words(self) -> Page:
        """Measures of the phrase below a tile."""
        return Page(self.tile[0], 0.85 * self.unit)


def _empty_tile(page: _Sheet, reason: str) -> Picture:
    """A frame around "no map" and the reason."""
    (width, height), inset, size, step = page.tile, page.px(12), page.px(15), page.px(24)
    tile = blank_picture(height, width)
    draw_frame(tile, (0, 0), (width, height), page.px(1), FAINT_INK)
    max_lines = (height - 2 * inset) // step - 1
    lines = wrap(phrase_pieces(reason, []), width - 2 * inset, size, max_lines) if max_lines > 0 else []
    image = Image.fromarray(tile)
    draw, base = ImageDraw.Draw(image), (height - len(lines) * step) // 2 + page.px(6)
    draw.text((width / 2, base), "no map", INK, font(page.px(18)), anchor="ms")
    for row, line in enumerate(lines, start=1):
        text = "".join(" " * piece.after_space + piece.text for piece in line).strip()
        draw.text((width / 2, base + row * step), text, FAINT_INK, font(size), anchor="ms")
    return np.array(image)


def _cell(page: _Sheet, picture: Picture, name: str, note: str, pieces: Sequence[Piece] | None) -> Picture:
    """A tile with its name, its note and its words below; `pieces` are None without a word map."""
    (room, bottom), words = page.tile, page.words
    top = bottom + page.px(58)
    canvas = blank_picture(top + page.text_lines * words.line_height, room)
    paste(canvas, picture, 0, 0)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    _write_fitting(draw, page, (0, bottom + page.px(25)), name, room)
    write(draw, (0, bottom + page.px(46)), note, FAINT_INK, page.px(14), room)
    if pieces is None:
        write(draw, (0, top + words.px(21)), "no word map", FAINT_INK, words.px(18), room)
    else:
        write_phrase(draw, words, phrase_lines(words, pieces, room, page.text_lines), (0, top))
    return np.array(image)


def _write_fitting(draw: ImageDraw.ImageDraw, page: _Sheet, left_base: tuple[int, int], text: str, room: float) -> None:
    """Write a line from `left_base` (x, y of its baseline), in a smaller font if a long text then fits."""
    size = page.px(18)
    length = font(size).getlength(single_line(text))
    if length > room:
        size = max(page.px(14), int(size * room / length))
    write(draw, left_base, text, INK, size, room)


def _compose(
    page: _Sheet, cells: Sequence[Picture], phrase: str, title: str, subtitle: str, score: float | None
) -> Picture:
    """Sheet of the cells row by row below the header, with the color bar at the bottom."""
    grid, grid_top = picture_grid(cells, columns=page.columns, gap=page.margin), page.px(120) - page.margin
    bar_top, length, height = grid_top + grid.shape[0] + page.px(6), page.px(TILE), page.px(14)
    bar_left = page.margin + page.px(21)
    canvas = blank_picture(bar_top + height + page.margin, page.width)
    paste(canvas, grid, 0, grid_top)
    draw_color_bar(canvas, (bar_left, bar_top), (length, height))

    image = Image.fromarray(canvas)
    draw, right = ImageDraw.Draw(image), bar_left + length
    write_header(draw, page, title, subtitle, score)
    _write_fitting(draw, page, (page.margin, page.px(99)), phrase, page.width - 2 * page.margin)
    for left, text in ((page.margin, "0"), (right + page.px(8), "1"), (right + page.px(40), LEGEND)):
        write(draw, (left, bar_top + page.px(13)), text, FAINT_INK, page.px(15), page.width - page.margin - left)
    return np.array(image)
