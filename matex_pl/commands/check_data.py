"""`matex check-data`: a report on every row and every image of a data module."""

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
from matex_pl.files import check_output

_SIDES = ("right", "left", "both sides", "midline only", "no place")
# Used without a model. Almost all models take squares, and crops to squares of any size cut the same parts.
_FRAME = (224, 224)


class ModelConfig(DataConfig):
    """Config of `matex fit` (YAML). Its `data` is checked with the tokenizer of its `model.name`."""

    def model_settings(self, model: Any) -> dict[str, Any]:
        """Name and image size of the model, if they are set."""
        if not isinstance(model, dict) or not model.get("name"):
            return {}
        return {"model": model["name"]} | ({"image_size": model["image_size"]} if model.get("image_size") else {})


def main(words: Sequence[str]) -> None:
    """`matex check-data --config FILE`: print a report with all bad rows; exit with status 1 if there are bad rows."""
    report = run_on_data("check-data", check_data, words, ModelConfig)
    print(report.text)
    if report.bad:
        raise SystemExit(1)


class Report(NamedTuple):
    """Text and bad rows of a check."""

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

    The report has

    - the counts per split, finding and side;
    - every bad row, with file, line, value and rule;
    - the phrases that are longer than the model's context, with the text that is cut off;
    - the number of boxes that `resize_mode: shortest` cuts.

    Args:
        data: Data module. Its `on_bad_row` is ignored.
        model: Name of the model whose tokenizer measures the phrases, as in `model.name` of a training config; by
            default they are not measured.
        image_size: Side, or height and width, of the frame that images are cropped to, as in `model.image_size` of a
            training config; the model's own by default. `image_size` of the data module overrides it.
        workers: Number of threads that read images; one per core by default.
        out: CSV file for the bad rows, followed by the phrases that are too long; none by default.

    Raises:
        FileNotFoundError: A table is missing.
        OSError: `out` cannot be written.
        ValueError: A table cannot be read at all, `workers` is not positive, the model is unknown, or `out` would
            replace something else than an earlier list.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if out is not None:
        check_output(Path(out), "file,line,value,rule")
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
    """Bad rows of one image: all rows if the image cannot be read, else the rows with a box outside the image."""
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
    """Usable pairs and bad rows, without reading pixels."""
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
    """Table of counts per value and split. The rows are `names`, by default all values in sorted order."""
    counts = Counter(values)
    names = names or sorted({name for name, _ in values})
    rows = [[name, *(counts[name, split] for split in SPLITS)] for name in names]
    return "\n".join(text_table([[title, *SPLITS], *rows], ">"))


def _side(phrase: str) -> str:
    """Side of the patient where a phrase places its finding, as a row of the table."""
    sides = {region.side for region in parse_phrase(phrase).regions}
    if {"right", "left"} <= sides:
        return "both sides"
    return next((side for side in ("right", "left") if side in sides), "midline only" if sides else "no place")
