"""Making a plan: its pairs, weights and methods, in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from matex_pl.attribution import CenterMap, Matex, PriorOnly, RandomMap
from matex_pl.attribution.shipped import load_method
from matex_pl.clip.model import Clip
from matex_pl.data import ChestXrayDataModule, Study
from matex_pl.evaluation.compared import method_row
from matex_pl.evaluation.pairs import choose_pairs, prepare_data
from matex_pl.evaluation.provenance import PACKAGES
from matex_pl.evaluation.store import describe_method, weight_hash
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.roar.cell import write_module
from matex_pl.roar.films import write_films
from matex_pl.roar.plan import Plan, PlanRow, Protocol, Training, check_same, has_plan, read_plan, slug
from matex_pl.training.module import ClipModule

RANDOM, BLURRED, BOXES = "RandomMap", "RandomMap, blurred", "True boxes"
CENTER, PRIOR = "CenterMap", "PriorOnly"
_BLUR = 1.5


def make_plan(
    folder: Path,
    data: ChestXrayDataModule,
    explained: ClipModule,
    start: ClipModule,
    methods: Sequence[str],
    protocol: Protocol,
    training: Training,
    about: dict[str, str],
) -> Plan:
    """Choose and decode the pairs, and keep them with the weights in `folder`; a plan that is there is taken up again.

    Args:
        folder: Of the plan.
        data: The data module.
        explained: Its maps say what is dropped.
        start: Where each cell starts from.
        methods: Names of shipped methods and YAML files.
        protocol: What is removed, and how often.
        training: The fine-tuning of each cell.
        about: Where the weights come from, for the tables.

    Raises:
        ValueError: The folder holds another plan, a method is unknown or named twice, there are too few pairs, or the
            two models do not fit each other.
    """
    studies = _pairs(data, explained.clip.image_size, protocol)
    if explained.clip.mean_film.isnan().any():
        explained.clip.mean_film.copy_(data.mean_film())
    _check_start(explained.clip, start.clip)
    start.clip.mean_film.copy_(explained.clip.mean_film)
    described = {
        "model": about | _about_model(explained.clip, start.clip),
        "data": _about_data(data, studies),
        "versions": {name: version(name) for name in PACKAGES},
    }
    rows = plan_rows(methods, sum(bool(study.boxes) for study in studies), len(studies))
    plan = Plan(folder, protocol, training, rows, described)
    folder.mkdir(parents=True, exist_ok=True)
    # Two that start at once decode the films once.
    with FileLock(folder / ".lock"):
        if has_plan(folder):
            check_same(read_plan(folder), plan)
            return plan
        for part in folder.glob(".*.part"):
            part.unlink()
        write_films(data, studies, folder)
        write_module(explained, folder / "explained.safetensors")
        write_module(start, folder / "start.safetensors")
        plan.write()
    return plan


def _check_start(explained: Clip, start: Clip) -> None:
    """Refuse weights to start from that the explained model's maps do not fit.

    Raises:
        ValueError: They are of another input size, raster or context length.
    """
    ours, theirs = ((clip.image_size, clip.grid, clip.context_length) for clip in (explained, start))
    if ours != theirs:
        raise ValueError(
            f"The model to start from has the input size, raster and context length {theirs}, the one whose maps are "
            f"taken {ours}. Start from weights of the same model."
        )


def _about_model(explained: Clip, start: Clip) -> dict[str, Any]:
    return {
        "explained": weight_hash(explained),
        "start": weight_hash(start),
        "image_size": list(explained.image_size),
        "grid": list(explained.grid),
    }


def _about_data(data: ChestXrayDataModule, studies: Sequence[Study]) -> dict[str, Any]:
    return {
        "class": type(data).__name__,
        "pairs": len(studies),
        "patients": len({study.patient_id for study in studies}),
        "boxed": sum(bool(study.boxes) for study in studies),
        "fingerprint": fingerprint([[study.id, study.phrase, study.boxes] for study in studies]),
    }


def _pairs(data: ChestXrayDataModule, image_size: tuple[int, int], protocol: Protocol) -> list[Study]:
    """The pairs of the experiment, from all of its splits."""
    prepare_data(data, image_size, *protocol.splits)
    data.studies["roar"] = [study for split in protocol.splits for study in data.studies[split]]
    studies = choose_pairs(data, "roar", protocol.num_pairs, protocol.seed, boxed=False)
    del data.studies["roar"]
    patients = {study.patient_id for study in studies}
    number = round(protocol.train_share * len(patients))
    if not 0 < number < len(patients):
        raise ValueError(
            f"{len(studies)} pairs of {len(patients)} patients cannot be split by patient with "
            f"train_share={protocol.train_share:g}. Take more pairs, or another share."
        )
    return studies


def plan_rows(methods: Sequence[str], boxed: int, pairs: int) -> list[PlanRow]:
    """The methods that were asked for, and the controls, which always are.

    These are noise with and without neighbours alike, the film's centre, the true boxes where there are any and, beside
    MATEX, MATEX without its prior and the prior alone.

    Args:
        methods: Names of shipped methods and YAML files.
        boxed: Number of pairs with boxes.
        pairs: Number of pairs.

    Raises:
        ValueError: A method is unknown, named twice, or called like a control.
    """
    asked = [method_row(name, load_method(name), "quick") for name in methods]
    rows = [
        PlanRow(row.name, describe_method(row.method), row.method.serves_text, note=row.note)
        for row in asked
        if row.name not in (RANDOM, CENTER, PRIOR)
    ]
    matex = next((row.method for row in asked if isinstance(row.method, Matex)), None)
    rows += _prior_controls(matex) if matex else []
    rows += [
        PlanRow(RANDOM, describe_method(RandomMap()), True, True, "noise"),
        PlanRow(BLURRED, describe_method(RandomMap(blur=_BLUR)), True, True, "noise as smooth as maps are"),
        PlanRow(CENTER, describe_method(CenterMap()), False, True, "the middle of the frame"),
    ]
    if boxed:
        note = f"what a perfect map would drop; {boxed} of {pairs} pairs have boxes"
        rows.append(PlanRow(BOXES, None, False, True, note))
    names = [slug(row.name) for row in rows]
    twice = next((row.name for place, row in enumerate(rows) if names[place] in names[:place]), None)
    if twice:
        raise ValueError(f"Two methods are called {twice!r}. Name each once; a YAML file is called by its name.")
    return rows


def _prior_controls(matex: Matex) -> list[PlanRow]:
    """What tells whether MATEX is good for its prior alone, which knows the phrase and no film; the words have none."""
    without = Matex(**matex.settings | {"delta": 0.0})
    prior = PriorOnly(matex.prior_shape, matex.laterality, matex.knowledge_prior)
    return [
        PlanRow("MATEX, delta = 0", describe_method(without), False, True, "without its prior"),
        PlanRow(PRIOR, describe_method(prior), False, True, "the regions that the phrase names, no model"),
    ]
