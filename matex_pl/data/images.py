"""Reading of image files: all supported formats, upright, at the requested size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from matex_pl.data.dicom import is_dicom, read_dicom, read_dicom_size, warn_if_several

Size = tuple[int, int]
"""Height and width in pixels."""

TargetSize = Callable[[Size], Size]
"""Function from the size of an image to its size after resizing."""

ResizeMode = Literal["longest", "shortest", "squash"]
"""How an image is fitted into the model's input, by open_clip's names."""

# Only these: Pillow also opens PostScript, which starts a program.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# Pillow opens only formats whose plugins are loaded.
Image.init()

_ORIENTATION_TAG = 0x0112
# Turns of the stored pixels by the EXIF orientation of the file.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
# Averaging twice blurs, and more so if the two sizes are close.
_MARGIN = 1.5
_TURNED = (5, 6, 7, 8)
_POLARITY_TAG, _WHITE_IS_ZERO = 0x0106, 0


@dataclass(frozen=True)
class GrayImage:
    """Pixels `(h, w)` uint8, possibly resized, and the size of the image's file, to which boxes refer."""

    pixels: np.ndarray
    size: Size


def read_image(
    path: str | Path, target_size: TargetSize | None = None, *, apply_exif_orientation: bool = True
) -> GrayImage:
    """An image file of any supported format as 8-bit gray levels.

    The formats are PNG, JPEG, TIFF, BMP, WebP and, with the extra `dicom`, DICOM. Colors become luminance, and
    transparent parts become black. Images of more than 8 bits are reduced after resizing: from the darkest to the
    brightest pixel, or over the window of a DICOM file. To shrink a JPEG, the file is decoded at a half, a quarter or
    an eighth of its size, which blurs slightly.

    Args:
        path: Image file.
        target_size: Function from the size of the file to the size after resizing; no resizing by default.
        apply_exif_orientation: Whether to turn the image by the EXIF orientation of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        ImportError: The file is DICOM or a JPEG of more than 8 bits, and the extra `dicom` is not installed.
        ValueError: The file is no readable image; the message names the reason.
    """
    with _reading(path) as file:
        if is_dicom(file):
            return _finished(read_dicom(file), target_size)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                orientation = _orientation(image, apply_exif_orientation=apply_exif_orientation)
                warn_if_several(file, getattr(image, "n_frames", 1), "pages")
                if image.format == "JPEG" and target_size is not None:
                    size = _upright_size(image, orientation)
                    # `draft` takes width and height of the stored pixels.
                    target = target_size(size) if orientation in _TURNED else target_size(size)[::-1]
                    return GrayImage(_turned(_decode_reduced(image, target), orientation), size)
                levels = _turned(_levels(image, file), orientation)
        except UnidentifiedImageError:
            return _finished(_stretched(_deep_jpeg(file)), target_size)
        return _finished(levels if levels.dtype == np.uint8 else _stretched(levels), target_size)


def read_levels(path: str | Path) -> np.ndarray:
    """Gray levels `(h, w)` of an image file, upright, at the bit depth of the file: 1 of 65,535 stays above 0.

    The type is uint8 or has more bits; DICOM files give the levels of their window. Errors are as in `read_image`.
    """
    with _reading(path) as file:
        if is_dicom(file):
            return read_dicom(file)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                warn_if_several(file, getattr(image, "n_frames", 1), "pages")
                return _turned(_levels(image, file), _orientation(image, apply_exif_orientation=True))
        except UnidentifiedImageError:
            return _deep_jpeg(file)


def read_size(path: str | Path, *, apply_exif_orientation: bool = True) -> Size:
    """Height and width of an image file, from the header; see `read_image` for the arguments and errors."""
    with _reading(path) as file:
        if is_dicom(file):
            return read_dicom_size(file)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                return _upright_size(image, _orientation(image, apply_exif_orientation=apply_exif_orientation))
        except UnidentifiedImageError:
            height, width = _deep_jpeg(file).shape
            return height, width


def is_jpeg(path: Path) -> bool:
    """Whether the file begins with the magic bytes of JPEG."""
    with path.open("rb") as file:
        return file.read(2) == b"\xff\xd8"


