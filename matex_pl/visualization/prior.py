"""Picture of the spatial prior: M over the outline of a frontal chest, the boxes of the regions, and the phrase.

x points to the right of the image, y down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    BOX_COLOR,
    DARK_INK,
    DESIGN_WIDTH,
    Color,
    Page,
    Picture,
    cut,
    draw_boxes,
    font,
    mark_sides,
    overlay,
    resize,
    single_line,
)
from matex_pl.visualization.panel import compose
from matex_pl.visualization.words import Piece, phrase_lines

Span = tuple[int, int]
Box = tuple[float, float, float, float]
Rectangle = tuple[int, int, int, int]

SIDE = 768
TEXT_LINES = 5
# Number of words kept on either side of a mark if the phrase is too long.
CONTEXT_WORDS = 6

# The first color is that of the boxes in all other pictures. None is in the color map of M.
BOX_COLORS: tuple[Color, ...] = (
    BOX_COLOR,
    (120, 190, 255),
    (196, 240, 110),
    (255, 176, 222),
    (214, 220, 230),
    (190, 170, 255),
)
# Shades of the air around the patient, of soft tissue, lungs, airways and heart.
SHADES = np.array([(9, 10, 13), (34, 37, 43), (17, 19, 23), (25, 27, 32), (45, 48, 55)], np.uint8)
# Parts of the chest with their shades, from the back to the front.
PARTS = {"body": 1, "lungs": 2, "mediastinum": 1, "airways": 3, "heart": 4}
OUTLINE: Color = (205, 212, 222)
OUTLINE_OPACITY = 0.55


def prior_panel(
    *,
    prior: ArrayLike,
    lambda_s: float,
    boxes: Sequence[Box],
    names: Sequence[str],
    phrase: str,
    naming: Sequence[Span],
    ignored: Sequence[Span] = (),
    chest: Mapping[str, Sequence[NDArray[np.float64]]] | None = None,
    subtitle: str = "",
    caption: str = "",
) -> Picture:
    """M of one phrase as a picture `(h, DESIGN_WIDTH, 3)` uint8; h grows with the phrase, up to `TEXT_LINES` lines.

    R and L mark the patient's sides, R on the left as on a frontal radiograph, for any map.

    Args:
        prior: `(H, W)` map in [1, lambda_s], drawn square.
        lambda_s: Upper end of the color bar, at least 1.
        boxes: K boxes `(x0, y0, x1, y1)` in [0, 1] of the image. Equal boxes are drawn once, with their names joined.
        names: K labels.
        phrase: Phrase in the user's spelling; if it is too long, ellipses replace unmarked words first.
        naming: Character ranges of the phrase that name regions, shaded in the color of the highest M.
        ignored: Character ranges of places and sides that name no region, struck through.
        chest: Closed outlines of the `PARTS` of the chest, `(P, 2)` each in [0, 1] of the image; none by default.
        subtitle: Second line of the header.
        caption: Line below the map.

    Raises:
        ValueError: If the prior is outside [1, lambda_s], or names and boxes differ in number.
    """
    array = np.asarray(prior, dtype=np.float32)
    if array.ndim != 2 or not (array.min() >= 1 - 1e-4 and array.max() <= lambda_s * (1 + 1e-4)):
        raise ValueError(
            f"prior must be (H, W) in [1, lambda_s = {lambda_s}], got {array.shape} "
            f"from {array.min():.4g} to {array.max():.4g}."
        )
    heat = ((array - 1) / max(lambda_s - 1, 1e-9)).clip(0, 1)
    areas, lines = _draw_chest(chest or {})
    picture = overlay(areas, resize(heat, (SIDE, SIDE)))
    picture = np.rint(picture + lines * (np.array(OUTLINE) - picture)).astype(np.uint8)
    page = Page(DESIGN_WIDTH, 1.0)
    picture = mark_sides(_draw_regions(picture, place_labels(boxes, names)), page)

    pieces, room = list(_pieces(phrase, naming, ignored)), page.width - 2 * page.margin
    text = phrase_lines(page, pieces, room, TEXT_LINES + 1)
    if len(text) > TEXT_LINES:
        text = phrase_lines(page, _excerpt(pieces), room, TEXT_LINES)
    return compose(
        page,
        [picture],
        captions=[caption],
        lines=text,
        text_lines=len(text),
        title="Spatial prior M",
        subtitle=subtitle,
        scale=("1", f"{lambda_s:.3g}"),
    )


def _draw_chest(chest: Mapping[str, Sequence[NDArray[np.float64]]]) -> tuple[Picture, NDArray[np.float32]]:
    """Parts of the chest as areas `(SIDE, SIDE, 3)` uint8, and the opacity of their borders `(SIDE, SIDE, 1)`."""
    # Drawn at twice the size, for smooth edges.
    shades = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    for part, shade in PARTS.items():
        for curve in chest.get(part, ()):
            cv2.fillPoly(shades, [np.rint(curve * 2 * SIDE).astype(np.int32)], shade)
    # Rounds the corners.
    rounded = cv2.medianBlur(shades, 15).astype(np.uint8)
    borders = cv2.morphologyEx(rounded, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    opacity = resize(np.float32(OUTLINE_OPACITY) * borders.astype(np.float32), (SIDE, SIDE))
    return resize(SHADES[rounded], (SIDE, SIDE)), opacity[..., None]


@dataclass(frozen=True)
class Label:
    """Label of a box: box in [0, 1] of the image, names of its regions, color, and background in pixels."""

    box: Box
    text: str
    color: Color
    place: Rectangle


def place_labels(boxes: Sequence[Box], names: Sequence[str]) -> list[Label]:
    """Label of each distinct box, smallest box first; no label covers another one or R and L.

    Raises:
        ValueError: If names and boxes differ in number.
    """
    joined: dict[Box, list[str]] = {}
    for box, name in zip(boxes, names, strict=True):
        joined.setdefault(box, []).append(name)
    # Small boxes come first, because large ones have more free places.
    ordered = sorted(joined, key=lambda box: ((box[2] - box[0]) * (box[3] - box[1]), box))
    labels: list[Label] = []
    taken: list[Rectangle] = [(0, 0, 48, 48), (SIDE - 48, 0, SIDE, 48)]
    for number, box in enumerate(ordered):
        text = cut(single_line(" / ".join(joined[box])), SIDE // 2, 14)
        place = _place_label(box, (round(font(14).getlength(text)) + 12, 24), taken)
        taken.append(place)
        labels.append(Label(box, text, BOX_COLORS[(len(ordered) - 1 - number) % len(BOX_COLORS)], place))
    return labels


def _place_label(box: Box, size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Free place for a label of `size` nearest to the upper left corner of its box, inside the box if possible."""
    (width, height), (left, top, right, bottom) = size, (round(edge * SIDE) for edge in box)
    left, top = left + 3, top + 3
    columns, rows = range(left % 8, SIDE - width, 8), range(top % 8, SIDE - height, 8)
    spots = [(x, y, x + width, y + height) for x in columns for y in rows]

    def distance(spot: Rectangle) -> tuple[bool, int]:
        is_outside = spot[0] < left or spot[1] < top or spot[2] > right - 3 or spot[3] > bottom - 3
        # Prefer places along the upper edge.
        return is_outside, abs(spot[0] - left) + 3 * abs(spot[1] - top)

    spots.sort(key=distance)
    return next((spot for spot in spots if not any(meet(spot, other) for other in taken)), spots[0])


