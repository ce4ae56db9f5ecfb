"""Run-length encoded masks: pairs of start and length, COCO's counts, and SIIM's relative pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from matex_pl.data.levels import Size, check_size
from matex_pl.data.validation import RuleError, shorten

Runs = str | bytes | Sequence[int]


def decode_pairs(runs: Runs, size: Size) -> np.ndarray:
    """Mask `(h, w)` bool of pairs "start length", row by row, where the first pixel is 1.

    The masks of CheXmask have this form.

    Args:
        runs: Numbers, or their text, separated by spaces; nothing for an empty mask.
        size: Height and width of the mask.

    Raises:
        RuleError: The runs are no pairs of whole numbers, do not ascend, or reach beyond the mask.
    """
    return _mask(_counts_of_pairs(runs, size), size, "row by row")


def check_pairs(runs: Runs, size: Size) -> None:
    """Raise the errors of `decode_pairs`, without the mask."""
    _counts_of_pairs(runs, size)


def decode_relative(runs: Runs, size: Size) -> np.ndarray:
    """Mask `(h, w)` bool of pairs "pixels since the last run, length", column by column; -1 is an empty mask.

    The masks of SIIM-ACR Pneumothorax have this form. Arguments and errors are those of `decode_pairs`.
    """
    is_empty = isinstance(runs, str) and runs.strip() == "-1"
    return _mask(_checked_counts(*_pairs("" if is_empty else runs), size), size, "column by column")


def decode_coco(counts: Runs, size: Size) -> np.ndarray:
    """Mask `(h, w)` bool of COCO: numbers of pixels outside and inside, in turns, column by column.

    Args:
        counts: Numbers, or COCO's compressed text of them.
        size: Height and width of the mask.

    Raises:
        RuleError: The counts are no whole numbers, or their sum is not the number of pixels.
    """
    numbers = _inflated(counts) if isinstance(counts, str | bytes) else _whole(counts)
    check_size(*size)
    if (numbers < 0).any():
        raise RuleError(int(numbers[numbers < 0][0]), "a count of the mask is negative")
    # The sum of few large counts may exceed 64 bits.
    total = sum(numbers.tolist())
    if total != size[0] * size[1]:
        raise RuleError(total, f"the counts do not sum to the {size[0] * size[1]} pixels of {size[1]} x {size[0]}")
    return _mask(numbers, size, "column by column")


def _counts_of_pairs(runs: Runs, size: Size) -> np.ndarray:
    """Numbers of pixels outside and inside, in turns, of pairs of start and length."""
    starts, lengths = _pairs(runs)
    ends = starts - 1 + lengths
    return _checked_counts(starts - 1 - np.append(0, ends[:-1])[: len(starts)], lengths, size)


def _pairs(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """First and second numbers of pairs."""
    text = runs.decode(errors="replace") if isinstance(runs, bytes) else runs
    numbers = _whole(text.split() if isinstance(text, str) else text)
    if len(numbers) % 2:
        raise RuleError(len(numbers), "the number of values is odd, and the runs are pairs of start and length")
    return numbers[::2], numbers[1::2]


def _whole(values: Sequence[Any]) -> np.ndarray:
    """Whole numbers of a few digits as `(N,)` int64."""
    found = []
    for value in values:
        try:
            # Python reads `1_0` as ten, and `True` as one.
            if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
                raise TypeError
            number = int(value)
            if number != (value if isinstance(value, int | float) else number) or abs(number) >= 2**40:
                raise TypeError
        except (TypeError, ValueError, OverflowError):
            raise RuleError(shorten(str(value)), "a run of the mask is not a whole number") from None
        found.append(number)
    return np.array(found, dtype=np.int64)


def _checked_counts(gaps: np.ndarray, lengths: np.ndarray, size: Size) -> np.ndarray:
    """Numbers of pixels outside and inside, in turns, by the pixels before each run and the lengths of the runs."""
    check_size(*size)
    if (lengths < 1).any():
        number = int(np.argmax(lengths < 1)) + 1
        raise RuleError(f"{lengths[number - 1]} in run {number}", "the length of a run of the mask is not positive")
    if (gaps < 0).any():
        number = int(np.argmax(gaps < 0)) + 1
        raise RuleError(f"run {number}", "a run of the mask starts before the end of the run before it")
    counts = np.stack([gaps, lengths], axis=1).ravel()
    rest = size[0] * size[1] - sum(counts.tolist())
    if rest < 0:
        rule = f"the runs of the mask reach beyond the {size[0] * size[1]} pixels of {size[1]} x {size[0]}"
        raise RuleError(f"{-rest} pixels beyond", rule)
    return np.append(counts, rest)


def _mask(counts: np.ndarray, size: Size, order: str) -> np.ndarray:
    """Mask of the numbers of pixels outside and inside, in turns."""
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(size) if order == "row by row" else np.ascontiguousarray(flat.reshape(size[::-1]).T)


def _inflated(text: str | bytes) -> np.ndarray:
    """Counts of COCO's compressed text: six bits per character, and from the fourth count on differences."""
    counts: list[int] = []
    number = place = 0
    for code in text.encode("ascii", "replace") if isinstance(text, str) else text:
        bits = code - 48
        if not 0 <= bits < 64 or place > 60:
            raise RuleError(shorten(str(text)), "the counts are no compressed text of COCO")
        number |= (bits & 0x1F) << place
        place += 5
        if not bits & 0x20:
            # The highest bit of the last character is the sign.
            number -= (bits & 0x10 and 1) << place
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = place = 0
    if place:
        raise RuleError(shorten(str(text)), "the compressed counts of COCO end within a number")
    return _whole(counts)
