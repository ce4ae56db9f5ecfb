"""The `matex` command: finds what a command needs and imports nothing for the others."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from matex_pl import __version__
from matex_pl.commands.options import check_words, choose, stop
from matex_pl.console import show_messages
from matex_pl.files import shipped_configs

DESCRIPTION = """Fine-tune CLIP on chest radiographs and watch, in TensorBoard, where it looks.

  matex fit --config phantom.yaml                         train on synthetic images, with maps and scores
  tensorboard --logdir runs                               look
  matex test --config phantom.yaml --ckpt_path last       score the test images
  matex explain image.png "Left lower lobe consolidation." --ckpt_path runs/phantom/checkpoints/last.ckpt
                                                          one image, one picture; --method m2ib takes another method,
                                                          --method all draws every one
  matex prior "Left lower lobe consolidation." --out prior.png
                                                          how a phrase is read, and the prior M that it gives
  matex benchmark --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out results
                                                          every method, every metric, with controls: tables and a page
  matex tune --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out tuned
                                                          MATEX's weights, found on the validation images
  matex roar run --config roar_phantom.yaml               remove what maps mark, train again, see what the model lost;
                                                          `matex roar status FOLDER` and `collect FOLDER` say how far
  matex check-data --config mine.yaml                     read every image and row once, and say what is wrong

`matex fit --help` lists every setting of training, `matex fit --data.help NihDataModule` those of a data module,
`matex explain --help` and `matex prior --help` those of a picture, `matex benchmark --help` those of a comparison.
"""
TRAINING = {
    "fit": "Train.",
    "validate": "Score the validation images.",
    "test": "Score the test images.",
    "predict": "Write a row per pair with its cosine, to a CSV.",
}
COMMANDS = {
    "explain": "Write one panel of one image and one phrase.",
    "prior": "Say how a phrase is read, and draw its prior M.",
    "benchmark": "Compare methods by every metric.",
    "tune": "Find MATEX's weights on the validation images.",
    "roar": "Remove what maps mark, and train again.",
    "check-data": "Read every image and row once.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line, the process's own by default; errors of use end it with a message and status 2."""
    show_messages()
    words = list(sys.argv[1:] if args is None else args)
    # LightningCLI takes a config that holds a part per command, before the command or without one.
    is_config = bool(words) and words[0].startswith(("-c", "--config", "--print_config"))
    epilog = f"Shipped configs, found by name from anywhere: {', '.join(shipped_configs())}."
    parser = ArgumentParser("matex", None, DESCRIPTION, epilog, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    command = "fit" if is_config else choose(parser, TRAINING | COMMANDS, words)
    try:
        if command not in ("explain", "prior", "roar"):
            check_words(command, words)
        if command in COMMANDS:
            import_module(f"matex_pl.commands.{command.replace('-', '_')}").main(words[1:])
    except (ImportError, OSError, NotImplementedError, ValueError) as error:
        stop(f"matex {command}: {error}")
    except KeyboardInterrupt:
        # As a shell says it of a process that the signal ended.
        sys.exit(128 + signal.SIGINT)
    if command in TRAINING:
        # LightningCLI reads the process's own words itself, and warns of others.
        import_module("matex_pl.commands.fit").main(args)


if __name__ == "__main__":
    main()
