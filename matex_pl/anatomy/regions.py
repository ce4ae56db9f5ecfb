"""The anatomical regions that a phrase can name, as boxes on the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matex_pl.files import read_yaml

SIDES = ("right", "left", "midline")


@dataclass(frozen=True, order=True)
class Region:
    """One anatomical region on a frontal image.

    Args:
        side: The patient's `right` or `left`, or `midline`.
        zone: Zone as in `regions.yaml`: `upper`, `lower`, `hilar`, `cardiac`, and others.
        box: `(u0, v0, u1, v1)` as fractions of the image, in [0, 1], u from the patient's right, v downwards.
    """

    side: str
    zone: str
    box: tuple[float, float, float, float]


RegionTable = Mapping[str, Mapping[str, Region]]


def load_regions(path: str | Path | None = None) -> RegionTable:
    """Regions by zone and side, from a YAML file in the layout of the shipped `regions.yaml`, which is the default.

    Raises:
        ValueError: The file is no YAML, a side is unknown, or a box is not `[u0, v0, u1, v1]` with u0 < u1 and
            v0 < v1 within [0, 1].
    """
    path = Path(__file__).with_name("regions.yaml") if path is None else Path(path)
    table = read_yaml(path)
    if not all(isinstance(sides, dict) for sides in table.values()):
        raise ValueError(
            f"{path} is no table of regions. Map zone -> side -> [u0, v0, u1, v1], as in regions.yaml of the package."
        )
    return {
        str(zone): {side: Region(side, str(zone), _checked(path, zone, side, box)) for side, box in sides.items()}
        for zone, sides in table.items()
    }


@cache
def shipped_regions() -> RegionTable:
    """The package's own table of regions, read once."""
    return load_regions()


def _checked(path: Path, zone: str, side: str, box: object) -> tuple[float, float, float, float]:
    if side not in SIDES:
        raise ValueError(f"{path}: The side of {zone!r} must be one of {', '.join(SIDES)}, got {side!r}.")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, (int, float)) for edge in box):
        raise ValueError(f"{path}: The box of {side} {zone} must be four numbers [u0, v0, u1, v1], got {box!r}.")
    u0, v0, u1, v1 = map(float, box)
    if not (0 <= u0 < u1 <= 1 and 0 <= v0 < v1 <= 1):
        raise ValueError(
            f"{path}: The box of {side} {zone} needs 0 <= u0 < u1 <= 1 and 0 <= v0 < v1 <= 1, got {box!r}."
        )
    return u0, v0, u1, v1
