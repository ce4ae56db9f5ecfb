"""Cost of a pair and of a process: the numbers of docs/guides/many-gpus.md.

    python benchmarks/scaling.py

Prints a Markdown table. Steps are those of the model of `configs/phantom.yaml`, on one process and on two (gloo), with
64 pairs per step in both. All other numbers are measured on synthetic pairs. Seconds are those of one core in one
process (`time.process_time`), which reduces the effect of other work on the machine. Seconds of disks are wall-clock
time.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from PIL import Image

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap
from matex_pl.clip import load_clip
from matex_pl.clip.device import find_device, synchronize
from matex_pl.data import ImageTextPair, PhantomDataModule
from matex_pl.data.cache import ImageCache
from matex_pl.data.datamodule import EpochSampler
from matex_pl.data.mimic import sentences_of
from matex_pl.evaluation.store import MapStore, weight_hash
from matex_pl.maps import Attribution, min_max, upsample
from matex_pl.training.loss import gathered_loss
from matex_pl.training.scores import ImageTextRecall

_PAIRS, _WIDTH = 100_000, 512


class Clock(Callback):
    """Callback that measures the seconds of each training step, without the first ten."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Record the time."""
        self.times.append(time.process_time())

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """Write the median of the first process."""
        steps = [after - before for before, after in zip(self.times[10:], self.times[11:], strict=False)]
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(median(steps)), encoding="utf-8")


