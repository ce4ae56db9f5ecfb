"""DICOM images, and JPEGs of more than 8 bits: what a viewer would show, from files made here and pydicom's own."""

from __future__ import annotations

import builtins
import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matex_pl.data.images import read_image, read_size

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate, generate_frames  # noqa: E402
from pydicom.pixels import set_pixel_data  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
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
    header.SOPInstanceUID = generate_uid()
    set_pixel_data(header, pixels, kind, 8 if pixels.dtype == np.uint8 else 12)
    for name, value in tags.items():
        setattr(header, name, value)
    if syntax is not None:
        header.compress(syntax)
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


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=["rle", "jpeg_2000"])
def test_compressed_images(tmp_path: Path, syntax: Any) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), syntax=syntax)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=0.51)


def _lossless_jpeg(pixels: np.ndarray, bits: int) -> bytes:
    """A JPEG of process 14, each pixel told from the one on its left: ITU T.81, annex H; `pixels` `(h, w)`."""
    values = pixels.astype(int)
    expected = np.roll(values, 1, 1)
    expected[1:, 0], expected[0, 0] = values[:-1, 0], 2 ** (bits - 1)
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
        (0xDA, bytes([1, 1, 0, 1, 0, 0])),
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
        (JPEGBaseline8Bit, _baseline_jpeg, 8, 3),
    ],
    ids=["lossless_sv1_12", "lossless_sv1_16", "lossless_16", "baseline"],
)
def test_images_in_a_jpeg(tmp_path: Path, syntax: Any, encode: Any, bits: int, atol: float) -> None:
    pixels = np.rint(_ramp() / 4095 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    path = write_dicom(tmp_path / "image.dcm", np.zeros_like(pixels), BitsStored=bits, HighBit=bits - 1)
    header = pydicom.dcmread(path)
    header.PixelData = encapsulate([encode(pixels, bits)])
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(path, enforce_file_format=True)
    np.testing.assert_allclose(_values(path), EXPECTED, atol=atol)


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_jpeg_by_itself(tmp_path: Path, bits: int) -> None:
    """Of noise, too, whose steps need all sizes of code."""
    for pixels in (_ramp(), np.random.default_rng(0).integers(2**bits, size=(HEIGHT, WIDTH))):
        path = tmp_path / "image.jpg"
        path.write_bytes(_lossless_jpeg(pixels, bits))
        expected = (pixels - pixels.min()) / np.ptp(pixels.astype(int)) * 255
        np.testing.assert_allclose(_values(path), expected, atol=0.51)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEGLSNearLossless_16.dcm", "JPEG2000.dcm"])
def test_compressed_images_of_others(name: str) -> None:
    """Files that come with pydicom, whose levels keep the order of what pydicom decodes."""
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom comes without {name}")
    image = read_image(path)
    stored = pydicom.dcmread(path).pixel_array.astype(float)
    assert image.size == read_size(path) == stored.shape[:2]
    if stored.ndim == 2 and image.pixels.std() > 0:
        assert np.corrcoef(image.pixels.ravel(), stored.ravel())[0, 1] > 0.6


def test_twelve_bit_jpeg_by_itself(tmp_path: Path) -> None:
    source = pydicom.data.get_testdata_file("JPGExtended.dcm", download=False)
    if source is None:
        pytest.skip("this pydicom comes without JPGExtended.dcm")
    header = pydicom.dcmread(source)
    path = tmp_path / "image.jpg"
    path.write_bytes(next(generate_frames(header.PixelData, number_of_frames=1)))
    stored = header.pixel_array.astype(float)
    image = read_image(path)
    assert image.size == read_size(path) == stored.shape
    expected = (stored - stored.min()) / (stored.max() - stored.min()) * 255
    np.testing.assert_allclose(image.pixels, expected, atol=0.51)


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
    path = write_dicom(tmp_path / "image.dcm", _ramp(), syntax=JPEG2000Lossless)
    decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
    for plugin in list(decoder.available_plugins):
        monkeypatch.setitem(decoder._unavailable, plugin, ("a codec",))
        monkeypatch.delitem(decoder._available, plugin)
    with pytest.raises(ImportError, match=r"image\.dcm cannot be decoded .*pip install 'matex_pl\[dicom\]'"):
        read_image(path)


def test_a_broken_stream_is_a_broken_image(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "image.dcm", _ramp(), syntax=JPEG2000Lossless)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\xff\x4f\xff\x51", b"\xff\x4f\x00\x00"))
    with pytest.raises(ValueError, match=r"No readable image at '.*image\.dcm' \(Unable to decode"):
        read_image(path)


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
