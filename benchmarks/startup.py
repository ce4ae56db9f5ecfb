"""CPU seconds until `matex` answers, compared with importing its dependencies.

    python benchmarks/startup.py --rounds 5 --before ../matex_pl_of_yesterday

Prints a Markdown table. The commands take turns, which spreads a slow minute of the machine over all of them. A number
is the median of user and system seconds of a process and its children. `matex explain` runs on a tiny model made here:
once with a missing checkpoint, which ends it at the point of loading, and once completely.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from jsonargparse import auto_cli

from matex_pl.console import progress, show_messages

ROOT = Path(__file__).parents[1]
PHRASE = "Left lower lobe consolidation."
YARDSTICKS = ("import torch, lightning", "import torch, open_clip")
MATEX = {
    "matex --help": ["--help"],
    "matex fit, without a config": ["fit"],
    "matex prior": ["prior", PHRASE],
    "matex explain --help": ["explain", "--help"],
    "matex explain, to the point of loading": ["explain", "image.png", PHRASE, "--ckpt_path", "none.ckpt"],
    "matex explain, in whole": ["explain", "image.png", PHRASE, "--ckpt_path", "tiny.ckpt"],
}
MAKE_CHECKPOINT = """
from lightning.pytorch import Trainer
from matex_pl import ClipModule
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.strategy.connect(ClipModule("tests/tiny.json"))
trainer.save_checkpoint({path!r})
"""


def measure_startup(rounds: int = 5, before: str | None = None) -> str:
    """Measure the CPU time until commands answer on this machine; returns a Markdown table.

    Args:
        rounds: Number of runs of each command, after one to warm up the disk.
        before: Checkout of another version, which is measured too.
    """
    commands = {(name, ""): ["-c", name] for name in YARDSTICKS}
    for root in filter(None, (before, str(ROOT))):
        commands |= {(name, root): ["-m", "matex_pl.cli", *words] for name, words in MATEX.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in commands}
    with tempfile.TemporaryDirectory() as folder:
        cv2.imwrite(f"{folder}/image.png", np.random.default_rng(0).integers(0, 255, (90, 70), np.uint8))
        cpu_seconds(["-c", MAKE_CHECKPOINT.format(path=f"{folder}/tiny.ckpt")], str(ROOT), str(ROOT))
        for _ in progress(range(rounds + 1), "Rounds"):
            for key, words in commands.items():
                seconds[key].append(cpu_seconds(words, key[1], folder))
    medians = {key: median(times[1:]) for key, times in seconds.items()}
    return table(medians, str(ROOT), before)


def cpu_seconds(words: list[str], root: str, folder: str) -> float:
    """User and system seconds of a Python process in a folder, with `root` first on its path."""
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = os.fork()
    if not process:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.execve(sys.executable, [sys.executable, *words], environment)
    _, _, usage = os.wait4(process, 0)
    return usage.ru_utime + usage.ru_stime


def table(medians: dict[tuple[str, str], float], root: str, before: str | None) -> str:
    """Seconds of each command, and as multiples of the yardsticks."""
    heads = ["command", *(["before, s"] if before else []), "CPU, s", *(f"of `{name}`" for name in YARDSTICKS)]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name in (*YARDSTICKS, *MATEX):
        own = medians[name, "" if name in YARDSTICKS else root]
        earlier = [f"{medians[name, before]:.2f}" if name in MATEX else ""] if before else []
        ratios = [f"{own / medians[other, '']:.2f}" for other in YARDSTICKS]
        lines.append([f"`{name}`", *earlier, f"{own:.2f}", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    show_messages()
    print(auto_cli(measure_startup, as_positional=False))
