"""Checkpoints that are there whole or not at all, and say by name why they are not read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from matex_pl.files import remove_abandoned_parts, whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

    Lightning writes to the system's temporary folder and moves the file: where that is another disk, a process that is
    killed during the move has lost the old checkpoint and leaves half of the new one under its name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a path; addresses are left to Lightning.

        Raises:
            OSError: It could not be written; what was there before is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_abandoned_parts(Path(path).parent)
        try:
            with whole_file(Path(path)) as part:
                torch.save(checkpoint, part)
        # Of a full disk torch says that a position is unexpected.
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


def no_checkpoint(path: str | Path, error: BaseException) -> ValueError:
    """What to raise of a checkpoint that could not be read: names the file, and the code or weights at fault."""
    return ValueError(f"{path} is no checkpoint of `matex fit`: {why_unreadable(error)}")


def why_unreadable(error: BaseException) -> str:
    """One line on why a file was not read: the code that it would have run, or the weights that do not fit, by name."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it would run {code[1]}"
    weights = re.search(r"(size mismatch|Missing key|Unexpected key)[^\n]*", str(error))
    return weights[0] if weights else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none; at most 200 letters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
