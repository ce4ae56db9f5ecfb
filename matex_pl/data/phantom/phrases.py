"""Report sentences about a finding, true for the image they are written for."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from matex_pl.data.phantom.devices import Device
from matex_pl.data.phantom.image import PlacedFinding

_SHARE_PLACED = 0.9
_SHARE_WITH_NORMAL = 0.2
_SHARE_WITH_DEVICE = 0.2
TEMPLATES = Path(__file__).with_name("phrases.yaml")


def write_phrase(
    finding: PlacedFinding,
    rng: np.random.Generator,
    *,
    image_findings: Collection[str] = (),
    device: Device | None = None,
) -> str:
    """One or two sentences below 30 words that name the finding, nine times in ten with its side and zone.

    Args:
        finding: Subject of the phrase.
        rng: Random numbers for the wording.
        image_findings: Names of all findings on the image; no sentence denies one of them.
        device: The device on the image, which a sentence may mention.
    """
    sentences = [_capital(_finding_sentence(finding, rng))]
    if rng.random() < _SHARE_WITH_NORMAL:
        place, present = int(rng.integers(2)), {finding.name, *image_findings}
        normal = [text for text, denied in _templates()["normal"] if not set(denied) & present]
        sentences.insert(place, str(_pick(normal, rng)))
    elif device and rng.random() < _SHARE_WITH_DEVICE:
        sentences.append(_capital(str(_pick(_templates()["devices"][device.name], rng)).format(side=device.side)))
    return " ".join(sentences)


@lru_cache(maxsize=1)
def _templates() -> Any:
    return yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))


def _pick(options: list[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]


def _finding_sentence(finding: PlacedFinding, rng: np.random.Generator) -> str:
    templates = _templates()
    entry, where = templates["findings"][finding.name], f"{finding.side} {finding.zone}"
    size = _pick(templates["sizes"][entry["sizes"]][finding.size], rng) if finding.size else ""
    placed = [(text, templates["places"][kind]) for text, kind in entry["placed"]]
    placed = [(text, places[where]) for text, places in placed if where in places]
    if not placed or rng.random() >= _SHARE_PLACED:
        return _with_article(str(_pick(entry["bare"], rng)).format(size=size))
    text, places = _pick(placed, rng)
    return _with_article(text.format(size=size, place=_pick(places, rng)))


def _with_article(sentence: str) -> str:
    """The sentence with "an" where a vowel follows, and without an article before a plural."""
    for vowel in "aeiou":
        sentence = sentence.replace(f" a {vowel}", f" an {vowel}")
    if "There is a bilateral" in sentence or ("bilateral" in sentence and sentence.startswith("There is a ")):
        sentence = sentence.replace("There is a ", "There are ").replace("effusion", "effusions")
    return sentence


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
