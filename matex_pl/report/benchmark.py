"""The benchmark's results as a page and as Markdown: tables with intervals, what the controls say, plots, panels.

Words stand in `templates/`; here are the numbers, the sentences that follow from them, and one function per plot. All
text of the results (findings, phrases, studies, names, paths) is material: it is put on one line and escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matex_pl.files import whole_file
from matex_pl.report.gallery import Panel
from matex_pl.report.plots import STROKES, Plot, Point, Stroke, axis_limits, curve_plot, dot_plot
from matex_pl.report.tables import (
    FEATURED,
    MISSING,
    MODALITIES,
    Cell,
    Column,
    Row,
    Score,
    Table,
    _with_column,
    arrow,
    assemble,
    best_value,
    clean,
    environment,
    interval,
    listed,
    number,
    quoted,
    scored,
    with_published,
)
from matex_pl.visualization.draw import single_line

FORMAT = 1
# The columns of the paper's tables, as published and with the fill that does not look like a finding.
PAPER_COLUMNS = {
    "image": (
        "confidence_drop/mean_colour",
        "confidence_increase/mean_colour",
        "confidence_drop/mean_film",
        "confidence_increase/mean_film",
    ),
    "text": ("confidence_drop", "confidence_increase"),
}
FILLS = {"mean_colour": "mean colour", "mean_film": "mean film", "blur": "blurred film"}
GROUPS = {
    "localisation": "Localisation",
    "confidence": "Confidence, other variants",
    "curves": "Insertion and deletion",
    "sensitivity": "Sensitivity to the phrase",
    "mass": "Where the mass lies",
    "sanity": "Sanity",
}
# A map that agrees this well with the one under shuffled weights, or another phrase, does not tell of them.
SAME_MAP = 0.9
PRIOR_CLASSES = (FEATURED, "PriorOnly")


@dataclass(frozen=True)
class Addition:
    """What a run of ROAR+ adds to the page of a benchmark; `report_roar` makes it.

    Args:
        columns: Per modality a measured column of the paper's table, and its cells by the name of the row.
        sentences: What a reader must know of them, in plain text.
        plots: The curves, over the share that is dropped.
        legend: How they are drawn, in plain text.
    """

    columns: dict[str, tuple[Column, dict[str, Cell]]]
    sentences: list[str]
    plots: list[Plot]
    legend: str = ""


def write_report(results: dict[str, Any], panels: Sequence[Panel], folder: Path, roar: Addition | None = None) -> None:
    """Write `tables.md` and the self-contained `report.html` into `folder`; a reader sees the old files or the new.

    Args:
        results: What the benchmark found, as in its `results.json`. Scores may be absent, null or NaN.
        panels: Pictures of methods on pairs; those of one row stand together, in the order given.
        folder: Made if it is not there.
        roar: ROAR+ of the same weights, where it was measured.

    Raises:
        ValueError: The results have another format than this package writes.
    """
    if results.get("format") != FORMAT:
        raise ValueError(
            f"Results must have format {FORMAT}, got {results.get('format')!r}. Write the report with the version of "
            "matex_pl that made them, or run the benchmark again."
        )
    results = clean(results)
    words = _words(results, roar)
    panels = [
        Panel(single_line(p.row), single_line(p.kind), single_line(p.study), single_line(p.caption), p.jpeg)
        for p in panels
    ]
    page = environment(autoescape=True).get_template("report.html.jinja")
    tables = environment(autoescape=False).get_template("tables.md.jinja")
    pictures = [(row, list(group)) for row, group in groupby(sorted(panels, key=_place(panels)), key=lambda p: p.row)]
    html, text = page.render(**words, **_plots(results), panels=pictures), tables.render(**words)
    with whole_file(folder / "report.html") as one, whole_file(folder / "tables.md") as other:
        one.write_text(html, encoding="utf-8")
        other.write_text(text, encoding="utf-8")


def _place(panels: Sequence[Panel]) -> Callable[[Panel], int]:
    """The sorting key that brings the panels of a row together where its first one stands."""
    names = [panel.row for panel in panels]
    return lambda panel: names.index(panel.row)


def paper_table(results: dict[str, Any], modality: str, roar: Addition | None = None) -> Table | None:
    """Table 1 (`image`) or 2 (`text`), published figures beside and ROAR+ if given; None without such a row."""
    rows = scored(results, modality)
    keys = [key for key in PAPER_COLUMNS[modality] if key in _metrics(results)]
    title = "Table 1: maps of the film" if modality == "image" else "Table 2: maps of the phrase"
    table = _score_table(results, title, rows, keys)
    if table and roar and modality in roar.columns:
        table = _with_column(table, *roar.columns[modality])
    return table and with_published(table, (results.get("published") or {}).get(modality) or {})


def group_table(results: dict[str, Any], modality: str, group: str) -> Table | None:
    """The metrics of one group that have any value and do not stand in the paper's table; None if there are none."""
    rows = scored(results, modality)
    keys = [
        key
        for key, metric in _metrics(results).items()
        if metric.get("group") == group and key not in PAPER_COLUMNS[modality] and _measured(rows, key)
    ]
    return _score_table(results, f"{_group_name(group)}, maps of the {MODALITIES[modality]}", rows, keys)


