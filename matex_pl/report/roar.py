"""ROAR+ as an HTML page, as Markdown and as curves, with published numbers and tests against noise.

ROAR+ is the rise of the clean validation loss, in percent, after retraining without the patches or words that a method
ranks highest; higher is better. The fixed text is in `templates/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from matex_pl.console import duration
from matex_pl.files import whole_file
from matex_pl.report.plots import COLORS, LINES, MUTED, STYLE, WIDTH, Plot, add_legend, as_floats, save, shorten
from matex_pl.report.published import SOURCE
from matex_pl.report.results import MODALITIES, Metric, RoarMethod, RoarPoint, RoarResult
from matex_pl.report.tables import (
    Cell,
    Column,
    Line,
    Table,
    best_names,
    difference_table,
    environment,
    method_table,
    number,
    percent,
    with_published,
    with_spread,
)

UNITS = {"image": "patches", "text": "tokens"}
METRIC = Metric(label="ROAR+", higher_is_better=True, percent=True)
MARKS = "osD^vPX<>h"


def write_roar(result: RoarResult, folder: Path) -> list[Path]:
    """Write `table.md`, `report.html` and, per modality, `curves_<modality>.png` and `.svg`; all or none of them.

    Args:
        result: Results of ROAR+.
        folder: Folder of the files, created if missing; curves of a modality without results are removed.

    Returns:
        Paths of the files, the page first.
    """
    page = environment(autoescape=True).get_template("roar.html.jinja")
    plots = [roar_plot(result, modality) for modality in result.modalities]
    files = {
        "report.html": page.render(_content(result), plots=plots).encode(),
        "table.md": roar_tables(result).encode(),
    }
    for modality in result.modalities:
        figure = roar_figure(result, modality)
        files |= {f"curves_{modality}.{kind}": save(figure, kind) for kind in ("png", "svg")}
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(whole_file(folder / name)).write_bytes(content)
    for modality in MODALITIES.keys() - set(result.modalities):
        for kind in ("png", "svg"):
            (folder / f"curves_{modality}.{kind}").unlink(missing_ok=True)
    return [folder / name for name in files]


def roar_tables(result: RoarResult, *, is_short: bool = False) -> str:
    """All tables as Markdown: scores with the published numbers, differences from noise, failures, clean losses.

    Args:
        result: Results of ROAR+.
        is_short: Whether to return only the scores, the differences over all fractions and the failures, for a
            terminal.
    """
    template = environment(autoescape=False).get_template("roar.md.jinja")
    return template.render(_content(result), is_short=is_short)


def score_table(result: RoarResult, modality: str) -> Table | None:
    """Methods by dropped fraction, MATEX first and controls last, with the published ROAR+; None without rows."""
    rows = result.methods(modality)
    columns = [point_column(rows, fraction, modality) for fraction in result.fractions(rows)]
    if len(columns) > 1:
        columns.append(_column(rows, [row.mean for row in rows], "mean over the fractions"))
    table = method_table(f"Maps of the {MODALITIES[modality]}", rows, columns)
    return table and with_published(table, modality, ["roar"])


def point_column(rows: Sequence[RoarMethod], fraction: float, modality: str) -> Column:
    """ROAR+ of the rows at a fraction."""
    points = [row.point(fraction) for row in rows]
    detail = f"{percent(fraction)} dropped"
    units = [point.units for point in points if point.units is not None]
    if units:
        ends = dict.fromkeys(number(end, 1) for end in (min(units), max(units)))
        detail += f": {' to '.join(ends)} {UNITS[modality]} per pair"
    return _column(rows, points, detail)


def _column(rows: Sequence[RoarMethod], points: Sequence[RoarPoint], detail: str) -> Column:
    """Means with deviations, the best of the methods marked; a mean without all repeats is a dash."""
    pairs = list(zip(rows, points, strict=True))
    best = best_names({row.name: point.value for row, point in pairs if not row.control}, True, 2)
    cells = {}
    for row, point in pairs:
        if point.value is not None:
            cells[row.name] = Cell(with_spread(point.value, point.std), best=row.name in best)
        elif point.repeats:
            done = sum(value is not None for value in point.repeats)
            cells[row.name] = Cell(interval=f"{done} of {_repeats(point)}")
    longest = max(points, key=lambda point: len(point.repeats), default=RoarPoint())
    return Column(METRIC.label + METRIC.arrow, cells, detail, _repeats(longest))


def _repeats(point: RoarPoint) -> str:
    count = len(point.repeats)
    return f"{count} repeat{'' if count == 1 else 's'}" if count else ""


def difference_tables(result: RoarResult, modality: str) -> list[Table]:
    """Differences of each method from each control, over all fractions and at each; significant gains are marked."""
    tests = [test for test in result.tests if test.modality == modality]
    # None stands for the mean over the fractions.
    fractions = sorted({test.fraction for test in tests}, key=lambda fraction: -1.0 if fraction is None else fraction)
    tables = []
    for fraction in fractions:
        place = "mean over the fractions" if fraction is None else f"{percent(fraction)} dropped"
        title = f"Maps of the {MODALITIES[modality]}, {place}"
        family = [test for test in tests if test.fraction == fraction]
        tables.append(difference_table(title, result.methods(modality), family, METRIC))
    return list(filter(None, tables))


def clean_table(result: RoarResult) -> Table | None:
    """Loss and scores per repeat of the models trained on whole pairs; None if there are none."""
    runs = {
        f"repeat-{run.repeat}": {"Validation loss\N{NO-BREAK SPACE}↓": run.loss} | run.metrics for run in result.clean
    }
    columns = []
    for label in dict.fromkeys(label for values in runs.values() for label in values):
        values = {name: run.get(label) for name, run in runs.items()}
        columns.append(Column(label, {n: Cell(f"{value:#.4g}") for n, value in values.items() if value is not None}))
    return Table("Clean models", [Line(name) for name in runs], columns, of="Repeat") if runs else None


def _content(result: RoarResult) -> dict[str, Any]:
    """Variables of both templates."""
    scores = (score_table(result, modality) for modality in result.modalities)
    differences = {modality: difference_tables(result, modality) for modality in result.modalities}
    return {
        "result": result,
        "tables": list(filter(None, scores)),
        "differences": [table for tables in differences.values() for table in tables],
        "overall": [table for tables in differences.values() for table in tables[:1]],
        "tested": max((test.n or 0 for test in result.tests), default=0),
        "is_tested": any(test.is_measured for test in result.tests),
        "clean": clean_table(result),
        "refused": result.refused | {row.name: row.error for row in result.rows if row.error},
        "duration": duration,
        "percent": percent,
        "modalities": MODALITIES,
        "source": SOURCE,
    }


def roar_plot(result: RoarResult, modality: str) -> Plot:
    """`roar_figure` as a plot of a page."""
    return Plot(f"ROAR+, maps of the {MODALITIES[modality]}", save(roar_figure(result, modality), "svg"))


@matplotlib.rc_context(STYLE)
def roar_figure(result: RoarResult, modality: str) -> Figure:
    """ROAR+ over the dropped share: one line per method with its deviation over repeats, controls pale.

    Args:
        result: Results of ROAR+.
        modality: `image` or `text`.

    Raises:
        ValueError: If the results have no row of this modality.
    """
    if modality not in result.modalities:
        raise ValueError(
            f"There is no row of modality {modality!r}. The results have the modalities {result.modalities or 'none'}."
        )
    rows = result.methods(modality)
    fractions = result.fractions(rows)
    across = np.array([100 * fraction for fraction in fractions])
    gap = min(np.diff(across), default=10.0)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.11 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    num_methods = sum(not row.control for row in rows)
    for place, row in enumerate(rows):
        points = [row.point(fraction) for fraction in fractions]
        if all(point.value is None for point in points):
            continue
        count = place - num_methods if row.control else place
        handles[row.name] = axes.errorbar(
            # Shifted sideways, to keep the deviations apart.
            across + 0.3 * gap * ((place + 0.5) / len(rows) - 0.5),
            as_floats(point.value for point in points),
            as_floats(point.std for point in points),
            color=MUTED if row.control else COLORS[count % len(COLORS)],
            linestyle=LINES[1 + count % 3] if row.control else LINES[count // len(COLORS) % len(LINES)],
            marker=MARKS[count % len(MARKS)],
            fillstyle="none" if row.control else "full",
            zorder=2 if row.control else 3,
            markersize=5,
            elinewidth=1,
            capsize=2,
        )
    axes.axhline(0, color="black", linewidth=1, zorder=1)
    axes.set_xticks(across, [f"{round(share, 6):g}" for share in across])
    axes.grid(axis="y")
    axes.set_xlabel(f"{UNITS[modality]} dropped in training, %")
    axes.set_ylabel("ROAR+, %")
    title = ", ".join(filter(None, [f"Maps of the {MODALITIES[modality]}", shorten(result.data.data_class)]))
    axes.set_title(title, loc="left")
    add_legend(figure, handles, 2)
    return figure
