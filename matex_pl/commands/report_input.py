"""Report, phrases and threshold as given on the command line of `matex explain`, checked before torch is imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from matex_pl.anatomy.report import ReportSentence, split_report

# Longest report in bytes: a hundred times the longest of the public sets.
_MOST = 2**20
_TEXT_FILES = re.compile(
    r"\.(?:txt|text|md|rtf|docx?|odt|pdf|csv|tsv|jsonl?|xml|html?|log|rpt|dat|png|jpe?g|dcm)$", re.I
)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"GIF8")
_SHOWN = 12


def given_sentences(phrases: Sequence[str]) -> tuple[str, list[ReportSentence]]:
    """Phrases of the command line as a report of one phrase per line. All of them get a map."""
    lines = [" ".join(_clean(phrase).split()) for phrase in phrases]
    starts = [sum(len(line) + 1 for line in lines[:place]) for place in range(len(lines))]
    sentences = [ReportSentence(line, at, at + len(line), "", "") for at, line in zip(starts, lines, strict=True)]
    return "\n".join(lines), sentences


def report_sentences(given: str, *, all_sentences: bool) -> tuple[str, list[ReportSentence]]:
    """Text of a report and its sentences; at least one gets a map.

    Args:
        given: Path of a text file, the text itself, or `-` for standard input.
        all_sentences: Whether all sentences get a map.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file cannot be read.
        ValueError: The file is no text, or no sentence gets a map; the message lists the sentences and their reasons.
    """
    text, source = _read(given)
    sentences = split_report(text)
    if not sentences:
        raise ValueError(f"{source} is empty: it has no sentence. Give a report with at least one sentence.")
    refuse_without_map(sentences, source, all_sentences=all_sentences)
    return text, sentences


def refuse_without_map(sentences: Sequence[ReportSentence], source: str, *, all_sentences: bool) -> None:
    """Raise ValueError if no sentence gets a map."""
    if all_sentences or any(not sentence.reason for sentence in sentences):
        return
    lines = [f"\n  {sentence.reason}: {sentence.text:.90}" for sentence in sentences[:_SHOWN]]
    rest = f"\n  and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    raise ValueError(
        f"{source} has no sentence to map. Give --all_sentences to map every sentence. The sentences are"
        + "".join(lines)
        + rest
    )


def check_threshold_option(threshold: float | str) -> None:
    """Raise ValueError if a threshold is neither a number in [0, 1) nor the folder of a benchmark."""
    if isinstance(threshold, str):
        if not (Path(threshold) / "results.json").is_file():
            raise ValueError(
                f"--threshold must be a number in [0, 1) or the folder of a `matex benchmark`, got {threshold!r}."
            )
    elif not 0 <= threshold < 1:
        raise ValueError(f"--threshold must be in [0, 1), got {threshold}. Maps are in [0, 1].")


def _read(given: str) -> tuple[str, str]:
    """Text of a report, and the words for it in messages."""
    if given == "-":
        return _decoded(sys.stdin.buffer.read(_MOST + 1), "standard input"), "The report from standard input"
    path = Path(given)
    # A long text is no name of a file, and some systems refuse to look for it.
    is_name = len(given) < 1000 and "\n" not in given
    if is_name and path.is_dir():
        raise ValueError(f"The report {given!r} is a folder. Give a text file.")
    if is_name and path.exists():
        with path.open("rb") as file:
            return _decoded(file.read(_MOST + 1), repr(given)), f"The report {given!r}"
    is_text = len(given.split()) > 1 or given.rstrip().endswith((".", "!", "?", ":"))
    if given.strip() and (not is_text or (is_name and _TEXT_FILES.search(given.strip()))):
        raise FileNotFoundError(
            f"There is no report at {given!r}. Check the path, or give the text of the report, or - for standard input."
        )
    return _clean(given), "The report"


def _clean(text: str) -> str:
    """Text without halves of surrogate pairs, which words of a command line in another encoding have."""
    return text.encode("utf-8", "replace").decode()


def _decoded(content: bytes, name: str) -> str:
    if len(content) > _MOST:
        raise ValueError(f"The report {name} has more than {_MOST:,} bytes. Give the report of one image.")
    if content.startswith(_MAGIC) or content[128:132] == b"DICM":
        raise ValueError(f"The report {name} is an image. Give the image first, and a text file as --report.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"The report {name} is UTF-16, which is not supported. Save the file as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"The report {name} is no UTF-8 text: line {line} has the byte {content[error.start]:#04x}. Save the file "
            "as plain text in UTF-8."
        ) from None
    if "\0" in text or content.startswith((b"%PDF", b"PK\x03\x04", b"{\\rtf")):
        raise ValueError(f"The report {name} is no plain text. Save the file as plain text in UTF-8.")
    return text
