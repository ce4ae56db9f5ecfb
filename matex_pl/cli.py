"""The `matex` command."""

from __future__ import annotations

import json
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from matex_pl import __version__
from matex_pl.attribution.shipped import method_names, method_path
from matex_pl.benchmark import run_benchmark
from matex_pl.commands.check_data import check_data
from matex_pl.commands.explain import explain_film
from matex_pl.commands.prior import show_prior
from matex_pl.console import show_messages
from matex_pl.data import ChestXrayDataModule
from matex_pl.files import find_config, shipped_configs
from matex_pl.roar import CellsFailedError, collect_roar, roar_status, run_roar
from matex_pl.training.checkpoints import no_checkpoint
from matex_pl.training.module import ClipModule
from matex_pl.tune import tune_matex

DESCRIPTION = """Fine-tune CLIP on chest radiographs and watch, in TensorBoard, where it looks.

  matex fit --config phantom.yaml                         train on synthetic films, with maps and scores
  tensorboard --logdir runs                               look
  matex test --config phantom.yaml --ckpt_path last       score the test films
  matex explain film.png "Left lower lobe consolidation." --ckpt_path runs/phantom/checkpoints/last.ckpt
                                                          one film, one picture; --method m2ib takes another method,
                                                          --method all draws every one
  matex prior "Left lower lobe consolidation." --out prior.png
                                                          how a phrase is read, and the prior M that it gives
  matex benchmark --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out results
                                                          every method, every metric, with controls: tables and a page
  matex tune --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out tuned
                                                          MATEX's weights, found on the validation films
  matex roar run --config roar_phantom.yaml               remove what maps mark, train again, see what the model lost;
                                                          `matex roar status FOLDER` and `collect FOLDER` say how far
  matex check-data --config mine.yaml                     read every film and row once, and say what is wrong

`matex fit --help` lists every setting of training, `matex fit --data.help NihDataModule` those of a data module,
`matex explain --help` and `matex prior --help` those of a picture, `matex benchmark --help` those of a comparison.
"""


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of a description as they are written."""


class MatexCLI(LightningCLI):
    """LightningCLI with this project's module and any of its data modules."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Seed by default, because results should repeat."""
        parser.set_defaults({"seed_everything": 0})

    def _parse_ckpt_path(self) -> None:
        """Read the model's settings from a checkpoint, which Lightning does before anything is there to load it.

        Raises:
            ValueError: It cannot be read, or would run code; the message names the file.
        """
        try:
            super()._parse_ckpt_path()
        except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
            raise no_checkpoint(self.config[self.config.subcommand].ckpt_path, error) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line, the process's own by default; errors of use end it with a message and status 2."""
    show_messages()
    words = find_configs(sys.argv[1:] if args is None else args)
    if words and words[0] in COMMANDS:
        try:
            COMMANDS[words[0]](words[1:])
        except (CellsFailedError, ImportError, OSError, NotImplementedError, ValueError) as error:
            _stop(f"matex {words[0]}: {error}")
        except KeyboardInterrupt:
            # As a shell says it of a process that the signal ended.
            sys.exit(128 + signal.SIGINT)
        return
    if args is None:
        # LightningCLI warns of `args` beside a command line.
        sys.argv[1:] = words
    MatexCLI(
        ClipModule,
        ChestXrayDataModule,
        subclass_mode_data=True,
        trainer_defaults={"callbacks": [RichProgressBar()]},
        parser_kwargs=_parser_settings(),
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=None if args is None else words,
    )


def explain(words: Sequence[str]) -> None:
    """`matex explain IMAGE PHRASE --ckpt_path FILE`: write one panel and print its path."""
    parser = ArgumentParser(
        prog="matex explain", description="Write one panel: where the model looks on a film, and which words matter."
    )
    parser.add_argument("image", help="The film: PNG, JPEG, DICOM.")
    parser.add_argument("phrase", help='A sentence as a report words it, e.g. "Left lower lobe consolidation."')
    parser.add_function_arguments(explain_film, skip={"image", "phrase"}, sub_configs=True)
    print(explain_film(**vars(parser.instantiate(parser.parse_args(find_methods(words))))))