def meet(a: Rectangle, b: Rectangle) -> bool:
    """Whether two rectangles overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_regions(picture: Picture, labels: Sequence[Label]) -> Picture:
    """Picture with the boxes, small ones on top, and their names on a dark background."""
    for label in reversed(labels):
        draw_boxes(picture, [label.box], 2, label.color)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for label in labels:
        x0, y0, x1, y1 = label.place
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), DARK_INK)
        draw.text((x0 + 6, y0 + 17), label.text, label.color, font(14), anchor="ls")
    return np.array(image)


def marked_runs(phrase: str, naming: Sequence[Span], ignored: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """The phrase in runs, each with its mark: `names`, `ignored` or the empty string."""
    marks = [""] * len(phrase)
    for mark, spans in (("ignored", ignored), ("names", naming)):
        for start, end in spans:
            marks[start:end] = [mark] * (end - start)
    for mark, run in groupby(zip(marks, phrase, strict=True), key=lambda pair: pair[0]):
        yield "".join(character for _, character in run), mark


def _pieces(phrase: str, naming: Sequence[Span], ignored: Sequence[Span]) -> Iterator[Piece]:
    """Words of the phrase, with relevance 1 if they name a region; the end of a mark also ends a word."""
    after_space = False
    for run, mark in marked_runs(phrase, naming, ignored):
        after_space = after_space or run[:1].isspace()
        for word in single_line(run).split():
            # 300 letters are wider than the picture. Measuring longer words takes time.
            yield Piece(word[:300], float(mark == "names"), after_space, struck=mark == "ignored")
            after_space = True
        after_space = run[-1:].isspace()


def _excerpt(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with an ellipsis for words more than `CONTEXT_WORDS` away from the next mark."""
    kept: list[Piece] = []
    for is_marked, run in groupby(pieces, key=lambda piece: piece.relevance > 0 or piece.struck):
        words = list(run)
        if not (is_marked or len(words) <= 2 * CONTEXT_WORDS + 1 or len(words) == len(pieces)):
            before = words[:CONTEXT_WORDS] if kept else []
            words = [*before, Piece("…", 0.0, True), *words[-CONTEXT_WORDS:]]
        kept += words
    return kept
