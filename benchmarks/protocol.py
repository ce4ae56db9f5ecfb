"""Effect of the settings of the published grounding protocol on phantom images: smoothing, pruned phrases, tolerance.

    python benchmarks/protocol.py --out docs/results/tables/protocol.md

Takes a model per seed of `benchmarks/choices.py`, which trains missing ones. Explains test pairs with boxes under their
phrases as written, without their words of size and certainty, and with a word of certainty in front. Scores the maps by
the protocol at several widths of the Gaussian. The phantom's images are small, so the frame has the size of the stored
image instead of 518 px, and the tolerance is as wide in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from choices import pairs_with_boxes, spread, train
from jsonargparse import auto_cli
from torch import Tensor

from matex_pl.anatomy import prune_phrase
from matex_pl.attribution import AttributionMethod, CenterMap, Chefer, GradEclip, LeGrad, Matex, PriorOnly, RandomMap
from matex_pl.benchmark.protocol import GroundingProtocol
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch, ImageTextPair, PhantomDataModule
from matex_pl.evaluation.intervals import FindingMean, Sums
from matex_pl.evaluation.pairs import with_phrases
from matex_pl.training import ClipModule, load_module

SIGMAS = (0.0, 0.5, 1.0, 1.5, 2.0)
METRICS = {"pointing_game": "pointing game", "miou": "mIoU", "cnr": "CNR"}
WRITTEN, PRUNED, UNSURE = "as written", "pruned", "with certainty"
PHRASES: dict[str, Callable[[str], str]] = {
    WRITTEN: str,
    PRUNED: prune_phrase,
    # Few phrases of the phantom have a word of certainty.
    UNSURE: lambda phrase: f"Probably {phrase[0].lower()}{phrase[1:]}",
}
METHODS: dict[str, AttributionMethod] = {
    "MATEX": Matex.recommended(),
    "MATEX, delta = 0": Matex.recommended(delta=0.0),
    "Chefer": Chefer(),
    "LeGrad": LeGrad(),
    "Grad-ECLIP": GradEclip(),
    "PriorOnly": PriorOnly(),
    "CenterMap": CenterMap(),
    "RandomMap": RandomMap(),
}
# Their maps do not read the phrase, or only as the seed of noise.
BLIND = ("CenterMap", "RandomMap")
# Values `(n,)` by method, phrases, sigma and metric.
Values = dict[tuple[str, str, float, str], Tensor]


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    out: str = "docs/results/tables/protocol.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 200,
    batch_size: int = 50,
) -> None:
    """Write the tables.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        out: Path of the Markdown file.
        seeds: Training seeds.
        num_pairs: Number of test pairs with boxes, evenly spaced over the split.
        batch_size: Number of pairs explained at once.
    """
    scored = []
    for seed in seeds:
        module = load_module(str(train(Path(runs) / f"seed{seed}", seed, Path(data))))
        batches = list(pairs_with_boxes(module, data, "test", num_pairs, batch_size))
        scored.append(score(module, batches, f"seed {seed}"))
    lines = report(scored, batches, len(seeds))
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def score(module: ClipModule, batches: Sequence[ImageTextBatch], title: str) -> Values:
    """Scores of every method, phrase and width."""
    parts: dict[tuple[str, str, float, str], list[Tensor]] = {}
    for batch in progress(batches, title):
        pairs, sizes = pairs_of(batch)
        for phrases, change in PHRASES.items():
            changed = with_phrases(batch, [change(phrase) for phrase in batch["phrase"]])
            images, tokens = module.inputs(changed)
            for name, method in METHODS.items():
                if phrases != WRITTEN and name in BLIND:
                    continue
                boxes = changed["content_box"], changed["chest_box"]
                grid = method.attribute(module.clip, images, tokens, changed["phrase"], *boxes).grid
                for sigma in SIGMAS if phrases == WRITTEN else (0.0, 1.5):
                    values = replace(protocol(sizes[0][0]), smooth_sigma=sigma).values(
                        grid.detach(), batch["content_box"], pairs, sizes
                    )
                    for metric, value in values.items():
                        parts.setdefault((name, phrases, sigma, metric), []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}


def protocol(size: int) -> GroundingProtocol:
    """The protocol in a frame of another size, with a tolerance as wide in proportion."""
    published = GroundingProtocol("ms-cxr")
    return replace(published, size=size, tolerance=published.tolerance * size / published.size)


def pairs_of(batch: ImageTextBatch) -> tuple[list[ImageTextPair], list[tuple[int, int]]]:
    """Pairs with their boxes in pixels of the stored images, which are square and fill the frame, and their sizes."""
    side = PhantomDataModule().stored_size
    columns = zip(batch["id"], batch["phrase"], batch["boxes"], batch["finding"], strict=True)
    pairs = [
        ImageTextPair(name, "", "", "", phrase, tuple(map(tuple, (boxes * side).tolist())), finding)
        for name, phrase, boxes, finding in columns
    ]
    return pairs, [(side, side)] * len(pairs)


def report(scored: Sequence[Values], batches: Sequence[ImageTextBatch], seeds: int) -> list[str]:
    """Markdown lines of all tables."""
    phrases = [phrase for batch in batches for phrase in batch["phrase"]]
    findings = [finding for batch in batches for finding in batch["finding"]]
    shorter = torch.tensor([prune_phrase(phrase) != phrase for phrase in phrases])

    def value(name: str, written: str, sigma: float, metric: str, among: Tensor | None = None) -> list[float]:
        return [
            float(FindingMean.of(Sums.of(kept if among is None else kept.where(among, torch.nan)), findings).score())
            for kept in (values[name, written, sigma, metric] for values in scored)
        ]

    def gain(name: str, written: str, sigma: float, metric: str, among: Tensor | None = None) -> str:
        pairs = zip(value(name, written, sigma, metric, among), value(name, WRITTEN, sigma, metric, among), strict=True)
        return signed([one - other for one, other in pairs])

    lines = [
        "# Effect of the settings of the published protocol",
        "",
        f"Written by `python benchmarks/protocol.py`. {seeds} models of `configs/phantom.yaml`, {len(phrases)} test "
        "pairs with boxes each. Cells are means over findings and over the models, with the lowest and the highest.",
        f"The frame has {PhantomDataModule().stored_size} px.",
        "",
        "## Smoothing",
        "",
        "Standard deviation of the Gaussian, in patches. The published protocol has 1.5.",
    ]
    for metric, label in METRICS.items():
        lines += ["", f"| {label} | {' | '.join(f'{sigma:g}' for sigma in SIGMAS)} |", rule(len(SIGMAS))]
        for name in METHODS:
            cells = [spread(value(name, WRITTEN, sigma, metric), 2) for sigma in SIGMAS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Tolerance",
        "",
        "Pointing game with smoothing of 1.5 patches, exact and with 15 px of 518.",
        "",
        "| method | exact | 15 px |",
        rule(2),
    ]
    for name in METHODS:
        cells = [spread(value(name, WRITTEN, 1.5, metric), 2) for metric in ("pointing_game", "pointing_game_near")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Phrases without words of size and certainty",
        "",
        f"Difference to the phrases as written. Pruning changes {int(shorter.sum())} of {len(phrases)} phrases, which "
        'alone count in its columns. In the columns of certainty, "Probably" stands in front of every phrase. '
        "Pruning takes it away again.",
        "",
        "| method | pruned: pointing game | pruned: mIoU | pruned: CNR | pruned, no smoothing: pointing game | "
        "certainty: pointing game | certainty: mIoU | certainty: CNR |",
        rule(7),
    ]
    for name in (name for name in METHODS if name not in BLIND):
        cells = [gain(name, PRUNED, 1.5, metric, shorter) for metric in METRICS]
        cells.append(gain(name, PRUNED, 0.0, "pointing_game", shorter))
        cells += [gain(name, UNSURE, 1.5, metric) for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def rule(columns: int) -> str:
    """Line below the heads of a table."""
    return "|---|" + "---:|" * columns


def signed(values: Sequence[float]) -> str:
    """Mean difference over seeds, with minimum and maximum."""
    return f"{mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


if __name__ == "__main__":
    show_messages()
    auto_cli(main, as_positional=False)
