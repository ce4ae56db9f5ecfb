"""From an image's file to its pixels: every format, at the size that is needed, upright, and kept for the next time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from matex_pl.data.dicom import is_dicom, read_dicom, read_dicom_size, warn_of_others

T = TypeVar("T")

Size = tuple[int, int]
"""Height and width in pixels."""

TargetSize = Callable[[Size], Size]
"""The size to which an image of some size is resized."""

ResizeMode = Literal["longest", "shortest", "squash"]
"""The side by which an image fills the model's input, in open_clip's words."""

# Only these: Pillow also opens PostScript, which starts a program.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# Pillow knows the formats that it has been asked to load.
Image.init()

_JPEG_START = b"\xff\xd8"
_ORIENTATION_TAG = 0x0112
# What turns the stored pixels upright, by the EXIF orientation of the file.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
# Averages of averages blur: the more, the nearer the two sizes are to each other.
_MARGIN = 1.5
_TURNED = (5, 6, 7, 8)
_POLARITY_TAG, _WHITE_IS_ZERO = 0x0106, 0


@dataclass(frozen=True)
class GrayImage:
    """Pixels of an image, perhaps at another size than that of its file.

    Args:
        pixels: `(h, w)` uint8.
        size: Height and width of the file, in whose pixels boxes are.
    """

    pixels: np.ndarray
    size: Size


def read_image(
    path: str | Path, target_size: TargetSize | None = None, *, apply_exif_orientation: bool = True
) -> GrayImage:
    """An image of any supported kind as gray levels.

    PNG, JPEG, TIFF, BMP, WebP and, with the extra `dicom`, DICOM. Colors become luminance, what is transparent
    becomes black. More than 8 bits are kept until after resizing and run from the image's darkest to its brightest
    pixel, in DICOM over its window. Where a JPEG may be smaller it is decoded at a half, a quarter or an eighth,
    which blurs a little.

    Args:
        path: The file.
        target_size: The size to resize to, from that of the file; the file's own by default.
        apply_exif_orientation: Turn the image as the EXIF orientation of the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A DICOM file, or a JPEG of more than 8 bits, and the extra `dicom` is not installed.
        ValueError: The file is no readable image; the message has the reason.
    """
    return _opened(path, lambda file: _decode(file, target_size, apply_exif_orientation=apply_exif_orientation))


def read_levels(path: str | Path) -> np.ndarray:
    """Gray levels of an image's file, upright, `(h, w)`, as many as it has: 1 of 65,535 is more than black, which is 0.

    uint8, or numbers of more bits, of DICOM those of its window; errors as of `read_image`.
    """
    return _opened(path, _stored_levels)


def read_size(path: str | Path, *, apply_exif_orientation: bool = True) -> Size:
    """Height and width of an image's file, from its header; see `read_image` for the arguments and errors."""
    return _opened(path, lambda file: _header_size(file, apply_exif_orientation=apply_exif_orientation))


def is_jpeg(path: Path) -> bool:
    """The file begins as JPEGs do."""
    with path.open("rb") as file:
        return file.read(len(_JPEG_START)) == _JPEG_START


