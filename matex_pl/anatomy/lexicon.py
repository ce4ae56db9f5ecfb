"""From a phrase to terms: runs of words, looked up in `grammar.yaml`."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SIDES_OF = {"right": ("right",), "left": ("left",), "both": ("right", "left"), "midline": ("midline",)}
# Below seven letters one edit turns too many plain words into others.
FUZZY_LENGTH = 7
FUZZY_KINDS = ("side", "zone", "sided_zone", "carrier", "finding")
_HTML = "b|i|u|em|strong|br|p|span|div|font|sup|sub|mark|hr|li|ul|ol|td|tr|table|h[1-6]"
_PUNCTUATION = {".": "break", ";": "break", "!": "break", "?": "break", ",": "comma", "(": "comma", ")": "comma"}
_PUNCTUATION |= {"[": "comma", "]": "comma", ":": "colon", "/": "or", "&": "and", "+": "and"}


class Term(NamedTuple):
    """A run of words with one meaning.

    Attributes:
        kind: `side`, `zone`, `sided_zone`, `zone_adjective`, a key of `words` in the grammar, a punctuation or `word`.
        text: Words in the spelling of the grammar.
        start: Index of the first character in the original text.
        end: Index after the last character.
        sides: Named sides of the patient.
        zones: Named zones.
    """

    kind: str
    text: str
    start: int
    end: int
    sides: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()


class Entry(NamedTuple):
    """Meaning of a run of words in the grammar."""

    kind: str
    sides: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grammar:
    """The compiled grammar.

    `entries` maps words to their meaning. `runs` maps a first word to the entries of several words, longest first.
    """

    entries: Mapping[str, Entry]
    runs: Mapping[str, list[tuple[str, ...]]]
    words: frozenset[str]
    misspellings: Mapping[str, str]
    near: Mapping[str, str]
    sets: Mapping[str, frozenset[str]]
    fallback: Mapping[str, str | None]
    usual_places: Mapping[str, tuple[tuple[str, ...], str]]
    pattern: re.Pattern[str]


@cache
def shipped_grammar() -> Grammar:
    """The package's `grammar.yaml`, compiled once."""
    return compile_grammar(yaml.safe_load(Path(__file__).with_name("grammar.yaml").read_text(encoding="utf-8")))


def compile_grammar(data: Mapping[str, Any]) -> Grammar:
    """Tables of a grammar in the layout of `grammar.yaml`.

    Raises:
        ValueError: The same words have two meanings.
    """
    entries: dict[str, Entry] = {}
    for words, entry in _entries(data):
        if entries.setdefault(words, entry) != entry:
            raise ValueError(f"Grammar: {words!r} is both {entries[words].kind} and {entry.kind}. Keep one of them.")
    runs: dict[str, list[tuple[str, ...]]] = {}
    for words in sorted(entries, key=lambda words: -len(words.split())):
        first, *rest = words.split()
        if rest:
            runs.setdefault(first, []).append((first, *rest))
    sets = {name: frozenset(words) for name, words in data.items() if isinstance(words, list)}
    slashed = "|".join(re.escape(words) for words in entries if "/" in words)
    usual = {
        word: (SIDES_OF[place.split()[0]], place.split()[1])
        for place, words in data["usual_places"].items()
        for word in words
    }
    return Grammar(
        entries=entries,
        runs=runs,
        # None of these is a misspelling.
        words=frozenset(" ".join([*entries, *itertools.chain(*sets.values())]).split()),
        misspellings={**_swaps(entries), **data["misspellings"]},
        near=_deletions(word for word, entry in entries.items() if entry.kind in FUZZY_KINDS and " " not in word),
        sets=sets,
        fallback=data["fallback"],
        usual_places=usual,
        pattern=_token_pattern(slashed),
    )


def read_terms(text: str, grammar: Grammar) -> list[Term]:
    """Terms of `text` in order, in linear time; the longest entry of the grammar wins."""
    tokens = list(_mended(list(_tokens(text, grammar)), text, grammar))
    terms: list[Term] = []
    at = 0
    while at < len(tokens):
        word, start, end = tokens[at]
        length = 1
        for run in grammar.runs.get(word, ()):
            if run == tuple(token[0] for token in tokens[at : at + len(run)]):
                length = len(run)
                word, end = " ".join(run), tokens[at + length - 1][2]
                break
        entry = grammar.entries.get(word) or Entry(_PUNCTUATION.get(word, "break" if word == "\n\n" else "word"))
        terms.append(Term(entry.kind, word, start, end, entry.sides, entry.zones))
        at += length
    return terms


def _entries(data: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    for side, listed in data["sides"].items():
        yield from ((words, Entry("side", SIDES_OF[side])) for words in listed)
    for kind, table in (("zone", data["zones"]), ("zone_adjective", data["zone_adjectives"])):
        for zones, listed in table.items():
            yield from ((words, Entry(kind, (), tuple(zones.split()))) for words in listed)
    for place, listed in data["sided_zones"].items():
        side, zone = place.split()
        yield from ((words, Entry("sided_zone", SIDES_OF[side], (zone,))) for words in listed)
    for kind, listed in data["words"].items():
        yield from ((words, Entry(kind)) for words in listed)


def _token_pattern(slashed: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<skip></?(?:{_HTML})\b[^<>]{{0,80}}>|&nbsp;|&\#\d{{1,5}};)"
        r"|(?P<entity>&(?:gt|lt|amp);)"
        rf"|(?P<slashed>(?<![^\W_])(?:{slashed})(?![^\W_]))"
        r"|(?P<dotted>(?<![^\W_])[^\W\d_](?:\.[^\W\d_])+(?![^\W_]))"
        r"|(?P<number>\d+(?:[.,]\d+)+)"
        r"|(?P<word>[^\W_]+(?:[\u00ad\u200b-\u200d\u2060'\u2019]+[^\W_]+)*)"
        r"|(?P<paragraph>\n[ \t\r]*\n|\n[ \t]*[-*•](?=\s)|\n[ \t]*\d{1,2}[.)](?=\s))"
        r"|(?P<mark>[.;!?:,/&+<>()\[\]])",
        re.IGNORECASE,
    )


def _tokens(text: str, grammar: Grammar) -> Iterator[tuple[str, int, int]]:
    for match in grammar.pattern.finditer(text):
        kind = match.lastgroup
        if kind == "skip":
            continue
        word = match.group()
        if kind == "word":
            word = _spelled(word, grammar)
        elif kind == "dotted":
            word = word.replace(".", "")
        elif kind == "entity":
            word = {"&gt;": ">", "&lt;": "<"}.get(word.lower(), "&")
        elif kind == "paragraph":
            word = "\n\n"
        yield word.lower(), match.start(), match.end()


def _mended(tokens: list[tuple[str, int, int]], text: str, grammar: Grammar) -> Iterator[tuple[str, int, int]]:
    """Tokens with the words joined that a hyphen or the end of a line splits: "pneumo-", "thorax"."""
    at = 0
    while at < len(tokens):
        word, start, end = tokens[at]
        following, begins, ends = tokens[at + 1] if at + 1 < len(tokens) else tokens[at]
        if not (word in grammar.words and following in grammar.words) and _BREAK.fullmatch(text, end, begins):
            whole = grammar.misspellings.get(word + following, word + following)
            if whole in grammar.words:
                word, end = whole, ends
                at += 1
        yield word, start, end
        at += 1


# Bounded, to keep matching linear in the text.
_BREAK = re.compile(r"-|[ \t\r]{0,8}[-\u2010\u2011]?[ \t\r]{0,8}\n[ \t\r]{0,40}")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060]")


@lru_cache(maxsize=65536)
def _plain(word: str) -> str:
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", word)).lower().replace("\u2019", "'")


def _spelled(word: str, grammar: Grammar) -> str:
    word = _plain(word)
    if word in grammar.words:
        return word
    if word in grammar.misspellings:
        return grammar.misspellings[word]
    if word.endswith("'s") and word[:-2] in grammar.words:
        return word[:-2]
    if not FUZZY_LENGTH <= len(word) <= 24:
        return word
    return next((grammar.near[form] for form in _forms(word) if form in grammar.near), word)


def _forms(word: str) -> Iterator[str]:
    yield word
    yield from (word[:k] + word[k + 1 :] for k in range(1, len(word)))


def _swaps(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Short words of place with two neighboring letters swapped; `near` finds the longer ones."""
    sides = [word for word, entry in entries.items() if entry.kind == "side" and len(word) == 4]
    zones = [word for word, entry in entries.items() if entry.kind in ("side", "zone", "zone_adjective")]
    short = sides + [word for word in zones if 5 <= len(word) < FUZZY_LENGTH and word.isalpha()]
    return {word[:k] + word[k + 1] + word[k] + word[k + 2 :]: word for word in short for k in range(len(word) - 1)}


def _deletions(words: Iterable[str]) -> dict[str, str]:
    """Words by all their forms with at most one letter left out (not the first), for lookups without a search."""
    near: dict[str, str] = {}
    for word in sorted(words):
        if len(word) >= FUZZY_LENGTH:
            for form in _forms(word):
                near.setdefault(form, word)
    return near
