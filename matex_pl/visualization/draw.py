"""Drawing primitives: pages, colors, fonts, boxes, and the heat over an image."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from matex_pl.files import whole_file

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

DESIGN_WIDTH = 880

# Perceptually uniform, without green or cyan (the boxes), and its dark end fades into the film instead of tinting it.
COLORMAP = cv2.COLORMAP_INFERNO
MAX_OPACITY = 0.85

# Pillow's own font is the same everywhere but has little beyond ASCII; these stand in for texts that it cannot write.
WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf")

BACKGROUND: Colour = (18, 20, 24)
INK: Colour = (236, 238, 242)
FAINT_INK: Colour = (150, 157, 168)
DARK_INK: Colour = (12, 13, 16)
BOX_COLOUR: Colour = (64, 240, 200)


def overlay(film: Picture, heat: NDArray[np.float32]) -> Picture:
    """The map over the film, `(H, W, 3)` uint8: opacity grows with the map, and where it is 0 the film is untouched.

    Args:
        film: `(H, W, 3)` uint8.
        heat: `(H, W)` float32 in [0, 1].
    """
    opacity = MAX_OPACITY * heat[..., None]
    return np.rint(film + opacity * (colours(heat) - film.astype(np.float32))).astype(np.uint8)


def colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour map at `values` `(H, W)` in [0, 1]: `(H, W, 3)` float32 RGB in [0, 255]."""
    levels = np.rint(values * 255).astype(np.uint8)
    return _colour_table()[levels]


