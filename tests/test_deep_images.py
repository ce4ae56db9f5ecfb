"""TIFF and JPEG files of more bits, other signs and other orders than Pillow reads, and the limits of all files."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dicom import compress, write_dicom
from test_images import check_damaged, content_of

from matex_pl.data.images import read_image, read_levels, read_size

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
pydicom = pytest.importorskip("pydicom")
from pydicom.uid import (  # noqa: E402
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

HEIGHT, WIDTH = 120, 90


def _ramp() -> np.ndarray:
    """Brighter to the right and, more slowly, downwards: `(120, 90)` in [0, 1]; all corners differ."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (2 * columns / (WIDTH - 1) + rows / (HEIGHT - 1)) / 3


def _ints(bits: int, kind: str = "u") -> np.ndarray:
    levels = np.rint(_ramp() * (2.0**bits - 1)).astype(np.int64)
    width = next(width for width in (8, 16, 32) if bits <= width)
    return (levels - (2 ** (bits - 1) if kind == "i" else 0)).astype(f"{kind}{width // 8}")


def _colors(bits: int) -> np.ndarray:
    """Colors whose luminance is the ramp."""
    gray = _ramp()
    less = gray * (1 - gray) / 2
    return np.rint(np.stack([gray - less, gray + 0.299 / 0.587 * less, gray], -1) * (2**bits - 1)).astype("u2")


def _see_through(bits: int) -> np.ndarray:
    """Gray twice as bright as the ramp, and half opaque."""
    most = 2**bits - 1
    bright = np.rint((0.5 + 0.5 * _ramp()) * most)
    opacity = np.rint(_ramp() * most / (0.5 + 0.5 * _ramp()))
    return np.stack([bright, opacity], -1).astype(f"u{bits // 8}")


