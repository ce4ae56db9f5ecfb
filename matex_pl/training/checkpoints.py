"""Checkpoint files: atomic writes, and clear errors for unreadable files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from matex_pl.clip.weights import no_checkpoint
from matex_pl.files import remove_abandoned_parts, whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO with atomic writes: a checkpoint is written next to its destination and then renamed.

    Lightning writes to the system's temporary folder and moves the file. If the process is killed while the file moves
    to another disk, the old checkpoint is lost, and half of the new one remains under its name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint to a path. Lightning itself writes to URLs."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_abandoned_parts(Path(path).parent)
        try:
            with whole_file(Path(path)) as part:
                torch.save(checkpoint, part)
        # On a full disk torch raises a RuntimeError about an unexpected position.
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"The checkpoint {path} could not be written ({reason}). Make room on the disk, or give a folder that "
                "is writable. Earlier checkpoints are unchanged."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **settings: Any) -> dict[str, Any]:
        """Read a checkpoint as Lightning does, by default without running code.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file cannot be read, or would run code; the message names the file and the code.
        """
        try:
            return super().load_checkpoint(path, *args, **settings)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise no_checkpoint(path, error) from error
