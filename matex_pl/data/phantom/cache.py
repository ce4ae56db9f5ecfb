"""Cache of phantoms: drawn once, by several processes, and stored on disk as one memory map with the pairs."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from matex_pl.console import progress
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.phantom.framing import Framing
from matex_pl.data.phantom.image import Phantom, draw_phantom, phantom_rng
from matex_pl.data.phantom.phrases import TEMPLATES, write_phrase

log = logging.getLogger(__name__)

# Raise it whenever the same settings give other pixels, boxes, phrases or files than before.
GENERATOR_VERSION = 8

_CHUNK = 64
_IMAGES, _PAIRS = "images.npy", "pairs.json"


def phantom_cache(
    root: Path,
    *,
    splits: dict[str, int],
    seed: int = 0,
    size: int = 192,
    shortcut: float = 0.0,
    shortcut_finding: str = "pneumothorax",
    framing: Framing = "tight",
    num_workers: int | None = None,
) -> tuple[NDArray[np.uint8], list[ImageTextPair]]:
    """Images `(N, size, size)` uint8, opened read-only from disk, and their pairs; drawn at the first call.

    The folder `root/<key>` appears in one step when all images are drawn, so an interrupted run leaves no incomplete
    cache. A second run waits for the images of the first. The worker processes remove the unfinished images of a killed
    run; otherwise the next call removes them.

    Args:
        root: Folder of all caches.
        splits: Number of images per split, in the order of their indices.
        seed: Random seed of the series; see `draw_phantom`.
        size: Side of the images in pixels; see `draw_phantom`.
        shortcut: Probability of the tag; see `draw_phantom`.
        shortcut_finding: Finding with the tag; see `draw_phantom`.
        framing: Framing of the patients; see `draw_phantom`.
        num_workers: Number of processes; up to one per core by default. With 1, this process draws.
    """
    settings = {"seed": seed, "size": size, "shortcut": shortcut, "shortcut_finding": shortcut_finding}
    if framing != "tight":
        # Caches of tight images keep their names.
        settings["framing"] = framing
    # Wrong settings fail here, with a plain traceback, and not in a worker.
    draw_phantom(0, **settings)  # type: ignore[arg-type]
    folder = Path(root) / _cache_key({**settings, "splits": splits})
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                _draw_into(folder, splits, settings, _worker_count(num_workers, sum(splits.values())))
    records = json.loads((folder / _PAIRS).read_text(encoding="utf-8"))
    return np.load(folder / _IMAGES, mmap_mode="r"), [ImageTextPair.from_record(record) for record in records]


def image_pairs(index: int, image: Phantom, *, seed: int, split: str) -> list[ImageTextPair]:
    """One pair per finding of an image, each with its own phrase."""
    rng = phantom_rng(index, seed, "phrase")
    names = tuple(finding.name for finding in image.findings)
    return [
        ImageTextPair(
            id=f"phantom-{index:05d}-{number}",
            patient_id=f"phantom-{index:05d}",
            image_id=f"phantom-{index:05d}",
            image=index,
            phrase=write_phrase(finding, rng, image_findings=names, device=image.device),
            boxes=finding.boxes,
            finding=finding.name,
            image_findings=names,
            split=split,
        )
        for number, finding in enumerate(image.findings, start=1)
    ]


def _cache_key(settings: Mapping[str, Any]) -> str:
    """Hash of everything on which the cache's content depends, including the wording of phrases."""
    content = {**settings, "version": GENERATOR_VERSION, "templates": TEMPLATES.read_text(encoding="utf-8")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _worker_count(wanted: int | None, num_images: int) -> int:
    # Starting a process takes as long as drawing a few hundred images.
    useful = max(1, num_images // 256)
    return min(useful, wanted if wanted is not None else len(os.sched_getaffinity(0)))


def _draw_into(folder: Path, splits: Mapping[str, int], settings: Mapping[str, Any], num_workers: int) -> None:
    """Draw into a temporary folder and rename it to `folder` at the end. The caller holds the lock."""
    prefix = f".{folder.name}-"
    for abandoned in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write_images(unfinished, splits, settings, num_workers)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_images(folder: Path, splits: Mapping[str, int], settings: Mapping[str, Any], num_workers: int) -> None:
    names = [name for name, count in splits.items() for _ in range(count)]
    path, size = folder / _IMAGES, settings["size"]
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(names), size, size)).flush()
    log.info("Drawing %d phantoms of %d x %d pixels in %s, once.", len(names), size, size, folder.parent)
    chunks = [(path, start, names[start : start + _CHUNK], dict(settings)) for start in range(0, len(names), _CHUNK)]
    drawn = progress(_draw_chunks(chunks, num_workers), "drawing images", len(chunks))
    pairs = sorted((pair for part in drawn for pair in part), key=lambda pair: (pair["image"], pair["id"]))
    (folder / _PAIRS).write_text(json.dumps(pairs), encoding="utf-8")


def _draw_chunks(chunks: list[tuple[Path, int, list[str], dict[str, Any]]], num_workers: int) -> Iterator[list[Any]]:
    """Records of the pairs of each chunk, in the order of completion."""
    if num_workers <= 1:
        yield from (_draw_chunk(*chunk) for chunk in chunks)
        return
    # The platform's default start method, as in a DataLoader: fork needs no `__main__` guard in a user's script, and
    # the workers never call torch, whose threads do not survive a fork.
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(chunks[0][0].parent,)) as pool:
        jobs = [pool.submit(_draw_chunk, *chunk) for chunk in chunks]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(unfinished: Path) -> None:
    """Draw on one core, and end when the parent process ends, even if it was killed."""
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, args=(unfinished,), daemon=True).start()


def _end_with_parent(unfinished: Path) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(unfinished, ignore_errors=True)
        os._exit(1)


def _draw_chunk(path: Path, start: int, splits: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw one image per split name, from the index `start` on; return the records of their pairs."""
    images = np.lib.format.open_memmap(path, mode="r+")
    pairs: list[dict[str, Any]] = []
    for index, split in enumerate(splits, start):
        image = draw_phantom(index, **settings)
        images[index] = image.image
        pairs.extend(asdict(pair) for pair in image_pairs(index, image, seed=settings["seed"], split=split))
    images.flush()
    return pairs
