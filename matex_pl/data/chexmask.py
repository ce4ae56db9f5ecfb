"""Masks of CheXmask: tables with the lungs and the heart of the images of six public data sets."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.console import progress
from matex_pl.data.images import Size
from matex_pl.data.levels import check_size
from matex_pl.data.masks import MaskSource, check_shape
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.rle import check_pairs, decode_pairs
from matex_pl.data.validation import BadRow, RowWarning, RuleError
from matex_pl.files import whole_file

STRUCTURES = {"left_lung": "Left Lung", "right_lung": "Right Lung", "heart": "Heart"}
QUALITY, HEIGHT, WIDTH = "Dice RCA (Mean)", "Height", "Width"
LOWEST_QUALITY = 0.7
"""Quality below which the authors of CheXmask advise against a mask."""

# Name that pandas gives to an index, which may come before the column of ids.
_INDEX = re.compile(r"(Unnamed: \d+)?")
_SUFFIXES = {"png", "jpg", "jpeg", "dcm", "dicom", "tif", "tiff", "bmp", "webp"}
_LONGEST_ROW = 2**24
# A table of numbers shrinks to a third or a tenth. A gzip file that inflates much further is no table.
_LARGEST_INFLATION, _ALWAYS_INFLATED, _BLOCK = 100, 2**26, 2**22


class ChexmaskTable(MaskSource):
    """Masks of the lungs and the heart from a CSV file of CheXmask (Gaggion et al., 2024).

    A file has up to 12 GB. It is read once to find the rows of the images, and then row by row. The first column has
    the ids of the images, and its name differs per data set. An id is the name of an image file, or the end of its
    path, with or without a suffix. Rows of other images are left out. Rows of a low quality count as missing.

    Args:
        path: CSV file, optionally gzipped (`.gz`).
        folder: Folder where a gzipped file is unpacked.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path = path
        self.folder = folder
        self._plain = path
        self._columns: dict[str, int] = {}
        self._id = 0
        # Offset, length and line of the row of an image.
        self._rows: dict[str, tuple[int, int, int]] = {}

    def __contains__(self, image: object) -> bool:
        return image in self._rows

    def join(self, pairs: Sequence[ImageTextPair]) -> tuple[list[BadRow], list[RowWarning]]:
        """Find the rows of the images, check their sizes and qualities, and the end of each mask.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no table of CheXmask, or a gzip file without a folder; or it has none of the images.
        """
        self._plain, self._rows = self._unpacked(), {}
        images, sizes = _Images(pairs), {str(pair.image): pair.size for pair in pairs if pair.size}
        lines: dict[str, int] = {}
        bad: list[BadRow] = []
        warned: list[RowWarning] = []
        example = ""
        # A gzipped file is read where it is unpacked.
        with self._plain.open("rb") as file:
            records = _records(file, self.path)
            self._columns = self._read_header(next(records, (0, 0, b""))[2])
            self._id = next((place for name, place in self._columns.items() if not _INDEX.fullmatch(name)), 0)
            for line, offset, raw in progress(records, f"rows of {self.path.name}"):
                cells = _cells(raw)
                name = _text(cells[min(self._id, len(cells) - 1)])
                found = images.find(name)
                if not found:
                    example = example or name
                    continue
                source = (str(self.path), line)
                known = lines.get(found[0])
                for image in found:
                    lines.setdefault(image, line)
                try:
                    if len(found) > 1:
                        raise RuleError(name, f"the id is of {len(found)} images, e.g. {found[0]} and {found[1]}")
                    if known is not None:
                        raise RuleError(name, f"line {known} has the masks of this image already")
                    faults = self._check(cells, sizes.get(found[0]))
                except RuleError as error:
                    bad.append(error.at(source))
                    continue
                warned += [RowWarning(*source, f"{value} of {name}", kind) for kind, value in faults.items()]
                if not {"mask quality", "mask row empty"} & faults.keys():
                    self._rows[found[0]] = (offset, len(raw), line)
        self._check_joined(len(lines), images, example)
        return bad, warned

    def state(self, image: str) -> str:
        """Size and time of the file, and the place of the row."""
        state = self.path.stat()
        return f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns} {self._rows[image][0]}"

    def read(self, image: str, size: Size) -> dict[str, np.ndarray]:
        """Masks of an image at their stored size, without empty cells; see `MaskSource.read`."""
        offset, length, line = self._rows[image]
        with self._plain.open("rb") as file:
            file.seek(offset)
            cells = _cells(file.read(length))
        try:
            stored = self._size(cells)
            check_shape(stored, size)
            codes = {structure: cells[self._columns[column]] for structure, column in STRUCTURES.items()}
            return {structure: decode_pairs(code, stored) for structure, code in codes.items() if code.strip()}
        except RuleError as error:
            row = error.at((str(self.path), line))
            raise ValueError(f"{row}. Correct the row, or remove it.") from error

    def _check(self, cells: Sequence[bytes], image_size: Size | None) -> dict[str, str]:
        """Kinds and values of warnings about a row; RuleError if the row is bad."""
        if len(cells) != len(self._columns):
            raise RuleError("", f"the row has {len(cells)} cells and the header {len(self._columns)}")
        quality = self._number(cells, QUALITY)
        if not 0 <= quality <= 1:
            raise RuleError(quality, f"{QUALITY} is not between 0 and 1")
        if quality < LOWEST_QUALITY:
            return {"mask quality": f"{quality:.3g}"}
        size = self._size(cells)
        if image_size is not None:
            check_shape(size, image_size)
        empty = []
        for column in STRUCTURES.values():
            code = cells[self._columns[column]]
            # A whole check of all rows would take minutes. The last run shows whether the mask is of another size.
            try:
                check_pairs(b" ".join(code.rsplit(None, 2)[-2:]), size)
            except RuleError as error:
                raise RuleError(error.value, f"{column}: {error.rule}") from None
            if not code.strip():
                empty.append(column)
        if len(empty) == len(STRUCTURES):
            return {"mask row empty": ", ".join(empty)}
        return {"mask empty": ", ".join(empty)} if empty else {}

    def _size(self, cells: Sequence[bytes]) -> Size:
        """Height and width of the masks of a row."""
        height, width = self._number(cells, HEIGHT), self._number(cells, WIDTH)
        try:
            if height != int(height) or width != int(width):
                raise ValueError
            check_size(int(height), int(width))
        except (ValueError, OverflowError):
            raise RuleError(f"{width:g} x {height:g}", "Width and Height are no size of an image") from None
        return int(height), int(width)

    def _number(self, cells: Sequence[bytes], column: str) -> float:
        text = _text(cells[self._columns[column]])
        try:
            number = float(text)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise RuleError(text, f"{column} is not a number")
        return number

    def _read_header(self, raw: bytes) -> dict[str, int]:
        try:
            names = [_text(cell) for cell in _cells(raw.removeprefix(b"\xef\xbb\xbf"))]
        except ValueError:
            names = []
        missing = [name for name in (*STRUCTURES.values(), HEIGHT, WIDTH, QUALITY) if name not in names]
        if missing:
            raise ValueError(
                f"{self.path} is no table of CheXmask: it lacks the columns {missing}. The columns are "
                f"{[name[:40] for name in names[:12]]}. Give a CSV file of CheXmask, separated by commas."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"{self.path} has several columns of one name. The columns are {names[:12]}.")
        return {name: place for place, name in enumerate(names)}

    def _check_joined(self, joined: int, images: _Images, example: str) -> None:
        if not joined and images.count:
            column = list(self._columns)[self._id]
            raise ValueError(
                f"{self.path} has no row for any of the {images.count} images. The ids in its column {column!r} are "
                f"like {example!r}, and the ids of the images like {images.example!r}. Give the CSV file of this data "
                "set."
            )
        if joined < images.count:
            rank_zero_warn(
                f"{self.path} has rows for {joined} of {images.count} images. It has no masks of the other images."
            )

    def _unpacked(self) -> Path:
        """Path of the plain file, which is unpacked if needed."""
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no table of CheXmask at {str(self.path)!r}. Give the path of its CSV file in data.anatomy, "
                "or torchxrayvision."
            )
        if self.path.suffix.lower() != ".gz":
            return self.path
        if self.folder is None:
            raise ValueError(
                f"{self.path} is compressed, and single rows cannot be read from it. Unpack the file, or set "
                "data.cache_dir, where it is unpacked once."
            )
        state = self.path.stat()
        text = f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns}"
        name = blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        plain = self.folder / f"chexmask-{name}.csv"
        if not plain.is_file():
            try:
                with whole_file(plain) as part, gzip.open(self.path) as source, part.open("wb") as file:
                    limit = max(_LARGEST_INFLATION * state.st_size, _ALWAYS_INFLATED)
                    for block in progress(_blocks(source, limit), f"unpack {self.path.name}, by 4 MiB"):
                        file.write(block)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{self.path} is no complete gzip file ({error}). Copy the file again.") from error
        return plain


