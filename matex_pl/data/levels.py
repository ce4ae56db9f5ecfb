"""Gray levels for every reader: luminance, opacity, deep numbers to 16 bits, the largest image, and refusals."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cv2
import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""

HIGHEST = 2**16 - 1
# Twice the number at which Pillow warns, and the one at which it refuses.
_MOST_PIXELS = 178_956_970
# Rows at a time, which bounds the memory in addition to an image.
_ROWS = 64


class RefusedImageError(ValueError):
    """The reason why an image is not read. The readers of files add the name of the file."""


def check_size(height: int, width: int) -> None:
    """Refuse an image without pixels, or with more than the memory holds.

    Raises:
        RefusedImageError: The image is empty or has more than 179 million pixels.
    """
    if height < 1 or width < 1 or height * width > _MOST_PIXELS:
        raise RefusedImageError(f"it has {width} x {height} pixels, and at most {_MOST_PIXELS:,} are read")


def map_levels(pixels: np.ndarray, tone: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Levels `(h, w)` uint16 of pixels `(h, w)`, by a function from pixels to shares of white in [0, 1].

    Integers of up to 16 bits go through a table of all their values. Pixels of 16 bits and more are overwritten, if
    they can be: no memory is needed for the levels.
    """

    def levels(values: np.ndarray) -> np.ndarray:
        return np.rint(np.clip(tone(values), 0, 1) * HIGHEST).astype(np.uint16)

    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    table = None
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        codes = np.arange(256**pixels.dtype.itemsize, dtype=f"u{pixels.dtype.itemsize}")
        table = levels(codes.view(pixels.dtype))
        pixels = pixels.view(codes.dtype)
    if pixels.flags.writeable and pixels.flags.c_contiguous and pixels.itemsize > 1:
        found = pixels.reshape(-1).view(np.uint16)[: pixels.size].reshape(pixels.shape)
    else:
        found = np.empty(pixels.shape, dtype=np.uint16)
    for start in range(0, len(pixels), _ROWS):
        part = pixels[start : start + _ROWS]
        if table is None:
            found[start : start + _ROWS] = levels(part)
        else:
            # Without a mode, NumPy copies its output.
            np.take(table, part, out=found[start : start + _ROWS], mode="clip")
    return found


def stretch_levels(pixels: np.ndarray) -> np.ndarray:
    """Levels `(h, w)` uint16, from the darkest to the brightest of the pixels; 0 where all are equal."""
    low, high = float(pixels.min()), float(pixels.max())
    if high == low:
        return np.zeros(pixels.shape, dtype=np.uint16)
    # Half of the span, because the whole of it may exceed the largest number.
    half = high / 2 - low / 2
    return map_levels(pixels, lambda values: (values.astype(np.float64) / 2 - low / 2) / half)


def luminance(colors: np.ndarray, *, is_ybr: bool = False) -> np.ndarray:
    """Luminance `(h, w)` of colors `(h, w, 3)`: of the same type, or float64 for other types than OpenCV's.

    Args:
        colors: RGB.
        is_ybr: Whether the colors are YCbCr, uint8. As in viewers, they become RGB first, whose range may cut them.
    """
    known = colors.dtype in (np.uint8, np.uint16, np.float32)
    found = np.empty(colors.shape[:2], dtype=colors.dtype if known else np.float64)
    for start in range(0, len(colors), _ROWS):
        part = np.ascontiguousarray(colors[start : start + _ROWS])
        if is_ybr:
            # OpenCV's order is Y, Cr, Cb.
            part = cv2.cvtColor(np.ascontiguousarray(part[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)
        gray = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY) if known else part @ np.array([0.299, 0.587, 0.114])
        found[start : start + _ROWS] = gray
    return found


def over_black(levels: np.ndarray, opacity: np.ndarray, highest: Any) -> np.ndarray:
    """Levels `(h, w)` over black, by their opacity `(h, w)`, which is full at `highest`: uint8, or floating numbers."""
    if levels.dtype in (np.uint8, np.uint16):
        depth = cv2.CV_8U if levels.dtype == np.uint8 else cv2.CV_32F
        return cv2.multiply(levels, opacity, scale=1 / float(highest), dtype=depth)
    return levels * (opacity.astype(np.float32) / np.float32(highest))


def check_not_blank(pixels: np.ndarray, stream: Callable[[], bytes | memoryview], codec: str) -> None:
    """Refuse constant pixels of a compressed stream that is not constant.

    The stream of a constant image repeats itself, and so can be compressed to next to nothing.

    Args:
        pixels: Decoded pixels.
        stream: Function that gives the compressed pixels, without their header.
        codec: Decoder, as the message names it.

    Raises:
        RefusedImageError: The codec has lost the image.
    """
    # Few images have equal pixels in a row, and none needs a second look.
    if pixels.size < 2 or pixels[0].min() != pixels[0].max() or pixels.min() != pixels.max():
        return
    content = stream()
    if len(zlib.compress(content)) > 256 + len(content) // 500:
        raise RefusedImageError(f"the codec {codec} decodes a constant image from data that are not constant")


def need(package: str, what: str) -> ModuleType:
    """A package of the extra `dicom`.

    Raises:
        ImportError: It is not installed. The message begins with `what`: the file, and that it needs the package.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what}: pip install 'matex_pl[dicom]'.") from error