GRAY, WHITE_IS_ZERO, RGB = "minisblack", "miniswhite", "rgb"
# Pixels and options of a writer, for files that all show the ramp.
TIFFS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "rgb_16": (_colors(16), {"photometric": RGB}),
    "rgb_16_planar": (np.moveaxis(_colors(16), -1, 0), {"photometric": RGB, "planarconfig": "separate"}),
    "rgb_12_in_16": (_colors(12), {"photometric": RGB}),
    "rgb_16_big_endian": (_colors(16), {"photometric": RGB, "byteorder": ">"}),
    "rgb_16_lzw": (_colors(16), {"photometric": RGB, "compression": "lzw", "predictor": 2}),
    "gray_alpha_8": (_see_through(8), {"photometric": GRAY, "extrasamples": ["unassalpha"]}),
    "gray_alpha_16": (_see_through(16), {"photometric": GRAY, "extrasamples": ["unassalpha"]}),
    "white_is_0_16_big_endian": (65535 - _ints(16), {"photometric": WHITE_IS_ZERO, "byteorder": ">"}),
    "white_is_0_16": (65535 - _ints(16), {"photometric": WHITE_IS_ZERO}),
    "white_is_0_16_lzw": (65535 - _ints(16), {"photometric": WHITE_IS_ZERO, "compression": "lzw"}),
    "white_is_0_8_signed": (~_ints(8, "i"), {"photometric": WHITE_IS_ZERO}),
    "white_is_0_float": ((1 - _ramp()).astype("f4"), {"photometric": WHITE_IS_ZERO}),
    "big_tiff_8_big_endian": (_ints(8), {"photometric": GRAY, "byteorder": ">", "bigtiff": True}),
    "big_tiff_16_big_endian": (_ints(16), {"photometric": GRAY, "byteorder": ">", "bigtiff": True}),
    "gray_8_signed": (_ints(8, "i"), {"photometric": GRAY}),
    "gray_16_signed": (_ints(16, "i"), {"photometric": GRAY}),
    "gray_32": (_ints(32), {"photometric": GRAY}),
    "gray_32_signed": (_ints(32, "i"), {"photometric": GRAY}),
    "float_16": (_ramp().astype("f2"), {"photometric": GRAY}),
    "float_64": (_ramp() * 1e300, {"photometric": GRAY}),
    "gray_16_deflate_tiles": (_ints(16), {"photometric": GRAY, "compression": "zlib", "tile": (64, 64)}),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_every_tiff_shows_the_same_image(tmp_path: Path, kind: str) -> None:
    pixels, options = TIFFS[kind]
    byteorder, bigtiff = options.get("byteorder"), options.get("bigtiff", False)
    rest = {name: value for name, value in options.items() if name not in ("byteorder", "bigtiff")}
    with tifffile.TiffWriter(tmp_path / "image.tif", byteorder=byteorder, bigtiff=bigtiff) as writer:
        writer.write(pixels, metadata=None, **rest)
    image = read_image(tmp_path / "image.tif")
    assert image.size == read_size(tmp_path / "image.tif") == (HEIGHT, WIDTH)
    np.testing.assert_allclose(image.pixels, _ramp() * 255, atol=1.1)
    small = read_image(tmp_path / "image.tif", lambda size: (40, 30)).pixels
    np.testing.assert_allclose(small, cv2.resize(_ramp(), (30, 40), interpolation=cv2.INTER_AREA) * 255, atol=1.1)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_of_a_tiff(tmp_path: Path, bits: int) -> None:
    packed = np.unpackbits(_ints(bits).astype(">u2").view("u1").reshape(-1, 2), axis=1)[:, 16 - bits :]
    rows = np.packbits(packed.reshape(HEIGHT, -1), axis=1)
    tifffile.imwrite(tmp_path / "image.tif", rows, photometric=GRAY, metadata=None)
    # Width and bits of a file whose pixels are bytes.
    content = bytearray((tmp_path / "image.tif").read_bytes())
    for tag, value in ((256, WIDTH), (258, bits)):
        place = content.index(struct.pack("<H", tag), 8)
        content[place + 8 : place + 12] = struct.pack("<HH", value, 0)
    (tmp_path / "image.tif").write_bytes(content)
    np.testing.assert_allclose(read_image(tmp_path / "image.tif").pixels, _ramp() * 255, atol=0.7)


