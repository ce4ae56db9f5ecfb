"""A phrase with the patient's sides exchanged, to see whether a map follows the side that is named."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from matex_pl.anatomy.lexicon import Term, shipped_grammar
from matex_pl.anatomy.parser import parse_phrase, patient_sides
from matex_pl.anatomy.regions import shipped_regions

_OTHER = {"right": "left", "left": "right", "r": "l", "l": "r"}
_WORD = re.compile(r"[^\W_]+")


def swap_sides(phrase: str) -> str:
    """The phrase with right and left of the patient exchanged, also where something is denied there.

    Case and punctuation stay ("RLL" gives "LLL"), a misspelled side comes out well spelled. What has no counterpart
    ("RML", "bilateral"), what only looks like a side ("left in place") and the side of a device or vessel ("right chest
    port") stay as they are; the parser is the judge of that.
    """
    for term in reversed(patient_sides(phrase)):
        if term.text in _counterparts():
            phrase = phrase[: term.start] + _exchanged(phrase, term) + phrase[term.end :]
    return phrase


# Two parses of some milliseconds, and the same phrases come with every validation and every setting.
@lru_cache(maxsize=65536)
def named_side(phrase: str) -> str:
    """`right` or `left` where the phrase names regions on that side only and `swap_sides` mirrors them, else empty.

    So it is empty for the middle lobe, the lingula, the heart, what lies in the midline or on both sides, and a phrase
    that names no region.
    """
    regions, table = parse_phrase(phrase).regions, shipped_regions()
    sides = {region.side for region in regions}
    if sides not in ({"right"}, {"left"}):
        return ""
    mirrored = {table[region.zone].get(_OTHER[region.side]) for region in regions}
    return sides.pop() if parse_phrase(swap_sides(phrase)).regions == mirrored else ""


@cache
def _counterparts() -> dict[str, tuple[str, str]]:
    """For all words of a side that have a counterpart: what they begin with, and what that turns into."""
    entries = shipped_grammar().entries
    counterparts = {}
    for words, entry in entries.items():
        begins = next((side for side in _OTHER if words.startswith(side)), "")
        if entry.sides in (("right",), ("left",)) and begins:
            other = entries.get(_OTHER[begins] + words[len(begins) :])
            # Words that are written out need no entry of their own: "left upper lobar" is read word by word.
            if other == entry._replace(sides=(_OTHER[entry.sides[0]],)) or (other is None and len(begins) > 1):
                counterparts[words] = begins, _OTHER[begins]
    return counterparts


def _exchanged(phrase: str, term: Term) -> str:
    """What stands at the term in the original text, as it was but for the side."""
    said = phrase[term.start : term.end]
    begins, other = _counterparts()[term.text]
    if not said.lower().startswith(begins):
        # A misspelled side: its word, which ends at a blank or hyphen where the term has more words, is written anew.
        first = term.text.split()[0]
        word = _WORD.match(said) if first != term.text else None
        other, begins = other + first[len(begins) :], word.group() if word else said
    replaced, kept = said[: len(begins)], said[len(begins) :]
    if replaced.isupper():
        return other.upper() + kept
    return (other.capitalize() if replaced[0].isupper() else other) + kept
