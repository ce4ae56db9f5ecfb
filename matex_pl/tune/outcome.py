"""Result of a search as plain types, text, a picture and the YAML of a method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from matex_pl import attribution
from matex_pl.attribution import Matex
from matex_pl.data.pair import ImageTextPair
from matex_pl.evaluation.intervals import Detections, Sums, draw_patients, estimate, plain
from matex_pl.files import MARK, whole_file, write_text
from matex_pl.tune.search import AXES, FINALISTS, NUMBERS, Choice

RESAMPLES = 2000
OUTPUTS = {
    "tuned.yaml": "# MATEX tuned by",
    "tune.json": '"created":',
    "surface.png": MARK,
    "surface.svg": MARK,
}
"""Files of a search, with the marks of earlier ones for `check_outputs`."""
# Shape, marker, size and color of both settings in the picture.
_MARKS = {"own": ("disc", "o", 14, "white"), "winner": ("star", "*", 11, "#e4002b")}


def report(
    choice: Choice,
    tests: Sequence[Sums | Detections],
    pairs: Mapping[str, Sequence[ImageTextPair]],
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Result as plain types.

    Args:
        choice: Result on validation pairs.
        tests: Values of the test pairs under the method's own setting and under the winner.
        pairs: Pairs by split.
        seconds: Seconds for the components of the validation pairs.
        seed: Random seed of the bootstrap.
    """
    goal, (own, winner) = choice.objective, tests
    counts = {
        split: {"pairs": len(pairs[split]), "patients": len({pair.patient_id for pair in pairs[split]})}
        for split in ("val", "test")
    }
    drawn = draw_patients([pair.patient_id for pair in pairs["test"]], RESAMPLES, seed)
    return {
        "format": 1,
        "objective": {"name": goal.name, "title": goal.title, "higher_is_better": goal.sign > 0},
        "tried": choice.grid.axes,
        "varied": choice.grid.varied,
        "without_effect": choice.grid.idle,
        "raster": choice.raster,
        "settings": [
            setting | {"score": plain(score)}
            for setting, score in zip(choice.grid.settings, choice.scores.flatten().tolist(), strict=True)
        ],
        "on_all_pixels": [
            {name: getattr(scored.method, name) for name in AXES} | {"score": plain(scored.score)}
            for scored in choice.best[: FINALISTS + 1]
        ],
        "own": choice.own.method.settings,
        "winner": choice.winner.method.settings,
        "validation": counts["val"] | {"own": plain(choice.own.score), "winner": plain(choice.winner.score)},
        "test": counts["test"]
        | {"own": plain(float(own.score())), "winner": plain(float(winner.score()))}
        | {"difference": estimate(winner, drawn, own).plain()},
        "seconds": {"components": seconds, **choice.seconds},
        "ratio": choice.seconds["settings"] / seconds,
    }


def verdict(result: Mapping[str, Any]) -> str:
    """Conclusion from the test pairs, in one or two sentences."""
    if result["own"] == result["winner"]:
        return "Tuning gained nothing: on validation pairs no setting is better than the method's own."
    low, high = result["test"]["difference"]["low"], result["test"]["difference"]["high"]
    if low is None:
        return "No test pair counts, therefore the gain is unknown."
    if low <= 0 <= high:
        return "Tuning gained nothing that the test pairs confirm: the interval of the difference contains 0."
    if (low > 0) == result["objective"]["higher_is_better"]:
        return "The test pairs confirm the gain: the interval of the difference excludes 0."
    return "Tuning lost: on the test pairs the tuned setting is worse. Keep the method's own setting."


def describe(result: Mapping[str, Any]) -> str:
    """Text of a `report`, which the command prints."""
    validation, test, names, seconds = (result[name] for name in ("validation", "test", "varied", "seconds"))
    gain = test["difference"]
    rows = [
        [title, *(_short(result[title][name]) for name in names), number(validation[title]), number(test[title])]
        for title in ("own", "winner")
    ]
    where = f" on a raster of {' x '.join(map(str, result['raster']))}" if result["raster"] else ""
    again = f" Scoring the best {len(result['on_all_pixels'])} on all pixels took {seconds.get('finalists', 0):.2f} s."
    lines = [
        f"{result['objective']['title']}; {len(result['settings'])} settings were tried.",
        "",
        f"| setting | {' | '.join(names)} | validation (used for the selection) | test |",
        f"|{'---|' * (len(names) + 3)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"Validation: {validation['pairs']} pairs of {validation['patients']} patients; test: {test['pairs']} of "
        f"{test['patients']}. On test pairs the winner minus the method's own setting is "
        f"{number(gain['value'], '+')} ({number(gain['low'], '+')} to {number(gain['high'], '+')}, 95 % bootstrap by "
        "patient).",
        verdict(result),
        f"{len(result['settings'])} settings{where} took {seconds['settings']:.2f} s, {result['ratio']:.1%} of the "
        f"{seconds['components']:.2f} s of the components.{again if where else ''}",
    ]
    idle = "; ".join(f"{name}: {reason}" for name, reason in result["without_effect"].items())
    return "\n".join(lines + [f"Not varied, because they have no effect here: {idle}."] * bool(idle))


