"""What people see of ROAR+: tables beside the published figures, what stands out from the controls, curves, a page.

ROAR+ is by how many percent the clean validation loss rises when the model is trained again on films, or phrases,
without what a method ranks highest; higher is better. Words stand in `templates/`, look and plots are `report`'s.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from matex_pl.console import duration
from matex_pl.files import whole_file, write_text
from matex_pl.report.benchmark import Addition, write_report
from matex_pl.report.gallery import read_panels
from matex_pl.report.plots import (
    ACCENT,
    GRID,
    MUTED,
    SECOND,
    THIRD,
    WIDTH,
    Plot,
    Stroke,
    as_floats,
    axis_limits,
    curve_plot,
    draw_svg,
    shorten,
)
from matex_pl.report.published import PUBLISHED
from matex_pl.report.tables import (
    FEATURED,
    MODALITIES,
    Cell,
    Column,
    Line,
    Row,
    Score,
    Table,
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
    with_spread,
)

FORMAT = 1
# How the curves are drawn.
LEGEND = (
    "Bars: standard deviation over the repeats. Grey, hollow: controls. Points of one share stand side by side, so "
    "that bars can be told apart."
)
# In the folder of a benchmark.
BESIDE, PANELS = "roar.json", "panels"
UNITS = {"image": "patches", "text": "tokens"}
LEVEL = 0.05
ROAR = "ROAR+\N{NO-BREAK SPACE}↑"
_BENCHMARK = "`matex benchmark --config FILE --ckpt_path FILE --out {}`"


def write_roar(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `table.md`, `report.html` and, per modality, `curves_<modality>.png` and `.svg`; all or none of them.

    Args:
        results: Of ROAR+, as in its `results.json`.
        folder: Made if it is not there; curves of a modality that the results do not have are removed.

    Returns:
        The files, the page first.

    Raises:
        ValueError: The results are of another kind or format.
    """
    found = _checked(results)
    page = environment(autoescape=True).get_template("roar.html.jinja").render(**_words(found), **_plots(found))
    files: dict[str, bytes] = {"report.html": page.encode(), "table.md": roar_tables(found).encode()}
    for modality in _modalities(found):
        figure = roar_figure(found, modality)
        files |= {f"curves_{modality}.{kind}": _saved(figure, kind) for kind in ("png", "svg")}
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(whole_file(folder / name)).write_bytes(content)
    for modality in set(MODALITIES) - set(_modalities(found)):
        for kind in ("png", "svg"):
            (folder / f"curves_{modality}.{kind}").unlink(missing_ok=True)
    return [folder / name for name in files]


def add_to_report(roar_results: dict[str, Any], benchmark_folder: Path | str) -> Path:
    """Put ROAR+ onto the page and into the tables of a benchmark that has run; nothing is measured anew.

    Args:
        roar_results: Of ROAR+, as in its `results.json`.
        benchmark_folder: The benchmark's `--out`. It gets `roar.json`, which later benchmarks there show too.

    Returns:
        The page.

    Raises:
        FileNotFoundError: No benchmark has run there, or one of a version that kept no panels.
        ValueError: The results are of another kind or format.
    """
    folder, roar = Path(benchmark_folder), _checked(roar_results)
    for path in (folder / "results.json", folder / PANELS / "index.json"):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {path.relative_to(folder).as_posix()}, so there is no page to add ROAR+ to. "
                f"{_BENCHMARK.format(folder)} makes it; maps and scores that are there already are taken from disk."
            )
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    write_report(found, read_panels(folder / PANELS), folder, benchmark_addition(found, roar))
    write_text(folder / BESIDE, json.dumps(roar, indent=1, allow_nan=False))
    return folder / "report.html"


def read_roar(folder: Path) -> dict[str, Any] | None:
    """The `roar.json` in the folder of a benchmark; None where there is none.

    Raises:
        ValueError: The file is damaged, or of another kind or format.
    """
    path = folder / BESIDE
    if not path.is_file():
        return None
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} cannot be shown: {error} Remove it, or add the results of ROAR+ again.") from error


def _checked(results: dict[str, Any]) -> dict[str, Any]:
    """The results, cleaned."""
    if results.get("kind") != "roar" or results.get("format") != FORMAT:
        raise ValueError(
            f"Results of ROAR+ must have kind 'roar' and format {FORMAT}, got {results.get('kind')!r} and "
            f"{results.get('format')!r}. Give the results.json of `matex roar`, of this version of matex_pl."
        )
    found: dict[str, Any] = clean(results)
    return found


