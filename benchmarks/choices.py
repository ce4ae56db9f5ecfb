"""Effect of MATEX's settings on its maps, on phantom images, over several training seeds.

    python benchmarks/choices.py --out docs/results/tables/choices.md

Trains a model per seed with `matex fit --config phantom.yaml`, unless there is one in `--runs`. Computes the components
of validation pairs once per target and weight, fuses them again for every setting, and scores each setting. The presets
are then scored on test images, with the controls and the single-pass methods.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from jsonargparse import auto_cli
from torch import Tensor

from matex_pl.attribution import (
    AttributionMethod,
    CenterMap,
    Chefer,
    DenseSimilarity,
    GradCam,
    GradEclip,
    LeGrad,
    Matex,
    PriorOnly,
    Rollout,
    Saliency,
)
from matex_pl.attribution.core.fill import fill_images
from matex_pl.attribution.core.target import Target
from matex_pl.attribution.dense_similarity import Variant
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch, PhantomDataModule, collate
from matex_pl.metrics import ConfidenceDrop, ConfidenceIncrease, MapMass, PointingGame
from matex_pl.metrics.functional import keep_highlighted, keep_relevant_tokens
from matex_pl.training import ClipModule, load_module

# `Matex.recommended()` in a tower of three blocks. Every setting is varied alone, with and without the prior.
BASE: dict[str, Any] = {"grad_layers": 2, "target": "margin", "fusion": "product", "prior_frame": "chest"}
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "Target": {"target": ["cosine", "margin"]},
    "Spatial weight": {"spatial_weight": ["softmax", "loosened"]},
    "K, the blocks with gradients": {"grad_layers": [1, 2, 3]},
    "tau": {"tau": [0.0, 0.2, 1.0, 2.0]},
    "Flow": {"flow": ["sum", "rollout"]},
    "kappa": {"kappa": [0.0, 1.0, "tokens", 1000.0]},
    "Weight of the flow": {"beta": [0.0, 0.2, 0.5, 1.0]},
    "Weight of the consistent gradients": {"lambda_c": [0.0, 0.2, 0.35, 0.6]},
    "Fusion": {"fusion": ["sum", "product"]},
    "Where it is fused": {"fuse_at": ["pixel", "grid"]},
}
PRIOR: dict[str, dict[str, list[Any]]] = {
    "Strength of the prior": {"lambda_s": [1.0, 1.5, 2.5, 3.5]},
    "Power of the prior": {"prior_power": [1.0, 2.0, 3.0, 4.0]},
    "Shape of the prior": {"prior_shape": ["parabola", "gaussian", "plateau"]},
}
PRESETS: dict[str, Matex] = {
    "`Matex.paper()`": Matex.paper(),
    "`Matex.paper(lambda_s=1)`": Matex.paper(lambda_s=1.0),
    "`Matex()`": Matex(),
    "`Matex(delta=0)`": Matex(delta=0.0),
    "`Matex.recommended()`": Matex.recommended(),
    "`Matex.recommended(lambda_s=1)`": Matex.recommended(lambda_s=1.0),
}
# Suffix of rows that have the pointing game alone, without confidence.
WITHOUT_PRIOR = ", without the prior"
HEADER = ["pointing game", "confidence drop", "confidence increase", "mean map mass"]


class Scores:
    """Sums over the pairs of one model and one row of a table."""

    def __init__(self) -> None:
        self.metrics = (PointingGame(), ConfidenceDrop(), ConfidenceIncrease(), MapMass())

    def update(self, maps: Tensor, batch: ImageTextBatch, score: Tensor, kept: Tensor) -> None:
        """Add a batch of maps `(B, H, W)`, with the cosines of the whole images and of their kept parts."""
        pointing, drop, increase, mass = self.metrics
        pointing.update(maps, batch["boxes"])
        drop.update(score, kept)
        increase.update(score, kept)
        mass.update(maps)

    def values(self) -> list[float]:
        """The four metrics, in the order of `HEADER`."""
        return [float(metric.compute()) for metric in self.metrics]


# Metrics of each row, per model.
Table = list[dict[str, list[float]]]
Maps = Callable[[ClipModule, ImageTextBatch, Tensor, Tensor], Iterator[tuple[str, Tensor]]]


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    out: str = "docs/results/tables/choices.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 600,
    batch_size: int = 60,
) -> None:
    """Write the tables.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        out: Path of the Markdown file.
        seeds: Training seeds, at least three.
        num_pairs: Number of pairs with boxes per split, evenly spaced over it.
        batch_size: Number of pairs explained at once.
    """
    if len(set(seeds)) < 3:
        raise SystemExit(f"seeds must name at least three different seeds, got {seeds}.")
    checkpoints = [train(Path(runs) / f"seed{seed}", seed, Path(data)) for seed in seeds]
    val = [score(path, data, "val", fused, num_pairs, batch_size) for path in checkpoints]
    words = [score_words(path, data, num_pairs, batch_size) for path in checkpoints]
    test = [score(path, data, "test", compared, num_pairs, batch_size) for path in checkpoints]
    lines = [*report(val, seeds, num_pairs), *report_words(words), *report_test(test, num_pairs)]
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def train(folder: Path, seed: int, data: Path, options: Sequence[str] = (), config: str = "phantom.yaml") -> Path:
    """Last checkpoint of a shipped config under one seed; trained in `folder` if missing.

    Args:
        folder: Folder of the run.
        seed: Training seed.
        data: Folder of the phantom images.
        options: Options of `matex fit` in addition.
        config: Name of the config.
    """
    log = folder / "finished"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        resume = ["--ckpt_path", "last"] if any(folder.glob("runs/**/last.ckpt")) else []
        command = [sys.executable, "-m", "matex_pl.cli", "fit", "--config", config, "--seed_everything", str(seed)]
        command += ["--data.init_args.root", str(data.resolve()), *options, *resume]
        # Data modules of this folder.
        paths = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": paths})
        log.touch()
    return next(folder.glob("runs/**/last.ckpt"))


def score(path: Path, root: str, split: str, maps: Maps, num_pairs: int, batch_size: int) -> dict[str, list[float]]:
    """Metrics of every row of maps on pairs with boxes of a split."""
    module = load_module(str(path))
    fill = fill_images("mean_image", module.clip, module.clip.std)
    table: dict[str, Scores] = defaultdict(Scores)
    batches = list(pairs_with_boxes(module, root, split, num_pairs, batch_size))
    for batch in progress(batches, f"{path.parts[-5]}, {split}"):
        images, tokens = module.inputs(batch)
        with torch.no_grad():
            text = module.clip.encode_text(tokens)
            whole = (module.clip.encode_image(images) * text).sum(-1)
        for name, found in maps(module, batch, images, tokens):
            kept = torch.full_like(whole, torch.nan)
            if not name.endswith(WITHOUT_PRIOR):
                with torch.no_grad():
                    kept = (module.clip.encode_image(keep_highlighted(images, found, fill)) * text).sum(-1)
            table[name].update(found, batch, whole, kept)
    return {name: scores.values() for name, scores in table.items()}


def score_words(path: Path, root: str, num_pairs: int, batch_size: int) -> dict[str, list[float]]:
    """Confidence of the text on the validation split, by the number of text blocks with gradients."""
    module = load_module(str(path))
    table = {layers: (ConfidenceDrop(), ConfidenceIncrease()) for layers in (1, 2)}
    for batch in pairs_with_boxes(module, root, "val", num_pairs, batch_size):
        images, tokens = module.inputs(batch)
        method = Matex.recommended(text_grad_layers=max(table))
        maps = method.attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"])
        for layers, metrics in table.items():
            text = Matex.fuse(maps.parts, text_grad_layers=layers).text
            with torch.no_grad():
                kept = module.clip.similarity(
                    images, keep_relevant_tokens(tokens, text, maps.content, module.clip.pad_id)
                )
            for metric in metrics:
                metric.update(maps.score, kept)
    return {str(layers): [float(metric.compute()) for metric in metrics] for layers, metrics in table.items()}


def pairs_with_boxes(
    module: ClipModule, root: str, split: str, num_pairs: int, batch_size: int
) -> Iterator[ImageTextBatch]:
    """Batches of pairs with boxes, evenly spaced over a split."""
    images = PhantomDataModule(root=root, image_size=module.clip.image_size)
    images.prepare_data()
    images.setup("test" if split == "test" else "fit")
    pairs = images.dataset(split)
    boxed = [index for index, pair in enumerate(pairs.pairs) if pair.boxes]
    boxed = boxed[:: max(1, len(boxed) // num_pairs)][:num_pairs]
    for start in range(0, len(boxed), batch_size):
        yield collate([pairs[index] for index in boxed[start : start + batch_size]])


def fused(module: ClipModule, batch: ImageTextBatch, images: Tensor, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Maps of all settings: four sets of components, fused again for the rest."""
    parts = {
        (target, weight): Matex(
            **BASE | {"target": target, "spatial_weight": weight, "flow": "rollout", "grad_layers": 3}
        )
        .attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"])
        .parts
        for target in ("cosine", "margin")
        for weight in ("softmax", "loosened")
    }

    def fuse(**changes: Any) -> Tensor:
        settings = {"spatial_weight": "softmax", "flow": "sum"} | BASE | changes
        made = parts[settings.pop("target"), settings.pop("spatial_weight")]
        return Matex.fuse(made, **settings).image

    for name, (argument, value) in rows(SETTINGS).items():
        yield name, fuse(**{argument: value})
        yield name + WITHOUT_PRIOR, fuse(**{argument: value}, lambda_s=1.0)
    for name, (argument, value) in rows(PRIOR).items():
        yield name, fuse(**{argument: value})