def test_several_deep_pages(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "image.tif", np.stack([_ints(32)] * 3), photometric=GRAY)
    with pytest.warns(UserWarning, match=r"image\.tif has 3 pages\. Only the first is used"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (_ramp().astype("c8"), {"photometric": GRAY}, "a TIFF with 1 bands of 64 bits and the colors MINISBLACK"),
        (_colors(16), {"photometric": "cielab"}, "a TIFF with 3 bands of 16 bits and the colors CIELAB, which is not"),
        (np.full((9, 9), np.nan), {"photometric": GRAY}, "a pixel is not finite"),
    ],
    ids=["complex", "lab", "nan"],
)
def test_other_tiffs_are_refused_as_such(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any], reason: str
) -> None:
    tifffile.imwrite(tmp_path / "image.tif", pixels, metadata=None, **options)
    with pytest.raises(ValueError, match=rf"No readable image at '.*image\.tif' \({reason}"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_truncated_deep_tiff(tmp_path: Path, compression: str | None) -> None:
    tifffile.imwrite(tmp_path / "image.tif", _colors(16), photometric=RGB, compression=compression, rowsperstrip=16)
    content = (tmp_path / "image.tif").read_bytes()
    (tmp_path / "image.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"\(the TIFF is truncated\)"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_without_its_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    tifffile.imwrite(tmp_path / "image.tif", _colors(16), photometric=RGB, compression="lzw")
    (tmp_path / "image.jpg").write_bytes(imagecodecs.jpegls_encode(_ints(16)))
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "imagecodecs":
        with pytest.raises(ImportError, match=r"image\.jpg .*imagecodecs: pip install 'matex_pl\[dicom\]'"):
            read_image(tmp_path / "image.jpg")
    else:
        with pytest.raises(ImportError, match=r"image\.tif .*tifffile: pip install 'matex_pl\[dicom\]'"):
            read_image(tmp_path / "image.tif")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes()
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


JPEGS: dict[str, Any] = {
    "lossless_8": lambda: imagecodecs.jpeg_encode(_ints(8), lossless=True),
    "lossless_8_rgb": lambda: imagecodecs.jpeg_encode((_colors(16) >> 8).astype("u1"), lossless=True),
    "lossless_16": lambda: imagecodecs.jpeg_encode(_ints(16), lossless=True),
    "deep_12": lambda: imagecodecs.jpeg_encode(_ints(12), bitspersample=12, level=98),
    "deep_12_rgb": lambda: imagecodecs.jpeg_encode(_colors(12), bitspersample=12, level=98, subsampling="444"),
    "ls_8": lambda: imagecodecs.jpegls_encode(_ints(8)),
    "ls_8_rgb": lambda: imagecodecs.jpegls_encode((_colors(16) >> 8).astype("u1")),
    "ls_16": lambda: imagecodecs.jpegls_encode(_ints(16)),
}


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("kind", JPEGS)
def test_every_jpeg_shows_the_same_image(tmp_path: Path, kind: str, orientation: int) -> None:
    from matex_pl.data.images import _turned

    stream = JPEGS[kind]()
    (tmp_path / "image.jpg").write_bytes(stream[:2] + _exif(orientation) + stream[2:])
    expected = _turned(_ramp() * 255, orientation)
    image = read_image(tmp_path / "image.jpg")
    assert image.size == read_size(tmp_path / "image.jpg") == expected.shape
    np.testing.assert_allclose(image.pixels, expected, atol=2.1)
    stored = read_image(tmp_path / "image.jpg", apply_exif_orientation=False)
    assert stored.size == read_size(tmp_path / "image.jpg", apply_exif_orientation=False) == (HEIGHT, WIDTH)
    for share in (2, 4, 8):
        size = (expected.shape[0] // share, expected.shape[1] // share)
        small = read_image(tmp_path / "image.jpg", lambda _, size=size: size).pixels
        wanted = cv2.resize(expected, size[::-1], interpolation=cv2.INTER_AREA)
        np.testing.assert_allclose(small, wanted, atol=2.1)


def test_colors_of_a_jpeg_are_the_same_at_every_scale(tmp_path: Path) -> None:
    """Blue and red as bright as they can be, whose luminance depends on the rule."""
    colors = np.zeros((64, 64, 3), dtype=np.uint8)
    colors[:32, :, 2], colors[32:, :, 0], colors[:, 32:, 1] = 255, 255, 255
    Image.fromarray(colors).save(tmp_path / "image.jpg", quality=40)
    whole, small = read_image(tmp_path / "image.jpg").pixels, read_image(tmp_path / "image.jpg", lambda size: size)
    assert np.array_equal(whole, small.pixels)


def test_truncated_deep_jpeg(tmp_path: Path) -> None:
    for kind in ("deep_12", "lossless_16", "ls_16"):
        stream = JPEGS[kind]()
        (tmp_path / "image.jpg").write_bytes(stream[: len(stream) // 2])
        with pytest.raises(ValueError, match=r"\(the JPEG is truncated\)"):
            read_image(tmp_path / "image.jpg")


@pytest.mark.parametrize("bits", [8, 16])
def test_exif_after_the_pixels_of_a_png(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), _ints(bits))
    content, exif = path.read_bytes(), _exif(6)[10:]
    chunk = b"eXIf" + exif
    end = content.index(b"IEND") - 4
    chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:end] + chunk + content[end:])
    assert read_image(path).size == read_size(path) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(read_image(path).pixels, np.rot90(_ramp(), -1) * 255, atol=0.6)
    assert read_size(path, apply_exif_orientation=False) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["image.png", "image.tif", "deep.tif", "image.jpg"])
def test_large_files_are_refused_before_they_are_decoded(tmp_path: Path, name: str) -> None:
    """Small files whose headers announce 3,600 million pixels."""
    path = tmp_path / name
    if name.endswith("png"):
        cv2.imwrite(str(path), _ints(8))
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", 60000, 60000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif name.endswith("jpg"):
        path.write_bytes(JPEGS["lossless_8"]())
        content = path.read_bytes().replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 60000, 60000), 1)
    else:
        tifffile.imwrite(path, _colors(16) if name == "deep.tif" else _ints(8), metadata=None)
        content = bytearray(path.read_bytes())
        for tag in (256, 257):
            place = content.index(struct.pack("<H", tag), 8)
            content[place + 8 : place + 12] = struct.pack("<I", 60000)
            content[place + 2 : place + 4] = struct.pack("<H", 4)
    path.write_bytes(content)
    for read in (read_image, read_levels):
        with pytest.raises(ValueError, match="pixels"):
            read(path)


