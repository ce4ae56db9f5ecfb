"""The benchmark's results as a page and as Markdown: tables with intervals, plots and panels.

Words stand in `templates/`. All text of the results (findings, phrases, names, paths) is material: `results.parse` puts
it on one line, and the templates escape it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matex_pl.files import whole_file, write_text
from matex_pl.report.gallery import Panel, read_panels
from matex_pl.report.plots import Plot, Point, Stroke, axis_limits, curve_plot, dot_plot, forest_plot
from matex_pl.report.published import SOURCE
from matex_pl.report.results import (
    FEATURED,
    MODALITIES,
    BenchmarkResult,
    Comparison,
    MethodScores,
    Metric,
    RoarResult,
    Score,
    read,
)
from matex_pl.report.roar import point_column, roar_plot
from matex_pl.report.tables import (
    Cell,
    Column,
    Table,
    arrow,
    difference_table,
    environment,
    method_table,
    score_column,
    with_published,
)
from matex_pl.visualization.draw import single_line

GROUPS = {
    "localization": "Localization",
    "confidence": "Confidence, other variants",
    "curves": "Insertion and deletion",
    "sensitivity": "Sensitivity to the phrase",
    "mass": "Where the mass lies",
    "sanity": "Sanity",
}
PAPER = {"image": "Table 1: maps of the image", "text": "Table 2: maps of the phrase"}
PRIOR_CLASSES = (FEATURED, "PriorOnly")
PANEL_KINDS = ("best", "random", "worst")
# In the folder of a benchmark.
RESULTS, ROAR, PANELS = "results.json", "roar.json", "panels"


def write_report(
    result: BenchmarkResult, panels: Sequence[Panel], folder: Path, roar: RoarResult | None = None
) -> None:
    """Write `tables.md` and the self-contained `report.html` into `folder`; a reader sees the old files or the new.

    Args:
        result: Results of the benchmark.
        panels: Pictures of methods on pairs; those of one row stand together, in the order given.
        folder: Folder of both files, made if it is not there.
        roar: ROAR+, shown if it was measured with maps of the same weights.
    """
    panels = [
        Panel(single_line(p.row), single_line(p.kind), single_line(p.pair), single_line(p.caption), p.jpeg)
        for p in panels
    ]
    content = _content(result, roar)
    page = environment(autoescape=True).get_template("report.html.jinja")
    html, text = page.render(content | _pictures(result, panels, content["roar"])), benchmark_tables(result, roar)
    with whole_file(folder / "report.html") as one, whole_file(folder / "tables.md") as other:
        one.write_text(html, encoding="utf-8")
        other.write_text(text, encoding="utf-8")


def benchmark_tables(result: BenchmarkResult, roar: RoarResult | None = None) -> str:
    """All tables as Markdown.

    Args:
        result: Results of the benchmark.
        roar: ROAR+, shown if it was measured with maps of the same weights.
    """
    return environment(autoescape=False).get_template("tables.md.jinja").render(_content(result, roar))


def add_to_report(roar: RoarResult, benchmark_folder: Path | str) -> Path:
    """Put ROAR+ onto the page and into the tables of a benchmark that has run; nothing is measured again.

    Args:
        roar: Results of ROAR+.
        benchmark_folder: The benchmark's `--out`. It gets `roar.json`, which later benchmarks there show too.

    Returns:
        The page.

    Raises:
        FileNotFoundError: No benchmark has run there.
        ValueError: The results of the benchmark are damaged or of another version.
    """
    folder = Path(benchmark_folder)
    for path in (folder / RESULTS, folder / PANELS / "index.json"):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {path.relative_to(folder).as_posix()}, so there is no page to add ROAR+ to. "
                f"`matex benchmark --config FILE --ckpt_path FILE --out {folder}` makes it; maps and scores that are "
                "there already are taken from disk."
            )
    write_report(read(BenchmarkResult, folder / RESULTS), read_panels(folder / PANELS), folder, roar)
    write_text(folder / ROAR, roar.to_json())
    return folder / "report.html"


def read_added_roar(folder: Path) -> RoarResult | None:
    """The `roar.json` in the folder of a benchmark; None if there is none.

    Raises:
        ValueError: The file is damaged, or of another kind or format.
    """
    path = folder / ROAR
    try:
        return read(RoarResult, path) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be shown: {error} Remove it, or add the results of ROAR+ again.") from error


@dataclass(frozen=True)
class _Roar:
    """What ROAR+ adds: the results, whether its maps are of the benchmark's weights, and a column by modality."""

    result: RoarResult
    is_comparable: bool
    columns: dict[str, Column]


