"""DICOM images as viewers display them. Only this module reads pixels with pydicom."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from matex_pl.data.jpeg import decode_jpeg, read_jpeg_header
from matex_pl.data.levels import (
    HIGHEST,
    RefusedImageError,
    check_not_blank,
    check_size,
    luminance,
    map_levels,
    need,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

_PREAMBLE = 128
# Groups with which files without a preamble begin, of the file's header or of the image, in either byte order.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")
_YBR = ("YBR_FULL", "YBR_FULL_422")
_COLORS = ("RGB", "YBR_ICT", "YBR_RCT", *_YBR)
_PALETTE = "PALETTE COLOR"
_GRAY = ("MONOCHROME1", "MONOCHROME2")

Values = Callable[[np.ndarray], np.ndarray]
"""Function of pixels, with one number for each."""


def is_dicom(head: bytes) -> bool:
    """Whether a file with these first 132 bytes is DICOM: by its magic bytes, or without a preamble by its element."""
    if head[_PREAMBLE:] == b"DICM":
        return True
    # The first element has a type of two capital letters, or a short length.
    is_explicit = head[4:6].isalpha() and head[4:6].isupper()
    return head[:2] in _FIRST_GROUPS and (is_explicit or head[6:8] == b"\0\0")


def read_dicom_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header."""
    header = _header(path, stop_before_pixels=True)
    return int(header.Rows), int(header.Columns)


def read_header(path: Path) -> Dataset:
    """The elements of a file with an image, without its pixels. `NumberOfFrames` is always there.

    Raises:
        ImportError: pydicom is not installed.
        RefusedImageError: The file has no pixels, or too many.
    """
    return _header(path, stop_before_pixels=True)


@dataclass(frozen=True)
class Display:
    """The steps from the stored values of a gray image to its levels, as `read_dicom` takes them.

    Args:
        slope: Slope of the rescale, without a modality table.
        intercept: Intercept of the rescale.
        modality_table: Item of the modality table; None if there is none.
        center: Center of the window. Without a table or window, a window over the range of the values.
        width: Width of the window.
        function: Function of the window: `LINEAR`, `LINEAR_EXACT` or `SIGMOID`.
        voi_table: Item of the VOI table, which replaces the window; None if there is none.
        is_inverted: Whether low values are bright.
    """

    slope: float
    intercept: float
    modality_table: Dataset | None
    center: float
    width: float
    function: str
    voi_table: Dataset | None
    is_inverted: bool


def read_display(path: Path) -> Display:
    """How `read_dicom` shows a gray image; the errors are the same."""
    header = _header(path)
    group = _group(header, "PixelValueTransformationSequence", "RescaleSlope")
    modality = _first(group, "ModalityLUTSequence")
    window_group = _group(header, "FrameVOILUTSequence", "WindowCenter")
    voi = _first(window_group, "VOILUTSequence")
    window = _window_of(window_group)
    if window is None:
        _, low, high = _range(header, _frame(path, header))
        # The function LINEAR begins and ends at whole values.
        window = "LINEAR", (low + high + 1) / 2, high - low + 1
    function, center, width = window
    return Display(
        slope=_number(group, "RescaleSlope") or 1.0,
        intercept=_number(group, "RescaleIntercept") or 0.0,
        modality_table=modality if _is_table(modality) else None,
        center=center,
        width=width,
        function=function,
        voi_table=voi if _is_table(voi) else None,
        is_inverted=_is_inverted(header),
    )


def read_view(path: Path) -> tuple[str, list[str]]:
    """View position and patient orientation, from the header; empty if they are missing or the file is no DICOM."""
    names = ["ViewPosition", "PatientOrientation"]
    with path.open("rb") as file:
        if not is_dicom(file.read(_PREAMBLE + 4)):
            return "", []
    pydicom = need("pydicom", f"{path} is DICOM, which needs pydicom")
    try:
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=names)
        orientation = header.get("PatientOrientation") or []
        directions = [orientation] if isinstance(orientation, str) else list(orientation)
        return str(header.get("ViewPosition") or ""), [str(direction) for direction in directions]
    # Broken headers raise all kinds of errors. The reader of the pixels reports them.
    except Exception:
        return "", []


