"""Gray levels: colors to luminance, deep numbers to 16 bits, and the largest image that is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import cv2
import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""

HIGHEST = 2**16 - 1
# Twice the number at which Pillow warns, and the one at which it refuses.
_MOST_PIXELS = 178_956_970
_ROWS = 256


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

    Integers of up to 16 bits go through a table of all their values, others row by row. The
    memory in addition to both images stays small.
    """

    def levels(values: np.ndarray) -> np.ndarray:
        return np.rint(np.clip(tone(values), 0, 1) * HIGHEST).astype(np.uint16)

    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    table = None
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        codes = np.arange(256**pixels.dtype.itemsize, dtype=f"u{pixels.dtype.itemsize}")
        table = levels(codes.view(pixels.dtype))
        pixels = pixels.view(codes.dtype)
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


def check_not_blank(pixels: np.ndarray, stream: bytes, codec: str) -> None:
    """Refuse constant pixels of a compressed stream that is not constant.

    The stream of a constant image repeats itself, and so can be compressed to next to nothing.

    Args:
        pixels: Decoded pixels.
        stream: Compressed pixels, without their header.
        codec: Decoder, as the message names it.

    Raises:
        RefusedImageError: The codec has lost the image.
    """
    if pixels.size > 1 and pixels.min() == pixels.max() and len(zlib.compress(stream)) > 256 + len(stream) // 500:
        raise RefusedImageError(f"the codec {codec} decodes a constant image from data that are not constant")
