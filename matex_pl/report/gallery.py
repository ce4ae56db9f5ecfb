"""Panels of methods on pairs, stored in a folder from which the page can be written without the model."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from matex_pl.files import read_json, whole_file, write_text
from matex_pl.visualization.draw import Picture

INDEX = "index.json"


@dataclass(frozen=True)
class Panel:
    """Panel of a method, named by its row, on its `best` or `worst` pair or on a `random` one."""

    row: str
    kind: str
    pair: str
    caption: str
    jpeg: bytes

    @property
    def source(self) -> str:
        """Picture as a data URL, which keeps the page self-contained."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def encode(picture: Picture) -> bytes:
    """JPEG file of a picture `(h, w, 3)` uint8, about a fifth of the size of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=85)
    return file.getvalue()


def write_panels(panels: Sequence[Panel], folder: Path) -> None:
    """Write panels, in the order of the page, as JPEG files and an index, which is written last.

    Readers see the old or the new panels. Pictures that the index no longer names are removed.
    """
    entries = []
    for panel in panels:
        entry = asdict(panel)
        picture = entry.pop("jpeg")
        # Named by the content: if this run stops here, the old index still names its own pictures.
        entry["file"] = f"{blake2b(picture, digest_size=10).hexdigest()}.jpg"
        with whole_file(folder / entry["file"]) as part:
            part.write_bytes(picture)
        entries.append(entry)
    write_text(folder / INDEX, json.dumps({"format": 1, "panels": entries}, indent=1))
    for path in set(folder.glob("*.jpg")) - {folder / entry["file"] for entry in entries}:
        # Only pictures of this function have such a name.
        if re.fullmatch("[0-9a-f]{20}", path.stem):
            path.unlink(missing_ok=True)


def read_panels(folder: Path) -> list[Panel]:
    """Panels written by `write_panels`, in their order.

    Raises:
        FileNotFoundError: If the index or one of its pictures is missing.
        ValueError: If the index is of another version.
    """
    index = read_json(folder / INDEX)
    if index.get("format") != 1:
        raise ValueError(
            f"The file {folder / INDEX} must have format 1, got {index.get('format')!r}. Run the benchmark again."
        )
    panels = []
    for entry in index["panels"]:
        picture = folder / Path(entry.pop("file")).name
        panels.append(Panel(**entry, jpeg=picture.read_bytes()))
    return panels