def step_seconds(rank: int, folder: Path, processes: int) -> None:
    """Write the median seconds of a step of 64 pairs, in each of `processes` that share them."""
    clock = Clock(folder / f"steps{processes}")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=40,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **({"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}),
    )
    module = ClipModule("models/phantom_vit.json", lr=1e-3)
    data = PhantomDataModule(
        str(folder / "images"), 2_000, 2, 2, batch_size=64 // processes, num_workers=0, augment=False
    )
    trainer.fit(module, data)


def loss_seconds(rank: int, folder: Path, batch: int) -> None:
    """Write the median seconds of the loss and its backward in one of two processes, with 512 channels."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{batch}", rank=rank, world_size=2)
    image, text = (F.normalize(torch.randn(batch, _WIDTH), dim=-1).requires_grad_() for _ in range(2))
    phrases = [f"phrase {rank} {number}" for number in range(batch)]
    seconds = [timed(lambda: gathered_loss(image, text, torch.tensor(10.0), phrases).backward()) for _ in range(12)]
    if rank == 0:
        (folder / f"loss{batch}").write_text(json.dumps(median(seconds[2:])), encoding="utf-8")
    dist.destroy_process_group()


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def pairs(number: int) -> list[ImageTextPair]:
    """Pairs like those of a manifest with one finding and one box each."""
    phrase = "There is a small left pleural effusion with adjacent atelectasis, unchanged."
    return [
        ImageTextPair(
            id=f"s{50_000_000 + n}",
            patient_id=f"p{10_000_000 + n}",
            image_id=f"f{n:032x}",
            image=f"files/p10/p{10_000_000 + n}/s{50_000_000 + n}/{n:032x}.jpg",
            phrase=f"{phrase} {n}",
            boxes=((10.0 + n, 20.0, 30.0, 40.0),),
            finding="pleural effusion",
            image_findings=("pleural effusion",),
        )
        for n in range(number)
    ]


def of_the_list() -> Iterator[tuple[str, str]]:
    """Cost of the list of pairs, and of the order of an epoch."""
    tracemalloc.start()
    listed = pairs(_PAIRS)
    yield "list of pairs, bytes per pair and process", f"{tracemalloc.get_traced_memory()[0] / _PAIRS:.0f}"
    tracemalloc.stop()
    clip = load_clip("ViT-B-32")
    seconds = timed(lambda: [clip.count_tokens(pair.phrase) for pair in listed[:5_000]])
    yield "looking for phrases that are too long, microseconds per pair", f"{1e6 * seconds / 5_000:.0f}"
    sampler = EpochSampler(listed, 0)  # type: ignore[arg-type]
    seconds = timed(lambda: sum(1 for _ in sampler))
    yield "order of an epoch, microseconds per pair", f"{1e6 * seconds / _PAIRS:.2f}"


def of_the_scores() -> Iterator[tuple[str, str]]:
    """Cost of retrieval over a whole split."""
    for pairs in (2_000, 4_000, 8_000):
        image, text = (F.normalize(torch.randn(pairs, _WIDTH), dim=-1) for _ in range(2))
        names = [str(number) for number in range(pairs)]
        metric = ImageTextRecall()
        metric.update(image, text, names, names, names)
        yield f"retrieval of {pairs} pairs, seconds in every process", f"{timed(metric.compute):.2f}"
    size = sum(
        state.numel() * state.element_size()
        for name in ("image", "text", "keys")
        for state in metric.metric_state[name]
    )
    yield "state of retrieval, bytes per pair, in every process", f"{size / pairs:.0f}"


def of_the_store(folder: Path) -> Iterator[tuple[str, str]]:
    """Cost of maps on disk: 64 files of 64 pairs, 224 pixels and 7 x 7 patches, with pixels and without."""
    for kind, image in (("grid alone", False), ("grid and pixels", True)):
        store = MapStore(folder / kind, "weights", CenterMap())
        seconds = []
        for shard in range(64):
            keys = [f"s{shard}-{row}:0123456789abcdef0123" for row in range(64)]
            start = time.perf_counter()
            store.write(keys, made_up_maps(pixels=image))
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in store.folder.iterdir()) / 4096
        yield f"map on disk, {kind}, bytes per pair", f"{size:.0f}"
        yield f"writing it, {kind}, milliseconds per pair", f"{1e3 * median(seconds) / 64:.2f}"
    opened = timed(lambda: MapStore(folder / "grid alone", "weights", CenterMap()))
    yield "opening a store, milliseconds per file of 64 pairs", f"{1e3 * opened / 64:.2f}"


def made_up_maps(*, pixels: bool) -> Attribution:
    """Synthetic maps of 64 pairs; with `pixels` their image maps do not follow from the patches."""
    grid = min_max(torch.rand(64, 7, 7))
    image = torch.rand(64, 224, 224) if pixels else min_max(upsample(grid, (224, 224)))
    return Attribution(image, grid, torch.rand(64, 77), torch.ones(64, 77, dtype=torch.bool), torch.rand(64))


def of_the_weights(folder: Path) -> Iterator[tuple[str, str]]:
    """Cost of ViT-B/32: its weights, their hash and a checkpoint of training."""
    module = ClipModule("ViT-B-32")
    count = sum(parameter.numel() for parameter in module.parameters())
    yield "parameters of ViT-B/32, millions", f"{count / 1e6:.1f}"
    yield "hash of its weights, seconds", f"{timed(lambda: weight_hash(module.clip)):.2f}"
    # Weights, and AdamW's two moments.
    state = [module.state_dict()] + [{name: p.detach() for name, p in module.named_parameters()}] * 2
    copies = [{name: value.clone() for name, value in part.items()} for part in state]
    start = time.perf_counter()
    torch.save(copies, folder / "state")
    seconds = time.perf_counter() - start
    size = (folder / "state").stat().st_size
    yield "checkpoint of its training, MB", f"{size / 1e6:.0f}"
    yield "writing it, seconds", f"{seconds:.1f}"


def of_a_real_step(number: int = 32) -> Iterator[tuple[str, str]]:
    """Wall-clock time of a training step of ViT-B/32 with random weights, on all cores or on a GPU if there is one."""
    device = find_device("auto")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    torch.set_num_threads(cores)
    clip = load_clip("ViT-B-32").to(device).train()
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=1e-5)
    phrases = [pair.phrase for pair in pairs(number)]
    images, tokens = torch.randn(number, 3, 224, 224, device=device), clip.tokenize(phrases).to(device)
    seconds = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        loss = gathered_loss(clip.encode_image(images), clip.encode_text(tokens), clip.logit_scale.exp(), phrases)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    step = median(seconds[1:])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores} cores"
    yield f"training step of ViT-B/32, {number} pairs, float32, {where}, seconds by the clock", f"{step:.2f}"
    yield "r, pairs per second", f"{number / step:.1f}"


def of_the_images(folder: Path) -> Iterator[tuple[str, str]]:
    """Size of a cached image, and time to read MIMIC's reports before the first step."""
    source = folder / "image.png"
    Image.fromarray(torch.randint(256, (600, 500), dtype=torch.uint8).numpy()).save(source)
    ImageCache(folder / "kept").read(source, lambda size: (224, 224), "224 x 224")
    [kept] = (folder / "kept").rglob("*.npz")
    yield "image of the cache, 224 x 224, bytes", f"{kept.stat().st_size:,}"
    report = "FINDINGS: " + "The lungs are clear of consolidation. " * 12 + "\nIMPRESSION: No acute process is seen."
    for number in range(2_000):
        (folder / f"s{number}.txt").write_text(report, encoding="utf-8")
    sections = ("findings", "impression")
    seconds = timed(
        lambda: [sentences_of((folder / f"s{n}.txt").read_text(encoding="utf-8"), sections) for n in range(2_000)]
    )
    yield "reading a report of MIMIC's, microseconds", f"{1e6 * seconds / 2_000:.0f}"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [("cores, and load when it began", f"{os.cpu_count()}, {os.getloadavg()[0]:.1f}")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Processes are forked first, before this one has threads.
        step_seconds(0, folder, 2)
        fork(step_seconds, folder, 1)
        for processes in (1, 2):
            seconds = json.loads((folder / f"steps{processes}").read_text(encoding="utf-8"))
            rows.append((f"step of 64 pairs, {processes} process(es), seconds in each", f"{seconds:.3f}"))
        for batch in (64, 256, 1024):
            fork(loss_seconds, folder, batch, processes=2)
            seconds = json.loads((folder / f"loss{batch}").read_text(encoding="utf-8"))
            rows.append((f"loss and backward, 2 x {batch} pairs, milliseconds in each", f"{1e3 * seconds:.1f}"))
        rows += [*of_the_list(), *of_the_scores(), *of_the_store(folder), *of_the_weights(folder)]
        rows += [*of_a_real_step(), *of_the_images(folder)]
    print("| what | measured |\n|---|---|")
    print("\n".join(f"| {what} | {value} |" for what, value in rows))


def fork(function: Callable[..., None], *arguments: Any, processes: int = 1) -> None:
    """Run a function in separate processes."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=processes, start_method="fork")


if __name__ == "__main__":
    main()
