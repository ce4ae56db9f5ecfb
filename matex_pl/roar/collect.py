"""Scores of a plan: ROAR+ per method and fraction, and which differences are more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats

from matex_pl.evaluation.compared import BLURRED, RANDOM
from matex_pl.roar.plan import MODALITIES, Plan, PlanMethod, Run
from matex_pl.roar.work import failure, result

FORMAT = 1
_CONTROLS = (RANDOM, BLURRED)


# Per run, its result, or None, and the last line of its error log, or None.
Results = Mapping[Run, dict[str, Any] | None]
Failures = Mapping[Run, str | None]


def collect(plan: Plan) -> dict[str, Any]:
    """Scores of a plan's finished runs as plain JSON types, the argument of `report.roar.write_roar`.

    ROAR+ is 100 (l_r - l_c) / l_c, with the validation losses of a run and of its repeat's clean run; higher is
    better. A mean needs all repeats: missing and failed runs are named, and never averaged over.
    """
    results = {run: result(plan, run) for run in plan.runs()}
    failures = {run: failure(plan, run) for run in plan.runs()}
    rows = [
        _row(plan, method, modality, results, failures)
        for modality in MODALITIES
        if modality in plan.protocol.modalities
        for method in plan.methods_of(modality)
    ]
    return {
        "format": FORMAT,
        "kind": "roar",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **plan.about,
        "data": plan.about["data"] | _split_sizes(results),
        "settings": asdict(plan.protocol) | asdict(plan.training),
        "machine": _machine(plan),
        "rows": rows,
        "clean": [_clean(results[Run(repeat)], repeat) for repeat in range(plan.protocol.repeats)],
        "tests": _tests(rows),
        "refused": plan.refusals(),
        "failed": [
            {"run": run.id, "error": error, "log": f"runs/{run.id}/error.log"}
            for run, error in failures.items()
            if error
        ],
        "time": _times(results),
    }


def _row(plan: Plan, method: PlanMethod, modality: str, results: Results, failures: Failures) -> dict[str, Any]:
    """A line of the tables."""
    points = [_point(plan, method, modality, fraction, results, failures) for fraction in plan.protocol.fractions]
    over_fractions = [_mean_or_none(scores) for scores in zip(*(point["repeats"] for point in points), strict=True)]
    return {
        "name": method.name,
        "modality": modality,
        "control": method.control,
        "class": method.method["class_path"].rpartition(".")[2] if method.method else "",
        "settings": method.method["init_args"] if method.method else {},
        "note": method.note,
        "error": None,
        "points": points,
        "mean": _summary(over_fractions),
    }


def _point(
    plan: Plan, method: PlanMethod, modality: str, fraction: float, results: Results, failures: Failures
) -> dict[str, Any]:
    """The score of a method at a fraction, by repeat and over them."""
    runs = [Run(repeat, method.name, modality, fraction) for repeat in range(plan.protocol.repeats)]
    scores = [_score(results[run], results[Run(run.repeat)]) for run in runs]
    needed = [needed for run in runs for needed in (Run(run.repeat), run)]
    missing = [f"{run.id} ({'failed' if failures[run] else 'not run'})" for run in needed if results[run] is None]
    units = [done["units"] for run in runs if (done := results[run]) is not None]
    return _summary(scores) | {
        "fraction": fraction,
        "units": mean(units) if units else None,
        "missing": missing,
    }


def _score(dropped: dict[str, Any] | None, clean: dict[str, Any] | None) -> float | None:
    """ROAR+ in percent of the clean loss."""
    return None if dropped is None or clean is None else 100 * (dropped["loss"] - clean["loss"]) / clean["loss"]


def _mean_or_none(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return mean(known) if known and len(known) == len(scores) else None


def _summary(scores: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample deviation over repeats; none unless all are there."""
    value = _mean_or_none(scores)
    spread = stdev([score for score in scores if score is not None]) if value is not None and len(scores) > 1 else None
    return {"value": value, "std": spread, "repeats": list(scores)}


def _tests(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tests of every method against both kinds of noise, paired by repeat, at each fraction and over all of them."""
    tests = []
    for modality in dict.fromkeys(row["modality"] for row in rows):
        of_modality = [row for row in rows if row["modality"] == modality]
        compared = [row for row in of_modality if row["name"] not in _CONTROLS]
        for against in (row for row in of_modality if row["name"] in _CONTROLS):
            for place, point in enumerate([*against["points"], against["mean"]]):
                family = [
                    _paired((*row["points"], row["mean"])[place]["repeats"], point["repeats"]) for row in compared
                ]
                for row, test, adjusted in zip(compared, family, _holm([test["p"] for test in family]), strict=True):
                    names = {"row": row["name"], "against": against["name"], "modality": modality}
                    tests.append({**names, "fraction": point.get("fraction"), **test, "p_holm": adjusted})
    return tests


def _paired(scores: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any]:
    """Mean difference over repeats, its 95 % interval and the p-value of Student's paired test; None if a score is."""
    test: dict[str, Any] = {"difference": None, "low": None, "high": None, "p": None}
    pairs = zip(scores, others, strict=True)
    differences = [score - other for score, other in pairs if score is not None and other is not None]
    test["n"] = len(differences)
    if len(differences) < len(scores):
        return test
    test["difference"] = mean(differences)
    if len(set(differences)) > 1:
        found = stats.ttest_1samp(differences, 0.0)
        low, high = found.confidence_interval(0.95)
        test |= {"low": float(low), "high": float(high), "p": float(found.pvalue)}
    return test


def _holm(values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for their number (Holm 1979); None stays None and does not count."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def _clean(done: dict[str, Any] | None, repeat: int) -> dict[str, Any]:
    return {"repeat": repeat, "loss": done and done["loss"], "metrics": done["metrics"] if done else {}}


def _split_sizes(results: Results) -> dict[str, int]:
    done = next(filter(None, results.values()), None)
    return {name: done[name] for name in ("train_pairs", "val_pairs")} if done else {}


def _times(results: Results) -> dict[str, Any]:
    """Number of the finished runs, their seconds, those within training steps, and the share of the rest."""
    done = [scores for scores in results.values() if scores is not None]
    total, training = (sum(scores[name] for scores in done) for name in ("seconds", "training_seconds"))
    return {
        "runs": len(results),
        "done": len(done),
        "seconds": total,
        "training_seconds": training,
        "other_share": 1 - training / total if done else None,
    }


def _machine(plan: Plan) -> str:
    on_gpu = plan.training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {plan.training.threads} threads per run"
