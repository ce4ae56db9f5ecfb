"""Drawing primitives: measures, colors, the font, boxes, and the heat map over an image.

All colors are RGB. Lengths in a layout are in design units: the pixels of a panel of width `DESIGN_WIDTH`.
"""

from __future__ import annotations

import io
import os
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from matex_pl.files import MARK, whole_file

Picture = NDArray[np.uint8]
Color = tuple[int, int, int]

DESIGN_WIDTH = 880

# Perceptually uniform, without green or cyan (the boxes), and with a dark end that fades into the image.
COLORMAP = cv2.COLORMAP_INFERNO
MAX_OPACITY = 0.85

BACKGROUND: Color = (18, 20, 24)
INK: Color = (236, 238, 242)
FAINT_INK: Color = (150, 157, 168)
DARK_INK: Color = (12, 13, 16)
BOX_COLOR: Color = (64, 240, 200)


@dataclass(frozen=True)
class Page:
    """Measures of a picture: its width in pixels, and the pixels per design unit."""

    width: int
    unit: float

    def px(self, units: float) -> int:
        """Design units in pixels, at least 1."""
        return max(1, round(units * self.unit))

    @property
    def margin(self) -> int:
        """Space at the sides of the picture, in pixels."""
        return self.px(20)

    @property
    def line_height(self) -> int:
        """Distance between the lines of a phrase, in pixels."""
        return self.px(34)


def overlay(image: Picture, heat: NDArray[np.float32]) -> Picture:
    """Map over the image, `(H, W, 3)` uint8: opacity grows with the map, and the image is unchanged where the map is 0.

    Args:
        image: `(H, W, 3)` uint8.
        heat: `(H, W)` float32 in [0, 1].
    """
    colors = _color_table()[np.rint(heat * 255).astype(np.uint8)]
    return np.rint(image + MAX_OPACITY * heat[..., None] * (colors - image.astype(np.float32))).astype(np.uint8)


@lru_cache(maxsize=1)
def _color_table() -> NDArray[np.float32]:
    """Color map as `(256, 3)` float32 RGB in [0, 255]."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(ramp, COLORMAP)[:, 0, ::-1].astype(np.float32)


def heat_png(heat: NDArray[np.float32]) -> bytes:
    """Map `(h, w)` in [0, 1] as a transparent PNG file. Over an image, it looks like `overlay`."""
    picture = Image.fromarray(np.rint(heat.clip(0, 1) * 255).astype(np.uint8))
    picture.putpalette(np.rint(_color_table()).astype(np.uint8).tobytes())
    opacity = bytes(round(MAX_OPACITY * level) for level in range(256))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=opacity)
    return file.getvalue()


def on_background(values: NDArray[np.float32]) -> Picture:
    """Overlay of `values` `(H, W)` in [0, 1] on the background of all pictures, `(H, W, 3)` uint8."""
    return overlay(blank_picture(*values.shape), values)


def blank_picture(height: int, width: int) -> Picture:
    """Picture `(height, width, 3)` uint8 in the background color."""
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def resize(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`picture` at `size` (width, height): area average to shrink it, else cubic for uint8 and linear for maps."""
    # Cubic interpolation overshoots: harmless on an image, but a map would leave [0, 1] and get heat at zeros.
    enlarge = cv2.INTER_CUBIC if picture.dtype == np.uint8 else cv2.INTER_LINEAR
    method = cv2.INTER_AREA if size[0] < picture.shape[1] else enlarge
    return cv2.resize(picture, size, interpolation=method)


