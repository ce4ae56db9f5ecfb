"""Creation of a plan in its folder: pairs, weights and methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path

from filelock import FileLock

from matex_pl.attribution import Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.data import ChestXrayDataModule
from matex_pl.evaluation.compared import CENTER, PRIOR, RANDOM, USUAL_PLACES, WITHOUT_PRIOR, controls, method_row
from matex_pl.evaluation.pairs import choose_pairs, prepare_data
from matex_pl.evaluation.provenance import PACKAGES
from matex_pl.evaluation.store import describe_method, weight_hash
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.files import check_outputs, check_room, new_files_removed, write_text
from matex_pl.roar.finetune import write_module
from matex_pl.roar.images import split_rows, write_images
from matex_pl.roar.plan import OUTPUTS, PLAN, Plan, PlanMethod, Protocol, Training, check_same, read_plan, slug
from matex_pl.training.grad_checkpointing import checkpoint_gradients
from matex_pl.training.module import ClipModule

BOXES = "True boxes"


def make_plan(
    folder: Path,
    data: ChestXrayDataModule,
    explained: ClipModule,
    start: ClipModule,
    methods: Sequence[str],
    protocol: Protocol,
    training: Training,
    origins: dict[str, str],
) -> Plan:
    """Create a plan in `folder` with its decoded pairs and its weights, or continue an existing one.

    Args:
        folder: Folder of the plan.
        data: Data module.
        explained: Model whose maps decide which parts are dropped.
        start: Model from which each run starts.
        methods: Names of shipped methods and YAML files.
        protocol: Removal protocol and number of repeats.
        training: Fine-tuning of each run.
        origins: Origins of the weights, for the tables.

    Raises:
        OSError: If nothing can be written in the folder.
        ValueError: If the folder holds another plan or foreign files, a method is unknown or named twice, there are too
            few pairs, or the two models do not fit each other.
        ImportError: If the training needs PEFT, which is not installed.
        NotImplementedError: If the training needs gradient checkpointing, which a tower does not have.
    """
    if training.finetune == "lora" and find_spec("peft") is None:
        raise ImportError("training.finetune=lora needs peft. Install peft with: pip install 'matex_pl[lora]'.")
    if training.grad_checkpointing and training.finetune != "head":
        checkpoint_gradients(deepcopy(start.clip.model))
    check_plan_folder(folder)
    prepare_data(data, explained.clip.image_size, *protocol.splits)
    data.pairs["roar"] = [pair for split in protocol.splits for pair in data.pairs[split]]
    pairs = choose_pairs(data, "roar", protocol.num_pairs, protocol.seed, boxed=False)
    del data.pairs["roar"]
    # Fails here if there are too few patients, before the images are decoded.
    split_rows(pairs, protocol.train_share, protocol.seed)
    shape, start_shape = ((clip.image_size, clip.grid, clip.context_length) for clip in (explained.clip, start.clip))
    if shape != start_shape:
        raise ValueError(
            f"The start model has the input size, raster and context length {start_shape}, but the explained model has "
            f"{shape}. Start from weights of the same model."
        )
    if not (folder / PLAN).is_file():
        images = len({pair.image_id for pair in pairs}) * prod(explained.clip.image_size)
        weights = sum(value.nbytes for module in (explained, start) for value in module.state_dict().values())
        check_room(folder, images + weights)
    if explained.clip.mean_image.isnan().any():
        explained.clip.mean_image.copy_(data.mean_image())
    start.clip.mean_image.copy_(explained.clip.mean_image)
    boxed = sum(bool(pair.boxes) for pair in pairs)
    about = {
        "model": {
            **origins,
            "explained": weight_hash(explained.clip),
            "start": weight_hash(start.clip),
            "image_size": list(explained.clip.image_size),
            "grid": list(explained.clip.grid),
        },
        "data": {
            "class": type(data).__name__,
            "pairs": len(pairs),
            "patients": len({pair.patient_id for pair in pairs}),
            "boxed": boxed,
            "fingerprint": fingerprint([[pair.id, pair.phrase, pair.boxes] for pair in pairs]),
        },
        "versions": {name: version(name) for name in PACKAGES},
    }
    plan = Plan(folder, protocol, training, plan_methods(methods, boxed, len(pairs)), about)
    with new_files_removed([folder], [".lock"]):
        folder.mkdir(parents=True, exist_ok=True)
        # If two commands start at once, only one decodes the images.
        with FileLock(folder / ".lock"):
            if (folder / PLAN).is_file():
                check_same(read_plan(folder), plan)
                return plan
            for part in folder.glob(".*.part"):
                part.unlink()
            with new_files_removed([folder], OUTPUTS):
                write_images(data, pairs, folder)
                write_module(explained, folder / "explained.safetensors")
                write_module(start, folder / "start.safetensors")
                # Written last: this file makes the folder a plan.
                write_text(folder / PLAN, json.dumps(plan.described(), indent=1))
    return plan


def check_plan_folder(folder: Path) -> None:
    """Check that a folder holds a plan, or can take a new one.

    Raises:
        OSError: Nothing can be written in the folder.
        ValueError: The folder holds foreign files, or a damaged plan.
    """
    if (folder / PLAN).is_file():
        read_plan(folder)
    else:
        check_outputs(folder, OUTPUTS)


def plan_methods(methods: Sequence[str], boxed: int, pairs: int) -> list[PlanMethod]:
    """Methods of these names and YAML files, and the controls; true boxes are included if pairs have boxes.

    Raises:
        ValueError: If a method is unknown, named twice, or has the name of a control.
    """
    asked = [method_row(name, load_method(name), "quick") for name in methods]
    matex = next((entry.method for entry in asked if isinstance(entry.method, Matex)), None)
    entries = [entry for entry in asked if entry.name not in (RANDOM, CENTER, PRIOR)]
    entries += [entry for entry in controls(matex) if entry.name != USUAL_PLACES]
    planned = [
        PlanMethod(
            entry.name,
            describe_method(entry.method),
            # The prior changes only the map of the image.
            entry.method.supports_text and entry.name != WITHOUT_PRIOR,
            entry.control,
            entry.note,
        )
        for entry in entries
    ]
    if boxed:
        note = f"units of a perfect map; {boxed} of {pairs} pairs have boxes"
        planned.append(PlanMethod(BOXES, None, False, True, note))
    for place, method in enumerate(planned):
        if slug(method.name) in [slug(other.name) for other in planned[:place]]:
            raise ValueError(
                f"Two methods have the name {method.name!r}. Name each method once; a YAML file gets its file name."
            )
    return planned