def read_dicom(path: Path) -> np.ndarray:
    """Levels of the first frame `(h, w)`: uint16 with white at 65,535, or uint8 for colors of 8 bits.

    The rescale slope or modality table is applied first, then the first VOI table or window, whose range becomes
    black to white. Without a usable table or window, the range of the pixels does. All of them are also found in
    functional groups. Pixel padding is left out of the range, and is black. Empty elements are ignored. The shape of
    the presentation table decides whether low values are bright, or else MONOCHROME1 does. Colors become luminance,
    over the range of their bits.

    Raises:
        ImportError: pydicom, or the codec of a compressed file, is not installed.
        RefusedImageError: The file has no pixels, or pixels of a kind that is not read.
    """
    header = _header(path)
    warn_if_several(path, header.NumberOfFrames, "frames")
    frame = _frame(path, header)
    if frame.colors == _PALETTE:
        return map_levels(frame.pixels, _palette(header, frame))
    if frame.colors in _GRAY:
        return map_levels(frame.pixels, _tone(path, header, frame))
    if frame.pixels.dtype == np.uint8:
        return frame.pixels
    return map_levels(frame.pixels, lambda raw: frame.stored(raw) / (2**frame.bits - 1))


def warn_if_several(path: Path, number: int, kind: str) -> None:
    """Warn if a file holds more than one image of a `kind`, "frames" or "pages"."""
    if number > 1:
        # In all processes, not only in the first: each reads other images.
        warnings.warn(f"{path} has {number} {kind}. Only the first is used.", stacklevel=2)


