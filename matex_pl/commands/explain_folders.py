"""`matex explain` on whole reports: a folder for one image, or for each image of a table."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from matex_pl.anatomy.report import ReportSentence, split_report
from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.shipped import load_method
from matex_pl.commands.explain_anatomy import ImageMasks
from matex_pl.commands.options import check_one_model
from matex_pl.console import progress
from matex_pl.data.images import ResizeMode, read_size
from matex_pl.data.masks import ListedMasks, add_masks
from matex_pl.files import check_output, write_text
from matex_pl.report.explained import check_explained, read_record
from matex_pl.viewer.source import DicomKind, read_source

log = logging.getLogger(__name__)

_TABLE, _TABLE_HEADER = "reports.csv", "folder,image,sentences,mapped,note"
_SHOWN = 3


def explain_report(
    image: str,
    report: str,
    sentences: Sequence[ReportSentence],
    out: Path,
    *,
    all_sentences: bool = False,
    anatomy: str | None = None,
    kinds: Sequence[DicomKind] = (),
    **settings: Any,
) -> Path:
    """Explain one image and the sentences of its report: a folder, or a contact sheet if `out` ends in .png.

    Args:
        image: Image file.
        report: Text of the report.
        sentences: Sentences of the report; at least one gets a map.
        out: Folder or picture.
        all_sentences: Whether all sentences get a map.
        anatomy: Masks of the image, see `ImageMasks`.
        kinds: Kinds of DICOM objects that each sentence gets in the folder.
        settings: Method, threshold and model; see `matex_pl.commands.explain.explain`.

    Returns:
        `out`.
    """
    is_picture = out.suffix.lower() == ".png"
    if is_picture:
        check_output(out, inputs=(image,))
    else:
        check_explained(out)
    # Report a wrong path before loading the model.
    read_size(image)
    source = read_source(image, kinds) if kinds else None
    masks = ImageMasks(anatomy, [Path(image)], device=settings.get("device", "auto"))
    run = Run.load(**settings)

    from matex_pl.explain.folder import phrase_sheet, write_folder
    from matex_pl.explain.phrases import frame_image
    from matex_pl.visualization.draw import save_png

    folder_settings = run.settings(image, report, all_sentences=all_sentences, anatomy=anatomy, kinds=kinds)
    framed = frame_image(run.clip, image, run.resize_mode, masks(Path(image)))
    if is_picture:
        return save_png(out, phrase_sheet(run.clip, run.method, framed, sentences, folder_settings))
    write_folder(out, run.clip, run.method, framed, sentences, folder_settings, source=source)
    return out


def explain_manifest(
    manifest: str,
    out: Path,
    *,
    all_sentences: bool = False,
    anatomy: str | None = None,
    kinds: Sequence[DicomKind] = (),
    **settings: Any,
) -> Path:
    """Explain each image of a table and its report: a folder per image, and a table of them.

    A finished folder with the same settings is left as it is. Reports without a sentence to map get no folder.

    Args:
        manifest: CSV or JSON lines with the columns `image` (below the table's folder) and `report`, and optionally
            `id`, the name of the folder, by default the path of the image, and `mask_<structure>`, see `ListedMasks`.
        out: Folder of the folders.
        all_sentences: Whether all sentences get a map.
        anatomy: Masks of images without masks in the table, see `ImageMasks`.
        kinds: Kinds of DICOM objects that each sentence gets in its folder.
        settings: Method, threshold and model; see `matex_pl.commands.explain.explain`.

    Returns:
        `out`.
    """
    listed = ListedMasks(Path(manifest).parent)
    jobs = _read_jobs(Path(manifest), out, kinds, listed)
    check_output(out / _TABLE, mark=_TABLE_HEADER, inputs=(manifest,))
    for job in jobs:
        check_explained(job.folder)
    masks = ImageMasks(anatomy, [job.image for job in jobs], listed, settings.get("device", "auto"))
    run = Run.load(**settings)

    from matex_pl.explain.folder import write_folder
    from matex_pl.explain.phrases import frame_image

    rows: list[list[Any]] = []
    made = 0
    for job in progress(jobs, "images"):
        mapped = [sentence for sentence in job.sentences if all_sentences or not sentence.reason]
        note = "" if mapped else "no sentence to map"
        if mapped:
            folder_settings = run.settings(
                job.image, job.report, all_sentences=all_sentences, anatomy=anatomy, kinds=kinds
            )
            if not _is_finished(job.folder, folder_settings):
                try:
                    image = frame_image(run.clip, job.image, run.resize_mode, masks(job.image))
                except (OSError, ValueError) as error:
                    # Its header could be read. One broken image does not end a long run.
                    note = f"unreadable: {error}"
                    log.warning("%s, line %d: %s", manifest, job.line, error)
                else:
                    source = read_source(job.image, kinds) if kinds else None
                    write_folder(job.folder, run.clip, run.method, image, job.sentences, folder_settings, source=source)
                    made += 1
        name = "" if note else Path(os.path.relpath(job.folder, out)).as_posix()
        rows.append([name, job.name, len(job.sentences), len(mapped), note])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_TABLE_HEADER.split(","), *rows])
    write_text(out / _TABLE, file.getvalue())
    without = sum(not row[0] for row in rows)
    kept = len(rows) - made - without
    log.info("%d folders written, %d left as they are, %d images without a folder.", made, kept, without)
    return out


@dataclass(frozen=True)
class _Job:
    """One row of the table: its line, its image and the name of that in the table, its report, and its folder."""

    line: int
    name: str
    image: Path
    report: str
    sentences: list[ReportSentence]
    folder: Path


def _read_jobs(manifest: Path, out: Path, kinds: Sequence[DicomKind], listed: ListedMasks) -> list[_Job]:
    """Rows of the table, checked before the model is loaded; their masks are added to `listed`.

    Raises:
        FileNotFoundError: There is no table.
        ValueError: The table lacks a column, or some rows are wrong; the message lists the first of them.
    """
    # Tables are read by the data modules, which import the Trainer.
    from matex_pl.data.table import read_table
    from matex_pl.data.validation import RuleError

    rows, unread, _ = read_table(manifest, {}, ("image", "report"))
    used: dict[Path, int] = {}
    stems = Counter(_stem(row.cells.get("image")) for row in rows)

    jobs: list[_Job] = []
    wrong = list(unread)
    for row in progress(rows, "rows"):
        try:
            jobs.append(_job(row, manifest.parent, out, used, is_shared=stems[_stem(row.cells.get("image"))] > 1))
            if kinds:
                _check_source(jobs[-1].image, kinds)
            add_masks(listed, row, jobs[-1].image)
        except RuleError as error:
            wrong.append(error.at(row.source))
    for job in jobs:
        around = next((used[folder] for folder in job.folder.parents if folder in used), None)
        if around is not None:
            rule = f"the folder is within that of line {around}. Give each row an id of its own"
            wrong.append(RuleError(job.name, rule).at((str(manifest), job.line)))
    if wrong:
        lines = "".join(f"\n  line {row.line}: {row.rule}: {row.value!r:.60}" for row in wrong[:_SHOWN])
        rest = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{manifest} has {len(wrong)} wrong rows. Correct or remove them.{lines}{rest}")
    return jobs


def _job(row: Any, root: Path, out: Path, used: dict[Path, int], *, is_shared: bool) -> _Job:
    from matex_pl.data.validation import RuleError, find_image, image_name, path_below, text

    path = find_image(root, text(row.cells, "image"))
    try:
        read_size(path)
    except (OSError, ValueError) as error:
        raise RuleError(text(row.cells, "image"), str(error)) from error
    name, report = image_name(root, path), text(row.cells, "report")
    if not report:
        raise RuleError("", "the report is empty")
    given = text(row.cells, "id") or (name if is_shared else str(PurePosixPath(name).with_suffix("")))
    folder = path_below(out, given)
    if folder in used:
        raise RuleError(given, f"line {used[folder]} has the same folder. Give each row an id of its own")
    if folder == out / _TABLE:
        raise RuleError(given, "the folder has the name of the written table. Give the row another id")
    used[folder] = row.source[1]
    return _Job(row.source[1], name, path, report, split_report(report), folder)


def _check_source(image: Path, kinds: Sequence[DicomKind]) -> None:
    from matex_pl.data.validation import RuleError

    try:
        read_source(image, kinds)
    except ValueError as error:
        raise RuleError(str(image), str(error)) from error


def _stem(name: Any) -> str:
    return str(PurePosixPath(str(name or "x").replace("\\", "/")).with_suffix(""))


def _is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder is complete, and was made with these settings."""
    record = read_record(folder)
    is_same = all(
        {key: record.get(name, {}).get(key) for key in value} == value
        if isinstance(value, dict)
        else record.get(name) == value
        for name, value in json.loads(json.dumps(settings)).items()
    )
    return bool(record) and is_same and all((folder / name).is_file() for name in record["files"])


@dataclass(frozen=True, eq=False)
class Run:
    """Model, method and settings that all images share."""

    clip: Any
    method: AttributionMethod
    resize_mode: ResizeMode | None
    described: Mapping[str, Any]

    @classmethod
    def load(
        cls,
        method: AttributionMethod | str | None,
        threshold: float | str,
        resize_mode: ResizeMode | None,
        ckpt_path: str | None,
        model: str | None,
        pretrained: str | None,
        device: str = "auto",
    ) -> Run:
        """Model, method and threshold from the options; see `matex_pl.commands.explain.explain`.

        Raises:
            OSError: A file cannot be read.
            ValueError: The model or the threshold is wrong.
        """
        trained = check_one_model("--ckpt_path", ckpt_path, model, pretrained)

        from matex_pl.attribution import Matex
        from matex_pl.clip import load_clip, load_trained
        from matex_pl.clip.device import find_device
        from matex_pl.evaluation.store import describe_method, weight_hash

        single = load_method(method or Matex.recommended())
        described = describe_method(single)
        place = find_device(device)
        clip = load_trained(trained) if trained else load_clip(str(model), pretrained)
        weights = weight_hash(clip)
        clip = clip.to(place)
        return cls(
            clip,
            single,
            resize_mode,
            {
                "method": described,
                "model": {"source": trained or str(model), "weights": weights},
                "threshold": _threshold(threshold, described, weights),
            },
        )

    def settings(
        self,
        image: str | Path,
        report: str,
        *,
        all_sentences: bool,
        anatomy: str | None,
        kinds: Sequence[DicomKind] = (),
    ) -> dict[str, Any]:
        """Settings of the folder of one image."""
        from matex_pl.explain.folder import folder_settings

        return folder_settings(
            self.clip,
            image=image,
            report=report,
            resize_mode=self.resize_mode,
            all_sentences=all_sentences,
            anatomy=anatomy,
            kinds=kinds,
            **self.described,
        )


def _threshold(given: float | str, method: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Value and source of the threshold of boxes: a number, or the choice of a benchmark on validation pairs.

    Raises:
        ValueError: The benchmark is of other weights, or has no threshold for the method with these settings.
    """
    if not isinstance(given, str):
        return {"value": float(given), "source": "as given" if given != 0.5 else "the default"}

    from matex_pl.report.results import BenchmarkResult, read

    path = Path(given) / "results.json"
    result = read(BenchmarkResult, path)
    if result.model.weights != weights:
        raise ValueError(
            f"The benchmark in {given!r} is of other weights. Give a benchmark of this model, or a number."
        )
    name, settings = method["class_path"].rpartition(".")[2], method["init_args"]
    for row in result.methods("image"):
        if row.method_class == name and row.settings == settings and row.threshold is not None:
            return {"value": row.threshold, "source": "chosen on validation pairs by a benchmark"}
    known = sorted({row.name for row in result.methods("image") if row.threshold is not None})
    raise ValueError(
        f"The benchmark in {given!r} has no threshold for {name} with these settings. It has thresholds for "
        f"{', '.join(known) or 'no method'}. Give one of these methods, or a number."
    )
