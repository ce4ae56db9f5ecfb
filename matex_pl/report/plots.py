"""Plots of results, as SVG pictures on white."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from matex_pl.files import MARK
from matex_pl.report.results import Difference

COLORS, MUTED, GRID = ("#0b63b5", "#b4480f", "#6b3fa0"), "#7a828b", "#e2e6ea"
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
# Width of a phone in inches of 72 SVG units: letters keep their size there. Wider pages show several plots in a row.
WIDTH = 352 / 72
LABEL_LENGTH = 24
STYLE: Any = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": GRID,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """A picture with its caption, which is also the alternative text."""

    caption: str
    svg: bytes

    @property
    def source(self) -> str:
        """Picture as a data URL, which keeps the page self-contained."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


@dataclass(frozen=True)
class Point:
    """A value with the ends of its interval; a `quiet` one is drawn hollow and pale."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Stroke:
    """A curve with gaps where `y` is None; `color` is an index into `COLORS`, None for pale controls."""

    x: Sequence[float]
    y: Sequence[float | None]
    label: str
    color: int | None = None


@matplotlib.rc_context(STYLE)
def dot_plot(caption: str, points: Sequence[Point], *, apart: int = 0, line: float | None = None) -> Plot:
    """Values with their intervals, one per row from the top.

    Args:
        caption: Title of the plot.
        points: Values in the order from the top.
        apart: Number of values at the end that are set apart.
        line: Position of a vertical reference line, for example 0.
    """
    heights = [place + 0.5 * (0 < len(points) - apart <= place) for place in range(len(points))]
    figure = Figure(figsize=(WIDTH, (20 * len(points) + 44) / 72), layout="constrained")
    axes = figure.subplots()
    for height, point in zip(heights, points, strict=True):
        color = MUTED if point.quiet else COLORS[0]
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [height, height], color=color, linewidth=2)
        axes.plot([point.value], [height], "o", color=color, fillstyle="none" if point.quiet else "full")
    if line is not None:
        axes.axvline(line, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(heights, [shorten(point.label) for point in points])
    axes.set_ylim(max(heights, default=0) + 0.6, -0.6)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    return Plot(caption, save(figure, "svg"))


def forest_plot(caption: str, differences: Iterable[Difference], higher_is_better: bool | None) -> Plot | None:
    """Measured differences with their intervals, hollow if not significant; None if there are none."""
    points = [
        Point(d.against, d.difference, d.low, d.high, not d.is_sure)
        for d in differences
        if d.difference is not None and d.is_measured
    ]
    if higher_is_better is not None:
        caption += f"; {'right' if higher_is_better else 'left'} of the line is better"
    return dot_plot(caption, points, line=0) if points else None


@matplotlib.rc_context(STYLE)
def curve_plot(caption: str, frames: Mapping[str, Sequence[Stroke]], across: str, limits: tuple[float, float]) -> Plot:
    """Curves in frames side by side, with one legend below them.

    Args:
        caption: Title of the plot.
        frames: Curves of each frame by its title.
        across: Label of the x axis.
        limits: Ends of the y axis.
    """
    figure = Figure(figsize=(WIDTH, 170 / 72), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (title, strokes) in zip(figure.subplots(1, len(frames), squeeze=False)[0], frames.items(), strict=True):
        for stroke in sorted(strokes, key=lambda stroke: stroke.color is not None):
            style: dict[str, Any] = {"color": MUTED, "linewidth": 0.8}
            if stroke.color is not None:
                style = {"color": COLORS[stroke.color], "linestyle": LINES[stroke.color], "linewidth": 1.8}
            (handles[stroke.label],) = axes.plot(stroke.x, as_floats(stroke.y), **style)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylim(limits)
        axes.grid()
    add_legend(figure, handles, 3)
    return Plot(caption, save(figure, "svg"))


def add_legend(figure: Figure, handles: Mapping[str, Any], columns: int) -> None:
    """Add a legend below the frames; at their right it would leave no room on a phone."""
    if handles:
        labels = [shorten(label) for label in handles]
        figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns)


def save(figure: Figure, kind: str) -> bytes:
    """Bytes of a figure as a file (`png` or `svg`), identical each time."""
    file = io.BytesIO()
    metadata = {"Date": None, "Creator": MARK} if kind == "svg" else {"Software": MARK}
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "report"}), warnings.catch_warnings():
        # The fonts of the browser have the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def as_floats(values: Iterable[float | None]) -> list[float]:
    """Values with NaN for None, where matplotlib leaves a gap."""
    return [math.nan if value is None else value for value in values]


def shorten(label: str) -> str:
    """Label, or its beginning with an ellipsis."""
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1].rstrip() + "…"


def axis_limits(values: Iterable[float | None]) -> tuple[float, float]:
    """Axis limits with a small margin around 0, 1 and the values."""
    known = [0.0, 1.0, *(value for value in values if value is not None)]
    air = 0.04 * (max(known) - min(known))
    return min(known) - air, max(known) + air
