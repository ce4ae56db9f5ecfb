"""`matex fit`, `validate`, `test` and `predict`: LightningCLI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from matex_pl import data
from matex_pl.arguments import import_all
from matex_pl.clip.weights import read_content, reading_checkpoint
from matex_pl.commands.options import ShippedConfig
from matex_pl.data import ChestXrayDataModule
from matex_pl.training.module import ClipModule


class MatexCLI(LightningCLI):
    """LightningCLI with this project's module and any of its data modules."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser, whose `--config` also accepts the names of shipped configs."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = LightningArgumentParser(**kwargs)
        description = "A YAML file, or the name of a shipped config."
        parser.add_argument("-c", "--config", action=ShippedConfig, help=description)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the default seed, for reproducible results."""
        parser.set_defaults({"seed_everything": 0})

    def _parse_ckpt_path(self) -> None:
        """Check that a checkpoint is readable; raise ValueError if not, or if it would run code.

        LightningCLI would replace the settings of the model by the checkpoint's, which drops options of the user.
        `ClipModule` compares both when it loads the checkpoint, for a file as for `last`.
        """
        command = self.config.get("subcommand")
        path = str(self.config[command].get("ckpt_path") or "") if command else ""
        if Path(path).is_file():
            with reading_checkpoint(path):
                read_content(path)


def main(words: Sequence[str] | None) -> None:
    """Run LightningCLI on a command's name and its arguments, by default the arguments of the process."""
    import_all(data)
    MatexCLI(
        ClipModule,
        ChestXrayDataModule,
        subclass_mode_data=True,
        parser_kwargs={"prog": "matex"},
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=words if words is None else list(words),
    )
