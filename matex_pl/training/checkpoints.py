"""Checkpoint files: written whole or not at all, and refused with a reason if they cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from matex_pl.clip.weights import no_checkpoint
from matex_pl.files import remove_abandoned_parts, whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to its destination and renames it.

    Lightning writes to the system's temporary folder and moves the file: where that is another disk, a process that is
    killed during the move has lost the old checkpoint and leaves half of the new one under its name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a path; addresses are left to Lightning."""
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
                f"The checkpoint {path} could not be written ({reason}): is the disk full, or read-only? Checkpoints "
                "from before are as they were."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **settings: Any) -> dict[str, Any]:
        """Read a checkpoint as Lightning does, by default without running code.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be read, or would run code; the message names the file, and the code.
        """
        try:
            return super().load_checkpoint(path, *args, **settings)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise no_checkpoint(path, error) from error
