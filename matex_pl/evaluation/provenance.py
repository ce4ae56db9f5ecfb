"""Versions, settings and data behind a result."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from matex_pl.clip.model import Clip
from matex_pl.data import ChestXrayDataModule
from matex_pl.training.description import PACKAGES, describe_data


def provenance(clip: Clip, weights: str, checkpoint: str, data: ChestXrayDataModule, seed: int) -> dict[str, Any]:
    """Provenance of a result in plain types: time, model, data, seed and versions.

    Args:
        clip: CLIP model.
        weights: `weight_hash` of the model.
        checkpoint: Path or name that the model was loaded from.
        data: Data module.
        seed: Random seed of the run.
    """
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "checkpoint": checkpoint,
            "weights": weights,
            "image_size": list(clip.image_size),
            "grid": list(clip.grid),
        },
        "data": describe_data(data),
        "seed": seed,
        "versions": {name: version(name) for name in PACKAGES},
    }