def _tiff(path: Path, kind: str) -> Path:
    pixels, options = TIFFS[kind]
    tifffile.imwrite(path, pixels, metadata=None, **options)
    return path


def _stream(path: Path, kind: str) -> Path:
    path.write_bytes(JPEGS[kind]())
    return path


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "rgb.tif": lambda folder: _tiff(folder / "image", "rgb_16_lzw"),
    "tiles.tif": lambda folder: _tiff(folder / "image", "gray_16_deflate_tiles"),
    "float.tif": lambda folder: _tiff(folder / "image", "float_16"),
    "12.jpg": lambda folder: _stream(folder / "image", "deep_12"),
    "16.jpg": lambda folder: _stream(folder / "image", "lossless_16"),
    "ls.jpg": lambda folder: _stream(folder / "image", "ls_16"),
    "native.dcm": lambda folder: write_dicom(folder / "image", _ints(12), WindowCenter=2048, WindowWidth=4096),
    "rle.dcm": lambda folder: write_dicom(folder / "image", _ints(12), syntax=RLELossless),
    "deflated.dcm": lambda folder: _deflated(folder / "image"),
    "jpeg.dcm": lambda folder: compress(
        write_dicom(folder / "image", _ints(12)), JPEGLosslessSV1, JPEGS["lossless_16"]()
    ),
    "2000.dcm": lambda folder: compress(
        write_dicom(folder / "image", _ints(12)), JPEG2000, imagecodecs.jpeg2k_encode(_ints(12))
    ),
    "ls.dcm": lambda folder: compress(write_dicom(folder / "image", _ints(12)), JPEGLSLossless, JPEGS["ls_16"]()),
}


def _deflated(path: Path) -> Path:
    header = pydicom.dcmread(write_dicom(path, _ints(12)))
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_are_the_same_at_each_writing(tmp_path: Path, kind: str) -> None:
    """A random identifier among them would change what hypothesis draws."""
    assert DAMAGED[kind](tmp_path).read_bytes() == content_of(DAMAGED[kind])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(list(DAMAGED)))
def test_damaged_deep_files_are_read_or_refused(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    check_damaged(tmp_path / "image", content_of(DAMAGED[kind]), data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "PNG, 8 bits",
        "PNG, 16 bits",
        "PNG, 8 bits, RGB with opacity",
        "JPEG, 8 bits",
        "JPEG, lossless, 16 bits",
        "TIFF, float64, tiles",
        "TIFF, 16 bits, RGB, LZW",
        "DICOM, window",
        "DICOM, 12 bits, RGB",
        "DICOM, JPEG-LS",
    ],
)
def test_memory_of_a_large_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Megabytes that an image of 15 megapixels adds to a process that has read a small one of its kind."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import formats

    *_, memory = formats.measure(kind, tmp_path, 4300, 3500, 1)
    # A JPEG of 8 bits is decoded at an eighth of its size.
    assert (0.1 if kind == "JPEG, 8 bits" else 15) < memory < 150