def compared(module: ClipModule, batch: ImageTextBatch, images: Tensor, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Maps of all presets, controls and single-pass methods, the last under both targets."""
    given = (module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"])
    for name, method in [*PRESETS.items(), ("`PriorOnly()`", PriorOnly()), ("`CenterMap()`", CenterMap())]:
        yield name, method.attribute(*given).image
    for target in get_args(Target):
        for name, method in single_pass(target).items():
            yield f"{name}, {target}", method.attribute(*given).image


def single_pass(target: str) -> dict[str, AttributionMethod]:
    """Single-pass methods; the first two do not depend on the target."""
    return {
        # Eq. 1 alone, with a tau that gives no weight to the lower layers.
        "attention of the last block": Matex(alpha=0.0, beta=1.0, lambda_c=0.0, delta=0.0, tau=100.0),
        "rollout (Abnar and Zuidema)": Rollout(),
        "Chefer, last block": Chefer(target=target),
        "Chefer, all blocks": Chefer(start_layer=0, target=target),
        "LeGrad": LeGrad(target=target),
        "Grad-CAM, last block": GradCam(target=target),
        "Grad-ECLIP": GradEclip(target=target),
        "saliency": Saliency(target=target),
        **{f"dense similarity, {name}": DenseSimilarity(name, target=target) for name in get_args(Variant)},
    }


def rows(table: dict[str, dict[str, list[Any]]]) -> dict[str, tuple[str, Any]]:
    """Argument and value of every row, by name."""
    return {
        f"{title}: {value}": (argument, value)
        for title, setting in table.items()
        for argument, values in setting.items()
        for value in values
    }


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds, with minimum and maximum."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(val: Table, seeds: Sequence[int], num_pairs: int) -> list[str]:
    """Markdown lines of the validation images."""
    base = ", ".join(f"{name}={value!r}" for name, value in BASE.items())
    lines = [
        "# Effect of the settings of MATEX",
        "",
        f"Written by `python benchmarks/choices.py`. {len(seeds)} models of `configs/phantom.yaml`, training seeds "
        f"{', '.join(map(str, seeds))}. Every cell is the mean over the seeds, with minimum and maximum.",
        f"{num_pairs} pairs with boxes of the validation images. Every setting is varied alone around",
        f"`Matex({base})`, with the image maps of `Matex.recommended()` in a tower of three blocks. Without the prior: "
        "`lambda_s=1`.",
        "Confidence is that of the image, in percentage points of the cosine, with the mean image as the fill.",
        "A low drop is better. A map of ones has the drop 0: read the drop with the mass in the test table.",
        "",
        "| setting | value | pointing game | to the base | without the prior | to the base | confidence drop | "
        "confidence increase |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (argument, value) in rows(SETTINGS).items():
        lines.append(setting_line(name, argument, value, val))
    lines += ["", "| prior | value | pointing game | confidence drop | confidence increase |", "|---|---|---|---|---|"]
    for name in rows(PRIOR):
        title, value = name.split(": ")
        cells = [spread([scores[name][k] for scores in val], 3 if k == 0 else 1) for k in range(3)]
        lines.append(f"| {title} | {value} | {' | '.join(cells)} |")
    return lines


def report_words(words: Table) -> list[str]:
    """Markdown lines of the words."""
    lines = [
        "",
        "| text blocks with gradients, of 2 | text confidence drop | text confidence increase |",
        "|---|---|---|",
    ]
    for name in words[0]:
        cells = [spread([scores[name][k] for scores in words], 2 - k) for k in range(2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report_test(test: Table, num_pairs: int) -> list[str]:
    """Markdown lines of the test images."""
    lines = ["", "## Test images", "", f"No setting was selected on these images. {num_pairs} pairs with boxes.", ""]
    lines += [f"| method | {' | '.join(HEADER)} |", "|---|---|---|---|---|"]
    for name in sorted(test[0], key=lambda name: -mean(scores[name][0] for scores in test)):
        cells = [spread([scores[name][k] for scores in test], 1 if k in (1, 2) else 3) for k in range(4)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *ahead(test)]


def ahead(test: Table) -> list[str]:
    """Single-pass methods that beat MATEX without its prior, and the number of models where they do."""
    ours = "`Matex.recommended(lambda_s=1)`"
    lines = [f"Single-pass methods ahead of {ours} in the pointing game, and the difference:"]
    for name in test[0]:
        gained = [scores[name][0] - scores[ours][0] for scores in test]
        if not name.startswith("`") and mean(gained) > 0:
            lines.append(f"- {name}: {spread(gained)}, in {sum(gain > 0 for gain in gained)} of {len(test)} models")
    return lines if len(lines) > 1 else [f"No single-pass method is ahead of {ours} in the pointing game."]


def setting_line(name: str, argument: str, value: Any, val: Table) -> str:
    """A row of the validation table."""
    title = name.split(": ")[0]
    base = f"{title}: {(Matex().settings | BASE)[argument]}"
    gained = [scores[name][0] - scores[base][0] for scores in val]
    plain = [scores[name + WITHOUT_PRIOR][0] for scores in val]
    gained_plain = [scores[name + WITHOUT_PRIOR][0] - scores[base + WITHOUT_PRIOR][0] for scores in val]
    cells = [spread([scores[name][0] for scores in val]), spread(gained), spread(plain), spread(gained_plain)]
    cells += [spread([scores[name][k] for scores in val], 1) for k in (1, 2)]
    return f"| {title} | {value} | {' | '.join(cells)} |"


if __name__ == "__main__":
    show_messages()
    auto_cli(main, as_positional=False)
