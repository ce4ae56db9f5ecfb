"""Checkpoint files: atomic writes, clear errors for unreadable files, and resumption within an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from matex_pl.clip.weights import no_checkpoint
from matex_pl.data.datamodule import EpochLoader
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
            reason = (error.strerror if isinstance(error, OSError) else None) or "the disk has no room left"
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
            content = super().load_checkpoint(path, *args, **settings)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise no_checkpoint(path, error) from error
        missing = {"state_dict", "pytorch-lightning_version"} - set(content if isinstance(content, Mapping) else ())
        if missing:
            raise ValueError(
                f"{path} is no checkpoint of `matex fit`: it lacks {', '.join(sorted(missing))}. Give a file of plain "
                "weights as model.pretrained."
            )
        return content


def place_in_epoch(
    checkpoint: dict[str, Any], loader: EpochLoader | None, accumulated: int, source: str
) -> dict[str, Any] | None:
    """State for `EpochLoader.load_state_dict`, with the batches that the epoch of a checkpoint has trained on.

    None between epochs, and for the loader of another library. Batches after the last step of the optimizer are trained
    on again: their gradients are not in the checkpoint. An epoch that ended is closed if its data changed, so the next
    epoch begins with the new data.

    Args:
        checkpoint: Content of the checkpoint, whose counters may be changed.
        loader: Training loader of the data module, if there is one.
        accumulated: Number of batches per step of the optimizer.
        source: Name of the checkpoint for errors.

    Raises:
        ValueError: The checkpoint is from the middle of an epoch, and the remaining batches are unknown.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if not loop or loop["epoch_progress"]["current"]["ready"] == loop["epoch_progress"]["current"]["processed"]:
        return None
    batches, states = loop["epoch_loop.batch_progress"], loop["state_dict"].get("combined_loader", [])
    current, total = batches["current"], batches["total"]
    done, is_ours = current["processed"], len(states) == 1 and "pairs_per_step" in states[0]
    if batches["is_last_batch"] and done == current["ready"]:
        if is_ours and loader is not None and loader.changes(states[0]):
            for progress in loop["epoch_progress"].values():
                progress["processed"] = progress["completed"] = progress["ready"]
            current.update(dict.fromkeys(current, 0))
            batches["is_last_batch"] = False
        return None
    if not done or (states and not is_ours):
        return None
    if not states:
        raise ValueError(
            f"{source} is from the middle of an epoch, after {done} batches, and its loader stored no state. The "
            "remaining batches are unknown. Resume from a checkpoint at the end of an epoch."
        )
    again = done % accumulated
    if again:
        for progress in (current, total):
            progress.update(dict.fromkeys(progress, progress["processed"] - again))
    state = states[0] | {"batches": done - again}
    if loader is not None:
        loader.load_state_dict(state)
    return state


def without_functions(state: Any) -> Any:
    """A state without functions in its dicts: schedules restore theirs, and a file that names one is refused."""
    if not isinstance(state, Mapping):
        return [without_functions(part) for part in state] if isinstance(state, list) else state
    return {key: without_functions(value) for key, value in state.items() if not callable(value)}
