"""Options that commands share: `--config`, the names of methods, and checks that run before slow imports."""

from __future__ import annotations

import json
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, get_loader, set_loader

from matex_pl import data
from matex_pl.arguments import import_all
from matex_pl.attribution.shipped import method_names, method_path
from matex_pl.commands.wrong_options import check_values, wrong_option
from matex_pl.files import check_yaml, find_config, read_yaml, shipped_configs

# Checked first, because the parsers of all options import torch.
REQUIRED = {"benchmark": ("--ckpt_path", "--out"), "tune": ("--ckpt_path", "--out")}


class RefusingParser(ArgumentParser):
    """Parser that raises ValueError with a short message for a wrong command line, and does not print its usage."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        # A misspelled option must not stand for another one.
        super().__init__(*args, **{"allow_abbrev": False, **settings})
        self.words: list[str] = []

    def parse_args(self, args: Any = None, *rest: Any, **settings: Any) -> Any:
        """Settings from the words of a command line."""
        if args is not None:
            self.words = list(args)
            check_values(self, self.words)
        return super().parse_args(args, *rest, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ValueError for the whole command line; parsers of single values report to that of the command line."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise ValueError(wrong_option(self, self.words, message, ex)) from ex


def check_one_model(option: str, ckpt_path: str | None, model: str | None, pretrained: str | None) -> str | None:
    """Check the options that choose a model, without reading a file.

    Args:
        option: Name of `ckpt_path` on the command line.
        ckpt_path: Checkpoint of `matex fit`.
        model: Name of any other model.
        pretrained: Weights of `model`.

    Returns:
        The checkpoint of `matex fit`, also if it is given as `model`; None for any other model.

    Raises:
        ValueError: Not exactly one of `ckpt_path` and `model` is given, or weights are missing, or given twice.
    """
    if (ckpt_path is None) == (model is None):
        raise ValueError(
            f"Give one model: {option}, a checkpoint of `matex fit`, or --model, an open_clip name or a folder."
        )
    trained = ckpt_path or (model if model is not None and _is_checkpoint(model) else None)
    if trained and pretrained is not None:
        raise ValueError(f"The checkpoint {trained} has its own weights: leave --pretrained out.")
    # An unknown name is refused when the model is read.
    if model is not None and pretrained is None and not brings_weights(model) and _is_architecture(model):
        raise ValueError(f"--model {model} has no weights. Give --pretrained, a tag of open_clip or a file.")
    return trained


def brings_weights(model: str) -> bool:
    """Whether the name of a model stands for weights too: a repository, a folder or a checkpoint of `matex fit`."""
    return model.startswith(("hf-hub:", "local-dir:")) or _is_checkpoint(model) or _is_path(model)


def _is_architecture(model: str) -> bool:
    """Whether a name stands for a config, the file or text of a JSON or a name of open_clip."""
    if model.endswith(".json") or model.lstrip().startswith("{"):
        return True

    from open_clip import list_models

    return model in list_models()


def _is_checkpoint(model: str) -> bool:
    return model.endswith(".ckpt") or (_is_path(model) and Path(model).is_file())


def _is_path(model: str) -> bool:
    """Whether `load_clip` reads a name as a path, and not as a config or as a name of open_clip."""
    is_config = model.endswith(".json") or model.lstrip().startswith("{")
    return not is_config and Path(model).exists() and not _is_architecture(model)


class ShippedConfig(ActionConfigFile):
    """`--config` with a file, or the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the settings of a config into the namespace."""
        super().__call__(parser, cfg, self.settings(read_config(values)), option_string)

    def settings(self, path: str) -> str:
        """Settings for the parser: a path, or JSON."""
        return path


class DataConfig(ShippedConfig):
    """Config of `matex fit` (YAML). Only its data module is used."""

    def settings(self, path: str) -> str:
        """`{"data": ...}` as JSON, with the settings that `more_settings` adds."""
        training = read_yaml(path)
        data = training.get("data")
        if not isinstance(data, dict) or "class_path" not in data:
            raise ValueError(f"{path} describes no data module. Add `data:` with `class_path` and `init_args`.")
        return json.dumps({"data": data} | self.more_settings(training))

    def more_settings(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for the command from the other sections of a config; none by default."""
        return {}


def read_config(name: str) -> str:
    """Path of a config file or a shipped config, which is a YAML file; the argument itself if it is a text in braces.

    Raises:
        OSError: The file cannot be read.
        ValueError: The config does not exist, or is no YAML file of settings.
    """
    if name.lstrip().startswith("{"):
        return name
    path = find_config(name)
    if path is None:
        raise ValueError(
            f"Config {name!r} is neither a file nor a shipped config. Give a path or one of "
            f"{', '.join(shipped_configs())}."
        )
    read_yaml(path)
    return str(path)


def choose(parser: PlainParser, commands: Mapping[str, str], words: Sequence[str]) -> str:
    """Command that the first word names. `commands` maps names to lines of help."""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in commands.items():
        subparsers.add_parser(name, help=description, add_help=False)
    return str(parser.parse_args(words[:1]).command)


def check_words(command: str, words: Sequence[str]) -> None:
    """Check a command line for missing options and files, before torch is imported.

    Raises:
        SystemExit: A required option is missing; the message names it.
        ValueError: The data module is missing or comes after its settings, or a config does not exist or is no YAML.
    """
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    if any(option in ("-h", "--print_config") or option.endswith("help") for option in options):
        return
    usage = f"matex {command} [options], see --help"
    parser = PlainParser(prog=f"matex {command}", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for option in REQUIRED.get(command, ()):
        parser.add_argument(option, required=True)
    configs = parser.parse_known_args(words)[0].config
    for name in configs:
        read_config(name)
    if command.startswith("roar"):
        return
    first = next((option for option in options if option.startswith(("-c", "--config", "--data"))), "")
    if not first and not configs:
        raise ValueError("No data module given. Pass --config with a `matex fit` config, or --data with a data module.")
    if first.startswith("--data."):
        raise ValueError(f"{first} comes before the data module. Put {first} after --config or --data.")


def call_parsed(parser: ArgumentParser, function: Callable[..., Any], words: Sequence[str]) -> Any:
    """Result of a function on the settings that a parser reads from the words, without `--config`."""
    settings = vars(parser.instantiate(parser.parse_args(list(words))))
    settings.pop("config", None)
    return function(**settings)


def run_on_data(
    command: str, function: Callable[..., Any], words: Sequence[str], config: type[DataConfig] = DataConfig
) -> Any:
    """Result of a function, whose arguments are the command's options, on the data of `--config` or `--data`."""
    import_all(data)
    parser = RefusingParser(prog=f"matex {command}", parser_mode=NAMED_METHODS, print_config=None)
    parser.add_argument("-c", "--config", action=config, help=str(config.__doc__))
    parser.add_function_arguments(function, sub_configs=True)
    return call_parsed(parser, function, words)


def _load_checked(text: str) -> Any:
    check_yaml(text)
    return get_loader("yaml")(text)


def _load_named(text: str) -> Any:
    return _load_checked(method_path(text).read_text(encoding="utf-8") if text in method_names() else text)


CHECKED, NAMED_METHODS = "checked", "named methods"
"""Modes of a parser. All YAML passes `check_yaml`.

In `NAMED_METHODS`, the name of a shipped method stands for its settings, which further options can override.
"""
set_loader(CHECKED, _load_checked, (yaml.YAMLError,))
set_loader(NAMED_METHODS, _load_named, (yaml.YAMLError,))
