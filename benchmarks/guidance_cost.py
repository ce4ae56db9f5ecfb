"""Cost of guidance: time of a guided training step relative to an unguided one, in one run.

    python benchmarks/guidance_cost.py --out docs/results/tables/guidance_cost.md

A step is the forward of both towers, the losses, the backward pass and AdamW. The pairs are noise, each with a box on a
quarter of the image. The trainings take turns, which spreads a slow minute of the machine over all of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

import torch
from jsonargparse import auto_cli

from matex_pl.attribution.core.target import REFERENCES
from matex_pl.data import ImageTextBatch, ImageTextPair, collate
from matex_pl.data.pair import Sample
from matex_pl.training import ClipModule
from matex_pl.training.guidance import Followed, Guidance, Guide
from matex_pl.training.loss import gathered_loss

TRAININGS: dict[str, Guidance | None] = {
    "no guidance": None,
    "K = 1, first order": Guidance(second_order=False),
    "K = 1, second order": Guidance(),
    "K = 3, first order": Guidance(blocks=3, second_order=False),
    "K = 3, second order": Guidance(blocks=3),
}
BASE = "no guidance"


def main(
    out: str = "docs/results/tables/guidance_cost.md",
    models: dict[str, int] = {"models/phantom_vit.json": 64, "ViT-B-32": 16},  # noqa: B006
    rounds: int = 7,
) -> None:
    """Write the table.

    Args:
        out: Path of the Markdown file.
        models: Batch size of each model, by name.
        rounds: Number of rounds after one to warm up.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        "# Cost of guidance",
        "",
        f"Written by `python benchmarks/guidance_cost.py`. One thread, torch {torch.__version__}. Time of a training "
        f"step relative to the unguided step of the same round: median of {rounds} rounds (minimum to maximum).",
        "",
        "| model | batch | guidance | seconds | to no guidance |",
        "|---|---|---|---|---|",
    ]
    for model, size in models.items():
        times = measure(steps_of(model, size), rounds)
        for name, seconds in times.items():
            ratios = [mine / base for mine, base in zip(seconds, times[BASE], strict=True)]
            shown = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name != BASE else "1"
            lines.append(f"| {model} | {size} | {name} | {median(seconds):.2f} | {shown} |")
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


def steps_of(model: str, size: int) -> dict[str, Callable[[], None]]:
    """Training steps of one new model on a batch of pairs with boxes, by the name of the training."""
    module = ClipModule(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    batch = noise(size, module.clip.image_size)

    def step(guide: Guide | None) -> None:
        with guide.following() if guide else nullcontext() as followed:
            image, text = module(batch)
        loss = gathered_loss(image, text, module.clip.logit_scale.exp(), batch["phrase"])
        if guide is not None:
            loss = loss + guide(batch, cast(Followed, followed), image, text, 0)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {name: partial(step, guidance and Guide(guidance, module.clip)) for name, guidance in TRAININGS.items()}


def noise(size: int, frame: tuple[int, int]) -> ImageTextBatch:
    """Batch of noise with different phrases, each with a box."""
    pixels = torch.randint(256, (size, 3, *frame), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    content = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return collate(
        [
            Sample(ImageTextPair(str(row), str(row), str(row), row, REFERENCES[row % len(REFERENCES)]), *parts)
            for row, parts in enumerate((image, box, content) for image in pixels)
        ]
    )


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
