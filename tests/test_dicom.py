"""DICOM images, as a viewer shows them: files made here and pydicom's own."""

from __future__ import annotations

import builtins
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matex_pl.data.images import read_image, read_size

imagecodecs = pytest.importorskip("imagecodecs")
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import set_pixel_data  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

HEIGHT, WIDTH = 60, 40


def _ramp() -> np.ndarray:
    """Values from 0 to 4095, brighter to the right and downwards: `(60, 40)` uint16."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.rint((2 * columns / (WIDTH - 1) + rows / (HEIGHT - 1)) / 3 * 4095).astype(np.uint16)


def write_dicom(path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", syntax: Any = None, **tags: Any) -> Path:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    bits = 8 if pixels.dtype == np.uint8 else 16 if "HighBit" in tags else 12
    set_pixel_data(header, pixels, kind, bits, generate_instance_uid=False)
    # The same bytes at each writing, from which hypothesis draws.
    header.SOPInstanceUID = "1.2.3"
    for name, value in tags.items():
        setattr(header, name, value)
    if syntax is not None:
        header.compress(syntax, generate_instance_uid=False)
    header.save_as(path, enforce_file_format=True)
    return path


def compress(path: Path, syntax: Any, stream: bytes) -> Path:
    """The DICOM file with a stream of that syntax as its pixels."""
    header = pydicom.dcmread(path)
    header.PixelData = encapsulate([stream])
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(path, enforce_file_format=True)
    return path


def _values(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.size == read_size(path) == image.pixels.shape == (HEIGHT, WIDTH)
    return image.pixels.astype(float)


EXPECTED = _ramp() / 4095 * 255


@pytest.mark.parametrize("name", ["image.dcm", "image"])
def test_values_run_from_dark_to_bright(tmp_path: Path, name: str) -> None:
    np.testing.assert_allclose(_values(write_dicom(tmp_path / name, _ramp())), EXPECTED, atol=0.51)


def test_low_values_are_bright_in_monochrome_1(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), "MONOCHROME1")
    np.testing.assert_allclose(_values(path), 255 - EXPECTED, atol=0.51)


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_window_over_rescaled_values(tmp_path: Path, kind: str) -> None:
    """Values 2 v - 1000, of which the window shows 1000 to 3000."""
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [2000, 1], "WindowWidth": [2000, 1]}
    path = write_dicom(tmp_path / "image.dcm", _ramp(), kind, **tags)
    expected = ((2.0 * _ramp() - 1000 - 1000) / 2000).clip(0, 1) * 255
    np.testing.assert_allclose(_values(path), expected if kind == "MONOCHROME2" else 255 - expected, atol=0.7)


def test_window_wider_than_the_values_is_kept(tmp_path: Path) -> None:
    """An image that uses a quarter of its window stays dark: it is not stretched."""
    path = write_dicom(tmp_path / "image.dcm", _ramp() // 4, WindowCenter=2048, WindowWidth=4096)
    assert _values(path).max() == pytest.approx(64, abs=1)


def test_window_over_values_whose_order_is_turned_around(tmp_path: Path) -> None:
    tags = {"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_allclose(_values(write_dicom(tmp_path / "image.dcm", _ramp(), **tags)), 255 - EXPECTED, atol=0.51)


NO_WINDOW = {
    "empty": {"WindowCenter": "", "WindowWidth": ""},
    "no_width": {"WindowCenter": 9},
    "width_0": {"WindowCenter": 9, "WindowWidth": 0},
    "exact_width_0": {"WindowCenter": 9, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
    "empty_first": {"WindowCenter": ["", 9], "WindowWidth": ["", 9]},
    "no_table": {"VOILUTSequence": []},
    "empty_table": {"VOILUTSequence": [Dataset()]},
    "empty_modality_table": {"ModalityLUTSequence": [Dataset()]},
    "empty_slope": {"RescaleSlope": "", "RescaleIntercept": 0},
    "slope_0": {"RescaleSlope": 0, "RescaleIntercept": 7},
    "empty_rescale": {"RescaleSlope": "", "RescaleIntercept": ""},
}


@pytest.mark.filterwarnings("ignore:.*has a window of width 0")
@pytest.mark.parametrize("tags", NO_WINDOW.values(), ids=NO_WINDOW)
def test_empty_tags_say_nothing(tmp_path: Path, tags: dict[str, Any]) -> None:
    """From the lowest value to the highest, as without them."""
    path = write_dicom(tmp_path / "image.dcm", _ramp() // 4, **tags)
    np.testing.assert_allclose(_values(path), (_ramp() // 4) / 1023 * 255, atol=0.51)


@pytest.mark.parametrize(
    "tags",
    [
        {"VOILUTFunction": "", "WindowCenter": 2000, "WindowWidth": 2000, "VOILUTSequence": []},
        {"RescaleSlope": "", "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 2000},
    ],
    ids=["function", "slope"],
)
def test_window_beside_empty_tags(tmp_path: Path, tags: dict[str, Any]) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    np.testing.assert_allclose(_values(path), ((_ramp() - 1000.0) / 2000).clip(0, 1) * 255, atol=0.7)


def _table(entries: np.ndarray, bits: int, first: int = 0, kind: str = "US") -> Dataset:
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    table.add_new("LUTData", kind, entries.tolist() if kind == "US" else entries.astype("<u2").tobytes())
    return table


@pytest.mark.parametrize("kind", ["US", "OW"])
@pytest.mark.parametrize(
    ("declared", "used"), [(12, 12), (16, 12), (16, 16), (8, 8), (10, 12)], ids=lambda bits: str(bits)
)
def test_table_of_the_values_of_interest(tmp_path: Path, declared: int, used: int, kind: str) -> None:
    """A table is over the bits that its entries need, whatever it declares; so do viewers."""
    entries = np.rint((np.arange(4096) / 4095) ** 2 * (2**used - 1)).astype(int)
    path = write_dicom(tmp_path / "image.dcm", _ramp(), VOILUTSequence=[_table(entries, declared, kind=kind)])
    np.testing.assert_allclose(_values(path), (_ramp() / 4095) ** 2 * 255, atol=0.7 if used > 8 else 1.1)


@pytest.mark.filterwarnings("error::UserWarning")
def test_table_over_rescaled_values(tmp_path: Path) -> None:
    """A table for 1000 to 3047; what is below or above takes its first or last entry."""
    tags = {"RescaleSlope": 1, "RescaleIntercept": 0, "VOILUTSequence": [_table(np.arange(2048), 16, first=1000)]}
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    np.testing.assert_allclose(_values(path), ((_ramp() - 1000.0) / 2047).clip(0, 1) * 255, atol=0.51)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_modality_table(tmp_path: Path, bits: int) -> None:
    """The order of the values is turned around, and the window is over what comes out."""
    entries = np.arange(4095, -1, -1) >> max(12 - bits, 0)
    tags = {"ModalityLUTSequence": [_table(entries, bits)], "WindowCenter": entries[0] / 2, "WindowWidth": entries[0]}
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    np.testing.assert_allclose(_values(path), 255 - EXPECTED, atol=2.1 if bits == 8 else 0.7)


def test_rle(tmp_path: Path) -> None:
    """Of unsigned and signed numbers, and of colors, which lie in planes."""
    path = write_dicom(tmp_path / "image.dcm", _ramp(), syntax=RLELossless)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)
    path = write_dicom(tmp_path / "image.dcm", _ramp().astype(np.int16) - 2048, syntax=RLELossless)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)
    colors = np.stack([_ramp(), _ramp(), _ramp()], -1)
    path = write_dicom(tmp_path / "image.dcm", colors, "RGB", RLELossless, PlanarConfiguration=1)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def _lossless_jpeg(pixels: np.ndarray, bits: int, dropped: int = 0) -> bytes:
    """A JPEG of process 14, each pixel told from the one on its left: ITU T.81, annex H; `pixels` `(h, w)`.

    The lowest `dropped` bits of the pixels are left out, by the point transform.
    """
    values = pixels.astype(int) >> dropped
    expected = np.roll(values, 1, 1)
    expected[1:, 0], expected[0, 0] = values[:-1, 0], 2 ** (bits - dropped - 1)
    stream = ""
    for step in ((values - expected + 2**15) % 2**16 - 2**15).ravel().tolist():
        size = abs(step).bit_length()
        # All sizes have codes of five bits; what follows says which step of that size, but for the one of 16 bits.
        extra = format(step if step > 0 else step + 2**size - 1, f"0{size}b") if 0 < size < 16 else ""
        stream += format(size, "05b") + extra
    stream += "1" * (-len(stream) % 8)
    coded = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    segments = [
        (0xC3, struct.pack(">BHHBBBB", bits, *pixels.shape, 1, 1, 0x11, 0)),
        (0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])),
        (0xDA, bytes([1, 1, 0, 1, 0, dropped])),
    ]
    head = b"".join(struct.pack(">BBH", 0xFF, mark, len(body) + 2) + body for mark, body in segments)
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


def _baseline_jpeg(pixels: np.ndarray, bits: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels >> (bits - 8)).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    ("syntax", "encode", "bits", "atol"),
    [
        (JPEGLosslessSV1, _lossless_jpeg, 12, 0.51),
        (JPEGLosslessSV1, _lossless_jpeg, 16, 0.51),
        (JPEGLossless, _lossless_jpeg, 16, 0.51),
        (JPEGLossless, lambda pixels, bits: _lossless_jpeg(pixels, bits, 2), 12, 0.7),
        (JPEGBaseline8Bit, _baseline_jpeg, 8, 3),
        (JPEGExtended12Bit, lambda pixels, bits: imagecodecs.jpeg_encode(pixels, bitspersample=bits, level=98), 12, 2),
        (JPEGLSLossless, lambda pixels, bits: imagecodecs.jpegls_encode(pixels), 16, 0.51),
        (JPEG2000Lossless, lambda pixels, bits: imagecodecs.jpeg2k_encode(pixels, reversible=True), 16, 0.51),
    ],
    ids=["lossless_sv1_12", "lossless_sv1_16", "lossless_16", "point_transform", "baseline", "extended", "ls", "2000"],
)
def test_images_in_a_jpeg(tmp_path: Path, syntax: Any, encode: Any, bits: int, atol: float) -> None:
    pixels = np.rint(_ramp() / 4095 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    path = write_dicom(tmp_path / "image.dcm", np.zeros_like(pixels), BitsStored=bits, HighBit=bits - 1)
    np.testing.assert_allclose(_values(compress(path, syntax, encode(pixels, bits))), EXPECTED, atol=atol)


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_jpeg_by_itself(tmp_path: Path, bits: int) -> None:
    """Of noise, too, whose steps need all sizes of code."""
    for pixels in (_ramp(), np.random.default_rng(0).integers(2**bits, size=(HEIGHT, WIDTH))):
        path = tmp_path / "image.jpg"
        path.write_bytes(_lossless_jpeg(pixels, bits))
        expected = (pixels - pixels.min()) / np.ptp(pixels.astype(int)) * 255
        np.testing.assert_allclose(_values(path), expected, atol=0.51)


# Files that come with pydicom: the mean of their 8-bit levels in DCMTK, with the first window or with all values.
OF_OTHERS = {
    "CT_small.dcm": 95.53,
    "ExplVR_BigEnd.dcm": 222.44,
    "JPEG-lossy.dcm": 13.13,
    "JPGExtended.dcm": 13.13,
    "MR_small_RLE.dcm": 112.59,
    "MR_small_bigendian.dcm": 112.59,
    "SC_jpeg_no_color_transform.dcm": 243.97,
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": 127.69,
    "SC_rgb_rle_16bit.dcm": 127.70,
    "examples_palette.dcm": 19.47,
    "examples_ybr_color.dcm": 9.45,
    "image_dfl.dcm": 127.12,
    "liver_1frame.dcm": 35.25,
    "rtdose_1frame.dcm": 121.10,
}


@pytest.mark.filterwarnings("ignore:.*Only the first is used")
@pytest.mark.parametrize("name", OF_OTHERS)
def test_images_of_others(name: str) -> None:
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom comes without {name}")
    image = read_image(path)
    assert image.size == read_size(path) == image.pixels.shape
    assert image.pixels.mean() == pytest.approx(OF_OTHERS[name], abs=1)


def test_first_of_several_frames_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any process: each of several reads images of its own."""
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    path = write_dicom(tmp_path / "image.dcm", np.stack([_ramp(), _ramp() // 2, _ramp() // 3]))
    with pytest.warns(UserWarning, match=r"image\.dcm has 3 frames\. Only the first is used"):
        np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def test_colors_become_luminance(tmp_path: Path) -> None:
    gray = np.rint(EXPECTED).astype(np.uint8)
    path = write_dicom(tmp_path / "image.dcm", np.stack([gray] * 3, -1), "RGB")
    np.testing.assert_allclose(_values(path), EXPECTED, atol=1.1)


def test_resized_before_it_becomes_8_bits(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp())
    small = read_image(path, lambda size: (size[0] // 10, size[1] // 10)).pixels
    np.testing.assert_allclose(small, EXPECTED.reshape(6, 10, 4, 10).mean((1, 3)), atol=0.51)


def test_a_codec_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compress(write_dicom(tmp_path / "image.dcm", _ramp()), JPEG2000Lossless, imagecodecs.jpeg2k_encode(_ramp()))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImportError, match=r"image\.dcm is compressed as JPEG 2000 .*pip install 'matex_pl\[dicom\]'"):
        read_image(path)


def test_a_broken_stream_is_a_broken_image(tmp_path: Path) -> None:
    stream = imagecodecs.jpeg2k_encode(_ramp())
    path = compress(write_dicom(tmp_path / "image.dcm", _ramp()), JPEG2000Lossless, stream)
    path.write_bytes(path.read_bytes().replace(b"\xff\x52", b"\xff\x00"))
    with pytest.raises(ValueError, match=r"No readable image at '.*image\.dcm' \(the DICOM is damaged or truncated\)"):
        read_image(path)


@pytest.mark.parametrize("name", ["image.dcm", "image.jpg"])
def test_a_codec_that_loses_the_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    noise = np.random.default_rng(0).integers(4096, size=(HEIGHT, WIDTH)).astype(np.uint16)
    stream, path = _lossless_jpeg(noise, 12), tmp_path / name
    if name == "image.jpg":
        path.write_bytes(stream)
    else:
        compress(write_dicom(path, noise), JPEGLossless, stream)
    monkeypatch.setattr(imagecodecs, "jpeg_decode", lambda *_, **__: np.full_like(noise, 7))
    with pytest.raises(
        ValueError, match=r"\(the codec libjpeg-turbo of imagecodecs decodes a constant image from data"
    ):
        read_image(path)
    # An image that is constant stays one.
    flat = _lossless_jpeg(np.full((900, 900), 7, dtype=np.uint16), 12)
    (tmp_path / "flat.jpg").write_bytes(flat)
    monkeypatch.setattr(imagecodecs, "jpeg_decode", lambda *_, **__: np.full((900, 900), 7, dtype=np.uint16))
    assert not read_image(tmp_path / "flat.jpg").pixels.any()


@pytest.mark.parametrize(
    ("syntax", "name", "codec"),
    [(RLELossless, "dicomrle_decode", "RLE"), (JPEG2000Lossless, "jpeg2k_decode", "OpenJPEG")],
    ids=["rle", "2000"],
)
def test_other_codecs_that_lose_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: Any, name: str, codec: str
) -> None:
    noise = np.random.default_rng(0).integers(4096, size=(HEIGHT, WIDTH)).astype(np.uint16)
    path = write_dicom(tmp_path / "image.dcm", noise, syntax=syntax if syntax == RLELossless else None)
    if syntax == JPEG2000Lossless:
        compress(path, syntax, imagecodecs.jpeg2k_encode(noise, reversible=True))
    read_image(path)
    monkeypatch.setattr(imagecodecs, name, lambda *_: np.full_like(noise, 7))
    with pytest.raises(ValueError, match=rf"\(the codec {codec} of imagecodecs decodes a constant image from data"):
        read_image(path)


def test_padding_is_black_and_out_of_the_range(tmp_path: Path) -> None:
    pixels = 1000 + _ramp() // 2
    pixels[:5], pixels[5:9] = 0, 4000
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        path = write_dicom(tmp_path / "image.dcm", pixels, kind, PixelPaddingValue=0)
        header = pydicom.dcmread(path)
        header.add_new("PixelPaddingRangeLimit", "US", 4000)
        # A range, in either order of its ends.
        header.PixelPaddingValue, header.PixelPaddingRangeLimit = 4000, 4000
        header.save_as(path)
        rest = pixels[9:].astype(float)
        levels = _values(path)
        assert (levels[5:9] == 0).all()
        shown = (np.concatenate([pixels[:5], pixels[9:]]) / rest.max() * 255).astype(float)
        found = np.concatenate([levels[:5], levels[9:]])
        np.testing.assert_allclose(found, shown if kind == "MONOCHROME2" else 255 - shown, atol=0.51)


@pytest.mark.parametrize("value", [-2000, 63536])
def test_padding_below_zero(tmp_path: Path, value: int) -> None:
    pixels = _ramp().astype(np.int16) - 1024
    pixels[:5] = -2000
    path = write_dicom(tmp_path / "image.dcm", pixels, BitsStored=16, HighBit=15)
    header = pydicom.dcmread(path)
    header.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    header.save_as(path)
    rest = pixels[5:].astype(float)
    levels = _values(path)
    assert (levels[:5] == 0).all()
    np.testing.assert_allclose(levels[5:], (rest - rest.min()) / np.ptp(rest) * 255, atol=0.51)


@pytest.mark.parametrize("groups", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_window_and_rescale_in_functional_groups(tmp_path: Path, groups: str) -> None:
    group, window, rescale = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 2000, 2000
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -1000
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
    path = write_dicom(tmp_path / "image.dcm", np.stack([_ramp()] * 2), **{groups: [group]})
    with pytest.warns(UserWarning, match="2 frames"):
        np.testing.assert_allclose(_values(path), ((2.0 * _ramp() - 2000) / 2000).clip(0, 1) * 255, atol=0.7)


@pytest.mark.parametrize("implicit", [False, True])
def test_table_that_starts_below_zero(tmp_path: Path, implicit: bool) -> None:
    """Its first input is -1024. Without types in the file, and in some files with them, the number is 64512."""
    table = _table(np.arange(2048) ** 2 >> 6, 16, first=64512)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "VOILUTSequence": [table]}
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    if implicit:
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        header.save_as(path, implicit_vr=True, enforce_file_format=True)
    entries = (np.arange(2048) ** 2 >> 6)[_ramp().clip(0, 2047)]
    np.testing.assert_allclose(_values(path), entries / 65535 * 255, atol=0.51)


@pytest.mark.parametrize("kind", ["US", "OW"])
def test_table_of_two_entries_in_a_word(tmp_path: Path, kind: str) -> None:
    entries = (np.arange(4096) // 16).astype(np.uint8)
    table = _table(entries.view("<u2"), 8, kind=kind)
    table.LUTDescriptor = [4096, 0, 8]
    path = write_dicom(tmp_path / "image.dcm", _ramp(), VOILUTSequence=[table])
    np.testing.assert_allclose(_values(path), entries[_ramp()], atol=0.51)


def test_table_with_fewer_entries_than_declared(tmp_path: Path) -> None:
    table = _table(np.arange(3000), 12)
    table.LUTDescriptor = [4096, 0, 12]
    path = write_dicom(tmp_path / "image.dcm", _ramp(), VOILUTSequence=[table])
    np.testing.assert_allclose(_values(path), _ramp().clip(0, 2999) / 4095 * 255, atol=0.51)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_are_not_the_lowest(tmp_path: Path, signed: bool) -> None:
    """Twelve bits above four others, which are no part of the pixels."""
    noise = np.random.default_rng(0).integers(16, size=(HEIGHT, WIDTH)).astype(np.uint16)
    values = _ramp().astype(np.int16) - 2048 if signed else _ramp()
    pixels = (values << 4) | noise.astype(values.dtype)
    tags = {"WindowCenter": 0 if signed else 2048, "WindowWidth": 4096}
    path = write_dicom(tmp_path / "image.dcm", pixels, BitsStored=12, HighBit=15, **tags)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def test_bits_above_the_used_ones(tmp_path: Path) -> None:
    """Overlays of old files stand there."""
    path = write_dicom(tmp_path / "image.dcm", _ramp() | 0x3000, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def test_colors_of_twelve_bits(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", np.stack([_ramp()] * 3, -1), "RGB")
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)
    path = write_dicom(tmp_path / "image.dcm", np.stack([_ramp() // 2] * 3, -1), "RGB")
    np.testing.assert_allclose(_values(path), EXPECTED / 2, atol=0.55)


def test_decimal_commas(tmp_path: Path) -> None:
    tags = {"RescaleSlope": "2.0", "RescaleIntercept": "-999.5", "WindowCenter": "2000.5", "WindowWidth": "2000.0"}
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    content = path.read_bytes()
    for value in tags.values():
        assert content.count(value.encode()) == 1
        content = content.replace(value.encode(), value.replace(".", ",").encode())
    path.write_bytes(content)
    np.testing.assert_allclose(_values(path), ((2.0 * _ramp() - 2000) / 2000).clip(0, 1) * 255, atol=0.7)


@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE", ""])
@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_shape_of_the_presentation_table(tmp_path: Path, kind: str, shape: str) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), kind, PresentationLUTShape=shape)
    inverted = shape == "INVERSE" if shape else kind == "MONOCHROME1"
    np.testing.assert_allclose(_values(path), 255 - EXPECTED if inverted else EXPECTED, atol=0.51)


def test_a_window_without_width_is_logged(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), WindowCenter=9, WindowWidth=0)
    with pytest.warns(UserWarning, match=r"image\.dcm has a window of width 0, which is too small\. All of its values"):
        np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("implicit", [False, True])
def test_files_without_preamble(tmp_path: Path, implicit: bool, kept: int) -> None:
    """With their header of group 0002, or without it, and under any name."""
    path = write_dicom(tmp_path / "image", _ramp())
    header = pydicom.dcmread(path)
    if implicit:
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        header.save_as(path, implicit_vr=True, enforce_file_format=True)
    content = path.read_bytes()[132:]
    length = 12 + struct.unpack_from("<L", content, 8)[0]
    path.write_bytes(content if kept else content[length:])
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


@pytest.mark.parametrize("tags", [{}, {"BitsStored": 16, "HighBit": 15}])
def test_high_bytes_first(tmp_path: Path, tags: dict[str, int]) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), **tags)
    header, read = Dataset(), pydicom.dcmread(path)
    header.update(read)
    header.PixelData = _ramp().astype(">u2").tobytes()
    header.file_meta = read.file_meta
    header.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    header.save_as(path, little_endian=False, implicit_vr=False, enforce_file_format=True)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def test_numbers_of_32_bits(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp())
    header = pydicom.dcmread(path)
    header.PixelData, header.BitsAllocated = (_ramp() * np.uint32(1000000)).tobytes(), 32
    header.BitsStored, header.HighBit = 32, 31
    header.add_new("PixelPaddingValue", "US", 0)
    header.save_as(path)
    low = int(_ramp()[_ramp() > 0].min())
    np.testing.assert_allclose(_values(path), ((_ramp() - float(low)) / (4095 - low)).clip(0, 1) * 255, atol=0.51)


def test_palette(tmp_path: Path) -> None:
    """Colors for the values from 100 on."""
    colors = np.random.default_rng(0).integers(65536, size=(3, 200))
    path = write_dicom(tmp_path / "image.dcm", (_ramp() // 20).astype(np.uint16))
    header = pydicom.dcmread(path)
    header.PhotometricInterpretation = "PALETTE COLOR"
    for name, entries in zip(("Red", "Green", "Blue"), colors, strict=True):
        header.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [200, 100, 16])
        header.add_new(f"{name}PaletteColorLookupTableData", "OW", entries.astype("<u2").tobytes())
    header.save_as(path)
    shown = colors[:, (_ramp() // 20).astype(int).clip(100, 299) - 100]
    np.testing.assert_allclose(_values(path), np.tensordot([0.299, 0.587, 0.114], shown, 1) / 65535 * 255, atol=0.51)


def test_files_without_pixels_are_refused_as_such(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp())
    header = pydicom.dcmread(path)
    del header.PixelData
    header.save_as(path)
    with pytest.raises(ValueError, match=r"\(a DICOM file without pixels\)"):
        read_image(path)
    del header.Rows
    header.save_as(path)
    for read in (read_image, read_size):
        with pytest.raises(ValueError, match=r"\(a DICOM file without pixels \(Digital X-Ray Image"):
            read(path)


def test_large_files_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their header, by the header of their stream, and by the length to which they inflate."""
    path = write_dicom(tmp_path / "image.dcm", _ramp(), Rows=60000, Columns=60000)
    with pytest.raises(ValueError, match=r"\(it has 60000 x 60000 pixels, and at most 178,956,970 are read\)"):
        read_image(path)
    stream = _lossless_jpeg(_ramp(), 12).replace(struct.pack(">HH", HEIGHT, WIDTH), b"\xea\x60\xea\x60", 1)
    path = compress(write_dicom(tmp_path / "image.dcm", _ramp()), JPEGLossless, stream)
    with pytest.raises(ValueError, match=r"\(its JPEG is damaged, or does not have 40 x 60 pixels\)"):
        read_image(path)
    (tmp_path / "image.jpg").write_bytes(stream)
    with pytest.raises(ValueError, match=r"\(it has 60000 x 60000 pixels"):
        read_image(tmp_path / "image.jpg")
    path = write_dicom(tmp_path / "image.dcm", _ramp())
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)
    head = path.read_bytes()
    start = 144 + struct.unpack_from("<L", head, 140)[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(head[:start] + deflate.compress(bytes(2**24)) + deflate.flush())
    monkeypatch.setattr("matex_pl.data.levels._MOST_PIXELS", 2**20)
    with pytest.raises(ValueError, match=r"\(it has .* pixels, and at most 1,048,576 are read\)"):
        read_image(path)


def test_truncated_deflated_files_are_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp())
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    assert read_size(path) == (HEIGHT, WIDTH)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)
    path.write_bytes(path.read_bytes()[:-200])
    for read in (read_image, read_size):
        with pytest.raises(ValueError, match=r"\(its deflated elements are truncated\)"):
            read(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "image.dcm", _ramp()).read_bytes()
    for content in (b"", b"no dicom", whole[:200], whole[: len(whole) // 2]):
        (tmp_path / "image.dcm").write_bytes(content)
        with pytest.raises(ValueError, match=r"No readable image at '.*image\.dcm'"):
            read_image(tmp_path / "image.dcm")


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, actual = write_dicom(tmp_path / "image.dcm", _ramp()), builtins.__import__

    def refuse(name: str, *args: Any, **settings: Any) -> Any:
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return actual(name, *args, **settings)

    monkeypatch.delitem(sys.modules, "pydicom")
    monkeypatch.setattr(builtins, "__import__", refuse)
    for read in (read_image, read_size):
        with pytest.raises(
            ImportError, match=r"image\.dcm is DICOM, which needs pydicom: pip install 'matex_pl\[dicom\]'"
        ):
            read(path)
