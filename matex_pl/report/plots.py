"""Plots of results, as SVG."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from matex_pl.report.tables import Score

ACCENT, SECOND, THIRD, MUTED, GRID = "#010101", "#020202", "#030303", "#040404", "#050505"
PAGE_COLOURS = {
    "#000000": "currentColor",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
}
STROKES = ((ACCENT, "-"), (SECOND, "--"), (THIRD, ":"))
# A phone's width in units of the SVG, 72 to matplotlib's inch: letters keep their size on it, wider pages take several.
WIDTH = 352 / 72
FONT_SIZE = 11
LABEL_LENGTH = 22


@dataclass(frozen=True)
class Point:
    """A value with its interval, drawn hollow and pale when it is `quiet` (a control, an undecided difference)."""

    label: str
    score: Score
    quiet: bool


@dataclass(frozen=True)
class Stroke:
    """A curve; `style` counts in `STROKES`, None is a pale one behind the others; `spread` is half of a point's bar."""

    x: Sequence[float]
    y: Sequence[float | None]
    style: int | None
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Plot:
    """A plot with the caption under it."""

    caption: str
    svg: Markup


def dot_plot(
    points: Sequence[Point], alt: str, *, line: float | None = None, limits: tuple[float, float] | None = None
) -> Markup:
    """Values with their intervals, one per row from the top; `line` is an upright reference such as 0."""

    def draw(axes: Axes) -> None:
        for place, point in enumerate(points):
            value, low, high = (point.score[key] for key in ("value", "low", "high"))
            colour = MUTED if point.quiet else ACCENT
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([value], [place], "o", color=colour, markersize=7, fillstyle="none" if point.quiet else "full")
        if line is not None:
            axes.axvline(line, color="#000000", linewidth=1, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(points)), [shorten(point.label) for point in points])
        axes.set_ylim(len(points) - 0.4, -0.6)
        if limits:
            axes.set_xlim(limits)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=GRID)

    height = (20 * len(points) + 34) / 72
    return draw_svg([draw], (WIDTH, height), alt, left=0.4, bottom=26 / 72 / height, top=1 - 4 / 72 / height)


def curve_plot(
    plots: Sequence[tuple[str, Sequence[Stroke]]],
    across: str,
    limits: tuple[float, float],
    alt: str,
    *,
    line: float | None = None,
    ticks: Sequence[float] = (),
) -> Markup:
    """Curves in as many frames side by side as there are (title, strokes).

    Args:
        plots: The frames.
        across: Name of the x axis.
        limits: Of the y axis.
        alt: The alternative text.
        line: Height of a level reference such as 0.
        ticks: Of the x axis; chosen by matplotlib if there are none.
    """

    def drawer(title: str, strokes: Sequence[Stroke]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for stroke in sorted(strokes, key=lambda stroke: stroke.style is not None):
                colour, dashes = (MUTED, "-") if stroke.style is None else STROKES[stroke.style % len(STROKES)]
                heights = as_floats(stroke.y)
                axes.plot(stroke.x, heights, dashes, color=colour, linewidth=1 if stroke.style is None else 2)
                if stroke.spread:
                    bars: Any = {"fmt": "o", "markersize": 4, "capsize": 2, "elinewidth": 1}
                    axes.errorbar(stroke.x, heights, as_floats(stroke.spread), color=colour, **bars)
            if line is not None:
                axes.axhline(line, color="#000000", linewidth=1, linestyle=(0, (3, 3)))
            axes.set_title(title, fontsize=FONT_SIZE)
            axes.set_xlabel(across, fontsize=FONT_SIZE, labelpad=2)
            axes.set_ylim(limits)
            if ticks:
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            else:
                axes.locator_params(axis="x", nbins=5, integer=all(float(x).is_integer() for s in strokes for x in s.x))
            axes.grid(color=GRID)

        return draw

    return draw_svg([drawer(*plot) for plot in plots], (WIDTH, 150 / 72), alt, left=0.1, bottom=0.25, top=0.86)


def as_floats(values: Iterable[float | None]) -> list[float]:
    """The values, NaN for none: matplotlib leaves a gap there."""
    return [math.nan if value is None else value for value in values]


def draw_svg(
    drawers: Sequence[Callable[[Axes], None]],
    size: tuple[float, float],
    alt: str,
    *,
    left: float,
    bottom: float,
    top: float,
    right: float = 0.97,
) -> Markup:
    """One figure as inline SVG of the page's colours and fonts; each drawer fills one frame."""
    # Ids are hashes of what they name, but clip paths are numbered per figure: the salt tells figures apart.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": alt, "text.parse_math": False, "font.size": FONT_SIZE}
    file = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's fonts write what matplotlib's own cannot.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=size)
        frames = figure.subplots(1, len(drawers), squeeze=False, gridspec_kw={"wspace": 0.22})[0]
        figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
        for axes, draw in zip(frames, drawers, strict=True):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            axes.set_axisbelow(True)
            draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), alt)


def _inline(svg: str, alt: str) -> Markup:
    """The file of matplotlib as an element of the page: no prologue, style sheet, spare ids and fonts of its own."""
    head = re.search(r'viewBox="([\d. ]+)"[^>]*>', svg)
    if head is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox; please report this with its version.")
    body = re.sub(r"<style.*?</style>", "", svg[head.end() :], flags=re.DOTALL)
    body = re.sub(r'<(\w+) id="([^"]+)"', lambda m: m[0] if f"#{m[2]}" in svg else f"<{m[1]}", body)
    body = re.sub(r"; font-family: [^;\"]*", "", body)
    body = re.sub(r"(fill|stroke): (#\d{6})", lambda m: f"{m[1]}: {PAGE_COLOURS.get(m[2], m[2])}", body)
    # The texts in it were escaped by matplotlib.
    return Markup(f'<svg role="img" aria-label="{escape(alt)}" viewBox="{head[1]}">{body}')


def shorten(label: str) -> str:
    """The label, or its beginning with an ellipsis."""
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1].rstrip() + "…"


def axis_limits(values: Iterable[float | None]) -> tuple[float, float]:
    """Limits that hold all values with a little air; (0, 1) of none."""
    found = [value for value in values if value is not None] or [0.0, 1.0]
    air = 0.04 * (max(found) - min(found)) or 0.04
    return min(found) - air, max(found) + air
