"""What a remove-and-retrain experiment consists of: its protocol, its training, and the cells that they make."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matex_pl.arguments import check_choice, check_positive
from matex_pl.attribution.core.fill import FILLS, Fill
from matex_pl.files import write_text

MODALITIES = ("image", "text")
TRAINED = ("full", "head", "lora")
FORMAT = 1
_PLAN = "plan.json"


@dataclass
class Protocol:
    """What is removed, and how often all of it is repeated.

    Args:
        modalities: `image`, `text` or both; a cell removes from one of them.
        fractions: Shares of units that are dropped: patches of a film, content tokens of a phrase.
        repeats: New splits, orders of the batches and draws of the training.
        num_pairs: Pairs taken from the splits, drawn by the seed; -1 for all.
        splits: Splits of the data module that the pairs come from; they are split anew by patient.
        train_share: Share of the patients that are trained on.
        fill: What stands in for dropped patches: `mean_film`, `mean_colour` (as published) or `blur`.
        corrupt_val: Drop from the validation pairs as well, as ROAR did (Hooker et al. 2019); off in ROAR+.
        seed: Of the choice of pairs, the splits, the trainings and the order among equal units.
    """

    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    repeats: int = 5
    num_pairs: int = -1
    splits: list[str] = field(default_factory=lambda: ["train"])
    train_share: float = 0.8
    fill: Fill = "mean_film"
    corrupt_val: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: Something is.
        """
        for modality in self.modalities:
            check_choice("modalities", modality, MODALITIES)
        for split in self.splits:
            check_choice("splits", split, ("train", "val", "test"))
        check_choice("fill", self.fill, FILLS)
        for name, least in (("modalities", 1), ("fractions", 1), ("splits", 1)):
            given = getattr(self, name)
            if len(given) < least or len(set(given)) < len(given):
                raise ValueError(f"{name} must name at least one, each once; got {given}.")
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
    """The fine-tuning of each cell: AdamW with warm-up and a cosine, as `matex fit` has it, without augmentation.

    Args:
        epochs: Passes over the training pairs.
        batch_size: Pairs per batch, in training and validation.
        lr: Peak learning rate.
        weight_decay: Of the weight matrices.
        warmup_steps: Steps of linear warm-up.
        gradient_clip_val: Bound of the gradient's norm; 0 for none.
        trained: `full`, `head` (projections and final norms) or `lora` (low-rank updates of the linear layers beside
            these, by peft).
        lora_rank: Rank of the updates.
        accelerator: Of the Trainer: `cpu`, `gpu`, or `auto`.
        precision: Of the Trainer.
        threads: CPU threads of a cell; the numbers depend on it in their last digits.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup_steps: int = 10
    gradient_clip_val: float = 1.0
    trained: str = "full"
    lora_rank: int = 8
    accelerator: str = "auto"
    precision: str = "32-true"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: Something is.
        """
        check_choice("trained", self.trained, TRAINED)
        check_positive(epochs=self.epochs, lr=self.lr, threads=self.threads, lora_rank=self.lora_rank)
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, for contrastive training needs negatives; got {self.batch_size}."
            )
        if self.warmup_steps < 0 or self.gradient_clip_val < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, gradient_clip_val and weight_decay must not be negative.")


