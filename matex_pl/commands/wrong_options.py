"""Messages for wrong options: the option and its value as given, the rule, and the nearest valid options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser

from matex_pl import data
from matex_pl.arguments import Fault, argument_names, fault, nearest
from matex_pl.attribution.shipped import renamed
from matex_pl.commands.refusals import refusal
from matex_pl.files import find_config, read_yaml


class Given(NamedTuple):
    """An option of a command line with its value; None for an option without one."""

    option: str
    value: str | None


def check_values(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Check the values that may name files of settings, before the parser reads the files.

    Raises:
        OSError: A file cannot be read.
        ValueError: A YAML file is none; or the data module or a group of settings is given as another file, or as text.
    """
    groups = parser.groups or {}
    for option, value in _given(words):
        name = option.removeprefix("--")
        if name == "config" or value is None:
            continue
        is_file = Path(value).is_file()
        settings = [setting for setting in _options(parser, f"{option}.") if not setting.endswith(".help")]
        if settings and name in groups and not is_file and not value.lstrip().startswith("{"):
            first = next((setting for setting in settings if setting.endswith(".name")), settings[0])
            raise ValueError(
                f"{option} takes a YAML file of settings, got {value!r}. Give single settings by their names, for "
                f"example {first}."
            )
        if option == "--model" and settings and is_file and value.endswith(".json"):
            raise ValueError(f"--model takes a YAML file of settings. Give the model config as --model.name {value}.")
        if option == "--data" and is_file and not value.endswith((".yaml", ".yml", ".json")):
            raise ValueError(
                f"--data takes the name of a data module or a YAML file, got {value!r}. For a table of images "
                f"give --data ManifestDataModule --data.manifest {value}."
            )
        if is_file and (name in groups or value.endswith((".yaml", ".yml"))):
            read_yaml(value)


def wrong_option(parser: ArgumentParser, words: Sequence[str], message: str, error: Exception | None) -> str:
    """Message for an error of the parser, in one or two sentences.

    Args:
        parser: Parser of the command.
        words: Words of the command line.
        message: The parser's own message, which names the settings.
        error: Exception behind the message.
    """
    text = refusal(error) if error else None
    if text:
        return text
    given = _given(words)
    found = fault(message)
    # Words of argparse.
    stray = re.search(r"unrecognized arguments: (\S+)", message)
    missing = re.search(r"required: (.+)|[Kk]ey \"([^\"]+)\" is required", message)
    alone = re.search(r"argument (\S+): expected", message)
    if found.is_unknown:
        rule = _unknown(parser, given, found, words)
    elif stray and stray[1].startswith("--"):
        rule = _unknown(parser, given, Fault(stray[1].partition("=")[0].lstrip("-"), is_unknown=True), words)
    elif stray:
        rule = f"{stray[1]!r} belongs to no option."
    elif missing:
        # LightningCLI puts the command in front of a name.
        names = re.sub(r"\b(fit|validate|test|predict)\.", "--", missing[1] or missing[2])
        rule = f"The command lacks options that are required: {names}."
    elif alone:
        rule = f"{alone[1]} needs a value."
    elif found.name:
        return _wrong_value(given, found, words)
    else:
        rule = f"The options are not understood: {message.strip().splitlines()[-1].strip()[:200]}."
    prog = parser.prog.replace("[options] ", "")
    command = f"matex {words[0]}" if prog == "matex" and words else prog
    return f"{rule} `{command} --help` lists the options."


def _given(words: Sequence[str]) -> list[Given]:
    given = []
    for word, following in pairwise([*words, "--"]):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            given.append(Given(option, value if equals else None if following.startswith("--") else following))
    return given


def _config_with(name: str, words: Sequence[str]) -> str:
    """The last config of the command line that has a name in its text, as "the config FILE"; else "the config"."""
    for option, value in reversed(list(pairwise([*words, ""]))):
        given = value if option in ("-c", "--config") else option.partition("=")[2] * option.startswith("--config=")
        path = find_config(given) if given else None
        if path is not None and name in path.read_text(encoding="utf-8", errors="replace"):
            return f"the config {given}"
    return "the config"


def _options(parser: ArgumentParser, start: str = "--") -> list[str]:
    """Options of a parser that begin with `start`."""
    return [name for action in parser._actions for name in action.option_strings if name.startswith(start)]


def _unknown(parser: ArgumentParser, given: Sequence[Given], found: Fault, words: Sequence[str]) -> str:
    """Message for a name that no option has."""
    end = found.name.rpartition(".")[2]
    typed = next((pair.option for pair in reversed(given) if pair.option.endswith(end)), None)
    option = typed or f"--{found.name}"
    group = option.rpartition(".")[0]
    known = [name for name in _options(parser) if name.rpartition(".")[0] == group]
    for path in found.class_paths:
        module, _, name = path.rpartition(".")
        kind = getattr(import_module(module) if module else data, name)
        known += [f"{group}.{argument}" for argument in argument_names(kind)]
    where = "" if typed else f", which {_config_with(end, words)} sets"
    return f"There is no option {option}{where}.{nearest(option, known)}"


def _wrong_value(given: Sequence[Given], found: Fault, words: Sequence[str]) -> str:
    """Message for a value of another type."""
    typed = [pair for pair in given if pair.option.rstrip("+").replace(".init_args.", ".") == f"--{found.name}"]
    option = typed[-1].option if typed else f"--{found.name}"
    value = typed[-1].value if typed else found.value
    end = found.name.rpartition(".")[2]
    where = "" if typed else f" in {_config_with(found.no_class or end, words)}"
    if renamed(f"{found.no_class} {value}"):
        return f"{option}{where} names PatchSimilarity. {renamed('PatchSimilarity')}"
    if found.no_class and found.name != "data" and value != found.no_class:
        return (
            f"{option}{where} names {found.no_class!r}, which is no known class. Give the name of a class of Lightning "
            "or of matex_pl, or the dotted path of a class."
        )
    value = found.no_class or value
    got = "" if value is None else f", got {value!r}"
    if found.name == "data":
        modules = [name for name in dir(data) if name.endswith("DataModule") and name != "ChestXrayDataModule"]
        return f"--data{where} takes a data module ({', '.join(modules)}) or a YAML file{got}."
    return f"{option}{where} must be {found.rule or 'another value'}{got}."
