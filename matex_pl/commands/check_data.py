"""`matex check-data`: a report on every row and every image of a data module."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip

from matex_pl import attribution
from matex_pl.anatomy import parse_phrase
from matex_pl.arguments import import_all
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.shipped import load_method, method_path
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.load import config_of, cut_text, input_size, load_tokenizer
from matex_pl.clip.record import unpacked
from matex_pl.clip.towers import height_width
from matex_pl.commands.options import DataConfig, run_on_data
from matex_pl.console import progress, text_table
from matex_pl.data import ChestXrayDataModule, ImageTextPair
from matex_pl.data.datamodule import SPLITS, ImageFilesDataModule, by_split, count_cut_boxes
from matex_pl.data.dicom import read_view
from matex_pl.data.table import BAD_ROWS_HEADER, TableDataModule, write_bad_rows
from matex_pl.data.transforms import ImageTransform
from matex_pl.data.validation import (
    WARNINGS,
    BadRow,
    RowWarning,
    RuleError,
    by_kind,
    check_overlap,
    drop_leaks,
    drop_repeats,
    image_name,
    odd_view,
    place_of,
    shape_warnings,
)
from matex_pl.evaluation.compared import compared_rows
from matex_pl.files import check_output, read_yaml

_NAMES = frozenset(open_clip.list_models())
_SIDES = ("right", "left", "both sides", "midline only", "no place")
# Used without a model. Almost all models take squares, and crops to squares of any size cut the same parts.
_FRAME = (224, 224)
# Callbacks that explain, and their options for methods.
_METHOD_OPTIONS = {"AttributionMaps": "method", "AttributionMetrics": "methods"}
# Stages whose splits each command reads. The benchmark scores test pairs and chooses thresholds on validation pairs.
_STAGES = {"fit": ("fit",), "test": ("test",), "benchmark": ("test", "validate")}


class ModelConfig(DataConfig):
    """Config of `matex fit` (YAML). Its `data` is checked with its `model`, and with the methods of its callbacks."""

    def more_settings(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Name, weights and image size of the model, if they are set, and the methods of its callbacks."""
        model, trainer = training.get("model"), training.get("trainer")
        if not isinstance(model, dict) or not model.get("name"):
            return {}
        settings = {"model": model["name"]} | {
            key: model[key] for key in ("pretrained", "image_size") if model.get(key)
        }
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
        methods = []
        for callback in callbacks if isinstance(callbacks, list) else ():
            described: dict[str, Any] = callback if isinstance(callback, dict) else {"class_path": str(callback)}
            option = _METHOD_OPTIONS.get(str(described.get("class_path")).rpartition(".")[2])
            if option:
                methods += _described((described.get("init_args") or {}).get(option))
        return settings | {"methods": methods}


def _described(choice: Any) -> list[Any]:
    """Methods of a callback from a config: one method, or methods and changed settings of the first by name."""
    if not isinstance(choice, dict) or "class_path" in choice:
        return [choice]
    found: list[Any] = []
    for value in choice.values():
        if found and isinstance(value, dict) and "class_path" not in value:
            first = found[0]
            if not isinstance(first, dict):
                try:
                    first = read_yaml(method_path(first))
                except ValueError:
                    # The path of a class.
                    first = {"class_path": first}
            value = first | {"init_args": (first.get("init_args") or {}) | value}
        found.append(value)
    return found


def main(words: Sequence[str]) -> None:
    """`matex check-data --config FILE`: print a report with all bad rows; exit with status 1 if there are bad rows."""
    import_all(attribution)
    report = run_on_data("check-data", check_data, words, ModelConfig)
    print(report.text)
    if report.bad:
        raise SystemExit(1)


class Report(NamedTuple):
    """Text, bad rows, which are refused, and warnings about rows that are used."""

    text: str
    bad: list[BadRow]
    warnings: list[RowWarning]


