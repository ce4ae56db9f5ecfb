"""Pointing game per finding on a validation or test split: MATEX and baselines without a model.

    python benchmarks/pointing.py --data NihDataModule --data.root FOLDER --ckpt_path last.ckpt

Prints a Markdown table, without maps that have no maximum. The mean box is the position-wise mean of the training
split's boxes of the same finding. Its peak is the best guess from the finding alone, without the image.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from jsonargparse import auto_cli
from torch import Tensor

import matex_pl.data
from matex_pl.arguments import import_all
from matex_pl.attribution import AttributionMethod, CenterMap, Matex, PriorOnly
from matex_pl.data import ChestXrayDataModule, ImageTextBatch, collate
from matex_pl.metrics.functional import box_masks, pointing_game
from matex_pl.training import ClipModule, load_module


def methods() -> dict[str, AttributionMethod]:
    """Rows of the comparison, in order."""
    return {
        "MATEX": Matex.recommended(),
        "MATEX, no prior": Matex.recommended(lambda_s=1.0),
        "MATEX, as printed": Matex.paper(),
        "phrase's prior": PriorOnly(),
        "image's center": CenterMap(),
    }


def mean_boxes(data: ChestXrayDataModule, size: tuple[int, int]) -> dict[str, Tensor]:
    """Mean box mask `(H, W)` of each finding over the training split."""
    masks = defaultdict(list)
    train = data.dataset("train")
    for index, pair in enumerate(train.pairs):
        if pair.boxes:
            masks[pair.finding].append(box_masks([train[index].boxes], size)[0].float())
    return {finding: torch.stack(found).mean(0) for finding, found in masks.items()}


def hits(module: ClipModule, batch: ImageTextBatch, means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hit (1 or 0) of each pair of a batch, `(B,)`, by row of the comparison."""
    images, tokens = module.inputs(batch)
    masks = box_masks(batch["boxes"], module.clip.image_size)
    blank = torch.zeros(module.clip.image_size)
    maps = {
        name: method.attribute(
            module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]
        ).image
        for name, method in methods().items()
    }
    maps["mean box"] = torch.stack([means.get(finding, blank) for finding in batch["finding"]])
    return {name: pointing_game(found, masks) for name, found in maps.items()}


def main(data: ChestXrayDataModule, ckpt_path: str, split: str = "test", batch_size: int = 32) -> None:
    """Print the table.

    Args:
        data: Data module.
        ckpt_path: Checkpoint of `matex fit`.
        split: `val` or `test`.
        batch_size: Number of pairs explained at once.
    """
    module = load_module(ckpt_path)
    data.image_size = module.clip.image_size
    data.prepare_data()
    data.setup("test")
    pairs = data.dataset(split)
    boxed = [index for index, pair in enumerate(pairs.pairs) if pair.boxes]
    means = mean_boxes(data, module.clip.image_size)
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for start in range(0, len(boxed), batch_size):
        batch = collate([pairs[index] for index in boxed[start : start + batch_size]])
        for name, found in hits(module, batch, means).items():
            for finding, hit in zip(batch["finding"], found.tolist(), strict=True):
                table[finding][name].append(hit)
                table["all"][name].append(hit)
    names = [*methods(), "mean box"]
    print(f"| finding | n | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for finding in [*sorted(table.keys() - {"all"}), "all"]:
        # Flat maps have no maximum and do not count: those of the prior if the phrase names no place.
        shares = [float(torch.tensor(table[finding][name]).nanmean()) for name in names]
        print(f"| {finding} | {len(table[finding]['MATEX'])} | {' | '.join(f'{share:.2f}' for share in shares)} |")


if __name__ == "__main__":
    # The parser knows the short names of imported classes only.
    import_all(matex_pl.data)
    auto_cli(main, as_positional=False)