def prior(words: Sequence[str]) -> None:
    """`matex prior PHRASE`: print how the phrase is read, and draw its spatial prior."""
    parser = ArgumentParser(
        prog="matex prior", description="Say which regions a phrase names, and draw the spatial prior M that they give."
    )
    parser.add_argument("phrase", help='A sentence or a report, e.g. "Left lower lobe consolidation."')
    parser.add_function_arguments(show_prior, skip={"phrase"})
    text = show_prior(**vars(parser.instantiate(parser.parse_args(list(words)))))
    encoding = sys.stdout.encoding or "utf-8"
    # A phrase may hold letters that the terminal does not have.
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def benchmark(words: Sequence[str]) -> None:
    """`matex benchmark --config FILE --ckpt_path FILE --out FOLDER`: compare methods, and print the short of it."""
    _run_on_data("benchmark", run_benchmark, words)


def tune(words: Sequence[str]) -> None:
    """`matex tune --config FILE --ckpt_path FILE --out FOLDER`: find MATEX's weights on the validation split."""
    _run_on_data("tune", tune_matex, words, sub_configs=True)


def roar(words: Sequence[str]) -> None:
    """`matex roar run|status|collect`: remove-and-retrain experiments."""
    parser = ArgumentParser(
        prog="matex roar", description="ROAR+: remove what maps mark, train again, and see what the model lost."
    )
    commands = parser.add_subcommands()
    for name, function in ROAR_COMMANDS.items():
        about = str(function.__doc__).split("\n", 1)[0]
        command = ArgumentParser(description=about)
        if name == "run":
            command.add_argument("--config", action="config", help="A YAML of these settings, as roar_phantom.yaml.")
            command.add_function_arguments(function)
        else:
            command.add_argument("folder", nargs="?", help="Folder of the plan; the `out` of --config by default.")
            command.add_argument("--config", help="The YAML of `matex roar run`.")
            command.add_function_arguments(function, skip={"folder"})
        commands.add_subcommand(name, command, help=about)
    settings = parser.instantiate(parser.parse_args(list(words)))
    chosen = vars(settings[settings.subcommand])
    config = chosen.pop("config", None)
    if "folder" in chosen:
        chosen["folder"] = chosen["folder"] or _out_of(config)
    print(ROAR_COMMANDS[settings.subcommand](**chosen))


def _out_of(config: str | None) -> str:
    """The folder that the YAML of `matex roar run` names."""
    out = _described(config).get("out") if config else None
    if not out:
        raise ValueError("there is no plan. Give its folder, or --config, the YAML of `matex roar run`, with `out`.")
    return str(out)


def _described(path: str) -> dict[str, Any]:
    """What a YAML holds; nothing where that is no mapping."""
    described = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return described if isinstance(described, dict) else {}


def _run_on_data(name: str, run: Callable[..., str], words: Sequence[str], *, sub_configs: bool = False) -> None:
    """Run a function on the data module that a training's YAML describes, and print what it says."""
    parser = ArgumentParser(prog=f"matex {name}")
    parser.add_argument("--config", help="A YAML of `matex fit`: its `data` is the data module, the rest is not read.")
    parser.add_function_arguments(run, sub_configs=sub_configs)
    print(run(**_data_settings(parser, find_methods(words))))


