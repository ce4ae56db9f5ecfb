"""Reading of image files: all supported formats, upright, at the requested size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from matex_pl.data.dicom import is_dicom, read_dicom, read_dicom_size, warn_if_several
from matex_pl.data.jpeg import JpegHeader, read_deep_jpeg, read_jpeg_header
from matex_pl.data.levels import (
    HIGHEST,
    RefusedImageError,
    Size,
    check_not_blank,
    check_size,
    luminance,
    over_black,
    stretch_levels,
)
from matex_pl.data.tiff import TIFF_MAGIC, is_for_pillow, read_tiff, read_tiff_size

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
_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"BM": "BMP", b"RIFF": "WebP"} | dict.fromkeys(TIFF_MAGIC, "TIFF")
# The end of a PNG in which metadata may follow the pixels.
_TAIL = 2**17


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
    transparent parts become black. Up to 8 bits, levels are kept. More bits are reduced after resizing: from the
    darkest to the brightest pixel, or over the window of a DICOM file. To shrink a JPEG, the file is decoded at a
    half, a quarter or an eighth of its size, which blurs slightly.

    Args:
        path: Image file.
        target_size: Function from the size of the file to the size after resizing; no resizing by default.
        apply_exif_orientation: Whether to turn the image by the EXIF orientation of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        ImportError: The file needs the extra `dicom`, which is not installed.
        ValueError: The file is no readable image; the message names the reason.
    """
    with _reading(path, apply_exif_orientation=apply_exif_orientation) as file:
        if target_size is not None and file.image is not None and file.jpeg is not None and not file.jpeg.is_lossless:
            image = _reduced_jpeg(file, file.image, target_size)
            if image is not None:
                return image
            # Pillow does not decode the same file again.
            file = replace(file, image=Image.open(file.path, formats=_FORMATS))
        levels = _levels(file)
        if file.kind != "DICOM" and levels.dtype != np.uint8:
            levels = stretch_levels(levels)
        height, width = levels.shape
        pixels = levels if target_size is None else resize_image(levels, target_size((height, width)))
        if pixels.dtype != np.uint8:
            pixels = cv2.convertScaleAbs(pixels, alpha=255 / HIGHEST)
        return GrayImage(pixels, (height, width))


def read_levels(path: str | Path) -> np.ndarray:
    """Gray levels `(h, w)` of an image file, upright, at the bit depth of the file: 1 of 65,535 stays above 0.

    The type is uint8 or has more bits; DICOM files give the levels of their window. Errors are as in `read_image`.
    """
    with _reading(path) as file:
        return _levels(file)


def read_size(path: str | Path, *, apply_exif_orientation: bool = True) -> Size:
    """Height and width of an image file, from the header; see `read_image` for the arguments and errors."""
    with _reading(path, apply_exif_orientation=apply_exif_orientation) as file:
        if file.image is not None:
            size = file.image.size[::-1]
        elif file.jpeg is not None:
            size = file.jpeg.size
        else:
            size = read_dicom_size(file.path) if file.kind == "DICOM" else read_tiff_size(file.path)
        return _upright(size, file.orientation)


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


@dataclass(frozen=True)
class _File:
    """An image file: its format, its header if it is a JPEG, the image of Pillow if Pillow reads it, and its turn."""

    path: Path
    kind: str
    jpeg: JpegHeader | None
    image: Image.Image | None
    orientation: int


