"""Tables of results, for an HTML page and for Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader

from matex_pl.report.published import PUBLISHED
from matex_pl.report.results import Difference, Method, Metric, Score

MISSING = "\N{EN DASH}"
PUBLISHED_COLUMNS = {
    "drop": "Conf. drop\N{NO-BREAK SPACE}↓",
    "increase": "Conf. incr.\N{NO-BREAK SPACE}↑",
    "roar": "ROAR+\N{NO-BREAK SPACE}↑",
}
OTHER_DATA = "another model and data set: compare the order of the methods, not the numbers"


@dataclass(frozen=True)
class Cell:
    """A printed value with its interval; `best` marks the best of the methods or a significant gain."""

    text: str = MISSING
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """Cells by line name; a line without a cell gets a dash."""

    label: str
    cells: Mapping[str, Cell]
    # Detail that distinguishes columns of the same label, e.g. the fill.
    detail: str = ""
    # Number of pairs or repeats, e.g. `n = 100`.
    counted: str = ""
    # Whether the values are from the paper, not measured here.
    published: bool = False


@dataclass(frozen=True)
class Line:
    """Name of a row, with a remark; controls are below the methods."""

    name: str
    note: str = ""
    control: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its controls set apart; `of` is the header of the line names, `remark` a text below the title."""

    title: str
    lines: Sequence[Line]
    columns: Sequence[Column] = field(default_factory=list)
    of: str = "Method"
    remark: str = ""
    # Remark on the published columns.
    published_note: str = OTHER_DATA

    @property
    def parts(self) -> list[tuple[bool, list[Line]]]:
        """Lines grouped as (are controls, lines): first the methods, then the controls."""
        ordered = sorted(self.lines, key=lambda line: line.control)
        return [(control, list(lines)) for control, lines in groupby(ordered, lambda line: line.control)]

    @property
    def heads(self) -> list[tuple[bool, int]]:
        """Runs of columns as (published, number of columns); empty if no column is published."""
        runs = [(published, len(list(run))) for published, run in groupby(self.columns, lambda c: c.published)]
        return runs if len(runs) > 1 else []

    def cells(self, line: Line) -> list[Cell]:
        """Cells of a line, in the order of the columns."""
        return [column.cells.get(line.name, Cell()) for column in self.columns]


def method_table(title: str, methods: Iterable[Method], columns: Sequence[Column]) -> Table | None:
    """Table of methods; None without methods or columns."""
    lines = [Line(method.name, method.note, method.control) for method in methods]
    return Table(title, lines, columns) if lines and columns else None


def score_column(metric: Metric, scores: Mapping[str, Score], methods: Sequence[Method], label: str = "") -> Column:
    """Column of scores by name, with the best of the methods marked; `label` replaces that of the metric."""
    digits = decimals([end for score in scores.values() for end in (score.value, score.low, score.high)], metric)
    values = {
        method.name: scores[method.name].value for method in methods if method.name in scores and not method.control
    }
    best = best_names(values, metric.higher_is_better, digits)
    cells = {
        name: Cell(number(score.value, digits), interval(score.value, score.low, score.high, digits), name in best)
        for name, score in scores.items()
    }
    counted = count_pairs(score.n for score in scores.values())
    return Column(label or metric.label + metric.arrow, cells, "" if label else metric.fill, counted)


def difference_table(
    title: str, methods: Iterable[Method], differences: Sequence[Difference], metric: Metric
) -> Table | None:
    """Differences of methods from controls in a metric, with a column per control; significant gains are marked.

    Args:
        title: Title of the table.
        methods: Methods in the order of the lines; methods without a difference are left out.
        differences: At most one difference for each method and control.
        metric: Metric that sets direction and unit of the differences.
    """
    rows = {difference.row for difference in differences}
    columns = []
    for control in dict.fromkeys(difference.against for difference in differences):
        column = [difference for difference in differences if difference.against == control]
        digits = decimals([end for d in column for end in (d.difference, d.low, d.high)], metric)
        cells = {
            d.row: Cell(
                number(d.difference, digits, signed=True), certainty(d, digits), d.is_better(metric.higher_is_better)
            )
            for d in column
        }
        counted = count_pairs(d.n for d in column if d.difference is not None)
        columns.append(Column(f"minus {control}", cells, counted=counted))
    return method_table(title, [method for method in methods if method.name in rows], columns)


def with_published(table: Table, modality: str, keys: Sequence[str]) -> Table:
    """Table with the paper's columns `keys`; methods with published values only are appended."""
    figures = {
        name: {PUBLISHED_COLUMNS[key]: with_spread(*entry[key]) for key in keys}
        for name, entry in PUBLISHED[modality].items()
    }
    return with_figures(table, figures)


def with_figures(table: Table, figures: Mapping[str, Mapping[str, str]], note: str = OTHER_DATA) -> Table:
    """Table with published columns; methods with published values only are appended.

    Args:
        table: Table of measured values.
        figures: Printed value by method and column.
        note: Remark on the published columns.
    """
    known = {line.name for line in table.lines}
    lines = [Line(name, "published only") for name in figures if name not in known]
    columns = [
        Column(label, {name: Cell(entry[label]) for name, entry in figures.items()}, published=True)
        for label in next(iter(figures.values()), {})
    ]
    return replace(table, lines=[*table.lines, *lines], columns=[*table.columns, *columns], published_note=note)


def best_names(values: Mapping[str, float | None], higher_is_better: bool | None, digits: int) -> set[str]:
    """Names of the best of at least two values; values with the same printed form share the mark."""
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < 2 or higher_is_better is None:
        return set()
    best = number((max if higher_is_better else min)(known.values()), digits)
    return {name for name, value in known.items() if number(value, digits) == best}


def decimals(values: Iterable[float | None], metric: Metric) -> int:
    """Number of decimals for a column of values: two, or three if all are small shares."""
    known = [abs(value) for value in values if value is not None]
    return 3 if known and max(known) < 0.1 and not metric.percent else 2


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Value with a fixed number of decimals, never -0, with a plus if `signed`; a dash for None."""
    return MISSING if value is None else f"{round(value, digits) + 0.0:{'+' * signed}.{digits}f}"


def interval(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    """Interval as `0.77 to 0.90`; empty without a value or an end."""
    return "" if None in (value, low, high) else f"{number(low, digits)} to {number(high, digits)}"


def certainty(difference: Difference, digits: int) -> str:
    """Interval and p-value of a difference, if available."""
    ends, p = interval(difference.difference, difference.low, difference.high, digits), difference.p_holm
    p_value = "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return ", ".join(filter(None, [ends, p_value]))


def with_spread(value: float, std: float | None = None) -> str:
    """Mean and, if given, standard deviation, in the form of the paper."""
    return number(value, 2) + ("" if std is None else f" ± {number(std, 2)}")


def count_pairs(counts: Iterable[int | None]) -> str:
    """Number of pairs behind the values of a column, `n = 88 to 100` if it varies; empty if unknown."""
    known = {count for count in counts if count is not None}
    return f"n = {' to '.join(map(str, sorted({min(known), max(known)})))}" if known else ""


def percent(fraction: float) -> str:
    """Share as `12.5 %`, with a no-break space."""
    return f"{round(100 * fraction, 6):g}\N{NO-BREAK SPACE}%"


def markdown(text: Any) -> str:
    """Text escaped for GitHub Markdown, also inside a table."""
    entities = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", entities)


def environment(*, autoescape: bool) -> Environment:
    """Template environment of this package, with its filters."""
    environment = Environment(
        loader=PackageLoader("matex_pl.report"), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": markdown, "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False)}
    return environment
