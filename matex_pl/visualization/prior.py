"""A picture of the spatial prior: M over the outline of a frontal chest, the boxes of the regions, and the phrase.

Colours are RGB, lengths are pixels of the picture, and x runs to the right of the image, y down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from matex_pl.visualization.draw import (
    BACKGROUND,
    BOX_COLOUR,
    DARK_INK,
    FAINT_INK,
    INK,
    Colour,
    Picture,
    clean,
    cut,
    draw_frame,
    font_for,
    overlay,
    resize,
)
from matex_pl.visualization.words import Piece, blank, wrap

Span = tuple[int, int]
Rectangle = tuple[int, int, int, int]

WIDTH, MARGIN, SIDE, TOP = 880, 20, 768, 88
TEXT_LINES, LINE_HEIGHT = 5, 34
# A word is at least 14 pixels with its blank, so that more of them never fit on the lines.
MAX_WORDS = 400
# Words kept on either side of what is marked when the phrase is too long.
CONTEXT_WORDS = 6

# The first is that of the boxes on every other picture; none is in the colour map of M.
BOX_COLOURS: tuple[Colour, ...] = (
    BOX_COLOUR,
    (120, 190, 255),
    (196, 240, 110),
    (255, 176, 222),
    (214, 220, 230),
    (190, 170, 255),
)
BEYOND: Colour = (9, 10, 13)
BODY: Colour = (34, 37, 43)
LUNG: Colour = (17, 19, 23)
HEART: Colour = (45, 48, 55)
BAR_EDGE: Colour = (58, 62, 70)
LINE: Colour = (205, 212, 222)

# The outline in parts of the film. A shape is one curve per stretch between two corners; the patient's right is on the
# left. The lungs fill the boxes of the shipped region table: apices in `upper`, angles in `costophrenic`.
SHOULDER = ((0.41, 0.0), (0.405, 0.02), (0.375, 0.05), (0.29, 0.075), (0.17, 0.098), (0.07, 0.135), (0.0, 0.20))
FLANK = ((0.0, 0.42), (0.033, 0.50), (0.043, 0.64), (0.04, 0.82), (0.03, 1.0))
RIGHT_DOME = ((0.088, 0.865), (0.125, 0.80), (0.20, 0.755), (0.28, 0.742), (0.36, 0.762), (0.43, 0.815))
LEFT_DOME = ((0.912, 0.885), (0.875, 0.825), (0.81, 0.785), (0.755, 0.777), (0.70, 0.80))
# From the midline foot of a dome, up the inner border, over the apex and down to the angle.
RIGHT_BORDER = (
    *((0.43, 0.815), (0.402, 0.74), (0.401, 0.64), (0.428, 0.53), (0.444, 0.43), (0.447, 0.32), (0.44, 0.22)),
    *((0.428, 0.155), (0.395, 0.112), (0.345, 0.102), (0.28, 0.128), (0.215, 0.195), (0.155, 0.32)),
    *((0.113, 0.50), (0.09, 0.68), (0.084, 0.79), (0.088, 0.865)),
)
LEFT_BORDER = (
    *((0.70, 0.80), (0.717, 0.75), (0.70, 0.67), (0.65, 0.585), (0.595, 0.50), (0.574, 0.43), (0.586, 0.375)),
    *((0.59, 0.33), (0.574, 0.285), (0.562, 0.22), (0.572, 0.155), (0.605, 0.112), (0.655, 0.102)),
    *((0.72, 0.128), (0.785, 0.195), (0.845, 0.32), (0.887, 0.50), (0.91, 0.68), (0.917, 0.80), (0.912, 0.885)),
)
RIGHT_LUNG, LEFT_LUNG = (RIGHT_DOME, RIGHT_BORDER), (LEFT_DOME, LEFT_BORDER)
# Its sides lie under the lungs, whose inner borders are the heart's.
HEART_TOP = ((0.35, 0.62), (0.37, 0.53), (0.43, 0.475), (0.515, 0.455), (0.60, 0.475), (0.68, 0.56), (0.73, 0.68))
HEART_BOTTOM = ((0.716, 0.765), (0.70, 0.81), (0.65, 0.838), (0.57, 0.85), (0.48, 0.843), (0.43, 0.815))
CLAVICLE = ((0.455, 0.205), (0.40, 0.178), (0.31, 0.168), (0.20, 0.148), (0.10, 0.158))
AIRWAY = ((0.485, 0.0), (0.485, 0.14), (0.485, 0.26), (0.468, 0.315), (0.42, 0.365))


@dataclass(frozen=True)
class IgnoredPiece(Piece):
    """A piece of what the phrase names and the prior leaves out."""


def prior_panel(
    *,
    prior: ArrayLike,
    lambda_s: float,
    boxes: Sequence[tuple[float, float, float, float]],
    names: Sequence[str],
    phrase: str,
    naming: Sequence[Span],
    ignored: Sequence[Span] = (),
    subtitle: str = "",
    caption: str = "",
) -> Picture:
    """M of one phrase as a picture `(h, WIDTH, 3)` uint8; h grows with the lines of the phrase, at most `TEXT_LINES`.

    R and L stand for the patient's sides, R on the left as on a frontal film, whatever the map shows.

    Args:
        prior: `(H, W)` in [1, lambda_s], drawn square.
        lambda_s: Upper end of the colour bar, at least 1.
        boxes: K of `(x0, y0, x1, y1)` in [0, 1] of the image. Equal boxes are drawn once, with their names joined.
        names: K labels.
        phrase: As the user wrote it; what does not fit gives way to ellipses, first of all what is not marked.
        naming: Character ranges of the phrase that named regions, highlighted.
        ignored: Character ranges that named none, struck through.
        subtitle: Second line.
        caption: Under the map.

    Raises:
        ValueError: The prior is outside [1, lambda_s], or names and boxes do not pair.
    """
    heat = _as_heat(prior, lambda_s)
    lines = _phrase_lines(phrase, naming, ignored)
    height = TOP + SIDE + 48 + len(lines) * LINE_HEIGHT + 10
    canvas = np.full((height, WIDTH, 3), BACKGROUND, np.uint8)
    window = canvas[TOP : TOP + SIDE, MARGIN : MARGIN + SIDE]
    window[:] = overlay(_chest(), resize(heat, (SIDE, SIDE)))
    _draw_outline(window)
    labelled = _draw_boxes(window, boxes, names)
    _draw_colour_bar(canvas, heat)

    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    _write_labels(draw, labelled)
    _write_frame(draw, subtitle, caption, f"{lambda_s:.3g}")
    for row, line in enumerate(lines):
        _write_line(draw, line, TOP + SIDE + 48 + row * LINE_HEIGHT)
    return np.array(sheet)


def marked_runs(phrase: str, naming: Sequence[Span], ignored: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """Stretches of the phrase in order, each with `names`, `ignored` or the empty string; together the whole phrase."""
    marks = [""] * len(phrase)
    for mark, spans in (("ignored", ignored), ("names", naming)):
        for start, end in spans:
            marks[start:end] = [mark] * (end - start)
    for mark, run in groupby(zip(marks, phrase, strict=True), key=lambda pair: pair[0]):
        yield "".join(character for _, character in run), mark


def _as_heat(prior: ArrayLike, lambda_s: float) -> NDArray[np.float32]:
    """The prior in [0, 1]; zeros where `lambda_s` is 1."""
    array = np.asarray(prior, dtype=np.float32)
    if array.ndim != 2 or not (array.min() >= 1 - 1e-4 and array.max() <= lambda_s * (1 + 1e-4)):
        raise ValueError(
            f"prior must be (H, W) in [1, lambda_s = {lambda_s}], got {array.shape} "
            f"from {array.min():.4g} to {array.max():.4g}."
        )
    return ((array - 1) / max(lambda_s - 1, 1e-9)).clip(0, 1)


def _curve(points: ArrayLike, steps: int = 12) -> NDArray[np.float64]:
    """A smooth curve through `points` (n, 2), Catmull-Rom: ((n - 1) * steps + 1, 2)."""
    knots = np.asarray(points, dtype=np.float64)
    ends = np.concatenate([knots[:1], knots, knots[-1:]])
    t = np.arange(steps)[:, None] / steps
    stretches = [
        b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False)
    ]
    return np.concatenate([*stretches, knots[-1:]])


def _shape(curves: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Curves joined at their ends."""
    return np.concatenate([_curve(points) for points in curves])


