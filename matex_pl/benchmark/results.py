"""What a benchmark found: rows with scores and intervals, differences to the controls, and panels to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matex_pl.benchmark.bench import Bench, Scored
from matex_pl.benchmark.evaluate import Values
from matex_pl.evaluation.intervals import difference, draw_patients
from matex_pl.evaluation.provenance import provenance
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.explain import draw_panels
from matex_pl.report.columns import metric_columns
from matex_pl.report.gallery import Panel, encode
from matex_pl.report.published import PUBLISHED

COMPARED = ("pointing_game", "cnr", "energy_in_box")
# Where there are no boxes.
_COMPARED_WITHOUT = ("remove/mean_film", "insertion/mean_film", "deletion/mean_film")
_PANEL_WIDTH, _RANDOM_PANELS = 600, 2


def results(bench: Bench, scored: Sequence[Scored], checkpoint: str) -> dict[str, Any]:
    """All that was found, as plain JSON types; `report.write_report` takes it."""
    drawn = draw_patients([study.patient_id for study in bench.studies], bench.settings.resamples, bench.settings.seed)
    rows = [_line(bench, row, "image", row.image, drawn) for row in scored]
    rows += [_line(bench, row, "text", row.text, drawn) for row in scored if row.row.method.serves_text]
    origin = provenance(bench.clip, bench.weights, checkpoint, bench.data, bench.settings.seed)
    return origin | {
        "format": 1,
        "data": origin["data"] | _about_data(bench),
        "settings": asdict(bench.settings),
        "machine": _machine(bench.clip.std.device),
        "forward_seconds_per_pair": median([row.forward_seconds for row in scored if not row.error] or [0.0]),
        "metrics": metric_columns({name for row in rows for name in row["scores"]}),
        "rows": rows,
        "comparisons": _comparisons(bench, scored, drawn),
        "published": PUBLISHED,
    }


def _about_data(bench: Bench) -> dict[str, Any]:
    return {
        "split": bench.settings.split,
        "pairs": len(bench.studies),
        "patients": len({study.patient_id for study in bench.studies}),
        "boxed": sum(bool(study.boxes) for study in bench.studies),
        "findings": dict(sorted(Counter(study.finding for study in bench.studies if study.finding).items())),
        "fingerprint": _fingerprint(bench),
        "validation_pairs": sum(len(batch.keys) for batch in bench.validation),
        "sanity_pairs": min(bench.settings.sanity_pairs, len(bench.studies)),
    }


def _fingerprint(bench: Bench) -> str:
    """Hash of films, phrases, boxes, findings and patients, and of the pairs that choose thresholds."""
    return fingerprint(
        {
            "pairs": bench.keys,
            "validation": [batch.keys for batch in bench.validation],
            "boxes": bench.boxes,
            "studies": [[study.finding, study.patient_id] for study in bench.studies],
        }
    )


def _line(bench: Bench, scored: Scored, modality: str, values: Values | None, drawn: Tensor) -> dict[str, Any]:
    """One row of the tables; without scores where the method refuses the model."""
    row = scored.row
    line: dict[str, Any] = {
        "name": row.name,
        "modality": modality,
        "control": row.control,
        "class": type(row.method).__name__,
        "settings": row.method.settings,
        "note": row.note,
        "key": scored.store.key,
        "seconds_per_pair": None if scored.error else scored.seconds,
        "error": scored.error or None,
        "scores": {},
        "per_finding": {},
        "curves": {},
    }
    if values is None:
        return line
    findings = sorted({study.finding for study in bench.studies} - {""})
    about = {name: torch.tensor([study.finding == name for study in bench.studies]) for name in findings}
    line["scores"] = values.scores(torch.ones(len(bench.studies), dtype=torch.bool), drawn)
    line["per_finding"] = {name: values.scores(studies, drawn) for name, studies in about.items()}
    line["curves"] = {
        name: {"share": shares.tolist(), "score": scores.mean(1).tolist()}
        for name, (shares, scores) in values.curves.items()
    }
    if values.threshold is not None:
        line["threshold"] = values.threshold
    if values.correlation is not None:
        means = [None if mean != mean else mean for mean in values.correlation.nanmean(1).tolist()]
        line["sanity_curve"] = {"stages": values.stages, "correlation": means}
    return line


def _comparisons(bench: Bench, scored: Sequence[Scored], drawn: Tensor) -> list[dict[str, Any]]:
    """Differences of each method to each control, on the same draws of patients."""
    maps = {row.row.name: row.image.sums for row in scored if row.image is not None}
    controls = [row.row.name for row in scored if row.row.control and row.image is not None]
    compared = COMPARED if any(study.boxes for study in bench.studies) else _COMPARED_WITHOUT
    found = []
    for name in (name for name in maps if name not in controls):
        for against in controls:
            for metric in compared:
                paired: dict[str, Any] = difference(maps[name][metric], maps[against][metric], drawn)
                paired["difference"] = paired.pop("value")
                found.append({"row": name, "against": against, "metric": metric, **paired})
    return found


def panels(bench: Bench, scored: Scored) -> list[Panel]:
    """Where the row does best and worst by the energy in the boxes, and two studies that the seed draws."""
    if scored.image is None:
        return []
    energy = scored.image.sums["energy_in_box"]
    counted = energy.below.nonzero()[:, 0]
    order = counted[energy.above[counted].argsort(stable=True)].tolist()
    chosen = [("best", order[-1]), ("worst", order[0])] if order else []
    drawn = np.random.default_rng(bench.settings.seed).permutation(len(bench.studies))[:_RANDOM_PANELS]
    return [_panel(bench, scored, kind, place) for kind, place in [*chosen, *(("random", int(i)) for i in drawn)]]


def _panel(bench: Bench, scored: Scored, kind: str, place: int) -> Panel:
    assert scored.image is not None
    batch, row = bench.at(place)
    one: Any = {name: column[row : row + 1] for name, column in batch.batch.items()}  # type: ignore[index]
    maps, tokens = scored.store.read([batch.keys[row]]), bench.clip.tokenize(one["phrase"]).cpu()
    picture = draw_panels(bench.clip, maps, one, tokens, scored.row.name, _PANEL_WIDTH)[0]
    energy = scored.image.sums["energy_in_box"]
    share = f"{float(energy.above[place]):.2f} of the mass in the boxes" if energy.below[place] else "no boxes"
    return Panel(scored.row.name, kind, one["id"][0], f"{one['phrase'][0]} ({share})", encode(picture))


def summary(found: dict[str, Any]) -> str:
    """Pointing game and contrast of the image rows as a short table."""
    lines = [f"{'':22s}{'pointing game':>16s}{'CNR':>8s}"]
    for row in found["rows"]:
        if row["modality"] == "image":
            values = [row["scores"].get(name, {}).get("value") for name in ("pointing_game", "cnr")]
            game, contrast = ("-" if value is None else f"{value:.2f}" for value in values)
            lines.append(f"{row['name']:22s}{game:>16s}{contrast:>8s}")
    return "\n".join(lines)


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