def _header(path: Path, *, stop_before_pixels: bool = False) -> Dataset:
    """The elements of a file with an image."""
    pydicom = need("pydicom", f"{path} is DICOM, which needs pydicom")
    inflated = _inflated(path)
    # Files without a preamble and header are read by force.
    source = path if inflated is None else inflated[1]
    header = pydicom.dcmread(source, force=True, stop_before_pixels=stop_before_pixels)
    if inflated is not None:
        header.file_meta = inflated[0]
    if not isinstance(header.get("Rows"), int) or not isinstance(header.get("Columns"), int):
        kinds = (header.get("SOPClassUID"), getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID"))
        kind = next((kind.name for kind in kinds if kind), "of unknown kind")
        raise RefusedImageError(f"a DICOM file without pixels ({kind})" if len(header) else "not a DICOM file")
    check_size(header.Rows, header.Columns)
    header.NumberOfFrames = max(int(_number(header, "NumberOfFrames") or 1), 1)
    return header


def _inflated(path: Path) -> tuple[FileMetaDataset, io.BytesIO] | None:
    """Header and inflated elements of a deflated file, unless they are far larger than an image; None for others."""
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as file:
        head = file.read(_PREAMBLE + 16)
        if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
            return None
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return None
        # The length of the header, group 0002, stands in its first element.
        file.seek(struct.unpack_from("<L", head, _PREAMBLE + 12)[0], io.SEEK_CUR)
        inflate, content = zlib.decompressobj(-zlib.MAX_WBITS), io.BytesIO()
        while part := inflate.unconsumed_tail or file.read(2**16):
            content.write(inflate.decompress(part, 2**20))
            # Two bytes for each of the pixels, and as much for everything else.
            check_size(1, max(content.tell() // 4, 1))
    if not inflate.eof:
        raise RefusedImageError("its deflated elements are truncated")
    content.seek(0)
    return meta, content


@dataclass(frozen=True)
class _Frame:
    """Pixels `(h, w)` of a frame, the colors from which they come, and the place of the used bits."""

    pixels: np.ndarray
    colors: str
    bits: int
    lowest: int
    is_signed: bool

    def stored(self, raw: np.ndarray) -> np.ndarray:
        """Stored values of some pixels, float64: without the bits above and below the used ones."""
        kind = "i" if self.is_signed else "u"
        if raw.dtype.kind == "f" or (raw.dtype.kind, 8 * raw.dtype.itemsize) == (kind, self.bits):
            return raw.astype(np.float64)
        used = (raw.astype(np.int64) >> self.lowest) & (2**self.bits - 1)
        if self.is_signed:
            used = np.where(used >= 2 ** (self.bits - 1), used - 2**self.bits, used)
        return used.astype(np.float64)

    def parts(self) -> list[np.ndarray]:
        """All values of the pixels in small parts, each value once if they have up to 16 bits."""
        if self.pixels.dtype.kind == "f" or self.pixels.dtype.itemsize > 2:
            return np.array_split(self.pixels, len(self.pixels) // 64 + 1)
        codes = np.arange(256**self.pixels.dtype.itemsize, dtype=f"u{self.pixels.dtype.itemsize}")
        # Faster than `np.unique` by far.
        counts = cv2.calcHist([self.pixels.view(codes.dtype)], [0], None, [len(codes)], [0, len(codes)])
        return [codes.view(self.pixels.dtype)[counts.ravel() > 0]]


def _frame(path: Path, header: Dataset) -> _Frame:
    """The first frame of a file."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(header.dir()):
        raise RefusedImageError("a DICOM file without pixels")
    # Writers leave out elements that have one usual value.
    header.setdefault("SamplesPerPixel", 1)
    header.setdefault("PixelRepresentation", 0)
    header.setdefault("BitsStored", header.get("BitsAllocated", 16))
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax:
        implicit, little = header.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    bits = int(header.BitsStored)
    lowest = max(int(header.get("HighBit") or bits - 1) + 1 - bits, 0)
    signed = header.PixelRepresentation == 1
    pixels, colors, precision = (_decoded if syntax.is_encapsulated else _native)(path, header, syntax)
    if precision:
        lowest = lowest if lowest + bits <= precision else 0
        bits = min(bits, precision) if signed else precision - lowest
    elif lowest + bits > 8 * pixels.dtype.itemsize:
        bits, lowest = 8 * pixels.dtype.itemsize, 0
    if colors not in (*_COLORS, *_GRAY, _PALETTE) or pixels.shape[2:] != ((3,) if colors in _COLORS else ()):
        shape = pixels.shape[2] if pixels.ndim == 3 else 1
        raise RefusedImageError(f"its colors are {colors} in {shape} bands, which are not read")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedImageError("a pixel is not finite")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if colors in _YBR and pixels.dtype != np.uint8:
        # Stored as luminance and two differences of color.
        pixels = np.ascontiguousarray(pixels[..., 0])
    elif colors in _COLORS:
        pixels = luminance(pixels, is_ybr=colors in _YBR)
    return _Frame(pixels, colors, bits, lowest, signed)


def _native(path: Path, header: Dataset, syntax: UID) -> tuple[np.ndarray, str, int]:
    """Pixels of the first frame of an uncompressed file, their colors, and 0: the header has their bits."""
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import as_pixel_options

    options = as_pixel_options(header, correct_unused_bits=False, view_only=header.BitsAllocated > 8)
    pixels, found = get_decoder(syntax).as_array(header, index=0, raw=True, **options)
    return pixels, str(found["photometric_interpretation"]), 0


def _decoded(path: Path, header: Dataset, syntax: UID) -> tuple[np.ndarray, str, int]:
    """Pixels of the first frame of a compressed file, their colors, and their bits: 0 if the header has them."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    if "JPEG" not in syntax.name and syntax != RLELossless:
        raise RefusedImageError(f"its pixels are compressed as {syntax.name}, which is not read")
    imagecodecs = need("imagecodecs", f"{path} is compressed as {syntax.name}, which needs imagecodecs")
    offsets = None
    if "ExtendedOffsetTable" in header:
        offsets = (header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths)
    stream = get_frame(header.PixelData, 0, number_of_frames=header.NumberOfFrames, extended_offsets=offsets)
    colors, size = str(header.PhotometricInterpretation), (header.Rows, header.Columns)
    if syntax == RLELossless:
        dtype = np.dtype(f"{'i' if header.PixelRepresentation else 'u'}{header.BitsAllocated // 8}")
        planes = np.frombuffer(imagecodecs.dicomrle_decode(stream, dtype), dtype)
        planes = planes[: header.SamplesPerPixel * size[0] * size[1]].reshape(-1, *size)
        check_not_blank(planes, lambda: memoryview(stream)[64:], "RLE of imagecodecs")
        return planes[0] if len(planes) == 1 else np.moveaxis(planes, 0, -1), colors, 0
    # JPEG 2000 may lie in boxes.
    start = 0 if stream.startswith(b"\xff\xd8") else stream.find(b"\xff\x4f\xff\x51")
    found = read_jpeg_header(io.BytesIO(stream), start)
    if found is None or found.size != size:
        raise RefusedImageError(f"its JPEG is damaged, or does not have {size[1]} x {size[0]} pixels")
    if colors in _COLORS:
        colors = found.colors or colors
    return decode_jpeg(stream, found, as_stored=True), colors, found.bits


def _tone(path: Path, header: Dataset, frame: _Frame) -> Values:
    """Function from pixels to shares of white."""
    is_padding = _padding(header, frame)
    rescale, low, high = _range(header, frame)
    shown = _of_interest(path, header, low, high)
    inverted = _is_inverted(header)

    def tone(raw: np.ndarray) -> np.ndarray:
        levels = shown(rescale(frame.stored(raw))).clip(0, 1)
        return np.where(is_padding(raw), 0.0, 1 - levels if inverted else levels)

    return tone


def _is_inverted(header: Dataset) -> bool:
    """Whether low values are bright: by the shape of the presentation table, or else by the colors."""
    shape = header.get("PresentationLUTShape")
    if shape in ("IDENTITY", "INVERSE"):
        return bool(shape == "INVERSE")
    return str(header.get("PhotometricInterpretation")) == _GRAY[0]


def _range(header: Dataset, frame: _Frame) -> tuple[Values, float, float]:
    """Function from stored values to modality values, and the lowest and highest of these, without padding."""
    parts, is_padding = frame.parts(), _padding(header, frame)
    rescale = _rescale(header, max((frame.stored(part).max() for part in parts), default=0.0))
    ends: list[float] = []
    for part in parts:
        values = rescale(frame.stored(part[~is_padding(part)]))
        ends += [float(values.min()), float(values.max())] if len(values) else []
    return rescale, *((min(ends), max(ends)) if ends else (0.0, 0.0))


def _padding(header: Dataset, frame: _Frame) -> Values:
    """Function from pixels to booleans: whether a pixel is padding."""
    value, limit = (header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if not isinstance(value, int):
        return lambda raw: np.zeros(raw.shape, dtype=bool)
    low, high = sorted((value, limit if isinstance(limit, int) else value))

    def is_padding(raw: np.ndarray) -> np.ndarray:
        found = np.zeros(raw.shape, dtype=bool)
        # Some writers use the bits above the used ones, or give the number as if it had the other sign.
        for values in (raw, frame.stored(raw)):
            for shift in (0, 2**16, -(2**16)):
                found |= (values >= low + shift) & (values <= high + shift)
        return found

    return is_padding


def _rescale(header: Dataset, highest: float) -> Values:
    """The modality table, or the slope and intercept. `highest` is the highest of the stored values."""
    group = _group(header, "PixelValueTransformationSequence", "RescaleSlope")
    table = _table(_first(group, "ModalityLUTSequence"), header, highest)
    if table is not None:
        return table
    slope, intercept = _number(group, "RescaleSlope") or 1.0, _number(group, "RescaleIntercept") or 0.0
    return lambda values: values * slope + intercept


def _of_interest(path: Path, header: Dataset, low: float, high: float) -> Values:
    """The VOI table or window over its range, or else the range of the values."""
    group = _group(header, "FrameVOILUTSequence", "WindowCenter")
    table = _table(_first(group, "VOILUTSequence"), header, high)
    if table is not None:
        # Over the bits that the entries need: the declared bits are often wrong, and viewers do not rely on them.
        most = 2 ** int(table(np.arange(-(2**15), 2**16)).max()).bit_length() - 1
        return lambda values: table(values) / max(most, 1)
    window = _window_of(group)
    if window is not None:
        return _window(*window)
    center, width = _number(group, "WindowCenter"), _number(group, "WindowWidth")
    if center is not None and width is not None:
        warnings.warn(
            f"{path} has a window of width {width:g}, which is too small. All of its values are shown instead.",
            stacklevel=2,
        )
    return lambda values: (values - low) / (high - low if high > low else 1.0)


def _window_of(group: Any) -> tuple[str, float, float] | None:
    """Function, center and width of the first window; None without a usable one."""
    center, width = _number(group, "WindowCenter"), _number(group, "WindowWidth")
    function = str(_first(group, "VOILUTFunction") or "LINEAR").upper()
    least = 1 if function == "LINEAR" else 1e-12
    if center is None or width is None or width < least:
        return None
    return function, center, width


def _window(function: str, center: float, width: float) -> Values:
    """Window functions of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, with the output range [0, 1]."""
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return lambda values: (values - center) / width + 0.5
    # Of width 1: a step.
    return lambda values: (values - (center - 0.5)) / max(width - 1, 1e-12) + 0.5


def _is_table(item: Dataset | None) -> bool:
    """Whether an item holds a table that is not empty."""
    return item is not None and bool(item.get("LUTDescriptor")) and item.get("LUTData") not in (None, b"", [])


def _table(item: Dataset | None, header: Dataset, highest: float) -> Values | None:
    """Function by a table of a header; None if it is missing or empty. `highest` is the highest of its inputs."""
    if item is None or not _is_table(item):
        return None
    first, entries = _entries(item.LUTDescriptor, item.LUTData, header)
    # The number may have an unsigned type although it is below 0. No input would reach the table.
    first -= 2**16 if first >= 2**15 and highest < first else 0
    return lambda values: entries[(np.rint(values) - first).clip(0, len(entries) - 1).astype(np.int64)]


def _entries(descriptor: Any, data: Any, header: Dataset) -> tuple[int, np.ndarray]:
    """First input and entries of a table; they may be bytes, two in a word, or fewer than declared."""
    count, first, bits = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    if isinstance(data, bytes):
        words = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2" if header.original_encoding[1] else ">u2")
    else:
        words = np.atleast_1d(np.asarray(data)) & 0xFFFF
    if bits <= 8 and len(words) < count <= 2 * len(words):
        words = words.astype("<u2").view(np.uint8)
    return first, words[:count].astype(np.float64)


def _palette(header: Dataset, frame: _Frame) -> Values:
    """Function from pixels to the luminance of the colors of a palette."""
    names = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
    if f"Segmented{names[0]}Data" in header:
        from pydicom.pixels import apply_color_lut

        def colors(raw: np.ndarray) -> np.ndarray:
            found = apply_color_lut(frame.stored(raw).astype(np.int32).reshape(1, -1), header)[0, :, :3]
            return found.reshape(*raw.shape, 3) / np.iinfo(found.dtype).max
    else:
        bands = [_entries(header[f"{name}Descriptor"].value, header[f"{name}Data"].value, header) for name in names]
        most = 255 if max(entries.max() for _, entries in bands) < 256 else HIGHEST

        def colors(raw: np.ndarray) -> np.ndarray:
            values = frame.stored(raw).astype(np.int64)
            found = [entries[(values - first).clip(0, len(entries) - 1)] for first, entries in bands]
            return np.stack(found, -1) / most

    return lambda raw: colors(raw) @ np.array([0.299, 0.587, 0.114])


def _group(header: Dataset, sequence: str, name: str) -> Any:
    """The part of a header with an element: the whole, or a functional group of the first frame."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        place = _first(_first(header, groups) or {}, sequence) or {}
        if name in place:
            return place
    return header


def _number(header: Dataset, name: str) -> float | None:
    """First number of an element, with a decimal comma also; None if it is missing, empty or not finite."""
    element = header.get_item(name) if name in header else None
    value = None if element is None else element.value
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    if isinstance(value, bytes):
        # Pydicom does not convert decimal commas.
        value = value.decode("ascii", "replace").split("\\")[0]
    try:
        number = float(str(value).strip("\0 ").replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _first(header: Mapping[str, Any] | Dataset, name: str) -> Any:
    """First value of an element; None if it is missing or empty."""
    value = header.get(name)
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    return None if value == "" else value
