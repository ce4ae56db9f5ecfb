"""Many methods on one study as one picture: the film, then a tile per method with its map and its words.

Colours are RGB. Lengths are design units as on a panel; a tile is `TILE` of them wide, so that a sheet looks the same
at every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    BACKGROUND,
    DESIGN_WIDTH,
    FAINT_INK,
    INK,
    Page,
    Picture,
    check_film,
    check_heat,
    clean,
    count_boxes,
    draw_boxes,
    draw_frame,
    draw_peak,
    font_for,
    on_background,
    overlay,
    paste,
    picture_grid,
    resize,
    visible_boxes,
    write,
    write_header,
    write_side_markers,
)
from matex_pl.visualization.words import Piece, check_relevance, phrase_pieces, wrap, write_phrase

SHEET_WIDTH, COLUMNS, TEXT_LINES = 1920, 6, 3
TILE, PANEL_TILE = 240, 384
# In pixels; the type of a narrower tile cannot be read.
MIN_TILE = 120
LEGEND = "map and words on one scale, cross at the maximum of each map"


@dataclass(frozen=True, eq=False)
class Entry:
    """What one method says about the study.

    Args:
        name: Of the method; a long one is written smaller, then cut.
        heat: `(H, W)` in [0, 1], its map in the film's frame; None where it has none.
        relevance: T values in [0, 1], one per token; None where it does not weigh words.
        note: A few words under the name, e.g. "13 forwards"; where there is no map, the reason, which stands in its
            place.
    """

    name: str
    heat: ArrayLike | None
    relevance: Sequence[float] | None
    note: str = ""


def contact_sheet(
    *,
    film: Picture,
    boxes: ArrayLike,
    phrase: str,
    tokens: Sequence[str],
    entries: Sequence[Entry],
    score: float,
    title: str = "",
    subtitle: str = "",
    columns: int = COLUMNS,
    width: int = SHEET_WIDTH,
    text_lines: int = TEXT_LINES,
    side_markers: bool = True,
) -> Picture:
    """Many methods on one study as a picture `(h, width, 3)` uint8.

    h depends on `width`, `columns`, `text_lines`, the number of entries and the film's aspect alone. The first tile is
    the film with its boxes, the others are the entries in their order: the map over the film, with the boxes and a
    cross at its maximum; the method's name and note; the phrase, each word piece shaded by its relevance. All have the
    size and the colour scale of the bar at the foot.

    Args:
        film: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        boxes: `(K, 4)` `x0, y0, x1, y1` in [0, 1] of the frame, as for `panel`.
        phrase: As the user wrote it; stands once more below the subtitle, where there is more room for a long one.
        tokens: The T content word pieces of the phrase, as for `panel`.
        entries: The methods, at least one.
        score: Cosine of film and phrase.
        title: First line, e.g. finding and study.
        subtitle: Second line, e.g. the model.
        columns: Tiles per row; fewer where there are not so many.
        width: Of the sheet in pixels.
        text_lines: Lines kept for the phrase under a tile; a longer one ends in an ellipsis.
        side_markers: Draw R and L; not for lateral films.

    Raises:
        ValueError: A shape, range or length does not fit; the message names it and the entry.
    """
    film, boxes = check_film(film), visible_boxes(boxes)
    maps = [_check_map(entry, film.shape[:2]) for entry in entries]
    words = [_check_words(entry, phrase, tokens) for entry in entries]
    page = _Sheet.of(width, columns, len(entries), film.shape[0] / film.shape[1], text_lines)

    small_film = resize(film, page.tile)
    no_heat = np.zeros(film.shape[:2], np.float32)
    cells = [_cell(page, _tile(page, small_film, no_heat, boxes, side_markers), "film", count_boxes(len(boxes)), [])]
    for entry, heat, pieces in zip(entries, maps, words, strict=True):
        if heat is None:
            cells.append(_cell(page, _empty_tile(page, entry.note), entry.name, "", pieces))
        else:
            picture = _tile(page, small_film, heat, boxes, side_markers)
            cells.append(_cell(page, picture, entry.name, _note(entry, heat), pieces))
    return _compose(page, cells, phrase, title, subtitle, score)


def _check_map(entry: Entry, size: tuple[int, int]) -> NDArray[np.float32] | None:
    """The entry's map as `(H, W)` float32."""
    return None if entry.heat is None else check_heat(entry.heat, size, name=f"heat of {entry.name!r}")