@dataclass(frozen=True)
class PlanRow:
    """A method of the plan.

    Args:
        name: As the tables print it.
        method: `class_path` and `init_args` of what makes the maps; None for the true boxes.
        serves_text: It has maps of the words.
        control: What the others have to be better than, or, the true boxes, what they may reach.
        note: What a reader must know beside the name.
    """

    name: str
    method: dict[str, Any] | None
    serves_text: bool
    control: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: a repeat's clean one, or one with the top of a method's units dropped.

    Args:
        repeat: Which split and which draws.
        row: Name of the method; empty for the clean one.
        modality: `image` or `text`; empty for the clean one.
        fraction: Share of the units that are dropped.
    """

    repeat: int
    row: str = ""
    modality: str = ""
    fraction: float = 0.0

    @property
    def id(self) -> str:
        """Its name and its folder, as `repeat-0/image/matex/0.1`."""
        if not self.row:
            return f"repeat-{self.repeat}/clean"
        return f"repeat-{self.repeat}/{self.modality}/{slug(self.row)}/{self.fraction:g}"


def slug(name: str) -> str:
    """A name as part of a path: lower case, with dashes for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    """An experiment in a folder, which holds all that a cell needs: films, phrases, weights and, later, maps.

    Args:
        folder: Its folder.
        protocol: What is removed, and how often.
        training: The fine-tuning of each cell.
        rows: The methods.
        about: Model, data and versions, for the tables.
    """

    folder: Path
    protocol: Protocol
    training: Training
    rows: list[PlanRow]
    about: dict[str, Any]

    def cells(self) -> list[Cell]:
        """All cells, repeat by repeat, the clean one of each first."""
        return [cell for repeat in range(self.protocol.repeats) for cell in self._repeat(repeat)]

    def _repeat(self, repeat: int) -> Iterator[Cell]:
        yield Cell(repeat)
        for modality in self.protocol.modalities:
            for row in self.rows_of(modality):
                for fraction in self.protocol.fractions:
                    yield Cell(repeat, row.name, modality, fraction)

    def rows_of(self, modality: str) -> list[PlanRow]:
        """The methods that have maps of films, or of phrases, and do not refuse the model."""
        refused = self.refusals()
        return [row for row in self.rows if row.name not in refused and (modality == "image" or row.serves_text)]

    def steps(self) -> int:
        """Optimiser steps of a cell."""
        pairs = round(self.protocol.train_share * self.about["data"]["pairs"])
        return self.training.epochs * max(pairs // self.training.batch_size, 1)

    def row(self, name: str) -> PlanRow:
        """A method by its name."""
        return next(row for row in self.rows if row.name == name)

    def refusals(self) -> dict[str, str]:
        """Why methods refuse the model, by name; known once the maps are made."""
        path = self.folder / "refused.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def path(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / cell.id

    def described(self) -> dict[str, Any]:
        """The plan as plain types."""
        return {
            "format": FORMAT,
            "protocol": asdict(self.protocol),
            "training": asdict(self.training),
            "rows": [asdict(row) for row in self.rows],
            "about": self.about,
        }

    def write(self) -> None:
        """Write `plan.json`, which makes the folder a plan: the last thing to be written."""
        write_text(self.folder / _PLAN, json.dumps(self.described(), indent=1))


def duration(seconds: float) -> str:
    """A time in words that say no more than an estimate can."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def has_plan(folder: Path) -> bool:
    """A folder holds a plan that is written to its end."""
    return (folder / _PLAN).is_file()


def read_plan(folder: Path) -> Plan:
    """The plan of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is of another format.
    """
    if not has_plan(folder):
        raise FileNotFoundError(f"{folder} holds no plan. `matex roar run --config FILE --out {folder}` makes one.")
    described = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        raise ValueError(
            f"The plan in {folder} has format {described.get('format')!r}, this version reads {FORMAT}. Start anew in "
            "another folder."
        )
    return Plan(
        folder,
        Protocol(**described["protocol"]),
        Training(**described["training"]),
        [PlanRow(**row) for row in described["rows"]],
        described["about"],
    )


def check_same(plan: Plan, wanted: Plan) -> None:
    """Refuse to go on with a plan in a folder that holds another one. The same weights may come from another path.

    Raises:
        ValueError: They differ; the message names the first settings that do.
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


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _differences(one.get(name), other.get(name), f"{path}.{name}".strip("."))
    elif one != other:
        yield f"{path} is {_short(one)} there, {_short(other)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def some_cells(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Every n-th cell from the i-th, by `i::n` as in a slice, for schedulers with job arrays.

    Raises:
        ValueError: It has another form.
    """
    found = re.fullmatch(r"(\d+)::(\d+)", part)
    if found is None or not 0 <= int(found[1]) < int(found[2]):
        raise ValueError(
            f"cells must be FIRST::STEP with FIRST below STEP, as 3::8 in the fourth of 8 jobs; got {part!r}."
        )
    return list(cells[int(found[1]) :: int(found[2])])
