"""Benchmark results as an HTML page and as Markdown: tables with intervals, plots and panels.

The fixed text is in `templates/`. Text of the results (findings, phrases, names, paths) is untrusted: `results.parse`
reduces it to one line, and the templates escape it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matex_pl.files import MARK, whole_file, write_text
from matex_pl.report.gallery import Panel, read_panels
from matex_pl.report.plots import Plot, Point, Stroke, axis_limits, curve_plot, dot_plot, forest_plot
from matex_pl.report.published import SOURCE, grounding_figures
from matex_pl.report.results import (
    ANATOMY_GROUP,
    FEATURED,
    MODALITIES,
    BenchmarkResult,
    Comparison,
    MethodScores,
    RoarResult,
    Score,
    clean,
    read,
)
from matex_pl.report.roar import point_column, roar_plot
from matex_pl.report.tables import (
    Cell,
    Column,
    Table,
    difference_table,
    environment,
    method_table,
    percent,
    score_column,
    with_figures,
    with_published,
)

GROUPS = {
    "localization": "Localization",
    "findings": "Localization, mean over findings",
    "confidence": "Confidence, other variants",
    "curves": "Insertion and deletion",
    "sensitivity": "Sensitivity to the phrase",
    "mass": "Location of the mass",
    "sanity": "Sanity",
}
PAPER = {"image": "Table 1: maps of the image", "text": "Table 2: maps of the phrase"}
PROTOCOL_COLUMNS = {"miou": "mIoU", "cnr": "CNR", "pointing_game": "Pointing game"}
PRIOR_CLASSES = (FEATURED, "PriorOnly")
PANEL_KINDS = ("best", "random", "worst")
# Files in the folder of a benchmark.
RESULTS, ROAR, PANELS = "results.json", "roar.json", "panels"
OUTPUTS = {
    RESULTS: '"created":',
    f"{PANELS}/index.json": '"panels":',
    "report.html": MARK,
    "tables.md": "# Attribution benchmark",
}
"""Files of a benchmark, with the marks of earlier ones for `check_outputs`."""


def write_report(
    result: BenchmarkResult, panels: Sequence[Panel], folder: Path, roar: RoarResult | None = None
) -> None:
    """Write `tables.md` and the self-contained `report.html` into `folder`; readers see the old or the new files.

    Panels of one row are grouped, in their order. ROAR+ is shown if it was measured with maps of the same weights.
    """
    panels = [Panel(**clean(asdict(panel))) for panel in panels]
    content = _content(result, roar)
    page = environment(autoescape=True).get_template("report.html.jinja")
    html, text = page.render(content | _pictures(result, panels, content["roar"])), benchmark_tables(result, roar)
    with whole_file(folder / "report.html") as page_file, whole_file(folder / "tables.md") as text_file:
        page_file.write_text(html, encoding="utf-8")
        text_file.write_text(text, encoding="utf-8")


def benchmark_tables(result: BenchmarkResult, roar: RoarResult | None = None) -> str:
    """All tables as Markdown, including ROAR+ if it was measured with maps of the same weights."""
    return environment(autoescape=False).get_template("tables.md.jinja").render(_content(result, roar))


def add_to_report(roar: RoarResult, benchmark_folder: Path | str) -> Path:
    """Add ROAR+ to the page and the tables of a finished benchmark, without new measurements, and return the page.

    The folder is the benchmark's `--out`. It gets `roar.json`, which later benchmarks in this folder show too.

    Raises:
        FileNotFoundError: If the folder holds no benchmark.
        ValueError: If the results of the benchmark are damaged or of another version.
    """
    folder = Path(benchmark_folder)
    for path in (folder / RESULTS, folder / PANELS / "index.json"):
        if not path.is_file():
            raise FileNotFoundError(
                f"The folder {folder} has no {path.relative_to(folder).as_posix()}, so there is no page to add ROAR+ "
                f"to. Run `matex benchmark --config FILE --ckpt_path FILE --out {folder}` first; existing maps and "
                "scores are read from disk."
            )
    write_report(read(BenchmarkResult, folder / RESULTS), read_panels(folder / PANELS), folder, roar)
    write_text(folder / ROAR, roar.to_json())
    return folder / "report.html"


def read_added_roar(folder: Path) -> RoarResult | None:
    """Content of the `roar.json` in the folder of a benchmark; None if there is none.

    Raises:
        ValueError: If the file is damaged, or of another kind or format.
    """
    path = folder / ROAR
    try:
        return read(RoarResult, path) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"The file {path} cannot be shown: {error} Remove the file, or add the results of ROAR+ again."
        ) from error


def _content(result: BenchmarkResult, roar: RoarResult | None) -> dict[str, Any]:
    """Variables of both templates; `roar` is left out if its maps are of other weights."""
    is_other = roar is not None and not (result.model.weights and result.model.weights == roar.model.explained)
    shown = None if is_other else roar
    paper = (paper_table(result, modality, shown) for modality in MODALITIES)
    groups = dict.fromkeys(metric.group for metric in result.metrics.values() if metric.group != "paper")
    tables = {
        (modality, group): table
        for modality in MODALITIES
        for group in groups
        if (table := group_table(result, modality, group))
    }
    tables.pop(("image", "protocol"), None)
    anatomy = [
        tables.pop(("image", group))
        for group in groups
        if group.startswith(ANATOMY_GROUP) and ("image", group) in tables
    ]
    return {
        "result": result,
        "methods": len({row.name for row in result.rows if not row.control}),
        "controls": len({row.name for row in result.rows if row.control}),
        "modalities": MODALITIES,
        "prior_rows": [
            row.name
            for row in result.methods("image")
            if row.method_class in PRIOR_CLASSES and row.settings.get("delta") != 0
        ],
        "glance": glance_table(result),
        "paper": list(filter(None, paper)),
        "source": SOURCE,
        "roar": shown,
        "other_roar": roar if is_other else None,
        "localization": tables.pop(("image", "localization"), None),
        "findings": tables.pop(("image", "findings"), None),
        "protocol": protocol_table(result),
        "anatomy": anatomy,
        "quartiles": quartile_tables(result),
        "others": list(tables.values()),
        "differences": difference_tables(result),
        "cost": cost_table(result),
    }


def glance_table(result: BenchmarkResult) -> Table | None:
    """Compared metrics and the weight randomization of the image maps."""
    rows = result.methods("image")
    keys = [*(_comparisons(result) or _measured(result, rows)[:3]), "sanity"]
    plain = [row.model_copy(update={"note": ""}) for row in rows]
    return method_table("At a glance", plain, _score_columns(result, rows, dict.fromkeys(keys)))


def paper_table(result: BenchmarkResult, modality: str, roar: RoarResult | None = None) -> Table | None:
    """Table 1 (`image`) or 2 (`text`) with the published numbers and a measured ROAR+; None without rows."""
    table = group_table(result, modality, "paper")
    if table and roar and (column := _roar_column(result, roar, modality)):
        table = replace(table, columns=[*table.columns, column])
    return table and with_published(table, modality, ("drop", "increase", "roar"))


def group_table(result: BenchmarkResult, modality: str, group: str) -> Table | None:
    """Measured metrics of one group; None if there are none."""
    rows = result.methods(modality)
    keys = [key for key, metric in result.metrics.items() if metric.group == group]
    title = PAPER[modality] if group == "paper" else f"{GROUPS.get(group, group)}, maps of the {MODALITIES[modality]}"
    return method_table(title, rows, _score_columns(result, rows, keys))


def protocol_table(result: BenchmarkResult) -> Table | None:
    """Scores by the published protocol; None without one. Published figures need the same settings and data set."""
    table, protocol = group_table(result, "image", "protocol"), result.protocol
    if table is None or not protocol.name:
        return None
    steps = [
        f"maps at {protocol.size} px",
        f"Gaussian of {protocol.smooth_sigma:g} patches" if protocol.smooth_sigma else "no smoothing",
        f"the central {percent(protocol.kept)} of each side",
        *(["pruned phrases"] if protocol.prune_phrases else []),
    ]
    remark = (
        "The mIoU is the mean over the thresholds .1 to .5 of maps rescaled to [-1, 1]. The CNR is signed. The "
        f"tolerant pointing game allows {protocol.tolerance:g} px. Published tables have means over findings."
    )
    table = replace(table, title=f"Protocol {protocol.name}: {', '.join(steps)}", remark=remark)
    figures = grounding_figures()["zero_shot"].get(protocol.name)
    return table if figures is None else _with_grounding(table, result, figures)


def _with_grounding(table: Table, result: BenchmarkResult, figures: Mapping[str, Any]) -> Table:
    """Table of a protocol with its published figures, or with the reason why they are left out."""
    settings = {name: getattr(result.protocol, name) for name in figures["settings"]}
    if result.data.data_class != figures["data_class"] or settings != figures["settings"]:
        needed = ", ".join(f"{name} {str(value).lower()}" for name, value in figures["settings"].items())
        left_out = f"Published figures are left out: they are on {figures['data']}, with {needed}."
        return replace(table, remark=f"{table.remark} {left_out}")
    columns = {key: f"{label}\N{NO-BREAK SPACE}↑" for key, label in PROTOCOL_COLUMNS.items()}
    # Rows with further rules follow another protocol.
    published = {
        row["name"]: {label: f"{row[key]:.3f}" for key, label in columns.items()}
        for row in figures["rows"]
        if "rules" not in row
    }
    note = f"other models, {figures['pairs']} pairs of {figures['data']}, means over findings ({figures['source']})"
    remarks = [table.remark, f"Published: {note}.", *figures.get("remarks", ())]
    if result.data.pairs != figures["pairs"]:
        remarks.append(f"Measured here: {result.data.pairs} pairs, which is another set.")
    return replace(with_figures(table, published, note), remark=" ".join(remarks))


def _roar_column(result: BenchmarkResult, roar: RoarResult, modality: str) -> Column | None:
    """ROAR+ at its smallest fraction, for the rows that the benchmark also has."""
    settings = {row.name: row.settings for row in result.methods(modality)}
    rows = [row for row in roar.methods(modality) if row.name in settings]
    fractions = roar.fractions(rows) if rows else []
    if not fractions:
        return None
    column = point_column(rows, fractions[0], modality)
    cells = dict(column.cells)
    for row in rows:
        # A row of the same name may have other settings, for example fewer masks.
        if row.settings != settings[row.name]:
            cell = cells.get(row.name, Cell())
            cells[row.name] = replace(cell, interval=", ".join(filter(None, [cell.interval, "other settings"])))
    return replace(column, cells=cells)


def finding_tables(result: BenchmarkResult, modality: str) -> list[Table]:
    """One table per metric with scores per finding, with a column per finding."""
    rows = result.methods(modality)
    # Findings in the order of the data, then findings that only the rows have.
    findings = dict.fromkeys([*result.data.findings, *(finding for row in rows for finding in row.per_finding)])
    tables = []
    for key, metric in result.metrics.items():
        # The structures have tables of quartiles.
        if metric.group.startswith(ANATOMY_GROUP):
            continue
        scores = {finding: _scores(rows, key, finding) for finding in findings}
        columns = [score_column(metric, by_name, rows, finding) for finding, by_name in scores.items() if by_name]
        tables.append(method_table(metric.name + metric.arrow, rows, columns))
    return list(filter(None, tables))


def quartile_tables(result: BenchmarkResult) -> list[Table]:
    """One table per metric of anatomical structures with median and quartiles, with a column per finding."""
    rows = result.methods("image")
    found = {finding: None for row in rows for finding in row.quartiles}
    tables = []
    for key, metric in result.metrics.items():
        scores = {
            finding: {row.name: score for row in rows if (score := row.quartiles.get(finding, {}).get(key)) and score.n}
            for finding in found
        }
        columns = [score_column(metric, by_name, rows, finding) for finding, by_name in scores.items() if by_name]
        tables.append(method_table(f"{metric.name}, median and quartiles", rows, columns))
    return list(filter(None, tables))


def difference_tables(result: BenchmarkResult) -> list[Table]:
    """Differences of each method from each control, one table per compared metric; significant gains are marked."""
    rows = result.methods("image")
    compared = [(result.metrics[key], comparisons) for key, comparisons in _comparisons(result).items()]
    tables = (difference_table(metric.name + metric.arrow, rows, found, metric) for metric, found in compared)
    return list(filter(None, tables))


def cost_table(result: BenchmarkResult) -> Table | None:
    """Seconds per pair and multiples of a plain model forward, for every row with a time."""
    seconds = {row.name: row.seconds_per_pair for row in result.rows if row.seconds_per_pair is not None}
    forward = result.forward_seconds_per_pair
    columns = [
        Column("Seconds per pair", {name: Cell(f"{time:.3g}") for name, time in seconds.items()}),
        Column("Times a plain forward", {n: Cell(f"{time / forward:.3g}") for n, time in seconds.items() if forward}),
    ]
    # The maps of the phrase and of the image come from the same call, with one time.
    rows = {row.name: row for row in result.rows if row.name in seconds}
    return method_table("Cost", rows.values(), columns)


def _scores(rows: Sequence[MethodScores], key: str, finding: str | None = None) -> dict[str, Score]:
    """Scores of one metric that have a value, by name, over all pairs or over those of a finding."""
    scores = {row.name: row.scores if finding is None else row.per_finding.get(finding, {}) for row in rows}
    return {name: by_key[key] for name, by_key in scores.items() if key in by_key and by_key[key].value is not None}


def _measured(result: BenchmarkResult, rows: Sequence[MethodScores]) -> list[str]:
    return [key for key in result.metrics if _scores(rows, key)]


def _score_columns(result: BenchmarkResult, rows: Sequence[MethodScores], keys: Iterable[str]) -> list[Column]:
    measured = _measured(result, rows)
    return [score_column(result.metrics[key], _scores(rows, key), rows) for key in keys if key in measured]


def _comparisons(result: BenchmarkResult) -> dict[str, list[Comparison]]:
    """Comparisons by metric, without metrics that have no measured comparison."""
    keys = dict.fromkeys(comparison.metric for comparison in result.comparisons if comparison.is_measured)
    return {key: [c for c in result.comparisons if c.metric == key] for key in keys if key in result.metrics}


def _pictures(result: BenchmarkResult, panels: Sequence[Panel], roar: RoarResult | None) -> dict[str, Any]:
    """Variables of the page alone: plots, panels, and the tables per finding."""
    methods = [row for row in result.methods("image") if not row.control]
    # Methods with plots of their own.
    featured = [row.name for row in methods if row.method_class == FEATURED] or [row.name for row in methods[:1]]
    first = {panel.kind: panel for panel in reversed(panels) if panel.row in featured[:1]}
    names = [panel.row for panel in panels]
    together = sorted(panels, key=lambda panel: names.index(panel.row))
    return {
        "ranking": _ranking_plot(result),
        "glance_panels": [first[kind] for kind in PANEL_KINDS if kind in first],
        "forest": _forest_plots(result, featured),
        "finding_tables": {modality: finding_tables(result, modality) for modality in MODALITIES},
        "curves": _insertion_plots(result),
        "sanity_curves": _sanity_plots(result),
        "stages": next((row.sanity_curve.stages for row in result.rows if row.sanity_curve.stages), []),
        "roar_plots": [roar_plot(roar, modality) for modality in roar.modalities] if roar else [],
        "panels": [(row, list(group)) for row, group in groupby(together, lambda panel: panel.row)],
    }


def _forest_plots(result: BenchmarkResult, names: Sequence[str]) -> list[Plot]:
    """Paired differences from each control, per metric and method."""
    plots = (
        forest_plot(
            f"{result.metrics[key].name}: {name} minus each control",
            [comparison for comparison in comparisons if comparison.row == name],
            result.metrics[key].higher_is_better,
        )
        for key, comparisons in _comparisons(result).items()
        for name in names
    )
    return list(filter(None, plots))


def _ranking_plot(result: BenchmarkResult) -> Plot | None:
    """Image maps ranked by the first measured metric, localization first: best on top, controls below."""
    rows = result.methods("image")
    measured = sorted(_measured(result, rows), key=lambda key: result.metrics[key].group != "localization")
    if not measured:
        return None
    metric, scores = result.metrics[measured[0]], _scores(rows, measured[0])
    points = [
        Point(row.name, score.value or 0.0, score.low, score.high, row.control)
        for row in rows
        if (score := scores.get(row.name))
    ]
    if metric.higher_is_better is not None:
        points.sort(key=lambda point: point.value, reverse=metric.higher_is_better)
    points.sort(key=lambda point: point.quiet)
    return dot_plot(metric.name + metric.arrow, points, apart=sum(point.quiet for point in points))


def _insertion_plots(result: BenchmarkResult) -> list[Plot]:
    """Insertion and deletion curves of each method, one frame per kind, with the controls pale."""
    rows = [row for row in result.methods("image") if any(curve.score for curve in row.curves.values())]
    metrics = {key: metric for key, metric in result.metrics.items() if any(key in row.curves for row in rows)}
    fills = list(dict.fromkeys(metric.fill for metric in metrics.values()))
    limits = axis_limits(y for row in rows for curve in row.curves.values() for y in curve.score)
    plots = []
    for row in rows:
        frames: dict[str, list[Stroke]] = {}
        for key, metric in metrics.items():
            strokes = frames.setdefault(key.partition("/")[0].capitalize(), [])
            for method in _with_controls(row, rows):
                if curve := method.curves.get(key):
                    label, color = (metric.fill, fills.index(metric.fill)) if method is row else ("controls", None)
                    strokes.append(Stroke(curve.share, curve.score, label, color))
        plots.append(curve_plot(f"{row.name}: insertion and deletion", frames, "share of the patches", limits))
    return plots


def _sanity_plots(result: BenchmarkResult) -> list[Plot]:
    """Correlation of each method with its original maps while weights are shuffled stage by stage."""
    plots: dict[str, dict[str, list[Stroke]]] = {}
    for modality, word in MODALITIES.items():
        rows = [row for row in result.methods(modality) if row.sanity_curve.correlation]
        for row in rows:
            strokes = plots.setdefault(row.name, {}).setdefault(f"Maps of the {word}", [])
            for method in _with_controls(row, rows):
                label, color = ("the method", 0) if method is row else ("controls", None)
                correlation = method.sanity_curve.correlation
                strokes.append(Stroke(range(1, len(correlation) + 1), correlation, label, color))
    limits = axis_limits(y for row in result.rows for y in row.sanity_curve.correlation)
    return [curve_plot(f"{name}: weight randomization", frames, "stage", limits) for name, frames in plots.items()]


def _with_controls(row: MethodScores, rows: Sequence[MethodScores]) -> list[MethodScores]:
    return [*(other for other in rows if other.control and other is not row), row]