def resize_image(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pixels `(h, w)` resized to `size`: averaged if it is smaller, interpolated if it is larger."""
    if pixels.shape == size:
        return pixels
    interpolation = cv2.INTER_AREA if size[1] <= pixels.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(pixels, size[::-1], interpolation=interpolation)


@contextmanager
def _reading(path: str | Path) -> Iterator[Path]:
    """Context with the path of an image file; errors of decoders become a ValueError that names the file."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no image at {str(path)!r}. Check the path.")
    try:
        yield file
    except ImportError:
        raise
    # Decoders raise all kinds of errors on broken bytes.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"No readable image at {str(path)!r} ({reason}). Copy the file again.") from error


def _decode_reduced(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """A JPEG at a width and height, decoded at the smallest scale that is `_MARGIN` times as large."""
    width, height = image.size
    image.draft("L", (math.ceil(target[0] * _MARGIN), math.ceil(target[1] * _MARGIN)))
    scale = max(round(width / image.size[0]), 1)
    levels = np.asarray(image.convert("L"))
    if scale == 1:
        return resize_image(levels, target[::-1])
    # The last column and row may extend past the image by a part of a pixel, which OpenCV would include.
    down = _shares(target[1], levels.shape[0], height / scale)
    across = _shares(target[0], levels.shape[1], width / scale)
    return np.rint(down @ levels.astype(np.float32) @ across.T).astype(np.uint8)


@lru_cache(256)
def _shares(parts: int, pixels: int, extent: float) -> np.ndarray:
    """Share of each pixel in the mean of each of `parts` equal parts of [0, extent], `(parts, pixels)`."""
    ends = np.linspace(0, extent, parts + 1)[:, None]
    start, stop = np.maximum(ends[:-1], np.arange(pixels)), np.minimum(ends[1:], np.arange(pixels) + 1)
    overlap = np.maximum(stop - start, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def _levels(image: Image.Image, path: Path) -> np.ndarray:
    """Gray levels `(h, w)`, low is dark: uint8, or numbers of more bits."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError("a pixel is not finite")
        # Pillow inverts such pixels only at 8 bits and fewer.
        dark_is_high = getattr(image, "tag_v2", {}).get(_POLARITY_TAG) == _WHITE_IS_ZERO
        highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else pixels.max()
        return highest - pixels if dark_is_high else pixels
    if image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        # Pillow keeps only 8 bits of colors. It loads the file first, because OpenCV accepts truncated files.
        image.load()
        colors = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        gray = cv2.cvtColor(colors[..., :3], cv2.COLOR_BGR2GRAY)
        return gray if colors.shape[2] == 3 else gray * (colors[..., 3] / np.float32(65535))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def _stretched(pixels: np.ndarray) -> np.ndarray:
    """Pixels from their darkest to their brightest as float32 in [0, 1]; 0 where all are equal."""
    values = pixels.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _finished(levels: np.ndarray, target_size: TargetSize | None) -> GrayImage:
    """Image of the target size from levels, uint8 or float32 in [0, 1]."""
    height, width = levels.shape
    pixels = levels if target_size is None else resize_image(levels, target_size((height, width)))
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    return GrayImage(pixels, (height, width))


def _deep_jpeg(path: Path) -> np.ndarray:
    """Pixels of a JPEG of 12 or 16 bits, which Pillow refuses."""
    if not is_jpeg(path):
        raise ValueError("not a PNG, JPEG, TIFF, BMP, WebP or DICOM file")
    try:
        from libjpeg import decode
    except ImportError as error:
        raise ImportError(
            f"{path} is no JPEG of 8 bits. JPEGs of more bits need one more package: pip install 'matex_pl[dicom]'."
        ) from error
    pixels = decode(str(path))
    return pixels if pixels.ndim == 2 else pixels.mean(-1)


def _orientation(image: Image.Image, *, apply_exif_orientation: bool) -> int:
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        # Pillow would decode all pixels to search for metadata after them.
        return 1
    orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    if image.format == "TIFF" and orientation != 1:
        # Pillow 13 turns such pixels while loading, but keeps the size from before.
        raise ValueError(f"a TIFF with the orientation {orientation}, which is not supported: save it upright")
    return orientation if apply_exif_orientation else 1


def _upright_size(image: Image.Image, orientation: int) -> Size:
    width, height = image.size
    return (width, height) if orientation in _TURNED else (height, width)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels
