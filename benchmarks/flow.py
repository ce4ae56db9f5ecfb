"""Attention flow of MATEX between eq. 1 and the relevance of Chefer et al., by pointing game, sensitivity and ROAR+.

    python benchmarks/flow.py --out docs/results/tables/flow.md

Takes a model per seed of `benchmarks/choices.py`, which trains missing ones. Fuses the components of validation pairs
again for a grid of flows, numbers of blocks, rows of the consistency and weights of the flow. Three candidates go on:
those with the best pointing game, energy and prompt sensitivity. These, today's preset, Chefer and the controls are
scored on test pairs, and by ROAR+ on images that no model has seen.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from choices import pairs_with_boxes, train
from jsonargparse import auto_cli
from scipy import stats
from torch import Tensor
from words import PairScores, shown

from matex_pl.anatomy import named_side
from matex_pl.attribution import AttributionMethod, CenterMap, Chefer, Matex, PriorOnly, RandomMap
from matex_pl.attribution.several import attribute_methods
from matex_pl.console import progress
from matex_pl.data import ImageTextBatch, PhantomDataModule
from matex_pl.evaluation.compared import BLURRED, mean_box_row
from matex_pl.evaluation.intervals import Sums, estimate
from matex_pl.evaluation.pairs import other_phrases_of, swapped_phrases, with_phrases
from matex_pl.evaluation.values import map_correlation
from matex_pl.maps import Attribution
from matex_pl.metrics import functional as F
from matex_pl.roar.make import make_plan
from matex_pl.roar.plan import Plan, Protocol, Run, Training
from matex_pl.roar.work import failure, prepare_maps, result, work_here
from matex_pl.training import ClipModule, load_module

log = logging.getLogger(__name__)

COLUMNS = {
    "pointing": "pointing game",
    "energy": "energy in the boxes",
    "prompt": "prompt sensitivity (lower is better)",
    "side": "side sensitivity",
}
# Today's preset and the tried values, in towers of three image blocks.
PRESET: dict[str, Any] = {
    "flow": "sum",
    "flow_layers": "all",
    "consistency_of": "attention",
    "beta": 0.2,
    "skip_layers": 1,
}
GRID: dict[str, list[Any]] = {
    "flow": ["sum", "rollout", "relevance"],
    "flow_layers": [1, 2, "all"],
    "consistency_of": ["attention", "relevance"],
    "beta": [0.2, 1.0, 5.0],
    "skip_layers": [0, 1],
}
TODAY, CHEFER = "`Matex.recommended()`", "Chefer, last block"
RASTER = (56, 56)
FRACTIONS = (0.25, 0.5)
# Values per pair `(n,)` of each row and column.
Table = dict[str, dict[str, Tensor]]
Maps = Callable[[ClipModule, Sequence[ImageTextBatch]], Iterator[tuple[str, Sequence[Attribution]]]]


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    work: str = "runs/flow",
    out: str = "docs/results/tables/flow.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 240,
    num_test: int = 80,
    batch_size: int = 80,
    num_images: int = 160,
    epochs: int = 4,
    roar_controls: bool = True,
) -> None:
    """Write the tables.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        work: Folder of the validation scores and of the plans of ROAR+, which a second call continues.
        out: Path of the Markdown file.
        seeds: Training seeds.
        num_pairs: Number of validation pairs with boxes, evenly spaced over the split.
        num_test: Number of test pairs.
        batch_size: Number of pairs explained at once.
        num_images: Number of images of each plan.
        epochs: Number of epochs of each retraining.
        roar_controls: Whether ROAR+ has the controls too.
    """
    logging.basicConfig(level=logging.INFO)
    paths = [train(Path(runs) / f"seed{seed}", seed, Path(data)) for seed in seeds]
    lines = [
        "# The attention flow between eq. 1 and Chefer's relevance",
        "",
        f"Written by `python benchmarks/flow.py`. {len(seeds)} models of `configs/phantom.yaml`, training seeds "
        f"{', '.join(map(str, seeds))}. {num_pairs} validation pairs and {num_test} test pairs with boxes, evenly "
        "spaced over their split. Shares in percent, means over the models, with 95 % intervals over patients.",
        "",
        "## Validation pairs",
        "",
        f"{len(settings())} settings. The table has today's preset, the candidates, and the best setting of each flow.",
        "",
    ]
    folder = Path(work)

    def validate() -> tuple[list[str], list[str]]:
        val = score(paths, data, "val", num_pairs, batch_size, fused)
        candidates = shortlist(val)
        return candidates, val.report([TODAY, *dict.fromkeys([*candidates, *best_of_flows(val)])])

    candidates, table = kept(folder / f"validation-{num_pairs}.json", validate)
    log.info("Candidates: %s.", candidates)
    methods: dict[str, AttributionMethod] = {
        TODAY: Matex.recommended(),
        **{name: Matex.recommended(**settings()[name]) for name in candidates},
        CHEFER: Chefer(),
    }

    def test() -> tuple[dict[str, float | None], list[str]]:
        found = score(paths, data, "test", num_test, batch_size, lambda *one: measured(one[0], one[1], methods, data))
        lows = {name: found.gain(name, "pointing").low for name in candidates}
        return lows, found.report(sorted(found.table, key=lambda name: -found.mean(name, "pointing")))

    lows, tested = kept(folder / f"test-{num_test}.json", test)
    lines += [*table, "", "## Test pairs", "", "No setting was selected on these pairs.", "", *tested]
    write(out, lines)
    plans = [
        plan_of(path, folder / f"seed{seed}", data, methods, num_images, epochs)
        for seed, path in zip(seeds, paths, strict=True)
    ]
    names = {f"method{place}": name for place, name in enumerate(methods)}
    # All models first for the methods, then for the controls.
    for of_methods in (True, False):
        for plan in plans:
            wanted = [run for run in wanted_runs(plan, roar_controls) if (run.method in ("", *names)) == of_methods]
            work_here(plan, [run for run in wanted if result(plan, run) is None])
    roar = [rises(plan, names, roar_controls) for plan in plans]
    lines += [
        "",
        "## ROAR+ of image maps",
        "",
        f"{num_images} phantoms that no model has seen, {epochs} epochs, mean over "
        f"{' and '.join(f'{share:.0%}' for share in FRACTIONS)} of the patches dropped, one repeat per model, with "
        "95 % t-intervals over the models.",
        "",
        *roar_lines(roar),
        "",
    ]
    for name in candidates:
        ends = lows[name], student([scores[name] - scores[TODAY] for scores in roar])[1]
        better = all(low is not None and low > 0 for low in ends)
        lines.append(f"- `{name}` is {'' if better else 'not '}better in both beyond its intervals.")
    write(out, lines)
    print(out)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Content of a JSON file, made if missing."""
    if not path.is_file():
        content = json.dumps(make(), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def write(out: str, lines: Sequence[str]) -> None:
    """Write the lines that are known so far."""
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")


class Scored(PairScores):
    """Scores of image maps, with their differences from today's preset."""

    def mean(self, name: str, column: str) -> float:
        """Mean of a row's values over the pairs that count."""
        return float(self.table[name][column].nanmean())

    def gain(self, name: str, column: str) -> Any:
        """Difference of a row from today's preset, with its interval."""
        return estimate(Sums.of(self.table[name][column]), self.drawn, Sums.of(self.table[TODAY][column]))

    def report(self, rows: Sequence[str]) -> list[str]:
        """Lines of a Markdown table, with the differences from today's preset."""
        head = ["map", *COLUMNS.values(), "pointing game, to today", "prompt sensitivity, to today"]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for name in rows:
            cells = [shown(estimate(Sums.of(self.table[name][column]), self.drawn), column) for column in COLUMNS]
            for column in ("pointing", "prompt"):
                cells.append("-" if name == TODAY else shown(self.gain(name, column), column, signed=True))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


def settings() -> dict[str, dict[str, Any]]:
    """Every setting of the search but today's, by name."""
    found = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    return {", ".join(f"{key}={value}" for key, value in one.items()): one for one in found if one != PRESET}


def shortlist(val: Scored) -> list[str]:
    """Settings with the best pointing game, energy and prompt sensitivity, each once.

    The last two are among the settings whose pointing game is not worse than today's beyond its interval.
    """
    sound = [name for name in settings() if (val.gain(name, "pointing").high or 0) >= 0]
    best = [max(settings(), key=lambda name: val.mean(name, "pointing"))]
    best += [
        max(sound, key=lambda name: val.mean(name, "energy")),
        min(sound, key=lambda name: val.mean(name, "prompt")),
    ]
    return list(dict.fromkeys(best))


def best_of_flows(val: Scored) -> list[str]:
    """Setting with the best pointing game of each flow and each of its numbers of blocks."""
    return [
        max(
            (name for name, one in settings().items() if (one["flow"], one["flow_layers"]) == (flow, layers)),
            key=lambda name: val.mean(name, "pointing"),
        )
        for flow, layers in product(GRID["flow"], GRID["flow_layers"])
    ]


def score(paths: Sequence[Path], root: str, split: str, num_pairs: int, batch_size: int, maps: Maps) -> Scored:
    """Values of the pairs of a split under every model."""
    tables = []
    for path in paths:
        module = load_module(str(path))
        rows: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        batches = list(pairs_with_boxes(module, root, split, num_pairs, batch_size))
        others = [with_phrases(batch, told) for batch, told in zip(batches, other_phrases_of(batches), strict=True)]
        for batch, other in progress([*zip(batches, others, strict=True)], f"{path.parts[-5]}, {split}"):
            swapped = with_phrases(batch, swapped_phrases(batch["phrase"]))
            for name, found in maps(module, [batch, other, swapped]):
                for column, values in values_of(batch, *found).items():
                    rows[name][column].append(values)
        tables.append({name: {column: torch.cat(parts) for column, parts in row.items()} for name, row in rows.items()})
    return Scored(tables, [patient for batch in batches for patient in batch["patient_id"]])


def values_of(batch: ImageTextBatch, maps: Attribution, other: Attribution, swapped: Attribution) -> dict[str, Tensor]:
    """Values of each pair `(B,)` by column, from the maps of its phrase, of another, and with exchanged sides."""
    masks = F.masks_of(maps.image, batch["boxes"])
    sides = [named_side(phrase) for phrase in batch["phrase"]]
    return {
        "pointing": F.pointing_game(maps.image, masks),
        "energy": F.energy_pointing_game(maps.image, masks),
        "prompt": map_correlation(maps, other, "image"),
        "side": F.side_sensitivity(maps.image, swapped.image, sides, batch["content_box"]),
    }


def given(module: ClipModule, batch: ImageTextBatch) -> tuple[Any, ...]:
    """Arguments of `attribute` for the pairs of a batch."""
    images, _ = module.inputs(batch)
    tokens = module.clip.tokenize(batch["phrase"])
    return module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]