def _both_sides(points: ArrayLike) -> list[NDArray[np.float64]]:
    """The curve and its mirror image."""
    curve = _curve(points)
    return [curve, curve * (-1, 1) + (1, 0)]


def _fixed_point(points: NDArray[np.float64]) -> NDArray[np.int32]:
    """Points in parts of the film as OpenCV takes them with `shift=4`."""
    return np.rint(points * SIDE * 16).astype(np.int32)


def _chest() -> Picture:
    """The areas of the outline, (SIDE, SIDE, 3)."""
    right, left = (np.concatenate(side) for side in zip(_both_sides(SHOULDER), _both_sides(FLANK), strict=True))
    areas = (
        (np.concatenate([right, left[::-1]]), BODY),
        (_shape((HEART_TOP, HEART_BOTTOM)), HEART),
        (_shape(RIGHT_LUNG), LUNG),
        (_shape(LEFT_LUNG), LUNG),
    )
    picture = np.full((SIDE, SIDE, 3), BEYOND, np.uint8)
    for points, colour in areas:
        cv2.fillPoly(picture, [_fixed_point(points)], colour, cv2.LINE_AA, 4)
    return picture


def _draw_outline(window: Picture) -> None:
    """Thin lines over map and areas: the body, lungs and diaphragm clearer than heart, clavicles and airways."""
    contours = [*_both_sides(SHOULDER), *_both_sides(FLANK), _shape(RIGHT_LUNG), _shape(LEFT_LUNG)]
    domes = [_curve(RIGHT_DOME), _curve(LEFT_DOME)]
    within = [_curve(HEART_BOTTOM), *_both_sides(CLAVICLE), *_both_sides(AIRWAY)]
    for curves, thickness, opacity in ((within, 1, 0.35), (contours, 1, 0.6), (domes, 2, 0.6)):
        ink = np.zeros((SIDE, SIDE), np.uint8)
        cv2.polylines(ink, [_fixed_point(points) for points in curves], False, 255, thickness, cv2.LINE_AA, 4)
        share = opacity * ink[..., None].astype(np.float32) / 255
        window[:] = np.rint(window + share * (np.array(LINE, np.float32) - window)).astype(np.uint8)


