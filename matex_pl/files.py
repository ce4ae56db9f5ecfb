"""Atomic writes of files, checks of folders, and the shipped configs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

_ABANDONED_AFTER = 3600

CONFIG_FOLDER = Path(__file__).parent / "configs"


@contextmanager
def whole_file(path: Path, parts: Path | None = None) -> Iterator[Path]:
    """Context with a temporary file that is renamed to `path` at the end: readers see the old file or the new one.

    The parent folders are created. After an exception the temporary file is removed, and `path` is unchanged.

    Args:
        path: Destination.
        parts: Folder of the temporary file, on the same disk as `path`; by default the folder of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = (parts or path.parent) / f".{path.name}.{uuid4().hex}.part"
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_abandoned_parts(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder: parts that have not changed for an hour."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; see `whole_file`."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Create a folder and its parents; raise OSError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"Nothing can be written in {folder}: {error.strerror}. Give another folder.") from error


def find_config(path: str) -> Path | None:
    """Path of a config: the given file, or else the shipped config of this name, with or without `configs/` in front.

    None if there is neither.
    """
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = CONFIG_FOLDER / path.removeprefix("configs/")
    return shipped if not candidate.is_absolute() and shipped.is_file() else None


def shipped_configs() -> list[str]:
    """Names of the YAML configs that are installed with the package."""
    return sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))
