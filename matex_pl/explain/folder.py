"""Folder of one image and its report: the page, `explain.json`, a panel per sentence and a contact sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from matex_pl import __version__
from matex_pl.anatomy.report import ReportSentence
from matex_pl.attribution import AttributionMethod
from matex_pl.attribution.core.target import REFERENCES
from matex_pl.clip.model import Clip
from matex_pl.data.images import ResizeMode
from matex_pl.explain.pairs import draw_panels
from matex_pl.explain.phrases import ExplainedImage, FramedImage, explain_phrases
from matex_pl.explain.place import place_maps
from matex_pl.files import MARK, whole_folder, write_text
from matex_pl.report.explained import PAGE, RECORD, SHEET, page
from matex_pl.viewer.objects import object_paths, save_objects
from matex_pl.viewer.source import DicomKind, Source
from matex_pl.visualization.draw import Picture, save_png
from matex_pl.visualization.sheet import COLUMNS, SHEET_WIDTH, Entry, contact_sheet

_FORMAT = 1


def folder_settings(
    clip: Clip,
    *,
    image: str | Path,
    report: str,
    method: Mapping[str, Any],
    model: Mapping[str, Any],
    threshold: Mapping[str, Any],
    resize_mode: ResizeMode | None,
    all_sentences: bool,
    anatomy: str | None = None,
    kinds: Sequence[DicomKind] = (),
) -> dict[str, Any]:
    """Settings of a folder in plain types. Two folders with equal settings have equal content.

    Args:
        clip: CLIP model.
        image: Image file; the settings hold its name and the SHA-256 of its content.
        report: Text of the report.
        method: Attribution method as in a YAML, `class_path` and `init_args`.
        model: `source`, the name or checkpoint of the model, and `weights`, the hash of its weights.
        threshold: `value` and `source` of the threshold of the boxes.
        resize_mode: How the image is fitted into the model's input, by default `clip.resize_mode`.
        all_sentences: Whether all sentences get a map.
        anatomy: Source of the masks of the image.
        kinds: Kinds of DICOM objects of each sentence.
    """
    return {
        "format": _FORMAT,
        "generator": MARK,
        "version": __version__,
        "use": "Research, not for diagnosis.",
        "image": {"file": Path(image).name, "sha256": sha256(Path(image).read_bytes()).hexdigest()},
        "model": {
            **model,
            "image_size": list(clip.image_size),
            "grid": list(clip.grid),
            "context_length": clip.context_length,
            "resize_mode": resize_mode or clip.resize_mode,
        },
        "method": dict(method),
        "threshold": dict(threshold),
        "all_sentences": all_sentences,
        "anatomy": anatomy,
        "dicom": list(kinds),
        "report": {"text": report},
    }


def write_folder(
    folder: Path,
    clip: Clip,
    method: AttributionMethod,
    image: FramedImage,
    sentences: Sequence[ReportSentence],
    settings: Mapping[str, Any],
    source: Source | None = None,
) -> ExplainedImage:
    """Explain an image and the sentences of its report, write the folder, and return the maps.

    A folder that is there is replaced, once the new one is complete.

    Args:
        folder: Destination.
        clip: CLIP model.
        method: Attribution method.
        image: The image, from `frame_image` with the settings' `resize_mode`.
        sentences: Sentences of the report; at least one gets a map.
        settings: Settings from `folder_settings`.
        source: The image as DICOM, if the settings ask for DICOM objects.

    Raises:
        NotImplementedError: The method does not support the model.
        OSError: The folder cannot be written.
        ValueError: No sentence gets a map.
    """
    explained, entries = _explain(clip, method, image, sentences, settings)
    panels = [entry["panel"] for entry in entries if entry["status"] == "mapped"]
    kinds = settings["dicom"] if source is not None else ()
    captures = [Path(name).with_suffix(".dcm") for name in panels]
    objects = [path.name for capture in captures for path in object_paths(capture, kinds).values()]
    height, width = image.size
    record = {
        **settings,
        "image": settings["image"] | {"width": width, "height": height},
        "places": "Pixels of the stored image, turned upright by its EXIF orientation; x to the right, y down.",
        "references": len(getattr(method, "references", REFERENCES)),
        "sentences": entries,
        "files": sorted([RECORD, PAGE, SHEET, *panels, *objects]),
    }
    with whole_folder(folder) as part:
        for name, picture in zip(panels, _panels(clip, method, explained, entries), strict=True):
            save_png(part / name, picture)
        if source is not None:
            placed = place_maps(clip, explained, type(method).__name__, settings)
            save_objects(source, placed, [part / capture for capture in captures], kinds)
        save_png(part / SHEET, _sheet(method, explained, entries))
        write_text(part / PAGE, page(record, image.shown, explained.shown_maps()))
        write_text(part / RECORD, json.dumps(record, indent=1, ensure_ascii=False))
    return explained


def phrase_sheet(
    clip: Clip,
    method: AttributionMethod,
    image: FramedImage,
    sentences: Sequence[ReportSentence],
    settings: Mapping[str, Any],
) -> Picture:
    """Contact sheet of an image and the sentences of its report; see `write_folder` for the arguments."""
    return _sheet(method, *_explain(clip, method, image, sentences, settings))


def _explain(
    clip: Clip,
    method: AttributionMethod,
    image: FramedImage,
    sentences: Sequence[ReportSentence],
    settings: Mapping[str, Any],
) -> tuple[ExplainedImage, list[dict[str, Any]]]:
    """Maps of the sentences that get one, and the entries of all sentences."""
    is_mapped = [settings["all_sentences"] or not sentence.reason for sentence in sentences]
    phrases = [sentence.text for sentence, mapped in zip(sentences, is_mapped, strict=True) if mapped]
    explained = explain_phrases(clip, method, image, phrases)
    found = explained.numbers(settings["threshold"]["value"])
    numbers = iter([entry | {"structures": rows} for entry, rows in zip(found, explained.shares(), strict=True)])
    return explained, [
        _entry(number, sentence, next(numbers) if mapped else None)
        for number, (sentence, mapped) in enumerate(zip(sentences, is_mapped, strict=True), start=1)
    ]


def _entry(number: int, sentence: ReportSentence, numbers: dict[str, Any] | None) -> dict[str, Any]:
    """Entry of a sentence in `explain.json`."""
    entry: dict[str, Any] = {
        "number": number,
        "text": sentence.text,
        "start": sentence.start,
        "end": sentence.end,
        "heading": sentence.heading,
        "status": "without map" if numbers is None else "mapped",
        "reason": sentence.reason,
    }
    if numbers is None:
        return entry
    cut = " ".join(word["text"] for word in numbers["words"] if word["cut"])
    return entry | numbers | {"cut": cut, "panel": f"sentence-{number:02d}.png"}


def _panels(
    clip: Clip, method: AttributionMethod, explained: ExplainedImage, entries: Sequence[Mapping[str, Any]]
) -> list[Picture]:
    numbers = [entry["number"] for entry in entries if entry["status"] == "mapped"]
    batch = explained.batch.copy()
    batch["id"] = [f"{explained.image.name} | sentence {number} of {len(entries)}" for number in numbers]
    return draw_panels(clip, explained.maps, batch, explained.tokens, type(method).__name__)


def _sheet(method: AttributionMethod, explained: ExplainedImage, entries: Sequence[Mapping[str, Any]]) -> Picture:
    """Contact sheet: the image, then the map and the words of each sentence."""
    mapped = [entry for entry in entries if entry["status"] == "mapped"]
    tiles = [
        Entry(
            name=f"{entry['number']}: cos {entry['score']:.2f}, margin {entry['margin']:+.2f}",
            heat=heat,
            words=words if method.supports_text else None,
            note=", ".join(filter(None, (entry["heading"].lower(), entry["reason"]))),
            phrase=entry["text"],
        )
        for entry, heat, words in zip(mapped, explained.heats, explained.maps.words, strict=True)
    ]
    count = f"{len(mapped)} of {len(entries)} sentences" if len(entries) > 1 else entries[0]["text"]
    rows = math.ceil((len(tiles) + 1) / COLUMNS)
    columns = math.ceil((len(tiles) + 1) / rows)
    return contact_sheet(
        columns=columns,
        width=columns * (SHEET_WIDTH // COLUMNS),
        image=explained.batch["image"][0, 0].numpy(),
        boxes=(),
        phrase=count,
        entries=tiles,
        title=explained.image.name,
        subtitle=type(method).__name__,
    )
