"""What was found, as plain types, as a text, and as the YAML of a method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matex_pl import attribution
from matex_pl.attribution import Matex
from matex_pl.data.study import Study
from matex_pl.evaluation.intervals import Score, difference, draw_patients, plain
from matex_pl.files import whole_file
from matex_pl.tune.choose import FINALISTS, Choice
from matex_pl.tune.grid import AXES, idle_settings
from matex_pl.tune.surface import draw_surface, number, short

RESAMPLES = 2000


def report(
    found: Choice, tests: Sequence[Score], studies: Mapping[str, Sequence[Study]], seconds: float, seed: int
) -> dict[str, Any]:
    """What was found, as plain types.

    Args:
        found: On validation pairs.
        tests: What the test studies score under the method's own setting and the winner.
        studies: The pairs by split.
        seconds: That the components of the validation pairs took.
        seed: Of the bootstrap.
    """
    goal, scores = found.objective, found.scores.flatten().tolist()
    exact = [
        {name: getattr(scored.method, name) for name in AXES} | {"score": plain(scored.score)} for scored in found.best
    ]
    return {
        "format": 1,
        "objective": {"name": goal.name, "title": goal.title, "higher_is_better": goal.sign > 0},
        "tried": found.grid.axes,
        "varied": found.grid.varied,
        "without_effect": idle_settings(found.own.method, goal, [study.phrase for study in studies["val"]]),
        "raster": found.raster,
        "settings": [
            setting | {"score": plain(score)} for setting, score in zip(found.grid.settings(), scores, strict=True)
        ],
        "on_all_pixels": exact[: FINALISTS + 1],
        "own": found.own.method.settings,
        "winner": found.winner.method.settings,
        "validation": _counts(studies["val"]) | {"own": plain(found.own.score), "winner": plain(found.winner.score)},
        "test": _counts(studies["test"]) | _compare(tests, studies["test"], seed),
        "seconds": {"components": seconds, **found.seconds},
        "ratio": found.seconds["settings"] / seconds,
    }


def _compare(tests: Sequence[Score], studies: Sequence[Study], seed: int) -> dict[str, Any]:
    """Both scores on test, and the difference of the winner from the own with its interval over patients."""
    own, winner = tests
    drawn = draw_patients([study.patient_id for study in studies], RESAMPLES, seed)
    scores = {"own": plain(float(own.score())), "winner": plain(float(winner.score()))}
    return scores | {"difference": difference(winner, own, drawn)}


def _counts(studies: Sequence[Study]) -> dict[str, Any]:
    return {"pairs": len(studies), "patients": len({study.patient_id for study in studies})}


def verdict(said: Mapping[str, Any]) -> str:
    """What the test pairs say about the winner, in a sentence."""
    if said["own"] == said["winner"]:
        return "Tuning gained nothing: none of these settings is better on validation than the method's own."
    low, high = said["test"]["difference"]["low"], said["test"]["difference"]["high"]
    if low is None:
        return "No test study counts, so that nothing can be said about the gain."
    if low <= 0 <= high:
        return "Tuning gained nothing that the test pairs can show: the interval of the difference holds 0."
    if (low > 0) == said["objective"]["higher_is_better"]:
        return "The test pairs agree: the tuned setting is better, by more than chance in these patients."
    return "Tuning lost: on the test pairs the tuned setting is worse than the method's own. Keep that."


def describe(said: Mapping[str, Any]) -> str:
    """What the command prints of `report`."""
    validation, test, names = said["validation"], said["test"], said["varied"]
    lines = [
        f"{said['objective']['title']}; {len(said['settings'])} settings were tried.",
        "",
        f"| setting | {' | '.join(names)} | validation, chosen there: optimistic | test |",
        f"|{'---|' * (len(names) + 3)}",
    ]
    for title in ("own", "winner"):
        values = " | ".join(short(said[title][name]) for name in names)
        lines.append(f"| {title} | {values} | {number(validation[title])} | {number(test[title])} |")
    gain = test["difference"]
    lines += [
        "",
        f"Validation: {validation['pairs']} pairs of {validation['patients']} patients; test: {test['pairs']} of "
        f"{test['patients']}. On test the winner less the own is {number(gain['value'], '+')} "
        f"({number(gain['low'], '+')} to {number(gain['high'], '+')}, 95 % bootstrap by patient).",
        verdict(said),
        _timing(said),
    ]
    idle = "; ".join(f"{name}: {reason}" for name, reason in said["without_effect"].items())
    return "\n".join(lines + [f"Left as they are, for they change nothing here: {idle}."] * bool(idle))


def _timing(said: Mapping[str, Any]) -> str:
    seconds = said["seconds"]
    where = f" on a raster of {' x '.join(map(str, said['raster']))}" if said["raster"] else ""
    again = f"; the best {len(said['on_all_pixels'])} again{' on all pixels' * bool(said['raster'])}"
    again = f"{again}, {seconds['finalists']:.2f} s" if "finalists" in seconds else ""
    return (
        f"{len(said['settings'])} settings{where} took {seconds['settings']:.2f} s, {said['ratio']:.1%} of the "
        f"{seconds['components']:.2f} s of the components{again}."
    )


def write_files(folder: Path, said: Mapping[str, Any], found: Choice) -> list[Path]:
    """Write the method, the picture and all scores; returns the paths."""
    figure = draw_surface(found, said["validation"]["pairs"])
    text = json.dumps(said, indent=1, allow_nan=False) + "\n"
    save: dict[str, Callable[[Path], Any]] = {
        "tuned.yaml": lambda path: path.write_text(as_yaml(found.winner.method, said), encoding="utf-8"),
        "surface.png": lambda path: figure.savefig(path, format="png", dpi=150),
        "surface.svg": lambda path: figure.savefig(path, format="svg"),
        "tune.json": lambda path: path.write_text(text, encoding="utf-8"),
    }
    for name, write in save.items():
        with whole_file(folder / name) as part:
            write(part)
    return [folder / name for name in save]


def as_yaml(method: Matex, said: Mapping[str, Any]) -> str:
    """The method in the form of the shipped ones: what differs from the constructor's defaults, and what was tuned."""
    kind = type(method)
    defaults, settings = kind().settings, method.settings
    kept = {name: value for name, value in settings.items() if value != defaults[name] or name in AXES[2:]}
    shipped = getattr(attribution, kind.__name__, None) is kind
    described = {
        "class_path": f"{attribution.__name__ if shipped else kind.__module__}.{kind.__qualname__}",
        "init_args": kept,
    }
    goal, validation, test, model = (said[name] for name in ("objective", "validation", "test", "model"))
    lines = [
        f"MATEX as `matex tune` found it, {said['created']}: {goal['name']} on {validation['pairs']} validation",
        f"pairs of {said['data']['class']} (seed {said['seed']}), weights {model['weights'][:12]}.",
        f"Validation {number(validation['winner'])}, chosen there, and {number(validation['own'])} before; "
        f"test {number(test['winner'])} and {number(test['own'])}.",
        verdict(said),
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(described, sort_keys=False)
