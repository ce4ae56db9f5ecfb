"""Phrase with its words shaded by relevance."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageDraw

from matex_pl.visualization.draw import (
    DARK_INK,
    FAINT_INK,
    INK,
    Color,
    Page,
    check_unit_range,
    cut,
    font,
    on_background,
    single_line,
)

# Pictures do not need torch.
if TYPE_CHECKING:
    from matex_pl.maps import Word


@dataclass(frozen=True)
class Piece:
    """A word or a run of punctuation, its shade in [0, 1], and whether it stands after a space."""

    text: str
    relevance: float
    after_space: bool
    # Whether the piece is struck through.
    struck: bool = False


# Space between words as a share of the font size, wide enough to separate the shades of two neighbors.
BLANK = 0.5


def phrase_pieces(phrase: str, words: Sequence[Word]) -> list[Piece]:
    """Words and punctuation of the phrase as written, each word with one shade, punctuation with none.

    An ellipsis replaces the end of a phrase that is cut to the model's context length. Without words, the pieces are
    the phrase between its spaces.

    Args:
        phrase: Phrase in the user's spelling.
        words: Words of the phrase with their shares, from `Attribution.words`.
    """
    pieces: list[Piece] = []
    end = 0
    for word, shade in zip(words, shades(words), strict=True):
        pieces += _pieces(phrase, end, word.start, 0.0)
        if word.cut and not word.share:
            return [*pieces, Piece("…", 0.0, True)]
        pieces += _pieces(phrase, word.start, word.end, shade)
        end = word.end
    return pieces + _pieces(phrase, end, len(phrase), 0.0)


def _pieces(phrase: str, start: int, end: int, shade: float) -> list[Piece]:
    """Pieces of a part of the phrase, broken at spaces."""
    spans = [(start + found.start(), single_line(found.group())) for found in re.finditer(r"\S+", phrase[start:end])]
    return [Piece(text, shade, phrase[max(at - 1, 0) : at].isspace()) for at, text in spans if text]


def shades(words: Sequence[Word]) -> list[float]:
    """Share of each word relative to the largest share, in [0, 1]."""
    largest = max((word.share for word in words), default=0) or 1
    return [word.share / largest for word in words]


def check_words(words: Sequence[Word], phrase: str, name: str = "words") -> None:
    """Refuse words of another phrase, and shares outside of [0, 1]."""
    for word in words:
        if phrase[word.start : word.end] != word.text:
            raise ValueError(
                f"{name} must be those of the phrase, got {word.text!r} at {word.start} to {word.end} of {phrase!r}."
            )
    check_unit_range(np.asarray([word.share for word in words], np.float32), f"Shares of {name}")


def wrap(pieces: Iterable[Piece], room: float, size: int, max_lines: int) -> list[list[Piece]]:
    """Lines in a font of `size` pixels, at most `room` wide, broken between words, with an ellipsis for the rest."""
    lines: list[list[Piece]] = []
    for word in _words(pieces, room, size):
        if lines and line_length([*lines[-1], *word], size) <= room:
            lines[-1].extend(word)
        elif len(lines) < max_lines:
            lines.append(list(word))
        else:
            ending = Piece("…", 0.0, False)
            while lines[-1] and line_length([*lines[-1], ending], size) > room:
                lines[-1].pop()
            lines[-1].append(ending)
            break
    return lines


def _words(pieces: Iterable[Piece], room: float, size: int) -> Iterator[list[Piece]]:
    """Pieces grouped by word; a word wider than `room` is broken between its pieces, and a wider piece is cut."""
    word: list[Piece] = []
    for piece in [*pieces, Piece("", 0.0, True)]:
        if word and piece.after_space:
            too_wide = line_length(word, size) > room
            yield from [[replace(part, text=cut(part.text, room, size))] for part in word] if too_wide else [word]
            word = []
        word.append(piece)


def line_length(line: Sequence[Piece], size: int) -> float:
    """Width of a line in pixels."""
    blanks = sum(piece.after_space for piece in line[1:])
    return blanks * BLANK * size + sum(font(size).getlength(piece.text) for piece in line)


def phrase_lines(page: Page, pieces: Iterable[Piece], room: float, max_lines: int) -> list[list[Piece]]:
    """Pieces in at most `max_lines` lines of `room` pixels, as input of `write_phrase`."""
    return wrap(pieces, room - 2 * page.px(3), page.px(18), max_lines)


def write_phrase(
    draw: ImageDraw.ImageDraw, page: Page, lines: Sequence[Sequence[Piece]], corner: tuple[int, int]
) -> None:
    """Write lines of pieces on their shades, the first line at `corner` (left, top)."""
    pad, size = page.px(3), page.px(18)
    for row, line in enumerate(lines):
        x, top = float(corner[0] + pad), corner[1] + row * page.line_height
        for index, piece in enumerate(line):
            begins = index == 0 or piece.after_space
            ends = index + 1 == len(line) or line[index + 1].after_space
            x += BLANK * size * (begins and index > 0)
            length, shade = font(size).getlength(piece.text), _shade(piece.relevance)
            # The shade of a word reaches a little beyond its ends.
            left, right = round(x - pad * begins), round(x + length + pad * ends) - 1
            draw.rectangle((left, top, right, top + page.px(28)), shade)
            ink = FAINT_INK if piece.struck else ink_on(shade)
            draw.text((x, top + page.px(21)), piece.text, ink, font(size), anchor="ls")
            if piece.struck:
                draw.line((x, top + page.px(15), x + length, top + page.px(15)), ink, page.px(2))
            x += length


def _shade(value: float) -> Color:
    """Color of `value` on the background."""
    red, green, blue = on_background(np.array([[value]], np.float32))[0, 0].tolist()
    return red, green, blue


def ink_on(shade: Color) -> Color:
    """Light or dark ink, whichever has more contrast to `shade`."""
    return max(INK, DARK_INK, key=lambda ink: contrast(ink, shade))


def contrast(a: Color, b: Color) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    """WCAG 2 relative luminance in [0, 1]."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