def fused(module: ClipModule, batches: Sequence[ImageTextBatch]) -> Iterator[tuple[str, Sequence[Attribution]]]:
    """Maps of every setting on a raster, from components that are computed once."""
    method = Matex.recommended(skip_layers=0, flow="rollout", consistency_of="relevance")
    parts = [method.attribute(*given(module, batch)).parts | {"size": RASTER} for batch in batches]
    for name, setting in {TODAY: PRESET, **settings()}.items():
        yield name, [Matex.fuse(found, **setting) for found in parts]


def measured(
    module: ClipModule, batches: Sequence[ImageTextBatch], methods: dict[str, AttributionMethod], root: str
) -> Iterator[tuple[str, Sequence[Attribution]]]:
    """Maps of the methods, of the variants without their prior, and of the controls."""
    plain = {
        f"{name}, without the prior": Matex(**method.settings | {"lambda_s": 1.0})
        for name, method in methods.items()
        if isinstance(method, Matex)
    }
    controls = {"Chefer, all blocks, margin": Chefer(start_layer=0, target="margin"), "center": CenterMap()}
    controls |= {"prior only": PriorOnly(prior_frame="chest"), "noise": RandomMap()}
    boxed = list(pairs_with_boxes(module, root, "train", 300, 50))
    (mean_box,) = mean_box_row(boxed, batches, module.clip.image_size)
    everything = {**methods, **plain, **controls, "mean box": mean_box.method}
    maps = [attribute_methods(everything, *given(module, batch)) for batch in batches]
    for name in everything:
        yield name, [found[name] for found in maps]