def roar_tables(results: dict[str, Any], *, is_short: bool = False) -> str:
    """All tables as Markdown: scores beside the published ones, what is more than noise, what failed, clean losses.

    Args:
        results: Of ROAR+, as in its `results.json`.
        is_short: The scores, what is more than noise and what failed alone, for a terminal.

    Raises:
        ValueError: The results are of another kind or format.
    """
    template = environment(autoescape=False).get_template("roar.md.jinja")
    return template.render(**_words(_checked(results)), is_short=is_short)


def score_table(results: dict[str, Any], modality: str) -> Table | None:
    """Methods by fraction dropped, MATEX first and controls last, the published ROAR+ beside; None without rows."""
    rows = _rows(results, modality)
    columns = [_point_column(rows, fraction, modality) for fraction in _fractions(results, rows)]
    means = [row.get("mean") or {} for row in rows]
    columns += [_column(rows, means, "mean over the fractions")] if len(columns) > 1 else []
    table = assemble(f"Maps of the {MODALITIES[modality]}", rows, columns)
    figures = {name: {"roar": entry["roar"]} for name, entry in PUBLISHED[modality].items()}
    return table and with_published(table, figures)


def _point_column(rows: Sequence[Row], fraction: float, modality: str) -> tuple[Column, list[Cell]]:
    points = [_point(row, fraction) for row in rows]
    units = [point["units"] for point in points if point.get("units") is not None]
    counted = ""
    if units:
        ends = [number(end, 1) for end in (min(units), max(units))]
        counted = f": {' to '.join(dict.fromkeys(ends))} {UNITS[modality]} per pair"
    return _column(rows, points, f"{percent(fraction)} dropped{counted}")


def _column(rows: Sequence[Row], points: Sequence[Score], detail: str) -> tuple[Column, list[Cell]]:
    """Means with deviations, the best of the methods marked; what is not whole is a dash."""
    values = [point.get("value") for point in points]
    best = best_value(
        {"higher_is_better": True}, [v for v, row in zip(values, rows, strict=True) if not row.get("control")]
    )
    # Ties as printed share the mark.
    marked = [
        not row.get("control") and best is not None and number(value, 2) == number(best, 2)
        for value, row in zip(values, rows, strict=True)
    ]
    cells = [_mean_cell(point, best=best) for point, best in zip(points, marked, strict=True)]
    repeats = max((len(point.get("repeats") or []) for point in points), default=0)
    return Column(ROAR, detail, _count(repeats, "repeat")), cells


def _mean_cell(point: Score, *, best: bool) -> Cell:
    """Mean and deviation, or of how many repeats there is a value where one is missing."""
    if point.get("value") is not None:
        return Cell(with_spread(point["value"], point.get("std")), best=best)
    repeats = point.get("repeats") or []
    done = sum(value is not None for value in repeats)
    return Cell(interval=f"{done} of {_count(len(repeats), 'repeat')}" if repeats else "")


def difference_tables(results: dict[str, Any], modality: str) -> list[Table]:
    """Each method minus each control, over all fractions first and then at each; better beyond noise is marked."""
    tables = []
    for fraction in _tested_fractions(results, modality):
        tests = _tests(results, modality, fraction)
        rows = [row for row in _rows(results, modality) if any(test["row"] == row["name"] for test in tests)]
        rivals = dict.fromkeys(test["against"] for test in tests)
        found = {(test["row"], test["against"]): test for test in tests}
        columns = [_rival_column(rival, [found.get((row["name"], rival), {}) for row in rows]) for rival in rivals]
        table = assemble(f"Maps of the {MODALITIES[modality]}, {_where(fraction)}", rows, columns)
        tables += [table] if table else []
    return tables


def _rival_column(rival: str, tests: Sequence[Score]) -> tuple[Column, list[Cell]]:
    cells = [
        Cell(number(test.get("difference"), 2, signed=True), _certainty(test), verdict(test) == "better")
        for test in tests
    ]
    return Column(f"minus {rival}"), cells


