"""Page of one image and its report: the sentences on one side, the map of the chosen sentence on the other."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from matex_pl.files import MARK, check_folder
from matex_pl.report.gallery import encode
from matex_pl.report.tables import environment
from matex_pl.visualization.draw import heat_png

PAGE, RECORD, SHEET = "report.html", "explain.json", "sheet.png"


def check_explained(folder: Path) -> None:
    """Check that a folder can be written, and replaces at most an earlier folder of this kind, without other files.

    Raises:
        OSError: Nothing can be written there.
        ValueError: The path is a file, a link or the present folder, or the folder holds other files.
    """
    name = str(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"The output {name!r} is no folder. Give the path of a new folder.")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"The output {name!r} holds the present folder. Give the path of a new folder.")
    check_folder(folder.parent)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there:
        return
    check_folder(folder)
    strange = sorted(there - set(read_record(folder).get("files", ())))
    if strange:
        raise ValueError(
            f"The folder {name!r} is not replaced, because {strange[0]!r} in it is no output of this command. Give "
            "another folder, or remove the file."
        )


def read_record(folder: Path) -> dict[str, Any]:
    """Content of the `explain.json` of a folder; empty if it has none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("generator") == MARK else {}


@dataclass(frozen=True)
class Part:
    """A part of the report's text: a sentence, or the text between two sentences.

    Args:
        text: Text as written.
        sentence: Entry of the sentence in `explain.json`; None between sentences.
        strength: Margin of the sentence in [0, 1] of the range of this report.
    """

    text: str
    sentence: Mapping[str, Any] | None = None
    strength: float = 0.0


def page(record: Mapping[str, Any], shown: np.ndarray, maps: Sequence[np.ndarray]) -> str:
    """Self-contained HTML page of an `explain.json`.

    Args:
        record: Content of `explain.json`.
        shown: `(h, w)` uint8 gray levels of the image.
        maps: Map of each sentence with status `mapped`, in their order, `(h, w)` in [0, 1] over the whole image.
    """
    mapped = [sentence for sentence in record["sentences"] if sentence["status"] == "mapped"]
    templates = environment(autoescape=True)
    script = templates.get_template("explained.js").render().strip()
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    entries = [
        {
            "number": sentence["number"],
            "map": _data_url("png", heat_png(heat)),
            "boxes": sentence["boxes"],
            "peak": sentence["peak"],
        }
        for sentence, heat in zip(mapped, maps, strict=True)
    ]
    return templates.get_template("explained.html.jinja").render(
        record=record,
        mapped=mapped,
        parts=_parts(record, mapped),
        margins=_range(mapped),
        counts=_counts(record),
        picture=_data_url("jpeg", encode(shown)),
        entries=entries,
        script=script,
        digest=f"sha256-{digest}",
    )


def _parts(record: Mapping[str, Any], mapped: Sequence[Mapping[str, Any]]) -> list[Part]:
    text, last = record["report"]["text"], 0
    parts: list[Part] = []
    low, high = _range(mapped)
    for sentence in record["sentences"]:
        start, end = sentence["start"], sentence["end"]
        is_ranked = sentence["status"] == "mapped" and high > low
        strength = (sentence["margin"] - low) / (high - low) if is_ranked else 0.5
        parts += [Part(_reflowed(text[last:start])), Part(sentence["text"], sentence, round(strength, 3))]
        last = end
    parts.append(Part(_reflowed(text[last:])))
    return parts


def _reflowed(text: str) -> str:
    """Text between sentences with at most one blank line, and without indentation."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    if len(lines) == 1:
        return re.sub(r"\s+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + (" " if text[-1:] in (" ", "\t") and lines[-1] else "")


def _range(mapped: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    margins = [sentence["margin"] for sentence in mapped]
    return min(margins), max(margins)


def _counts(record: Mapping[str, Any]) -> dict[str, int]:
    """Number of sentences without a map by reason, the most frequent first."""
    reasons = [sentence["reason"] for sentence in record["sentences"] if sentence["status"] != "mapped"]
    return dict(
        sorted(((reason, reasons.count(reason)) for reason in set(reasons)), key=lambda item: (-item[1], item[0]))
    )


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
