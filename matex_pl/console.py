"""Progress bars and times, as people read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """The items, with a bar on a terminal once they take more than two seconds, also beneath the bars of a Trainer."""
    return tqdm(items, desc=title, delay=2, leave=False, disable=None)


def duration(seconds: float) -> str:
    """A time no more precise than an estimate: `42 s`, `7 min`, `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