@contextmanager
def _reading(path: str | Path, *, apply_exif_orientation: bool = True) -> Iterator[_File]:
    """Context with an opened image file; errors of decoders become errors with the file's name."""
    file, kind, jpeg = Path(path), "", None
    if not file.is_file():
        raise FileNotFoundError(f"There is no image at {str(path)!r}. Check the path.")
    try:
        kind = _format(file)
        if kind == "JPEG":
            with file.open("rb") as stream:
                jpeg = read_jpeg_header(stream)
        image = _pillow_image(file, kind, jpeg)
        with image or nullcontext():
            orientation = _orientation(file, kind, jpeg, image)
            yield _File(file, kind, jpeg, image, orientation if apply_exif_orientation else 1)
    except ImportError:
        raise
    # Decoders raise all kinds of errors on broken bytes.
    except Exception as error:
        if isinstance(error, RefusedImageError):
            reason = str(error)
        elif isinstance(error, PermissionError | MemoryError):
            reason = (getattr(error, "strerror", None) or "no memory is left for it").lower()
        elif isinstance(error, Image.DecompressionBombError):
            reason = "it has more pixels than a radiograph"
        elif isinstance(error, UnidentifiedImageError):
            reason = f"the {kind} is damaged, or of a kind that Pillow does not read"
        else:
            reason = f"the {kind} is damaged or truncated"
        raise ValueError(
            f"No readable image at {str(path)!r} ({reason}). Copy the file again, or give another one."
        ) from error


def _format(path: Path) -> str:
    """Name of the format of a file, by its magic bytes."""
    with path.open("rb") as file:
        head = file.read(132)
    # The preamble of a DICOM file may be the header of a TIFF.
    if is_dicom(head):
        return "DICOM"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if not head:
        raise RefusedImageError("the file is empty")
    if path.suffix.lower() not in (".dcm", ".dicom"):
        raise RefusedImageError("not a PNG, JPEG, TIFF, BMP, WebP or DICOM file")
    return "DICOM"


def _pillow_image(path: Path, kind: str, jpeg: JpegHeader | None) -> Image.Image | None:
    """The image as Pillow opens it; None if another package reads the file."""
    if kind == "DICOM" or (jpeg is not None and not jpeg.is_for_pillow):
        return None
    try:
        image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:
        if kind != "TIFF":
            raise
        return None
    if kind != "TIFF" or is_for_pillow(image):
        return image
    image.close()
    return None


def _reduced_jpeg(file: _File, image: Image.Image, target_size: TargetSize) -> GrayImage | None:
    """A JPEG decoded at the smallest scale that is `_MARGIN` times as large; None if nothing is left of it so."""
    warn_if_several(file.path, getattr(image, "n_frames", 1), "pages")
    size = _upright(image.size[::-1], file.orientation)
    # `draft` takes width and height of the stored pixels.
    target = target_size(size) if file.orientation in _TURNED else target_size(size)[::-1]
    width, height = image.size
    image.draft("L", (math.ceil(target[0] * _MARGIN), math.ceil(target[1] * _MARGIN)))
    scale = max(round(width / image.size[0]), 1)
    levels = np.asarray(image.convert("L"))
    if levels.min() == levels.max():
        return None
    if scale == 1:
        pixels = resize_image(levels, target[::-1])
    else:
        # The last column and row may extend past the image by a part of a pixel, which OpenCV would include.
        down = _shares(target[1], levels.shape[0], height / scale)
        across = _shares(target[0], levels.shape[1], width / scale)
        pixels = np.rint(down @ levels.astype(np.float32) @ across.T).astype(np.uint8)
    return GrayImage(_turned(pixels, file.orientation), size)


