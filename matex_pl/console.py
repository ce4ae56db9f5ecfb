"""Text for a terminal: messages, progress bars, times and tables."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

log = logging.getLogger(__name__)

_SILENT_SECONDS = 2.0
_MESSAGE_SECONDS = 60.0


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


_HANDLER = _AboveBars()


def show_messages() -> None:
    """Write the messages of the package's loggers, INFO and above, to standard error.

    The command line calls this. A program that imports the package sets its own handlers and levels, on the logger
    `matex_pl` or on a parent of it.
    """
    logger = logging.getLogger("matex_pl")
    logger.setLevel(logging.INFO)
    logger.addHandler(_HANDLER)
    # Once a library logs to the root logger, that one has a handler, which would print each message again.
    logger.propagate = False


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a progress bar on a terminal if they take more than two seconds; elsewhere with messages.

    The messages come after two seconds, and then once a minute.

    The bar also works while a Trainer shows its own bars.

    Args:
        items: Items, or an iterator such as the results of a pool.
        title: Text in front of the bar.
        total: Number of items, for iterators without a length.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, desc=title, total=total, delay=_SILENT_SECONDS, leave=False)
    return _with_messages(items, title, len(items) if total is None and isinstance(items, Sized) else total)


def _with_messages(items: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
    """The items, with a message once they have taken two seconds, and one per minute from then on."""
    start = time.monotonic()
    due = start + _SILENT_SECONDS
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now > due and (total is None or number < total):
            due = now + _MESSAGE_SECONDS
            left = (
                ""
                if total is None
                else f" of {total}, about {duration((now - start) / number * (total - number))} left"
            )
            log.info("%s: %d%s", title, number, left)


def duration(seconds: float) -> str:
    """A duration, rounded as for an estimate: `42 s`, `7 min`, `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def text_table(rows: Sequence[Sequence[object]], align: str = "<") -> list[str]:
    """Lines of a plain-text table: first column left-aligned, the others left (`<`) or right (`>`)."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{!s:{align if place else '<'}{width}}}" for place, width in enumerate(widths))
    return [template.format(*row).rstrip() for row in rows]
