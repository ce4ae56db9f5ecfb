"""Parts of a remove-and-retrain experiment: protocol, training, methods and runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from matex_pl.arguments import check_choice, check_choices, check_positive
from matex_pl.attribution.core.fill import Fill
from matex_pl.files import MARK, read_json

Modality = Literal["image", "text"]
MODALITIES = get_args(Modality)
PRECISIONS = (
    *("32-true", "32", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "64", "16", "bf16"),
    *("transformer-engine", "transformer-engine-float16"),
)
"""Precisions of Lightning's Trainer for the trainings of ROAR+."""

Split = Literal["train", "val", "test"]
FORMAT = 2
PLAN = "plan.json"
OUTPUTS = {
    "images.npy": "NUMPY",
    "pairs.json": '[{"pair":',
    "explained.safetensors": "__metadata__",
    "start.safetensors": "__metadata__",
    PLAN: '"format":',
    "results.json": '"created":',
    "report.html": MARK,
    "table.md": "# ROAR+",
    **{f"curves_{modality}.{kind}": MARK for modality in MODALITIES for kind in ("png", "svg")},
}
"""Files of a plan, with the marks of earlier ones for `check_outputs`."""


@dataclass
class Protocol:
    """Removal protocol of an experiment and number of repeats.

    Args:
        modalities: `image`, `text` or both; each run removes from one of them.
        fractions: Shares of dropped units: patches of an image, content tokens of a phrase.
        repeats: Number of repeats, each with its own split, order of batches and random draws.
        num_pairs: Number of pairs drawn from the splits; -1 for all.
        splits: Splits of the data module that provide the pairs. They are pooled and split again by patient.
        train_share: Share of the patients in the training split.
        fill: Replacement of dropped patches: `mean_image`, `mean_color` (as published) or `blur`.
        corrupt_val: Whether to drop from the validation pairs too, as ROAR did (Hooker et al. 2019); off in ROAR+.
        seed: Random seed for the drawn pairs, the splits, the trainings and the order among equal units.
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
                raise ValueError(f"{name} must name at least one value, each once, got {values}.")
        for fraction in self.fractions:
            if not 0 <= fraction <= 1:
                raise ValueError(f"fractions must be in [0, 1], got {fraction:g}. Give a share, not a percentage.")
        if not 0 < self.train_share < 1:
            raise ValueError(f"train_share must be in (0, 1), got {self.train_share}.")
        if self.repeats < 1 or self.seed < 0:
            raise ValueError(f"repeats must be at least 1 and seed at least 0, got {self.repeats} and {self.seed}.")
        if self.num_pairs != -1 and self.num_pairs < 4:
            raise ValueError(f"num_pairs must be at least 4, or -1 for all pairs, got {self.num_pairs}.")


@dataclass
class Training:
    """Fine-tuning of each run: AdamW with warm-up and a cosine schedule, like `matex fit`, without augmentation.

    Args:
        epochs: Number of passes over the training pairs.
        batch_size: Number of pairs per batch, in training and validation.
        lr: Peak learning rate.
        weight_decay: Decay of the weight matrices.
        warmup_steps: Number of steps of linear warm-up.
        gradient_clip_val: Upper bound of the gradient norm; 0 for none.
        finetune: Trained weights: `full` (all), `head` (projections and final norms) or `lora` (low-rank updates of
            linear and attention layers, by peft).
        lora_rank: Rank of the low-rank updates. Their factor, `alpha`, is twice the rank.
        grad_checkpointing: Whether activations are recomputed in the backward pass, which takes less memory.
        accelerator: Accelerator of the Trainer: `cpu`, `gpu`, or `auto`.
        precision: Precision of the Trainer.
        threads: Number of CPU threads per run. The last digits of the scores depend on it.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup_steps: int = 10
    gradient_clip_val: float = 1.0
    finetune: Literal["full", "head", "lora"] = "full"
    lora_rank: int = 8
    grad_checkpointing: bool = False
    accelerator: str = "auto"
    precision: str = "32-true"
    threads: int = 1

    def __post_init__(self) -> None:
        check_choices(Training, vars(self))
        check_choice("accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps", "tpu"))
        check_choice("precision", self.precision, PRECISIONS)
        check_positive(epochs=self.epochs, lr=self.lr, threads=self.threads, lora_rank=self.lora_rank)
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, because contrastive training needs negatives, got {self.batch_size}."
            )
        if self.warmup_steps < 0 or self.gradient_clip_val < 0 or self.weight_decay < 0:
            raise ValueError(
                f"warmup_steps, gradient_clip_val and weight_decay must not be negative, got {self.warmup_steps}, "
                f"{self.gradient_clip_val} and {self.weight_decay}."
            )