def _certainty(test: Score) -> str:
    """Interval and p as far as there are any."""
    ends = interval({**test, "value": test.get("difference")}, 2)
    p = test.get("p_holm")
    return ", ".join(filter(None, [ends, "" if p is None else _p(p)]))


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdict(test: Mapping[str, Any]) -> str:
    """A test in a word: `better`, `worse`, `undecided` (p after Holm's correction is not below 0.05) or `open`."""
    if test.get("difference") is None or test.get("p_holm") is None:
        return "open"
    if test["p_holm"] >= LEVEL:
        return "undecided"
    return "better" if test["difference"] > 0 else "worse"


VERDICTS = {
    "better": "better than",
    "worse": "worse than",
    "undecided": "not distinguishable from",
    "open": "not tested against",
}


def noise_sentences(results: dict[str, Any]) -> list[str]:
    """Per control, which methods differ from it by more than noise: over all fractions, or at each without that."""
    sentences = []
    for modality in _modalities(results):
        for fraction in _tested_fractions(results, modality)[:1]:
            groups: dict[str, list[Score]] = defaultdict(list)
            for test in _tests(results, modality, fraction):
                groups[test["against"]].append(test)
            sentences += [_sentence(against, tests, modality, fraction) for against, tests in groups.items()]
    return sentences


def _sentence(against: str, tests: Sequence[Score], modality: str, fraction: float | None) -> str:
    parts: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        word = verdict(test)
        inside = f" ({number(test['difference'], 2, signed=True)}; {_certainty(test)})" if word != "open" else ""
        parts[word].append(quoted(test["row"]) + inside)
    clauses = [f"{words} {quoted(against)}: {listed(parts[word])}" for word, words in VERDICTS.items() if word in parts]
    return f"Maps of the {MODALITIES[modality]}, {_where(fraction)}: {'; '.join(clauses)}."


def _where(fraction: float | None) -> str:
    return "mean over the fractions" if fraction is None else f"{percent(fraction)} dropped"


def clean_table(results: dict[str, Any]) -> Table | None:
    """Loss and scores of the models that were trained on whole pairs, per repeat; None without any."""
    runs = results.get("clean") or []
    names = list(dict.fromkeys(name for run in runs for name in run.get("metrics") or {}))
    lines = [
        Line(f"repeat-{run['repeat']}", "", [_plain_cell(value) for value in (run.get("loss"), *_picked(run, names))])
        for run in runs
    ]
    heads = [Column("Validation loss\N{NO-BREAK SPACE}↓"), *(Column(name) for name in names)]
    return Table("Clean models", heads, lines, [], of="Repeat") if runs else None


def _picked(run: dict[str, Any], names: Sequence[str]) -> list[float | None]:
    return [(run.get("metrics") or {}).get(name) for name in names]


def _plain_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:#.4g}")


def percent(fraction: float) -> str:
    """A share as `12.5 %`, the sign tied to the number."""
    return f"{round(100 * fraction, 6):g}\N{NO-BREAK SPACE}%"


def _time_sentence(results: dict[str, Any]) -> str:
    """How many trainings were made in which time; empty where that is not known."""
    time, parts = results.get("time") or {}, []
    if time.get("cells") is not None and time.get("done") is not None:
        parts.append(f"{time['done']} of {time['cells']} trainings done")
    if time.get("seconds") is not None:
        parts.append(f"{duration(time['seconds'])} in all")
    if time.get("other_share") is not None:
        parts.append(f"{percent(round(1 - time['other_share'], 2))} of it inside training steps")
    if results.get("machine") and parts:
        parts.append(f"on {results['machine']}")
    return f"{', '.join(parts)}." if parts else ""


def _count(number: int, one: str) -> str:
    return "" if not number else f"{number} {one}{'' if number == 1 else 's'}"


def _rows(results: dict[str, Any], modality: str) -> list[Row]:
    """The rows of one modality that were measured: MATEX first, controls last, else in their order."""
    return sorted(scored(results, modality), key=lambda row: (bool(row.get("control")), row.get("class") != FEATURED))


def _modalities(results: dict[str, Any]) -> list[str]:
    return [modality for modality in MODALITIES if _rows(results, modality)]


def _fractions(results: dict[str, Any], rows: Sequence[Row]) -> list[float]:
    """All fractions, from the smallest."""
    asked = (results.get("settings") or {}).get("fractions") or []
    return sorted({*asked, *(point["fraction"] for row in rows for point in row.get("points") or [])})


