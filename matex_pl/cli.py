"""The `matex` command, which imports only the modules that the given subcommand needs."""

from __future__ import annotations

import io
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from matex_pl import __version__
from matex_pl.commands.options import check_words, choose
from matex_pl.commands.refusals import end_with
from matex_pl.console import show_messages
from matex_pl.files import shipped_configs

DESCRIPTION = """Fine-tune CLIP on chest radiographs and see in TensorBoard where the model looks.

  matex fit --config phantom.yaml                         train on synthetic images, with maps and scores
  tensorboard --logdir runs                               show the maps and scores
  matex test --config phantom.yaml --ckpt_path last       score the test images
  matex explain image.png "Left lower lobe consolidation." --ckpt_path runs/phantom/checkpoints/last.ckpt
                                                          draw the maps of one image and one phrase; --method m2ib
                                                          selects another method, --method all draws all of them
  matex explain image.png --report report.txt --ckpt_path runs/phantom/checkpoints/last.ckpt --out explained
                                                          write a page with the map of each sentence of a report
  matex prior "Left lower lobe consolidation." --out prior.png
                                                          print how a phrase is parsed, and draw its prior M
  matex benchmark --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out results
                                                          compare all methods and controls by all metrics: tables and
                                                          an HTML page
  matex tune --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out tuned
                                                          search for MATEX's weights on the validation images
  matex roar run --config roar_phantom.yaml               remove the pixels and words that maps mark, and retrain;
                                                          `matex roar status FOLDER` shows the progress,
                                                          `matex roar collect FOLDER` writes the tables
  matex export runs/phantom/checkpoints/last.ckpt --format transformers --out exported
                                                          write a folder that transformers or open_clip reads
  matex check-data --config mine.yaml                     read every image and row once, and list the bad ones

`matex fit --help` lists the settings of training, `matex fit --data.help NihDataModule` the settings of a data module.
Every other command lists its settings with `--help`, for example `matex explain --help`.
`--debug`, or MATEX_DEBUG=1 in the environment, prints the traceback of every error.
"""
TRAINING = {
    "fit": "Train.",
    "validate": "Score the validation images.",
    "test": "Score the test images.",
    "predict": "Write the cosine of each pair to a CSV file.",
}
COMMANDS = {
    "explain": "Draw the maps of one image and a phrase or report.",
    "prior": "Print how a phrase is parsed, and draw its prior M.",
    "benchmark": "Compare attribution methods by all metrics.",
    "tune": "Search for MATEX's weights on the validation images.",
    "roar": "Remove the pixels and words that maps mark, and retrain.",
    "export": "Write a model as a folder for open_clip or transformers.",
    "check-data": "Read every image and row once, and list the bad ones.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line, by default the arguments of the process.

    A refusal ends with its message and status 2, and a bug with its traceback and status 1.
    """
    show_messages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The encoding of the terminal may lack a letter.
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if args is None else args)
    words = [word for word in given if word != "--debug"]
    debug = len(words) < len(given) or os.environ.get("MATEX_DEBUG", "0") not in ("", "0")
    # LightningCLI accepts a config with a section per command, before the command or without one.
    is_config = bool(words) and words[0].startswith(("-c", "--config", "--print_config"))
    epilog = f"Shipped configs, found by name from anywhere: {', '.join(shipped_configs())}."
    parser = ArgumentParser("matex", None, DESCRIPTION, epilog, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    command = "fit" if is_config else choose(parser, TRAINING | COMMANDS, words)
    try:
        if command not in ("explain", "export", "prior", "roar"):
            check_words(command, words)
        if command in COMMANDS:
            import_module(f"matex_pl.commands.{command.replace('-', '_')}").main(words[1:])
        else:
            import_module("matex_pl.commands.fit").main(words)
    except KeyboardInterrupt:
        # The status that a shell reports for a process that this signal ended.
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of standard output, such as `head`, has ended. Python would write the rest at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        end_with(f"matex {command}", error, debug=debug)


if __name__ == "__main__":
    main()
