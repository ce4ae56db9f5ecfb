"""Seconds of `matex tune` for the components, for its settings and for the best settings at every pixel.

    python benchmarks/search.py
    python benchmarks/search.py --ckpt_path runs/phantom/checkpoints/last.ckpt

Without a checkpoint the model is ViT-B/32 with random weights, because the cost of a setting does not depend on the
weights. Prints a Markdown table for the 567 settings of the default grid. Nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch import Trainer

from matex_pl import ClipModule
from matex_pl.data import PhantomDataModule
from matex_pl.tune import tune_matex

OBJECTIVES = [
    "pointing_game",
    "cnr",
    "miou",
    "iou/0.3",
    "acc50/0.3",
    "ap50/0.3",
    "energy_pointing_game",
    "relevance_rank_accuracy",
    "border_mass",
    "outside_thorax_mass",
    "mean_map_mass",
    "side_sensitivity",
    "prompt_sensitivity",
    "text_mean_map_mass",
]


def main(
    ckpt_path: str | None = None,
    name: str = "ViT-B-32",
    root: str = "data/phantom",
    pairs: int = 256,
    objectives: list[str] = OBJECTIVES,
) -> None:
    """Print the table.

    Args:
        ckpt_path: Checkpoint of `matex fit`; random weights by default.
        name: Name of the model with random weights.
        root: Folder of the phantoms, which are drawn if missing.
        pairs: Number of pairs of each split.
        objectives: Objectives to measure; `sanity` needs all times once more for each block of the towers.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ckpt_path or save_random(name, Path(folder) / "random.ckpt")
        print("| objective | components, s | settings, s | best again, s |\n|---|---|---|---|")
        for objective in objectives:
            data = PhantomDataModule(root, augment=False)
            tune_matex(data, checkpoint, folder, objective=objective, num_pairs=pairs)
            seconds = json.loads((Path(folder) / "tune.json").read_text(encoding="utf-8"))["seconds"]
            times = (seconds.get(part, 0) for part in ("components", "settings", "finalists"))
            print(f"| `{objective}` | {' | '.join(f'{time:.1f}' for time in times)} |", flush=True)


def save_random(name: str, path: Path) -> str:
    """Path of a new checkpoint of a model with random weights."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(ClipModule(name))
    trainer.save_checkpoint(path)
    return str(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
