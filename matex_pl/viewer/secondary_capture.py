"""A map over its image as an RGB Secondary Capture. Importing this file needs the extra `dicom`."""

from __future__ import annotations

import textwrap

import numpy as np
from highdicom.content import ReferencedImageSequence
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from matex_pl.data.images import read_image
from matex_pl.viewer.placed import RESEARCH, PlacedMap, shorten
from matex_pl.viewer.source import Source, attach, new_equipment, new_ids
from matex_pl.visualization.draw import (
    BOX_COLOR,
    FAINT_INK,
    INK,
    Color,
    Picture,
    blank_picture,
    cut,
    draw_color_bar,
    font,
    overlay,
    paste,
    single_line,
)

# A text of the band has at least 14 pixels, and about 70 characters in a line of a wide image.
_SMALLEST_TEXT = 14
_LINES = 3
# Elements by which viewers measure: the pixels of the image keep their place and size.
_GEOMETRY = (
    "PixelSpacing",
    "PixelSpacingCalibrationType",
    "PixelSpacingCalibrationDescription",
    "ImagerPixelSpacing",
    "PixelAspectRatio",
)


def secondary_capture(source: Source, placed: PlacedMap, series: str, number: int = 1) -> SCImage:
    """The image under its map as an RGB image of the same study; see `burned_in` for its pixels.

    Args:
        source: The image.
        placed: The map.
        series: UID of the new series.
        number: Number of the instance in the series.
    """
    item = SCImage.from_ref_dataset(
        source.reference,
        burned_in(read_image(source.path).pixels, placed),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        # An orientation is required here. `attach` replaces it by that of the image.
        patient_orientation=("L", "F"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **new_ids("sc", series, number),
        **new_equipment(),
    )
    for name in _GEOMETRY:
        if name in source.header:
            item[name] = source.header[name]
    # Made on a workstation.
    item.ConversionType = "WSD"
    item.BurnedInAnnotation = "YES"
    item.RecognizableVisualFeatures = "NO"
    item.DerivationDescription = shorten(
        f"Attribution map over the image. {RESEARCH}. {placed.method}, cosine {placed.score:.3f}. Phrase: "
        f"{placed.phrase} Settings: {placed.settings_text}",
        1024,
    )
    item.SourceImageSequence = _source_images(source.reference)
    attach(item, source, placed.text(64))
    return item


def burned_in(image: Picture, placed: PlacedMap) -> Picture:
    """The map over an image, with a band of text below, `(H, W, 3)` uint8; the image is its upper left corner.

    The band has the phrase, the method and the score, the colors of the map, and a warning. No text covers the image.

    Args:
        image: `(h, w)` uint8 gray levels, low is dark.
        placed: The map.
    """
    height, width = image.shape
    size = max(round(width / 44), _SMALLEST_TEXT)
    margin, step = size // 2, round(size * 1.4)
    # Narrow images get a wider band.
    full_width = max(width, size * 22)
    room = full_width - 2 * margin
    text = single_line(placed.phrase)
    # Letters have different widths: lines are wrapped by the mean of this text, and cut if they are wider.
    letters = int(0.95 * room * len(text) / font(size).getlength(text))
    phrase = [cut(line, room, size) for line in textwrap.wrap(text, letters, max_lines=_LINES, placeholder="...")]
    method = cut(single_line(f"{placed.method}, cos {placed.score:.2f}"), room - 8 * size, size)
    lines: list[tuple[str, Color]] = [(line, INK) for line in phrase]
    lines += [(method, FAINT_INK), (f"matex_pl. {RESEARCH}.", BOX_COLOR)]
    canvas = blank_picture(height + 2 * margin + step * len(lines), full_width)
    paste(canvas, overlay(np.repeat(image[..., None], 3, axis=2), placed.heat), 0, 0)
    bar = (full_width - 6 * size - margin, height + margin + step * len(phrase) + size // 4)
    draw_color_bar(canvas, bar, (4 * size, size // 2))
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for place, (line, ink) in enumerate(lines):
        draw.text((margin, height + margin + step * place + size), line, ink, font(size), anchor="ls")
    for text, x, anchor in (("0", bar[0] - size // 2, "rm"), ("1", bar[0] + 4 * size + size // 2, "lm")):
        draw.text((x, bar[1] + size // 4), text, FAINT_INK, font(max(size * 3 // 4, 10)), anchor=anchor)
    return np.array(picture)


def _source_images(reference: Dataset) -> list[Dataset]:
    """Reference to the image from which the picture is made."""
    items = []
    for item in ReferencedImageSequence([reference]):
        item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
        items.append(item)
    return items