def _content(result: BenchmarkResult, roar: RoarResult | None) -> dict[str, Any]:
    """What both templates show."""
    added = None if roar is None else _roar(result, roar)
    groups = dict.fromkeys(metric.group for metric in result.metrics.values())
    others = [
        group_table(result, modality, group)
        for modality in MODALITIES
        for group in groups
        if group != "paper" and (modality, group) != ("image", "localization")
    ]
    paper = [paper_table(result, modality, added) for modality in MODALITIES]
    return {
        "result": result,
        "methods": len({row.name for row in result.rows if not row.control}),
        "controls": len({row.name for row in result.rows if row.control}),
        "modalities": MODALITIES,
        "prior_rows": [row.name for row in result.methods("image") if _has_prior(row)],
        "glance": glance_table(result),
        "paper": [table for table in paper if table],
        "source": SOURCE,
        "roar": added,
        "localization": group_table(result, "image", "localisation"),
        "others": [table for table in others if table],
        "differences": difference_tables(result),
        "cost": cost_table(result),
        "arrow": arrow,
    }


def _has_prior(row: MethodScores) -> bool:
    return row.method_class in PRIOR_CLASSES and row.settings.get("delta") != 0


def _roar(result: BenchmarkResult, roar: RoarResult) -> _Roar:
    """ROAR+ at its smallest fraction, for the rows that the benchmark has too."""
    if not result.model.weights or result.model.weights != roar.model.explained:
        return _Roar(roar, False, {})
    columns = {}
    for modality in roar.modalities:
        settings = {row.name: row.settings for row in result.methods(modality)}
        rows = [row for row in roar.methods(modality) if row.name in settings]
        if rows and roar.fractions(rows):
            column = point_column(rows, roar.fractions(rows)[0], modality)
            # A row of the same name may stand for fewer masks or other weights of the parts.
            others = {row.name for row in rows if row.settings != settings[row.name]}
            cells = {name: _with_remark(cell) if name in others else cell for name, cell in column.cells.items()}
            columns[modality] = replace(column, cells=cells)
    return _Roar(roar, True, columns)


def _with_remark(cell: Cell) -> Cell:
    return replace(cell, interval=", ".join(filter(None, [cell.interval, "other settings"])))


def glance_table(result: BenchmarkResult) -> Table | None:
    """The metrics in which methods were compared with the controls and the sanity check, of the image maps."""
    rows = result.methods("image")
    keys = [*(_compared_metrics(result) or _measured(rows, result.metrics)[:3]), "sanity"]
    table = _score_table(result, "At a glance", rows, _measured(rows, dict.fromkeys(keys)))
    return table and replace(table, lines=[replace(line, note="") for line in table.lines])


def paper_table(result: BenchmarkResult, modality: str, roar: _Roar | None = None) -> Table | None:
    """Table 1 (`image`) or 2 (`text`) with the published figures and a measured ROAR+; None without such a row."""
    rows = result.methods(modality)
    keys = [key for key in _measured(rows, result.metrics) if result.metrics[key].group == "paper"]
    table = _score_table(result, PAPER[modality], rows, keys)
    if table and roar and modality in roar.columns:
        table = replace(table, columns=[*table.columns, roar.columns[modality]])
    return table and with_published(table, modality, ("drop", "increase", "roar"))


def group_table(result: BenchmarkResult, modality: str, group: str) -> Table | None:
    """The measured metrics of one group; None if there are none."""
    rows = result.methods(modality)
    keys = [key for key in _measured(rows, result.metrics) if result.metrics[key].group == group]
    name = GROUPS.get(group, group.replace("_", " ").capitalize())
    return _score_table(result, f"{name}, maps of the {MODALITIES[modality]}", rows, keys)


