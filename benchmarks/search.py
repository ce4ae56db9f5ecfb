"""What share of the time of the components `matex tune` spends on its settings, for each objective searched at once.

    python benchmarks/search.py
    python benchmarks/search.py --ckpt_path runs/phantom/checkpoints/last.ckpt --pairs 256

Without a checkpoint the model is ViT-B/32 with random weights: what a setting costs does not depend on them. Prints a
Markdown table of the share that 504 settings take. Some minutes on two cores, nothing is downloaded.
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
    "energy_in_box",
    "rank_accuracy",
    "border_mass",
    "outside_thorax_mass",
    "mean_map_mass",
    "side_sensitivity",
    "prompt_sensitivity",
]
# With 9 values of lambda_c and 7 of tau, 504 settings.
LAMBDA_S = [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25]


def main(
    ckpt_path: str | None = None,
    name: str = "ViT-B-32",
    root: str = "data/phantom",
    pairs: int = 64,
    objectives: list[str] = OBJECTIVES,
) -> None:
    """Print the table.

    Args:
        ckpt_path: A checkpoint of `matex fit`; without one, random weights.
        name: The model that has them.
        root: Where phantoms are, or are drawn to.
        pairs: Of the validation split.
        objectives: What is searched for; `sanity` takes the components once more for each block of the towers.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ckpt_path or save_random(name, Path(folder) / "random.ckpt")
        print("| objective | components, s | settings, s | share |\n|---|---|---|---|")
        for objective in objectives:
            data = PhantomDataModule(root, augment=False)
            tune_matex(data, checkpoint, folder, objective=objective, lambda_s=LAMBDA_S, num_pairs=pairs)
            found = json.loads((Path(folder) / "tune.json").read_text(encoding="utf-8"))
            spent = found["seconds"]
            row = f"| `{objective}` | {spent['components']:.2f} | {spent['settings']:.2f} | {found['ratio']:.1%} |"
            print(row, flush=True)


def save_random(name: str, path: Path) -> str:
    """A checkpoint of a model with random weights."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(ClipModule(name))
    trainer.save_checkpoint(path)
    return str(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
