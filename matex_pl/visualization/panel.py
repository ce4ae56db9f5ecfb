"""Panel of one pair: the image with its boxes, the map over it, and the phrase shaded by relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    DESIGN_WIDTH,
    FAINT_INK,
    Page,
    Picture,
    blank_picture,
    check_heat,
    check_image,
    count_boxes,
    draw_color_bar,
    draw_tile,
    font,
    paste,
    resize,
    visible_boxes,
    write,
    write_header,
)
from matex_pl.visualization.words import Piece, check_relevance, phrase_lines, phrase_pieces, write_phrase

TEXT_LINES = 3
# Replacement of a hidden word piece; the dashes are visible if its shade equals the background.
_BAR = "----"


def panel(
    *,
    image: Picture,
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
    """One pair as a picture `(h, width, 3)` uint8; h depends on `width`, `text_lines` and the image's aspect alone.

    The image is on the left, the map over it on the right, both with the boxes. On a frontal radiograph R and L mark
    the patient's sides. A cross marks the map's maximum. Below is the phrase, with each word piece shaded by its
    relevance in the map's colors.

    Args:
        image: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        heat: `(H, W)` map in [0, 1], in the same frame. An all-zero map has no maximum to mark.
        boxes: `(K, 4)` boxes `x0, y0, x1, y1` in [0, 1] of the frame, x to the right, y down; clipped to the frame.
        phrase: Phrase in the user's spelling; case and spacing are used if the phrase contains the tokens.
        tokens: The T content word pieces of the phrase as text; a piece that begins a word starts with a space.
        relevance: T values in [0, 1].
        score: Cosine of image and phrase.
        title: First line, e.g. finding and pair.
        subtitle: Second line, e.g. method and epoch.
        width: Width of the panel in pixels.
        text_lines: Number of lines for the phrase; a longer phrase ends in an ellipsis.
        side_markers: Whether to draw R and L; False for lateral images.
        show_text: Whether to write the word pieces on their shades; otherwise these are bars of one length.

    Raises:
        ValueError: If a shape, range or length does not fit; the message names the argument.
    """
    image = check_image(image)
    heat = check_heat(heat, image.shape[:2])
    boxes = visible_boxes(boxes)
    if width < 200:
        raise ValueError(f"width must be at least 200 pixels, got {width}.")
    if text_lines < 1:
        raise ValueError(f"text_lines must be at least 1, got {text_lines}.")
    page = Page(width, width / DESIGN_WIDTH)
    pieces = phrase_pieces(phrase, tokens, check_relevance(relevance, len(tokens)))
    if not show_text:
        pieces = [replace(piece, text=_BAR) for piece in pieces]

    side = (width - 2 * page.margin - page.px(16) - page.px(56)) // 2
    large = resize(image, (side, max(1, round(side * image.shape[0] / image.shape[1]))))
    tiles = [draw_tile(large, shown, boxes, page, side_markers=side_markers) for shown in (np.zeros_like(heat), heat)]
    remark = "cross at the maximum" if heat.max() > 0 else "all zero"
    return compose(
        page,
        tiles,
        captions=(f"image, {count_boxes(len(boxes))}", f"map over the image, {remark}"),
        lines=phrase_lines(page, pieces, width - 2 * page.margin, text_lines),
        text_lines=text_lines,
        title=title,
        subtitle=subtitle,
        score=score,
    )


def compose(
    page: Page,
    tiles: Sequence[Picture],
    *,
    captions: Sequence[str],
    lines: Sequence[Sequence[Piece]],
    text_lines: int,
    title: str,
    subtitle: str,
    score: float | None = None,
    scale: tuple[str, str] = ("0", "1"),
) -> Picture:
    """Header, tiles side by side with a color bar to their right, and a phrase, as `(h, page.width, 3)` uint8.

    The tiles have one height and a caption each. `text_lines` is the number of lines reserved for `lines`, from
    `phrase_lines`. `scale` holds the values at the bottom and at the top of the color bar.
    """
    top, height = page.px(88), tiles[0].shape[0]
    bottom = top + height
    phrase_top = bottom + page.px(48)
    canvas = blank_picture(phrase_top + text_lines * page.line_height + page.px(10), page.width)
    lefts = [page.margin + place * (tiles[0].shape[1] + page.px(16)) for place in range(len(tiles))]
    for left, tile in zip(lefts, tiles, strict=True):
        paste(canvas, tile, left, top)
    bar_left = lefts[-1] + tiles[-1].shape[1] + page.px(12)
    draw_color_bar(canvas, (bar_left, top), (page.px(12), height))

    image = Image.fromarray(canvas)
    draw, size = ImageDraw.Draw(image), page.px(15)
    write_header(draw, page, title, subtitle, score)
    for left, tile, caption in zip(lefts, tiles, captions, strict=True):
        write(draw, (left, bottom + page.px(24)), caption, FAINT_INK, size, tile.shape[1])
    for value, y, anchor in zip(scale, (bottom, top), ("lb", "lt"), strict=True):
        draw.text((bar_left + page.px(18), y), value, FAINT_INK, font(size), anchor=anchor)
    write_phrase(draw, page, lines, (page.margin, phrase_top))
    return np.array(image)
