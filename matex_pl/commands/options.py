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

from matex_pl import data
from matex_pl.arguments import import_all
from matex_pl.attribution.shipped import method_names, method_path
from matex_pl.files import find_config, shipped_configs

# Checked at once: the parsers that know all options import torch first.
REQUIRED = {"benchmark": ("--ckpt_path", "--out"), "tune": ("--ckpt_path", "--out")}


class ShippedConfig(ActionConfigFile):
    """`--config` with a file, or the name of a shipped one."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the settings of a config into the namespace."""
        super().__call__(parser, cfg, self.settings(config_path(values)), option_string)

    def settings(self, path: str) -> str:
        """The settings for the parser: a path, or JSON."""
        return path


class DataConfig(ShippedConfig):
    """`--config` with a YAML of `matex fit`, of which only the data module is taken."""

    def settings(self, path: str) -> str:
        """`{"data": ...}` as JSON, with `model` and `image_size` of the model where a subclass takes them."""
        training = read_mapping(path)
        data = training.get("data")
        if not isinstance(data, dict) or "class_path" not in data:
            raise ValueError(f"{path} describes no data module: it needs `data:` with `class_path` and `init_args`.")
        return json.dumps({"data": data} | self.model_settings(training.get("model")))

    def model_settings(self, model: Any) -> dict[str, Any]:
        """Settings for the command from the `model` of a training."""
        return {}


def config_path(name: str) -> str:
    """The path of a config file or a shipped config; the argument itself if it names no YAML.

    Raises:
        ValueError: There is no such config.
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
    """The command that the first of the words names, of `commands` with a line of help each."""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in commands.items():
        subparsers.add_parser(name, help=description, add_help=False)
    return str(parser.parse_args(words[:1]).command)


def check_words(command: str, words: Sequence[str]) -> None:
    """Refuse a command line that cannot work, at once, without torch.

    Raises:
        SystemExit: A required option is missing; the message names it.
        ValueError: Nothing names a data module, or nothing before its first setting, or a config does not exist.
    """
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    if any(option in ("-h", "--print_config") or option.endswith("help") for option in options):
        return
    parser = PlainParser(prog=f"matex {command}", usage=f"matex {command} [options], see --help", add_help=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for option in REQUIRED.get(command, ()):
        parser.add_argument(option, required=True)
    configs = parser.parse_known_args(words)[0].config
    for name in configs:
        config_path(name)
    if command.startswith("roar"):
        return
    first = next((option for option in options if option.startswith(("-c", "--config", "--data"))), "")
    if not first and not configs:
        raise ValueError("there are no images. Give --config, a YAML of `matex fit`, or --data, a data module.")
    if first.startswith("--data."):
        raise ValueError(f"{first} comes before anything names a data module. Put it after --config or --data.")


def stop(message: str) -> NoReturn:
    """End the process with a message and status 2, as errors in the options do; `sys.exit(message)` would make it 1."""
    print(message, file=sys.stderr)
    end = SystemExit(message)
    end.code = 2
    raise end


def call_parsed(parser: ArgumentParser, function: Callable[..., Any], words: Sequence[str]) -> Any:
    """The result of a function on the settings that a parser reads from the words; `--config` is none of them."""
    settings = vars(parser.instantiate(parser.parse_args(list(words))))
    settings.pop("config", None)
    return function(**settings)


def run_on_data(
    command: str, function: Callable[..., Any], words: Sequence[str], config: type[DataConfig] = DataConfig
) -> Any:
    """The result of a function, whose arguments are the command's options, on the data of `--config` or `--data`."""
    import_all(data)
    parser = ArgumentParser(prog=f"matex {command}", parser_mode=NAMED_METHODS, print_config=None)
    parser.add_argument("-c", "--config", action=config, help=str(config.__doc__))
    parser.add_function_arguments(function, sub_configs=True)
    return call_parsed(parser, function, words)


def _load_named(text: str) -> Any:
    return get_loader("yaml")(method_path(text).read_text(encoding="utf-8") if text in method_names() else text)


NAMED_METHODS = "named methods"
"""Mode of a parser in which the name of a shipped method stands for its settings, which options can then change."""
set_loader(NAMED_METHODS, _load_named, (yaml.YAMLError,))