def resize(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`picture` at `size` (width, height): areas averaged when it shrinks, else cubic for uint8 and linear for maps."""
    if size[0] < picture.shape[1]:
        method = cv2.INTER_AREA
    else:
        # Cubic rings: harmless on a film, but it would leave [0, 1] and put heat where the map has none.
        method = cv2.INTER_CUBIC if picture.dtype == np.uint8 else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=method)


def picture_grid(
    pictures: Sequence[Picture], *, columns: int, captions: Sequence[str] | None = None, gap: int = 12
) -> Picture:
    """A grid of pictures, row by row, `(h, w, 3)` uint8; every cell is as large as the largest picture.

    Args:
        pictures: `(h, w)` or `(h, w, 3)` uint8 each, of any sizes; smaller ones stand in the middle of their cell.
        columns: Cells per row, at least 1.
        captions: One line under each picture, cut with an ellipsis; none by default.
        gap: Pixels between cells and around the sheet.

    Raises:
        ValueError: No pictures, wrong shapes, or as many captions as pictures are not given.
    """
    if not pictures:
        raise ValueError("picture_grid needs at least one picture, got none.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"captions must be one per picture: got {len(captions)} for {len(pictures)} pictures.")
    films = [check_film(picture, name="picture") for picture in pictures]
    cell_h, cell_w = (max(film.shape[axis] for film in films) for axis in (0, 1))
    caption_h = 0 if captions is None else 26
    columns = min(columns, len(films))
    rows = -(-len(films) // columns)
    sheet = np.full((gap + rows * (cell_h + caption_h + gap), gap + columns * (cell_w + gap), 3), BACKGROUND, np.uint8)
    corners = [
        (gap + i % columns * (cell_w + gap), gap + i // columns * (cell_h + caption_h + gap)) for i in range(len(films))
    ]
    for film, (left, top) in zip(films, corners, strict=True):
        paste(sheet, film, left + (cell_w - film.shape[1]) // 2, top + (cell_h - film.shape[0]) // 2)
    return sheet if captions is None else _write_cell_captions(sheet, captions, corners, cell_w, cell_h)


def save_png(path: str | os.PathLike[str], image: Picture) -> Path:
    """Write `image` `(h, w)` or `(h, w, 3)` uint8 as PNG and return its path; a reader sees the old file or the new.

    The file is written beside its place and moved there; folders on the way are made. Pillow's `optimize` would save
    5 % of a panel's bytes for five times the time, which a writer of thousands of maps feels.
    """
    path = Path(path)
    with whole_file(path) as part:
        Image.fromarray(check_film(image, name="image")).save(part, format="PNG", compress_level=6)
    return path


def single_line(text: str) -> str:
    """The text in one line: NFC, single blanks, no control or format characters and no lone surrogates."""
    composed = unicodedata.normalize("NFC", text)
    kept = (c for c in composed if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(kept).split())


def clean(text: str) -> str:
    """A `single_line` that can be drawn: where no font at hand has a letter, its base letters stand for it."""
    line = single_line(text)
    return line if _wide_font(12) else "".join(c if _in_default_font(c) else _base_letters(c) for c in line)


def _base_letters(character: str) -> str:
    """The character without its accents, if the default font has what is left."""
    base = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    return base if base and all(map(_in_default_font, base)) else character


def check_film(film: Any, name: str = "film") -> Picture:
    """`film` as `(H, W, 3)` uint8."""
    array = np.asarray(film)
    grey = array.ndim == 2
    if array.dtype != np.uint8 or 0 in array.shape or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"{name} must be (H, W) or (H, W, 3) uint8, got {array.shape} {array.dtype}.")
    return np.repeat(array[..., None], 3, axis=2) if grey else array


def check_heat(heat: ArrayLike, size: tuple[int, int], name: str = "heat") -> NDArray[np.float32]:
    """`heat` as `(H, W)` float32 in [0, 1]; rounding past the ends is cut, more is an error."""
    array = np.asarray(heat, dtype=np.float32)
    if array.shape != size:
        raise ValueError(f"{name} must have the film's (H, W) = {size}, got {array.shape}.")
    _check_unit_range(name, array)
    return array.clip(0, 1)


def _check_unit_range(name: str, array: NDArray[np.float32], tolerance: float = 1e-4) -> None:
    if array.size and not (array.min() >= -tolerance and array.max() <= 1 + tolerance):
        raise ValueError(f"{name} must be in [0, 1], got values from {array.min():.4g} to {array.max():.4g}.")


def _check_boxes(boxes: ArrayLike) -> NDArray[np.float32]:
    """`boxes` as `(K, 4)` float32."""
    array = np.asarray(boxes, dtype=np.float32)
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be (K, 4) x0, y0, x1, y1, got shape {array.shape}.")
    if not np.isfinite(array).all() or (array[:, :2] > array[:, 2:]).any():
        raise ValueError(f"boxes must be finite with x0 <= x1 and y0 <= y1, got {array.tolist()}.")
    if np.abs(array).max() > 4:
        raise ValueError(
            f"boxes must be in [0, 1] of the frame, got {array.tolist()}. Divide pixels by the frame's size."
        )
    return array


def visible_boxes(boxes: ArrayLike) -> NDArray[np.float32]:
    """The boxes cut to the frame, `(K, 4)` float32; those wholly outside are left out."""
    inside = _check_boxes(boxes).clip(0, 1)
    return inside[(inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3])]


@dataclass(frozen=True)
class Page:
    """The measures of a picture.

    Args:
        width: In pixels.
        unit: Pixels per design unit.
    """

    width: int
    unit: float

    def px(self, units: float) -> int:
        """Design units in pixels, at least 1."""
        return max(1, round(units * self.unit))

    @property
    def margin(self) -> int:
        """Of the picture's sides."""
        return self.px(20)

    @property
    def line_height(self) -> int:
        """Of the phrase."""
        return self.px(34)


@lru_cache(maxsize=1)
def _colour_table() -> NDArray[np.float32]:
    """The colour map as `(256, 3)` float32 RGB."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(ramp, COLORMAP)[:, 0, ::-1].astype(np.float32)


def font_for(units: int, text: str = "") -> Any:
    """The font of `units` pixels in which `text` is written."""
    covered = all(map(_in_default_font, text))
    return _default_font(units) if covered else _wide_font(units) or _default_font(units)


@lru_cache(maxsize=32)
def _default_font(size: int) -> Any:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=32)
def _wide_font(size: int) -> Any | None:
    """The first of `WIDE_FONTS` on this machine, or None."""
    for name in WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


@lru_cache(maxsize=4096)
def _in_default_font(character: str) -> bool:
    """Whether the default font draws more for the character than its box for unknown ones (U+FFFF has no glyph)."""
    font = _default_font(24)
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def paste(canvas: Picture, picture: Picture, left: int, top: int) -> None:
    """Lay `picture` on the canvas."""
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def draw_boxes(window: Picture, boxes: NDArray[np.float32], thickness: int) -> None:
    """Frames inside the boxes' edges, with a dark line on either side so that they show on bone and on heat."""
    size = np.array(window.shape[1::-1])
    for box in boxes:
        near = np.minimum(np.rint(box[:2] * size), size - 2 * thickness).astype(int)
        far = np.maximum(np.rint(box[2:] * size).astype(int), near + 2 * thickness)
        draw_frame(window, near - 1, far + 1, thickness + 2, DARK_INK)
        draw_frame(window, near, far, thickness, BOX_COLOUR)


def draw_frame(window: Picture, near: NDArray[Any], far: NDArray[Any], thickness: int, colour: Colour) -> None:
    """Paint the border of the rectangle from `near` (x, y) to `far`, `thickness` wide, inside its edges."""
    (x0, y0), (x1, y1) = near.clip(0).tolist(), far.tolist()
    for rows, columns in (
        (slice(y0, y0 + thickness), slice(x0, x1)),
        (slice(y1 - thickness, y1), slice(x0, x1)),
        (slice(y0, y1), slice(x0, x0 + thickness)),
        (slice(y0, y1), slice(x1 - thickness, x1)),
    ):
        window[rows, columns] = colour


def draw_peak(window: Picture, heat: NDArray[np.float32], page: Page) -> None:
    """A small cross at the centre of the map's first maximal pixel; none on a map of zeros."""
    if heat.max() <= 0:
        return
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    x = int((column + 0.5) / heat.shape[1] * window.shape[1])
    y = int((row + 0.5) / heat.shape[0] * window.shape[0])
    for colour, size, thickness in ((DARK_INK, 22, 5), (INK, 18, 2)):
        cv2.drawMarker(window, (x, y), colour, cv2.MARKER_CROSS, page.px(size), page.px(thickness))


def on_background(values: NDArray[np.float32]) -> Picture:
    """What the overlay of `values` `(H, W)` looks like on the panel's own background, `(H, W, 3)`."""
    return overlay(np.full((*values.shape, 3), BACKGROUND, np.uint8), values)


def write_header(draw: ImageDraw.ImageDraw, page: Page, title: str, subtitle: str, score: float) -> None:
    """Title and score on the first line, subtitle on the second."""
    right = page.width - page.margin
    # Adding 0.0 turns -0.0 into 0.0.
    text, font = f"cos {round(float(score), 2) + 0.0:.2f}", font_for(page.px(26))
    draw.text((right, page.px(41)), text, INK, font, anchor="rs")
    room = right - page.margin - font.getlength(text) - page.px(24)
    write(draw, (page.margin, page.px(41)), clean(title), INK, page.px(26), room)
    write(draw, (page.margin, page.px(70)), clean(subtitle), FAINT_INK, page.px(19), right - page.margin)


def write(
    draw: ImageDraw.ImageDraw, left_base: tuple[int, int], text: str, ink: Colour, size: int, room: float
) -> None:
    """A line of text from `left_base` (x, y of its baseline), cut to `room` pixels."""
    font = font_for(size, text)
    draw.text(left_base, cut(text, font, room), ink, font, anchor="ls")


def count_boxes(count: int) -> str:
    """The number of boxes in words."""
    return "no box" if count == 0 else f"{count} box" + "es" * (count > 1)


def write_side_markers(draw: ImageDraw.ImageDraw, page: Page, corner: tuple[int, int], width: int) -> None:
    """R and L in the upper corners of the picture at `corner` (left, top): its left is a frontal film's right."""
    font, inset, (left, top) = font_for(page.px(26)), page.px(12), corner
    for x, text, anchor in ((left + inset, "R", "lt"), (left + width - inset, "L", "rt")):
        draw.text((x, top + inset), text, INK, font, anchor=anchor, stroke_width=page.px(2), stroke_fill=DARK_INK)


def cut(text: str, font: Any, room: float) -> str:
    """`text`, or as much of its beginning as fits with an ellipsis into `room` pixels."""
    if font.getlength(text) <= room:
        return text
    first_too_long = bisect_left(range(len(text)), True, key=lambda n: font.getlength(text[:n] + "…") > room)
    return text[: max(first_too_long - 1, 0)].rstrip() + "…"


def _write_cell_captions(
    sheet: Picture, captions: Sequence[str], corners: Sequence[tuple[int, int]], cell_w: int, cell_h: int
) -> Picture:
    """The sheet with a line centred under each cell; `corners` are the cells' (left, top)."""
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for caption, (left, top) in zip(map(clean, captions), corners, strict=True):
        font = font_for(16, caption)
        draw.text((left + cell_w / 2, top + cell_h + 19), cut(caption, font, cell_w), INK, font, anchor="ms")
    return np.array(image)