def finding_tables(results: dict[str, Any], modality: str) -> list[Table]:
    """One table per metric that was measured per finding, with a column per finding."""
    rows, tables = scored(results, modality), []
    for key, metric in _metrics(results).items():
        columns = [
            _score_column(metric, [_finding_score(row, finding, key) for row in rows], rows, label=finding)
            for finding in _findings(results, rows)
        ]
        columns = [(head, cells) for head, cells in columns if any(cell.text != MISSING for cell in cells)]
        table = assemble(metric_name(metric) + arrow(metric), rows, columns)
        tables += [table] if table else []
    return tables


def difference_tables(results: dict[str, Any]) -> list[Table]:
    """Per compared metric, each method minus each control; what is surely better is marked."""
    tables = []
    for key, groups in _comparisons(results).items():
        metric = _metrics(results).get(key, {"label": key})
        found = {(row, c["against"]): c for row, comparisons in groups.items() for c in comparisons}
        rows: list[Row] = [{"name": row} for row in groups]
        columns = [
            _difference_column(metric, against, [found.get((row, against), {}) for row in groups])
            for against in dict.fromkeys(against for _, against in found)
        ]
        table = assemble(metric_name(metric) + arrow(metric), rows, columns)
        tables += [table] if table else []
    return tables


def _difference_column(
    metric: dict[str, Any], against: str, comparisons: Sequence[dict[str, Any]]
) -> tuple[Column, list[Cell]]:
    scores = [_difference(comparison) for comparison in comparisons]
    digits = _digits(scores, metric)
    cells = [
        Cell(number(s["value"], digits, signed=True), interval(s, digits), verdict(c, metric) == "better")
        for s, c in zip(scores, comparisons, strict=True)
    ]
    return Column(f"minus {against}", counted=_counted(scores)), cells


def cost_table(results: dict[str, Any]) -> Table | None:
    """Seconds per pair and what they are in plain forwards of the model, of every row that has a time."""
    rows = [row for row in results.get("rows") or [] if row.get("seconds_per_pair") is not None]
    forward = results.get("forward_seconds_per_pair")
    seconds = [Cell(f"{row['seconds_per_pair']:.3g}") for row in rows]
    times = [Cell(f"{row['seconds_per_pair'] / forward:.3g}") if forward else Cell() for row in rows]
    explains = [Cell(MODALITIES.get(row.get("modality"), MISSING)) for row in rows]
    columns = [
        (Column("Map of the"), explains),
        (Column("Seconds per pair"), seconds),
        (Column("Times a plain forward"), times),
    ]
    return assemble("Cost", rows, columns)


def _score_table(results: dict[str, Any], title: str, rows: Sequence[Row], keys: Sequence[str]) -> Table | None:
    metrics = _metrics(results)
    columns = [_score_column(metrics[key], [_score(row, key) for row in rows], rows) for key in keys]
    return assemble(title, rows, columns)


