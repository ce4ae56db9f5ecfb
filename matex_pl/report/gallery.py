"""Pictures of methods on pairs, and their folder, from which a page can be made again without the model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from matex_pl.files import whole_file, write_text
from matex_pl.visualization.draw import Picture

INDEX = "index.json"


@dataclass(frozen=True)
class Panel:
    """A picture of a method, named by its row, on a pair that is its `best`, its `worst` or `random`."""

    row: str
    kind: str
    pair: str
    caption: str
    jpeg: bytes

    @property
    def source(self) -> str:
        """The picture as a data address, so that the page stands alone."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def encode(picture: Picture) -> bytes:
    """A picture `(h, w, 3)` uint8 as a JPEG file, a fifth of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=85)
    return file.getvalue()


def write_panels(panels: Sequence[Panel], folder: Path) -> None:
    """Keep panels, in the order of the page, as JPEG files and an index, which comes last.

    A reader sees the old panels or the new. Pictures that the index does not name any more are removed.
    """
    entries = []
    for panel in panels:
        entry = asdict(panel)
        picture = entry.pop("jpeg")
        # Named by its content: the index of a run that is stopped here still names its own pictures.
        entry["file"] = f"{blake2b(picture, digest_size=10).hexdigest()}.jpg"
        with whole_file(folder / entry["file"]) as part:
            part.write_bytes(picture)
        entries.append(entry)
    write_text(folder / INDEX, json.dumps({"format": 1, "panels": entries}, indent=1))
    for path in set(folder.glob("*.jpg")) - {folder / entry["file"] for entry in entries}:
        path.unlink(missing_ok=True)


def read_panels(folder: Path) -> list[Panel]:
    """The panels of `write_panels`, in its order.

    Raises:
        FileNotFoundError: There is no index, or a picture of it is gone.
        ValueError: The index is of another version.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index.get("format") != 1:
        raise ValueError(f"{folder / INDEX} must have format 1, got {index.get('format')!r}. Run the benchmark again.")
    panels = []
    for entry in index["panels"]:
        picture = folder / Path(entry.pop("file")).name
        panels.append(Panel(**entry, jpeg=picture.read_bytes()))
    return panels
