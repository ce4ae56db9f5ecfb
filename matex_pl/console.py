"""Text for a terminal: messages, progress bars, times and tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


_HANDLER = _AboveBars()


def show_messages() -> None:
    """Write the messages of the package's loggers to standard error, from INFO on, as the command line does.

    A program that imports the package sets its own handlers and levels, on the logger `matex_pl` or above it.
    """
    logger = logging.getLogger("matex_pl")
    logger.setLevel(logging.INFO)
    logger.addHandler(_HANDLER)
    # The root logger gets a handler when a library writes to it, and would show each message a second time.
    logger.propagate = False


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar on a terminal once they take more than two seconds, also beneath the bars of a Trainer.

    Args:
        items: The items, or the results of a pool as they come.
        title: Text in front of the bar.
        total: Number of the items, if they have no length.
    """
    return tqdm(items, desc=title, total=total, delay=2, leave=False, disable=None)


def duration(seconds: float) -> str:
    """A time no more precise than an estimate: `42 s`, `7 min`, `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def text_table(rows: Sequence[Sequence[object]], align: str = "<") -> list[str]:
    """Lines of a table: the first column to the left, the others to the left (`<`) or the right (`>`)."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{!s:{align if place else '<'}{width}}}" for place, width in enumerate(widths))
    return [template.format(*row).rstrip() for row in rows]
