"""Variants of DenseSimilarity: pointing game on validation pairs of the models of `benchmarks/choices.py`.

    python benchmarks/dense.py

Prints a Markdown table with a row per variant, and two controls. Every cell is the mean over the seeds, with minimum
and maximum.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import get_args

from choices import pairs_with_boxes, spread, train
from jsonargparse import auto_cli

from matex_pl.attribution import AttributionMethod, CenterMap, DenseSimilarity, PriorOnly
from matex_pl.attribution.core.target import Target
from matex_pl.attribution.dense_similarity import Variant
from matex_pl.attribution.several import attribute_methods
from matex_pl.metrics import PointingGame
from matex_pl.training import load_module


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 600,
    batch_size: int = 60,
    target: Target = "cosine",
) -> None:
    """Print the table.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        seeds: Training seeds.
        num_pairs: Number of pairs with boxes of the validation split, evenly spaced over it.
        batch_size: Number of pairs explained at once.
        target: Target of the maps, `cosine` or `margin`.
    """
    variants: tuple[Variant, ...] = get_args(Variant)
    methods: dict[str, AttributionMethod] = {f"`{name}`": DenseSimilarity(name, target=target) for name in variants}
    methods |= {"`CenterMap()`": CenterMap(), "`PriorOnly()`": PriorOnly()}
    scores: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        module = load_module(str(train(Path(runs) / f"seed{seed}", seed, Path(data))))
        hits: dict[str, PointingGame] = defaultdict(PointingGame)
        for batch in pairs_with_boxes(module, data, "val", num_pairs, batch_size):
            given = (*module.inputs(batch), batch["phrase"], batch["content_box"], batch["chest_box"])
            for name, maps in attribute_methods(methods, module.clip, *given).items():
                hits[name].update(maps.image, batch["boxes"])
        for name, metric in hits.items():
            scores[name].append(float(metric.compute()))
    print("| map | pointing game |\n|---|---|")
    for name in sorted(scores, key=lambda name: -mean(scores[name])):
        print(f"| {name} | {spread(scores[name])} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