def _point(row: Row, fraction: float) -> Score:
    return next((point for point in row.get("points") or [] if math.isclose(point["fraction"], fraction)), {})


def _tests(results: dict[str, Any], modality: str, fraction: float | None) -> list[Score]:
    return [
        test for test in results.get("tests") or [] if test["modality"] == modality and test["fraction"] == fraction
    ]


def _tested_fractions(results: dict[str, Any], modality: str) -> list[float | None]:
    """Fractions with tests, the mean over all (None) first."""
    found = {test["fraction"] for test in results.get("tests") or [] if test["modality"] == modality}
    return sorted(found, key=lambda fraction: -1.0 if fraction is None else fraction)


def _words(results: dict[str, Any]) -> dict[str, Any]:
    """What both templates show."""
    rows = results.get("rows") or []
    tables = {modality: difference_tables(results, modality) for modality in _modalities(results)}
    return {
        "results": results,
        "tables": [table for table in (score_table(results, modality) for modality in _modalities(results)) if table],
        "sentences": noise_sentences(results),
        "differences": [table for found in tables.values() for table in found],
        "tested": max((test.get("n") or 0 for test in results.get("tests") or []), default=0),
        "untested": all(verdict(test) == "open" for test in results.get("tests") or []),
        "clean": clean_table(results),
        "refused": [row for row in rows if row.get("error")],
        "rows": rows,
        "time": _time_sentence(results),
        "modalities": MODALITIES,
        "published": PUBLISHED["source"],
    }


# One scheme for paper, a dark page and a light one: colour, dashes and mark together tell methods apart, also in grey.
PRINT_COLOURS = {ACCENT: "#0b63b5", SECOND: "#b4480f", THIRD: "#6b3fa0", MUTED: "#7a828b", GRID: "#e2e6ea"}
COLOURS, DASHES, MARKS = (ACCENT, SECOND, THIRD), ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2))), "osD^vPX<>h"
_LABEL_HEIGHT = 15 / 72


def roar_figure(results: dict[str, Any], modality: str) -> Figure:
    """A matplotlib figure: ROAR+ over the share that is dropped, a line per method and its deviation over repeats.

    Args:
        results: Of ROAR+, as in its `results.json`.
        modality: `image` or `text`.

    Raises:
        ValueError: The results are of another kind or format, or have nothing of this modality.
    """
    results = _checked(results)
    if modality not in _modalities(results):
        raise ValueError(f"No row of modality {modality!r}; the results have {_modalities(results) or 'none'}.")
    rows = _rows(results, modality)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 10}):
        figure = Figure(figsize=(7.6, max(4.4, _LABEL_HEIGHT * len(rows) + 1.3)), dpi=150)
        figure.subplots_adjust(left=0.1, right=0.72, bottom=0.13, top=0.91)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        _draw(axes, results, modality, PRINT_COLOURS)
        data = results.get("data") or {}
        about = f"Maps of the {MODALITIES[modality]}"
        axes.set_title(f"{about}, {shorten(data['class'])}" if data.get("class") else about, fontsize=11, loc="left")
    return figure


def _draw(axes: Axes, results: dict[str, Any], modality: str, colours: Mapping[str, str]) -> None:
    """Lines with their deviations, named at their right ends."""
    rows = _rows(results, modality)
    fractions = [100 * fraction for fraction in _fractions(results, rows)]
    values = [(row, *_heights(row, fractions)) for row in rows]
    # What could not be measured at all has no place to be named at.
    values = [entry for entry in values if any(math.isfinite(height) for height in entry[1])]
    gap = min(np.diff(fractions), default=10.0)
    styles, ends = _styles([row for row, *_ in values]), []
    for place, (row, heights, spreads) in enumerate(values):
        colour, dashes, mark = styles[row["name"]]
        # Side by side, so that deviations do not cover each other.
        across = np.array(fractions) + 0.3 * gap * ((place + 0.5) / len(values) - 0.5)
        style: dict[str, Any] = {"color": colours[colour], "zorder": 2 if row.get("control") else 3}
        axes.errorbar(across, heights, spreads, linestyle="none", elinewidth=1, capsize=2, **style)
        axes.plot(across, heights, marker=mark, linestyle=dashes, linewidth=1.6, markersize=5, **_hollow(row), **style)
        last = max(i for i, height in enumerate(heights) if math.isfinite(height))
        ends.append((row["name"], across[last], heights[last], colours[colour]))
    axes.axhline(0, color="#000000", linewidth=1, zorder=1)
    axes.set_xticks(fractions, [f"{round(fraction, 6):g}" for fraction in fractions])
    axes.set_xlim(min(fractions, default=0) - 0.5 * gap, max(fractions, default=1) + 0.5 * gap)
    axes.set_xlabel(f"{UNITS[modality]} dropped in training, %")
    axes.set_ylabel("ROAR+, %")
    axes.grid(axis="y", color=colours[GRID])
    _label(axes, ends, axes.get_figure().get_size_inches()[1])  # type: ignore[union-attr]