@dataclass(frozen=True)
class PlanMethod:
    """A method of the plan.

    Args:
        name: Name in the tables.
        method: `class_path` and `init_args` of the attribution method; None for the true boxes.
        supports_text: Whether the method has word maps.
        control: Whether the method is a reference for the others: a baseline, or the true boxes as an upper limit.
        note: Remark for the tables.
    """

    name: str
    method: dict[str, Any] | None
    supports_text: bool
    control: bool = False
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: the clean run of a repeat, or a run with the highest units of a method dropped.

    Args:
        repeat: Index of the repeat, which sets split and random draws.
        method: Name of the method; empty for the clean run.
        modality: `image` or `text`; empty for the clean run.
        fraction: Share of the dropped units.
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
    """Name as part of a path: lower case, with dashes for all characters but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    """An experiment in a folder with all inputs of its runs: images, phrases, weights and, later, maps.

    `methods` are in the order of the tables, controls included. `about` describes model, data and versions.
    """

    folder: Path
    protocol: Protocol
    training: Training
    methods: list[PlanMethod]
    about: dict[str, Any]

    def runs(self) -> list[Run]:
        """All runs, repeat by repeat, with the clean run of each repeat first."""
        runs = []
        for repeat in range(self.protocol.repeats):
            runs.append(Run(repeat))
            for modality in self.protocol.modalities:
                for method in self.methods_of(modality):
                    runs += [Run(repeat, method.name, modality, share) for share in self.protocol.fractions]
        return runs

    def methods_of(self, modality: str) -> list[PlanMethod]:
        """Methods that have maps of this modality and support the model."""
        refused = self.refusals()
        return [
            method
            for method in self.methods
            if method.name not in refused and (modality == "image" or method.supports_text)
        ]

    def steps(self) -> int:
        """Number of optimizer steps of a run."""
        pairs = round(self.protocol.train_share * self.about["data"]["pairs"])
        return self.training.epochs * max(pairs // self.training.batch_size, 1)

    def refusals(self) -> dict[str, str]:
        """Reasons by name of the methods that do not support the model; known after the maps are computed."""
        path = self.folder / "refused.json"
        return read_json(path) if path.is_file() else {}

    def path(self, run: Run) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / run.id

    def described(self) -> dict[str, Any]:
        """Plan as plain types."""
        described = {"format": FORMAT, **asdict(self)}
        del described["folder"]
        return described


def read_plan(folder: Path) -> Plan:
    """Plan of a folder.

    Raises:
        FileNotFoundError: If the folder holds no plan.
        ValueError: If the plan is damaged or has another format.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(
            f"The folder {folder} holds no plan. Make one with `matex roar run --config FILE --out {folder}`."
        )
    described = read_json(folder / PLAN)
    version = described.get("format") if isinstance(described, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"The plan in {folder} has format {version!r}, but this version reads format {FORMAT}. Start again in "
            "another folder."
        )
    try:
        return Plan(
            folder,
            Protocol(**described["protocol"]),
            Training(**described["training"]),
            [PlanMethod(**method) for method in described["methods"]],
            described["about"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"The file {folder / PLAN} is damaged. Start again in another folder.") from error


def check_same(plan: Plan, wanted: Plan) -> None:
    """Raise a ValueError with the first differing settings if the plan of a folder is not the wanted one.

    The paths of the weights may differ, but not their content.
    """
    differing = [
        difference
        for difference in _differences(plan.described(), wanted.described())
        if not difference.startswith(("about.model.checkpoint ", "about.model.start_checkpoint "))
    ]
    if differing:
        raise ValueError(
            f"The folder {plan.folder} holds a plan with other settings: {'; '.join(differing[:3])}. Give another "
            f"folder, or finish that plan with `matex roar run --plan {plan.folder}`."
        )


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}".strip("."))
    elif there != here:
        yield f"{path} is {json.dumps(there):.60} in the plan, {json.dumps(here):.60} in this command"


def take_shard(runs: Sequence[Run], shard: str) -> list[Run]:
    """Every n-th run from the i-th on, for `shard` as `i/n`, for job arrays."""
    parts = re.fullmatch(r"(\d+)/(\d+)", shard)
    if parts is None or not 0 <= int(parts[1]) < int(parts[2]):
        raise ValueError(f"shard must be I/N with I below N, for example 3/8 in the fourth of 8 jobs, got {shard!r}.")
    return list(runs[int(parts[1]) :: int(parts[2])])