def _data_settings(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function on a data module, which `--config` or `--data` describes."""
    if not any(word.startswith(("--config", "-c", "--data", "-h", "--help")) for word in words):
        raise ValueError("there are no films. Give --config, a YAML of `matex fit`, or --data, a data module.")
    settings = vars(parser.instantiate(parser.parse_args(find_data(words))))
    # `find_data` has made `--data` of it.
    del settings["config"]
    return settings


def check(words: Sequence[str]) -> None:
    """`matex check-data --config FILE`: print what the data hold and every bad row; status 1 if there are any."""
    parser = ArgumentParser(prog="matex check-data")
    parser.add_argument(
        "--config", help="A YAML of `matex fit`: its `data` is checked, with the tokenizer of its `model.name`."
    )
    parser.add_function_arguments(check_data)
    report = check_data(**_data_settings(parser, [*_model_of(words), *words]))
    print(report.text)
    if report.bad:
        raise SystemExit(1)


# Commands that need no Trainer, by name; each takes the words after it.
COMMANDS = {
    "explain": explain,
    "prior": prior,
    "benchmark": benchmark,
    "tune": tune,
    "roar": roar,
    "check-data": check,
}
ROAR_COMMANDS: dict[str, Callable[..., str]] = {"run": run_roar, "status": roar_status, "collect": collect_roar}


def _stop(message: str) -> NoReturn:
    """End the process with a message and status 2, as errors in the options do; `sys.exit(message)` would make it 1."""
    print(message, file=sys.stderr)
    end = SystemExit(message)
    end.code = 2
    raise end


def _parser_settings() -> dict[str, Any]:
    configs = f"Shipped configs, found by name from anywhere: {', '.join(shipped_configs())}."
    return {
        "prog": "matex",
        "description": DESCRIPTION,
        "epilog": configs,
        "version": __version__,
        "formatter_class": HelpFormatter,
    }


def find_configs(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the names of shipped configs after `--config` or `-c` turned into paths.

    Raises:
        SystemExit: A config is neither a file nor shipped; the message lists those that are.
    """
    found = []
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c") and equals:
            found.append(f"{option}={_config_path(value)}")
        elif place and words[place - 1] in ("--config", "-c"):
            found.append(_config_path(word))
        else:
            found.append(word)
    return found


def find_data(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--config FILE` turned into the `--data` that the file describes.

    It comes first, so that `--data.root` and the like change it wherever they stand.

    Raises:
        ValueError: The file describes no data module.
    """
    data, rest = [], list(words)
    for place, word in enumerate(words):
        if word.startswith(("--config=", "-c=")):
            data, rest[place : place + 1] = ["--data", _data_of(word.partition("=")[2])], []
        elif word in ("--config", "-c") and place + 1 < len(words):
            data, rest[place : place + 2] = ["--data", _data_of(words[place + 1])], []
    return [*data, *rest]


def _data_of(path: str) -> str:
    """The `data` of a training's YAML, as JSON."""
    data = _described(path).get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        raise ValueError(f"{path} describes no data module: it needs `data:` with `class_path` and `init_args`.")
    return json.dumps(data)


def _model_of(words: Sequence[str]) -> list[str]:
    """`--model NAME`, and `--image_size` if set, of the config in a command line, so that options after it count."""
    for option, value in pairwise(words):
        if option in ("--config", "-c"):
            return _model_of([f"--config={value}"])
    for word in words:
        if word.startswith(("--config=", "-c=")):
            model = _described(word.partition("=")[2]).get("model")
            if not isinstance(model, dict) or not model.get("name"):
                return []
            size = [f"--image_size={model['image_size']}"] if model.get("image_size") else []
            return ["--model", str(model["name"]), *size]
    return []


def find_methods(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the names of shipped methods after `--method` turned into paths."""
    found = list(words)
    for place, word in enumerate(words):
        if word.startswith("--method="):
            found[place] = f"--method={_method_path(word.partition('=')[2])}"
        elif place and words[place - 1] == "--method":
            found[place] = _method_path(word)
    return found


def _method_path(name: str) -> str:
    """The path of a shipped method, so that options can change its settings; anything else stays as it is."""
    return str(method_path(name)) if name in method_names() else name


def _config_path(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        return name
    path = find_config(name)
    if path is None:
        _stop(
            f"matex: no config {name!r}, neither as a file nor among the shipped ones: {', '.join(shipped_configs())}."
        )
    return str(path)


if __name__ == "__main__":
    main()
