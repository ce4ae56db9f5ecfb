"""Pictures of one study: the film with its boxes, the map over it, and the phrase shaded by relevance.

All colours are RGB. Lengths in the layout are in design units, the pixels of a panel `DESIGN_WIDTH` wide; every panel
scales them to its own width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    BACKGROUND,
    DESIGN_WIDTH,
    FAINT_INK,
    Page,
    Picture,
    check_film,
    check_heat,
    count_boxes,
    draw_boxes,
    draw_peak,
    font_for,
    on_background,
    overlay,
    paste,
    resize,
    visible_boxes,
    write_header,
    write_side_markers,
)
from matex_pl.visualization.words import check_relevance, phrase_pieces, write_phrase

TEXT_LINES = 3
# What stands for a word piece that is not shown; the dashes are seen where its shade is that of the background.
_BAR = "----"


def panel(
    *,
    film: Picture,
    heat: ArrayLike,
    boxes: ArrayLike,
    phrase: str,
    tokens: Sequence[str],
    relevance: Sequence[float],
    score: float,
    title: str = "",
    subtitle: str = "",
    width: int = DESIGN_WIDTH,
    text_lines: int = TEXT_LINES,
    side_markers: bool = True,
    show_text: bool = True,
) -> Picture:
    """One study as a picture `(h, width, 3)` uint8; h depends on `width`, `text_lines` and the film's aspect alone.

    Left the film, right the map over it, both with the boxes and, on a frontal film, R and L for the patient's sides;
    a cross marks the map's maximum. Below, the phrase, each word piece shaded by its relevance with the map's colours.

    Args:
        film: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        heat: `(H, W)` in [0, 1], the map in the same frame. An all-zero map has no maximum to mark.
        boxes: `(K, 4)` `x0, y0, x1, y1` in [0, 1] of the frame, x to the right, y down; what reaches outside is cut.
        phrase: As the user wrote it; gives case and spacing where the tokens can be found in it.
        tokens: The T content word pieces of the phrase: CLIP's (`</w>` ends a word), WordPiece (`##` goes on) or
            SentencePiece (`▁` begins a word).
        relevance: T values in [0, 1].
        score: Cosine of film and phrase.
        title: First line, e.g. finding and study.
        subtitle: Second line, e.g. method and epoch.
        width: Of the panel in pixels.
        text_lines: Lines kept for the phrase; a longer one ends in an ellipsis.
        side_markers: Draw R and L; not for lateral films.
        show_text: Write the word pieces on their shades; otherwise these are bars of one length.

    Raises:
        ValueError: A shape, range or length does not fit; the message names it.
    """
    film = check_film(film)
    heat = check_heat(heat, film.shape[:2])
    boxes = visible_boxes(boxes)
    pieces = phrase_pieces(phrase, tokens, check_relevance(relevance, len(tokens)))
    if not show_text:
        pieces = [replace(piece, text=_BAR) for piece in pieces]
    layout = _Layout.of(width, film.shape[0] / film.shape[1], text_lines)

    large_film, large_heat = resize(film, layout.picture), resize(heat, layout.picture)
    canvas = np.full((layout.height, width, 3), BACKGROUND, np.uint8)
    for left, picture in zip(layout.lefts, (large_film, overlay(large_film, large_heat)), strict=True):
        paste(canvas, picture, left, layout.picture_top)
        draw_boxes(_window(canvas, left, layout), boxes, layout.px(2))
    draw_peak(_window(canvas, layout.lefts[1], layout), heat, layout)
    _draw_colour_bar(canvas, layout)

    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    write_header(draw, layout, title, subtitle, score)
    _write_captions(draw, layout, len(boxes), bool(heat.max() > 0))
    if side_markers:
        for left in layout.lefts:
            write_side_markers(draw, layout, (left, layout.picture_top), layout.picture[0])
    corner, room = (layout.margin, layout.phrase_top), width - 2 * layout.margin
    write_phrase(draw, layout, pieces, corner, room, text_lines)
    return np.array(sheet)


@dataclass(frozen=True)
class _Layout(Page):
    """Where things are on a panel, in pixels.

    Args:
        picture: (width, height) of each of the two pictures.
        text_lines: Lines kept for the phrase.
    """

    picture: tuple[int, int]
    text_lines: int

    @classmethod
    def of(cls, width: int, aspect: float, text_lines: int) -> _Layout:
        """The layout for a film of `aspect` = height / width."""
        if width < 200:
            raise ValueError(f"width must be at least 200 pixels, got {width}.")
        if text_lines < 1:
            raise ValueError(f"text_lines must be at least 1, got {text_lines}.")
        bare = cls(width, width / DESIGN_WIDTH, (0, 0), text_lines)
        side = (width - 2 * bare.margin - bare.px(16) - bare.px(56)) // 2
        return replace(bare, picture=(side, max(1, round(side * aspect))))

    @property
    def lefts(self) -> tuple[int, int]:
        """Left edges of the two pictures."""
        return self.margin, self.margin + self.picture[0] + self.px(16)

    @property
    def picture_top(self) -> int:
        return self.px(88)

    @property
    def picture_bottom(self) -> int:
        return self.picture_top + self.picture[1]

    @property
    def phrase_top(self) -> int:
        return self.picture_bottom + self.px(48)

    @property
    def height(self) -> int:
        return self.phrase_top + self.text_lines * self.line_height + self.px(10)


def _window(canvas: Picture, left: int, layout: _Layout) -> Picture:
    """The part of the canvas under one picture, as a view."""
    width, height = layout.picture
    return canvas[layout.picture_top : layout.picture_top + height, left : left + width]


def _draw_colour_bar(canvas: Picture, layout: _Layout) -> None:
    """The overlay's colours on the panel's background, 1 at the top, beside the right picture."""
    left = layout.lefts[1] + layout.picture[0] + layout.px(12)
    values = np.linspace(1, 0, layout.picture[1], dtype=np.float32)[:, None].repeat(layout.px(12), axis=1)
    paste(canvas, on_background(values), left, layout.picture_top)


def _write_captions(draw: ImageDraw.ImageDraw, layout: _Layout, num_boxes: int, has_peak: bool) -> None:
    """What each picture shows, under it, and the ends of the colour bar."""
    font, base = font_for(layout.px(17)), layout.picture_bottom + layout.px(24)
    right = "map over the film, cross at the maximum" if has_peak else "map over the film, all zero"
    for left, text in zip(layout.lefts, (f"film, {count_boxes(num_boxes)}", right), strict=True):
        draw.text((left, base), text, FAINT_INK, font, anchor="ls")
    bar_right = layout.lefts[1] + layout.picture[0] + layout.px(30)
    draw.text((bar_right, layout.picture_top), "1", FAINT_INK, font, anchor="lt")
    draw.text((bar_right, layout.picture_bottom), "0", FAINT_INK, font, anchor="lb")
