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

# Types in messages of jsonargparse.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "Iterable": "a list",
    "NoneType": "null",
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
        rule: Valid values in words; empty if the message names none.
        value: The value as text; None if the message names none.
        class_paths: Paths of the classes that the setting may belong to.
        no_class: Name in the value that no class has; empty if there is none.
    """

    name: str
    is_unknown: bool = False
    rule: str = ""
    value: str | None = None
    class_paths: tuple[str, ...] = ()
    no_class: str = ""


def fault(message: str) -> Fault:
    """Fault of a setting from a message of jsonargparse."""
    keys = list(re.finditer(r'^( *)(?:- )?Parser key "([^"]+)"', message, re.MULTILINE))
    unknown = re.findall(r"[Oo]ption '([^']+)'", message)
    names = [key[2] for key in keys] + re.findall(r"Group '([^']+)'", message) + unknown[-1:]
    lines = message.splitlines()
    if keys:
        # The lines of the innermost setting. The levels above it expect other types.
        lines = message[keys[-1].end() :].splitlines()[1:]
        deeper = [len(line) - len(line.lstrip()) > len(keys[-1][1]) or not line for line in lines]
        lines = lines[: deeper.index(False) if False in deeper else None]
    innermost = "\n".join(lines)
    no_class = re.search(r"Expected a dot import path string: ([^\W\d][\w.]*)$", innermost, re.MULTILINE)
    values = re.findall(r"Got value: (.+)", innermost) or re.findall(r"Given value: (.+)", innermost)
    return Fault(
        name=".".join(dict.fromkeys(name.removeprefix("init_args.") for name in names if name != "config")),
        is_unknown=bool(unknown),
        rule=_rule(re.findall(r"Expected an? (.+?)(?:\.? Got value: .*)?$", innermost, re.MULTILINE)),
        value=values[-1] if values else None,
        class_paths=tuple(re.findall(r"class_path '([\w.]+)'", message)),
        no_class=no_class[1] if no_class else "",
    )


def _rule(expected: Sequence[str]) -> str:
    """Valid values in words, from the types that jsonargparse expected."""
    choices: list[str] = []
    kinds: list[str] = []
    for text in expected:
        literal, kind = re.search(r"Literal\[(.+)\]", text), re.search(r"^<class '(?:.*\.)?(\w+)'>", text)
        if literal:
            choices += literal[1].split(", ")
        elif kind:
            kinds.append(_KINDS.get(kind[1], kind[1]))
        elif text.startswith("dot import path"):
            kinds.append("a class")
    listed = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    return " or ".join(dict.fromkeys([*listed, *kinds]))


def import_all(package: ModuleType) -> None:
    """Import all public names of a package, so jsonargparse finds its classes by their short names."""
    for name in package.__all__:
        getattr(package, name)