def _score_column(
    metric: dict[str, Any], scores: Sequence[Score], rows: Sequence[Row], label: str = ""
) -> tuple[Column, list[Cell]]:
    """A column of scores, the best of the methods marked; `label` instead of the metric's own."""
    digits = _digits(scores, metric)
    best = best_value(metric, [s["value"] for s, row in zip(scores, rows, strict=True) if not row.get("control")])
    cells = []
    for score, row in zip(scores, rows, strict=True):
        text = number(score["value"], digits)
        # Ties as printed share the mark.
        marked = best is not None and not row.get("control") and text == number(best, digits)
        cells.append(Cell(text, interval(score, digits), marked))
    detail = "" if label else FILLS.get(metric.get("fill") or "", metric.get("fill") or "")
    head = label or metric.get("label", "") + arrow(metric)
    return Column(head, detail, _counted(scores)), cells


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return results.get("metrics") or {}


def _score(row: Row, key: str) -> Score:
    return {"value": None, "low": None, "high": None, "n": None} | ((row.get("scores") or {}).get(key) or {})


def _finding_score(row: Row, finding: str, key: str) -> Score:
    return _score({"scores": (row.get("per_finding") or {}).get(finding)}, key)


def _measured(rows: Sequence[Row], key: str) -> bool:
    return any(_score(row, key)["value"] is not None for row in rows)


def _findings(results: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Findings in the order of the data, then what only the rows know."""
    known = list((results.get("data") or {}).get("findings") or {})
    return list(dict.fromkeys(known + [finding for row in rows for finding in row.get("per_finding") or {}]))


def metric_name(metric: dict[str, Any]) -> str:
    """A metric's label with its fill, if it has one."""
    fill = metric.get("fill")
    return f"{metric.get('label', '')} ({FILLS.get(fill, fill)})" if fill else str(metric.get("label", ""))


def _group_name(group: str) -> str:
    return GROUPS.get(group, group.replace("_", " ").capitalize())


def _digits(scores: Iterable[Score], metric: dict[str, Any]) -> int:
    """Decimals of scores that stand together: two, or three where all of them and their ends are small shares."""
    found = [score[key] for score in scores for key in ("value", "low", "high") if score[key] is not None]
    return 3 if found and max(map(abs, found)) < 0.1 and not metric.get("percent") else 2


def _counted(scores: Sequence[Score]) -> str:
    """How many pairs the column's values count."""
    counts = {score["n"] for score in scores if score["value"] is not None and score["n"] is not None}
    if not counts:
        return ""
    return f"n = {min(counts)}" if len(counts) == 1 else f"n = {min(counts)} to {max(counts)}"


def control_sentences(results: dict[str, Any]) -> list[str]:
    """What the comparisons and the controls say about the methods, in plain sentences."""
    return [*_comparison_sentences(results), *_indifference_sentences(results), *_prior_sentences(results)]


def verdict(comparison: dict[str, Any], metric: dict[str, Any]) -> str:
    """A comparison in a word: `better`, `worse`, `higher`, `lower`, `undecided` (0 in the interval) or `open`."""
    difference, low, high = (comparison.get(key) for key in ("difference", "low", "high"))
    if difference is None or low is None or high is None:
        return "open"
    if low <= 0 <= high:
        return "undecided"
    upward = metric.get("higher_is_better")
    if upward is None:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference > 0) == upward else "worse"


VERDICTS = {
    "better": "is better than",
    "worse": "is worse than",
    "higher": "is higher than",
    "lower": "is lower than",
    "undecided": "is not distinguishable from",
    "open": "could not be compared with",
}


def _comparison_sentences(results: dict[str, Any]) -> list[str]:
    """Per metric, who is better than every control, and a sentence on each featured method."""
    sentences, featured = [], _featured(results)
    for key, groups in _comparisons(results).items():
        metric = _metrics(results).get(key, {"label": key})
        if len(groups) > 1 and metric.get("higher_is_better") is not None:
            sentences.append(_overall_sentence(groups, metric))
        sentences += [_row_sentence(row, groups[row], metric) for row in groups if row in featured]
    return sentences


