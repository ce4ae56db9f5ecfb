"""Results of a benchmark: scores with intervals, differences from the controls, and panels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import numpy as np
import torch
from torch import Tensor

from matex_pl.benchmark.bench import BenchmarkRun, MethodResult
from matex_pl.benchmark.evaluate import Values
from matex_pl.evaluation.columns import metric_columns
from matex_pl.evaluation.intervals import Sums, draw_patients, estimate, plain
from matex_pl.evaluation.provenance import provenance
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.explain import draw_panels
from matex_pl.report.gallery import Panel, encode
from matex_pl.report.results import (
    BENCHMARK_FORMAT,
    BenchmarkResult,
    Comparison,
    Curve,
    MethodScores,
    SanityCurve,
    Score,
)

COMPARED = ("pointing_game", "cnr", "energy_pointing_game")
COMPARED_WITHOUT_BOXES = ("top20_removal/mean_image", "insertion/mean_image", "deletion/mean_image")
_PANEL_WIDTH, _RANDOM_PANELS = 600, 2
_IN_QUARTILES = ("mass", "mass_ratio")


def results(run: BenchmarkRun, scored: Sequence[MethodResult], checkpoint: str) -> BenchmarkResult:
    """Results of all methods, the content of `results.json`."""
    settings, pairs, device = run.settings, run.pairs, run.clip.std.device
    drawn = draw_patients([pair.patient_id for pair in pairs], settings.resamples, settings.seed)
    rows = [_method_scores(run, result, "image", drawn) for result in scored]
    rows += [_method_scores(run, result, "text", drawn) for result in scored if result.row.method.supports_text]
    origin = provenance(run.clip, run.weights, checkpoint, run.data, settings.seed)
    validation = [batch.keys for batch in run.validation]
    described = {
        "keys": [key for batch in run.batches for key in batch.keys],
        "validation": validation,
        "boxes": run.boxes,
        "pairs": [[pair.finding, pair.patient_id] for pair in pairs],
    }
    data = {
        "split": settings.split,
        "pairs": len(pairs),
        "patients": len({pair.patient_id for pair in pairs}),
        "boxed": sum(bool(pair.boxes) for pair in pairs),
        "findings": dict(sorted(Counter(pair.finding for pair in pairs if pair.finding).items())),
        "fingerprint": fingerprint(described),
        "validation_pairs": sum(map(len, validation)),
        "sanity_pairs": min(settings.sanity_pairs, len(pairs)),
    }
    is_cuda = device.type == "cuda"
    content = origin | {
        "format": BENCHMARK_FORMAT,
        "data": origin["data"] | data,
        "settings": asdict(settings),
        "protocol": run.protocol and run.protocol.plain,
        "machine": torch.cuda.get_device_name(device) if is_cuda else f"{torch.get_num_threads()} CPU threads",
        "forward_seconds_per_pair": median([result.forward_seconds for result in scored if not result.error] or [0.0]),
        "metrics": metric_columns({name for row in rows for name in row.scores}),
        "rows": rows,
        "comparisons": _comparisons(run, scored, drawn),
    }
    return BenchmarkResult.model_validate(content)


def _method_scores(run: BenchmarkRun, result: MethodResult, modality: str, drawn: Tensor) -> MethodScores:
    """One row of the tables; without scores if the method does not support the model."""
    row, values = result.row, result.values.get(modality, Values())
    about = {
        finding: torch.tensor([pair.finding == finding for pair in run.pairs])
        for finding in sorted({pair.finding for pair in run.pairs} - {""})
    }
    sanity_curve = SanityCurve()
    if values.stages:
        means = [plain(mean) for mean in values.tensors["correlation"].nanmean(1).tolist()]
        sanity_curve = SanityCurve(stages=values.stages, correlation=means)
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
        "scores": values.scores(torch.ones(len(run.pairs), dtype=torch.bool), drawn)
        | values.finding_means([pair.finding for pair in run.pairs], drawn),
        "per_finding": {finding: values.scores(pairs, drawn) for finding, pairs in about.items()},
        "quartiles": {
            finding: {
                name: _quartiles(sums.among(pairs))
                for name, sums in values.sums.items()
                if name.partition("/")[0] in _IN_QUARTILES
            }
            for finding, pairs in about.items()
        },
        "curves": {
            name: Curve(share=curve[:, 0].tolist(), score=curve[:, 1:].mean(1).tolist())
            for name, curve in values.curves.items()
        },
        "sanity_curve": sanity_curve,
    }
    return MethodScores.model_validate(content)


def _quartiles(sums: Sums) -> Score:
    """Median of the pairs that count, with the quartiles as ends."""
    values = sums.above[sums.below > 0]
    if not len(values):
        return Score(n=0)
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return Score(value=middle, low=low, high=high, n=len(values))


def _comparisons(run: BenchmarkRun, scored: Sequence[MethodResult], drawn: Tensor) -> list[Comparison]:
    """Differences of each method from each control, on the same draws of patients."""
    measured = [(result.row, result.values["image"].sums) for result in scored if "image" in result.values]
    metrics = COMPARED if any(pair.boxes for pair in run.pairs) else COMPARED_WITHOUT_BOXES
    comparisons = []
    for row, sums in ((row, sums) for row, sums in measured if not row.control):
        for control, references in ((control, sums) for control, sums in measured if control.control):
            for metric in metrics:
                gain = estimate(sums[metric], drawn, references[metric])
                names = {"row": row.name, "against": control.name, "metric": metric}
                ends = {"low": gain.low, "high": gain.high, "n": gain.n}
                comparisons.append(Comparison.model_validate(names | {"difference": gain.value} | ends))
    return comparisons


def panels(run: BenchmarkRun, result: MethodResult) -> list[Panel]:
    """Panels of a method: its best and worst pair by energy in the boxes, and two random pairs."""
    if "image" not in result.values:
        return []
    energy = result.values["image"].sums["energy_pointing_game"]
    counted = energy.below.nonzero()[:, 0]
    order = counted[energy.above[counted].argsort(stable=True)].tolist()
    chosen = [("best", order[-1]), ("worst", order[0])] if order else []
    drawn = np.random.default_rng(run.settings.seed).permutation(len(run.pairs))[:_RANDOM_PANELS]
    return [_panel(run, result, kind, place) for kind, place in [*chosen, *(("random", int(i)) for i in drawn)]]


def _panel(run: BenchmarkRun, result: MethodResult, kind: str, place: int) -> Panel:
    batch, row = divmod(place, run.settings.batch_size)
    pair = run.batches[batch].part(row, row + 1)
    maps, tokens = result.store.read(pair.keys), run.clip.tokenize(pair.batch["phrase"]).cpu()
    picture = draw_panels(run.clip, maps, pair.batch, tokens, result.row.name, _PANEL_WIDTH)[0]
    energy = result.values["image"].sums["energy_pointing_game"]
    share = f"{float(energy.above[place]):.2f} of the mass in the boxes" if energy.below[place] else "no boxes"
    caption = f"{pair.batch['phrase'][0]} ({share})"
    return Panel(result.row.name, kind, pair.batch["id"][0], caption, encode(picture))


def summary(result: BenchmarkResult) -> str:
    """Pointing game and CNR of the image maps as a short text table."""
    lines = [f"{'':22s}{'pointing game':>16s}{'CNR':>8s}"]
    for row in (row for row in result.rows if row.modality == "image"):
        values = [row.scores[name].value if name in row.scores else None for name in ("pointing_game", "cnr")]
        game, contrast = ("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"{row.name:22s}{game:>16s}{contrast:>8s}")
    return "\n".join(lines)
