"""Options that commands share: `--config`, the names of methods, and what is refused before anything is imported."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, get_loader, set_loader

from matex_pl import data, import_all
from matex_pl.attribution.shipped import method_names, method_path
from matex_pl.files import find_config, shipped_configs


class ShippedConfig(ActionConfigFile):
    """`--config` with a file, or the name of a shipped one."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the settings of a config into the namespace."""
        super().__call__(parser, cfg, self.taken(config_path(values)), option_string)

    def taken(self, path: str) -> str:
        """The settings: a path, or a text."""
        return path


class DataConfig(ShippedConfig):
    """`--config` with a YAML of `matex fit`, of which only the data module is taken."""

    def taken(self, path: str) -> str:
        """`{"data": ...}` as JSON.

        Raises:
            ValueError: The file describes no data module.
        """
        return json.dumps(self.settings(path, read_mapping(path)))

    def settings(self, path: str, training: dict[str, Any]) -> dict[str, Any]:
        """What the command takes of the settings of a training."""
        data = training.get("data")
        if not isinstance(data, dict) or "class_path" not in data:
            raise ValueError(f"{path} describes no data module: it needs `data:` with `class_path` and `init_args`.")
        return {"data": data}


def config_path(name: str) -> str:
    """The path of a config: a file, or a shipped one; what is no name of a YAML stays as it is.

    Raises:
        ValueError: There is none; the message lists those that are shipped.
    """
    if not name.endswith((".yaml", ".yml")):
        return name
    path = find_config(name)
    if path is None:
        raise ValueError(
            f"no config {name!r}, neither as a file nor among the shipped ones: {', '.join(shipped_configs())}."
        )
    return str(path)


def read_mapping(path: str) -> dict[str, Any]:
    """The content of a YAML; empty if that is no mapping."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def choose(parser: PlainParser, commands: Mapping[str, str], words: Sequence[str]) -> str:
    """The command that the first word names.

    Args:
        parser: Parser of that word, with options of its own.
        commands: A line of help per name.
        words: The words of the command line.

    Raises:
        SystemExit: It is none of them, or it asks for help.
    """
    known = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about in commands.items():
        known.add_parser(name, help=about, add_help=False)
    return str(parser.parse_args(words[:1]).command)


def check_words(command: str, words: Sequence[str], required: Sequence[str] = (), *, needs_data: bool = False) -> None:
    """Refuse a command line that cannot work, at once: parsers that know all options import torch first.

    Args:
        command: Name of the command, for messages.
        words: The words of the command line.
        required: Options that have to be there.
        needs_data: The command takes a data module.

    Raises:
        SystemExit: A required option is missing; the message names it.
        ValueError: Nothing names a data module, or nothing before its first setting, or a config does not exist.
    """
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    if any(option in ("-h", "--print_config") or option.endswith("help") for option in options):
        return
    parser = PlainParser(prog=f"matex {command}", usage=f"matex {command} [options], see --help", add_help=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for option in required:
        parser.add_argument(option, required=True)
    configs = parser.parse_known_args(words)[0].config
    for name in configs:
        config_path(name)
    first = next((option for option in options if option.startswith(("-c", "--config", "--data"))), None)
    if needs_data and first is None and not configs:
        raise ValueError("there are no images. Give --config, a YAML of `matex fit`, or --data, a data module.")
    if needs_data and first is not None and first.startswith("--data."):
        raise ValueError(f"{first} comes before anything names a data module. Put it after --config or --data.")


def stop(message: str) -> NoReturn:
    """End the process with a message and status 2, as errors in the options do; `sys.exit(message)` would make it 1."""
    print(message, file=sys.stderr)
    end = SystemExit(message)
    end.code = 2
    raise end


def run_on_data(
    command: str, function: Callable[..., Any], words: Sequence[str], config: type[DataConfig] = DataConfig
) -> Any:
    """The result of a function on the data module that `--config` or `--data` describes.

    Args:
        command: Name of the command, for messages.
        function: Its arguments are the options of the command.
        words: The words after it.
        config: What is taken of a YAML of `matex fit`.
    """
    import_all(data)
    parser = ArgumentParser(prog=f"matex {command}", parser_mode=NAMED_METHODS, print_config=None)
    parser.add_argument("-c", "--config", action=config, help=str(config.__doc__))
    parser.add_function_arguments(function, sub_configs=True)
    settings = vars(parser.instantiate(parser.parse_args(list(words))))
    del settings["config"]
    return function(**settings)


def _load_named(text: str) -> Any:
    return get_loader("yaml")(method_path(text).read_text(encoding="utf-8") if text in method_names() else text)


NAMED_METHODS = "named methods"
"""Mode of a parser in which the name of a shipped method stands for its settings, which options can then change."""
set_loader(NAMED_METHODS, _load_named, (yaml.YAMLError,))