def _comparisons(results: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The comparisons of each metric and row, of the metrics by which anything could be compared."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    found = results.get("comparisons") or []
    told = {comparison["metric"] for comparison in found if verdict(comparison, {}) != "open"}
    for comparison in (comparison for comparison in found if comparison["metric"] in told):
        groups[comparison["metric"]][comparison["row"]].append(comparison)
    return groups


def _featured(results: dict[str, Any]) -> set[str]:
    """The methods whose comparisons are told and drawn one by one: MATEX, or the first that was compared."""
    names = {row["name"] for row in scored(results, "image") if row.get("class") == FEATURED and not row.get("control")}
    return names or {comparison["row"] for comparison in (results.get("comparisons") or [])[:1]}


def _overall_sentence(groups: dict[str, list[dict[str, Any]]], metric: dict[str, Any]) -> str:
    """How many methods are better than each of what they were compared with, and which are better than none."""
    won = {row: [c["against"] for c in found if verdict(c, metric) == "better"] for row, found in groups.items()}
    rivals = dict.fromkeys(c["against"] for found in groups.values() for c in found)
    counts = [f"than {quoted(rival)} {sum(rival in beaten for beaten in won.values())}" for rival in rivals]
    sentence = f"{metric_name(metric)}, how many of {len(groups)} methods are better: {', '.join(counts)}."
    none = [quoted(row) for row, beaten in won.items() if not beaten]
    return sentence + (f" {listed(none)} {'are' if len(none) > 1 else 'is'} better than none." if none else "")


def _row_sentence(row: str, comparisons: Sequence[dict[str, Any]], metric: dict[str, Any]) -> str:
    """What one method's comparisons say: to whom it is better, and the differences with their intervals."""
    scores = [_difference(comparison) for comparison in comparisons]
    digits, counted = _digits(scores, metric), _counted(scores)
    parts: dict[str, list[str]] = defaultdict(list)
    for comparison, score in zip(comparisons, scores, strict=True):
        word, against = verdict(comparison, metric), quoted(comparison["against"])
        inside = (
            f" ({number(score['value'], digits, signed=True)}; {interval(score, digits)})" if word != "open" else ""
        )
        parts[word].append(against + inside)
    clauses = [f"{words} {listed(parts[word])}" for word, words in VERDICTS.items() if word in parts]
    counted = f" ({counted})" if counted else ""
    return f"{metric_name(metric)}{counted}: {quoted(row)} {'; it '.join(clauses)}."


def _difference(comparison: dict[str, Any]) -> Score:
    """A comparison as a score whose value is the difference."""
    return _score({"scores": {"": {**comparison, "value": comparison.get("difference")}}}, "")


def _indifference_sentences(results: dict[str, Any]) -> list[str]:
    """Which maps stay as they are when the weights, or the phrase, are others."""
    changes = {"sanity": "the weights are shuffled", "prompt_sensitivity": "the phrase is another study's"}
    sentences = []
    for key, change in changes.items():
        rows = [row for modality in MODALITIES for row in scored(results, modality)]
        rows = [row for row in rows if _score(row, key)["value"] is not None]
        if not rows:
            continue
        same = [row for row in rows if _score(row, key)["value"] >= SAME_MAP]
        methods = [_with_value(row, key) for row in same if not row.get("control")]
        controls = [_with_value(row, key) for row in same if row.get("control")]
        verb = "gives" if len(methods) == 1 else "give"
        sentence = f"{listed(methods) or 'No method'} {verb if methods else 'gives'} nearly the same map when {change}"
        sentence += f" (correlation of {SAME_MAP} or more)."
        sentences.append(sentence + (f" Of the controls: {listed(controls)}." if controls else ""))
    return sentences


def _with_value(row: Row, key: str) -> str:
    return f"{quoted(row['name'])} ({MODALITIES[row['modality']]}, {number(_score(row, key)['value'], 2)})"


def _prior_sentences(results: dict[str, Any]) -> list[str]:
    """The warning that a prior read from the phrase helps localisation without the model."""
    names = [
        quoted(row["name"])
        for row in scored(results, "image")
        if row.get("class") in PRIOR_CLASSES and (row.get("settings") or {}).get("delta") != 0
    ]
    if not names:
        return []
    return [
        f"Read with care: {listed(names)} {'takes' if len(names) == 1 else 'take'} a prior from the phrase, which "
        "names the place. It knows nothing of the model, so what it adds to localisation says nothing about where the "
        "model looks; compare with the row of the prior alone."
    ]


def _words(results: dict[str, Any], roar: Addition | None) -> dict[str, Any]:
    """What both templates show: the tables and sentences."""
    groups = list(dict.fromkeys(metric.get("group") or "" for metric in _metrics(results).values()))
    others = [
        group_table(results, modality, group)
        for modality in MODALITIES
        for group in groups
        if (modality, group) != ("image", "localisation")
    ]
    rows = results.get("rows") or []
    return {
        "results": results,
        "rows": rows,
        "methods": len({row["name"] for row in rows if not row.get("control")}),
        "controls": len({row["name"] for row in rows if row.get("control")}),
        "refused": [row for row in rows if row.get("error")],
        "sentences": control_sentences(results),
        "paper": [table for table in (paper_table(results, modality, roar) for modality in MODALITIES) if table],
        "localisation": group_table(results, "image", "localisation"),
        "others": [table for table in others if table],
        "differences": difference_tables(results),
        "cost": cost_table(results),
        "metrics": [(metric_name(metric), metric) for metric in _metrics(results).values()],
        "modalities": MODALITIES,
        "published": (results.get("published") or {}).get("source") or "",
        "roar": roar,
    }


def _plots(results: dict[str, Any]) -> dict[str, Any]:
    """What only the page shows: plots, and the tables per finding."""
    curves, fills = _insertion_plots(results)
    ranking, finding_plots = _ranking_plots(results)
    return {
        "forest": _difference_plots(results),
        "ranking": ranking,
        "finding_plots": finding_plots,
        "finding_tables": {modality: finding_tables(results, modality) for modality in MODALITIES},
        "curves": curves,
        "curve_fills": [(FILLS.get(fill, fill), style % len(STROKES)) for fill, style in fills.items()],
        "sanity_curves": _sanity_plots(results),
        "stages": _stages(results),
    }


def _difference_plots(results: dict[str, Any]) -> list[Plot]:
    """Per metric and featured method, the paired differences to all that it was compared with."""
    featured = _featured(results)
    groups = [(key, row, found) for key, rows in _comparisons(results).items() for row, found in rows.items()]
    plots = []
    for key, row, comparisons in groups:
        metric = _metrics(results).get(key, {"label": key})
        points = [
            Point(c["against"], _difference(c), verdict(c, metric) == "undecided")
            for c in comparisons
            if verdict(c, metric) != "open"
        ]
        caption, higher = f"{metric_name(metric)}: {row} minus each of these", metric.get("higher_is_better")
        if higher is not None:
            caption += f"; {'right' if higher else 'left'} of the line is better"
        plots += [Plot(caption, dot_plot(points, caption, line=0))] if points and row in featured else []
    return plots


def _headline(results: dict[str, Any], rows: Sequence[Row]) -> str | None:
    """Key of the metric to draw: the first of localisation that any row has, else the first of any group."""
    metrics = sorted(_metrics(results).items(), key=lambda item: item[1].get("group") != "localisation")
    return next((key for key, _ in metrics if _measured(rows, key)), None)


def _ranking_plots(results: dict[str, Any]) -> tuple[list[Plot], list[Plot]]:
    """All maps of the film by the headline metric, the best on top: over all pairs, and per finding on one scale."""
    rows = scored(results, "image")
    key = _headline(results, rows)
    if key is None:
        return [], []
    metric = _metrics(results)[key]
    whole = [(row, _score(row, key)) for row in rows]
    findings = {f: [(row, _finding_score(row, f, key)) for row in rows] for f in _findings(results, rows)}
    findings = {f: entries for f, entries in findings.items() if any(s["value"] is not None for _, s in entries)}
    reach = [s[end] for entries in findings.values() for _, s in entries for end in ("value", "low", "high")]
    plots = [
        _ranked(
            entries, metric, ", ".join(filter(None, [finding, _counted([s for _, s in entries])])), axis_limits(reach)
        )
        for finding, entries in findings.items()
    ]
    return [_ranked(whole, metric, metric_name(metric) + arrow(metric))], plots


def _ranked(
    entries: Iterable[tuple[Row, Score]],
    metric: dict[str, Any],
    caption: str,
    limits: tuple[float, float] | None = None,
) -> Plot:
    """The rows that have a value, best first where the metric has a better direction."""
    entries = [(row, score) for row, score in entries if score["value"] is not None]
    higher = metric.get("higher_is_better")
    if higher is not None:
        entries = sorted(entries, key=lambda entry: entry[1]["value"], reverse=higher)
    points = [Point(row["name"], score, bool(row.get("control"))) for row, score in entries]
    return Plot(caption, dot_plot(points, f"{metric_name(metric)}: {caption}", limits=limits))


def _insertion_plots(results: dict[str, Any]) -> tuple[list[Plot], dict[str, int]]:
    """Per method its curves, one frame per kind; and the stroke of each fill."""
    rows = [row for modality in MODALITIES for row in scored(results, modality) if _curves(row)]
    keys = list(dict.fromkeys(key for row in rows for key in _curves(row)))
    fills = {fill: i for i, fill in enumerate(dict.fromkeys(key.partition("/")[2] for key in keys))}
    limits = axis_limits([0, 1, *(y for row in rows for curve in _curves(row).values() for y in curve["score"])])
    plots = []
    for row in rows:
        frames: dict[str, list[Stroke]] = defaultdict(list)
        for key in keys:
            kind, _, fill = key.partition("/")
            frames[kind] += [
                _stroke(other, key, None) for other in _controls_beside(row, rows) if key in _curves(other)
            ]
            frames[kind] += [_stroke(row, key, fills[fill])] if key in _curves(row) else []
        titles = [(kind.replace("_", " ").capitalize(), strokes) for kind, strokes in frames.items()]
        alt = f"{row['name']}: {' and '.join(title.lower() for title, _ in titles)} curves"
        plots.append(Plot(row["name"], curve_plot(titles, "share of the patches", limits, alt)))
    return plots, fills


def _stroke(row: Row, key: str, style: int | None) -> Stroke:
    return Stroke(_curves(row)[key]["share"], _curves(row)[key]["score"], style)


def _curves(row: Row) -> dict[str, dict[str, list[Any]]]:
    """The curves of a row that have points."""
    return {key: curve for key, curve in (row.get("curves") or {}).items() if curve and curve.get("score")}


def _correlation(row: Row) -> list[float | None]:
    """The points of a row's sanity curve, none if it has no such curve."""
    return (row.get("sanity_curve") or {}).get("correlation") or []


def _controls_beside(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The controls that stand pale behind the curves of `row`."""
    return [
        other for other in rows if other.get("control") and other is not row and other["modality"] == row["modality"]
    ]


def _sanity_plots(results: dict[str, Any]) -> list[Plot]:
    """Per method, the correlation to its own maps as more and more of the weights are shuffled."""
    rows = [row for modality in MODALITIES for row in scored(results, modality) if _correlation(row)]
    limits = axis_limits([0, 1, *(y for row in rows for y in _correlation(row))])
    frames: dict[str, list[tuple[str, list[Stroke]]]] = defaultdict(list)
    for row in rows:
        strokes = [*(_sanity_stroke(other, None) for other in _controls_beside(row, rows)), _sanity_stroke(row, 0)]
        frames[row["name"]].append((f"maps of the {MODALITIES[row['modality']]}", strokes))
    alt = "correlation to the original map, stage by stage"
    return [Plot(name, curve_plot(found, "stage", limits, f"{name}: {alt}")) for name, found in frames.items()]


def _sanity_stroke(row: Row, style: int | None) -> Stroke:
    return Stroke(range(1, len(_correlation(row)) + 1), _correlation(row), style)


def _stages(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The stages of the sanity curves, once per list, with the modalities that go through them."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for modality, words in MODALITIES.items():
        for row in scored(results, modality):
            stages = tuple((row.get("sanity_curve") or {}).get("stages") or ())
            if stages and words not in found[stages]:
                found[stages].append(words)
    return [(listed(names), list(stages)) for stages, names in found.items()]
