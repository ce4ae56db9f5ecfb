"""Time of a report of 12 sentences on one image, against a single phrase, for the model and for the whole command.

python benchmarks/report.py --model ViT-B-32 --repeats 5

The model has random weights: the time does not depend on them. Both are measured in turns in one process. The whole
command also starts Python and reads the weights from a file, in processes of their own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image

from matex_pl.anatomy.report import split_report
from matex_pl.attribution import Matex
from matex_pl.attribution.core import target
from matex_pl.clip import load_clip
from matex_pl.explain import explain_batch, pair_batch
from matex_pl.explain.folder import folder_settings, write_folder
from matex_pl.explain.phrases import explain_phrases, frame_image
from matex_pl.visualization.draw import save_png

REPORT = """FINDINGS: There is a small left pleural effusion with adjacent atelectasis. A right apical pneumothorax is
present. The heart is moderately enlarged. Patchy opacity in the right lower lobe is concerning for pneumonia. Linear
atelectasis lies in the left mid lung. A nodule projects over the left upper lobe. There is mild pulmonary edema. Old
fractures of the right ribs are seen. The right hilum is enlarged. The endotracheal tube ends 4 cm above the carina.
IMPRESSION: 1. Right lower lobe pneumonia. 2. Cardiomegaly with a small left pleural effusion."""
PHRASE = "Patchy opacity in the right lower lobe is concerning for pneumonia."


def main(model: str = "ViT-B-32", repeats: int = 5, threads: int = 2, commands: int = 3) -> None:
    """Print a table of times and ratios, medians with minimum and maximum.

    Args:
        model: Name of a model of open_clip, or a JSON config.
        repeats: Number of rounds in one process; 0 leaves them out.
        threads: Number of threads.
        commands: Number of rounds of the whole command; 0 leaves the command out.
    """
    torch.set_num_threads(threads)
    sentences = split_report(REPORT)
    assert len(sentences) == 12
    assert not any(sentence.reason for sentence in sentences)
    with TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image.png"
        # Smooth with fine noise, as radiographs are: files of pure noise take longer to write.
        noise = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
        smooth = cv2.GaussianBlur(noise, (0, 0), 40)
        pixels = np.clip(128 + 60 * smooth / smooth.std() + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(image)
        clip, method = load_clip(model).eval(), Matex.recommended()
        settings = folder_settings(
            clip,
            image=image,
            report=REPORT,
            method={"class_path": "Matex"},
            model={"source": model, "weights": ""},
            threshold={"value": 0.5, "source": "the default"},
            resize_mode=None,
            all_sentences=False,
        )
        framed, texts = frame_image(clip, image), [sentence.text for sentence in sentences]

        def single() -> None:
            save_png(folder / "panel.png", explain_batch(clip, method, pair_batch(clip, image, PHRASE), "Matex")[0])

        def report() -> None:
            write_folder(folder / "out", clip, method, frame_image(clip, image), sentences, settings)

        def first(phrases: list[str]) -> None:
            # As in a process of its own, which encodes the reference phrases of the margin.
            target._ENCODED.clear()
            explain_phrases(clip, method, framed, phrases)

        print("| 12 sentences / one phrase | ratio | seconds of one phrase |\n|---|---|---|")
        if repeats:
            print(_row("first maps of a model", *_times(lambda: first(texts[:1]), lambda: first(texts), repeats)))
            later = [partial(explain_phrases, clip, method, framed, some) for some in (texts[:1], texts)]
            print(_row("later maps", *_times(*later, repeats)))
            print(_row("later maps, pictures and page", *_times(single, report, repeats)))
        if commands:
            torch.save(clip.model.state_dict(), folder / "weights.pt")
            (folder / "report.txt").write_text(REPORT, encoding="utf-8")
            start = [sys.executable, "-m", "matex_pl.cli", "explain", str(image)]
            end = ["--model", model, "--pretrained", str(folder / "weights.pt")]
            one = [*start, PHRASE, *end, "--out", str(folder / "one.png")]
            many = [*start, "--report", str(folder / "report.txt"), *end, "--out", str(folder / "many")]
            print(_row("whole command", *_times(lambda: _run(one), lambda: _run(many), commands)))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _times(single: Callable[[], object], many: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns, after one run of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, times in zip((single, many), seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


def _row(name: str, single: list[float], many: list[float]) -> str:
    ratios = [b / a for a, b in zip(single, many, strict=True)]
    return f"| {name} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {median(single):.2f} |"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