def _draw_boxes(
    window: Picture, boxes: Sequence[tuple[float, float, float, float]], names: Sequence[str]
) -> list[tuple[Rectangle, str, Colour]]:
    """Draw each distinct box and return it in pixels of the window, with its names and its colour; large ones first."""
    joined: dict[tuple[float, float, float, float], list[str]] = {}
    for box, name in zip(boxes, names, strict=True):
        joined.setdefault(box, []).append(name)
    ordered = sorted(joined, key=lambda box: (-(box[2] - box[0]) * (box[3] - box[1]), box))
    placed = []
    for k, box in enumerate(ordered):
        near = np.minimum(np.rint(np.array(box[:2]) * SIDE), SIDE - 6).astype(int)
        far = np.maximum(np.rint(np.array(box[2:]) * SIDE).astype(int), near + 6)
        colour = BOX_COLOURS[k % len(BOX_COLOURS)]
        draw_frame(window, near - 1, far + 1, 4, DARK_INK)
        draw_frame(window, near, far, 2, colour)
        placed.append(((*near.tolist(), *far.tolist()), " / ".join(joined[box]), colour))
    return placed


def _draw_colour_bar(canvas: Picture, heat: NDArray[np.float32]) -> None:
    """The colours of M on the picture's background, lambda_s at the top."""
    left = MARGIN + SIDE + 12
    values = np.linspace(1, 0, SIDE, dtype=np.float32)[:, None].repeat(12, axis=1)
    canvas[TOP - 1 : TOP + SIDE + 1, left - 1 : left + 13] = BAR_EDGE
    canvas[TOP : TOP + SIDE, left : left + 12] = overlay(np.full((SIDE, 12, 3), BACKGROUND, np.uint8), values)


def _write_frame(draw: ImageDraw.ImageDraw, subtitle: str, caption: str, strongest: str) -> None:
    """Title, subtitle, caption, the ends of the colour bar, and the patient's sides."""
    draw.text((MARGIN, 41), "Spatial prior M", INK, font_for(26), anchor="ls")
    for text, base, size in ((subtitle, 70, 19), (caption, TOP + SIDE + 24, 17)):
        line = clean(text)
        font = font_for(size, line)
        draw.text((MARGIN, base), cut(line, font, WIDTH - 2 * MARGIN), FAINT_INK, font, anchor="ls")
    for text, y, anchor in ((strongest, TOP, "lt"), ("1", TOP + SIDE, "lb")):
        draw.text((MARGIN + SIDE + 30, y), text, FAINT_INK, font_for(17), anchor=anchor)
    for text, x, anchor in (("R", MARGIN + 12, "lt"), ("L", MARGIN + SIDE - 12, "rt")):
        draw.text((x, TOP + 12), text, INK, font_for(26), anchor=anchor, stroke_width=2, stroke_fill=DARK_INK)


def _write_labels(draw: ImageDraw.ImageDraw, labelled: Sequence[tuple[Rectangle, str, Colour]]) -> None:
    """The names of the boxes, each on a dark ground in the colour of its box."""
    for (x0, y0, x1, y1), text, colour in _labels(labelled):
        draw.rectangle((MARGIN + x0, TOP + y0, MARGIN + x1 - 1, TOP + y1 - 1), DARK_INK)
        draw.text((MARGIN + x0 + 6, TOP + y0 + 17), text, colour, font_for(16, text), anchor="ls")


