"""From a report to its sentences: where each stands, and the reason why a sentence gets no map."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from matex_pl.anatomy.disambiguation import settle
from matex_pl.anatomy.lexicon import Term, read_terms, shipped_grammar
from matex_pl.anatomy.negation import denied, segments, sentences

Reason = Literal[
    "", "negated", "normal", "no finding", "history", "technique", "comparison", "recommendation", "administrative"
]
"""Reason why a sentence gets no map; empty if it gets one."""

# Kinds of terms after which a sentence goes on, behind an abbreviation.
_GOES_ON = ("preposition", "and", "or", "to", "with", "verb", "comma", "zone", "side", "sided_zone", "carrier")
# Ends of a line whose sentence goes on.
_OPEN_END = re.compile(r"(?:[,\-/(]|\b(?:and|of|the|with|or|in))$")
_LIST_MARK = re.compile(r"(?:[-*\u2022\u2013\u2014>#_=\s]|\(?\d{1,2}[.)](?=\s)|\(?[a-h]\)(?=\s))+")
# Lines from this length on can be wrapped lines of a paragraph.
_WRAPPED = 50
# Characters on each side of a full stop that are read to decide what it ends.
_NEAR = 80
# Lines of one width differ by less than a word.
_RAGGED = 14


@dataclass(frozen=True)
class ReportSentence:
    """A sentence of a report.

    Args:
        text: The sentence in one line.
        start: Index of its first character in the report.
        end: Index after its last character.
        heading: Heading of its section as written, without the colon; empty if there is none.
        reason: Reason why it gets no map; empty if it gets one.
    """

    text: str
    start: int
    end: int
    heading: str
    reason: Reason


def split_report(report: str) -> list[ReportSentence]:
    """Sentences of a report in English, in order. No string raises an error.

    Headings, numbers and marks of lists belong to no sentence. A line break ends a sentence if the next word would have
    had room on the line. Sentences under a heading such as TECHNIQUE are not read further; all others get a map if they
    name a finding or a device that is not denied.

    Args:
        report: Text of the report.
    """
    found = []
    # Other programs end lines by a carriage return alone; places stay the same.
    report = re.sub(r"\r(?!\n)", "\n", report)
    for section in _sections(report):
        for start, end in _spans(report, section.start, section.end):
            text = " ".join(report[start:end].split())
            reason = section.reason or reason_without_map(text)
            found.append(ReportSentence(text, start, end, section.heading, reason))
    return found


def reason_without_map(sentence: str) -> Reason:
    """Reason why one sentence, without its section, gets no map; empty if it names a finding that is not denied."""
    grammar, words = shipped_grammar(), _words()
    terms = settle(read_terms(sentence, grammar), grammar)
    plain = " ".join(re.findall(r"[^\W_]+(?:[/'][^\W_]+)*", sentence.lower()))
    if words.begins["history"].match(re.sub(r"^(the|this is an?|an?|\d+) ", "", plain)):
        return "history"
    if words.signs["administrative"].search(plain):
        return "administrative"
    advice = words.signs["recommendation"].search(plain)
    cut = len(sentence)
    if advice:
        cut = _place_of(sentence, len(plain[: advice.start()].split()))
    reasons: set[str] = set()
    for start, end in sentences(terms):
        scope = denied(terms, segments(terms, start, end, grammar), grammar)
        for k in range(start, end):
            if not _is_finding(terms, k, start, end, plain):
                continue
            if k not in scope and terms[k].start < cut:
                return ""
            reasons.add(scope.get(k, "recommendation"))
        reasons |= {"normal"} & ({*scope.values()} | {term.kind for term in terms[start:end]})
    return _weakest(reasons, plain)


def _weakest(reasons: set[str], plain: str) -> Reason:
    """Reason of a sentence whose findings are all denied, or that has none."""
    signs = _words().signs
    if "recommendation" in reasons or signs["recommendation"].search(plain):
        return "recommendation"
    if "negated" in reasons:
        return "negated"
    if "normal" in reasons:
        return "normal"
    fallbacks: tuple[Reason, ...] = ("history", "comparison", "technique")
    for reason in fallbacks:
        if signs[reason].search(plain):
            return reason
    return "no finding"


def _is_finding(terms: list[Term], k: int, start: int, end: int, plain: str) -> bool:
    """Whether the term at `k` names a finding or a device on the image."""
    words, term = _words(), terms[k]
    if term.text in words.findings or any(
        term.text.split()[-1] == run[-1] and " ".join(run) in plain for run in words.runs
    ):
        return True
    near = {other.text for other in terms[max(start, k - 3) : min(k + 3, end)]} - {term.text}
    if term.kind == "finding":
        return term.text not in words.changes or not near & words.change_signs
    around = {other.text for other in terms[max(start, k - 6) : min(k + 6, end)]}
    if term.kind != "device" or term.text in words.history_devices or around & words.removed:
        return False
    # "No line": the word alone names many things.
    return term.text not in words.no_devices or any(
        other.kind in ("device", "vessel") for other in terms[start:end] if other is not term
    )


def _place_of(sentence: str, word: int) -> int:
    """Index of the first character of a word of a sentence."""
    found = re.finditer(r"[^\W_]+(?:[/'][^\W_]+)*", sentence)
    return next((match.start() for match in itertools.islice(found, word, None)), len(sentence))


class _Section(NamedTuple):
    start: int
    end: int
    heading: str
    reason: Reason


def _sections(report: str) -> Iterator[_Section]:
    """Sections of a report between its headings; the text before the first heading is read like findings."""
    heads = [match for match in _words().heading.finditer(report) if _is_heading(report, match)]
    bounds = [*(match.start() for match in heads), len(report)]
    yield _Section(0, bounds[0], "", "")
    for match, end in zip(heads, bounds[1:], strict=True):
        name = match["name"]
        reason = _words().headings[" ".join(name.lower().split())]
        blank = re.compile(r"\S[ \t\r]*\n[ \t\r]*\n").search(report, match.end(), end) if reason else None
        # A paragraph below HISTORY or COMPARISON without a heading of its own describes the image.
        middle = blank.end() if blank else end
        yield _Section(match.end(), middle, name, reason)
        yield _Section(middle, end, "", "")


def _is_heading(report: str, match: re.Match[str]) -> bool:
    """Whether a known heading stands as one: on a new line, behind a full stop, or capitalized, and with a mark."""
    before, name, mark = (
        report[report.rfind("\n", 0, match.start()) + 1 : match.start()].strip(" \t*#_>-\u2022"),
        match["name"],
        match["after"],
    )
    begins_line = not before or bool(re.fullmatch(r"\(?\d{1,2}[.)]", before))
    if ":" in mark:
        return begins_line or before.endswith((".", ";", "!", "?", ")", ":")) or name[0].isupper()
    return begins_line and (name.isupper() or (name[0].isupper() and not mark.strip(" \t*_-\u2013=")))


def _spans(report: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of the sentences between two places, without the marks of lists and with their full stops."""
    grammar = shipped_grammar()
    part = report[start:end]
    terms = settle(read_terms(part, grammar), grammar)
    breaks = [(t.start, t.end) for k, t in enumerate(terms) if t.kind == "break" and _is_end(part, terms, k)]
    breaks += [(place, place + 1) for place in _line_ends(part)]
    # "1) Effusion 2) Edema"
    breaks += [match.span() for match in re.finditer(r"(?<=\s)\(?\d{1,2}\)\s(?=[A-Z])", part)]
    last = 0
    for first, after in sorted([*breaks, (len(part), len(part))]):
        if first < last:
            continue
        piece = part[last:first]
        mark = _LIST_MARK.match(piece)
        begin = last + (mark.end() if mark else 0)
        body = part[begin:first].rstrip()
        if re.search(r"[^\W\d_]{2}", body):
            stop = begin + len(body)
            closing = re.compile(r"[.!?]+[\"\u201d\u2019')\]]*").match(part, stop) if stop == first else None
            yield start + begin, start + (closing.end() if closing else stop)
        last = after