def plan_of(
    path: Path, folder: Path, root: str, methods: dict[str, AttributionMethod], num_images: int, epochs: int
) -> Plan:
    """Plan of ROAR+ for a model, with the maps of all methods."""
    files = []
    for place, method in enumerate(methods.values()):
        file = folder.parent / f"method{place}.yaml"
        described = {"class_path": f"matex_pl.attribution.{type(method).__name__}", "init_args": method.settings}
        file.write_text(yaml.safe_dump(described), encoding="utf-8")
        files.append(str(file))
    # Another seed than that of the training gives other images.
    phantoms = PhantomDataModule(root=root, seed=1, num_train=num_images, num_val=4, num_test=4)
    module = load_module(str(path))
    protocol = Protocol(modalities=["image"], fractions=list(FRACTIONS), repeats=1)
    training = Training(epochs=epochs, lr=3e-4, warmup_steps=5, accelerator="cpu")
    origins = {"checkpoint": path.name, "start_checkpoint": path.name}
    plan = make_plan(folder, phantoms, module, module, files, protocol, training, origins)
    prepare_maps(plan)
    return plan


def wanted_runs(plan: Plan, with_controls: bool) -> list[Run]:
    """Runs of the methods, and of the controls but the blurred noise."""
    controls = {method.name for method in plan.methods if method.control and not with_controls}
    return [run for run in plan.runs() if run.method not in {BLURRED, *controls}]


