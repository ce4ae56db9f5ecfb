"""Safetensors files with JSON metadata, and fingerprints of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matex_pl.files import whole_file


def fingerprint(value: Any) -> str:
    """Short hash of a value that JSON can write."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file with `about` as JSON metadata; readers see the old file or the complete new one.

    Raises:
        OSError: The file cannot be written.
    """
    with whole_file(path) as part:
        head = {name: json.dumps(value) for name, value in about.items()}
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, head)
        except SafetensorError as error:
            # safetensors has an error of its own for a full disk.
            raise OSError(
                f"The file {path} cannot be written. Make room on the disk, or give another folder."
            ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file written by `write_tensors`."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, _about(file.metadata())


def read_head(path: Path) -> dict[str, Any] | None:
    """Metadata of a file written by `write_tensors`; None if the file is missing or, with a warning, damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return _about(file.metadata())
    except (SafetensorError, ValueError) as error:
        rank_zero_warn(f"The file {path} is damaged ({error}). Its content is computed again.")
        return None


def _about(head: Mapping[str, str] | None) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in (head or {}).items()}
