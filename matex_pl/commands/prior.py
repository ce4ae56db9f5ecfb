"""`matex prior`: the regions that a phrase names, and their spatial prior M."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matex_pl.anatomy.parser import ParsedPhrase, parse_phrase
from matex_pl.anatomy.prior import Laterality, PriorShape, prior_array
from matex_pl.anatomy.regions import Region, load_regions
from matex_pl.commands.options import RefusingParser, call_parsed
from matex_pl.console import text_table
from matex_pl.data.phantom.thorax import (
    SIDES,
    airway_outlines,
    body_outline,
    heart_outline,
    lung_outline,
    mediastinum_outlines,
    sample_build,
)
from matex_pl.files import check_output
from matex_pl.visualization.draw import save_png, single_line
from matex_pl.visualization.prior import SIDE, marked_runs, prior_panel

Box = tuple[float, float, float, float]
_MIRRORED = "; laterality paper: map and boxes are mirrored, R and L are not"
# Index of the chest nearest to the mean of the phantom's first 4,000 chests.
_AVERAGE_BUILD = 1857


def main(words: Sequence[str]) -> None:
    """`matex prior PHRASE`: print how the phrase is parsed, and draw its spatial prior."""
    parser = RefusingParser(
        prog="matex prior", description="Print the regions that a phrase names, and draw their spatial prior M."
    )
    parser.add_function_arguments(show_prior, as_positional=True)
    print(call_parsed(parser, show_prior, words))


def show_prior(
    phrase: str,
    out: str = "prior.png",
    laterality: Laterality = "patient",
    prior_shape: PriorShape = "parabola",
    lambda_s: float = 2.5,
    regions: str | None = None,
    *,
    knowledge_prior: bool = False,
) -> str:
    """Draw the spatial prior M of a phrase over the outline of a chest, and describe how the phrase was parsed.

    Args:
        phrase: Sentence or report, e.g. "Left lower lobe consolidation."
        out: Path of the picture, a PNG.
        laterality: `patient` puts the patient's right on the left of the image; `paper` mirrors the map, as the paper
            prints it.
        prior_shape: Falloff of M inside a box: `parabola`, `gaussian` or `plateau`.
        lambda_s: Maximum of M, at least 1; 1 switches the prior off.
        regions: YAML file with custom boxes, in the layout of the package's `anatomy/regions.yaml`.
        knowledge_prior: Whether a finding without a named place gets its usual place ("edema": both hila).

    Returns:
        Text on how the phrase was parsed, with the path of the picture in the last line.

    Raises:
        OSError: `regions` cannot be read, or `out` cannot be written.
        ValueError: An argument is out of range, `regions` is no table of regions, or `out` would replace something else
            than an earlier picture.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {out!r}.")
    check_output(path, inputs=(regions,))
    # `prior_array` rejects values below 1. With infinity, pixels outside of the boxes would be 0 * inf.
    if math.isinf(lambda_s):
        raise ValueError(f"lambda_s must be finite, got {lambda_s}.")
    table = None if regions is None else load_regions(regions)
    parsed = parse_phrase(phrase, table, knowledge_prior=knowledge_prior)
    if not parsed.regions:
        level = "M is 1 everywhere: the phrase names no region"
    else:
        level = "M is 1 everywhere: lambda_s is 1" if lambda_s == 1 else f"M runs from 1 to {lambda_s:g}"
    keys = [(parsed.spans, "highlighted: names a region"), (parsed.ignored, "struck through: ignored")]
    named = sorted(parsed.regions)
    prior = prior_array(named, (SIDE, SIDE), lambda_s=lambda_s, shape=prior_shape, laterality=laterality)
    picture = prior_panel(
        prior=prior,
        lambda_s=lambda_s,
        boxes=[on_image(region.box, laterality) for region in named],
        names=[region_name(region) for region in named],
        phrase=phrase,
        naming=parsed.spans,
        ignored=[span for span, _ in parsed.ignored],
        subtitle=f"{level}; {prior_shape}" + _MIRRORED * (laterality == "paper"),
        caption="; ".join(["schematic outline, not an image", *(text for spans, text in keys if spans)]),
        chest=_chest(),
    )
    save_png(path, picture)
    read = [_marked(phrase, parsed), _regions(named, laterality), _ignored(phrase, parsed)]
    return "\n\n".join([*read, f"{level}.", str(path)])


def _chest() -> dict[str, list[NDArray[np.float64]]]:
    """Outlines of a chest of average build, upright in the middle of the image, for `prior_panel`."""
    build = sample_build(np.random.default_rng(_AVERAGE_BUILD))
    outlines = {
        "body": [body_outline(build, shoulder=0.08)],
        "lungs": [lung_outline(build, side) for side in SIDES],
        "mediastinum": mediastinum_outlines(build),
        "airways": airway_outlines(build),
        "heart": [heart_outline(build)],
    }
    # In the body's frame the midline is at 0.
    midline = np.array([0.5, 0.0])
    return {part: [curve + midline for curve in curves] for part, curves in outlines.items()}


def on_image(box: Box, laterality: str) -> Box:
    """`(x0, y0, x1, y1)` of a region's box on the image, x to the right: mirrored under `paper`."""
    u0, v0, u1, v1 = box
    return box if laterality == "patient" else (1 - u1, v0, 1 - u0, v1)


def region_name(region: Region) -> str:
    """Name of a region in a radiologist's words: "left lower", "right middle lobe", "cardiac", "left side"."""
    zone = "side" if region.zone == "whole" else single_line(region.zone.replace("_", " "))
    return zone if region.side == "midline" else f"{region.side} {zone}"


def _marked(phrase: str, parsed: ParsedPhrase) -> str:
    """The phrase in one line, with brackets around the words that name regions."""
    runs = marked_runs(phrase, parsed.spans, ())
    line = single_line("".join(f"[{run}]" if mark else run for run, mark in runs))
    if not line:
        return "Phrase: empty"
    return f"Phrase{', with brackets around words that name a region' * bool(parsed.spans)}:\n  {line}"


def _regions(named: Sequence[Region], laterality: str) -> str:
    """Table of the regions: side, zone, x and y on the image, and the position in words ("right, full height")."""
    if not named:
        return "Regions: none"
    rows = [("side", "zone", "x", "y", "on the image")]
    for region in named:
        x0, y0, x1, y1 = on_image(region.box, laterality)
        across = _third((x0 + x1) / 2, "left", "right") if x1 - x0 < 0.9 else "full width"
        down = _third((y0 + y1) / 2, "top", "bottom") if y1 - y0 < 0.9 else "full height"
        x, y = f"{x0:.2f} to {x1:.2f}", f"{y0:.2f} to {y1:.2f}"
        rows.append((region.side, single_line(region.zone), x, y, f"{across}, {down}"))
    head = "Regions by the patient's side, with x to the right and y down as fractions of the image"
    if laterality == "paper":
        head += " (laterality paper: mirrored)"
    return "\n  ".join([f"{head}:", *text_table(rows)])


def _third(position: float, low: str, high: str) -> str:
    return low if position < 0.4 else high if position > 0.6 else "middle"


def _ignored(phrase: str, parsed: ParsedPhrase) -> str:
    """Words that name no region, with the reason, in the order of the text; repeats are counted."""
    if not parsed.ignored:
        return "Ignored: nothing"
    counts = Counter((single_line(phrase[start:end]), reason) for (start, end), reason in parsed.ignored)
    lines = [f'"{text}": {reason}' + f" ({count} times)" * (count > 1) for (text, reason), count in counts.items()]
    return "\n  ".join(["Ignored:", *lines])
