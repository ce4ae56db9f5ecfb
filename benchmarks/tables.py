"""CPU time and memory of reading a large table: `matex fit` up to its first image, and `matex check-data`.

    python benchmarks/tables.py

Prints a Markdown table. The script writes a table with distinct phrases and patients, and one small image file per row.
`fit` with boxes reads a header per image. `check-data` runs without pixels: its images are blank. Each row of the
result is a process of its own. Seconds are those of all of its threads (`time.process_time`), and memory is the peak
above the process with its imports.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from matex_pl.commands.check_data import check_data
from matex_pl.data import ImageTextPair, ManifestDataModule
from matex_pl.data.images import GrayImage
from matex_pl.data.transforms import ImageTransform

_PHRASES = (
    "Small {} pleural effusion, {} cm, unchanged since the prior study.",
    "There is a {} lower lobe opacity of {} mm, which may be atelectasis or pneumonia.",
    "No focal consolidation in the {} lung, and no pneumothorax on image {}.",
    "{} apical pneumothorax measures {} mm, without mediastinal shift.",
)


class BlankImages(ManifestDataModule):
    """Manifest whose images are blank except for a row of pixels per pair: nothing is decoded."""

    def open_image(self, pair: ImageTextPair, transform: ImageTransform) -> GrayImage:
        """An image in the model's frame."""
        pixels = np.zeros(transform.size, dtype=np.uint8)
        pixels[0, :8] = np.frombuffer(pair.source[1].to_bytes(8, "big"), dtype=np.uint8)
        return GrayImage(pixels, transform.size)


def write_table(folder: Path, number: int, *, boxes: bool) -> Path:
    """Write a table of `number` rows, with names of one image file."""
    image = folder / "image.png"
    if not image.is_file():
        Image.new("L", (500, 600), 90).save(image)
        for row in range(number):
            part = folder / f"p{row % 100:02d}"
            part.mkdir(exist_ok=True)
            # A link to the same content: only the names and headers are read.
            (part / f"{row}.png").symlink_to(image)
    path = folder / f"boxes={boxes}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "phrase", "patient_id", "finding", "boxes"])
        for row in range(number):
            phrase = _PHRASES[row % 4].format(("right", "left")[row % 2], row)
            box = f"[[{row % 300}, 20, {row % 300 + 90}, 400]]" if boxes else ""
            writer.writerow([f"p{row % 100:02d}/{row}.png", phrase, f"patient {row}", "", box])
    return path


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and MiB of additional peak memory of a piece of work, in a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        send.send((time.process_time() - start, (peak - before) / 1024))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return receive.recv()


def main(rows: int = 100_000, model: str | None = "ViT-B-32") -> None:
    """Print the table.

    Args:
        rows: Number of rows.
        model: Model whose tokenizer measures the phrases.
    """
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "matex_pl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| Work | CPU seconds | Peak memory, MiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        plain, boxed = (write_table(Path(name), rows, boxes=boxes) for boxes in (False, True))
        works: dict[str, Callable[[], Any]] = {
            f"`fit` up to its first image, {rows:,} rows": lambda: ManifestDataModule(str(plain)).setup("fit"),
            "the same with boxes": lambda: ManifestDataModule(str(boxed)).setup("fit"),
            "`check-data` without pixels": lambda: check_data(BlankImages(str(plain)), model=model),
            "`check-data` without pixels, with boxes": lambda: check_data(BlankImages(str(boxed)), model=model),
        }
        for title, work in works.items():
            seconds, memory = measured(work)
            print(f"| {title} | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
