"""Panel of one pair: the image with its boxes, the map over it, and the phrase shaded by relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
from matex_pl.visualization.words import Piece, check_words, phrase_lines, phrase_pieces, shades, write_phrase

if TYPE_CHECKING:
    from matex_pl.maps import Word

TEXT_LINES = 3
# TensorBoard shows pictures at 350 pixels. There, the smallest text of a panel of this width has 11 pixels.
CARD_WIDTH = 560
_CARD_UNIT = 1 / 470
# Replacement of a hidden word; the dashes are visible if its shade equals the background.
_BAR = "----"


def panel(
    *,
    image: Picture,
    heat: ArrayLike,
    boxes: ArrayLike,
    phrase: str,
    words: Sequence[Word],
    score: float,
    title: str = "",
    subtitle: str = "",
    width: int = DESIGN_WIDTH,
    text_lines: int = TEXT_LINES,
    side_markers: bool = True,
    show_text: bool = True,
    stacked: bool = False,
) -> Picture:
    """One pair as a picture `(h, width, 3)` uint8; h depends on `width`, `text_lines` and the image's aspect alone.

    The image is on the left, the map over it on the right, both with the boxes. In a stacked panel, the map over the
    image is on top, and the text is larger. On a frontal radiograph R and L mark
    the patient's sides. A cross marks the map's maximum. Below is the phrase, with each word shaded in the map's colors
    by its share, relative to the largest share. Punctuation has no shade.

    Args:
        image: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        heat: `(H, W)` map in [0, 1], in the same frame. An all-zero map has no maximum to mark.
        boxes: `(K, 4)` boxes `x0, y0, x1, y1` in [0, 1] of the frame, x to the right, y down; clipped to the frame.
        phrase: Phrase in the user's spelling.
        words: Words of the phrase with their shares, from `Attribution.words`.
        score: Cosine of image and phrase.
        title: First line, e.g. finding and pair.
        subtitle: Second line, e.g. method and epoch.
        width: Width of the panel in pixels.
        text_lines: Number of lines for the phrase; a longer phrase ends in an ellipsis.
        side_markers: Whether to draw R and L; False for lateral images.
        show_text: Whether to write the phrase; otherwise each word is a bar of one length.
        stacked: Whether the tiles stand one above the other, for the narrow cards of TensorBoard; see `CARD_WIDTH`.

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
    page = Page(width, panel_unit(width, stacked=stacked))
    check_words(words, phrase)
    bars = [Piece(_BAR, shade, after_space=True) for shade in shades(words)]
    pieces = phrase_pieces(phrase, words) if show_text else bars

    room = width - 2 * page.margin
    side = room - page.px(42) if stacked else (room - page.px(16) - page.px(56)) // 2
    large = resize(image, (side, max(1, round(side * image.shape[0] / image.shape[1]))))
    remark = "cross at the maximum" if heat.max() > 0 else "all zero"
    parts = [
        (np.zeros_like(heat), f"image, {count_boxes(len(boxes))}"),
        (heat, f"map over the image, {remark}"),
    ][:: -1 if stacked else 1]
    return compose(
        page,
        [draw_tile(large, shown, boxes, page, side_markers=side_markers) for shown, _ in parts],
        captions=[caption for _, caption in parts],
        lines=phrase_lines(page, pieces, room, text_lines),
        text_lines=text_lines,
        title=title,
        subtitle=subtitle,
        score=score,
        stacked=stacked,
    )


def panel_unit(width: int, *, stacked: bool) -> float:
    """Pixels per design unit of a panel; the text of a stacked panel is larger."""
    return width * _CARD_UNIT if stacked else width / DESIGN_WIDTH


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
    stacked: bool = False,
) -> Picture:
    """Header, tiles side by side or stacked with a color bar to their right, and a phrase: `(h, page.width, 3)` uint8.

    The tiles have one height and a caption each. `text_lines` is the number of lines reserved for `lines`, from
    `phrase_lines`. `scale` holds the values at the bottom and at the top of the color bar.
    """
    top, (height, width) = page.px(88), tiles[0].shape[:2]
    across, down = (0, height + page.px(48)) if stacked else (width + page.px(16), 0)
    corners = [(page.margin + place * across, top + place * down) for place in range(len(tiles))]
    phrase_top = corners[-1][1] + height + page.px(48)
    canvas = blank_picture(phrase_top + text_lines * page.line_height + page.px(10), page.width)
    for corner, tile in zip(corners, tiles, strict=True):
        paste(canvas, tile, *corner)
    bar_left = max(left for left, _ in corners) + width + page.px(12)
    draw_color_bar(canvas, (bar_left, top), (page.px(12), height))

    image = Image.fromarray(canvas)
    draw, size = ImageDraw.Draw(image), page.px(15)
    write_header(draw, page, title, subtitle, score, 18 if stacked else 23)
    for (left, above), caption in zip(corners, captions, strict=True):
        write(draw, (left, above + height + page.px(24)), caption, FAINT_INK, size, width)
    for value, y, anchor in zip(scale, (top + height, top), ("lb", "lt"), strict=True):
        draw.text((bar_left + page.px(18), y), value, FAINT_INK, font(size), anchor=anchor)
    write_phrase(draw, page, lines, (page.margin, phrase_top))
    return np.array(image)
