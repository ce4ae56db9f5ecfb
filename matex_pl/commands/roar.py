"""`matex roar run|status|collect`: remove-and-retrain experiments."""

from __future__ import annotations

import json
from argparse import SUPPRESS
from argparse import ArgumentParser as PlainParser
from collections.abc import Sequence

from matex_pl import data
from matex_pl.arguments import import_all
from matex_pl.commands.options import RefusingParser, ShippedConfig, call_parsed, check_words, choose
from matex_pl.commands.refusals import stop
from matex_pl.files import read_yaml

COMMANDS = {
    "run": "Remove the pixels and words that maps mark, retrain, and score the model again.",
    "status": "Show the progress of a plan.",
    "collect": "Write the tables, curves and page of a plan.",
}


class PlanConfig(ShippedConfig):
    """Config of `matex roar run` (YAML). Its `out` is the folder of the plan."""

    def settings(self, path: str) -> str:
        """`{"folder": ...}` as JSON."""
        return json.dumps({"folder": read_yaml(path).get("out")})


def main(words: Sequence[str]) -> None:
    """Run `matex roar run`, `status` or `collect`, and print its result."""
    description = "ROAR+: remove the pixels and words that maps mark, retrain, and score the model again."
    command = choose(PlainParser("matex roar", description=description), COMMANDS, words)
    check_words(f"roar {command}", words)
    print(_run(words[1:]) if command == "run" else _read(command, words[1:]))


def _run(words: Sequence[str]) -> str:
    from matex_pl.roar import RunsFailedError, run_roar

    import_all(data)
    parser = RefusingParser(prog="matex roar run", description=COMMANDS["run"])
    parser.add_argument(
        "-c", "--config", action=ShippedConfig, help="YAML with these settings, such as the shipped roar_phantom.yaml."
    )
    parser.add_function_arguments(run_roar)
    try:
        return call_parsed(parser, run_roar, words)
    except RunsFailedError as error:
        stop(f"matex roar: {error}")


def _read(command: str, words: Sequence[str]) -> str:
    parser = RefusingParser(prog=f"matex roar {command}", description=COMMANDS[command], print_config=None)
    # Newer argparse sets the default of a missing positional last, after the config.
    parser.add_argument(
        "folder", nargs="?", default=SUPPRESS, help="Folder of the plan; by default the `out` of --config."
    )
    parser.add_argument("-c", "--config", action=PlanConfig, help=str(PlanConfig.__doc__))
    if command == "collect":
        parser.add_argument("--report", help="Folder of `matex benchmark`; its tables and page get the scores too.")
    settings = vars(parser.parse_args(list(words)))
    del settings["config"]
    if not settings.get("folder"):
        raise ValueError("No plan given. Pass the folder of the plan, or --config with a `matex roar run` config.")
    from matex_pl.roar import collect_roar, roar_status

    return collect_roar(**settings) if command == "collect" else roar_status(**settings)
