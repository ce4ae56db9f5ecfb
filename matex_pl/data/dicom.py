"""DICOM images as viewers display them. No other module imports pydicom."""

from __future__ import annotations

import math
import warnings
from collections.abc import MutableSequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PREAMBLE = 128
_LARGE, _SMALL = 1e12, 1e-12


def is_dicom(path: Path) -> bool:
    """Whether the file is DICOM, by its name or its magic bytes."""
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def read_dicom_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header."""
    header = _pydicom(path).dcmread(path, stop_before_pixels=True)
    return int(header.Rows), int(header.Columns)


def read_view(path: Path) -> tuple[str, list[str]]:
    """View position and patient orientation, from the header; empty if they are missing or cannot be read."""
    names = ["ViewPosition", "PatientOrientation"]
    pydicom = _pydicom(path)
    try:
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=names)
        orientation = header.get("PatientOrientation") or []
        directions = [orientation] if isinstance(orientation, str) else list(orientation)
        return str(header.get("ViewPosition") or ""), [str(direction) for direction in directions]
    # Broken headers raise all kinds of errors. The reader of the pixels reports them.
    except Exception:
        return "", []


def read_dicom(path: Path) -> np.ndarray:
    """Gray levels of the first frame, `(h, w)` float32 in [0, 1], 1 is bright.

    The rescale slope or modality table is applied first, then the first VOI table or window, whose range becomes
    [0, 1]. Without a usable table or window, the range of the pixels becomes [0, 1]. Empty tags are ignored.
    MONOCHROME1, whose low values are bright, is inverted.

    Raises:
        ImportError: pydicom, or the codec of a compressed file, is not installed.
    """
    pydicom = _pydicom(path)
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = pydicom.dcmread(path)
    warn_if_several(path, int(header.get("NumberOfFrames") or 1), "frames")
    try:
        pixels = pixel_array(header, index=0)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        raise ImportError(
            f"{path} cannot be decoded ({' '.join(str(error).split())}). Try: pip install 'matex_pl[dicom]'."
        ) from error
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
    if pixels.ndim == 3:
        return _stretch(pixels @ np.array([0.299, 0.587, 0.114]), 0, float(np.iinfo(pixels.dtype).max))
    levels = _windowed(apply_modality_lut(pixels, _with_modality(header)), header)
    return 1 - levels if kind == "MONOCHROME1" else levels


def warn_if_several(path: Path, number: int, kind: str) -> None:
    """Warn if a file holds more than one image of a `kind`, "frames" or "pages"."""
    if number > 1:
        # In all processes, not only in the first: each reads other images.
        warnings.warn(f"{path} has {number} {kind}. Only the first is used.", stacklevel=2)


def _with_modality(header: Dataset) -> Dataset:
    """The header with an empty slope as 1, an empty intercept as 0, and without an empty modality table."""
    if "RescaleSlope" in header or "RescaleIntercept" in header:
        header.RescaleSlope = _first(header, "RescaleSlope") or 1
        header.RescaleIntercept = _first(header, "RescaleIntercept") or 0
    if "ModalityLUTSequence" in header and _table(header, "ModalityLUTSequence") is None:
        del header.ModalityLUTSequence
    return header


def _windowed(values: np.ndarray, header: Dataset) -> np.ndarray:
    """Values after the VOI table or window of the file, in [0, 1] of its range."""
    from pydicom.pixels import apply_voi, apply_windowing

    table = _table(header, "VOILUTSequence")
    if table is not None:
        count, first = table.LUTDescriptor[0] or 2**16, table.LUTDescriptor[1]
        entries = apply_voi(np.arange(first, first + count), header)
        levels = entries[np.rint(values).clip(first, first + count - 1).astype(np.int64) - first]
        # Over the bits that the entries need: the declared bits are often wrong, and viewers do not rely on them.
        return _stretch(levels, 0, 2.0 ** int(entries.max()).bit_length() - 1)
    if _has_window(header):
        # Values far outside the window give the ends of its range.
        with np.errstate(over="ignore"):
            low, high = apply_windowing(np.array([-_LARGE, _LARGE]), header)
            return _stretch(apply_windowing(values, header), low, high)
    return _stretch(values, float(values.min()), float(values.max()))


def _has_window(header: Dataset) -> bool:
    """Whether there is a usable window; sets its function if that is missing."""
    center, width = _first(header, "WindowCenter"), _first(header, "WindowWidth")
    if center is None or width is None:
        return False
    header.VOILUTFunction = _first(header, "VOILUTFunction") or "LINEAR"
    least = 1 if header.VOILUTFunction == "LINEAR" else _SMALL
    return math.isfinite(center) and least <= width < math.inf


def _table(header: Dataset, name: str) -> Dataset | None:
    """First table of a sequence; None if it is missing or empty."""
    table = _first(header, name)
    if table is None or not table.get("LUTDescriptor") or not table.get("LUTData"):
        return None
    # This only sets the type that pydicom (3.0) uses for the entries. Its type for 8 bits is too small for the indices
    # of the table, and it has no type for 12 bits.
    table.LUTDescriptor[2] = 16
    return table


def _first(header: Dataset, name: str) -> Any:
    """First value of a tag; None if it is missing or empty."""
    value = header.get(name)
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    return None if value == "" else value


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # With a negative slope, the range of a window runs downwards.
    if high == low:
        return np.zeros(values.shape, dtype=np.float32)
    return ((values - low) / (high - low)).clip(0, 1).astype(np.float32)


def _pydicom(path: Path) -> ModuleType:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"{path} is DICOM, which needs pydicom: pip install 'matex_pl[dicom]'.") from error
    return pydicom
