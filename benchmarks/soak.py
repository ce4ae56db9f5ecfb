"""Does memory stay flat: 2,000 training steps with maps, scores and checkpoints every 100 steps.

    python benchmarks/soak.py

Prints a Markdown table of the memory of the process and its loaders, the median over each 100 steps, and a verdict; the
status is 1 where a median after the warm-up is more than 2 % above or below the first one after it. Linux with
glibc 2.33 or later, and `psutil`, which `pip install -e '.[dev]'` brings. Two to four minutes on two cores, nothing is
downloaded.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import psutil
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from matex_pl import ClipModule
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.data import PhantomDataModule

MODEL = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3},
        "text_cfg": {"context_length": 36, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
}
LIMIT = 2.0
"""By how many percent memory may differ after the warm-up."""
_EVERY = 10
_HEAP = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
COLUMNS = (
    "all processes, MiB",
    "this process, MiB",
    "its largest so far, MiB",
    "its heap in use, MiB",
    "GPU, MiB",
    "Python blocks, thousands",
    "open files",
)


class Gauge(Callback):
    """Notes the memory every tenth step, between validations, and prints the medians of each `every` steps.

    `rows` are lists of the step and the values of `COLUMNS`: what the process and its children hold beside files, where
    pages that they share count once (other programs that have mapped the same libraries do not count), RSS of the
    process, the largest it ever was, what of its heap is in use, which a leak raises and holes between live pieces do
    not, what torch holds on a GPU, blocks of Python's own allocator, and open files.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[list[float]] = []
        self.process = psutil.Process()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Note it."""
        if trainer.global_step % _EVERY == 0:
            self.rows.append([trainer.global_step, *self._read()])
        if trainer.global_step % self.every == 0:
            step, *values = windows(self.rows, self.every)[-1]
            print(f"| {step} | {' | '.join(f'{value:.1f}' for value in values)} |", flush=True)

    def _read(self) -> list[float]:
        held = sum(_held(process.pid) for process in (self.process, *self.process.children(recursive=True)))
        gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        largest = _bytes(Path("/proc/self/status"), "VmHWM")
        used = [held, self.process.memory_info().rss, largest, _heap_in_use(), gpu]
        return [*(number / 2**20 for number in used), sys.getallocatedblocks() / 1000, self.process.num_fds()]


def _held(pid: int) -> int:
    """Bytes that a process holds beside files; of a page that n processes share an n-th part."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    return _bytes(path, "Pss_Anon") + _bytes(path, "Pss_Shmem")


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of the C library."""

    _fields_ = [(name, ctypes.c_size_t) for name in _HEAP]


def _heap_in_use() -> int:
    """Bytes that the C library's main heap, and its mappings of large pieces, have given out."""
    ask = ctypes.CDLL("libc.so.6").mallinfo2
    ask.restype = _Heap
    found = ask()
    return found.uordblks + found.hblkhd


def _bytes(path: Path, name: str) -> int:
    """A number of Linux' tables of a process, in bytes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def soak(folder: Path, steps: int, every: int, workers: int, accelerator: str) -> list[list[float]]:
    """Train, and give the rows of the gauge."""
    data = PhantomDataModule(
        str(folder / "images"),
        num_train=300,
        num_val=60,
        num_test=2,
        stored_size=96,
        batch_size=16,
        num_workers=workers,
    )
    gauge = Gauge(every)
    run = Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(folder, name="logs"),
        callbacks=[
            AttributionMaps(),
            AttributionMetrics(per_finding=True),
            ModelCheckpoint(folder / "kept", monitor="attribution/pointing_game", mode="max", save_top_k=2),
            gauge,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(ClipModule(json.dumps(MODEL), lr=1e-3), data)
    return gauge.rows


def windows(rows: list[list[float]], every: int) -> list[list[float]]:
    """Last step of each `every` steps, and the medians of the columns over these."""
    last = sorted({-(-int(row[0]) // every) * every for row in rows})
    parts = [[row for row in rows if end - every < row[0] <= end] for end in last]
    return [
        [end, *map(median, zip(*(row[1:] for row in part), strict=True))] for end, part in zip(last, parts, strict=True)
    ]


def spread(medians: list[list[float]], column: int, warm_up: int) -> float:
    """By how many percent a column's medians after the warm-up differ at most from the first of them."""
    after = [row[column] for row in medians if row[0] > warm_up]
    return 100 * max(abs(value / after[0] - 1) for value in after) if after[0] else 0.0


def main(steps: int = 2000, every: int = 100, warm_up: int = 400, workers: int = 1, accelerator: str = "auto") -> None:
    """Print the table and the verdict.

    Args:
        steps: Training steps.
        every: Steps from one validation, with maps, scores and a checkpoint, to the next.
        warm_up: Steps that do not count.
        workers: Processes of the loader of each split.
        accelerator: Of the Trainer.
    """
    if steps <= warm_up + every:
        raise SystemExit(f"steps must be more than warm_up + every = {warm_up + every}, got {steps}.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.perf_counter()
    print(f"| step | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        medians = windows(soak(Path(folder), steps, every, workers, accelerator), every)
    found = {name: spread(medians, place, warm_up) for place, name in enumerate(COLUMNS, start=1)}
    worst = max(value for name, value in found.items() if "largest" not in name)
    print(f"\n{steps} steps in {time.perf_counter() - start:.0f} s, {os.cpu_count()} cores.")
    print("; ".join(f"{name}: within {value:.2f} %" for name, value in found.items()))
    print(f"Flat within {worst:.2f} % after step {warm_up}; {LIMIT:g} % are allowed.")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
