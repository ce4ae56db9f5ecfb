"""Arguments: their checks, and the classes that a command line can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import inf
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError, which lists the choices, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_choices(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """`check_choice` of all arguments with a `Literal` type hint, as parsers do for the command line and YAML.

    Args:
        function: A function, or the `__init__` of a class.
        values: The arguments by name: `locals()` at the beginning of the function.
    """
    for name, (choices, types) in _literals(function).items():
        value = values[name]
        # As a type hint, `float` takes whole numbers too.
        if value not in choices and not isinstance(value, (*types, int) if float in types else types):
            kinds = [f"any {kind.__name__}" for kind in types if kind is not NoneType]
            raise ValueError(f"{name} must be one of {', '.join([*choices, *kinds])}, got {value!r}.")


@cache
def _literals(function: Callable[..., Any]) -> dict[str, tuple[tuple[str, ...], tuple[type, ...]]]:
    """The choices of each argument that has a `Literal` in its type hint, and the types of its other values."""
    literals = {}
    for name, hint in get_type_hints(function).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
        if choices:
            literals[name] = choices, tuple(part for part in parts if get_origin(part) is not Literal)
    return literals


def check_positive(**numbers: float) -> None:
    """Raise ValueError, with name and value, for a number that is not finite and greater than 0."""
    for name, value in numbers.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be a number greater than 0, got {value}.")


def import_all(package: ModuleType) -> None:
    """Import all public names of a package: jsonargparse finds a class by its short name once it is imported."""
    for name in package.__all__:
        getattr(package, name)
