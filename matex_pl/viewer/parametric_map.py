"""A map as a Parametric Map. Importing this file needs the extra `dicom`."""

from __future__ import annotations

import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from pydicom.sr.codedict import codes

from matex_pl.viewer.placed import RESEARCH, PlacedMap, shorten
from matex_pl.viewer.source import Source, attach, new_equipment, new_ids

_HIGHEST = 2**16 - 1


def parametric_map(source: Source, placed: PlacedMap, series: str, number: int = 1) -> ParametricMap:
    """A map in 16 bits as real-world values of the quantity (130402, DCM, "Class activation"), without a unit.

    Args:
        source: The image, which must have a frame of reference.
        placed: The map.
        series: UID of the new series.
        number: Number of the instance in the series.
    """
    mapping = RealWorldValueMapping(
        "MATEX",
        shorten(f"Relevance for {placed.phrase}", 64),
        unit=codes.UCUM.NoUnits,
        value_range=(0, _HIGHEST),
        intercept=0,
        slope=1 / _HIGHEST,
        quantity_definition=codes.DCM.ClassActivation,
    )
    item = ParametricMap(
        [source.reference],
        np.rint(placed.heat * _HIGHEST).astype(np.uint16),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[VOILUTTransformation(window_center=(_HIGHEST + 1) / 2, window_width=_HIGHEST + 1)],
        content_label="MATEX",
        content_description=placed.text(64),
        **new_ids("pm", series, number),
        **new_equipment(),
    )
    item.DerivationDescription = shorten(
        f"{placed.method}: {placed.phrase} {RESEARCH}. Settings: {placed.settings_text}", 1024
    )
    attach(item, source, placed.text(64))
    return item
