"""The parts of a remove-and-retrain experiment: its protocol, its training, and the runs that follow from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from matex_pl.arguments import check_choice, check_choices, check_positive
from matex_pl.attribution.core.fill import Fill

Modality = Literal["image", "text"]
MODALITIES = get_args(Modality)
Split = Literal["train", "val", "test"]
FORMAT = 2
PLAN = "plan.json"


@dataclass
class Protocol:
    """What is removed, and how often the experiment is repeated.

    Args:
        modalities: `image`, `text` or both; each run removes from one of them.
        fractions: Shares of units that are dropped: patches of an image, content tokens of a phrase.
        repeats: Number of repeats, each with its own split, order of batches and random draws.
        num_pairs: Number of pairs drawn from the splits; -1 for all.
        splits: Splits of the data module that provide the pairs. They are pooled and split again by patient.
        train_share: Share of the patients to train on.
        fill: Replacement of dropped patches: `mean_image`, `mean_color` (as published) or `blur`.
        corrupt_val: Drop from the validation pairs as well, as ROAR did (Hooker et al. 2019); off in ROAR+.
        seed: Random seed for the choice of pairs, the splits, the trainings and the order among equal units.
    """

    modalities: list[Modality] = field(default_factory=lambda: ["image", "text"])
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    repeats: int = 5
    num_pairs: int = -1
    splits: list[Split] = field(default_factory=lambda: ["train"])
    train_share: float = 0.8
    fill: Fill = "mean_image"
    corrupt_val: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(Protocol, vars(self))
        for name, choices in (("modalities", MODALITIES), ("splits", get_args(Split))):
            for value in getattr(self, name):
                check_choice(name, value, choices)
        for name in ("modalities", "fractions", "splits"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, each once; got {values}.")
        for fraction in self.fractions:
            if not 0 <= fraction <= 1:
                raise ValueError(f"fractions must be in [0, 1], got {fraction:g}. Give a share, not a percentage.")
        if not 0 < self.train_share < 1:
            raise ValueError(f"train_share must be in (0, 1), got {self.train_share}.")
        if self.repeats < 1 or self.seed < 0:
            raise ValueError(f"repeats must be at least 1 and seed not negative, got {self.repeats} and {self.seed}.")
        if self.num_pairs != -1 and self.num_pairs < 4:
            raise ValueError(f"num_pairs must be at least 4, or -1 for all; got {self.num_pairs}.")


@dataclass
class Training:
    """The fine-tuning of each run: AdamW with warm-up and a cosine, like `matex fit`, without augmentation.

    Args:
        epochs: Passes over the training pairs.
        batch_size: Pairs per batch, in training and validation.
        lr: Peak learning rate.
        weight_decay: Decay of the weight matrices.
        warmup_steps: Steps of linear warm-up.
        gradient_clip_val: Upper bound of the gradient norm; 0 for none.
        finetune: Trained weights: `full` (all), `head` (projections and final norms) or `lora` (low-rank updates of
            the linear layers, by peft).
        lora_rank: Rank of the low-rank updates.
        accelerator: Accelerator of the Trainer: `cpu`, `gpu`, or `auto`.
        precision: Precision of the Trainer.
        threads: CPU threads of a run. The scores depend on it in their last digits.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup_steps: int = 10
    gradient_clip_val: float = 1.0
    finetune: Literal["full", "head", "lora"] = "full"
    lora_rank: int = 8
    accelerator: str = "auto"
    precision: str = "32-true"
    threads: int = 1

    def __post_init__(self) -> None:
        check_choices(Training, vars(self))
        check_positive(epochs=self.epochs, lr=self.lr, threads=self.threads, lora_rank=self.lora_rank)
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, for contrastive training needs negatives; got {self.batch_size}."
            )
        if self.warmup_steps < 0 or self.gradient_clip_val < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, gradient_clip_val and weight_decay must not be negative.")


