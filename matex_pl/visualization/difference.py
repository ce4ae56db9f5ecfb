"""Maps of two phrases on one image, and their difference in two colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    FAINT_INK,
    INK,
    MAX_OPACITY,
    Color,
    Page,
    Picture,
    blank_picture,
    check_heat,
    check_image,
    draw_color_bar,
    draw_frame,
    draw_tile,
    mark_sides,
    paste,
    resize,
    write,
    write_header,
)
from matex_pl.visualization.words import check_words, phrase_lines, phrase_pieces, write_phrase

if TYPE_CHECKING:
    from matex_pl.maps import Word

WIDTH, TEXT_LINES = 1320, 3
# Orange where the first map is higher, blue where the second is: distinct for all kinds of color vision.
HIGHER: Color = (255, 130, 20)
LOWER: Color = (40, 130, 255)
# Share of the image's brightness that is left below the difference.
DIMMED = 0.6


@dataclass(frozen=True, eq=False)
class Compared:
    """One of the two phrases.

    Args:
        phrase: The phrase.
        heat: `(H, W)` map in [0, 1], in the image's frame.
        words: Words of the phrase with their shares, from `Attribution.words`; none without a map of words.
        score: Cosine of image and phrase.
    """

    phrase: str
    heat: ArrayLike
    words: Sequence[Word]
    score: float


def difference_overlay(image: Picture, difference: NDArray[np.float32]) -> Picture:
    """Difference of two maps over the image, `(H, W, 3)` uint8, unchanged where the maps are equal.

    Args:
        image: `(H, W, 3)` uint8.
        difference: `(H, W)` in [-1, 1]. Positive values are orange, negative ones blue; opacity grows with the size.
    """
    colors = np.where((difference > 0)[..., None], np.array(HIGHER, np.float32), np.array(LOWER, np.float32))
    return np.rint(image + MAX_OPACITY * np.abs(difference)[..., None] * (colors - image)).astype(np.uint8)


def difference_panel(
    *, image: Picture, pair: Sequence[Compared], title: str = "", subtitle: str = "", width: int = WIDTH
) -> Picture:
    """Maps of two phrases and the first minus the second, as a picture `(h, width, 3)` uint8.

    Below each map is its phrase with shaded words, as on a `panel`. The difference is drawn from -1 to 1.

    Args:
        image: `(H, W)` or `(H, W, 3)` uint8 in the model's frame.
        pair: The two phrases with their maps.
        title: First line, e.g. the name of the image.
        subtitle: Second line, e.g. the method.
        width: Width of the picture in pixels.

    Raises:
        ValueError: If there are not two phrases, or a shape or range does not fit.
    """
    if len(pair) != 2:
        raise ValueError(f"pair must hold two phrases, got {len(pair)}.")
    image = check_image(image)
    heats = [check_heat(one.heat, image.shape[:2], name=f"heat of {one.phrase!r}") for one in pair]
    for one in pair:
        if one.words:
            check_words(one.words, one.phrase)
    page = Page(width, width / WIDTH)
    side = (width - 4 * page.margin) // 3
    size = (side, max(1, round(side * image.shape[0] / image.shape[1])))
    large = resize(image, size)
    dimmed = np.rint(DIMMED * large).astype(np.uint8)
    boxes = np.zeros((0, 4), np.float32)
    tiles = [draw_tile(large, heat, boxes, page) for heat in heats]
    tiles.append(mark_sides(difference_overlay(dimmed, resize(heats[0], size) - resize(heats[1], size)), page))

    top = page.px(88)
    below = top + size[1]
    text_top, bar_top = below + page.px(44), below + page.px(44) + TEXT_LINES * page.line_height
    canvas = blank_picture(text_top + TEXT_LINES * page.line_height + page.px(44), width)
    lefts = [page.margin + place * (side + page.margin) for place in range(3)]
    for left, tile in zip(lefts, tiles, strict=True):
        paste(canvas, tile, left, top)
    height = page.px(12)
    draw_color_bar(canvas, (lefts[0] + page.px(18), bar_top + page.px(12)), (page.px(200), height))
    draw_difference_bar(canvas, (lefts[2] + page.px(26), bar_top + page.px(12)), (page.px(200), height))

    picture = Image.fromarray(canvas)
    draw, small = ImageDraw.Draw(picture), page.px(15)
    write_header(draw, page, title, subtitle)
    names = [f"cos {one.score:.3f}" for one in pair] + ["difference: first minus second"]
    for left, name in zip(lefts, names, strict=True):
        write(draw, (left, below + page.px(26)), name, INK, page.px(17), side)
    for left, one in zip(lefts, pair, strict=False):
        lines = phrase_lines(page, phrase_pieces(one.phrase, one.words), side, TEXT_LINES)
        write_phrase(draw, page, lines, (left, text_top))
    base = bar_top + page.px(23)
    marks = [(lefts[0], "0"), (lefts[0] + page.px(226), "1, the maximum of each map by itself")]
    marks += [(lefts[2], "-1"), (lefts[2] + page.px(234), "1")]
    for left, text in marks:
        write(draw, (left, base), text, FAINT_INK, small, width - left)
    change = pair[0].score - pair[1].score
    remarks = [
        "orange: higher for the first phrase",
        "blue: higher for the second phrase",
        f"cosine, first minus second: {change:+.3f}",
    ]
    for row, line in enumerate(remarks):
        write(draw, (lefts[2], text_top + page.px(20) + row * page.px(26)), line, FAINT_INK, small, side)
    return np.array(picture)


def draw_difference_bar(canvas: Picture, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw the colors of the difference at `corner` (left, top), from -1 to 1."""
    (left, top), (width, height) = corner, size
    ramp = np.broadcast_to(np.linspace(-1, 1, width, dtype=np.float32), (height, width))
    draw_frame(canvas, (left - 1, top - 1), (left + width + 1, top + height + 1), 1, FAINT_INK)
    paste(canvas, difference_overlay(blank_picture(height, width), ramp), left, top)
