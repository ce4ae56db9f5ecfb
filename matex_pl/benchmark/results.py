"""The results of a benchmark: scores with intervals, differences to the controls, and panels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import numpy as np
import torch
from torch import Tensor

from matex_pl.benchmark.bench import BenchmarkRun, MethodResult
from matex_pl.benchmark.columns import metric_columns
from matex_pl.benchmark.evaluate import Values
from matex_pl.evaluation.intervals import difference, draw_patients
from matex_pl.evaluation.provenance import provenance
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.explain import draw_panels
from matex_pl.report.gallery import Panel, encode
from matex_pl.report.results import BENCHMARK_FORMAT, BenchmarkResult, Comparison, Curve, MethodScores, SanityCurve

COMPARED = ("pointing_game", "cnr", "energy_pointing_game")
COMPARED_WITHOUT_BOXES = ("top20_removal/mean_image", "insertion/mean_image", "deletion/mean_image")
_PANEL_WIDTH, _RANDOM_PANELS = 600, 2


def results(run: BenchmarkRun, scored: Sequence[MethodResult], checkpoint: str) -> BenchmarkResult:
    """The results of all methods, as they are written to `results.json`."""
    drawn = draw_patients([pair.patient_id for pair in run.pairs], run.settings.resamples, run.settings.seed)
    rows = [_method_scores(run, result, "image", drawn) for result in scored]
    rows += [_method_scores(run, result, "text", drawn) for result in scored if result.row.method.supports_text]
    origin = provenance(run.clip, run.weights, checkpoint, run.data, run.settings.seed)
    content = origin | {
        "format": BENCHMARK_FORMAT,
        "data": origin["data"] | _about_data(run),
        "settings": asdict(run.settings),
        "machine": _machine(run.clip.std.device),
        "forward_seconds_per_pair": median([result.forward_seconds for result in scored if not result.error] or [0.0]),
        "metrics": metric_columns({name for row in rows for name in row.scores}),
        "rows": rows,
        "comparisons": _comparisons(run, scored, drawn),
    }
    return BenchmarkResult.model_validate(content)


def _about_data(run: BenchmarkRun) -> dict[str, object]:
    return {
        "split": run.settings.split,
        "pairs": len(run.pairs),
        "patients": len({pair.patient_id for pair in run.pairs}),
        "boxed": sum(bool(pair.boxes) for pair in run.pairs),
        "findings": dict(sorted(Counter(pair.finding for pair in run.pairs if pair.finding).items())),
        "fingerprint": _fingerprint(run),
        "validation_pairs": sum(len(batch.keys) for batch in run.validation),
        "sanity_pairs": min(run.settings.sanity_pairs, len(run.pairs)),
    }


def _fingerprint(run: BenchmarkRun) -> str:
    """Hash of images, phrases, boxes, findings and patients, and of the pairs that choose thresholds."""
    return fingerprint(
        {
            "keys": run.keys,
            "validation": [batch.keys for batch in run.validation],
            "boxes": run.boxes,
            "pairs": [[pair.finding, pair.patient_id] for pair in run.pairs],
        }
    )


def _method_scores(run: BenchmarkRun, result: MethodResult, modality: str, drawn: Tensor) -> MethodScores:
    """One row of the tables; without scores if the method refuses the model."""
    row, values = result.row, result.values.get(modality, Values())
    findings = sorted({pair.finding for pair in run.pairs} - {""})
    about = {name: torch.tensor([pair.finding == name for pair in run.pairs]) for name in findings}
    everything = torch.ones(len(run.pairs), dtype=torch.bool)
    content = {
        "name": row.name,
        "modality": modality,
        "control": row.control,
        "class": type(row.method).__name__,
        "settings": row.method.settings,
        "note": row.note,
        "key": result.store.key,
        "seconds_per_pair": None if result.error else result.seconds,
        "error": result.error,
        "threshold": values.threshold,
        "scores": values.scores(everything, drawn),
        "per_finding": {name: values.scores(pairs, drawn) for name, pairs in about.items()},
        "curves": {
            name: Curve(share=shares.tolist(), score=scores.mean(1).tolist())
            for name, (shares, scores) in values.curves.items()
        },
        "sanity_curve": _sanity_curve(values),
    }
    return MethodScores.model_validate(content)


def _sanity_curve(values: Values) -> SanityCurve:
    if values.correlation is None:
        return SanityCurve()
    means = [None if mean != mean else mean for mean in values.correlation.nanmean(1).tolist()]
    return SanityCurve(stages=values.stages, correlation=means)


def _comparisons(run: BenchmarkRun, scored: Sequence[MethodResult], drawn: Tensor) -> list[Comparison]:
    """Differences of each method to each control, on the same draws of patients."""
    measured = [(result.row, result.values["image"].sums) for result in scored if "image" in result.values]
    compared = COMPARED if any(pair.boxes for pair in run.pairs) else COMPARED_WITHOUT_BOXES
    found = []
    for row, sums in ((row, sums) for row, sums in measured if not row.control):
        for control, others in ((other, sums) for other, sums in measured if other.control):
            for metric in compared:
                paired = difference(sums[metric], others[metric], drawn)
                names = {"row": row.name, "against": control.name, "metric": metric}
                found.append(Comparison.model_validate({**names, "difference": paired.pop("value"), **paired}))
    return found


def panels(run: BenchmarkRun, result: MethodResult) -> list[Panel]:
    """The best and the worst pair of a method by the energy in the boxes, and two pairs that the seed draws."""
    if "image" not in result.values:
        return []
    energy = result.values["image"].sums["energy_pointing_game"]
    counted = energy.below.nonzero()[:, 0]
    order = counted[energy.above[counted].argsort(stable=True)].tolist()
    chosen = [("best", order[-1]), ("worst", order[0])] if order else []
    drawn = np.random.default_rng(run.settings.seed).permutation(len(run.pairs))[:_RANDOM_PANELS]
    return [_panel(run, result, kind, place) for kind, place in [*chosen, *(("random", int(i)) for i in drawn)]]


def _panel(run: BenchmarkRun, result: MethodResult, kind: str, place: int) -> Panel:
    batch, row = run.at(place)
    pair = batch.part(row, row + 1)
    maps, tokens = result.store.read(pair.keys), run.clip.tokenize(pair.batch["phrase"]).cpu()
    picture = draw_panels(run.clip, maps, pair.batch, tokens, result.row.name, _PANEL_WIDTH)[0]
    energy = result.values["image"].sums["energy_pointing_game"]
    share = f"{float(energy.above[place]):.2f} of the mass in the boxes" if energy.below[place] else "no boxes"
    caption = f"{pair.batch['phrase'][0]} ({share})"
    return Panel(result.row.name, kind, pair.batch["id"][0], caption, encode(picture))


def summary(result: BenchmarkResult) -> str:
    """Pointing game and contrast of the image maps as a short table."""
    lines = [f"{'':22s}{'pointing game':>16s}{'CNR':>8s}"]
    for row in (row for row in result.rows if row.modality == "image"):
        values = [row.scores[name].value if name in row.scores else None for name in ("pointing_game", "cnr")]
        game, contrast = ("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"{row.name:22s}{game:>16s}{contrast:>8s}")
    return "\n".join(lines)


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