def _check_words(entry: Entry, phrase: str, tokens: Sequence[str]) -> list[Piece] | None:
    """The phrase with the entry's relevance."""
    if entry.relevance is None:
        return None
    relevance = check_relevance(entry.relevance, len(tokens), name=f"relevance of {entry.name!r}")
    return phrase_pieces(phrase, tokens, relevance)


def _note(entry: Entry, heat: NDArray[np.float32]) -> str:
    """The entry's note, and that its map has no maximum if so."""
    return ", ".join(filter(None, (entry.note, "" if heat.max() > 0 else "all zero")))


@dataclass(frozen=True)
class _Sheet(Page):
    """Where things are on a sheet, in pixels.

    Args:
        tile: (width, height) of each picture.
        columns: Tiles per row.
        rows: Of tiles.
        text_lines: Lines kept for the phrase under a tile.
    """

    tile: tuple[int, int]
    columns: int
    rows: int
    text_lines: int

    @classmethod
    def of(cls, width: int, columns: int, num_entries: int, aspect: float, text_lines: int) -> _Sheet:
        """The layout for a film of `aspect` = height / width and `num_entries` methods."""
        if num_entries < 1:
            raise ValueError("contact_sheet needs at least one entry, got none.")
        for name, value in (("columns", columns), ("text_lines", text_lines)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        columns = min(columns, num_entries + 1)
        # A sheet of one or two columns has the type of a panel of its width, not a larger one.
        unit = width / max(columns * (TILE + 20) + 20, DESIGN_WIDTH)
        bare = cls(width, unit, (0, 0), columns, -(-(num_entries + 1) // columns), text_lines)
        side = (width - (columns + 1) * bare.margin) // columns
        if side < MIN_TILE:
            raise ValueError(
                f"A width of {width} pixels leaves {columns} columns {side} pixels each, but a tile needs {MIN_TILE}. "
                "Give fewer columns or more width."
            )
        return replace(bare, tile=(side, max(1, round(side * aspect))))

    @property
    def marks(self) -> Page:
        """The measures of what is drawn on a tile: in proportion to it as on a panel, within what can be seen.

        Below half a pixel a unit the cross falls apart; above that of the sheet it would be larger than the type.
        """
        return Page(self.tile[0], max(min(self.tile[0] / PANEL_TILE, self.unit), 0.5))

    @property
    def words(self) -> Page:
        """The measures of the phrase under a tile."""
        return Page(self.tile[0], 0.85 * self.unit)

    @property
    def cell_height(self) -> int:
        """Of a tile with what is written under it."""
        return self.words_top + self.text_lines * self.words.line_height

    @property
    def words_top(self) -> int:
        """Of the phrase in its cell."""
        return self.tile[1] + self.px(58)

    @property
    def grid_top(self) -> int:
        """Of the cells with the gap above them."""
        return self.px(120) - self.margin

    @property
    def bar_top(self) -> int:
        return self.grid_top + self.margin + self.rows * (self.cell_height + self.margin) + self.px(6)

    @property
    def height(self) -> int:
        return self.bar_top + self.px(14) + self.margin


def _tile(
    page: _Sheet, film: Picture, heat: NDArray[np.float32], boxes: NDArray[np.float32], side_markers: bool
) -> Picture:
    """The map over the film, which has a tile's size, with boxes, cross and the patient's sides."""
    tile = overlay(film, resize(heat, page.tile))
    draw_boxes(tile, boxes, page.marks.px(3))
    draw_peak(tile, heat, page.marks)
    if not side_markers:
        return tile
    picture = Image.fromarray(tile)
    write_side_markers(ImageDraw.Draw(picture), page.marks, (0, 0), page.tile[0])
    return np.array(picture)


def _empty_tile(page: _Sheet, reason: str) -> Picture:
    """A frame around "no map" and the reason."""
    (width, height), inset = page.tile, page.px(12)
    tile = np.full((height, width, 3), BACKGROUND, np.uint8)
    draw_frame(tile, np.array((0, 0)), np.array((width, height)), page.px(1), FAINT_INK)
    picture = Image.fromarray(tile)
    draw = ImageDraw.Draw(picture)
    font, step = font_for(page.px(17), clean(reason)), page.px(24)
    max_lines = (height - 2 * inset) // step - 1
    pieces = phrase_pieces(reason, [], []) if max_lines > 0 else []
    lines = wrap(pieces, font, width - 2 * inset, max_lines) if pieces else []
    base = (height - len(lines) * step) // 2 + page.px(6)
    draw.text((width / 2, base), "no map", INK, font_for(page.px(20)), anchor="ms")
    for row, line in enumerate(lines, start=1):
        text = "".join(" " * piece.after_space + piece.text for piece in line).strip()
        draw.text((width / 2, base + row * step), text, FAINT_INK, font, anchor="ms")
    return np.array(picture)


def _cell(page: _Sheet, picture: Picture, name: str, note: str, pieces: Sequence[Piece] | None) -> Picture:
    """A tile with its name, its note and its words under it; the words are None where there are none to show."""
    canvas = np.full((page.cell_height, page.tile[0], 3), BACKGROUND, np.uint8)
    paste(canvas, picture, 0, 0)
    cell = Image.fromarray(canvas)
    draw = ImageDraw.Draw(cell)
    (room, bottom), words = page.tile, page.words
    _write_fitting(draw, page, (0, bottom + page.px(25)), name, room)
    write(draw, (0, bottom + page.px(46)), clean(note), FAINT_INK, page.px(16), room)
    if pieces is None:
        write(draw, (0, page.words_top + words.px(21)), "no word map", FAINT_INK, words.px(20), room)
    else:
        write_phrase(draw, words, pieces, (0, page.words_top), room, page.text_lines)
    return np.array(cell)


def _write_fitting(draw: ImageDraw.ImageDraw, page: _Sheet, left_base: tuple[int, int], text: str, room: float) -> None:
    """A line from `left_base` (x, y of its baseline), in smaller type where that saves a long text from being cut."""
    line, size = clean(text), page.px(20)
    length = font_for(size, line).getlength(line)
    if length > room:
        size = max(page.px(16), int(size * room / length))
    write(draw, left_base, line, INK, size, room)


def _compose(page: _Sheet, cells: Sequence[Picture], phrase: str, title: str, subtitle: str, score: float) -> Picture:
    """The cells row by row below the header, and the colour bar at the foot."""
    canvas = np.full((page.height, page.width, 3), BACKGROUND, np.uint8)
    paste(canvas, picture_grid(cells, columns=page.columns, gap=page.margin), 0, page.grid_top)
    right = _draw_colour_bar(canvas, page)

    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    write_header(draw, page, title, subtitle, score)
    _write_fitting(draw, page, (page.margin, page.px(99)), phrase, page.width - 2 * page.margin)
    for left, text in ((page.margin, "0"), (right + page.px(8), "1"), (right + page.px(40), LEGEND)):
        write(draw, (left, page.bar_top + page.px(13)), text, FAINT_INK, page.px(17), page.width - page.margin - left)
    return np.array(sheet)


def _draw_colour_bar(canvas: Picture, page: _Sheet) -> int:
    """The overlay's colours on the sheet's background from 0 to 1 in a thin frame; where it ends on the right."""
    left, top, (length, height) = page.margin + page.px(21), page.bar_top, (page.px(TILE), page.px(14))
    values = np.linspace(0, 1, length, dtype=np.float32)[None].repeat(height, axis=0)
    draw_frame(canvas, np.array((left - 1, top - 1)), np.array((left + length + 1, top + height + 1)), 1, FAINT_INK)
    paste(canvas, on_background(values), left, top)
    return left + length