def _heights(row: Row, fractions: Sequence[float]) -> tuple[list[float], list[float]]:
    """Value and deviation at each fraction (in percent), NaN for none."""
    points = [_point(row, fraction / 100) for fraction in fractions]
    return as_floats(point.get("value") for point in points), as_floats(point.get("std") for point in points)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, Any, str]]:
    """Colour, dashes and mark by name; controls are pale."""
    styles: dict[str, tuple[str, Any, str]] = {}
    for control in (False, True):
        for place, row in enumerate(row for row in rows if bool(row.get("control")) == control):
            colour = MUTED if control else COLOURS[place % len(COLOURS)]
            dashes = DASHES[1 + place % 3] if control else DASHES[place // len(COLOURS) % len(DASHES)]
            styles[row["name"]] = colour, dashes, MARKS[place % len(MARKS)]
    return styles


def _hollow(row: Row) -> dict[str, Any]:
    return {"fillstyle": "none"} if row.get("control") else {}


def _label(axes: Axes, ends: Sequence[tuple[str, float, float, str]], height: float) -> None:
    """Names to the right of the frame at the height of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    frame = axes.get_position().height * height
    order = sorted(ends, key=lambda end: end[2])
    places = moved_apart([(end[2] - low) / (high - low) for end in order], _LABEL_HEIGHT / frame)
    for (name, x, y, colour), place in zip(order, places, strict=True):
        axes.annotate(
            shorten(name),
            (x, y),
            (1.04, place),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def moved_apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in [0, 1], moved as little as possible in squares so that they are `gap` apart, or less if crowded.

    With `i * gap` taken off they only have to rise: what does not is pooled to its mean.
    """
    gap = min(gap, 1 / max(len(places) - 1, 1))
    pools: list[list[float]] = []
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    room = 1 - (len(places) - 1) * gap
    level = [min(max(mean(pool), 0), room) for pool in pools for _ in pool]
    return [start + i * gap for i, start in enumerate(level)]


def _saved(figure: Figure, kind: str) -> bytes:
    """A figure as a file."""
    file = io.BytesIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "roar"}
    nothing = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format=kind, metadata=nothing)
    return file.getvalue()


def _overview(results: dict[str, Any], modality: str) -> Plot:
    """All lines of a modality in one frame, in the page's colours."""
    caption = f"Maps of the {MODALITIES[modality]}"
    height = max(3.2, _LABEL_HEIGHT * len(_rows(results, modality)) + 0.8)
    same = {colour: colour for colour in PRINT_COLOURS}
    svg = draw_svg(
        [lambda axes: _draw(axes, results, modality, same)],
        (WIDTH, height),
        f"ROAR+ over the share that is dropped, {caption.lower()}",
        left=0.13,
        right=0.6,
        bottom=0.5 / height,
        top=1 - 0.1 / height,
    )
    return Plot(caption, svg)


def _plots(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "overviews": [_overview(results, modality) for modality in _modalities(results)],
        "curves": _curves(results),
        "legend": LEGEND,
    }


def _curves(results: dict[str, Any]) -> list[Plot]:
    """Per method a frame per modality, the controls pale behind it."""
    frames: dict[str, list[tuple[str, list[Stroke]]]] = defaultdict(list)
    for modality in _modalities(results):
        for row, strokes in _strokes(results, modality):
            frames[row["name"]].append((f"maps of the {MODALITIES[modality]}", strokes))
    ends = [end for found in frames.values() for _, strokes in found for stroke in strokes for end in _reach(stroke)]
    ticks = sorted({x for found in frames.values() for _, strokes in found for stroke in strokes for x in stroke.x})
    style: dict[str, Any] = {"line": 0, "ticks": [round(tick, 6) for tick in ticks]}
    return [
        Plot(name, curve_plot(found, "dropped, %", axis_limits([0, *ends]), f"{name}: ROAR+", **style))
        for name, found in frames.items()
    ]


