"""`matex fit`, `validate`, `test` and `predict`: LightningCLI."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn

from matex_pl import data
from matex_pl.arguments import import_all
from matex_pl.clip.weights import read_content, reading_checkpoint
from matex_pl.commands.options import CHECKED, RefusingParser, ShippedConfig, brings_weights
from matex_pl.commands.trainer_settings import check_trainer
from matex_pl.data import ChestXrayDataModule
from matex_pl.files import new_files_removed
from matex_pl.training.module import ClipModule

log = logging.getLogger(__name__)

# Values of `ckpt_path` that the Trainer resolves.
_NO_PATHS = ("hpc", "last", "registry")
# Files that a run writes before its first step.
_STARTUP_FILES = (
    *("config.yaml", "hparams.yaml", "events.out.tfevents.*", "metrics.csv"),
    *("skipped_rows.csv", "before.safetensors"),
)


class TrainingParser(RefusingParser, LightningArgumentParser):
    """LightningCLI's parser with short messages for wrong options."""


class CheckpointFound(Callback):
    """Refuse to score a model whose `--ckpt_path last` finds no checkpoint: the Trainer would score random weights.

    A training may start without a checkpoint, so the same command starts and resumes it.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the path that the Trainer has found."""
        if trainer.state.fn != TrainerFn.FITTING and not trainer.ckpt_path:
            raise FileNotFoundError(
                "--ckpt_path last finds no checkpoint in the folders of the checkpoint callbacks. Give the path of a "
                "checkpoint, or the config of its training."
            )

    on_test_start = on_predict_start = on_validation_start


class MatexCLI(LightningCLI):
    """LightningCLI with this project's module and any of its data modules."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands and the arguments that are no options: `weights_only=False` would run code of a checkpoint."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser, whose `--config` also accepts the names of shipped configs."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = TrainingParser(parser_mode=CHECKED, **kwargs)
        description = "A YAML file, or the name of a shipped config."
        parser.add_argument("-c", "--config", action=ShippedConfig, help=description)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given words, without a warning about other arguments of the process."""
        self.words = list(args)
        self.config = parser.parse_args(args)
        settings = self.config.get(self.config.get("subcommand") or "") or self.config
        seed = settings.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise ValueError(f"--seed_everything must be a whole number from 0 to {2**32 - 1}, or a bool, got {seed}.")

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

    def before_instantiate_classes(self) -> None:
        """Check the settings of the Trainer and the path of the checkpoint before the model is built.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The Trainer does not take one of its settings, or the path is empty.
        """
        settings = self.config[self.subcommand]
        check_trainer(settings["trainer"], self.words)
        path = settings.get("ckpt_path")
        if path == "":
            raise ValueError("--ckpt_path is empty. Give the path of a checkpoint, or leave --ckpt_path out.")
        if path and not path.startswith(_NO_PATHS) and "://" not in path and not Path(path).is_file():
            raise FileNotFoundError(f"No checkpoint at {path!r}. `matex fit` writes them below its log folder.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, without progress bars if `enable_progress_bar` is false."""
        settings = self.config_init[self.subcommand]["trainer"]
        if settings["enable_progress_bar"] is False and isinstance(settings["callbacks"], list):
            settings["callbacks"] = [part for part in settings["callbacks"] if not isinstance(part, ProgressBar)]
        if self.config_init[self.subcommand].get("ckpt_path") == "last":
            self.trainer_defaults = {"callbacks": [CheckpointFound()]}
        return super().instantiate_trainer(**kwargs)

    def fit(self, **settings: Any) -> None:
        """Train.

        Raises:
            ValueError: A checkpoint callback would replace the weights that the training starts from.
        """
        pretrained, name = (
            str(self.config[self.subcommand].get(f"model.{part}") or "") for part in ("pretrained", "name")
        )
        if not (pretrained or settings.get("ckpt_path") or brings_weights(name)):
            log.info(f"The training starts from random weights of {name}.")
        for callback in self.trainer.checkpoint_callbacks:
            written = Path(str(getattr(callback, "dirpath", None)), f"{getattr(callback, 'filename', None)}.ckpt")
            if pretrained and written.is_file() and Path(pretrained).is_file() and written.samefile(pretrained):
                raise ValueError(
                    f"The training would replace its own start, {pretrained}. Resume with --ckpt_path {pretrained}, or "
                    "give the checkpoint callback another dirpath."
                )
        self._run("fit", settings)

    def validate(self, **settings: Any) -> None:
        """Score the validation images."""
        self._run("validate", settings)

    def test(self, **settings: Any) -> None:
        """Score the test images."""
        self._run("test", settings)

    def predict(self, **settings: Any) -> None:
        """Predict the test images."""
        self._run("predict", settings)

    def _run(self, name: str, settings: dict[str, Any]) -> None:
        trainer = self.trainer
        # Loggers make their folder before anything is checked.
        folders = [Path(logger.log_dir) for logger in trainer.loggers if trainer.is_global_zero and logger.log_dir]
        with new_files_removed(folders, _STARTUP_FILES, lambda: trainer.global_step == 0):
            getattr(trainer, name)(**settings)


def main(words: Sequence[str]) -> None:
    """Run LightningCLI on a command's name and its arguments."""
    import_all(data)
    MatexCLI(
        ClipModule,
        ChestXrayDataModule,
        subclass_mode_data=True,
        parser_kwargs={"prog": "matex"},
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=list(words),
    )
