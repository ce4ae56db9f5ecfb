"""Scores of a plan: ROAR+ per method and fraction, and tests against noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats

from matex_pl.clip.device import uses_cuda
from matex_pl.evaluation.compared import BLURRED, RANDOM
from matex_pl.report.results import ROAR_FORMAT
from matex_pl.roar.plan import MODALITIES, Plan, Run
from matex_pl.roar.work import failure, result

_CONTROLS = (RANDOM, BLURRED)


def collect(plan: Plan) -> dict[str, Any]:
    """Scores of a plan's finished runs as plain JSON types, the content of `results.json`.

    ROAR+ is 100 (l_r - l_c) / l_c, with the validation losses of a run and of its repeat's clean run; higher is better.
    A mean needs all repeats: missing and failed runs are named and never averaged over.
    """
    protocol, training = plan.protocol, plan.training
    results = {run: result(plan, run) for run in plan.runs()}
    failures = {run: error for run in results if (error := failure(plan, run))}
    done = [scores for scores in results.values() if scores is not None]
    seconds, training_seconds = (sum(scores[name] for scores in done) for name in ("seconds", "training_seconds"))
    on_gpu = uses_cuda(training.accelerator)
    clean = [results[Run(repeat)] for repeat in range(protocol.repeats)]

    def score_at(method: str, modality: str, fraction: float) -> dict[str, Any]:
        """Score of a method at a fraction, by repeat and over repeats."""
        runs = [Run(repeat, method, modality, fraction) for repeat in range(protocol.repeats)]
        needed = [run for dropped in runs for run in (Run(dropped.repeat), dropped)]
        units = [scores["units"] for run in runs if (scores := results[run]) is not None]
        return {
            **_summary([
                100 * (dropped["loss"] - whole["loss"]) / whole["loss"] if dropped and whole else None
                for dropped, whole in zip(map(results.get, runs), clean, strict=True)
            ]),
            "fraction": fraction,
            "units": mean(units) if units else None,
            "missing": [
                f"{run.id} ({'failed' if run in failures else 'not run'})" for run in needed if results[run] is None
            ],
        }  # fmt: skip

    rows = []
    for modality in MODALITIES:
        for method in plan.methods_of(modality) if modality in protocol.modalities else ():
            points = [score_at(method.name, modality, fraction) for fraction in protocol.fractions]
            repeats = zip(*(point["repeats"] for point in points), strict=True)
            rows.append({
                "name": method.name,
                "modality": modality,
                "control": method.control,
                "class": method.method["class_path"].rpartition(".")[2] if method.method else "",
                "settings": method.method["init_args"] if method.method else {},
                "note": method.note,
                "error": None,
                "points": points,
                "mean": _summary([_summary(scores)["value"] for scores in repeats]),
            })  # fmt: skip
    return {
        "format": ROAR_FORMAT,
        "kind": "roar",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **plan.about,
        "data": plan.about["data"] | {name: done[0][name] for name in ("train_pairs", "val_pairs") if done},
        "settings": asdict(protocol) | asdict(training),
        "machine": torch.cuda.get_device_name() if on_gpu else f"CPU, {training.threads} threads per run",
        "rows": rows,
        "clean": [
            {"repeat": repeat, "loss": scores and scores["loss"], "metrics": scores["metrics"] if scores else {}}
            for repeat, scores in enumerate(clean)
        ],
        "tests": _tests(rows, done[0]["val_pairs"] / done[0]["train_pairs"] if done else 0.0),
        "refused": plan.refusals(),
        "failed": [
            {"run": run.id, "error": error, "log": f"runs/{run.id}/error.log"} for run, error in failures.items()
        ],
        "time": {
            "runs": len(results),
            "done": len(done),
            "seconds": seconds,
            "training_seconds": training_seconds,
            "other_share": 1 - training_seconds / seconds if done else None,
        },
    }


def _summary(scores: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample deviation of scores; None unless all scores exist."""
    known = [score for score in scores if score is not None]
    is_complete = len(known) == len(scores)
    return {
        "value": mean(known) if is_complete else None,
        "std": stdev(known) if is_complete and len(known) > 1 else None,
        "repeats": list(scores),
    }


def _tests(rows: Sequence[dict[str, Any]], overlap: float) -> list[dict[str, Any]]:
    """Tests of every method against both kinds of noise, paired by repeat, at each fraction and over all fractions."""
    tests = []
    for modality in dict.fromkeys(row["modality"] for row in rows):
        of_modality = [row for row in rows if row["modality"] == modality]
        compared = [row for row in of_modality if row["name"] not in _CONTROLS]
        for against in (row for row in of_modality if row["name"] in _CONTROLS):
            for place, point in enumerate([*against["points"], against["mean"]]):
                family = [
                    _paired((*row["points"], row["mean"])[place]["repeats"], point["repeats"], overlap)
                    for row in compared
                ]
                for row, test, adjusted in zip(compared, family, _holm([test["p"] for test in family]), strict=True):
                    names = {"row": row["name"], "against": against["name"], "modality": modality}
                    tests.append({**names, "fraction": point.get("fraction"), **test, "p_holm": adjusted})
    return tests


def _paired(scores: Sequence[float | None], references: Sequence[float | None], overlap: float) -> dict[str, Any]:
    """Mean difference over J repeats, its 95 % interval and the p-value of the corrected paired t-test.

    The repeats split the same patients again and again, so their scores are not independent, and Student's variance of
    the mean, s^2 / J, is too small. Nadeau and Bengio (2003) take s^2 (1 / J + n_test / n_train).

    Args:
        scores: Score of the method in each repeat; without one of them there is no test.
        references: Score of the control in each repeat.
        overlap: n_test / n_train, the ratio of validation to training pairs.
    """
    pairs = zip(scores, references, strict=True)
    differences = [score - reference for score, reference in pairs if score is not None and reference is not None]
    test: dict[str, Any] = {"difference": None, "low": None, "high": None, "p": None, "n": len(differences)}
    if len(differences) == len(scores):
        test["difference"] = center = mean(differences)
        if len(set(differences)) > 1:
            error = stdev(differences) * (1 / len(differences) + overlap) ** 0.5
            student = stats.t(len(differences) - 1)
            half = error * float(student.ppf(0.975))
            test |= {"low": center - half, "high": center + half, "p": 2 * float(student.sf(abs(center) / error))}
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