def _is_end(part: str, terms: list[Term], k: int) -> bool:
    """Whether the break at `k` ends a sentence, and does not belong to an abbreviation or a number."""
    term = terms[k]
    if term.text not in (".", "?"):
        return True
    before, after = part[max(0, term.start - _NEAR) : term.start], part[term.end : term.end + _NEAR]
    if not after.strip():
        return True
    if term.text == "?":
        # "? pneumonia" is a question of the sentence itself.
        return bool(before) and not before[-1].isspace() and not after[0].isalpha()
    word = (re.findall(r"[^\s(\[,;:]+$", before) or [""])[0]
    following = terms[k + 1] if k + 1 < len(terms) else None
    if not after[0].isspace() and after[0] not in "\"'\u201d\u2019)]":
        # "opacity.No effusion", but not "3.5", "e.g.," or "image.png".
        return bool(re.search(r"[a-z]{2}$", word)) and after[0].isupper()
    if re.match(r"\s*\n[ \t\r]*\n", after):
        return True
    name, rest = word.lower().rstrip("."), after.lstrip("\"'\u201d\u2019)] \t\r\n")
    if name in _words().titles:
        return False
    if name in _words().units:
        goes_on = following is not None and following.kind in _GOES_ON and not rest[:1].isupper()
        return not (goes_on or rest[:1].isdigit() or (name in ("e.g", "i.e", "eg", "ie", "st", "w.o")))
    # "J. Smith"
    initial = re.search(r"(?:\b[A-Z]\w*\.? |\b(?:by|with|and) |\A\s*)[A-Z]$", before)
    return not (initial and rest[:1].isupper() and word not in ("R", "L"))