def check_data(
    data: ChestXrayDataModule,
    model: str | None = None,
    pretrained: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    methods: list[AttributionMethod | str | None] | None = None,
    workers: int | None = None,
    out: str | None = None,
) -> Report:
    """Read every row and every image of a data module once, and report.

    Images are read as in training: at the same size, and through the cache of the data module. The report has

    - the counts per split, finding and side, and the images that have masks, per structure;
    - the number of boxes that `resize_mode: shortest` cuts;
    - the phrases that are longer than the model's context, with the text that is cut off;
    - the warnings about rows that are used, with file, line, value and consequence;
    - every bad row, with file, line, value and rule;
    - whether `fit`, `test` and `benchmark` could start with these data and this model.

    Args:
        data: Data module. Bad rows are reported with any `on_bad_row`.
        model: Name of the model, as in `model.name` of a training config. Its tokenizer measures the phrases, and its
            towers are built and checked. By default neither is done.
        pretrained: Weights of the model, as in `model.pretrained` of a training config. Only a file is loaded: a tag
            is looked up, and its weights are not downloaded.
        image_size: Side, or height and width, of the frame that images are fitted into, as in `model.image_size` of a
            training config; the model's own by default. `image_size` of the data module overrides it.
        methods: Attribution methods that explain during training and test: by default those of the callbacks of
            `--config`. `null` stands for `Matex.recommended()`.
        workers: Number of threads that read images; one per core by default.
        out: CSV file for the bad rows, followed by the warnings and the phrases that are too long; none by default.

    Raises:
        FileNotFoundError: A table is missing.
        OSError: `out` cannot be written.
        ValueError: A table cannot be read at all, `workers` is not positive, the model is unknown, or `out` would
            replace something else than an earlier list.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if out is not None:
        check_output(Path(out), BAD_ROWS_HEADER)
    tokenizer = load_tokenizer(model) if model else None
    own = height_width(image_size) if image_size else input_size(model) if model else None
    transform = ImageTransform(data.image_size or own or _FRAME, data.resize_mode)
    if isinstance(data, ImageFilesDataModule) and data.cache is not None:
        data.cache.prepare()
    data.prepare_data()
    pairs, bad = _listed(data)
    warnings = data.list_warnings(pairs)
    by_image: dict[str | int, list[ImageTextPair]] = defaultdict(list)
    for pair in pairs:
        by_image[pair.image].append(pair)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        read = pool.map(lambda group: _check_image(data, transform, group), by_image.values())
        checked = list(progress(read, "images", len(by_image)))
    bad = sorted([*bad, *(row for image in checked for row in image.bad)], key=lambda row: (row.file, row.line))
    warnings += [row for image in checked for row in image.warnings]
    warnings += _repeated_pixels(list(by_image.values()), [image.digest for image in checked])
    refused = {(row.file, row.line) for row in bad}
    kinds = by_kind(row for row in warnings if (row.file, row.line) not in refused)
    limit = f"the {getattr(tokenizer, 'context_length', 0)} tokens of {model}"
    cut = cache(lambda phrase: cut_text(tokenizer, phrase) if tokenizer else "")
    long = [(pair, cut(phrase)) for pair in pairs for phrase in data.phrases_of(pair) if cut(phrase)]
    if out is not None:
        rule = f"the phrase is longer than {limit}: this is cut off"
        cut_off = [BadRow(*pair.source, text, rule) for pair, text in long]
        write_bad_rows(Path(out), bad, [*(row for rows in kinds.values() for row in rows), *cut_off])
    side = cache(_side)
    parts = [
        _counts(pairs),
        _by_split("finding", [(pair.finding or "no finding", pair.split) for pair in pairs]),
        _by_split("side", [(side(pair.phrase), pair.split) for pair in pairs], _SIDES),
        *_masks([(group[0].split, image.structures) for group, image in zip(by_image.values(), checked, strict=True)]),
    ]
    if data.resize_mode == "shortest":
        lost, outside = count_cut_boxes(transform, pairs)
        boxes = f"{lost} of {sum(len(pair.boxes) for pair in pairs)} boxes, {outside} of them wholly"
        parts.append(f"resize_mode: shortest to {transform.size[1]} x {transform.size[0]} cuts {boxes}.")
    if long:
        lines = [f"  {place_of(pair.source)}, {pair.id}: cut off: {text!r}" for pair, text in long]
        parts.append("\n".join([f"Phrases longer than {limit}: {len(long)}", *lines]))
    elif tokenizer:
        parts.append(f"All phrases fit into {limit}.")
    parts.append(_warnings(kinds))
    parts.append("\n".join([f"Bad rows: {len(bad)}", *(f"  {row}" for row in bad)]) if bad else "No bad rows.")
    found = _check_model(model, pretrained, image_size, methods or []) if model else _ModelCheck()
    parts.append(_verdict(data, pairs, bad, model, own, found))
    return Report("\n\n".join(parts), bad, [row for rows in kinds.values() for row in rows])


class _Checked(NamedTuple):
    """Bad rows and warnings of the pairs of an image.

    Attributes:
        bad: Bad rows.
        warnings: Warnings.
        digest: Digest of the pixels; empty for one gray level.
        structures: Structures with a mask.
    """

    bad: list[BadRow]
    warnings: list[RowWarning]
    digest: bytes
    structures: tuple[str, ...] = ()


def _check_image(data: ChestXrayDataModule, transform: ImageTransform, pairs: Sequence[ImageTextPair]) -> _Checked:
    """Check of an image: all rows are bad if the image cannot be read, else the rows with a box outside the image."""
    try:
        image = data.open_image(pairs[0], transform)
        path = Path(str(pairs[0].image))
        view = odd_view(*read_view(path)) if isinstance(pairs[0].image, str) else ""
    except (OSError, ValueError, ImportError) as error:
        cell = _cell(data, pairs[0])
        return _Checked([BadRow(*pair.source, cell, str(error)) for pair in pairs], [], b"")
    bad, warnings, structures = _check_masks(data, transform, pairs)
    for pair in pairs:
        try:
            for box in pair.boxes:
                check_overlap(box, image.size)
        except RuleError as error:
            bad.append(error.at(pair.source))
            continue
        if pair.size is None:
            warnings += shape_warnings(pair, image.size)
        warnings += [RowWarning(*pair.source, view, "view")] if view else []
    if image.pixels.min() == image.pixels.max():
        cell = _cell(data, pairs[0])
        warnings += [RowWarning(*pair.source, cell, "constant") for pair in pairs]
        return _Checked(bad, warnings, b"", structures)
    return _Checked(bad, warnings, blake2b(image.pixels.tobytes(), digest_size=16).digest(), structures)


def _check_masks(
    data: ChestXrayDataModule, transform: ImageTransform, pairs: Sequence[ImageTextPair]
) -> tuple[list[BadRow], list[RowWarning], tuple[str, ...]]:
    """Bad rows and warnings about the masks of an image, and its structures with a mask that is not empty."""
    try:
        masks = data.open_masks(pairs[0], transform)
    except (OSError, ValueError, ImportError) as error:
        cell = _cell(data, pairs[0])
        return [BadRow(*pair.source, cell, str(error)) for pair in pairs], [], ()
    source = pairs[0].source
    warnings = [RowWarning(*source, name, "mask empty") for name, mask in masks.items() if not mask.any()]
    structures = tuple(name for name, mask in masks.items() if mask.any())
    if {"left_lung", "right_lung"} <= set(structures):
        # The patient's left is on the right of a frontal image.
        left, right = (np.argwhere(masks[name].any(0)).mean() for name in ("left_lung", "right_lung"))
        warnings += [RowWarning(*source, _cell(data, pairs[0]), "mask sides")] if left < right else []
    return [], warnings, structures


def _repeated_pixels(images: Sequence[list[ImageTextPair]], digests: Sequence[bytes]) -> list[RowWarning]:
    """Warnings about pairs whose pixels are also in another split, or belong to another patient."""
    first: dict[bytes, ImageTextPair] = {}
    found = []
    for pairs, digest in zip(images, digests, strict=True):
        known = first.setdefault(digest, pairs[0])
        for pair in pairs if digest and known is not pairs[0] else ():
            value = f"as in {place_of(known.source)}"
            if pair.split != known.split:
                found.append(RowWarning(*pair.source, value, "splits"))
            # Without ids of patients, each image counts as a patient.
            if pair.patient_id != known.patient_id and pair.patient_id != pair.image_id:
                found.append(RowWarning(*pair.source, value, "patients"))
    return found


def _cell(data: ChestXrayDataModule, pair: ImageTextPair) -> str:
    """Image of a pair as tables write it."""
    root, image = getattr(data, "root", None), str(pair.image)
    return image if root is None else image_name(root, Path(image))


def _warnings(kinds: Mapping[str, Sequence[RowWarning]]) -> str:
    lines = []
    for kind, rows in kinds.items():
        lines += [f"  {WARNINGS[kind]}: {len(rows)}", *(f"    {row}" for row in rows)]
    number = sum(map(len, kinds.values()))
    return "\n".join([f"Warnings, about rows that are used: {number}", *lines]) if lines else "No warnings."


class _ModelCheck(NamedTuple):
    """Reasons why a model cannot be used.

    Attributes:
        fault: Reason why the model cannot be built, or empty.
        unexplained: Reasons why the methods of the callbacks do not support the model.
        refused: The same of the methods of a benchmark, by their names.
    """

    fault: str = ""
    unexplained: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}


def _check_model(
    model: str,
    pretrained: str | None,
    image_size: int | tuple[int, int] | None,
    methods: Sequence[AttributionMethod | str | None],
) -> _ModelCheck:
    """Build a model as a training does, without downloading weights, and check the methods on its towers."""
    is_file = pretrained is not None and Path(pretrained).is_file()
    if pretrained is not None and not is_file and pretrained not in open_clip.list_pretrained_tags_by_model(model):
        return _ModelCheck(f"the weights {pretrained!r} are neither a file nor a tag of {model}")
    try:
        if is_file or not (model.startswith("hf-hub:") or model in _NAMES):
            clip = load_clip(model, pretrained if is_file else None, image_size)
        else:
            # The config alone: a name of open_clip or of the hub would bring weights.
            config, files = config_of(model)
            with unpacked(config, files) as local:
                clip = load_clip(json.dumps(local), image_size=image_size)
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        return _ModelCheck(str(error))
    unexplained = [_refusal(load_method(method or Matex.recommended()), clip) for method in methods]
    entries = {entry.name: _refusal(entry.method, clip) for entry in compared_rows(None, "quick") if not entry.control}
    return _ModelCheck(
        unexplained=tuple(dict.fromkeys(filter(None, unexplained))),
        refused={name: reason for name, reason in entries.items() if reason},
    )


def _refusal(method: AttributionMethod, clip: Clip) -> str:
    """Reason why a method does not support a model; empty if it does."""
    try:
        method.check_model(clip)
    except (NotImplementedError, ValueError) as error:
        return f"{type(method).__name__}: {error}"
    return ""


def _verdict(
    data: ChestXrayDataModule,
    pairs: Sequence[ImageTextPair],
    bad: Sequence[BadRow],
    model: str | None,
    size: tuple[int, int] | None,
    found: _ModelCheck,
) -> str:
    """Whether each command could start with these data and this model, and the reason if not."""
    refused = {(row.file, row.line) for row in bad}
    usable = by_split([pair for pair in pairs if pair.source not in refused])
    shared = [found.fault.rstrip(".")] if found.fault else []
    if bad and getattr(data, "on_bad_row", "error") == "error":
        shared.append(f"{len(bad)} bad row{'s' * (len(bad) > 1)}")
    if size is not None and data.image_size not in (None, size):
        shared.append(f"the data module's image_size is {data.image_size}, and the model takes {size}")
    lines = []
    for command, stages in _STAGES.items():
        reasons = list(shared)
        for stage in stages:
            try:
                data.check_splits(stage, usable, training=True)
            except ValueError as error:
                reasons.append(str(error))
                break
        # A benchmark leaves out methods that do not support the model.
        reasons += found.unexplained if command != "benchmark" else ()
        left_out = f", without {', '.join(found.refused)}" if command == "benchmark" and found.refused else ""
        lines.append((f"  {command}", f"no: {'; '.join(reasons)}" if reasons else f"yes{left_out}"))
    text = "\n".join([f"Could start with these data and {model or 'any model'}:", *text_table(lines)])
    by_reason: dict[str, None] = dict.fromkeys(reason.partition(": ")[2] for reason in found.refused.values())
    return "\n".join([text, *(f"  {reason}" for reason in by_reason)])


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


def _masks(images: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Table of the images that have masks, per structure; none without any mask.

    Args:
        images: Split and structures of each image.
    """
    names = dict.fromkeys(name for _, structures in images for name in structures)
    values = [(name, split) for split, structures in images for name in structures or ("no mask",)]
    return [_by_split("images with a mask of", values, (*names, "no mask"))] if names else []


def _side(phrase: str) -> str:
    """Side of the patient where a phrase places its finding, as a row of the table."""
    sides = {region.side for region in parse_phrase(phrase).regions}
    if {"right", "left"} <= sides:
        return "both sides"
    return next((side for side in ("right", "left") if side in sides), "midline only" if sides else "no place")
