"""A map as a fractional Segmentation. Importing this file needs the extra `dicom`."""

from __future__ import annotations

from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes

from matex_pl.viewer.placed import RESEARCH, PlacedMap, shorten
from matex_pl.viewer.source import Source, attach, new_equipment, new_ids


def segmentation(source: Source, placed: PlacedMap, series: str, number: int = 1) -> Segmentation:
    """A map in 255 levels over all pixels of its image, as one segment: (130402, DCM, "Class activation").

    The fractional type is PROBABILITY, the nearer of the two that exist. The values are no probabilities: 1 is the
    strongest place of the map.

    Args:
        source: The image.
        placed: The map.
        series: UID of the new series.
        number: Number of the instance in the series.
    """
    algorithm = AlgorithmIdentificationSequence(
        name=shorten(placed.method, 64),
        family=codes.DCM.ArtificialIntelligence,
        version=new_equipment()["software_versions"],
    )
    segment = SegmentDescription(
        1,
        shorten(placed.phrase, 64),
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.DCM.ClassActivation,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )
    segment.SegmentDescription = shorten(
        f"Relevance for {placed.phrase!r}, no probability. {RESEARCH}. Settings: {placed.settings_text}", 1024
    )
    item = Segmentation(
        [source.reference],
        # One image, one segment.
        placed.heat[None, ..., None],
        "FRACTIONAL",
        [segment],
        content_label="MATEX",
        content_description=placed.text(64),
        omit_empty_frames=False,
        **new_ids("seg", series, number),
        **new_equipment(),
    )
    attach(item, source, placed.text(64))
    return item
