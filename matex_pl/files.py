"""Files that are there whole or not at all."""

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
    """A temporary file that takes the name `path` at the end: a reader sees the old file or the new one.

    Folders on the way are made. After an exception nothing is left of it.

    Args:
        path: The file.
        parts: Folder of the temporary file, above or beside `path` on the same disk; that of `path` by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = (parts or path.parent) / f".{path.name}.{uuid4().hex}.part"
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_abandoned_parts(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder: parts that nobody has written to for an hour."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Make a folder, with its parents; raise OSError, before the work, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"Nothing can be written in {folder}: {error.strerror}. Give another folder.") from error


def find_config(path: str) -> Path | None:
    """A config file by path, or else by its name among the shipped ones (with or without `configs/` in front)."""
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = CONFIG_FOLDER / path.removeprefix("configs/")
    return shipped if not candidate.is_absolute() and shipped.is_file() else None


def shipped_configs() -> list[str]:
    """Names of the YAML configs for `matex fit` that are installed with the package."""
    return sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))
