"""What came out of a plan: ROAR+ per method and fraction, and which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats

from matex_pl.roar.make import BLURRED, RANDOM
from matex_pl.roar.plan import MODALITIES, Cell, Plan, PlanRow
from matex_pl.roar.work import failure, result

FORMAT = 1
_CONTROLS = (RANDOM, BLURRED)


def collect(plan: Plan) -> dict[str, Any]:
    """All that a plan's finished cells say, as plain JSON types; `report_roar.write_roar` takes it.

    ROAR+ is 100 (l_c - l_o) / l_o, with the validation losses of a cell and of its repeat's clean one; higher is
    better. A mean needs all repeats: what is missing or failed is named, and never averaged over.
    """
    found = {cell: result(plan, cell) for cell in plan.cells()}
    failed = {cell: failure(plan, cell) for cell in plan.cells()}
    rows = [
        _row(plan, row, modality, found, failed)
        for modality in MODALITIES
        if modality in plan.protocol.modalities
        for row in plan.rows_of(modality)
    ]
    return {
        "format": FORMAT,
        "kind": "roar",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **plan.about,
        "data": plan.about["data"] | _split_sizes(found),
        "settings": asdict(plan.protocol) | asdict(plan.training),
        "machine": _machine(plan),
        "rows": rows,
        "clean": [_clean(found[Cell(repeat)], repeat) for repeat in range(plan.protocol.repeats)],
        "tests": _tests(rows),
        "refused": plan.refusals(),
        "failed": [
            {"cell": cell.id, "error": error, "log": f"cells/{cell.id}/error.log"}
            for cell, error in failed.items()
            if error
        ],
        "time": _times(found),
    }


Found = Mapping[Cell, dict[str, Any] | None]


def _row(plan: Plan, row: PlanRow, modality: str, found: Found, failed: Mapping[Cell, str | None]) -> dict[str, Any]:
    """A line of the tables."""
    points = [_point(plan, row, modality, fraction, found, failed) for fraction in plan.protocol.fractions]
    over_fractions = [_mean_or_none(scores) for scores in zip(*(point["repeats"] for point in points), strict=True)]
    return {
        "name": row.name,
        "modality": modality,
        "control": row.control,
        "class": row.method["class_path"].rpartition(".")[2] if row.method else "",
        "settings": row.method["init_args"] if row.method else {},
        "note": row.note,
        "error": None,
        "points": points,
        "mean": _summary(over_fractions),
    }


def _point(
    plan: Plan, row: PlanRow, modality: str, fraction: float, found: Found, failed: Mapping[Cell, str | None]
) -> dict[str, Any]:
    """The score of a method at a fraction, by repeat and over them."""
    cells = [Cell(repeat, row.name, modality, fraction) for repeat in range(plan.protocol.repeats)]
    scores = [_score(found[cell], found[Cell(cell.repeat)]) for cell in cells]
    needed = list(dict.fromkeys(needs for cell in cells for needs in (Cell(cell.repeat), cell)))
    missing = [f"{cell.id} ({'failed' if failed[cell] else 'not run'})" for cell in needed if found[cell] is None]
    units = [done["units"] for cell in cells if (done := found[cell]) is not None]
    return {
        "fraction": fraction,
        "units": mean(units) if units else None,
        "repeats": scores,
        "missing": missing,
        **{name: value for name, value in _summary(scores).items() if name != "repeats"},
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
    """Every method against both kinds of noise, paired by repeat, at each fraction and over all of them."""
    found = []
    for modality in dict.fromkeys(row["modality"] for row in rows):
        own = [row for row in rows if row["modality"] == modality]
        for against in (row for row in own if row["name"] in _CONTROLS):
            compared = [row for row in own if row["name"] not in _CONTROLS]
            for place, point in enumerate([*against["points"], against["mean"]]):
                family = [
                    _paired((*row["points"], row["mean"])[place]["repeats"], point["repeats"]) for row in compared
                ]
                for row, test, adjusted in zip(compared, family, _holm([test["p"] for test in family]), strict=True):
                    names = {"row": row["name"], "against": against["name"], "modality": modality}
                    found.append({**names, "fraction": point.get("fraction"), **test, "p_holm": adjusted})
    return found


def _paired(mine: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any]:
    """Mean difference over repeats, its 95 % interval and the p-value of Student's paired test."""
    differences = [
        one - other for one, other in zip(mine, theirs, strict=True) if one is not None and other is not None
    ]
    number = len(differences)
    test: dict[str, Any] = {"difference": None, "low": None, "high": None, "p": None, "n": number}
    if number < len(mine):
        return test
    test["difference"] = mean(differences)
    spread = stdev(differences) if number > 1 else 0.0
    if spread > 0:
        half = float(stats.t.ppf(0.975, number - 1)) * spread / math.sqrt(number)
        test |= {"low": test["difference"] - half, "high": test["difference"] + half}
        test["p"] = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return test


def _holm(values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for how many are looked at (Holm 1979); those of no test stay out."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def _clean(done: dict[str, Any] | None, repeat: int) -> dict[str, Any]:
    return {"repeat": repeat, "loss": done and done["loss"], "metrics": done["metrics"] if done else {}}


def _split_sizes(found: Found) -> dict[str, int]:
    done = next((one for one in found.values() if one is not None), None)
    return {name: done[name] for name in ("train_pairs", "val_pairs")} if done else {}


def _times(found: Found) -> dict[str, Any]:
    """Of the finished cells: their number, their seconds, those within training steps, and the share of the rest."""
    done = [one for one in found.values() if one is not None]
    total, training = (sum(one[name] for one in done) for name in ("seconds", "training_seconds"))
    share = 1 - training / total if done else None
    return {
        "cells": len(found),
        "done": len(done),
        "seconds": total,
        "training_seconds": training,
        "other_share": share,
    }


def _machine(plan: Plan) -> str:
    on_gpu = plan.training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {plan.training.threads} threads per cell"
