"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value of an argument that is not among its choices, listing them.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_positive(**numbers: float) -> None:
    """Refuse arguments that have to be greater than 0.

    Raises:
        ValueError: One is not; the message has its name and value.
    """
    for name, value in numbers.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be a number greater than 0, got {value}.")