def finding_tables(result: BenchmarkResult, modality: str) -> list[Table]:
    """One table per metric that was measured per finding, with a column per finding."""
    rows, tables = result.methods(modality), []
    for key, metric in result.metrics.items():
        columns = [
            score_column(metric, scores, rows, finding)
            for finding in _findings(result, rows)
            if (scores := _finding_scores(rows, finding, key))
        ]
        table = method_table(metric.name + arrow(metric), rows, columns)
        tables += [table] if table else []
    return tables


def difference_tables(result: BenchmarkResult) -> list[Table]:
    """Per compared metric, each method minus each control; what is surely better is marked."""
    tables = []
    for key, comparisons in _compared_metrics(result).items():
        metric = result.metrics.get(key, Metric(label=key))
        table = difference_table(
            metric.name + arrow(metric),
            result.methods("image"),
            comparisons,
            higher_is_better=metric.higher_is_better,
            percent=metric.percent,
        )
        tables += [table] if table else []
    return tables


def cost_table(result: BenchmarkResult) -> Table | None:
    """Seconds per pair and multiples of a plain forward of the model, of every row that has a time."""
    seconds = {row.name: row.seconds_per_pair for row in result.rows if row.seconds_per_pair is not None}
    forward = result.forward_seconds_per_pair
    columns = [
        Column("Seconds per pair", {name: Cell(f"{time:.3g}") for name, time in seconds.items()}),
        Column("Times a plain forward", {n: Cell(f"{time / forward:.3g}") for n, time in seconds.items() if forward}),
    ]
    # A method takes as long for the maps of the phrase, which come with those of the image.
    rows = {row.name: row for row in result.rows if row.name in seconds}
    return method_table("Cost", rows.values(), columns)


def _score_table(
    result: BenchmarkResult, title: str, rows: Sequence[MethodScores], keys: Iterable[str]
) -> Table | None:
    columns = [score_column(result.metrics[key], _scores(rows, key), rows) for key in keys if key in result.metrics]
    return method_table(title, rows, columns)


def _scores(rows: Sequence[MethodScores], key: str) -> dict[str, Score]:
    """The scores of one metric that have a value, by name."""
    return {row.name: score for row in rows if (score := row.scores.get(key, Score())).value is not None}


def _finding_scores(rows: Sequence[MethodScores], finding: str, key: str) -> dict[str, Score]:
    found = {row.name: row.per_finding.get(finding, {}).get(key, Score()) for row in rows}
    return {name: score for name, score in found.items() if score.value is not None}


def _measured(rows: Sequence[MethodScores], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if _scores(rows, key)]


def _findings(result: BenchmarkResult, rows: Sequence[MethodScores]) -> list[str]:
    """Findings in the order of the data, then those that only the rows have."""
    return list(dict.fromkeys([*result.data.findings, *(finding for row in rows for finding in row.per_finding)]))


def _compared_metrics(result: BenchmarkResult) -> dict[str, list[Comparison]]:
    """The comparisons by metric, without metrics in which nothing could be compared."""
    keys = dict.fromkeys(comparison.metric for comparison in result.comparisons)
    found = {key: [c for c in result.comparisons if c.metric == key] for key in keys}
    return {key: group for key, group in found.items() if any(c.is_measured for c in group)}


def _pictures(result: BenchmarkResult, panels: Sequence[Panel], roar: _Roar | None) -> dict[str, Any]:
    """What only the page shows: plots, panels, and the tables per finding."""
    names = [panel.row for panel in panels]
    together = sorted(panels, key=lambda panel: names.index(panel.row))
    return {
        "ranking": _ranking_plot(result),
        "glance_panels": _glance_panels(result, panels),
        "forest": _forest_plots(result),
        "finding_tables": {modality: finding_tables(result, modality) for modality in MODALITIES},
        "curves": _insertion_plots(result),
        "sanity_curves": _sanity_plots(result),
        "stages": next((row.sanity_curve.stages for row in result.rows if row.sanity_curve.stages), []),
        "roar_plots": [roar_plot(roar.result, m) for m in roar.result.modalities]
        if roar and roar.is_comparable
        else [],
        "panels": [(row, list(group)) for row, group in groupby(together, lambda panel: panel.row)],
    }


def _featured(result: BenchmarkResult) -> list[str]:
    """The methods that are shown one by one: MATEX, or the first one."""
    rows = [row for row in result.methods("image") if not row.control]
    return [row.name for row in rows if row.method_class == FEATURED] or [row.name for row in rows[:1]]


