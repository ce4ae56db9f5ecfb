"""DICOM objects of one image and its maps: which ones, under which names, and their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from matex_pl.arguments import check_choice
from matex_pl.files import check_output, whole_file
from matex_pl.viewer.placed import PlacedMap
from matex_pl.viewer.source import DicomKind, Source

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def dicom_kinds(text: str | None) -> tuple[DicomKind, ...]:
    """Kinds of objects from a list with commas; always with `sc`, which comes first.

    Raises:
        ValueError: A kind does not exist.
    """
    names = [name.strip() for name in (text or "sc").split(",")]
    for name in names:
        check_choice("--dicom", name, get_args(DicomKind))
    kinds: tuple[DicomKind, ...] = get_args(DicomKind)
    return tuple(kind for kind in kinds if kind == "sc" or kind in names)


def object_paths(path: Path, kinds: Iterable[DicomKind]) -> dict[DicomKind, Path]:
    """Files of the objects of one map: `map.dcm` of the Secondary Capture, `map.gsps.dcm` and so on."""
    return {kind: path if kind == "sc" else path.with_suffix(f".{kind}.dcm") for kind in kinds}


def check_objects(path: Path, kinds: Iterable[DicomKind], inputs: Iterable[str | Path | None] = ()) -> None:
    """`check_output` for the files of one map."""
    inputs = list(inputs)
    for place in object_paths(path, kinds).values():
        check_output(place, inputs=inputs)


def save_objects(
    source: Source, maps: Iterable[PlacedMap], paths: Sequence[Path], kinds: Sequence[DicomKind]
) -> list[Path]:
    """Write the DICOM objects of the maps of one image; each kind is one new series, with a new instance per map.

    Args:
        source: The image, checked for these kinds.
        maps: Maps of the image.
        paths: File of the Secondary Capture of each map; the other kinds are named after it, see `object_paths`.
        kinds: Kinds of the objects.

    Returns:
        Paths of all files, map by map.
    """
    from highdicom import UID

    series = {kind: str(UID()) for kind in kinds}
    written = []
    for number, (placed, path) in enumerate(zip(maps, paths, strict=True), start=1):
        items = [_make(kind, source, placed, series[kind], number) for kind in kinds]
        for item, place in zip(items, object_paths(path, kinds).values(), strict=True):
            with whole_file(place) as part:
                item.save_as(part, enforce_file_format=True)
            written.append(place)
    return written


def _make(kind: DicomKind, source: Source, placed: PlacedMap, series: str, number: int) -> Dataset:
    """New object of a kind."""
    if kind == "sc":
        from matex_pl.viewer.secondary_capture import secondary_capture

        return secondary_capture(source, placed, series, number)
    if kind == "gsps":
        from matex_pl.viewer.presentation_state import presentation_state

        return presentation_state(source, placed, series, number)
    if kind == "seg":
        from matex_pl.viewer.segmentation import segmentation

        return segmentation(source, placed, series, number)
    from matex_pl.viewer.parametric_map import parametric_map

    return parametric_map(source, placed, series, number)