def _strokes(results: dict[str, Any], modality: str) -> list[tuple[Row, list[Stroke]]]:
    """Each method that has a value, with its curve and those of the controls."""
    rows = _rows(results, modality)
    fractions = [100 * fraction for fraction in _fractions(results, rows)]
    pale = [Stroke(fractions, _heights(row, fractions)[0], None) for row in rows if row.get("control")]
    own = [(row, *_heights(row, fractions)) for row in rows if not row.get("control")]
    return [(row, [*pale, Stroke(fractions, y, 0, spread)]) for row, y, spread in own if np.isfinite(y).any()]


def _reach(stroke: Stroke) -> list[float]:
    """The ends of a curve's bars, its points where it has none."""
    spread = [
        0 if value is None or not math.isfinite(value) else value for value in stroke.spread or [0] * len(stroke.y)
    ]
    pairs = [(y, width) for y, width in zip(stroke.y, spread, strict=True) if y is not None and math.isfinite(y)]
    return [y + sign * width for y, width in pairs for sign in (-1, 1)]


def benchmark_addition(found: dict[str, Any], roar: dict[str, Any]) -> Addition:
    """ROAR+ for the page of a benchmark; only a sentence if the weights that both explain are not the same.

    Args:
        found: What the benchmark found.
        roar: Of ROAR+, as `read_roar` gives it.
    """
    found = clean(found)
    mine, theirs = ((part.get("model") or {}).get(key) for part, key in ((found, "weights"), (roar, "explained")))
    if not mine or mine != theirs:
        sentence = (
            f"ROAR+ was measured with maps of other weights ({str(theirs or 'unknown')[:12]}) than those of this page "
            f"({str(mine or 'unknown')[:12]}), so it is not shown."
        )
        return Addition({}, [sentence], [])
    columns = {modality: _measured_column(found, roar, modality) for modality in _modalities(roar)}
    plots = [_overview(roar, modality) for modality in _modalities(roar)]
    return Addition({m: column for m, column in columns.items() if column}, _about(roar), plots, LEGEND)


def _measured_column(
    found: dict[str, Any], roar: dict[str, Any], modality: str
) -> tuple[Column, dict[str, Cell]] | None:
    """ROAR+ at the smallest fraction of the rows that the benchmark has too, by their names; None without any."""
    settings = {row["name"]: row.get("settings") for row in scored(found, modality)}
    rows = [row for row in _rows(roar, modality) if row["name"] in settings]
    fractions = _fractions(roar, rows)
    if not rows or not fractions:
        return None
    head, cells = _point_column(rows, fractions[0], modality)
    # A row of the same name may stand for fewer masks or other weights of the parts.
    marked = [
        cell
        if row.get("settings") == settings[row["name"]]
        else replace(cell, interval=_joined(cell, "other settings"))
        for row, cell in zip(rows, cells, strict=True)
    ]
    return head, {row["name"]: cell for row, cell in zip(rows, marked, strict=True)}


def _joined(cell: Cell, note: str) -> str:
    return ", ".join(filter(None, [cell.interval, note]))


def _about(roar: dict[str, Any]) -> list[str]:
    """What a reader of the benchmark's page must know of the run."""
    data, settings, failed = roar.get("data") or {}, roar.get("settings") or {}, roar.get("failed") or []
    sentences = list(noise_sentences(roar))
    if data.get("train_pairs") is not None and settings.get("epochs") is not None:
        sentences.append(
            f"Trained for {_count(settings['epochs'], 'epoch')} on {data['train_pairs']} pairs and measured on "
            f"{data.get('val_pairs')}, {_count(settings.get('repeats') or 0, 'repeat')}, on splits of its own; the "
            "table has the smallest share that was dropped, the curves have all."
        )
    if failed:
        sentences.append(f"Failed, and a dash or a gap here: {listed([str(cell.get('cell')) for cell in failed])}.")
    return [*sentences, *filter(None, [_time_sentence(roar)])]