def paste(canvas: Picture, picture: Picture, left: int, top: int) -> None:
    """Copy `picture` onto the canvas."""
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def picture_grid(pictures: Sequence[Picture], *, columns: int, gap: int = 12) -> Picture:
    """Grid of pictures, row by row, `(h, w, 3)` uint8; every cell has the size of the largest picture.

    Args:
        pictures: `(h, w)` or `(h, w, 3)` uint8 each, of any sizes; smaller ones are centered in their cell.
        columns: Number of cells per row, at least 1.
        gap: Pixels between cells and around the grid.
    """
    if not pictures:
        raise ValueError("picture_grid needs at least one picture, got none.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    images = [check_image(picture, name="picture") for picture in pictures]
    cell_h, cell_w = (max(image.shape[axis] for image in images) for axis in (0, 1))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = blank_picture(gap + rows * (cell_h + gap), gap + columns * (cell_w + gap))
    for place, image in enumerate(images):
        left, top = gap + place % columns * (cell_w + gap), gap + place // columns * (cell_h + gap)
        paste(grid, image, left + (cell_w - image.shape[1]) // 2, top + (cell_h - image.shape[0]) // 2)
    return grid


def save_png(path: str | os.PathLike[str], image: Picture) -> Path:
    """Write `image` `(h, w)` or `(h, w, 3)` uint8 as PNG and return its path; readers see the old or the new file."""
    path, metadata = Path(path), PngInfo()
    metadata.add_text("Software", MARK)
    with whole_file(path) as part:
        # Pillow's `optimize` would save little for much more time.
        Image.fromarray(check_image(image, name="image")).save(part, "PNG", compress_level=6, pnginfo=metadata)
    return path


def check_image(image: Any, name: str = "image") -> Picture:
    """`image` as `(H, W, 3)` uint8."""
    array = np.asarray(image)
    gray = array.ndim == 2
    if array.dtype != np.uint8 or 0 in array.shape or not (gray or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"{name} must be (H, W) or (H, W, 3) uint8, got {array.shape} {array.dtype}.")
    return np.repeat(array[..., None], 3, axis=2) if gray else array


def check_heat(heat: ArrayLike, size: tuple[int, int], name: str = "heat") -> NDArray[np.float32]:
    """`heat` as `(H, W)` float32 in [0, 1]."""
    array = np.asarray(heat, dtype=np.float32)
    if array.shape != size:
        raise ValueError(f"{name} must have the image's (H, W) = {size}, got {array.shape}.")
    return check_unit_range(array, name)


def check_unit_range(array: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """`array` in [0, 1]; rounding beyond the ends is clipped, larger values raise."""
    if array.size and not (array.min() >= -1e-4 and array.max() <= 1 + 1e-4):
        raise ValueError(f"{name} must be in [0, 1], got values from {array.min():.4g} to {array.max():.4g}.")
    return array.clip(0, 1)


def visible_boxes(boxes: ArrayLike) -> NDArray[np.float32]:
    """Boxes clipped to the frame, `(K, 4)` float32, without boxes wholly outside."""
    array = np.asarray(boxes, dtype=np.float32)
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be (K, 4) x0, y0, x1, y1, got shape {array.shape}.")
    if not np.isfinite(array).all() or (array[:, :2] > array[:, 2:]).any():
        raise ValueError(f"boxes must be finite with x0 <= x1 and y0 <= y1, got {array.tolist()}.")
    if np.abs(array).max() > 4:
        raise ValueError(
            f"boxes must be in [0, 1] of the frame, got {array.tolist()}. Divide pixels by the size of the frame."
        )
    inside = array.clip(0, 1)
    return inside[(inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3])]


def draw_tile(
    image: Picture, heat: NDArray[np.float32], boxes: NDArray[np.float32], page: Page, *, side_markers: bool = True
) -> Picture:
    """`image` `(h, w, 3)` under `heat` `(H, W)` in [0, 1], with boxes, a cross at the maximum, and R and L."""
    tile = overlay(image, resize(heat, (image.shape[1], image.shape[0])))
    draw_boxes(tile, boxes, page.px(2.4))
    draw_peak(tile, heat, page)
    return mark_sides(tile, page) if side_markers else tile


def draw_boxes(window: Picture, boxes: ArrayLike, thickness: int, color: Color = BOX_COLOR) -> None:
    """Draw frames inside the edges of `boxes` `(K, 4)`, with dark lines on both sides for contrast to bone and heat."""
    size = np.array(window.shape[1::-1])
    for box in np.asarray(boxes):
        near = np.minimum(np.rint(box[:2] * size), size - 2 * thickness).astype(int)
        far = np.maximum(np.rint(box[2:] * size).astype(int), near + 2 * thickness)
        draw_frame(window, near - 1, far + 1, thickness + 2, DARK_INK)
        draw_frame(window, near, far, thickness, color)


def draw_frame(window: Picture, near: ArrayLike, far: ArrayLike, thickness: int, color: Color) -> None:
    """Paint the border of the rectangle from `near` (x, y) to `far`, of width `thickness`, inside its edges."""
    (x0, y0), (x1, y1) = np.maximum(near, 0).tolist(), np.asarray(far).tolist()
    for rows, columns in (
        (slice(y0, y0 + thickness), slice(x0, x1)),
        (slice(y1 - thickness, y1), slice(x0, x1)),
        (slice(y0, y1), slice(x0, x0 + thickness)),
        (slice(y0, y1), slice(x1 - thickness, x1)),
    ):
        window[rows, columns] = color


def draw_peak(window: Picture, heat: NDArray[np.float32], page: Page) -> None:
    """Draw a small cross at the center of the map's first maximal pixel; none on a map of zeros."""
    if heat.max() <= 0:
        return
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    x = int((column + 0.5) / heat.shape[1] * window.shape[1])
    y = int((row + 0.5) / heat.shape[0] * window.shape[0])
    for color, size, thickness in ((DARK_INK, 22, 5), (INK, 18, 2)):
        cv2.drawMarker(window, (x, y), color, cv2.MARKER_CROSS, page.px(size), page.px(thickness))


def draw_color_bar(canvas: Picture, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw the overlay's colors at `corner` (left, top): 1 is the top of a tall bar, and the right of a wide one."""
    (left, top), (width, height) = corner, size
    ramp = np.linspace(1, 0, height)[:, None] if height > width else np.linspace(0, 1, width)
    draw_frame(canvas, (left - 1, top - 1), (left + width + 1, top + height + 1), 1, FAINT_INK)
    paste(canvas, on_background(np.broadcast_to(ramp, (height, width)).astype(np.float32)), left, top)


def mark_sides(picture: Picture, page: Page) -> Picture:
    """`picture` with R and L in its upper corners; the patient's right is on the left of a frontal radiograph."""
    image, inset, letter = Image.fromarray(picture), page.px(12), font(page.px(23))
    draw = ImageDraw.Draw(image)
    for x, text, anchor in ((inset, "R", "lt"), (image.width - inset, "L", "rt")):
        draw.text((x, inset), text, INK, letter, anchor=anchor, stroke_width=page.px(2), stroke_fill=DARK_INK)
    return np.array(image)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of `size` pixels from matplotlib; glyphs that it lacks, such as Chinese, are drawn as boxes."""
    # Matplotlib is located, not imported: the import takes longer than drawing a picture.
    package = find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).with_name("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf"
    # The other layout engine is missing on some machines, and gives the same text another length.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def single_line(text: str) -> str:
    """Text in one line: NFC, single spaces, without control and format characters and lone surrogates."""
    composed = unicodedata.normalize("NFC", text)
    kept = (c for c in composed if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(kept).split())


def cut(text: str, room: float, size: int) -> str:
    """`text` in a font of `size` pixels, shortened with an ellipsis if it is wider than `room` pixels."""
    length = font(size).getlength
    if length(text) <= room:
        return text
    first_too_long = bisect_left(range(len(text)), True, key=lambda n: length(text[:n] + "…") > room)
    return text[: max(first_too_long - 1, 0)].rstrip() + "…"


def write(draw: ImageDraw.ImageDraw, left_base: tuple[int, int], text: str, ink: Color, size: int, room: float) -> None:
    """Write a text in one line from `left_base` (x, y of its baseline), cut to `room` pixels."""
    draw.text(left_base, cut(single_line(text), room, size), ink, font(size), anchor="ls")


def write_header(
    draw: ImageDraw.ImageDraw, page: Page, title: str, subtitle: str, score: float | None = None, units: int = 23
) -> None:
    """Write title and score on the first line, in text of so many units, and the subtitle on the second."""
    right, size = page.width - page.margin, page.px(units)
    room: float = right - page.margin
    if score is not None:
        # Adding 0.0 turns -0.0 into 0.0.
        text = f"cos {round(float(score), 2) + 0.0:.2f}"
        draw.text((right, page.px(41)), text, INK, font(size), anchor="rs")
        room -= font(size).getlength(text) + page.px(24)
    write(draw, (page.margin, page.px(41)), title, INK, size, room)
    write(draw, (page.margin, page.px(70)), subtitle, FAINT_INK, page.px(17), right - page.margin)


def count_boxes(count: int) -> str:
    """Number of boxes in words."""
    return "no box" if count == 0 else f"{count} box" + "es" * (count > 1)
