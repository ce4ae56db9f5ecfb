"""Time and memory of reading one gray image of 15 megapixels, by the format of its file.

    python benchmarks/formats.py

Prints a Markdown table: CPU milliseconds at full size and for a model, the best of several rounds, and the megabytes
that a process takes in addition, after a small image of the same format. Each format has a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from jsonargparse import auto_cli
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import set_pixel_data

WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}
# In the process of one format: a small file, the large file, and the number of rounds.
MEASURE = """
import re, sys, time, warnings
from pathlib import Path
import cv2
from matex_pl.data.images import read_image

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

def seconds(target):
    start = time.process_time()
    read_image(sys.argv[2], target)
    return time.process_time() - start

cv2.setNumThreads(1)
warnings.simplefilter("ignore")
model = lambda size: (224, 182)
read_image(sys.argv[1], model)
# The peak begins again.
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
seconds(model)
peak = memory("VmHWM") - before
print(*(1e3 * min(seconds(target) for _ in range(int(sys.argv[3]))) for target in (None, model)), peak)
"""


def _dicom(path: Path, pixels: np.ndarray, syntax: str | None = None, stream: bytes | None = None, **tags: Any) -> None:
    """Write a DICOM file, with a stream as its pixels, or compressed by pydicom."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    header.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    kind = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    set_pixel_data(header, pixels, kind, min(12, 8 * pixels.itemsize))
    for name, value in tags.items():
        setattr(header, name, value)
    if stream is not None:
        header.PixelData = encapsulate([stream])
        header["PixelData"].VR = "OB"
        header.file_meta.TransferSyntaxUID = syntax
    elif syntax is not None:
        header.compress(syntax)
    header.save_as(path, enforce_file_format=True)


def draw(height: int, width: int) -> np.ndarray:
    """Smooth spots with some grain, of 12 bits: `(height, width)` uint16."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.normal(size=(60, 50)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(2000 + 400 * smooth, 0, 4064).astype(np.uint16) + rng.integers(
        32, size=smooth.shape, dtype=np.uint16
    )


def _gray(deep: np.ndarray) -> np.ndarray:
    return (deep >> 4).astype(np.uint8)


def _colors(pixels: np.ndarray) -> np.ndarray:
    return np.stack([pixels] * 3, -1)


def _png(path: Path, pixels: np.ndarray) -> None:
    cv2.imencode(".png", pixels)[1].tofile(path)


def _jpeg_12(deep: np.ndarray) -> bytes:
    return imagecodecs.jpeg_encode(deep, bitspersample=12, level=95)


def _lossless(deep: np.ndarray) -> bytes:
    return imagecodecs.jpeg_encode(deep, lossless=True, predictor=1)


# Functions that write an image of 12 bits to a path.
WRITERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "PNG, 8 bits": lambda path, deep: _png(path, _gray(deep)),
    "PNG, 16 bits": _png,
    "PNG, 8 bits, RGB with opacity": lambda path, deep: _png(path, np.stack([_gray(deep)] * 4, -1)),
    "JPEG, 8 bits": lambda path, deep: Image.fromarray(_gray(deep)).save(path, "JPEG", quality=95),
    "JPEG, 12 bits": lambda path, deep: path.write_bytes(_jpeg_12(deep)),
    "JPEG, lossless, 16 bits": lambda path, deep: path.write_bytes(_lossless(deep)),
    "JPEG-LS, 16 bits": lambda path, deep: path.write_bytes(imagecodecs.jpegls_encode(deep)),
    "TIFF, 8 bits": lambda path, deep: tifffile.imwrite(path, _gray(deep)),
    "TIFF, 16 bits": lambda path, deep: tifffile.imwrite(path, deep),
    "TIFF, 16 bits, RGB": lambda path, deep: tifffile.imwrite(path, _colors(deep), photometric="rgb"),
    "TIFF, 16 bits, RGB, LZW": lambda path, deep: tifffile.imwrite(
        path, _colors(deep), photometric="rgb", compression="lzw", rowsperstrip=64
    ),
    "TIFF, float32": lambda path, deep: tifffile.imwrite(path, deep.astype(np.float32)),
    "TIFF, float64": lambda path, deep: tifffile.imwrite(path, deep.astype(np.float64)),
    "TIFF, float64, tiles": lambda path, deep: tifffile.imwrite(path, deep.astype(np.float64), tile=(256, 256)),
    "DICOM": _dicom,
    "DICOM, window": lambda path, deep: _dicom(path, deep, **WINDOW),
    "DICOM, padding": lambda path, deep: _dicom(path, deep, PixelPaddingValue=0),
    "DICOM, 8 bits, RGB": lambda path, deep: _dicom(path, _colors(_gray(deep))),
    "DICOM, 12 bits, RGB": lambda path, deep: _dicom(path, _colors(deep)),
    "DICOM, RLE": lambda path, deep: _dicom(path, deep, uid.RLELossless),
    "DICOM, JPEG Extended": lambda path, deep: _dicom(path, deep, uid.JPEGExtended12Bit, _jpeg_12(deep)),
    "DICOM, lossless JPEG": lambda path, deep: _dicom(path, deep, uid.JPEGLosslessSV1, _lossless(deep)),
    "DICOM, lossless JPEG, window": lambda path, deep: _dicom(
        path, deep, uid.JPEGLosslessSV1, _lossless(deep), **WINDOW
    ),
    "DICOM, JPEG-LS": lambda path, deep: _dicom(path, deep, uid.JPEGLSLossless, imagecodecs.jpegls_encode(deep)),
    "DICOM, JPEG 2000": lambda path, deep: _dicom(
        path, deep, uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(deep, reversible=True)
    ),
}


def measure(name: str, folder: Path, height: int, width: int, rounds: int) -> list[float]:
    """CPU milliseconds at full size and for a model, and megabytes, of a format."""
    paths = [str(folder / size) for size in ("small", "large")]
    for path, size in zip(paths, ((300, 200), (height, width)), strict=True):
        WRITERS[name](Path(path), draw(*size))
    command = [sys.executable, "-c", MEASURE, *paths, str(rounds)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(value) for value in found.stdout.split()]


def main(height: int = 4300, width: int = 3500, rounds: int = 5, only: str = "") -> None:
    """Print the table.

    Args:
        height: Rows of the large image.
        width: Its columns.
        rounds: Number of readings of each kind; the best counts.
        only: Regular expression of the formats to measure; all by default.
    """
    print("| format | full size, ms | for a model, ms | memory, MB |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for name in WRITERS:
            if re.search(only, name):
                values = measure(name, Path(folder), height, width, rounds)
                print(f"| {name} | {' | '.join(f'{value:.0f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