def write_files(folder: Path, result: Mapping[str, Any], choice: Choice) -> list[Path]:
    """Write the method, the picture and all scores; returns the paths."""
    figure = draw_surface(choice, result["validation"]["pairs"])
    texts = {
        "tuned.yaml": as_yaml(choice.winner.method, result),
        "tune.json": json.dumps(result, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    for kind, key in (("png", "Software"), ("svg", "Creator")):
        with whole_file(folder / f"surface.{kind}") as part:
            figure.savefig(part, format=kind, dpi=150, metadata={key: MARK})
    return [folder / name for name in (*texts, "surface.png", "surface.svg")]


def as_yaml(method: Matex, result: Mapping[str, Any]) -> str:
    """YAML of the method like the shipped ones: the tuned settings, and all settings that differ from the defaults."""
    kind, validation, test = type(method), result["validation"], result["test"]
    defaults = kind().settings
    kept = {name: value for name, value in method.settings.items() if value != defaults[name] or name in NUMBERS}
    module = attribution.__name__ if getattr(attribution, kind.__name__, None) is kind else kind.__module__
    lines = [
        f"MATEX tuned by `matex tune`, {result['created']}: {result['objective']['name']} on {validation['pairs']} "
        "validation",
        f"pairs of {result['data']['class']} (seed {result['seed']}), weights {result['model']['weights'][:12]}.",
        f"Validation (used for the selection): {number(validation['winner'])}, before {number(validation['own'])}. "
        f"Test: {number(test['winner'])}, before {number(test['own'])}.",
        verdict(result),
    ]
    described = {"class_path": f"{module}.{kind.__qualname__}", "init_args": kept}
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(described, sort_keys=False)


def draw_surface(choice: Choice, pairs: int) -> Figure:
    """Scores over lambda_s, lambda_c and tau: one panel per tau, on one scale, brighter is better.

    The panels show the blocks, the flow and the prior shape of the best setting of the grid. A disc marks the method's
    own setting and a star the winner, if they are on these panels.
    """
    grid = choice.grid
    lambda_s, lambda_c, tau = (grid.axes[name] for name in NUMBERS)
    shown = next(place for scored in choice.best if (place := grid.place(scored.method)))[:-3]
    scores = choice.scores[shown]
    columns = min(len(tau), 4)
    rows = -(-len(tau) // columns)
    width = max(2.5 * columns + 1.8, 7)
    figure = Figure(figsize=(width, max(2.4 * rows + 1.9, 4.8)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    finite = scores[np.isfinite(scores)]
    style: dict[str, Any] = {"vmin": finite.min(), "vmax": finite.max()} if finite.size else {}
    style |= {"cmap": "viridis" if choice.objective.sign > 0 else "viridis_r", "origin": "lower", "aspect": "auto"}
    for index, (panel, value) in enumerate(zip(panels, tau, strict=False)):
        image = panel.imshow(scores[..., index], **style)
        panel.set_title(f"tau {value:g}", fontsize=10)
        # A panel without another one below it needs its own labels.
        panel.tick_params(labelbottom=index + columns >= len(tau))
        for set_ticks, values in ((panel.set_xticks, lambda_c), (panel.set_yticks, lambda_s)):
            # Every value, or every second one if there are many.
            step = 1 if len(values) < 7 else 2
            set_ticks(range(0, len(values), step), [f"{value:g}" for value in values[::step]], fontsize=8)
    for panel in panels[len(tau) :]:
        panel.set_axis_off()
    varied, unit = grid.varied, {"image": "pixels", "text": "words"}[choice.objective.side]
    where = f"a raster of {' x '.join(map(str, choice.raster))}" if choice.raster else f"all {unit}"
    several = " and ".join(name for name in AXES[:-3] if name in varied)
    title = [f"{choice.objective.title}: {pairs} validation pairs on {where}"]
    title[0] += f", panels at the best {several}" * bool(several)
    for name, (mark, marker, size, color) in _MARKS.items():
        scored = choice.own if name == "own" else choice.winner
        place = grid.place(scored.method)
        away = ", not on these panels"
        if place is not None and place[:-3] == shown:
            away = ""
            up, across, index = place[-3:]
            style = {"marker": marker, "markersize": size, "markerfacecolor": color, "markeredgecolor": "black"}
            panels[index].plot(across, up, label=name, linestyle="none", clip_on=False, zorder=3, **style)
        setting = ", ".join(f"{axis} {_short(getattr(scored.method, axis))}" for axis in varied)
        title.append(f"{mark}: {name}, {setting}: {number(scored.score)} on all {unit}{away}")
    figure.colorbar(image, ax=list(panels), label=choice.objective.title, shrink=0.9)
    figure.suptitle("\n".join(fill(line, int(12 * width)) for line in title), fontsize=10)
    figure.supxlabel("lambda_c, weight of the consistent gradients", fontsize=10)
    figure.supylabel("lambda_s, strength of the prior", fontsize=10)
    return figure


def number(value: float | None, sign: str = "") -> str:
    """Text of a score, with its sign if `sign` is `+`; `none` if no pair counts."""
    return "none" if value is None or not isfinite(value) else f"{value:{sign}.4f}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
