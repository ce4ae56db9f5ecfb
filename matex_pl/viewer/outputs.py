"""The files of one map for other programs: checks before the model is loaded, and writing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matex_pl.files import check_output
from matex_pl.viewer.arrays import save_arrays
from matex_pl.viewer.objects import check_objects, dicom_kinds, save_objects
from matex_pl.viewer.placed import PlacedMap
from matex_pl.viewer.source import DicomKind, Source, read_source

MAP_SUFFIXES = (".dcm", ".npz")
"""Ends of the names of such files."""


@dataclass(frozen=True)
class MapFiles:
    """Checked files of one map: an `.npz` file, or DICOM objects next to each other.

    Args:
        path: File of the arrays, or of the Secondary Capture.
        kinds: Kinds of the DICOM objects; none for arrays.
        source: The DICOM image; None for arrays.
    """

    path: Path
    kinds: tuple[DicomKind, ...] = ()
    source: Source | None = None

    def save(self, placed: PlacedMap) -> Path:
        """Write the files and return the path of the first."""
        if self.source is None:
            return save_arrays(self.path, placed)
        return save_objects(self.source, [placed], [self.path], self.kinds)[0]


def check_map_files(out: str | Path, image: str, dicom: str | None = None) -> MapFiles:
    """The files of one map, checked before the work.

    Args:
        out: Path that ends in `.dcm` or `.npz`.
        image: File of the image.
        dicom: Kinds of DICOM objects as a list with commas: `sc`, `gsps`, `seg`, `pm`.

    Raises:
        ImportError: The extra `dicom` is not installed.
        OSError: Nothing can be written in the folder.
        ValueError: A kind does not exist or does not fit, the image cannot carry DICOM objects, or a file would replace
            something else than an earlier output.
    """
    path = Path(out)
    if path.suffix.lower() == ".npz":
        check_output(path, inputs=(image,))
        return MapFiles(path)
    kinds = dicom_kinds(dicom)
    check_objects(path, kinds, inputs=(image,))
    return MapFiles(path, kinds, read_source(image, kinds))