def _glance_panels(result: BenchmarkResult, panels: Sequence[Panel]) -> list[Panel]:
    """The best, a random and the worst pair of the first featured method."""
    own = [panel for panel in panels if panel.row in _featured(result)[:1]]
    found = {panel.kind: panel for panel in reversed(own)}
    return [found[kind] for kind in PANEL_KINDS if kind in found]


def _forest_plots(result: BenchmarkResult) -> list[Plot]:
    """Per metric and featured method, the paired differences to each control."""
    plots = []
    for key, comparisons in _compared_metrics(result).items():
        metric = result.metrics.get(key, Metric(label=key))
        for row in _featured(result):
            plot = forest_plot(
                f"{metric.name}: {row} minus each of these",
                [comparison for comparison in comparisons if comparison.row == row],
                metric.higher_is_better,
            )
            plots += [plot] if plot else []
    return plots


def _ranking_plot(result: BenchmarkResult) -> Plot | None:
    """The image maps by the first measured metric, localization before others: the best on top, the controls apart."""
    rows = result.methods("image")
    measured = sorted(_measured(rows, result.metrics), key=lambda key: result.metrics[key].group != "localization")
    if not measured:
        return None
    metric, scores = result.metrics[measured[0]], _scores(rows, measured[0])
    points = []
    for row in (row for row in rows if row.name in scores):
        score = scores[row.name]
        points.append(Point(row.name, score.value or 0.0, score.low, score.high, row.control))
    if metric.higher_is_better is not None:
        points.sort(key=lambda point: point.value, reverse=metric.higher_is_better)
    points.sort(key=lambda point: point.quiet)
    return dot_plot(metric.name + arrow(metric), points, apart=sum(point.quiet for point in points))


def _insertion_plots(result: BenchmarkResult) -> list[Plot]:
    """Per method its insertion and deletion curves, one frame per kind, the controls pale behind them."""
    rows = [row for row in result.methods("image") if any(curve.score for curve in row.curves.values())]
    keys = [key for key in result.metrics if any(key in row.curves for row in rows)]
    fills = list(dict.fromkeys(key.partition("/")[2] for key in keys))
    limits = axis_limits([0, 1, *(y for row in rows for curve in row.curves.values() for y in curve.score)])

    def strokes(row: MethodScores, key: str) -> list[Stroke]:
        fill = fills.index(key.partition("/")[2])
        pale = [other for other in rows if other.control and other is not row]
        found = [Stroke(c.curves[key].share, c.curves[key].score, "controls") for c in pale if key in c.curves]
        own = row.curves.get(key)
        return found + ([Stroke(own.share, own.score, result.metrics[key].fill, fill)] if own else [])

    plots = []
    for row in rows:
        kinds = dict.fromkeys(key.partition("/")[0] for key in keys)
        frames = [
            (kind.capitalize(), [s for key in keys if key.partition("/")[0] == kind for s in strokes(row, key)])
            for kind in kinds
        ]
        plots.append(curve_plot(f"{row.name}: insertion and deletion", frames, "share of the patches", limits))
    return plots


def _sanity_plots(result: BenchmarkResult) -> list[Plot]:
    """Per method, the correlation with its own maps as more and more of the weights are shuffled."""
    frames: dict[str, list[tuple[str, list[Stroke]]]] = {}
    for modality, word in MODALITIES.items():
        rows = [row for row in result.methods(modality) if row.sanity_curve.correlation]
        for row in rows:
            pale = [_sanity_stroke(other) for other in rows if other.control and other is not row]
            frames.setdefault(row.name, []).append((f"Maps of the {word}", [*pale, _sanity_stroke(row, 0)]))
    values = [y for row in result.rows for y in row.sanity_curve.correlation]
    limits = axis_limits([0, 1, *values])
    return [curve_plot(f"{name}: weight randomization", found, "stage", limits) for name, found in frames.items()]


def _sanity_stroke(row: MethodScores, color: int | None = None) -> Stroke:
    correlation = row.sanity_curve.correlation
    label = "controls" if color is None else "the method"
    return Stroke(range(1, len(correlation) + 1), correlation, label, color)
