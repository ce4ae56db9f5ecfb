"""`matex check-data`: every row and every image read once, and one report of what is there and what is wrong."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matex_pl.anatomy import parse_phrase
from matex_pl.clip.load import cut_text, input_size, load_tokenizer
from matex_pl.clip.towers import height_width
from matex_pl.commands.options import DataConfig, run_on_data
from matex_pl.console import progress
from matex_pl.data import ChestXrayDataModule, ImageTextPair
from matex_pl.data.datamodule import SPLITS, count_cut_boxes
from matex_pl.data.table import TableDataModule, write_bad_rows
from matex_pl.data.transforms import ImageTransform, ResizeMode
from matex_pl.data.validation import BadRow, RuleError, check_inside, drop_leaks, drop_repeats, image_name, place_of

_SIDES = ("right", "left", "both sides", "midline only", "no place")
# Where a model is not there to say: almost all take squares, and a crop cuts the same of any.
_FRAME = (224, 224)


class ModelConfig(DataConfig):
    """A YAML of `matex fit`: its `data` is checked, with the tokenizer of its `model.name`."""

    def settings(self, path: str, training: dict[str, Any]) -> dict[str, Any]:
        """The data module, and name and image size of the model where they are set."""
        model = training.get("model")
        named = model if isinstance(model, dict) and model.get("name") else {}
        taken = {"model": named.get("name"), "image_size": named.get("image_size")}
        return super().settings(path, training) | {key: value for key, value in taken.items() if value}


def main(words: Sequence[str]) -> None:
    """`matex check-data --config FILE`: print what the data hold and every bad row; status 1 if there are any."""
    report = run_on_data("check-data", check_data, words, ModelConfig)
    print(report.text)
    if report.bad:
        raise SystemExit(1)


@dataclass(frozen=True)
class Report:
    """What a check found.

    Args:
        text: To be read.
        bad: The bad rows.
    """

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
    bad = sorted(
        [*bad, *check_content_boxes(data, pairs, workers or os.cpu_count() or 1)], key=lambda row: (row.file, row.line)
    )
    limit = f"the {getattr(tokenizer, 'context_length', 0)} tokens of {model}"
    long = [] if tokenizer is None else _cut_phrases(data, pairs, tokenizer)
    if out is not None:
        rule = f"the phrase is longer than {limit}: this is cut off"
        write_bad_rows(Path(out), [*bad, *(BadRow(*pair.source, cut, rule) for pair, cut in long)])
    frame = data.image_size or (height_width(image_size) if image_size else input_size(model) if model else _FRAME)
    parts = [_counts(pairs), _findings(pairs), _sides(pairs), _cut_boxes(data.resize_mode, frame, pairs)]
    if tokenizer is not None:
        lines = [f"  {place_of(pair.source)}, {pair.id}: cut off: {cut!r}" for pair, cut in long]
        told = "\n".join([f"Phrases longer than {limit}: {len(long)}", *lines])
        parts.append(told if long else f"All phrases fit into {limit}.")
    parts.append("\n".join([f"Bad rows: {len(bad)}", *(f"  {row}" for row in bad)]) if bad else "No bad rows.")
    return Report("\n\n".join(part for part in parts if part), bad)


def check_content_boxes(data: ChestXrayDataModule, pairs: Sequence[ImageTextPair], workers: int) -> list[BadRow]:
    """The rows whose image cannot be read, or has a box outside of it; each image is read once."""
    images: dict[str | int, list[ImageTextPair]] = defaultdict(list)
    for pair in pairs:
        images[pair.image].append(pair)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda group: _check_image(data, group), images.values())
        return [row for rows in progress(found, "images", len(images)) for row in rows]


def _check_image(data: ChestXrayDataModule, pairs: Sequence[ImageTextPair]) -> list[BadRow]:
    try:
        height, width = data.read_image(pairs[0]).shape
    except (OSError, ValueError, ImportError) as error:
        return [BadRow(*pair.source, _image_cell(data, pair), str(error)) for pair in pairs]
    bad = []
    for pair in pairs:
        try:
            check_inside((tuple(map(float, box)) for box in pair.boxes), (height, width))  # type: ignore[misc]
        except RuleError as error:
            bad.append(error.at(pair.source))
    return bad


def _image_cell(data: ChestXrayDataModule, pair: ImageTextPair) -> str:
    """The image as a table names it: its path below the root."""
    root = getattr(data, "root", None)
    return str(pair.image) if root is None else image_name(root, Path(str(pair.image)))


def _listed(data: ChestXrayDataModule) -> tuple[list[ImageTextPair], list[BadRow]]:
    """The pairs that can be used, and bad rows, before any pixel is read."""
    if isinstance(data, TableDataModule):
        return data.checked_rows()
    sourced = (s if s.source[0] else replace(s, source=(str(s.image), 0)) for s in data.list_pairs())
    pairs, repeats = drop_repeats(list(sourced))
    pairs, leaks = drop_leaks(pairs)
    return pairs, repeats + leaks


def _counts(pairs: Sequence[ImageTextPair]) -> str:
    rows = []
    for split in SPLITS:
        found = [pair for pair in pairs if pair.split == split]
        images, patients = {pair.image_id for pair in found}, {pair.patient_id for pair in found}
        boxed = [pair for pair in found if pair.boxes]
        rows.append([split, len(found), len(images), len(patients), len(boxed), sum(len(s.boxes) for s in boxed)])
    return _table(["split", "phrases", "images", "patients", "with boxes", "boxes"], rows)


def _findings(pairs: Sequence[ImageTextPair]) -> str:
    named = [(pair.finding or "no finding", pair.split) for pair in pairs]
    return _cross_table("finding", sorted({finding for finding, _ in named}), Counter(named))


def _sides(pairs: Sequence[ImageTextPair]) -> str:
    sides = {phrase: _side(phrase) for phrase in {pair.phrase for pair in pairs}}
    return _cross_table("side", _SIDES, Counter((sides[pair.phrase], pair.split) for pair in pairs))


def _side(phrase: str) -> str:
    """Where a phrase places its finding, by the patient's sides."""
    sides = {region.side for region in parse_phrase(phrase).regions}
    if {"right", "left"} <= sides:
        return "both sides"
    return next((side for side in ("right", "left") if side in sides), "midline only" if sides else "no place")


def _cut_boxes(resize_mode: ResizeMode, frame: tuple[int, int], pairs: Sequence[ImageTextPair]) -> str:
    if resize_mode != "shortest":
        return ""
    cut, lost = count_cut_boxes(ImageTransform(frame, resize_mode), pairs)
    total = sum(len(pair.boxes) for pair in pairs)
    return f"resize_mode: shortest to {frame[1]} x {frame[0]} cuts {cut} of {total} boxes, {lost} of them wholly."


def _cut_phrases(
    data: ChestXrayDataModule, pairs: Sequence[ImageTextPair], tokenizer: object
) -> list[tuple[ImageTextPair, str]]:
    """The pairs with a phrase that is too long, and what the model does not read of it; their rows are not bad."""
    cut: dict[str, str] = {}
    long = []
    for pair in pairs:
        for phrase in data.phrases_of(pair):
            if phrase not in cut:
                cut[phrase] = cut_text(tokenizer, phrase)
            if cut[phrase]:
                long.append((pair, cut[phrase]))
    return long


def _cross_table(title: str, names: Iterable[str], counts: Counter[tuple[str, str]]) -> str:
    return _table([title, *SPLITS], [[name, *(counts[name, split] for split in SPLITS)] for name in names])


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        columns = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]))
    return "\n".join(lines)
