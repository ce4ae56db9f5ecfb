"""TIFF files that Pillow does not read, or reads with fewer bits: deep colors, signed numbers, BigTIFF and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from matex_pl.data.levels import RefusedImageError, Size, check_size, luminance, need, over_black

if TYPE_CHECKING:
    from tifffile import TiffPage

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _SIGNED, _FLOAT, _VOID = 1, 2, 3, 4
# Kinds of gray pixels of more than 8 bits that Pillow keeps: format and bits.
_KEPT = ((_UNSIGNED, 16), (_SIGNED, 16), (_SIGNED, 32), (_FLOAT, 32))
_UNASSOCIATED = 2
# Bytes that are decoded at a time.
_BUFFER = 2**22


def is_for_pillow(image: Image.Image) -> bool:
    """Whether Pillow keeps all bits of an opened TIFF, and converts its colors."""
    tags: Any = getattr(image, "tag_v2", {})
    bits, formats = tags.get(258, (1,)), tags.get(339, (_UNSIGNED,))
    if image.mode == "LAB":
        return False
    if max(bits) <= 8 and set(formats) <= {_UNSIGNED, _VOID}:
        return True
    return len(bits) == 1 and (formats[0], bits[0]) in _KEPT and tags.get(266, 1) == 1


def read_tiff_size(path: Path) -> Size:
    """Height and width, from the header; errors as in `read_tiff`."""
    with _page(path) as page:
        return page.imagelength, page.imagewidth


def read_tiff(path: Path) -> tuple[np.ndarray, int]:
    """Levels of the first page `(h, w)`, low is dark, as stored: uint8, or numbers of more bits. And the pages.

    Colors become luminance. Transparent parts become black.

    Raises:
        ImportError: tifffile, or the codec of a compressed file, is not installed.
        RefusedImageError: The file is damaged, or of a kind that is not read.
    """
    with _page(path) as page:
        if page.compression != 1:
            need("imagecodecs", f"{path} is a compressed TIFF, which needs imagecodecs")
        # Axes: separate colors, depth, height, width, colors. In one thread, because loaders have many processes.
        pixels = page.asarray(squeeze=False, maxworkers=1, buffersize=_BUFFER)
        pixels = np.moveaxis(pixels[:, 0], 0, -1)
        pages, bits, extra = len(page.parent.pages), page.bitspersample, page.extrasamples
        bands, inverted = (3 if page.photometric == _RGB else 1), page.photometric == _WHITE_IS_ZERO
    pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels[:, :, 0]
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedImageError("a pixel is not finite")
    levels = luminance(pixels[..., :3]) if bands == 3 else pixels[..., 0]
    if inverted:
        # The complement of signed numbers runs from their lowest to their highest.
        levels = ~levels if levels.dtype.kind == "i" else _highest(levels, bits) - levels
    if levels.dtype == np.int8:
        levels = levels.view(np.uint8) ^ 0x80
    if pixels.shape[2] > bands and extra and extra[0] == _UNASSOCIATED:
        levels = over_black(levels, pixels[..., bands], _highest(pixels, bits))
    if levels.dtype == np.uint8 and bits < 8:
        levels = levels * np.uint8(255 // (2**bits - 1))
    return levels, pages


def _check(page: TiffPage) -> None:
    """Refuse a page that is damaged, or of a kind that is not read."""
    colors, turn = getattr(page.photometric, "name", page.photometric), page.tags.valueof(274, 1)
    bands = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3}.get(page.photometric, 0)
    if not bands or page.samplesperpixel < bands or page.dtype is None or page.dtype.kind not in "iuf":
        raise RefusedImageError(
            f"a TIFF with {page.samplesperpixel} bands of {page.bitspersample} bits and the colors {colors}, "
            "which is not supported"
        )
    if turn != 1:
        raise RefusedImageError(f"a TIFF with the orientation {turn}, which is not supported: save it upright")
    if page.imagedepth != 1:
        raise RefusedImageError(f"a TIFF of {page.imagedepth} layers, which is not supported")
    length = page.parent.filehandle.size
    strips = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if not strips or any(count < 1 or start + count > length for start, count in strips):
        raise RefusedImageError("the TIFF is truncated")


def _highest(levels: np.ndarray, bits: int) -> Any:
    """Highest number of the bits; of floating numbers, the highest that occurs."""
    return levels.max() if levels.dtype.kind == "f" else levels.dtype.type(2**bits - 1)


@contextmanager
def _page(path: Path) -> Iterator[TiffPage]:
    """Context with the first page of a TIFF."""
    tifffile = need("tifffile", f"{path} is a TIFF that Pillow does not read, which needs tifffile")
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        check_size(page.imagelength, page.imagewidth)
        _check(page)
        yield page
