"""Time that the package adds to what its users would do without it, in ratios.

    python benchmarks/overhead.py --ckpt_path runs/phantom/checkpoints/last.ckpt --roar roar/phantom

Prints a Markdown table: median, minimum and maximum over the rounds. The two sides of a ratio take turns, which spreads
a slow minute of the machine over both. Without `--roar`, the row of ROAR+ is left out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cost import explained_pairs, interleaved, ratio_of, short_forward
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from open_clip import ClipLoss
from roar_time import outside_share
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from matex_pl import ClipModule, load_clip
from matex_pl.attribution import Matex
from matex_pl.attribution.core.target import REFERENCES
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch, PhantomDataModule
from matex_pl.files import CONFIG_FOLDER, read_yaml
from matex_pl.training import load_module
from matex_pl.training.module import decay_groups

Row = tuple[str, str, str]
# Steps of a round, after one that makes the buffers of the optimizer.
_STEPS = 4
# By whether they leave out the padded positions of phrases, as this package does.
LOOPS = {"a loop over open_clip": False, "the same without padding": True}
_PHANTOM_MODEL = str(CONFIG_FOLDER / "models/phantom_vit.json")


def measure_overhead(
    ckpt_path: str, roar: str | None = None, processes: int = 2, rounds: int = 5, root: str = "data/phantom"
) -> str:
    """Measure on this machine; returns a Markdown table.

    Args:
        ckpt_path: Checkpoint of `matex fit --config phantom.yaml`.
        roar: Folder of a finished plan of ROAR+.
        processes: Number of processes that worked on this plan at the same time.
        rounds: Number of rounds of each ratio, after one to warm up.
        root: Folder of the phantoms.
    """
    lines = ["| What | to | Ratio |", "|---|---|---|"]
    for part in (
        step_rows(rounds),
        map_rows(rounds),
        validation_rows("phantom model", load_module(ckpt_path), root, rounds, phantom_callbacks()),
        validation_rows("ViT-B/32", ClipModule("ViT-B-32"), root, rounds, {"default callbacks": default_callbacks}),
        []
        if roar is None
        else [("ROAR+: outside of training steps, with the maps", "whole time", outside_share(roar, processes))],
    ):
        lines += [f"| {what} | {base} | {ratio} |" for what, base, ratio in part]
    return "\n".join(lines)


def step_rows(rounds: int) -> Iterator[Row]:
    """Training step of `ClipModule` under Lightning, to a loop of torch over open_clip's model and loss."""
    for name, model, size in (("ViT-B/32", "ViT-B-32", 16), ("phantom model", _PHANTOM_MODEL, 64)):
        batch = random_batch(model, size)
        sides = {"module": partial(module_step, model, batch)}
        sides |= {name: partial(loop_step, model, batch, short=short) for name, short in LOOPS.items()}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in progress(range(rounds + 1), f"Training steps, {name}"):
            for side, measure in sides.items():
                found = measure()
                seconds[side] += [found] if turn else []
        for base in LOOPS:
            yield f"training step, {name}, batch {size}", base, ratio_of(seconds["module"], seconds[base])


def random_batch(model: str, size: int) -> ImageTextBatch:
    """A batch of noise with phrases of findings."""
    height, width = load_clip(model).image_size
    nothing = torch.zeros(0, 4)
    phrases = [REFERENCES[place % len(REFERENCES)] for place in range(size)]
    names = [str(place) for place in range(size)]
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(size, 1)
    generator = torch.Generator().manual_seed(0)
    return {
        "id": names,
        "patient_id": names,
        "image_id": names,
        "image": torch.randint(256, (size, 3, height, width), dtype=torch.uint8, generator=generator),
        "phrase": phrases,
        "boxes": [nothing] * size,
        "finding": [""] * size,
        "image_findings": [()] * size,
        "split": ["train"] * size,
        "content_box": box,
        "chest_box": torch.full_like(box, torch.nan),
        "masks": {},
    }


