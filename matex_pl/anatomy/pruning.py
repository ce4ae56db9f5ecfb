"""Phrases without their words of size and certainty."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml


def prune_phrase(phrase: str) -> str:
    """The phrase without its words of size and certainty; unchanged if it has none, or if no other word is left.

    "A small to moderate effusion, likely parapneumonic." becomes "A effusion, parapneumonic." Words behind a negation
    stay: without its size, "no large effusion" would deny any. The words are in `pruning.yaml`. Published procedures of
    phrase grounding leave out such words, because they name no place.
    """
    pruned, count = _words().subn(" ", phrase)
    if not count:
        return phrase
    pruned = re.sub(r"\s+([,.;:!?)]|$)", r"\1", " ".join(pruned.split()).replace("( )", ""))
    # Commas that stand at an end, or next to another sign.
    pruned = re.sub(r"^[\s,.;:]+|,(?=[,.;:)]|$)", "", pruned)
    return pruned if re.search(r"\w", pruned) else phrase


@cache
def _words() -> re.Pattern[str]:
    """Pattern of all words, alone or as a range ("small to moderate"); longer entries come first.

    A part of a hyphenated word is none.
    """
    terms = yaml.safe_load(Path(__file__).with_name("pruning.yaml").read_text(encoding="utf-8"))
    degrees, negations = (terms.pop(group) for group in ("degree", "negation"))
    entries = sorted((term for group in terms.values() for term in group), key=len, reverse=True)
    joined = "|".join(re.escape(entry).replace(r"\ ", r"[\s-]+") for entry in entries)
    word = rf"(?:(?:{'|'.join(degrees)})\s+)?(?:{joined})"
    affirmed = "".join(rf"(?<!\b{negation}\s)" for negation in negations)
    span = rf"{word}(?:[\s-]*(?:/|\b(?:to|or|and)\b)[\s-]*{word})*"
    return re.compile(rf"(?<![\w/-]){affirmed}{span}(?![\w/-])", re.IGNORECASE)