def _line_ends(part: str) -> Iterator[int]:
    """Places of the line breaks that end a sentence: the first word of the next line would have had room."""
    lines = part.split("\n")
    lengths = [len(line.rstrip()) for line in lines]
    width = max(lengths)
    is_wrapped = width >= _WRAPPED and sum(length > width - _RAGGED for length in lengths) > 1
    place, is_lower = 0, part.islower()
    for line, following in itertools.pairwise(lines):
        place += len(line)
        text, word = line.rstrip(), (following.split() or [""])[0]
        had_room = len(text) + 1 + len(word) <= width
        begins = word[:1].isupper() or word[:1].isdigit() or bool(_LIST_MARK.match(word)) or is_lower
        ends_open = bool(_OPEN_END.search(text))
        if text and word and begins and not ends_open and (had_room or not is_wrapped):
            yield place
        place += 1


@dataclass(frozen=True)
class _Words:
    """The compiled `report.yaml`."""

    headings: Mapping[str, Reason]
    heading: re.Pattern[str]
    titles: frozenset[str]
    units: frozenset[str]
    findings: frozenset[str]
    # Findings of several words.
    runs: tuple[tuple[str, ...], ...]
    changes: frozenset[str]
    change_signs: frozenset[str]
    history_devices: frozenset[str]
    no_devices: frozenset[str]
    removed: frozenset[str]
    signs: Mapping[str, re.Pattern[str]]
    begins: Mapping[str, re.Pattern[str]]


@cache
def _words() -> _Words:
    data = yaml.safe_load(Path(__file__).with_name("report.yaml").read_text(encoding="utf-8"))
    headings: dict[str, Reason] = {
        name: "" if reason == "findings" else reason for reason, names in data["headings"].items() for name in names
    }
    patterns = {name: _pattern(words) for name, words in data["signs"].items()}
    return _Words(
        headings=headings,
        heading=_heading_pattern(headings),
        findings=frozenset(name for name in data["findings"] if " " not in name),
        runs=tuple(tuple(name.split()) for name in data["findings"] if " " in name),
        signs={name: pattern for name, pattern in patterns.items() if not name.startswith("begins_")},
        begins={name.removeprefix("begins_"): p for name, p in patterns.items() if name.startswith("begins_")},
        titles=frozenset(data["titles"]),
        units=frozenset(data["units"]),
        changes=frozenset(data["changes"]),
        change_signs=frozenset(data["change_signs"]),
        history_devices=frozenset(data["history_devices"]),
        no_devices=frozenset(data["no_devices"]),
        removed=frozenset(data["removed"]),
    )


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})(?![\w/])")


def _heading_pattern(names: Iterable[str]) -> re.Pattern[str]:
    listed = "|".join(r"[ \t]+".join(map(re.escape, name.split())) for name in sorted(names, key=len, reverse=True))
    mark = r"[ \t*_]*:[*_]*|[ \t]+[-\u2013\u2014][ \t]+|[ \t*_=-]*(?=\r?\n|\Z)|[ \t]+(?=\d{1,2}[.)]\s)"
    return re.compile(rf"(?<![\w/-])(?P<name>{listed})(?:[ \t]*\([^()\n]{{0,40}}\))?(?P<after>{mark})", re.IGNORECASE)
