"""One small signed map per word of a phrase, below the panel of its pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from matex_pl.visualization.difference import DIMMED, difference_overlay, draw_difference_bar
from matex_pl.visualization.draw import (
    DESIGN_WIDTH,
    FAINT_INK,
    INK,
    Page,
    Picture,
    blank_picture,
    check_image,
    draw_boxes,
    mark_sides,
    paste,
    picture_grid,
    resize,
    visible_boxes,
    write,
)

if TYPE_CHECKING:
    from matex_pl.maps import Word

# Width of a tile in design units; a row has as many tiles as fit.
TILE = 128
LEGEND = "orange raises the cosine, blue lowers it"


def word_tiles(
    *,
    image: Picture,
    heats: ArrayLike,
    words: Sequence[Word],
    boxes: ArrayLike = (),
    width: int = DESIGN_WIDTH,
    unit: float | None = None,
    side_markers: bool = True,
    show_text: bool = True,
) -> Picture:
    """A small map per word in rows, as a picture `(h, width, 3)` uint8; h grows with the number of words.

    The maps have two colors on one scale, from minus to plus the largest absolute value of all words. Words behind the
    model's context length have no tile.

    Args:
        image: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        heats: `(N, H, W)` signed maps of the N words, in the same frame, from `Attribution.word_maps`.
        words: The N words, from `Attribution.words`.
        boxes: `(K, 4)` boxes, as for `panel`.
        width: Width of the picture in pixels.
        unit: Pixels per design unit, by default that of a panel of this width.
        side_markers: Whether to draw R and L; False for lateral images.
        show_text: Whether to write the words; otherwise their numbers.

    Raises:
        ValueError: If a shape does not fit, or a map holds NaN or Inf.
    """
    image, boxes = check_image(image), visible_boxes(boxes)
    signed = np.asarray(heats, np.float32)
    if signed.shape != (len(words), *image.shape[:2]) or not np.isfinite(signed).all():
        raise ValueError(
            f"heats must hold a finite map {image.shape[:2]} for each of {len(words)} words, got {signed.shape}."
        )
    page = Page(width, width / DESIGN_WIDTH if unit is None else unit)
    signed = signed / (np.abs(signed).max(initial=0) or 1)
    gap = page.px(12)
    columns = max(1, (width - 2 * page.margin + gap) // (page.px(TILE) + gap))
    side = (width - 2 * page.margin + gap) // columns - gap
    size = (side, max(1, round(side * image.shape[0] / image.shape[1])))
    dimmed = np.rint(DIMMED * resize(image, size)).astype(np.uint8)
    marks = Page(side, max(0.5, page.unit / 2))
    shown = [place for place, word in enumerate(words) if not word.cut or signed[place].any()]
    cells = []
    for place in shown:
        tile = difference_overlay(dimmed, resize(signed[place], size))
        draw_boxes(tile, boxes, marks.px(2.4))
        tile = mark_sides(tile, marks) if side_markers else tile
        cells.append(_captioned(tile, words[place].text if show_text else f"word {place + 1}", page))
    grid = picture_grid(cells, columns=columns, gap=gap) if cells else blank_picture(gap, width)
    top, bar = page.px(44), page.px(64)
    canvas = blank_picture(top + grid.shape[0] + bar, width)
    paste(canvas, grid[:, : width - page.margin + gap], page.margin - gap, top - gap)
    bar_top, length = top + grid.shape[0] - gap + page.px(10), page.px(200)
    draw_difference_bar(canvas, (page.margin + page.px(26), bar_top), (length, page.px(12)))
    picture = Image.fromarray(canvas)
    draw, small = ImageDraw.Draw(picture), page.px(15)
    write(draw, (page.margin, page.px(26)), "maps of the words, on one scale", INK, page.px(17), width)
    right = page.margin + page.px(34) + length
    for left, text in ((page.margin, "-1"), (right, "1")):
        write(draw, (left, bar_top + page.px(12)), text, FAINT_INK, small, width)
    write(draw, (page.margin, bar_top + page.px(38)), LEGEND, FAINT_INK, small, width - 2 * page.margin)
    return np.array(picture)


def _captioned(tile: Picture, text: str, page: Page) -> Picture:
    """A tile with a line of text below."""
    canvas = blank_picture(tile.shape[0] + page.px(24), tile.shape[1])
    paste(canvas, tile, 0, 0)
    picture = Image.fromarray(canvas)
    write(ImageDraw.Draw(picture), (0, tile.shape[0] + page.px(18)), text, INK, page.px(16), tile.shape[1])
    return np.array(picture)