def resize_image(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pixels `(h, w)` at another size: averaged where it is smaller, interpolated where it is larger."""
    if pixels.shape == size:
        return pixels
    interpolation = cv2.INTER_AREA if size[1] <= pixels.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(pixels, size[::-1], interpolation=interpolation)


def _opened(path: str | Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of the file; whatever goes wrong on the way is said as a reason."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no image at {str(path)!r}.")
    try:
        return read(file)
    except ImportError:
        raise
    # Decoders raise all kinds of errors on broken bytes.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no readable image at {str(path)!r} ({reason}). Copy the file anew or take its row out."
        ) from error


def _header_size(path: Path, *, apply_exif_orientation: bool) -> Size:
    if is_dicom(path):
        return read_dicom_size(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return _stored_size(image, _orientation(image, apply_exif_orientation=apply_exif_orientation))
    except UnidentifiedImageError:
        height, width = _deep_jpeg(path).shape
        return height, width


def _decode(path: Path, target_size: TargetSize | None, *, apply_exif_orientation: bool) -> GrayImage:
    if is_dicom(path):
        return _finished(read_dicom(path), target_size)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return _decode_image(
                image, path, target_size, _orientation(image, apply_exif_orientation=apply_exif_orientation)
            )
    except UnidentifiedImageError:
        return _finished(_stretched(_deep_jpeg(path)), target_size)


def _decode_image(image: Image.Image, path: Path, target_size: TargetSize | None, orientation: int) -> GrayImage:
    """The image of an image that is open, but not decoded yet."""
    warn_of_others(path, getattr(image, "n_frames", 1), "pages")
    size = _stored_size(image, orientation)
    if image.format == "JPEG" and target_size is not None:
        # `draft` takes width and height as they are stored.
        target = target_size(size) if orientation in _TURNED else target_size(size)[::-1]
        return GrayImage(_turned(_decode_reduced(image, target), orientation), size)
    levels = _turned(_levels(image, path), orientation)
    finished = _finished(levels if levels.dtype == np.uint8 else _stretched(levels), target_size)
    return GrayImage(finished.pixels, size)


def _stored_levels(path: Path) -> np.ndarray:
    if is_dicom(path):
        return read_dicom(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            warn_of_others(path, getattr(image, "n_frames", 1), "pages")
            return _turned(_levels(image, path), _orientation(image, apply_exif_orientation=True))
    except UnidentifiedImageError:
        return _deep_jpeg(path)


def _decode_reduced(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """A JPEG at a width and height, decoded at the smallest scale that is `_MARGIN` times as large."""
    width, height = image.size
    image.draft("L", (math.ceil(target[0] * _MARGIN), math.ceil(target[1] * _MARGIN)))
    scale = max(round(width / image.size[0]), 1)
    levels = np.asarray(image.convert("L"))
    if scale == 1:
        return resize_image(levels, target[::-1])
    # The last column and row may reach beyond the image by a part of a pixel, which OpenCV would count in.
    down, across = (
        _shares(target[1], levels.shape[0], height / scale),
        _shares(target[0], levels.shape[1], width / scale),
    )
    return np.rint(down @ levels.astype(np.float32) @ across.T).astype(np.uint8)


@lru_cache(256)
def _shares(parts: int, pixels: int, extent: float) -> np.ndarray:
    """Which share each pixel has in the mean of each of `parts` equal parts of [0, extent], `(parts, pixels)`."""
    ends = np.linspace(0, extent, parts + 1)[:, None]
    start, stop = np.maximum(ends[:-1], np.arange(pixels)), np.minimum(ends[1:], np.arange(pixels) + 1)
    overlap = np.maximum(stop - start, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def _levels(image: Image.Image, path: Path) -> np.ndarray:
    """Gray levels `(h, w)`, the darker the lower: uint8, or numbers of more bits."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError("a pixel is not finite")
        # Pillow turns such pixels around in 8 bits and fewer only.
        dark_is_high = getattr(image, "tag_v2", {}).get(_POLARITY_TAG) == _WHITE_IS_ZERO
        highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else pixels.max()
        return highest - pixels if dark_is_high else pixels
    if image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        # Pillow keeps 8 bits of colors. It is asked first, because OpenCV does not mind a file that ends early.
        image.load()
        return _luminance(np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def _luminance(pixels: np.ndarray) -> np.ndarray:
    """Gray levels of blue, green, red and perhaps opacity `(h, w, 3 or 4)` uint16."""
    gray = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY)
    return gray if pixels.shape[2] == 3 else gray * (pixels[..., 3] / np.float32(65535))


def _stretched(pixels: np.ndarray) -> np.ndarray:
    """Pixels from their darkest to their brightest as float32 in [0, 1]; 0 where all are equal."""
    values = pixels.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _finished(levels: np.ndarray, target_size: TargetSize | None) -> GrayImage:
    """Levels, uint8 or float32 in [0, 1], as an image of the size that `target_size` says."""
    height, width = levels.shape
    pixels = levels if target_size is None else resize_image(levels, target_size((height, width)))
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    return GrayImage(pixels, (height, width))


def _deep_jpeg(path: Path) -> np.ndarray:
    """Pixels of a JPEG of 12 or 16 bits, which Pillow refuses."""
    if not is_jpeg(path):
        raise ValueError("it is none of PNG, JPEG, TIFF, BMP, WebP and DICOM")
    try:
        from libjpeg import decode
    except ImportError as error:
        raise ImportError(f"{path} is no plain JPEG. For more than 8 bits: pip install 'matex_pl[dicom]'.") from error
    pixels = decode(str(path))
    return pixels if pixels.ndim == 2 else pixels.mean(-1)


def _orientation(image: Image.Image, *, apply_exif_orientation: bool) -> int:
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        # Pillow would decode all pixels to look behind them.
        return 1
    orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    if image.format == "TIFF" and orientation != 1:
        # Pillow 13 turns such pixels while it loads them, and keeps the size of before.
        raise ValueError(f"a TIFF with the orientation {orientation}, which is not supported: save it upright")
    return orientation if apply_exif_orientation else 1


def _stored_size(image: Image.Image, orientation: int) -> Size:
    width, height = image.size
    return (width, height) if orientation in _TURNED else (height, width)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels
