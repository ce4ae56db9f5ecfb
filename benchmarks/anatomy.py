"""Frames of the spatial prior, and the mass of maps in structures, on phantoms in tight and in loose framing.

    python benchmarks/anatomy.py --out docs/results/tables/anatomy.md

Trains missing models in `--runs`: a model per seed on tight images, with the config of the first command; its
continuation for two epochs on loose images; and a model on images with a tag, for four epochs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import torch
from choices import train
from jsonargparse import auto_cli
from shortcut import has_tag, says, tag_zone
from torch import Tensor

from matex_pl.anatomy.prior import PriorFrame
from matex_pl.attribution import AttributionMethod, Matex, PriorOnly
from matex_pl.attribution.several import attribute_methods
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch, PhantomDataModule
from matex_pl.data.phantom.framing import Framing
from matex_pl.evaluation.intervals import Sums, draw_patients, estimate
from matex_pl.evaluation.pairs import choose_pairs, prepare_data, read_pairs, shuffled_phrases, with_phrases
from matex_pl.evaluation.values import IN_BOXES
from matex_pl.metrics import functional as F
from matex_pl.report.results import Score
from matex_pl.training import ClipModule, load_module

METRICS = {"pointing_game": "pointing game", "miou": "mean IoU", "energy_pointing_game": "mass in the boxes"}
WITH_PRIOR: dict[str, Callable[..., AttributionMethod]] = {
    "`PriorOnly()`": PriorOnly,
    "`Matex.paper()`": Matex.paper,
    "`Matex.recommended()`": Matex.recommended,
}
WITHOUT_PRIOR = {"`Matex.recommended(lambda_s=1)`": Matex.recommended(lambda_s=1.0)}
PRIOR, MATEX = "`PriorOnly()`", "`Matex.recommended()`"
# Validation does not change the weights.
LOOSE = ["--data.framing", "loose", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"]
FOUR_EPOCHS = ["--trainer.max_epochs", "4", "--trainer.limit_val_batches", "0"]
RESAMPLES = 1000

# Values of n pairs, by method and frame, or by structure.
Values = dict[Any, Tensor]


def main(
    runs: str = "runs/anatomy",
    data: str = "data/phantom",
    out: str = "docs/results/tables/anatomy.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 600,
    finding: str = "nodule",
    batch_size: int = 60,
    parts: list[Literal["frames", "masses"]] = ["frames", "masses"],  # noqa: B006
) -> None:
    """Write the tables.

    Args:
        runs: Folder of the models.
        data: Folder of the phantom images; missing images are drawn.
        out: Path of the Markdown file.
        seeds: Training seeds.
        num_pairs: Number of test pairs, drawn at random.
        finding: Finding with the tag.
        batch_size: Number of pairs explained at once.
        parts: Tables to write: `frames` of the prior, `masses` in structures.
    """
    folder, images = Path(runs).resolve(), Path(data)
    tight = [train(folder / f"seed{seed}", seed, images) for seed in seeds]
    lines = head(seeds, num_pairs)
    if "frames" in parts:
        loose = [
            train(folder / f"loose/seed{seed}", seed, images, [*LOOSE, "--model.name", str(path)])
            for seed, path in zip(seeds, tight, strict=True)
        ]
        lines += frame_tables({"tight": tight, "loose": loose}, data, num_pairs, batch_size)
    if "masses" in parts:
        # From random weights: a trained model does not learn the tag in two epochs.
        options = ["--data.shortcut_finding", finding, *FOUR_EPOCHS]
        tagged = train(folder / "tagged", seeds[0], images, options, config="phantom_shortcut.yaml")
        modules = {"without the tag": load_module(str(tight[0])), "with the tag": load_module(str(tagged))}
        lines += mass_tables(modules, data, finding, num_pairs, batch_size)
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def frame_tables(checkpoints: dict[Framing, list[Path]], root: str, num_pairs: int, batch_size: int) -> list[str]:
    """Markdown lines: both frames of the prior on images in each framing, overall and by finding."""
    lines, per_finding = [], []
    for framing, paths in checkpoints.items():
        data = PhantomDataModule(root, framing=framing)
        scored = [frame_values(load_module(str(path)), data, num_pairs, batch_size, framing) for path in paths]
        values = {key: torch.stack([found[key] for found, _ in scored]) for key in scored[0][0]}
        lines += frame_table(framing, values, scored[0][1])
        per_finding += finding_table(framing, values, scored[0][1])
    return [*lines, *per_finding]


def head(seeds: Sequence[int], num_pairs: int) -> list[str]:
    """Markdown lines above the tables."""
    return [
        "# Anatomy",
        "",
        f"Written by `python benchmarks/anatomy.py`. Training seeds: {', '.join(map(str, seeds))}. "
        f"Test pairs with boxes: {num_pairs}.",
        "In brackets: 95 % intervals of a bootstrap over patients; the value of a pair is its mean over the models.",
    ]


def read(module: ClipModule, data: PhantomDataModule, pairs: list[Any] | int, batch_size: int) -> list[ImageTextBatch]:
    """Test pairs, or a number of them with boxes drawn at random, as batches."""
    prepare_data(data, module.clip.image_size, "test")
    chosen = choose_pairs(data, "test", pairs, 0) if isinstance(pairs, int) else pairs
    return read_pairs(data, "test", chosen, batch_size)


def explain(module: ClipModule, methods: dict[str, AttributionMethod], batch: ImageTextBatch) -> dict[str, Tensor]:
    """Maps `(B, H, W)` of a batch by method."""
    images, tokens = module.inputs(batch)
    maps = attribute_methods(
        methods, module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]
    )
    return {name: found.image for name, found in maps.items()}


def frame_values(
    module: ClipModule, data: PhantomDataModule, num_pairs: int, batch_size: int, framing: str
) -> tuple[Values, list[ImageTextBatch]]:
    """Metrics `(n,)` of one model by method, frame and metric, and the batches of the pairs."""
    batches = read(module, data, num_pairs, batch_size)
    framed = {(name, frame): make(prior_frame=frame) for name, make in WITH_PRIOR.items() for frame in frames()}
    plain = {(name, ""): method for name, method in WITHOUT_PRIOR.items()}
    methods: dict[Any, AttributionMethod] = {**framed, **plain}
    values = defaultdict(list)
    for batch in progress(batches, f"{framing} framing"):
        masks = F.box_masks(batch["boxes"], module.clip.image_size)
        for key, maps in explain(module, methods, batch).items():
            for metric in METRICS:
                values[(*key, metric)].append(IN_BOXES[metric](maps, masks))
    return {key: torch.cat(parts) for key, parts in values.items()}, batches


def frames() -> tuple[str, ...]:
    """Values of `prior_frame`: `image` and `chest`."""
    return get_args(PriorFrame)


def column(batches: Sequence[ImageTextBatch], name: str) -> list[str]:
    """A text column of all pairs."""
    return [value for batch in batches for value in batch[name]]  # type: ignore[literal-required]


def cell(score: Score, sign: str = "") -> str:
    """A score with its interval."""
    if score.value is None:
        return ""
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} to {score.high:{sign}.3f})"


def frame_table(framing: str, values: Values, batches: Sequence[ImageTextBatch]) -> list[str]:
    """Markdown lines: each metric of each method under both frames, with the difference."""
    drawn = draw_patients(column(batches, "patient_id"), RESAMPLES, 0)
    lines = ["", f"## The frame of the prior, {framing} framing", ""]
    lines += ["| method | metric | `image` | `chest` | `chest` minus `image` | by seed |", "|---|---|---|---|---|---|"]
    for name in WITH_PRIOR:
        for metric, label in METRICS.items():
            image, chest = (over_seeds(values[name, frame, metric]) for frame in frames())
            by_seed = [
                float(estimate(Sums.of(there), drawn, Sums.of(here)).value or 0)
                for here, there in zip(*(values[name, frame, metric] for frame in frames()), strict=True)
            ]
            cells = [cell(estimate(sums, drawn)) for sums in (image, chest)]
            cells += [cell(estimate(chest, drawn, image), "+"), ", ".join(f"{gain:+.3f}" for gain in by_seed)]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    for name in WITHOUT_PRIOR:
        for metric, label in METRICS.items():
            lines.append(f"| {name} | {label} | {cell(estimate(over_seeds(values[name, '', metric]), drawn))} | | | |")
    return lines


def over_seeds(values: Tensor) -> Sums:
    """Mean over models of values `(S, n)`: the score of a pair is its mean over the models that have one."""
    return Sums.of(values.nanmean(0))


def finding_table(framing: str, values: Values, batches: Sequence[ImageTextBatch]) -> list[str]:
    """Markdown lines: the pointing game by finding."""
    drawn = draw_patients(column(batches, "patient_id"), RESAMPLES, 0)
    findings = column(batches, "finding")
    lines = ["", f"## Pointing game by finding, {framing} framing", ""]
    lines += ["| finding | pairs | prior, `image` | prior, `chest` | MATEX, `image` | MATEX, `chest` | difference |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for finding in sorted(set(findings)):
        among = torch.tensor([found == finding for found in findings])
        sums = {
            (name, frame): over_seeds(values[name, frame, "pointing_game"]).among(among)
            for name in (PRIOR, MATEX)
            for frame in frames()
        }
        cells = [f"{mean(part.score().tolist()):.2f}" for part in sums.values()]
        cells += [cell(estimate(sums[MATEX, "chest"], drawn, sums[MATEX, "image"]), "+")]
        lines.append(f"| {finding} | {int(among.sum())} | {' | '.join(cells)} |")
    return lines


def mass_tables(modules: dict[str, ClipModule], root: str, finding: str, num_pairs: int, batch_size: int) -> list[str]:
    """Markdown lines: mass in the structures of the images, of models trained with the tag and without."""
    clip = modules["with the tag"].clip
    with_tag = PhantomDataModule(root, shortcut=0.9, shortcut_finding=finding, image_size=clip.image_size)
    without = PhantomDataModule(root, image_size=clip.image_size)
    usual, tag = with_tag.thorax(), tag_zone(with_tag, modules["with the tag"])
    prepare_data(with_tag, clip.image_size, "test")
    tagged = [pair for pair in with_tag.pairs["test"] if pair.finding == finding and has_tag(with_tag.read_image(pair))]
    others = read(modules["with the tag"], with_tag, num_pairs, batch_size)
    methods: dict[str, AttributionMethod] = {**WITHOUT_PRIOR, MATEX: Matex.recommended()}
    lines = ["", f"## Mass in structures, {len(tagged)} pairs of a {finding} with the tag", ""]
    lines += ["| trained | test images | called so | structure | area | mass | mass / area | peak inside | mass, "]
    lines[-1] += "shuffled phrases |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    summary = ["", "## Mass outside lungs and heart: masks of the images, and the usual place", ""]
    summary += ["| trained | test images | method | outside, own masks | outside, usual place | peak on the tag |"]
    summary += ["|---|---|---|---|---|---|"]
    for trained, module in modules.items():
        for shown, data in {"with the tag": with_tag, "without it": without}.items():
            batches = read(module, data, tagged if data is with_tag else untagged(data, module, tagged), batch_size)
            drawn = draw_patients(column(batches, "patient_id"), RESAMPLES, 0)
            found = masses(module, methods, batches, tag, usual)
            control = masses(module, WITHOUT_PRIOR, exchanged(batches, others), tag, usual)
            called = says(module, batches, with_tag.findings, finding)
            shares, other = (values[next(iter(WITHOUT_PRIOR))] for values in (found, control))
            for name in ("left_lung", "right_lung", "heart", "rest", "tag"):
                cells = [f"{float(shares[f'area/{name}'].nanmean()):.2f}"]
                cells += [cell(estimate(Sums.of(shares[f"mass/{name}"]), drawn))]
                cells += [f"{float(shares[f'{key}/{name}'].nanmean()):.2f}" for key in ("mass_ratio", "peak")]
                cells += [f"{float(other[f'mass/{name}'].nanmean()):.3f}"]
                lines.append(f"| {trained} | {shown} | {called:.2f} | {name} | {' | '.join(cells)} |")
            for method, values in found.items():
                cells = [cell(estimate(Sums.of(values[key]), drawn)) for key in ("mass/rest", "usual", "peak/tag")]
                summary.append(f"| {trained} | {shown} | {method} | {' | '.join(cells)} |")
    return [*lines, *summary, *quartile_table(modules, others, tag, usual)]


def untagged(data: PhantomDataModule, module: ClipModule, pairs: Sequence[Any]) -> list[Any]:
    """The same pairs of the data module whose images have no tag."""
    prepare_data(data, module.clip.image_size, "test")
    ids = {pair.id for pair in pairs}
    return [pair for pair in data.pairs["test"] if pair.id in ids]


def exchanged(batches: list[ImageTextBatch], others: list[ImageTextBatch]) -> list[ImageTextBatch]:
    """The batches with phrases of other patients, from all batches."""
    return list(map(with_phrases, batches, shuffled_phrases([*batches, *others], 0)))


def masses(
    module: ClipModule, methods: dict[str, AttributionMethod], batches: list[ImageTextBatch], tag: Tensor, usual: Tensor
) -> dict[str, Values]:
    """Shares of the maps `(n,)` by method, in each structure, in the rest of the image and on the tag.

    `usual` is the mass outside the usual place of lungs and heart.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in methods}
    for batch in batches:
        masks = {**batch["masks"], "rest": F.partition(batch["masks"])["rest"]}
        masks["tag"] = tag.expand_as(masks["rest"])
        for name, maps in explain(module, methods, batch).items():
            shares = F.anatomy_shares(maps, masks) | {"usual": F.outside_mass(maps, usual[None])}
            for key, share in shares.items():
                parts[name][key].append(share)
    return {name: {key: torch.cat(shares) for key, shares in found.items()} for name, found in parts.items()}


def quartile_table(
    modules: dict[str, ClipModule], batches: list[ImageTextBatch], tag: Tensor, usual: Tensor
) -> list[str]:
    """Markdown lines: median and quartiles of the mass outside lungs and heart by finding, on images with the tag."""
    (method,) = WITHOUT_PRIOR
    lines = ["", "## Mass outside lungs and heart by finding, images with the tag", ""]
    lines += [f"| finding | pairs | {' | '.join(f'trained {name}' for name in modules)} |", "|---|---|---|---|"]
    rest = {
        name: masses(module, WITHOUT_PRIOR, batches, tag, usual)[method]["mass/rest"]
        for name, module in modules.items()
    }
    findings = column(batches, "finding")
    for finding in sorted(set(findings)):
        among = torch.tensor([found == finding for found in findings])
        cells = []
        for share in rest.values():
            low, middle, high = share[among].nanquantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {finding} | {int(among.sum())} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    show_messages()
    auto_cli(main, as_positional=False)