class Clock(Callback):
    """Seconds from the second step to the last one."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        if batch_idx == 1:
            self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        self.seconds = time.perf_counter() - getattr(self, "start", 0.0)


def module_step(model: str, batch: ImageTextBatch) -> float:
    """Seconds of `_STEPS` steps of `ClipModule`, with gradients clipped as in the shipped configs."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=_STEPS + 1,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = DataLoader([batch] * (_STEPS + 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(ClipModule(model, warmup_steps=0), loader)
    return clock.seconds


def loop_step(model: str, batch: ImageTextBatch, *, short: bool) -> float:
    """Seconds of `_STEPS` steps of the same model, optimizer and clipping; `short` leaves out padded text positions."""
    clip = load_clip(model).train()
    optimizer, loss_of = AdamW(decay_groups(clip.model, 0.1), lr=1e-5, fused=True), ClipLoss()
    tokens, start = clip.tokenize(batch["phrase"]), 0.0
    for step in range(_STEPS + 1):
        if step == 1:
            start = time.perf_counter()
        images = clip.normalize(batch["image"])
        image, text = (clip.encode_image(images), clip.encode_text(tokens)) if short else clip.model(images, tokens)[:2]
        loss = loss_of(image, text, clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - start


def map_rows(rounds: int, size: int = 16) -> Iterator[Row]:
    """Both maps of MATEX, to a forward of both towers without gradient and without padding."""
    clip = load_clip("ViT-B-32")
    images, tokens, phrases = explained_pairs(clip, size)
    methods = {"Matex()": Matex(), 'Matex(grad_layers="all")': Matex(grad_layers="all")}
    calls: dict[str, Callable[..., Any]] = {"forward": partial(short_forward, clip, images, tokens)}
    calls |= {name: partial(method.attribute, clip, images, tokens, phrases) for name, method in methods.items()}
    times = interleaved(calls, rounds, clip, size)
    for name in methods:
        yield f"`{name}`, ViT-B/32, batch {size}", "forward without padding", ratio_of(times[name], times["forward"])


def default_callbacks() -> list[Callback]:
    """Maps and scalars with their defaults."""
    return [AttributionMaps(), AttributionMetrics()]


def phantom_callbacks() -> dict[str, Callable[[], list[Callback]]]:
    """The callbacks of `phantom.yaml`, together and alone."""
    callbacks = read_yaml(CONFIG_FOLDER / "phantom.yaml")["trainer"]["callbacks"]
    given = {part["class_path"].rpartition(".")[2]: part.get("init_args", {}) for part in callbacks}
    methods = given["AttributionMetrics"]["methods"]
    first, *others = [{name: choice} for name, choice in methods.items()]

    def metrics() -> list[Callback]:
        return [AttributionMetrics(**given["AttributionMetrics"])]

    def maps() -> list[Callback]:
        return [AttributionMaps(**given["AttributionMaps"])]

    def single() -> list[Callback]:
        alone = [AttributionMetrics(first | other) for other in others]
        for callback in alone:
            callback.methods.pop("")
        return [AttributionMetrics(first), *alone]

    return {
        "callbacks of `phantom.yaml`": lambda: [*maps(), *metrics()],
        f"`AttributionMetrics` of {len(methods)} methods": metrics,
        "one `AttributionMetrics` per method": single,
        "`AttributionMaps`": maps,
    }


def validation_rows(
    name: str, module: ClipModule, root: str, rounds: int, variants: dict[str, Callable[[], list[Callback]]]
) -> Iterator[Row]:
    """Validation of the phantoms with callbacks, to the same validation without."""
    data = PhantomDataModule(root, batch_size=64, augment=False)
    chosen: dict[str, Callable[[], list[Callback]]] = {"": list, **variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for turn in progress(range(rounds + 1), f"Validations, {name}"):
            for variant, callbacks in chosen.items():
                trainer = Trainer(
                    accelerator="cpu",
                    callbacks=callbacks(),
                    logger=TensorBoardLogger(folder),
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                start = time.perf_counter()
                trainer.validate(module, data, verbose=False)
                seconds[variant] += [time.perf_counter() - start] if turn else []
    for variant in variants:
        yield f"validation, {name}, with {variant}", "without callbacks", ratio_of(seconds[variant], seconds[""])


if __name__ == "__main__":
    show_messages()
    print(auto_cli(measure_overhead, as_positional=False))
