"""Memory over 2,000 training steps, with maps, scores and checkpoints every 100 steps.

    python benchmarks/soak.py

Prints a verdict and a Markdown table of the memory of the process and its loaders, the median over each 100 steps. The
exit status is 1 if a median after the warm-up differs by more than 2 % from the first one after it. Needs Linux with
glibc 2.33 or later, and `psutil`, which `pip install -e '.[dev]'` installs. Nothing is downloaded.
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
"""Allowed difference of memory after the warm-up, in percent."""
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
    """Callback that records the memory every tenth step and prints the medians of each `every` steps.

    Each of the `rows` has the step and the values of `COLUMNS`:

    - memory of the process and its children without files; a page that they share counts once, and other programs with
      the same libraries do not affect the value
    - resident memory of the process
    - the maximum of the resident memory so far
    - heap in use, which grows with a leak but not with holes between live blocks
    - memory of torch on a GPU
    - blocks of Python's own allocator
    - open files
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[list[float]] = []
        self.process = psutil.Process()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Record the memory."""
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
    """Bytes of a process without files; a page shared by n processes counts as an n-th of its size."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    return _bytes(path, "Pss_Anon") + _bytes(path, "Pss_Shmem")


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of the C library."""

    _fields_ = [(name, ctypes.c_size_t) for name in _HEAP]


def _heap_in_use() -> int:
    """Bytes in use of the C library's main heap and of its mappings of large blocks."""
    ask = ctypes.CDLL("libc.so.6").mallinfo2
    ask.restype = _Heap
    found = ask()
    return found.uordblks + found.hblkhd


def _bytes(path: Path, name: str) -> int:
    """Value of an entry in Linux's tables of a process, in bytes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def soak(folder: Path, steps: int, every: int, workers: int, accelerator: str) -> list[list[float]]:
    """Train, and return the rows of the gauge."""
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
    """Last step of each `every` steps, and the medians of the columns over these steps."""
    last = sorted({-(-int(row[0]) // every) * every for row in rows})
    parts = [[row for row in rows if end - every < row[0] <= end] for end in last]
    return [
        [end, *map(median, zip(*(row[1:] for row in part), strict=True))] for end, part in zip(last, parts, strict=True)
    ]


def spread(medians: list[list[float]], column: int, warm_up: int) -> float:
    """Largest difference, in percent, of a column's medians after the warm-up from the first of them."""
    after = [row[column] for row in medians if row[0] > warm_up]
    return 100 * max(abs(value / after[0] - 1) for value in after) if after[0] else 0.0


def main(steps: int = 2000, every: int = 100, warm_up: int = 400, workers: int = 1, accelerator: str = "auto") -> None:
    """Print the table and the verdict.

    Args:
        steps: Number of training steps.
        every: Number of steps between validations, with maps, scores and a checkpoint.
        warm_up: Number of steps that do not count.
        workers: Number of loader processes of each split.
        accelerator: Accelerator of the Trainer.
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
