"""`matex benchmark`: every method on the pairs of a split, to tables and a page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from matex_pl.benchmark.bench import BenchmarkRun, Settings
from matex_pl.benchmark.results import panels, results, summary
from matex_pl.clip.load import load_trained
from matex_pl.data import ChestXrayDataModule
from matex_pl.evaluation.compared import compared_rows
from matex_pl.files import write_text
from matex_pl.report.benchmark import PANELS, RESULTS, read_added_roar, write_report
from matex_pl.report.gallery import write_panels
from matex_pl.report.results import BenchmarkResult, read

log = logging.getLogger(__name__)


def run_benchmark(
    data: ChestXrayDataModule,
    ckpt_path: str,
    out: str,
    methods: list[str] | str | None = None,
    split: Literal["test", "val"] = "test",
    num_pairs: int = 100,
    validation_pairs: int = 24,
    sanity_pairs: int = 16,
    batch_size: int = 32,
    budget: Literal["quick", "full"] = "quick",
    steps: int = 16,
    resamples: int = 1000,
    device: str = "auto",
    seed: int = 0,
) -> str:
    """Compare attribution methods on a checkpoint: every metric, with intervals, in tables and on a page.

    Maps are kept in `OUT/maps` and scores in `OUT/values`, so that another run with the same weights and settings only
    computes what is missing. MATEX without its prior (and so
    each Matex of a YAML file), MATEX with the usual places of findings, the phrase's prior alone, noise, the image's
    center and, where training images have boxes, the mean box of the finding are always among the rows.

    Args:
        data: The data module.
        ckpt_path: A checkpoint of `matex fit`.
        out: Folder for `results.json`, `tables.md`, `report.html`, panels, maps and values. Where it has a `roar.json`
            of the same weights, the tables and the page show the measured ROAR+ too.
        methods: Names of shipped methods and YAML files, `m2ib,rise,mine.yaml`; all shipped ones but
            `submodular_regions` by default.
        split: `test` or `val`, where the thresholds of IoU, Acc@0.5 and AP50 are chosen on pairs that are scored too.
        num_pairs: Pairs to compare on, drawn by the seed from those with boxes if there are any; -1 for all.
        validation_pairs: Pairs of the validation split that choose each method's threshold of the IoU.
        sanity_pairs: Pairs of the check with shuffled weights, which takes a map per block of the towers.
        batch_size: Pairs explained at once.
        budget: `quick`: 500 masks of RISE and 300 coalitions of KernelShap; `full`: the methods' own defaults.
        steps: Most steps of the insertion and deletion curves, up to 32.
        resamples: Draws of the bootstrap over patients.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
        seed: Random seed of the choice of pairs, the bootstrap, the shuffled weights and the random panels.

    Returns:
        Pointing game and contrast as text, and where the files are.

    Raises:
        ValueError: An argument is out of range, the split has too few pairs, or `roar.json` is damaged.
        FileNotFoundError: There is no such checkpoint.
    """
    settings = Settings(
        split, num_pairs, validation_pairs, sanity_pairs, batch_size, budget, steps, resamples, seed
    )  # fmt: skip
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be auto, cpu or, where torch can use a GPU, cuda; got {device!r}.")
    folder = Path(out)
    roar = read_added_roar(folder)
    rows = compared_rows(methods.split(",") if isinstance(methods, str) else methods, budget)
    clip = load_trained(ckpt_path)
    folder.mkdir(parents=True, exist_ok=True)
    cuda = device != "cpu" and torch.cuda.is_available()
    run = BenchmarkRun.open(clip.to("cuda" if cuda else "cpu"), data, folder, settings)
    rows += run.mean_box_row()
    scored = []
    for place, row in enumerate(rows, start=1):
        log.info("%d of %d: %s", place, len(rows), row.name)
        scored.append(run.score(row))
    write_text(folder / RESULTS, results(run, scored, ckpt_path).to_json())
    shown = [panel for result in scored for panel in panels(run, result)]
    write_panels(shown, folder / PANELS)
    result = read(BenchmarkResult, folder / RESULTS)
    write_report(result, shown, folder, roar)
    return f"{summary(result)}\n{out}/report.html, tables.md and results.json hold all of it."