def _labels(labelled: Sequence[tuple[Rectangle, str, Colour]]) -> list[tuple[Rectangle, str, Colour]]:
    """Labels in pixels of the window, each inside its own box where there is room, none over another or R and L."""
    markers = [(0, 0, 48, 48), (SIDE - 48, 0, SIDE, 48)]
    labels: list[tuple[Rectangle, str, Colour]] = []
    # Small boxes first: large ones have more room to give way.
    for box, name, colour in reversed(labelled):
        line = clean(name)
        font = font_for(16, line)
        text = cut(line, font, SIDE // 2)
        taken = [*markers, *(label[0] for label in labels)]
        labels.append((_place(box, (round(font.getlength(text)) + 12, 24), taken), text, colour))
    return labels


def _place(box: Rectangle, size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """The best place for a label of `size` (width, height) that is free; where none is, the box's first corner."""
    width, height = size
    left, top, right, bottom = box[0] + 3, box[1] + 3, box[2] - 3 - width, box[3] - 3 - height
    spots = [(left, top), (right, top), (left, bottom), (right, bottom)]
    spots += [(x, y) for y in range(top, bottom, height) for x in (left, (left + right) // 2, right)]
    anywhere = [(x, y) for y in range(3, SIDE - height, height) for x in range(3, SIDE - width, 16)]
    spots += sorted(anywhere, key=lambda spot: abs(spot[0] - left) + abs(spot[1] - top))
    labels = [(x, y, x + width, y + height) for x, y in spots]
    inside = [label for label in labels if min(label[:2]) >= 0 and max(label[2:]) <= SIDE]
    return next((label for label in inside if not any(_meet(label, other) for other in taken)), inside[0])


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _phrase_lines(phrase: str, naming: Sequence[Span], ignored: Sequence[Span]) -> list[list[Piece]]:
    """The phrase on at most `TEXT_LINES` lines, none if it is empty; a long one loses first what is not marked."""
    pieces = list(_pieces(phrase, naming, ignored))
    if not pieces:
        return []
    font, room = _phrase_font(pieces[:MAX_WORDS]), WIDTH - 2 * MARGIN - 6
    if len(pieces) <= MAX_WORDS:
        lines = wrap(pieces, font, room, len(pieces) + 1)
        if len(lines) <= TEXT_LINES:
            return lines
    return wrap(_excerpt(pieces)[:MAX_WORDS], font, room, TEXT_LINES)


def _phrase_font(pieces: Sequence[Piece]) -> Any:
    return font_for(20, "".join(piece.text for piece in pieces))


def _pieces(phrase: str, naming: Sequence[Span], ignored: Sequence[Span]) -> Iterator[Piece]:
    """The words of the phrase, of relevance 1 where they name a region; a word ends where a mark ends, too."""
    after_space = False
    for run, mark in marked_runs(phrase, naming, ignored):
        after_space = after_space or run[:1].isspace()
        for word in clean(run).split():
            # A word of 300 letters is wider than the picture, and measuring a longer one takes time.
            yield (IgnoredPiece if mark == "ignored" else Piece)(word[:300], float(mark == "names"), after_space)
            after_space = True
        after_space = run[-1:].isspace()


def _excerpt(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, with an ellipsis for what lies more than `CONTEXT_WORDS` away from the next mark."""
    kept: list[Piece] = []
    for is_marked, run in groupby(pieces, key=lambda piece: piece.relevance > 0 or isinstance(piece, IgnoredPiece)):
        words = list(run)
        if is_marked or len(words) <= 2 * CONTEXT_WORDS + 1 or len(words) == len(pieces):
            kept += words
        else:
            before = words[:CONTEXT_WORDS] if kept else []
            kept += [*before, Piece("…", 0.0, True), *words[-CONTEXT_WORDS:]]
    return kept


def _write_line(draw: ImageDraw.ImageDraw, line: Sequence[Piece], top: int) -> None:
    """One line of the phrase: what names a region on the colour of the boxes, what was ignored struck through."""
    font, x = _phrase_font(line), MARGIN + 3.0
    spaced = [*(piece.after_space for piece in line[1:]), True]
    after_name = False
    for index, piece in enumerate(line):
        gap = blank(font) * (piece.after_space and index > 0)
        length, is_ignored = font.getlength(piece.text), isinstance(piece, IgnoredPiece)
        if piece.relevance:
            # Neighbouring words share one ground; its ends reach into the blanks around it.
            left = x if after_name else x + gap - 3 * (piece.after_space or index == 0)
            draw.rectangle((round(left), top, round(x + gap + length + 3 * spaced[index]), top + 28), BOX_COLOUR)
        x += gap
        ink = DARK_INK if piece.relevance else FAINT_INK if is_ignored else INK
        draw.text((x, top + 21), piece.text, ink, font, anchor="ls")
        if is_ignored:
            draw.line((x, top + 15, x + length, top + 15), FAINT_INK, 2)
        x, after_name = x + length, bool(piece.relevance)
