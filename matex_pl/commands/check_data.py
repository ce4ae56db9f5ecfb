"""`matex check-data`: every row and every image read once, and one report of what is there and what is wrong."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from matex_pl.anatomy import parse_phrase
from matex_pl.clip.load import cut_text, input_size, load_tokenizer
from matex_pl.clip.towers import height_width
from matex_pl.commands.options import DataConfig, run_on_data
from matex_pl.console import progress, text_table
from matex_pl.data import ChestXrayDataModule, ImageTextPair
from matex_pl.data.datamodule import SPLITS, count_cut_boxes
from matex_pl.data.table import TableDataModule, write_bad_rows
from matex_pl.data.transforms import ImageTransform
from matex_pl.data.validation import BadRow, RuleError, check_inside, drop_leaks, drop_repeats, image_name, place_of

_SIDES = ("right", "left", "both sides", "midline only", "no place")
# Where a model is not there to say: almost all take squares, and a crop cuts the same of any.
_FRAME = (224, 224)


class ModelConfig(DataConfig):
    """A YAML of `matex fit`: its `data` is checked, with the tokenizer of its `model.name`."""

    def model_settings(self, model: Any) -> dict[str, Any]:
        """Name and image size of the model where they are set."""
        if not isinstance(model, dict) or not model.get("name"):
            return {}
        return {"model": model["name"]} | ({"image_size": model["image_size"]} if model.get("image_size") else {})


def main(words: Sequence[str]) -> None:
    """`matex check-data --config FILE`: print what the data hold and every bad row; status 1 if there are any."""
    report = run_on_data("check-data", check_data, words, ModelConfig)
    print(report.text)
    if report.bad:
        raise SystemExit(1)


class Report(NamedTuple):
    """Result of a check: a text, and the bad rows."""

    text: str
    bad: list[BadRow]


def check_data(
    data: ChestXrayDataModule,
    model: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    workers: int | None = None,
    out: str | None = None,
) -> Report:
    """Read every row and every image of a data module once, and report.

    Counts per split, finding and side; every bad row with file, line, value and rule; phrases that are longer than the
    model reads, with what is cut off; and boxes that `resize_mode: shortest` cuts.

    Args:
        data: The data module; its `on_bad_row` does not matter here.
        model: Whose tokenizer measures the phrases: a name as `model.name` of a training; they are not measured
            without.
        image_size: Side, or height and width, of the frame that a crop cuts images to, as `model.image_size` of a
            training; that of the data module comes before it, and the model's own after it.
        workers: Threads that read images; one per core by default.
        out: A CSV file to write the bad rows to as well, and after them the phrases that are too long.

    Raises:
        FileNotFoundError: A table is missing.
        ValueError: A table cannot be read at all, `workers` is not positive, or the model is unknown.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    tokenizer = load_tokenizer(model) if model else None
    data.prepare_data()
    pairs, bad = _listed(data)
    by_image: dict[str | int, list[ImageTextPair]] = defaultdict(list)
    for pair in pairs:
        by_image[pair.image].append(pair)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        checked = pool.map(lambda group: _check_image(data, group), by_image.values())
        bad = [*bad, *(row for rows in progress(checked, "images", len(by_image)) for row in rows)]
    bad.sort(key=lambda row: (row.file, row.line))
    limit = f"the {getattr(tokenizer, 'context_length', 0)} tokens of {model}"
    cut = cache(lambda phrase: cut_text(tokenizer, phrase) if tokenizer else "")
    long = [(pair, cut(phrase)) for pair in pairs for phrase in data.phrases_of(pair) if cut(phrase)]
    if out is not None:
        rule = f"the phrase is longer than {limit}: this is cut off"
        write_bad_rows(Path(out), [*bad, *(BadRow(*pair.source, text, rule) for pair, text in long)])
    side = cache(_side)
    parts = [
        _counts(pairs),
        _by_split("finding", [(pair.finding or "no finding", pair.split) for pair in pairs]),
        _by_split("side", [(side(pair.phrase), pair.split) for pair in pairs], _SIDES),
    ]
    if data.resize_mode == "shortest":
        frame = data.image_size or (height_width(image_size) if image_size else input_size(model) if model else _FRAME)
        lost, outside = count_cut_boxes(ImageTransform(frame, data.resize_mode), pairs)
        boxes = f"{lost} of {sum(len(pair.boxes) for pair in pairs)} boxes, {outside} of them wholly"
        parts.append(f"resize_mode: shortest to {frame[1]} x {frame[0]} cuts {boxes}.")
    if long:
        lines = [f"  {place_of(pair.source)}, {pair.id}: cut off: {text!r}" for pair, text in long]
        parts.append("\n".join([f"Phrases longer than {limit}: {len(long)}", *lines]))
    elif tokenizer:
        parts.append(f"All phrases fit into {limit}.")
    parts.append("\n".join([f"Bad rows: {len(bad)}", *(f"  {row}" for row in bad)]) if bad else "No bad rows.")
    return Report("\n\n".join(parts), bad)


def _check_image(data: ChestXrayDataModule, pairs: Sequence[ImageTextPair]) -> list[BadRow]:
    """The rows of one image, where it cannot be read; else those with a box outside of it."""
    try:
        height, width = data.read_image(pairs[0]).shape
    except (OSError, ValueError, ImportError) as error:
        root, image = getattr(data, "root", None), str(pairs[0].image)
        cell = image if root is None else image_name(root, Path(image))
        return [BadRow(*pair.source, cell, str(error)) for pair in pairs]
    bad = []
    for pair in pairs:
        try:
            check_inside((tuple(map(float, box)) for box in pair.boxes), (height, width))  # type: ignore[misc]
        except RuleError as error:
            bad.append(error.at(pair.source))
    return bad


def _listed(data: ChestXrayDataModule) -> tuple[list[ImageTextPair], list[BadRow]]:
    """The pairs that can be used, and bad rows, before any pixel is read."""
    if isinstance(data, TableDataModule):
        return data.checked_rows()
    sourced = (s if s.source[0] else replace(s, source=(str(s.image), 0)) for s in data.list_pairs())
    pairs, repeats = drop_repeats(list(sourced))
    pairs, leaks = drop_leaks(pairs)
    return pairs, repeats + leaks


def _counts(pairs: Sequence[ImageTextPair]) -> str:
    rows: list[tuple[object, ...]] = [("split", "phrases", "images", "patients", "with boxes", "boxes")]
    for split in SPLITS:
        here = [pair for pair in pairs if pair.split == split]
        images, patients = {pair.image_id for pair in here}, {pair.patient_id for pair in here}
        boxes = [len(pair.boxes) for pair in here if pair.boxes]
        rows.append((split, len(here), len(images), len(patients), len(boxes), sum(boxes)))
    return "\n".join(text_table(rows, ">"))


def _by_split(title: str, values: Sequence[tuple[str, str]], names: Sequence[str] = ()) -> str:
    """A table that counts pairs of a value and a split; a row per name, all values sorted by default."""
    counts = Counter(values)
    names = names or sorted({name for name, _ in values})
    rows = [[name, *(counts[name, split] for split in SPLITS)] for name in names]
    return "\n".join(text_table([[title, *SPLITS], *rows], ">"))


def _side(phrase: str) -> str:
    """Where a phrase places its finding, by the patient's sides."""
    sides = {region.side for region in parse_phrase(phrase).regions}
    if {"right", "left"} <= sides:
        return "both sides"
    return next((side for side in ("right", "left") if side in sides), "midline only" if sides else "no place")
