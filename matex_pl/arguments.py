"""Checks of arguments, and imports for classes that a command line can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import inf
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError with a list of the choices if the value is not one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_choices(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Apply `check_choice` to all arguments with a `Literal` type hint, as parsers do for the command line and YAML.

    Args:
        function: Function, or the `__init__` of a class.
        values: Arguments by name: `locals()` at the beginning of the function.
    """
    for name, (choices, types) in _literals(function).items():
        value = values[name]
        # The type hint `float` accepts whole numbers too.
        if value not in choices and not isinstance(value, (*types, int) if float in types else types):
            kinds = [f"any {kind.__name__}" for kind in types if kind is not NoneType]
            raise ValueError(f"{name} must be one of {', '.join([*choices, *kinds])}, got {value!r}.")


@cache
def _literals(function: Callable[..., Any]) -> dict[str, tuple[tuple[str, ...], tuple[type, ...]]]:
    """Choices of each argument that has a `Literal` in its type hint, and the types of its other values."""
    literals = {}
    for name, hint in get_type_hints(function).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
        if choices:
            literals[name] = choices, tuple(part for part in parts if get_origin(part) is not Literal)
    return literals


def check_positive(**numbers: float) -> None:
    """Raise ValueError, with name and value, if a number is not finite and greater than 0."""
    for name, value in numbers.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be a number greater than 0, got {value}.")


def import_all(package: ModuleType) -> None:
    """Import all public names of a package, so jsonargparse finds its classes by their short names."""
    for name in package.__all__:
        getattr(package, name)
