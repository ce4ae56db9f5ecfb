"""Whether the map of a word of side lies on that side of the patient, on phantom images, with two controls.

    python benchmarks/word_laterality.py --out docs/results/tables/word_laterality.md

Takes a model per seed of `benchmarks/choices.py`, which trains missing ones. `WordRegions` explains pairs whose phrase
names one side, at several depths of the towers. Scores are the share of a map's positive values on the named side, and
whether its maximum lies there: for the word of side, for another word of the phrase drawn at random, and for the map of
the whole phrase. Intervals of 95 % are over patients.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from choices import pairs_with_boxes, train
from jsonargparse import auto_cli
from torch import Tensor

from matex_pl.anatomy import side_words
from matex_pl.attribution import WordRegions
from matex_pl.callbacks.reader import rows_of
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch
from matex_pl.evaluation.intervals import Sums, draw_patients, estimate
from matex_pl.metrics.functional import half_share, side_half
from matex_pl.training import ClipModule, load_module

SETTINGS: dict[str, dict[str, Any]] = {
    "last blocks": {},
    "last image block, token embeddings": {"text_block": None},
    "pixels, token embeddings": {"image_block": None, "text_block": None},
}
MAPS = ("word of side", "another word", "whole phrase")
# Values per pair `(n,)` by name of the map and score.
Table = dict[str, Tensor]


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    out: str = "docs/results/tables/word_laterality.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    split: str = "val",
    num_pairs: int = 60,
    batch_size: int = 12,
    steps: int = 8,
) -> None:
    """Write the table.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        out: Path of the Markdown file.
        seeds: Training seeds.
        split: Split of the pairs, `val` or `test`.
        num_pairs: Number of pairs with boxes, evenly spaced over the split. Pairs without a word of side are then left
            out.
        batch_size: Number of pairs explained at once.
        steps: Number of nodes of the sum.
    """
    paths = [train(Path(runs) / f"seed{seed}", seed, Path(data)) for seed in seeds]
    scored: dict[str, list[Table]] = defaultdict(list)
    patients: list[str] = []
    for path in paths:
        module = load_module(str(path))
        batches = [_sided(batch) for batch in pairs_with_boxes(module, data, split, num_pairs, batch_size)]
        patients = [patient for batch in batches for patient in batch["patient_id"]]
        for name, setting in SETTINGS.items():
            method = WordRegions(steps=steps, **setting)
            values = [_values(module, method, batch) for batch in progress(batches, f"{path.parts[-5]}, {name}")]
            scored[name].append({key: torch.cat([part[key] for part in values]) for key in values[0]})
    drawn = draw_patients(patients, 2000, 0)
    lines = [
        "# The side of a word",
        "",
        f"Written by `python benchmarks/word_laterality.py`. {len(seeds)} models of `configs/phantom.yaml`, training "
        f"seeds {', '.join(map(str, seeds))}, {len(patients)} {split} pairs that name one side, {steps} steps.",
        "Percent on the named side, means over the models, with 95 % intervals over patients. An even map has 50.",
        "",
        "| patches and words | map | positive mass | maximum | mass, word of side minus this |",
        "|---|---|---|---|---|",
    ]
    for name, tables in scored.items():
        mean = {key: torch.stack([table[key] for table in tables]).nanmean(0) for key in tables[0]}
        own = Sums.of(mean[f"{MAPS[0]}/mass"])
        for kind in MAPS:
            sums = {score: Sums.of(mean[f"{kind}/{score}"]) for score in ("mass", "peak")}
            cells = [_shown(estimate(part, drawn)) for part in sums.values()]
            cells.append("-" if kind == MAPS[0] else _shown(estimate(own, drawn, sums["mass"]), "+"))
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def _sided(batch: ImageTextBatch) -> ImageTextBatch:
    """Pairs of a batch with a word of side, all of one side."""
    sides = [{side for _, side in side_words(phrase)} for phrase in batch["phrase"]]
    return rows_of(batch, [row for row, named in enumerate(sides) if len(named) == 1])


def _values(module: ClipModule, method: WordRegions, batch: ImageTextBatch) -> Table:
    """Scores of each pair, `(B,)` by map and score."""
    images, tokens = module.inputs(batch)
    maps = method.attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"])
    content = maps.content[..., None]
    whole = (maps.interactions * content).sum(1).unflatten(1, maps.grid.shape[1:])
    found: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    sides = []
    for row, (heats, words, phrase) in enumerate(zip(maps.word_maps, maps.words, batch["phrase"], strict=True)):
        named = dict(side_words(phrase))
        sides.append(next(iter(named.values())))
        own = [place for place, word in enumerate(words) if word.start in named]
        others = [place for place in range(len(words)) if place not in own]
        found["word of side"].append(heats[own[0]])
        found["another word"].append(heats[random.Random(row).choice(others)] if others else heats[0] * torch.nan)
        found["whole phrase"].append(whole[row])
    box = batch["content_box"]
    half = side_half((maps.grid.shape[1], maps.grid.shape[2]), sides, box).flatten(1)
    table = {}
    for name, parts in found.items():
        heat = torch.stack(parts).float()
        table[f"{name}/mass"] = half_share(heat.relu(), sides, box)
        flat = heat.flatten(1)
        peak = half.gather(1, flat.argmax(1, keepdim=True))[:, 0]
        table[f"{name}/peak"] = peak.where(flat.amax(1) > 0, torch.nan)
    return table


def _shown(found: Any, sign: str = "") -> str:
    value, low, high = (100 * float(end or 0) for end in (found.value, found.low, found.high))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


if __name__ == "__main__":
    show_messages()
    auto_cli(main, as_positional=False)
