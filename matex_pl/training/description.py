"""Description of a training in plain types: its data, seed, scores and versions."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

PACKAGES = ("matex_pl", "torch", "lightning", "open_clip_torch")


def describe_data(data: LightningDataModule) -> dict[str, Any]:
    """Class and settings of a data module, without settings of other than plain types."""
    inherited = vars(LightningDataModule()).keys()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(data).items()}
    return {
        "class": type(data).__name__,
        "settings": {
            name: value
            for name, value in settings.items()
            if name not in inherited and not name.startswith("_") and _is_plain(value)
        },
    }


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


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))
