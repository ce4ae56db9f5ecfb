"""Description of a training in plain types: its data, seed, scores and versions."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from matex_pl.arguments import argument_names

PACKAGES = ("matex_pl", "torch", "lightning", "open_clip_torch")


def describe_data(data: LightningDataModule) -> dict[str, Any]:
    """Class and settings of a data module in types of JSON.

    Settings are arguments of its constructor that it keeps under their names. Values that JSON lacks are left out.
    """
    kept, settings = vars(data), {}
    for name in argument_names(type(data)):
        if name in kept:
            with suppress(TypeError, ValueError):
                settings[name] = json.loads(json.dumps(kept[name], default=_path))
    return {"class": type(data).__name__, "settings": settings}


def describe_training(trainer: Any) -> dict[str, Any]:
    """Data, seed, last scores and versions of a training, for its checkpoints.

    Args:
        trainer: The Trainer, or None outside of a training.
    """
    data, seed = getattr(trainer, "datamodule", None), os.environ.get("PL_GLOBAL_SEED")
    scores = getattr(trainer, "callback_metrics", {})
    return {
        "data": describe_data(data) if data is not None else None,
        "seed": int(seed) if seed else None,
        "scores": {name: float(value) for name, value in scores.items()},
        "versions": {name: version(name) for name in PACKAGES},
    }


def _path(value: Any) -> str:
    if not isinstance(value, Path):
        raise TypeError(f"JSON has no {type(value).__name__}")
    return str(value)
