"""Guidance by boxes and by anatomy: its effect on the model, and not only on the guided map.

    python benchmarks/guidance.py --out docs/results/tables/guidance.md --nih FOLDER

Takes phantom models of several seeds, trained without the tag of `phantom_shortcut.yaml` and with it; missing ones are
trained. Continues each for half an epoch: with guidance, with guidance by wrong boxes, and without guidance. Trains
others with guidance from the start. Fine-tunes on NIH with guidance and without, and removes the patches that maps of
the models mark (ROAR+). Scores all models on test pairs. Every training and every measurement is a file in `--runs`:
the same command continues a stopped one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from anatomy import cell
from choices import spread, train
from guidance_values import KINDS, METHODS, TAG, Measured, nodule_values, pair_values
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from matex_pl.data import ChestXrayDataModule, ImageTextPair, NihDataModule, PhantomDataModule
from matex_pl.evaluation.intervals import draw_patients, estimate
from matex_pl.roar.make import make_plan
from matex_pl.roar.plan import Protocol, Training, slug
from matex_pl.roar.work import prepare_maps, result, work_here
from matex_pl.training import ClipModule, load_module
from matex_pl.training.guidance import Guidance

Part = Literal["tagged", "tagged_start", "plain", "plain_start", "nih", "removal"]


class Arm(NamedTuple):
    """Guidance of a training, and its boxes.

    Attributes:
        guidance: Guidance; None for the control of the same length.
        boxed: Share of the training patients with boxes.
        shuffled: Whether the boxes are exchanged among the training pairs.
    """

    guidance: Guidance | None = None
    boxed: float = 1.0
    shuffled: bool = False


NONE, BOXES, SHUFFLED = "no guidance", "boxes", "shuffled boxes"
# Chosen on validation pairs of the first seed.
_BY_BOXES = Guidance(weight=5.0, blocks=3, second_order=False)
PLAIN = {NONE: Arm(), BOXES: Arm(_BY_BOXES), SHUFFLED: Arm(_BY_BOXES, shuffled=True)}
ARMS: dict[str, dict[str, Arm]] = {
    "plain": PLAIN,
    "tagged": {
        NONE: Arm(),
        "boxes of 100 %": Arm(_BY_BOXES),
        "boxes of 10 %": Arm(_BY_BOXES, boxed=0.1),
        "boxes of 1 %": Arm(_BY_BOXES, boxed=0.01),
        "boxes of 100 %, last block": Arm(replace(_BY_BOXES, blocks=1)),
        "anatomy": Arm(replace(_BY_BOXES, boxes=0.0, anatomy=1.0)),
        SHUFFLED: Arm(_BY_BOXES, shuffled=True),
    },
    # Trained from the start, without the tag and with it; that without guidance is the one that other parts continue.
    "plain_start": {NONE: Arm(), BOXES: Arm(_BY_BOXES)},
    "tagged_start": {
        NONE: Arm(),
        "boxes of 100 %": Arm(_BY_BOXES),
        "boxes of 10 %": Arm(_BY_BOXES, boxed=0.1),
        "boxes of 1 %": Arm(_BY_BOXES, boxed=0.01),
        "anatomy": Arm(replace(_BY_BOXES, boxes=0.0, anatomy=1.0)),
        SHUFFLED: Arm(_BY_BOXES, shuffled=True),
    },
    "nih": {NONE: Arm(), BOXES: Arm(_BY_BOXES)},
    "removal": {NONE: Arm(), BOXES: Arm(_BY_BOXES)},
}
# Methods of ROAR+, by their names in the plan, and the shares of patches that it removes.
REMOVED, FRACTIONS = ("MATEX", "MATEX, delta = 0", "Chefer", "RandomMap"), [0.25, 0.5]
RESAMPLES = 1000
# Part whose models ROAR+ explains and trains.
REMOVED_FROM = "plain_start"
# Number of steps and peak learning rate of the trainings.
STEPS = {"plain": 110, "tagged": 110, "nih": 110}
RATES = {"plain": 1e-3, "tagged": 1e-3, "nih": 3e-4}
CONFIGS = {"plain": "phantom.yaml", "tagged": "phantom_shortcut.yaml"}
GUIDED = {"plain_start": "phantom_guided.yaml", "tagged_start": "phantom_shortcut_guided.yaml"}
# Validation does not change the weights.
_UNWATCHED = ["--trainer.limit_val_batches", "0"]


@dataclass(frozen=True)
class Study:
    """Folders and sizes of the study, as in `main`."""

    runs: Path
    data: Path
    nih: Path | None
    num_pairs: int
    num_rise: int

    def base(self, kind: str, seed: int) -> Path:
        """Checkpoint of the model before the study; trained if missing."""
        return train(self.runs / f"base/{kind}/seed{seed}", seed, self.data, _UNWATCHED, CONFIGS[kind])

    def folder(self, part: str, arm: str, seed: int) -> Path:
        """Folder of a model of the study."""
        return self.runs / part / slug(arm) / f"seed{seed}"

    def checkpoint(self, part: str, arm: str, seed: int) -> Path:
        """Checkpoint of a model of the study; trained if missing."""
        if part in GUIDED:
            return self.from_start(part, arm, seed)
        path = self.folder(part, arm, seed) / "last.ckpt"
        if not path.exists():
            start = self.base(base_of(part), seed)
            fit(start, ARMS[part][arm], self.training_data(part, ARMS[part][arm]), path, part, seed)
        return path

    def from_start(self, part: str, arm: str, seed: int) -> Path:
        """Checkpoint of a whole training; trained if missing."""
        guidance, boxed, shuffled = ARMS[part][arm]
        if guidance is None:
            return self.base(base_of(part), seed)
        options = [
            *_UNWATCHED,
            f"--model.guidance.weight={guidance.weight}",
            f"--model.guidance.boxes={guidance.boxes}",
            f"--model.guidance.anatomy={guidance.anatomy}",
            "--data.class_path=guidance.BoxedPhantoms",
            f"--data.init_args.boxed={boxed}",
            f"--data.init_args.shuffled={shuffled}",
        ]
        return train(self.folder(part, arm, seed), seed, self.data, options, GUIDED[part])

    def training_data(self, part: str, arm: Arm) -> ChestXrayDataModule:
        """Data module of the trainings of a part."""
        if part == "nih":
            return NihDataModule(str(self.nih), num_workers=0, cache_dir=str(self.runs / "nih/cache"))
        tag: dict[str, Any] = TAG if part == "tagged" else {}
        return BoxedPhantoms(str(self.data), arm.boxed, arm.shuffled, augment=False, num_workers=0, **tag)

    def measured(self, part: Part, arm: str, seed: int) -> Path:
        """File with the values of a model's pairs; measured if missing."""
        path = self.folder(part, arm, seed) / "values.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            measured = MEASURES[part](self, arm, seed)
            torch.save(measured, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return path


def base_of(part: str) -> str:
    """Kind of the unguided models of a part: trained on images with the tag or without."""
    return "tagged" if part.startswith("tagged") else "plain"


class BoxedPhantoms(PhantomDataModule):
    """Phantoms whose training pairs have the boxes of an arm.

    Args:
        root: Folder of the phantom images.
        boxed: Share of the training patients with boxes.
        shuffled: Whether the boxes are exchanged among the training pairs.
        kwargs: Arguments of `PhantomDataModule`.
    """

    def __init__(self, root: str, boxed: float = 1.0, shuffled: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.boxed = boxed
        self.shuffled = shuffled

    def list_pairs(self) -> list[ImageTextPair]:
        """One pair per image and finding."""
        pairs, random = super().list_pairs(), np.random.default_rng(0)
        patients = sorted({pair.patient_id for pair in pairs if pair.split == "train"})
        chosen = set(random.permutation(patients)[: round(self.boxed * len(patients))])
        rows = [row for row, pair in enumerate(pairs) if pair.patient_id in chosen and pair.boxes]
        sources = random.permutation(rows) if self.shuffled else rows
        boxes = {row: pairs[source].boxes for row, source in zip(rows, sources, strict=True)}
        return [
            replace(pair, boxes=boxes.get(row, ())) if pair.split == "train" else pair for row, pair in enumerate(pairs)
        ]


def fit(start: Path, arm: Arm, data: ChestXrayDataModule, path: Path, part: str, seed: int) -> None:
    """Train the model of a checkpoint and write its last checkpoint to `path`."""
    seed_everything(seed, verbose=False)
    prompt = load_module(str(start)).hparams["prompt"] if part != "nih" else "{finding}"
    module = ClipModule(str(start), lr=RATES[part], warmup_steps=20, prompt=prompt, guidance=arm.guidance)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=STEPS[part],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def measure_tagged(study: Study, arm: str, seed: int, part: Part = "tagged") -> Measured:
    """Values of a model on nodules with the tag and without it."""
    return nodule_values(load_module(str(study.checkpoint(part, arm, seed))), str(study.data))


def measure_plain(study: Study, arm: str, seed: int, part: Part = "plain") -> Measured:
    """Values of a phantom model without the tag; of the unguided one of `plain` also those of tagged images."""
    module = load_module(str(study.checkpoint(part, arm, seed)))
    data = PhantomDataModule(str(study.data), num_workers=0)
    values = pair_values(module, data, ["test"], study.num_pairs, study.num_rise)
    return values | (nodule_values(module, str(study.data)) if (part, arm) == ("plain", NONE) else {})


def measure_nih(study: Study, arm: str, seed: int) -> Measured:
    """Values of a NIH model on the patients of validation and test, since no setting was chosen on them."""
    module = load_module(str(study.checkpoint("nih", arm, seed)))
    return pair_values(module, study.training_data("nih", Arm()), ["val", "test"], -1, 0)


def measure_removal(study: Study, arm: str, seed: int) -> Measured:
    """Rise of the validation loss over the clean run of ROAR+, by method and share of removed patches."""
    checkpoint = str(study.checkpoint(REMOVED_FROM, arm, seed))
    # Another seed gives images that the models have not seen.
    data = PhantomDataModule(str(study.data), seed=1, num_train=300, num_val=4, num_test=4, num_workers=0)
    plan = make_plan(
        study.folder("removal", arm, seed) / "plan",
        data,
        load_module(checkpoint),
        load_module(checkpoint),
        ["matex", "chefer"],
        Protocol(modalities=["image"], fractions=FRACTIONS, repeats=1, seed=seed),
        Training(epochs=4, accelerator="cpu"),
        {"checkpoint": checkpoint, "start_checkpoint": checkpoint},
    )
    prepare_maps(plan)
    clean, *runs = [run for run in plan.runs() if run.method in ("", *REMOVED)]
    work_here(plan, [clean, *runs])
    loss = {run: (result(plan, run) or {})["loss"] for run in (clean, *runs)}
    return {f"{run.method}, {run.fraction}": {"rise": loss[run] - loss[clean]} for run in runs}


MEASURES: dict[str, Callable[[Study, str, int], Measured]] = {
    "tagged": measure_tagged,
    "tagged_start": partial(measure_tagged, part="tagged_start"),
    "plain": measure_plain,
    "plain_start": partial(measure_plain, part="plain_start"),
    "nih": measure_nih,
    "removal": measure_removal,
}


def main(
    runs: str = "runs/guidance",
    data: str = "data/phantom",
    nih: str | None = None,
    out: str = "docs/results/tables/guidance.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 300,
    num_rise: int = 100,
    processes: int = 2,
    parts: list[Part] = ["plain", "plain_start", "tagged", "tagged_start", "nih", "removal"],  # noqa: B006
) -> None:
    """Write the tables.

    Args:
        runs: Folder of the models and their values; missing ones are trained and measured.
        data: Folder of the phantom images; missing images are drawn.
        nih: Folder of the NIH distribution; without it there is no table of NIH.
        out: Path of the Markdown file.
        seeds: Training seeds.
        num_pairs: Number of phantom test pairs with boxes, drawn at random.
        num_rise: Number of these pairs that RISE explains.
        processes: Number of processes, each with one thread.
        parts: Tables to write. `tagged` and `tagged_start` need the models of `plain`, which are their reference.
    """
    folder = nih and Path(nih).resolve()
    study = Study(Path(runs).resolve(), Path(data).resolve(), folder or None, num_pairs, num_rise)
    chosen = [part for part in parts if part != "nih" or folder]
    jobs = [(part, arm, seed) for part in chosen for seed in seeds for arm in ARMS[part]]
    bases = [(kind, seed) for kind in dict.fromkeys(map(base_of, chosen)) for seed in seeds]
    # Each model once: two parts may measure the same one at the same time.
    models = dict.fromkeys((REMOVED_FROM if part == "removal" else part, arm, seed) for part, arm, seed in jobs)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=quiet) as pool:
        list(pool.map(study.base, *zip(*bases, strict=True)))
        list(pool.map(study.checkpoint, *zip(*models, strict=True)))
        paths = list(pool.map(study.measured, *zip(*jobs, strict=True)))
    found = {job: torch.load(path, weights_only=True) for job, path in zip(jobs, paths, strict=True)}
    values: Models = {part: {arm: [found[part, arm, seed] for seed in seeds] for arm in ARMS[part]} for part in chosen}
    lines = [
        "# Guidance",
        "",
        f"Written by `python benchmarks/guidance.py`. Training seeds: {', '.join(map(str, seeds))}.",
        "In brackets: 95 % intervals of a bootstrap over patients, of the mean over the models.",
    ]
    for part in chosen:
        lines += TABLES[part](values)
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def quiet() -> None:
    """One thread, and no messages of trainings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


class OverSeeds:
    """Mean over models of a score of the same pairs.

    Args:
        models: Values of the models.
        metric: Name of the score.
    """

    def __init__(self, models: Sequence[Measured], metric: str) -> None:
        self.scores = [KINDS[model[metric]["kind"]](**model[metric]["fields"]) for model in models]
        self.patients = tuple(models[0][metric]["patients"])
        self.count = self.scores[0].count

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """Score `(1,)`, or `(R,)` if each pair is drawn `(R, n)` times."""
        return torch.stack([score.score(drawn) for score in self.scores]).mean(0)


class Recovered:
    """Share of a loss that an arm recovers: its gain over no guidance, divided by that of the plain model.

    Args:
        arm: Score of the arm.
        unguided: Score without guidance.
        plain: Score of the model that was trained without the tag.
    """

    def __init__(self, arm: OverSeeds, unguided: OverSeeds, plain: OverSeeds) -> None:
        self.arm, self.unguided, self.plain = arm, unguided, plain
        self.patients, self.count = arm.patients, arm.count

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """Share `(1,)`, or `(R,)` if each pair is drawn `(R, n)` times; 1 is the whole loss."""
        arm, unguided, plain = (part.score(drawn) for part in (self.arm, self.unguided, self.plain))
        return (arm - unguided) / (plain - unguided)


def by_seed(scores: Iterable[Any]) -> str:
    """Score of each model."""
    return ", ".join(f"{float(score.score()):.2f}" for score in scores)


@lru_cache
def draws(patients: tuple[str, ...]) -> Tensor:
    """Draws of the patients, the same for equal pairs."""
    return draw_patients(patients, RESAMPLES, 0)


def shown(score: Any, reference: Any = None) -> str:
    """A score, or its difference from that of a reference, with its interval."""
    return cell(estimate(score, draws(score.patients), reference), "+" if reference is not None else "")


def tagged_table(arms: dict[str, list[Measured]], plain: list[Measured], title: str) -> list[str]:
    """Markdown lines: nodules without the tag, and the share of the loss that each arm recovers."""
    calls = {"called, without the tag": "called nodule, without the tag", "called, with the tag": "with the tag"}
    calls |= {"others called": "other images called nodule", "auroc": "AUROC, without the tag"}
    maps = [f"{name}, {share}" for name in METHODS for share in ("peak on the tag", "mass outside")]
    single = ["called, without the tag", "called, with the tag"]
    seeds = ["by seed, without the tag", "by seed, with the tag"]
    lines = ["", f"## {title}", "", *head(["trained", *calls.values(), *maps, *seeds])]
    for name, found in {"without the tag": plain, **{f"with the tag, {name}": arms[name] for name in arms}}.items():
        cells = [shown(OverSeeds(found, metric)) for metric in (*calls, *maps)]
        cells += [by_seed(OverSeeds([model], metric) for model in found) for metric in single]
        lines.append(row(name, cells))
    metrics = {"called, without the tag": "called nodule", "auroc": "AUROC"}
    columns = [part for label in metrics.values() for part in (f"gain, {label}", f"recovered, {label}", "by seed")]
    lines += ["", "Images without the tag, to no guidance:", "", *head(["arm", *columns])]
    for name, found in arms.items():
        if name != NONE:
            cells = []
            for metric in metrics:
                arm, unguided, untagged = (OverSeeds(part, metric) for part in (found, arms[NONE], plain))
                cells += [shown(arm, unguided), shown(Recovered(arm, unguided, untagged))]
                cells.append(
                    by_seed(
                        Recovered(*(OverSeeds([part[seed]], metric) for part in (found, arms[NONE], plain)))
                        for seed in range(len(found))
                    )
                )
            lines.append(row(name, cells))
    return lines


def pair_table(title: str, arms: dict[str, list[Measured]]) -> list[str]:
    """Markdown lines: every score of the pairs under each arm, with the differences from no guidance."""
    names = [name for name in arms if name != NONE]
    lines = ["", f"## {title}", "", *head(["score", "n", *arms, *(f"{name}, gain" for name in names), "gains by seed"])]
    metrics = [metric for metric in arms[NONE][0] if metric in arms[names[0]][0]]
    for metric in metrics:
        scores = {name: OverSeeds(found, metric) for name, found in arms.items()}
        if not scores[NONE].count:
            continue
        cells = [str(scores[NONE].count), *(shown(score) for score in scores.values())]
        cells += [shown(scores[name], scores[NONE]) for name in names]
        single = [
            float(OverSeeds([guided], metric).score() - OverSeeds([unguided], metric).score())
            for guided, unguided in zip(arms[BOXES], arms[NONE], strict=True)
        ]
        lines.append(row(metric, [*cells, ", ".join(f"{gain:+.3f}" for gain in single)]))
    return lines


def removal_table(arms: dict[str, list[Measured]]) -> list[str]:
    """Markdown lines: rise of the validation loss when the marked patches are removed before the training."""
    lines = ["", "## ROAR+", "", "Rise of the validation loss over the clean run: mean over the seeds (minimum to "]
    lines[-1] += "maximum). A higher rise means that the marked patches matter more."
    lines += ["", *head(["maps, share removed", *arms, f"{BOXES}, gain"])]
    for name in arms[NONE][0]:
        rises = {arm: [model[name]["rise"] for model in found] for arm, found in arms.items()}
        gains = [guided - unguided for guided, unguided in zip(rises[BOXES], rises[NONE], strict=True)]
        lines.append(row(name, [*(spread(values) for values in rises.values()), spread(gains)]))
    return lines


def head(columns: Sequence[str]) -> list[str]:
    """Head of a Markdown table."""
    return [row(columns[0], columns[1:]), "|---" * len(columns) + "|"]


def row(name: str, cells: Sequence[str]) -> str:
    """Row of a Markdown table."""
    return f"| {' | '.join([name, *cells])} |"


Models = dict[Part, dict[str, list[Measured]]]
TABLES: dict[Part, Callable[[Models], list[str]]] = {
    "tagged": lambda models: tagged_table(models["tagged"], models["plain"][NONE], "Nodules with a tag"),
    "tagged_start": lambda models: tagged_table(
        models["tagged_start"], models["plain"][NONE], "Nodules with a tag, guidance from the start"
    ),
    "plain": lambda models: pair_table("Phantoms without a tag", models["plain"]),
    "plain_start": lambda models: pair_table("Phantoms without a tag, guidance from the start", models["plain_start"]),
    "nih": lambda models: pair_table("NIH, patients of validation and test", models["nih"]),
    "removal": lambda models: removal_table(models["removal"]),
}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
