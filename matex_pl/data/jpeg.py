"""JPEG that Pillow does not read: lossless, JPEG-LS, JPEG 2000, and more than 8 bits. Its headers and its pixels."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from matex_pl.data.levels import RefusedImageError, Size, check_not_blank, check_size, luminance, need

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF, 0xF7)
_LS, _2000, _APP0, _APP1 = 0xF7, 0x51, 0xE0, 0xE1
# Of pixels: the first scan, or the first tile.
_PIXELS = (0xDA, 0x90)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))


@dataclass(frozen=True)
class JpegHeader:
    """Header of a JPEG.

    Attributes:
        kind: Marker of the frame, which names the process.
        bits: Bits per sample.
        bands: Samples per pixel.
        size: Height and width of the stored pixels.
        colors: `RGB` or `YBR_FULL` if the file names its colors, else empty.
        exif: Content of the first APP1 segment with EXIF data.
        start: Place of the first scan or tile, after which compressed pixels follow.
    """

    kind: int
    bits: int
    bands: int
    size: Size
    colors: str
    exif: bytes
    start: int

    @property
    def is_lossless(self) -> bool:
        """Whether no smaller image can be decoded from the file."""
        return self.kind in _LOSSLESS

    @property
    def is_for_pillow(self) -> bool:
        """Whether Pillow reads the file."""
        return self.bits == 8 and self.kind != _LS


def read_jpeg_header(file: BinaryIO, start: int = 0) -> JpegHeader | None:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream from a place on; None if its segments are not in order."""
    file.seek(start + 2)
    kind, bits, bands, size, colors, exif = 0, 0, 0, (0, 0), "", b""
    while True:
        if file.read(1) != b"\xff":
            return None
        marker = file.read(1)
        while marker == b"\xff":
            marker = file.read(1)
        if not marker:
            return None
        if marker[0] in _WITHOUT_LENGTH:
            continue
        start, length = file.tell(), file.read(2)
        if marker[0] in _PIXELS:
            return JpegHeader(kind, bits, bands, size, colors, exif, start) if kind else None
        if len(length) < 2:
            return None
        (count,) = struct.unpack(">H", length)
        body = file.read(max(count - 2, 0)) if marker[0] in (*_FRAMES, _2000, _APP0, _APP1) else b""
        if marker[0] in _FRAMES:
            if len(body) < 6:
                return None
            kind, (bits, height, width, bands) = marker[0], struct.unpack_from(">BHHB", body)
            size = (height, width)
            colors = "RGB" if body[6::3] in (b"RGB", b"rgb") else colors
        elif marker[0] == _2000:
            if len(body) < 37:
                return None
            kind, (x1, y1, x0, y0) = marker[0], struct.unpack_from(">LLLL", body, 2)
            size, bands, bits = (y1 - y0, x1 - x0), body[35], (body[36] & 0x7F) + 1
        elif marker[0] == _APP0:
            colors = "YBR_FULL" if body.startswith(b"JFIF") else colors
        elif marker[0] == _APP1 and not exif:
            exif = body if body.startswith(b"Exif\0\0") else b""
        file.seek(start + count)


def decode_jpeg(stream: bytes, header: JpegHeader, *, as_stored: bool = False) -> np.ndarray:
    """Pixels of a JPEG, JPEG-LS or JPEG 2000 stream, `(h, w)` or `(h, w, colors)`, uint8 or uint16.

    Args:
        stream: Whole stream.
        header: Its header.
        as_stored: Whether to keep colors as they are stored, such as YCbCr, instead of RGB.

    Raises:
        ModuleNotFoundError: imagecodecs is not installed.
        RefusedImageError: The image is too large, or the codec loses it.
    """
    import imagecodecs

    check_size(*header.size)
    if header.kind == _LS:
        pixels, codec = imagecodecs.jpegls_decode(stream), "CharLS"
    elif header.kind == _2000:
        pixels, codec = imagecodecs.jpeg2k_decode(stream), "OpenJPEG"
    else:
        # The same space on both sides: no conversion.
        space = "RGB" if as_stored and header.bands == 3 else None
        pixels = imagecodecs.jpeg_decode(stream, colorspace=space, outcolorspace=space)
        codec = "libjpeg-turbo"
    check_not_blank(pixels, lambda: memoryview(stream)[header.start :], f"{codec} of imagecodecs")
    return pixels


def read_deep_jpeg(path: Path, header: JpegHeader) -> np.ndarray:
    """Gray levels `(h, w)` of a JPEG that Pillow does not read, as stored: uint8 or uint16.

    Raises:
        ImportError: The extra `dicom` is not installed.
        RefusedImageError: The codec loses the image.
    """
    need("imagecodecs", f"{path} is a JPEG of {header.bits} bits that Pillow does not read, which needs imagecodecs")
    stream = path.read_bytes()
    # The codecs fill up the pixels that are missing.
    if stream.find(b"\xff\xd9", header.start) < 0:
        raise RefusedImageError("the JPEG is truncated")
    pixels = decode_jpeg(stream, header)
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise RefusedImageError(f"it is a JPEG of {header.bits} bits with {pixels.shape[2]} colors")
    return luminance(pixels) if pixels.ndim == 3 else pixels
