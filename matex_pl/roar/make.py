"""Making a plan: its pairs, weights and methods, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
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
from matex_pl.files import write_text
from matex_pl.roar.finetune import write_module
from matex_pl.roar.images import split_rows, write_images
from matex_pl.roar.plan import PLAN, Plan, PlanMethod, Protocol, Training, check_same, read_plan, slug
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
    """A plan in `folder`, with its pairs, decoded, and its weights; a plan that is there already is continued.

    Args:
        folder: Folder of the plan.
        data: The data module.
        explained: Model whose maps decide what is dropped.
        start: Model that each run starts from.
        methods: Names of shipped methods and YAML files.
        protocol: What is removed, and how often.
        training: The fine-tuning of each run.
        origins: Origins of the weights, for the tables.

    Raises:
        ValueError: The folder holds another plan, a method is unknown or named twice, there are too few pairs, or the
            two models do not fit each other.
    """
    prepare_data(data, explained.clip.image_size, *protocol.splits)
    data.pairs["roar"] = [pair for split in protocol.splits for pair in data.pairs[split]]
    pairs = choose_pairs(data, "roar", protocol.num_pairs, protocol.seed, boxed=False)
    del data.pairs["roar"]
    # Fails here if there are too few patients, before the images are decoded.
    split_rows(pairs, protocol.train_share, protocol.seed)
    shape, start_shape = ((clip.image_size, clip.grid, clip.context_length) for clip in (explained.clip, start.clip))
    if shape != start_shape:
        raise ValueError(
            f"The model to start from has the input size, raster and context length {start_shape}, the one whose "
            f"maps are taken {shape}. Start from weights of the same model."
        )
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
    folder.mkdir(parents=True, exist_ok=True)
    # Two commands that start at once decode the images once.
    with FileLock(folder / ".lock"):
        if (folder / PLAN).is_file():
            check_same(read_plan(folder), plan)
            return plan
        for part in folder.glob(".*.part"):
            part.unlink()
        write_images(data, pairs, folder)
        write_module(explained, folder / "explained.safetensors")
        write_module(start, folder / "start.safetensors")
        # The last file, which makes the folder a plan.
        write_text(folder / PLAN, json.dumps(plan.described(), indent=1))
    return plan


def plan_methods(methods: Sequence[str], boxed: int, pairs: int) -> list[PlanMethod]:
    """The methods of these names and YAML files, and the controls: the true boxes too if some of the pairs have boxes.

    Raises:
        ValueError: A method is unknown, named twice, or called like a control.
    """
    asked = [method_row(name, load_method(name), "quick") for name in methods]
    matex = next((entry.method for entry in asked if isinstance(entry.method, Matex)), None)
    entries = [entry for entry in asked if entry.name not in (RANDOM, CENTER, PRIOR)]
    entries += [entry for entry in controls(matex) if entry.name != USUAL_PLACES]
    planned = [
        PlanMethod(
            entry.name,
            describe_method(entry.method),
            # The prior changes the map of the image alone.
            entry.method.supports_text and entry.name != WITHOUT_PRIOR,
            entry.control,
            entry.note,
        )
        for entry in entries
    ]
    if boxed:
        note = f"what a perfect map would drop; {boxed} of {pairs} pairs have boxes"
        planned.append(PlanMethod(BOXES, None, False, True, note))
    for place, method in enumerate(planned):
        if slug(method.name) in [slug(other.name) for other in planned[:place]]:
            raise ValueError(
                f"Two methods are called {method.name!r}. Name each once; a YAML file is called by its name."
            )
    return planned
