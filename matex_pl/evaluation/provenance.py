"""Versions, settings and data behind a result."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from matex_pl.clip.model import Clip
from matex_pl.data import ChestXrayDataModule

PACKAGES = ("matex_pl", "torch", "lightning", "open_clip_torch")


def provenance(clip: Clip, weights: str, checkpoint: str, data: ChestXrayDataModule, seed: int) -> dict[str, Any]:
    """Provenance of a result in plain types: time, model, data, seed and versions.

    Args:
        clip: CLIP model.
        weights: `weight_hash` of the model.
        checkpoint: Path or name that the model was loaded from.
        data: Data module.
        seed: Random seed of the run.
    """
    inherited = vars(LightningDataModule()).keys()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(data).items()}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "checkpoint": checkpoint,
            "weights": weights,
            "image_size": list(clip.image_size),
            "grid": list(clip.grid),
        },
        "data": {
            "class": type(data).__name__,
            "settings": {
                name: value
                for name, value in settings.items()
                if name not in inherited and not name.startswith("_") and _is_plain(value)
            },
        },
        "seed": seed,
        "versions": {name: version(name) for name in PACKAGES},
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))