@dataclass(frozen=True)
class PlanMethod:
    """A method of the plan.

    Args:
        name: Name in the tables.
        method: `class_path` and `init_args` of the attribution method; None for the true boxes.
        supports_text: It has maps of the words.
        control: A reference for the other methods: a baseline, or, the true boxes, an upper limit.
        note: Remark for the tables.
    """

    name: str
    method: dict[str, Any] | None
    supports_text: bool
    control: bool = False
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: the clean one of a repeat, or one with the top of a method's units dropped.

    Args:
        repeat: Index of the repeat, which sets split and random draws.
        method: Name of the method; empty for the clean run.
        modality: `image` or `text`; empty for the clean run.
        fraction: Share of the units that are dropped.
    """

    repeat: int
    method: str = ""
    modality: str = ""
    fraction: float = 0.0

    @property
    def id(self) -> str:
        """Name and folder of the run, for example `repeat-0/image/matex/0.1`."""
        if not self.method:
            return f"repeat-{self.repeat}/clean"
        return f"repeat-{self.repeat}/{self.modality}/{slug(self.method)}/{self.fraction:g}"


def slug(name: str) -> str:
    """A name as part of a path: lower case, with dashes for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    """An experiment in a folder that holds everything a run needs: images, phrases, weights and, later, maps.

    `methods` are in the order of the tables, controls included; `about` describes model, data and versions.
    """

    folder: Path
    protocol: Protocol
    training: Training
    methods: list[PlanMethod]
    about: dict[str, Any]

    def runs(self) -> list[Run]:
        """All runs, repeat by repeat, each repeat's clean one first."""
        runs = []
        for repeat in range(self.protocol.repeats):
            runs.append(Run(repeat))
            for modality in self.protocol.modalities:
                for method in self.methods_of(modality):
                    runs += [Run(repeat, method.name, modality, share) for share in self.protocol.fractions]
        return runs

    def methods_of(self, modality: str) -> list[PlanMethod]:
        """The methods that have maps of this modality and support the model."""
        refused = self.refusals()
        return [
            method
            for method in self.methods
            if method.name not in refused and (modality == "image" or method.supports_text)
        ]

    def steps(self) -> int:
        """Optimizer steps of a run."""
        pairs = round(self.protocol.train_share * self.about["data"]["pairs"])
        return self.training.epochs * max(pairs // self.training.batch_size, 1)

    def refusals(self) -> dict[str, str]:
        """Reasons of the methods that do not support the model, by name; known once the maps are made."""
        path = self.folder / "refused.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def path(self, run: Run) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / run.id

    def described(self) -> dict[str, Any]:
        """The plan as plain types."""
        described = {"format": FORMAT, **asdict(self)}
        del described["folder"]
        return described


def read_plan(folder: Path) -> Plan:
    """The plan of a folder.

    Raises:
        FileNotFoundError: The folder holds no plan.
        ValueError: The plan has another format.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(f"{folder} holds no plan. `matex roar run --config FILE --out {folder}` makes one.")
    described = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        raise ValueError(
            f"The plan in {folder} has format {described.get('format')!r}, this version reads {FORMAT}. Start again in "
            "another folder."
        )
    return Plan(
        folder,
        Protocol(**described["protocol"]),
        Training(**described["training"]),
        [PlanMethod(**method) for method in described["methods"]],
        described["about"],
    )


def check_same(plan: Plan, wanted: Plan) -> None:
    """Raise a ValueError that names the first differing settings of a folder's plan.

    The paths of the weights may differ, their content may not.
    """
    differing = [
        difference
        for difference in _differences(plan.described(), wanted.described())
        if not difference.startswith(("about.model.checkpoint ", "about.model.start_checkpoint "))
    ]
    if differing:
        raise ValueError(
            f"{plan.folder} holds a plan with other settings: {'; '.join(differing[:3])}. Give another folder, or "
            f"finish that one with `matex roar run --plan {plan.folder}`."
        )


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}".strip("."))
    elif there != here:
        yield f"{path} is {json.dumps(there):.60} there, {json.dumps(here):.60} here"


def take_shard(runs: Sequence[Run], shard: str) -> list[Run]:
    """Every n-th run from the i-th, for `shard` as `i/n`, for job arrays."""
    parts = re.fullmatch(r"(\d+)/(\d+)", shard)
    if parts is None or not 0 <= int(parts[1]) < int(parts[2]):
        raise ValueError(f"shard must be I/N with I below N, for example 3/8 in the fourth of 8 jobs; got {shard!r}.")
    return list(runs[int(parts[1]) :: int(parts[2])])
