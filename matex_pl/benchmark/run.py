"""`matex benchmark`: all methods on the pairs of a split, written as tables and an HTML page."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

from matex_pl.benchmark.bench import BenchmarkRun, Settings
from matex_pl.benchmark.protocol import GroundingProtocol
from matex_pl.benchmark.results import panels, results, summary
from matex_pl.clip.device import find_device
from matex_pl.clip.load import load_trained
from matex_pl.data import ChestXrayDataModule
from matex_pl.evaluation.compared import compared_rows
from matex_pl.files import check_outputs, write_text
from matex_pl.report.benchmark import OUTPUTS, PANELS, RESULTS, read_added_roar, write_report
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
    protocol: Literal["ms-cxr", "padchest-gr"] | None = None,
    smooth_sigma: float | None = None,
    prune_phrases: bool = False,
) -> str:
    """Compare attribution methods on a checkpoint: all metrics with intervals, as tables and an HTML page.

    Maps are cached in `OUT/maps` and scores in `OUT/values`. Another run with the same weights and settings computes
    only the missing ones. The following controls are always compared:

    - MATEX without its prior, also for each Matex of a YAML file
    - MATEX with the usual places of findings
    - the prior of the phrase alone
    - noise
    - the center of the image
    - the mean box of the finding, if training images have boxes

    Args:
        data: Data module.
        ckpt_path: Checkpoint of `matex fit`.
        out: Folder for `results.json`, `tables.md`, `report.html`, panels, maps and values. If it has a `roar.json` of
            the same weights, the tables and the page also show the measured ROAR+.
        methods: Names of shipped methods and YAML files, for example `m2ib,rise,mine.yaml`; by default all shipped
            methods except `submodular_regions`.
        split: `test` or `val`. On `val` the thresholds of IoU, Acc@0.5 and AP50 are chosen on pairs that are also
            scored.
        num_pairs: Number of pairs, drawn with the seed, from pairs with boxes if there are any; -1 for all.
        validation_pairs: Number of validation pairs on which each method's IoU threshold is chosen.
        sanity_pairs: Number of pairs for the weight randomization, which needs one map per block of the towers.
        batch_size: Number of pairs explained at once.
        budget: `quick` (500 masks of RISE and 300 coalitions of Kernel SHAP) or `full` (the methods' own defaults).
        steps: Maximum number of steps of the insertion and deletion curves, up to 32.
        resamples: Number of bootstrap draws over patients.
        device: `cpu`, `cuda`, `mps`, or `auto`, which uses a GPU of CUDA if there is one.
        seed: Random seed of the drawn pairs, the bootstrap, the shuffled weights and the random panels.
        protocol: Published procedure of zero-shot grounding that scores the same maps in addition, in a table of its
            own; by default the definitions of this package alone. `padchest-gr` is about eight types of findings.
        smooth_sigma: Standard deviation of the protocol's Gaussian, in patches; 1.5 by default, as published.
        prune_phrases: Whether the protocol explains phrases without their words of size and certainty.

    Returns:
        Pointing game and CNR as text, and the paths of the files.

    Raises:
        ValueError: If an argument is out of range, the split has too few pairs or none that the protocol can score,
            `roar.json` is damaged, or a file in `out` is no earlier result.
        FileNotFoundError: If there is no such checkpoint.
        OSError: If nothing can be written in `out`.
    """
    settings = Settings(
        split, num_pairs, validation_pairs, sanity_pairs, batch_size, budget, steps, resamples, seed
    )  # fmt: skip
    published = _protocol(protocol, smooth_sigma, prune_phrases)
    chosen = find_device(device)
    folder = Path(out)
    check_outputs(folder, OUTPUTS)
    roar = read_added_roar(folder)
    rows = compared_rows(methods.split(",") if isinstance(methods, str) else methods, budget)
    clip = load_trained(ckpt_path)
    run = BenchmarkRun.open(clip.to(chosen), data, folder, settings, published)
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
    return f"{summary(result)}\nAll results: {out}/report.html, tables.md and results.json."


def _protocol(name: str | None, smooth_sigma: float | None, prune_phrases: bool) -> GroundingProtocol | None:
    """The named protocol with its settings; None without a name."""
    if name is not None:
        protocol = GroundingProtocol(name, prune_phrases=prune_phrases)
        return protocol if smooth_sigma is None else replace(protocol, smooth_sigma=smooth_sigma)
    if smooth_sigma is not None or prune_phrases:
        raise ValueError(
            "smooth_sigma and prune_phrases are settings of a published protocol. Name it with --protocol, or leave "
            "both out."
        )
    return None
