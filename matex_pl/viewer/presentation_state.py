"""Outlines and boxes of a map as a presentation state. Importing this file needs the extra `dicom`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from contourpy import contour_generator
from highdicom import PresentationLUTTransformation
from highdicom.color import CIELabColor
from highdicom.content import ModalityLUTTransformation
from highdicom.pr import (
    GraphicAnnotation,
    GraphicLayer,
    GraphicObject,
    GrayscaleSoftcopyPresentationState,
    SoftcopyVOILUTTransformation,
    TextObject,
)
from pydicom.dataset import Dataset

from matex_pl.data.dicom import Display, read_display
from matex_pl.viewer.placed import RESEARCH, PlacedMap, shorten
from matex_pl.viewer.source import Source, attach, new_equipment, new_ids

# Largest distance in pixels between an outline and the level of the map.
_TOLERANCE = 0.25
# Explicit lengths of 16 bits hold this many points.
_MOST_POINTS = 8000


def presentation_state(
    source: Source, placed: PlacedMap, series: str, number: int = 1
) -> GrayscaleSoftcopyPresentationState:
    """Outlines of a map, its boxes and its phrase over the image, which is shown as this package reads it.

    Outlines and boxes are polylines in pixels of the image, in a layer each.

    Args:
        source: The image.
        placed: The map.
        series: UID of the new series.
        number: Number of the instance in the series.
    """
    text = shorten(
        f"{placed.phrase} | {placed.method}, cos {placed.score:.2f}, {placed.level_text} | {RESEARCH}.", 1024
    )
    # Colors of CIELab: cyan for outlines, yellow for boxes.
    layers = [
        GraphicLayer("OUTLINES", 1, "Outlines of the map", CIELabColor(90, -50, -10)),
        GraphicLayer("BOXES", 2, "Boxes of the map", CIELabColor(92, -10, 80)),
        GraphicLayer("PHRASE", 3, "Phrase and method", CIELabColor(95, 0, 0)),
    ]
    graphics = (list(outlines(placed)), list(_box_lines(placed)))
    annotations = [
        GraphicAnnotation([source.reference], layer, graphic_objects=[_polyline(line) for line in lines])
        for layer, lines in zip(layers, graphics, strict=False)
        if lines
    ]
    annotations.append(
        GraphicAnnotation(
            [source.reference],
            layers[2],
            text_objects=[TextObject(text, "DISPLAY", bounding_box=(0.01, 0.9, 0.99, 0.99), text_justification="LEFT")],
        )
    )
    display = read_display(source.path)
    item = GrayscaleSoftcopyPresentationState(
        [source.reference],
        content_label="MATEX",
        content_description=placed.text(64),
        graphic_layers=layers,
        graphic_annotations=annotations,
        modality_lut_transformation=ModalityLUTTransformation(
            rescale_intercept=display.intercept, rescale_slope=display.slope, rescale_type="US"
        ),
        voi_lut_transformations=[
            SoftcopyVOILUTTransformation(
                window_center=display.center, window_width=display.width, voi_lut_function=display.function
            )
        ],
        presentation_lut_transformation=PresentationLUTTransformation(
            presentation_lut_shape="INVERSE" if display.is_inverted else "IDENTITY"
        ),
        **new_ids("gsps", series, number),
        **new_equipment(),
    )
    _copy_tables(item, display)
    _set_area(item, source.header)
    attach(item, source, placed.text(64))
    return item


def outlines(placed: PlacedMap) -> Iterator[np.ndarray]:
    """Closed outlines of the map at the threshold, `(N, 2)` x, y in pixels of the image from its upper left corner.

    The outlines are within a quarter of a pixel of the map's level between its pixels. Long ones come in parts.
    """
    height, width = placed.heat.shape
    # A margin of 0 closes the outlines at the borders of the image.
    field = np.pad(placed.heat, 1)
    for line in contour_generator(z=field, name="serial").lines(placed.threshold):
        # Pixels have their centers at halves, behind a margin of one pixel.
        line = (np.asarray(line) - 0.5).clip(0, (width, height)).astype(np.float32)
        # The first point returns at the end.
        short = cv2.approxPolyDP(line[:-1, None], _TOLERANCE, True)[:, 0]
        if len(short) > 2:
            closed = np.concatenate([short, short[:1]]).astype(np.float64)
            for start in range(0, len(closed) - 1, _MOST_POINTS - 1):
                yield closed[start : start + _MOST_POINTS]


def _box_lines(placed: PlacedMap) -> Iterator[np.ndarray]:
    """Closed outlines `(5, 2)` of the boxes."""
    for x0, y0, x1, y1 in placed.boxes:
        yield np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])


def _polyline(line: np.ndarray) -> GraphicObject:
    return GraphicObject("POLYLINE", line, "PIXEL")


def _copy_tables(item: Any, display: Display) -> None:
    """Replace rescale and window by the tables of the image, if it has them."""
    if display.modality_table is not None:
        item.ModalityLUTSequence = [copy.deepcopy(display.modality_table)]
        del item.RescaleSlope, item.RescaleIntercept, item.RescaleType
    if display.voi_table is not None:
        item.SoftcopyVOILUTSequence[0].VOILUTSequence = [copy.deepcopy(display.voi_table)]
        del item.SoftcopyVOILUTSequence[0].WindowCenter, item.SoftcopyVOILUTSequence[0].WindowWidth
        item.SoftcopyVOILUTSequence[0].pop("VOILUTFunction", None)


def _set_area(item: Any, header: Dataset) -> None:
    """Show the whole image, with pixels as high and wide as in the image."""
    area = item.DisplayedAreaSelectionSequence[0]
    # Only for tiled images.
    area.pop("PixelOriginInterpretation", None)
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    if spacing and len(spacing) == 2:
        area.PresentationPixelSpacing = list(spacing)
        del area.PresentationPixelAspectRatio
    elif header.get("PixelAspectRatio"):
        area.PresentationPixelAspectRatio = list(header.PixelAspectRatio)