@lru_cache(256)
def _shares(parts: int, pixels: int, extent: float) -> np.ndarray:
    """Share of each pixel in the mean of each of `parts` equal parts of [0, extent], `(parts, pixels)`."""
    ends = np.linspace(0, extent, parts + 1)[:, None]
    start, stop = np.maximum(ends[:-1], np.arange(pixels)), np.minimum(ends[1:], np.arange(pixels) + 1)
    overlap = np.maximum(stop - start, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def _levels(file: _File) -> np.ndarray:
    """Gray levels `(h, w)`, upright, low is dark: uint8, or numbers of more bits."""
    if file.kind == "DICOM":
        return read_dicom(file.path)
    if file.image is not None:
        pages = getattr(file.image, "n_frames", 1)
        levels = _pillow_levels(file, file.image)
    elif file.jpeg is not None:
        levels, pages = read_deep_jpeg(file.path, file.jpeg), 1
    else:
        levels, pages = read_tiff(file.path)
    warn_if_several(file.path, pages, "pages")
    return _turned(levels, file.orientation)


def _pillow_levels(file: _File, image: Image.Image) -> np.ndarray:
    """Gray levels `(h, w)` as stored, low is dark: uint8, or numbers of more bits."""
    if image.mode.startswith(("I", "F")):
        pixels = _array(image)
        if not np.isfinite(pixels).all():
            raise RefusedImageError("a pixel is not finite")
        # Pillow inverts such pixels only at 8 bits and fewer.
        dark_is_high = getattr(image, "tag_v2", {}).get(_POLARITY_TAG) == _WHITE_IS_ZERO
        highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else pixels.max()
        return highest - pixels if dark_is_high else pixels
    if image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return _deep_png(image, file.path)
    if file.jpeg is not None and not file.jpeg.is_lossless:
        # As at a smaller scale: the luminance that the file holds.
        image.draft("L", image.size)
    if image.mode in ("LA", "PA", "La", "RGBA") or "transparency" in image.info:
        image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        return over_black(np.asarray(image.convert("L")), np.asarray(image.getchannel("A")), 255)
    levels = np.asarray(image.convert("L"))
    if file.jpeg is not None:
        start = file.jpeg.start
        check_not_blank(levels, lambda: file.path.read_bytes()[start:], "libjpeg-turbo of Pillow")
    return levels


def _array(image: Image.Image) -> np.ndarray:
    """Pixels of an image, part by part: at once, NumPy would need their memory three times."""
    width, height = image.size
    found = np.empty((height, width), dtype=np.asarray(image.crop((0, 0, 1, 1))).dtype)
    for start in range(0, height, 256):
        found[start : start + 256] = np.asarray(image.crop((0, start, width, min(start + 256, height))))
    return found


def _deep_png(image: Image.Image, path: Path) -> np.ndarray:
    """Levels of a PNG with colors or opacity of 16 bits. Pillow keeps only 8 of them."""
    check_size(*image.size[::-1])
    # OpenCV accepts truncated files.
    image.verify()
    colors = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if colors is None:
        raise RefusedImageError("the PNG is damaged")
    if colors.ndim == 2 or colors.dtype != np.uint16:
        return colors
    gray = luminance(colors[..., 2::-1])
    return gray if colors.shape[2] == 3 else over_black(gray, colors[..., 3], HIGHEST)


def _orientation(path: Path, kind: str, jpeg: JpegHeader | None, image: Image.Image | None) -> int:
    if image is None:
        orientation = 1 if jpeg is None else _exif_orientation(jpeg.exif)
    elif image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        # Pillow would decode all pixels to search for metadata after them.
        orientation = _exif_orientation(_exif_after_pixels(path))
    else:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    if kind == "TIFF" and orientation != 1:
        # Pillow 13 turns such pixels while loading, but keeps the size from before.
        raise RefusedImageError(f"a TIFF with the orientation {orientation}, which is not supported: save it upright")
    return orientation


def _exif_after_pixels(path: Path) -> bytes:
    """The EXIF data of a PNG that follow its pixels; empty if there are none."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        tail = file.read()
    name = tail.rfind(b"eXIf")
    if name < 4:
        return b""
    end = name + 4 + int.from_bytes(tail[name - 4 : name], "big")
    # Pixels may hold the same letters.
    return tail[name + 4 : end] if zlib.crc32(tail[name:end]) == int.from_bytes(tail[end : end + 4], "big") else b""


def _exif_orientation(content: bytes) -> int:
    exif = Image.Exif()
    exif.load(content)
    return int(exif.get(_ORIENTATION_TAG, 1))


def _upright(size: Size, orientation: int) -> Size:
    return size[::-1] if orientation in _TURNED else size


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels
