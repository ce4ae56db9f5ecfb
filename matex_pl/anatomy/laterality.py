"""Swapping of the patient's sides in a phrase, to test whether a map follows the named side."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from matex_pl.anatomy.lexicon import Term, shipped_grammar
from matex_pl.anatomy.parser import parse_phrase, patient_sides
from matex_pl.anatomy.regions import shipped_regions

_OTHER = {"right": "left", "left": "right", "r": "l", "l": "r"}
_WORD = re.compile(r"[^\W_]+")


def swap_sides(phrase: str) -> str:
    """The phrase with right and left of the patient swapped, also in denials.

    Case and punctuation stay ("RLL" becomes "LLL"), and misspelled sides are corrected. The following stay unchanged,
    as the parser reads them:

    - words without a counterpart ("RML", "bilateral");
    - words that only look like a side ("left in place");
    - the side of a device or vessel ("right chest port").
    """
    for term in reversed(patient_sides(phrase)):
        if term.text in _counterparts():
            phrase = phrase[: term.start] + _exchanged(phrase, term) + phrase[term.end :]
    return phrase


# Cached, because the same phrases return in every validation and every setting.
@lru_cache(maxsize=65536)
def named_side(phrase: str) -> str:
    """`right` or `left` if the phrase names regions on that side only and `swap_sides` mirrors them, else empty.

    The result is therefore empty for the middle lobe, the lingula, the heart, and places in the midline or on both
    sides. It is also empty for phrases that name no region.
    """
    regions, table = parse_phrase(phrase).regions, shipped_regions()
    sides = {region.side for region in regions}
    if sides not in ({"right"}, {"left"}):
        return ""
    mirrored = {table[region.zone].get(_OTHER[region.side]) for region in regions}
    return sides.pop() if parse_phrase(swap_sides(phrase)).regions == mirrored else ""


# Cached for the same reason.
@lru_cache(maxsize=65536)
def side_words(phrase: str) -> tuple[tuple[int, str], ...]:
    """Place of the first character of each word that names a side of the patient, and the side, `right` or `left`.

    The words are those that `swap_sides` exchanges ("left", "RLL"), at places that the phrase does not deny.
    """
    spans = parse_phrase(phrase).spans
    return tuple(
        (term.start, term.sides[0])
        for term in patient_sides(phrase)
        if term.text in _counterparts() and any(start <= term.start < end for start, end in spans)
    )


@cache
def _counterparts() -> dict[str, tuple[str, str]]:
    """Beginning, and its replacement, of all words of a side that have a counterpart."""
    entries = shipped_grammar().entries
    counterparts = {}
    for words, entry in entries.items():
        begins = next((side for side in _OTHER if words.startswith(side)), "")
        if entry.sides in (("right",), ("left",)) and begins:
            other = entries.get(_OTHER[begins] + words[len(begins) :])
            # Words that are written out need no entry: "left upper lobar" is read word by word.
            if other == entry._replace(sides=(_OTHER[entry.sides[0]],)) or (other is None and len(begins) > 1):
                counterparts[words] = begins, _OTHER[begins]
    return counterparts


def _exchanged(phrase: str, term: Term) -> str:
    """Original text of a term with only the side exchanged."""
    said = phrase[term.start : term.end]
    begins, other = _counterparts()[term.text]
    if not said.lower().startswith(begins):
        # A misspelled side is replaced whole; in terms of several words it ends at a blank or hyphen.
        first = term.text.split()[0]
        word = _WORD.match(said) if first != term.text else None
        other, begins = other + first[len(begins) :], word.group() if word else said
    replaced, kept = said[: len(begins)], said[len(begins) :]
    if replaced.isupper():
        return other.upper() + kept
    return (other.capitalize() if replaced[0].isupper() else other) + kept
