"""Pictures of methods on pairs, and the folder that keeps them, so that a page is made anew without the model."""

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
    """A picture of one method on one pair.

    Args:
        row: Name of the method's row.
        kind: How the pair was chosen: `best`, `worst` or `random`.
        pair: Its pair.
        caption: One sentence, which is also the picture's alternative text.
        jpeg: The picture as a JPEG file, see `encode`.
    """

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
    """Keep panels as JPEG files and an index, which comes last: a reader sees the old ones or the new.

    Args:
        panels: In the order of the page.
        folder: Made if it is not there; pictures that the index does not name any more are removed.
    """
    entries = []
    for panel in panels:
        about = asdict(panel)
        picture = about.pop("jpeg")
        # Named by what is in it: the index of a run that is stopped here still names its own pictures.
        name = f"{blake2b(picture, digest_size=10).hexdigest()}.jpg"
        with whole_file(folder / name) as part:
            part.write_bytes(picture)
        entries.append({**about, "file": name})
    write_text(folder / INDEX, json.dumps({"format": 1, "panels": entries}, indent=1))
    named = {entry["file"] for entry in entries}
    for path in folder.glob("*.jpg"):
        if path.name not in named:
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
