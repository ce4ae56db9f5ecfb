"""A phrase whose words are shaded by their relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ImageDraw

from matex_pl.visualization.draw import (
    DARK_INK,
    INK,
    Colour,
    Page,
    _check_unit_range,
    clean,
    cut,
    font_for,
    on_background,
)


@dataclass(frozen=True)
class Piece:
    """A word piece as it is shown.

    Args:
        text: Readable, without the tokenizer's marks.
        relevance: In [0, 1].
        after_space: It begins a word.
    """

    text: str
    relevance: float
    after_space: bool


def phrase_pieces(phrase: str, tokens: Sequence[str], relevance: Sequence[float]) -> list[Piece]:
    """Pieces that read like the phrase: in its case and spacing where the tokens are found in it, else by their marks.

    An ellipsis ends a phrase that goes on after its last token (cut at the model's context length). Without tokens the
    words of the phrase stand alone, of relevance 0.
    """
    if not tokens:
        return [Piece(word, 0.0, True) for word in clean(phrase).split()]
    marked = _split_marks(tokens)
    line = clean(phrase)
    found = _find_in(line, [text for text, _ in marked])
    pairs = zip(found or marked, relevance, strict=True)
    pieces = [Piece(text, float(value), after_space) for (text, after_space), value in pairs if text]
    shown = sum(len(text) + after_space for text, after_space in found or ())
    return [*pieces, Piece("…", 0.0, False)] if found and shown < len(line) else pieces


def _split_marks(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Each token as (readable text, begins a word), by the marks of whichever tokenizer it came from."""
    if any(token.endswith("</w>") for token in tokens):
        begins = [True, *(token.endswith("</w>") for token in tokens[:-1])]
    elif any(token.startswith(("▁", "Ġ")) for token in tokens):
        begins = [token.startswith(("▁", "Ġ")) for token in tokens]
    else:
        begins = [not token.startswith("##") for token in tokens]
    texts = [clean(_decode_bytes(_strip_marks(token))) for token in tokens]
    return [(text, begin and text[:1] not in (*".,;:!?)]%",)) for text, begin in zip(texts, begins, strict=True)]


def _strip_marks(token: str) -> str:
    """The token without `</w>`, `##`, `▁` and `Ġ`."""
    bare = token.removesuffix("</w>").lstrip("▁Ġ")
    return bare[2:] if len(bare) > 2 and bare.startswith("##") else bare


def _find_in(phrase: str, texts: Sequence[str]) -> list[tuple[str, bool]] | None:
    """The texts as the phrase spells them, each with whether a space stands before; None if it does not begin so."""
    found, position, lowered = [], 0, phrase.lower()
    if len(lowered) != len(phrase):
        return None
    for text in texts:
        spaced = lowered.startswith(" ", position)
        position += spaced
        if not lowered.startswith(text.lower(), position):
            return None
        found.append((phrase[position : position + len(text)], spaced))
        position += len(text)
    return found


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE (GPT-2, CLIP) writes the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decode_bytes(text: str) -> str:
    """Byte-level BPE text as Unicode; text that is no such thing comes back as it is."""
    alphabet = _byte_alphabet()
    if text.isascii() or not all(character in alphabet for character in text):
        return text
    try:
        return bytes(alphabet[character] for character in text).decode("utf-8")
    except UnicodeDecodeError:
        return text


def check_relevance(relevance: Sequence[float], count: int, name: str = "relevance") -> list[float]:
    """`relevance` as `count` floats in [0, 1]."""
    array = np.asarray(relevance, dtype=np.float32)
    if array.shape != (count,):
        raise ValueError(f"{name} must be one value per token: got shape {array.shape} for {count} tokens.")
    _check_unit_range(name, array)
    return array.clip(0, 1).tolist()


def _shade(value: float) -> Colour:
    """The colour of `value` on the panel's own background."""
    red, green, blue = on_background(np.array([[value]], np.float32))[0, 0].tolist()
    return red, green, blue


def _ink_on(shade: Colour) -> Colour:
    """Light or dark ink, whichever stands out more from `shade` (WCAG contrast ratio)."""
    return max(INK, DARK_INK, key=lambda ink: _contrast(ink, shade))


def _contrast(a: Colour, b: Colour) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Colour) -> float:
    """WCAG 2 relative luminance in [0, 1]."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def write_phrase(
    draw: ImageDraw.ImageDraw,
    page: Page,
    pieces: Sequence[Piece],
    corner: tuple[int, int],
    room: float,
    max_lines: int,
) -> None:
    """The pieces in reading order on at most `max_lines` lines of `room` pixels, the first at `corner` (left, top)."""
    font, pad, (left, top) = font_for(page.px(20), "".join(piece.text for piece in pieces)), page.px(3), corner
    for row, line in enumerate(wrap(pieces, font, room - 2 * pad, max_lines)):
        _write_line(draw, page, line, (left + pad, top + row * page.line_height), font)


def _write_line(
    draw: ImageDraw.ImageDraw, page: Page, line: Sequence[Piece], corner: tuple[int, int], font: Any
) -> None:
    """One line of pieces, each on its shade; the shade of a word reaches a little beyond its ends."""
    x, top, pad = float(corner[0]), corner[1], page.px(3)
    bottom, baseline = top + page.px(28), top + page.px(21)
    for index, piece in enumerate(line):
        begins = index == 0 or piece.after_space
        ends = index + 1 == len(line) or line[index + 1].after_space
        x += blank(font) * (begins and index > 0)
        length, shade = font.getlength(piece.text), _shade(piece.relevance)
        draw.rectangle((round(x - pad * begins), top, round(x + length + pad * ends) - 1, bottom), shade)
        draw.text((x, baseline), piece.text, _ink_on(shade), font, anchor="ls")
        x += length


def wrap(pieces: Sequence[Piece], font: Any, room: float, max_lines: int) -> list[list[Piece]]:
    """Lines no wider than `room`, broken between words; what does not fit on `max_lines` gives way to an ellipsis."""
    lines: list[list[Piece]] = [[]]
    for word in _words(pieces, font, room):
        if lines[-1] and _line_length([*lines[-1], *word], font) > room:
            lines.append([])
        lines[-1].extend(word)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], _end_line(lines[max_lines - 1], font, room)]


def _words(pieces: Sequence[Piece], font: Any, room: float) -> list[list[Piece]]:
    """Pieces grouped by word; a word wider than `room` falls into its pieces, and a piece wider than `room` is cut."""
    words: list[list[Piece]] = []
    for piece in pieces:
        if piece.after_space or not words:
            words.append([])
        words[-1].append(piece)
    groups: list[list[Piece]] = []
    for word in words:
        if _line_length(word, font) > room:
            groups.extend([replace(piece, text=cut(piece.text, font, room))] for piece in word)
        else:
            groups.append(word)
    return groups


def _end_line(line: Sequence[Piece], font: Any, room: float) -> list[Piece]:
    """The line with an ellipsis, after as many of its pieces as leave room for it."""
    kept, ending = list(line), Piece("…", 0.0, False)
    while kept and _line_length([*kept, ending], font) > room:
        kept.pop()
    return [*kept, ending]


def _line_length(line: Sequence[Piece], font: Any) -> float:
    """Width of a line in pixels."""
    blanks = sum(piece.after_space for piece in line[1:])
    return blanks * blank(font) + sum(font.getlength(piece.text) for piece in line)


def blank(font: Any) -> float:
    """The space between words in pixels, wide enough to part the shades of two neighbours."""
    return 0.45 * font.size
