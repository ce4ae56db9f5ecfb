"""DICOM films as they are meant to be seen: the only file that knows pydicom."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

_PREAMBLE = 128
_LARGE = 1e12


def is_dicom(path: Path) -> bool:
    """Whether the file says that it is DICOM, by its mark or its name."""
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def read_dicom_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header.

    Raises:
        ImportError: pydicom is not installed.
    """
    header = _pydicom(path).dcmread(path, stop_before_pixels=True)
    return int(header.Rows), int(header.Columns)


def read_dicom(path: Path) -> np.ndarray:
    """Levels of the first frame, `(h, w)` float32 in [0, 1], bright where the film is.

    Rescale or modality table, then the first VOI table or window, over whose range the levels go; without either from
    the darkest to the brightest pixel. MONOCHROME1, whose low values are bright, is inverted.

    Raises:
        ImportError: pydicom, or the codec of a compressed file, is not installed.
    """
    pydicom = _pydicom(path)
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = pydicom.dcmread(path)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        rank_zero_warn(f"{path} has {frames} frames; the first one is taken.")
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
    levels = _windowed(apply_modality_lut(pixels, header), header)
    return 1 - levels if kind == "MONOCHROME1" else levels


def _windowed(values: np.ndarray, header: object) -> np.ndarray:
    """Values after the VOI table or window of the file, in [0, 1] of its range."""
    from pydicom.pixels import apply_voi, apply_windowing

    if "VOILUTSequence" in header:  # type: ignore[operator]
        bits = header.VOILUTSequence[0].LUTDescriptor[2]  # type: ignore[attr-defined]
        return _stretch(apply_voi(values, header), 0, 2.0**bits - 1)  # type: ignore[arg-type]
    if "WindowCenter" in header and "WindowWidth" in header:  # type: ignore[operator]
        # What the window makes of values far outside of it is the range it maps to.
        low, high = apply_windowing(np.array([-_LARGE, _LARGE]), header)  # type: ignore[arg-type]
        return _stretch(apply_windowing(values, header), low, high)  # type: ignore[arg-type]
    return _stretch(values, float(values.min()), float(values.max()))


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return ((values - low) / (high - low)).clip(0, 1).astype(np.float32)


def _pydicom(path: Path) -> ModuleType:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"{path} is DICOM, which needs pydicom: pip install 'matex_pl[dicom]'.") from error
    return pydicom