def rises(plan: Plan, names: dict[str, str], with_controls: bool) -> dict[str, float]:
    """ROAR+ by method and control, mean over the fractions."""
    losses = {}
    for run in wanted_runs(plan, with_controls):
        found = result(plan, run)
        if found is None:
            raise SystemExit(f"{plan.folder}: {run.id} has failed: {failure(plan, run)}")
        losses[run] = found["loss"]
    clean = losses.pop(Run(0))
    shares: dict[str, list[float]] = defaultdict(list)
    for run, loss in losses.items():
        shares[names.get(run.method, run.method)].append(100 * (loss - clean) / clean)
    return {name: mean(values) for name, values in shares.items()}


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over the models with its 95 % t-interval."""
    half = float(stats.t(len(values) - 1).ppf(0.975)) * stdev(values) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def roar_lines(roar: Sequence[dict[str, float]]) -> list[str]:
    """Lines of a Markdown table of ROAR+."""
    lines = ["| map | ROAR+ | to today | by model |", "|---|---|---|---|"]
    for name in sorted(roar[0], key=lambda name: -mean(scores[name] for scores in roar)):
        value, low, high = student([scores[name] for scores in roar])
        gain = student([scores[name] - scores[TODAY] for scores in roar])
        to_today = "-" if name == TODAY else f"{gain[0]:+.1f} ({gain[1]:+.1f} to {gain[2]:+.1f})"
        each = ", ".join(f"{scores[name]:.1f}" for scores in roar)
        lines.append(f"| {name} | {value:.1f} ({low:.1f} to {high:.1f}) | {to_today} | {each} |")
    return lines


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
