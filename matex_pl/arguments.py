"""Checks of arguments, and imports for classes that a command line can name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, signature
from math import inf
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "List": "a list",
    "list": "a list",
    "dict": "a mapping",
    "None": "null",
    "<class 'NoneType'>": "null",
}


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
            rule = "finite" if value == inf else "a number greater than 0"
            raise ValueError(f"{name} must be {rule}, got {value}.")


def argument_names(kind: type) -> Iterator[str]:
    """Names of a class's arguments, including arguments passed to a parent class through `**kwargs`."""
    for parent in kind.__mro__:
        parameters = list(signature(parent).parameters.values())
        yield from (part.name for part in parameters if part.kind is not Parameter.VAR_KEYWORD)
        # Only `**kwargs` passes arguments to the next class.
        if all(part.kind is not Parameter.VAR_KEYWORD for part in parameters):
            return


def nearest(name: str, known: Sequence[str]) -> str:
    """Sentence that names the most similar of the known names; empty if none is similar."""
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return f" Nearest: {', '.join(near)}." if near else ""


class Fault(NamedTuple):
    """Fault of a setting, read from a message of jsonargparse, which spreads it over the levels of the settings.

    Attributes:
        name: Dotted name of the setting; empty if the message names none.
        is_unknown: Whether no setting has this name.
        rule: Types of its values in words; empty if the message names none.
        value: The value as text; None if the message names none.
        class_path: Path of the class that the setting belongs to; empty if it belongs to none.
    """

    name: str
    is_unknown: bool
    rule: str
    value: str | None
    class_path: str


def fault(message: str) -> Fault:
    """Fault of a setting from a message of jsonargparse."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.findall(r"[Oo]ption '([^']+)'", message)
    groups = re.findall(r"Group '([^']+)'", message)
    names = [key.removeprefix("init_args.") for key in [*keys, *groups, *unknown[-1:]] if key != "config"]
    # The levels above expected other types.
    innermost = message.rpartition("Parser key")[2]
    expected = re.findall(r"Expected an? ([^\n]+?)(?:\.? Got value|\.?$)", innermost, re.MULTILINE)
    values = re.findall(r"Got value: (.+)", innermost)
    paths = re.findall(r"class_path '([\w.]+)'", message)
    return Fault(
        name=".".join(dict.fromkeys(names)),
        is_unknown=bool(unknown),
        rule=" or ".join(dict.fromkeys(map(_kind, expected))),
        value=values[-1] if values else None,
        class_path=paths[-1] if paths else "",
    )


def _kind(text: str) -> str:
    literal = re.search(r"Literal\[(.+)\]", text)
    return f"one of {literal[1]}" if literal else _KINDS.get(text, text)


def import_all(package: ModuleType) -> None:
    """Import all public names of a package, so jsonargparse finds its classes by their short names."""
    for name in package.__all__:
        getattr(package, name)
