"""Tables on disk, CSV and JSON lines, and the base of the data modules that read one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import time
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from matex_pl.arguments import check_choices
from matex_pl.console import progress
from matex_pl.data.chexmask import ChexmaskTable
from matex_pl.data.datamodule import STAGES, ImageFilesDataModule, check_fractions, split_patients
from matex_pl.data.dicom import read_view
from matex_pl.data.images import Size, read_size
from matex_pl.data.masks import MaskSource, fit_mask
from matex_pl.data.pair import ImageTextPair, UnreadablePair
from matex_pl.data.segmenter import SEGMENTER, SegmentedMasks
from matex_pl.data.transforms import ImageTransform
from matex_pl.data.validation import (
    BadRow,
    RowWarning,
    RuleError,
    drop_leaks,
    drop_repeats,
    odd_view,
    pair_warnings,
    place_of,
    set_warnings,
)
from matex_pl.files import check_output, whole_file

log = logging.getLogger(__name__)

_SEPARATORS = (",", ";", "\t")
_JSON_LINES = {".jsonl", ".ndjson"}
# Explanations of errors of the csv module, by a part of their text.
_CSV_FAULTS = {
    "unexpected end of data": "A quote in this row is not closed. Close the quote, or double quotes within a quoted "
    "cell",
    "expected after": "Text follows the quote that closes a cell. Double the quotes within a quoted cell",
}
_SHOWN = 3
BAD_ROWS_HEADER = "file,line,value,rule"
"""Begin of every list of bad rows."""

# Rows per task of a thread: few, for a quick end after an interruption.
_ROWS = 16
# Rows that are read first, and the ratio of time to CPU time above which a disk is slow.
_TRIED, _WAITING = 256, 3
# Reports are long cells, above the default limit of the csv module.
csv.field_size_limit(2**24)
# Tables shrink to a tenth or a twentieth. A gzip file that inflates much further, or beyond memory, is no table.
_LARGEST_INFLATION, _ALWAYS_INFLATED, _NEVER_INFLATED = 100, 2**26, 2**30


class TableRow(NamedTuple):
    """A row of a table: its file and line, from 1, and its cells by column."""

    source: tuple[str, int]
    cells: dict[str, Any]


class Table(NamedTuple):
    """Rows of a table, malformed rows, and warnings about rows."""

    rows: list[TableRow]
    bad: list[BadRow]
    warnings: list[RowWarning]


def read_table(path: Path, columns: Mapping[str, str], required: Sequence[str]) -> Table:
    """Rows of a table, with its columns renamed, malformed rows, and warnings about rows.

    CSV with commas, semicolons or tabs and a header, or JSON lines (`.jsonl`, `.ndjson`), UTF-8 with or without a
    byte-order mark; also gzipped (`.gz`).

    Args:
        path: Path of the table.
        columns: Names of the file's columns by the names used here, if they differ.
        required: Required columns, by the names used here.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not UTF-8, has no rows, or lacks a column; the message lists the columns of the file.
    """
    content = read_text(path)
    read = _json_rows if {suffix.lower() for suffix in path.suffixes} & _JSON_LINES else _csv_rows
    wanted = [columns.get(name, name) for name in required]
    header, table = read(path, content, wanted)
    if read is _csv_rows:
        # Names of a header have no spaces around them, as in SIIM's ` EncodedPixels`, however they are mapped.
        columns = {name: column.strip() for name, column in columns.items()}
        wanted = [column.strip() for column in wanted]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {missing}. The columns are {header}. Map other names with `columns`. Separate "
            "cells of a CSV by commas, semicolons or tabs."
        )
    if not table.rows and not table.bad:
        raise ValueError(f"{path} has a header and no rows. Give a table with at least one row.")
    unknown = [name for name in columns.values() if name not in header]
    if unknown:
        raise ValueError(f"`columns` names {unknown}, which {path} does not have. The columns are {header}.")
    # A column that is mapped to another name is not available under its own name.
    for _, cells in table.rows:
        renamed = {name: cells[column] for name, column in columns.items() if column in cells}
        for name in (*columns, *columns.values()):
            cells.pop(name, None)
        cells.update(renamed)
    return table


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, optionally gzipped, without its byte-order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no table at {str(path)!r}. Check the path.")
    content = _inflated(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16, which is not supported. Save the file as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error counts bytes after the byte-order mark.
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: The byte {error.object[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        ) from None


def _inflated(path: Path) -> bytes:
    """Content of a gzip file. A file that inflates without bound is refused before it fills the memory."""
    limit = min(max(_LARGEST_INFLATION * path.stat().st_size, _ALWAYS_INFLATED), _NEVER_INFLATED)
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no complete gzip file ({error}). Copy the file again.") from error
    if len(content) > limit:
        raise ValueError(
            f"{path} inflates from {path.stat().st_size} bytes to more than {limit // 2**20} MiB, as no table does. "
            "Check the file, or unpack it and give the unpacked table."
        )
    return content


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        UnicodeEncodeError: The text has half of a surrogate pair, which no file can hold.
        ValueError: The text is no JSON.
        RecursionError: The value is nested too deeply.
    """
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json_file(path: Path) -> Any:
    """The value of a JSON file, optionally gzipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not UTF-8 or no JSON.
    """
    content = read_text(path)
    try:
        return read_json(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: The JSON ends or breaks here. Copy the file again.") from error
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"{path} is no readable JSON. Copy the file again.") from error


