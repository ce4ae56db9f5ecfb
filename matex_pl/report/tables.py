"""Tables of results, for a page and for Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader

from matex_pl.visualization.draw import single_line

MISSING = "\N{EN DASH}"
PUBLISHED_COLUMNS = {
    "drop": "Conf. drop\N{NO-BREAK SPACE}↓",
    "increase": "Conf. incr.\N{NO-BREAK SPACE}↑",
    "roar": "ROAR+\N{NO-BREAK SPACE}↑",
}
MODALITIES = {"image": "film", "text": "phrase"}
FEATURED = "Matex"

Score = dict[str, Any]
Row = dict[str, Any]


def clean(value: Any) -> Any:
    """The same plain data with every text on one line and without control characters, and null for NaN and Inf."""
    if isinstance(value, str):
        return single_line(value)
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(text: Any) -> str:
    """Text that GitHub shows as it is, also inside a table."""
    entities = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", entities)


def environment(*, autoescape: bool) -> Environment:
    """The templates of this package, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("matex_pl.report"), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": markdown, "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False)}
    return environment


@dataclass(frozen=True)
class Column:
    """The head of a column: its label with the better direction, what tells it apart, and how many pairs it counts.

    Args:
        label: E.g. `Confidence drop ↓`.
        detail: E.g. the fill.
        counted: E.g. `n = 100`.
        published: The column repeats the paper.
    """

    label: str
    detail: str = ""
    counted: str = ""
    published: bool = False


@dataclass(frozen=True)
class Cell:
    """A value as it is printed, with its interval; `best` among the methods that are no controls."""

    text: str = MISSING
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    name: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with its controls set apart; `of` heads the names of the rows."""

    title: str
    columns: list[Column]
    methods: list[Line]
    controls: list[Line]
    of: str = "Method"

    @property
    def heads(self) -> list[tuple[bool, int]]:
        """Runs of columns as (published, how many); empty when nothing is published."""
        runs = [(published, len(list(run))) for published, run in groupby(self.columns, lambda c: c.published)]
        return runs if len(runs) > 1 else []


def scored(results: dict[str, Any], modality: str) -> list[Row]:
    """The rows of one modality that have scores: those of methods that refused the model are left out."""
    return [row for row in results.get("rows") or [] if row.get("modality") == modality and not row.get("error")]


def assemble(title: str, rows: Sequence[Row], columns: Sequence[tuple[Column, list[Cell]]]) -> Table | None:
    """The table of these columns; None without rows or columns."""
    if not rows or not columns:
        return None
    lines = [Line(row["name"], row.get("note") or "", [cells[i] for _, cells in columns]) for i, row in enumerate(rows)]
    parts: dict[bool, list[Line]] = {False: [], True: []}
    for row, line in zip(rows, lines, strict=True):
        parts[bool(row.get("control"))].append(line)
    return Table(title, [head for head, _ in columns], parts[False], parts[True])


def _with_column(table: Table, head: Column, cells: dict[str, Cell]) -> Table:
    """The table with a column more; rows that it does not name get a dash."""

    def widen(lines: Iterable[Line]) -> list[Line]:
        return [Line(line.name, line.note, [*line.cells, cells.get(line.name, Cell())]) for line in lines]

    return Table(table.title, [*table.columns, head], widen(table.methods), widen(table.controls))


def with_published(table: Table, published: dict[str, dict[str, Any]]) -> Table:
    """The table with the published figures in columns of their own; methods that were only published close it."""
    keys = list(dict.fromkeys(key for figures in published.values() for key in figures))
    heads = [Column(PUBLISHED_COLUMNS.get(key, key), published=True) for key in keys]

    def figures(name: str) -> list[Cell]:
        return [_published_cell((published.get(name) or {}).get(key)) for key in keys]

    def widen(lines: Iterable[Line]) -> list[Line]:
        return [Line(line.name, line.note, line.cells + figures(line.name)) for line in lines]

    known = {line.name for line in table.methods + table.controls}
    only = [
        Line(name, "published only", [Cell()] * len(table.columns) + figures(name))
        for name in published
        if name not in known
    ]
    return Table(table.title, table.columns + heads, widen(table.methods) + only, widen(table.controls))


def _published_cell(figure: Sequence[float | None] | None) -> Cell:
    """Mean and standard deviation as the paper prints them."""
    if not figure or figure[0] is None:
        return Cell()
    return Cell(with_spread(figure[0], figure[1] if len(figure) > 1 else None))


def with_spread(value: float, std: float | None) -> str:
    """Mean and, if there is one, standard deviation, as the paper prints them."""
    return number(value, 2) + ("" if std is None else f" ± {number(std, 2)}")


def arrow(metric: dict[str, Any]) -> str:
    """The better direction, tied to the label before it; empty without one."""
    higher = metric.get("higher_is_better")
    return "" if higher is None else "\N{NO-BREAK SPACE}" + ("↑" if higher else "↓")


def best_value(metric: dict[str, Any], values: Sequence[float | None]) -> float | None:
    """The best of at least two values, None where the metric has no better direction."""
    found, higher = [value for value in values if value is not None], metric.get("higher_is_better")
    if len(found) < 2 or higher is None:
        return None
    return max(found) if higher else min(found)


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """The value with so many decimals and never -0, with its sign if it shall be `signed`; a dash for none."""
    return MISSING if value is None else f"{round(value, digits) + 0.0:{'+' * signed}.{digits}f}"


def interval(score: Score, digits: int) -> str:
    """The interval as `0.77 to 0.90`; empty without a value or an end."""
    if None in (score["value"], score.get("low"), score.get("high")):
        return ""
    return f"{number(score['low'], digits)} to {number(score['high'], digits)}"


def quoted(name: str) -> str:
    """The name, in quotation marks where a list of names would otherwise be read wrongly."""
    return f"“{name}”" if re.search(r"[,;:]| and ", name) else name


def listed(names: Sequence[str]) -> str:
    """Names as `a, b and c`; empty for none."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
