"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """The items, with a bar on a terminal once they take more than two seconds, also beneath the bars of a Trainer."""
    return tqdm(items, desc=title, delay=2, leave=False, disable=None)