def _csv_rows(path: Path, content: str, wanted: Sequence[str]) -> tuple[list[str], Table]:
    first = io.StringIO(content, newline="").readline()
    table, line = Table([], [], []), 1
    try:
        # Without `strict`, the cell of an unclosed quote would hold all rows after it.
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=_separator(first, wanted), strict=True)
        header = [name.strip() for name in next(reader, [])]
        repeated = sorted({name for name in header if name and header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path} has several columns of the name {repeated[0]!r}. The columns are {header}.")
        line = reader.line_num + 1
        # Columns without a name at the end are no columns.
        fewest = max((place for place, name in enumerate(header, start=1) if name), default=0)
        for cells in reader:
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                rule = f"the row has {len(cells)} cells and the header {len(header)}; quote cells that hold a separator"
                table.bad.append(BadRow(str(path), line, "", rule))
            elif any(cell.strip() for cell in cells):
                table.rows.append(TableRow((str(path), line), dict(zip(header, cells, strict=False))))
                if not fewest <= len(cells) <= len(header):
                    value = f"{len(cells)} of {len(header)} cells"
                    table.warnings.append(RowWarning(str(path), line, value, "cells"))
            line = reader.line_num + 1
    except csv.Error as error:
        fault = next((text for part, text in _CSV_FAULTS.items() if part in str(error)), str(error))
        raise ValueError(f"{path}, line {line}: {fault}.") from error
    return header, table


def _separator(first: str, wanted: Sequence[str]) -> str:
    """The separator that gives the header most of the wanted columns, then most columns."""

    def fit(separator: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        return sum(name in names for name in wanted), len(names)

    return max(_SEPARATORS, key=fit)


def _json_rows(path: Path, content: str, wanted: Sequence[str]) -> tuple[list[str], Table]:
    header: dict[str, None] = {}
    table = Table([], [], [])
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        cells, rule = None, "the line is no JSON object"
        try:
            cells = read_json(text)
        except UnicodeEncodeError:
            rule = "the line holds characters of a wrong encoding"
        except (ValueError, RecursionError):
            pass
        if isinstance(cells, dict):
            header.update(dict.fromkeys(cells))
            table.rows.append(TableRow((str(path), line), cells))
        else:
            table.bad.append(BadRow(str(path), line, text[:200], rule))
    # If all lines are bad, report the lines and not missing columns.
    return list(header) if table.rows else list(wanted), table


class TableDataModule(ImageFilesDataModule):
    """Base of the data modules that read a table of images: bad rows, and splits by patient.

    A subclass reads good and bad rows; this class finds repeated ids, and patients in two splits.

    Args:
        fractions: Shares of the patients in train, val and test, if the files have no splits.
        on_bad_row: `error` raises with a list of the bad rows; `skip` leaves them out, counts them, and lists them in
            `skipped_rows.csv` in the log folder, or in the current folder without a trainer. In one process, `skip`
            also leaves out pairs whose images turn out unreadable during an epoch. Their batches are smaller.
        anatomy: Masks of lungs and heart: CSV files of CheXmask, or `torchxrayvision` (extra `anatomy`), which segments
            images once into `cache_dir`. The first entry that has masks of an image gives all of its masks. None by
            default.
        kwargs: Arguments of `ImageFilesDataModule`.

    Attributes:
        row_warnings: Warnings about rows that `read_rows` found.
        mask_sources: Sources of masks, the first one first; a subclass may add its own.
    """

    def __init__(
        self,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        on_bad_row: Literal["error", "skip"] = "error",
        anatomy: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(TableDataModule.__init__, locals())
        check_fractions(fractions)
        self.fractions = fractions
        self.on_bad_row = on_bad_row
        self.row_warnings: list[RowWarning] = []
        named = [anatomy] if isinstance(anatomy, str) else anatomy or []
        self.mask_sources: list[MaskSource] = [self._mask_source(name) for name in named]
        self._skipped: list[BadRow] = []
        self._unreadable: dict[str, BadRow] = {}
        self._listed_unreadable = 0

    @abstractmethod
    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """Pairs of the good rows, with an empty split if the table has none, and the bad rows.

        A subclass adds warnings about rows to `row_warnings`.
        """

    def checked_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """All usable pairs, with their splits, and all bad rows, without reading pixels.

        Raises:
            FileNotFoundError: A table is missing.
            ValueError: A table cannot be read at all.
        """
        self.row_warnings = []
        pairs, bad = self.read_rows()
        pairs, repeats = drop_repeats(pairs)
        if any(not pair.split for pair in pairs):
            splits = split_patients((pair.patient_id for pair in pairs), self.fractions, self.seed)
            pairs = [replace(pair, split=pair.split or splits[pair.patient_id]) for pair in pairs]
        pairs, leaks = drop_leaks(pairs)
        for source in self.mask_sources:
            of_masks, warnings = source.join(pairs)
            bad += of_masks
            self.row_warnings += warnings
        bad = sorted([*bad, *repeats, *leaks], key=lambda row: (row.file, row.line))
        refused = {(row.file, row.line) for row in bad}
        self.row_warnings = [row for row in self.row_warnings if (row.file, row.line) not in refused]
        return pairs, bad

    def setup(self, stage: str) -> None:
        """List the pairs, on the first call only, and segment the images that need masks.

        Raises:
            OSError: A file is missing, or `cache_dir` cannot be used.
            ValueError: As in `ImageFilesDataModule.setup`.
            ImportError: A package that `anatomy` names is not installed.
        """
        super().setup(stage)
        splits = [split for split in STAGES[stage] if split != "train" or self.masks_in_training]
        needed = [pair for split in splits for pair in self.pairs[split]]
        is_segmenting = any(isinstance(source, SegmentedMasks) for source in self.mask_sources)
        if is_segmenting and dist.is_available() and dist.is_initialized() and self.trainer is not None:
            # Each process segments its part of the images.
            self.prepare_masks(needed[dist.get_rank() :: dist.get_world_size()])
            self.trainer.strategy.barrier()
        self.prepare_masks(needed)

    def _mask_source(self, name: str) -> MaskSource:
        if name == SEGMENTER:
            if self.cache is None:
                raise ValueError(
                    f"anatomy: {SEGMENTER} segments each image once and stores the masks. Set data.cache_dir to a "
                    "folder for the masks."
                )
            return SegmentedMasks(self.cache, apply_exif_orientation=self.apply_exif_orientation)
        return ChexmaskTable(Path(name), None if self.cache is None else self.cache.folder)

    def _source_of(self, pair: ImageTextPair) -> MaskSource | None:
        """The first source with masks of a pair's image."""
        return next((source for source in self.mask_sources if str(pair.image) in source), None)

    def has_masks(self, pair: ImageTextPair) -> bool:
        """Whether a source has masks of a pair's image."""
        return self._source_of(pair) is not None

    def prepare_masks(self, pairs: Sequence[ImageTextPair]) -> None:
        """Segment the images of these pairs that have no masks, if `anatomy` names `torchxrayvision`."""
        for source in self.mask_sources:
            if isinstance(source, SegmentedMasks):
                images = dict.fromkeys(str(pair.image) for pair in pairs if self._source_of(pair) is None)
                device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
                source.segment(list(images), device, self.num_workers)

    def read_masks(self, pair: ImageTextPair) -> dict[str, np.ndarray]:
        """Masks of a pair's image at the resolution of their source; empty if no source has masks of the image.

        Raises:
            OSError: A file is missing.
            ValueError: A mask cannot be read, or has another shape than the image.
        """
        source = self._source_of(pair)
        if source is None:
            return {}
        image = str(pair.image)
        size = pair.size or read_size(image, apply_exif_orientation=self.apply_exif_orientation)
        return source.read(image, size)

    def open_masks(self, pair: ImageTextPair, transform: ImageTransform) -> dict[str, np.ndarray]:
        """Masks of a pair at the size that the transform needs, from the cache if there is one."""
        source = self._source_of(pair)
        if source is None:
            return {}

        def read() -> dict[str, np.ndarray]:
            masks = self.read_masks(pair)
            height, width = next(iter(masks.values()), np.empty((1, 1))).shape
            target = transform.target_size((height, width))
            return {name: fit_mask(mask, target) for name, mask in masks.items()}

        state = source.state(str(pair.image))
        if self.cache is None or not state:
            return read()
        return self.cache.read_masks(str(pair.image), f"{transform.settings} {state}", read)

    def list_warnings(self, pairs: Sequence[ImageTextPair]) -> list[RowWarning]:
        """Warnings about the rows of the last call of `checked_rows`, and about their pairs."""
        return [*self.row_warnings, *set_warnings(pairs)]

    def list_pairs(self) -> list[ImageTextPair]:
        """All pairs of good rows.

        Raises:
            FileNotFoundError: A table is missing.
            ValueError: A table cannot be read, or has bad rows and `on_bad_row` is `error`; the message names them. Or
                the list of left-out rows would replace another file.
        """
        if self.on_bad_row == "skip":
            # Images that turn out unreadable in an epoch enter the list later.
            check_output(self._skipped_file(), BAD_ROWS_HEADER)
        pairs, bad = self.checked_rows()
        if bad and self.on_bad_row == "error":
            raise ValueError(
                f"{_several(bad)}\nCorrect these rows, or leave them out with on_bad_row: skip. `matex check-data` "
                "lists all bad rows."
            )
        self._skipped = bad
        if bad:
            path = self._skipped_file()
            write_bad_rows(path, bad)
            rank_zero_warn(f"Left out, listed in {path}: {_several(bad)}")
        return pairs

    def _skipped_file(self) -> Path:
        folder = "" if self.trainer is None else self.trainer.log_dir or self.trainer.default_root_dir
        return Path(folder, "skipped_rows.csv")

    def leave_out(self, unreadable: UnreadablePair) -> None:
        """Leave out a pair whose image cannot be read during an epoch, if `on_bad_row` is `skip`.

        Raises:
            ValueError: `on_bad_row` is `error`, or there are several processes, whose batches must have equal sizes.
            ImportError: A package that reads the image is not installed.
        """
        if self.on_bad_row == "error" or unreadable.kind is ImportError:
            raise unreadable.error()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"{unreadable.error()} With several processes, on_bad_row: skip cannot leave out a pair during an "
                "epoch, because a step needs equal batches. Remove the rows that `matex check-data` lists."
            )
        pair = unreadable.pair
        self._unreadable.setdefault(pair.id, BadRow(*pair.source, str(pair.image), unreadable.reason))

    def list_left_out(self) -> None:
        """Add the pairs that `leave_out` collected since the last call to `skipped_rows.csv`, and log their number."""
        bad = list(self._unreadable.values())
        if len(bad) > self._listed_unreadable:
            self._listed_unreadable = len(bad)
            path = self._skipped_file()
            write_bad_rows(path, [*self._skipped, *bad])
            log.warning(f"Left out because their images cannot be read, listed in {path}: {_several(bad)}")


@rank_zero_only
def write_bad_rows(path: Path, bad: Sequence[BadRow], warnings: Sequence[BadRow | RowWarning] = ()) -> None:
    """Write bad rows and warnings as CSV: `file, line, value, rule, used`; the rows of warnings are used."""
    # A value may be bad because it cannot be encoded.
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow((*BadRow.__dataclass_fields__, "used"))
        for rows, used in ((bad, "no"), (warnings, "yes")):
            writer.writerows((row.file, row.line, row.value, row.rule, used) for row in rows)


def read_frontal_size(path: Path, source: tuple[str, int]) -> tuple[Size, list[RowWarning]]:
    """Height and width of an image file, and a warning if its header names a view that is not frontal."""
    size = read_size(path)
    view = odd_view(*read_view(path))
    return size, [RowWarning(*source, view, "view")] if view else []


def _several(bad: Sequence[BadRow]) -> str:
    first = f", the first {_SHOWN}" if len(bad) > _SHOWN else ""
    return "\n  ".join([f"{len(bad)} bad row{'s' * (len(bad) > 1)}{first}:", *map(str, bad[:_SHOWN])])


def check_val_share(val_share: float) -> None:
    """Raise ValueError unless `val_share` is a share below 1."""
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be at least 0 and less than 1, got {val_share}.")


def hold_out(patients: Iterable[str], val_share: float, seed: int) -> dict[str, str]:
    """`train` or `val` for each patient of the training images, of a distribution without validation images."""
    return split_patients(patients, (1 - val_share, val_share, 0.0), seed)


def drop_broken(
    pairs: Sequence[ImageTextPair],
    bad: Sequence[BadRow],
    rows: Sequence[TableRow],
    key_of: Callable[[TableRow], tuple[str, ...]],
) -> tuple[list[ImageTextPair], list[BadRow]]:
    """Pairs of good rows and all bad rows; a pair is bad if another row of its key, and so one of its boxes, is bad."""
    keys = {row.source: key_of(row) for row in rows}
    broken = {keys[row.file, row.line]: place_of((row.file, row.line)) for row in reversed(bad)}
    kept, bad = [], list(bad)
    for pair in pairs:
        if place := broken.get(keys[pair.source]):
            bad.append(BadRow(*pair.source, "", f"another row of the same pair is bad: {place}"))
        else:
            kept.append(pair)
    return kept, bad


def flag_patient_leakage(
    pairs: Sequence[ImageTextPair],
    bad: Sequence[BadRow],
    rows: Iterable[TableRow],
    patient_and_split: Callable[[TableRow], tuple[str, str]],
) -> list[BadRow]:
    """The bad rows, with one more broken rule if the patient is in another split elsewhere in `rows`."""
    sources = {row.source: row for row in rows}
    of_bad = []
    for row in bad:
        with suppress(RuleError):
            patient, split = patient_and_split(sources[row.file, row.line])
            of_bad.append(ImageTextPair("", patient, "", "", "", split=split, source=(row.file, row.line)))
    _, leaks = drop_leaks([pair for pair in (*pairs, *of_bad) if pair.patient_id and pair.split])
    rules = {(leak.file, leak.line): f"{leak.rule}; and " for leak in leaks}
    return [replace(row, rule=rules.get((row.file, row.line), "") + row.rule) for row in bad]


def parse_rows(
    rows: Sequence[TableRow], pair_of: Callable[[TableRow], ImageTextPair]
) -> tuple[list[ImageTextPair], list[BadRow], list[RowWarning]]:
    """Pairs of the good rows, the bad rows, and warnings about good rows, parsed in threads if the disk is slow."""
    start, start_cpu = time.perf_counter(), time.thread_time()
    parsed = [_pair_or_bad(row, pair_of) for row in rows[:_TRIED]]
    # Threads wait for a slow disk together. On a fast disk they double the time, because they wait for each other.
    is_slow = time.perf_counter() - start > _WAITING * (time.thread_time() - start_cpu)
    parts = [rows[start : start + _ROWS] for start in range(_TRIED, len(rows), _ROWS)]
    with ThreadPoolExecutor() as pool:
        read = (pool.map if is_slow else map)(lambda part: [_pair_or_bad(row, pair_of) for row in part], parts)
        parsed += [row for part in progress(read, f"rows, by {_ROWS}", len(parts)) for row in part]
    pairs = [row for row in parsed if isinstance(row, ImageTextPair)]
    return pairs, [row for row in parsed if isinstance(row, BadRow)], pair_warnings(pairs)


def _pair_or_bad(row: TableRow, pair_of: Callable[[TableRow], ImageTextPair]) -> ImageTextPair | BadRow:
    try:
        return pair_of(row)
    except RuleError as error:
        return error.at(row.source)
    except (OSError, ValueError) as error:
        name = next((str(row.cells[name]) for name in ("image", "path") if row.cells.get(name)), "")
        return BadRow(*row.source, name, str(error))