class _Images:
    """Paths of the images of pairs, found by the ids of a table."""

    def __init__(self, pairs: Iterable[ImageTextPair]) -> None:
        names = {str(pair.image): pair.image_id for pair in pairs}
        self.count = len(names)
        self.example = next(iter(names.values()), "")
        self._by_name: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for image, name in names.items():
            for last in {_parts(image)[-1], _parts(name)[-1]}:
                self._by_name[last].append((image, name))

    def find(self, name: str) -> list[str]:
        """Images whose path ends with an id, or whose id is the end of the id."""
        parts = _parts(name)
        return [
            image
            for image, own in self._by_name.get(parts[-1], ())
            if _is_end(parts, _parts(image)) or _is_end(_parts(own), parts)
        ]


def _is_end(end: Sequence[str], parts: Sequence[str]) -> bool:
    return list(parts[-len(end) :]) == list(end)


def _parts(path: str) -> list[str]:
    """Folders and name of a path, without the suffix of an image."""
    stem, _, suffix = path.rpartition(".")
    return (stem if suffix.lower() in _SUFFIXES else path).replace("\\", "/").split("/")


def _blocks(source: gzip.GzipFile, limit: int) -> Iterator[bytes]:
    read = 0
    while block := source.read(_BLOCK):
        read += len(block)
        if read > limit:
            raise ValueError(f"{source.name} inflates to more than {limit // 2**20} MiB, as no table does.")
        yield block


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line, offset and bytes of each row. A quoted cell may hold ends of lines, as the landmarks of CheXmask do."""
    row, first, start, offset = b"", 1, 0, 0
    for line, part in enumerate(file, start=1):
        if not row:
            first, start = line, offset
        offset += len(part)
        row = row + part if row else part
        if row.count(b'"') % 2 == 0:
            if row.strip():
                yield first, start, row
            row = b""
        elif len(row) > _LONGEST_ROW:
            break
    if row:
        raise ValueError(f"{path}, line {first}: A quote in this row is not closed. Copy the file again.")


def _cells(raw: bytes) -> list[bytes]:
    """Cells of a row. The csv module needs a minute for a large table, and most rows have one quoted cell."""
    raw = raw.strip(b"\r\n")
    head, *rest = raw.split(b'"')
    if not rest:
        return raw.split(b",")
    if len(rest) == 2 and head[-1:] in (b"", b",") and rest[1][:1] in (b"", b","):
        return [*head.split(b",")[:-1], rest[0], *rest[1].split(b",")[1:]]
    return [cell.encode() for cell in next(csv.reader([raw.decode(errors="replace")]))]


def _text(cell: bytes) -> str:
    return cell.decode(errors="replace").strip()
