"""Tables on disk, CSV and JSON lines, and the base of the data modules that read one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from matex_pl.arguments import check_choices
from matex_pl.console import progress
from matex_pl.data.datamodule import ImageFilesDataModule, check_fractions, split_patients
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.validation import BadRow, RuleError, drop_leaks, drop_repeats, place_of
from matex_pl.files import whole_file

_SEPARATORS = (",", ";", "\t")
_JSON_LINES = {".jsonl", ".ndjson"}
# Explanations of errors of the csv module, by a part of their text.
_CSV_FAULTS = {
    "unexpected end of data": "A quote in this row is not closed. Close the quote, or double quotes within a quoted "
    "cell",
    "expected after": "Text follows the quote that closes a cell. Double the quotes within a quoted cell",
}
_SHOWN = 5
# Rows per task of a thread: few, for a quick end after an interruption.
_ROWS = 16
# Reports are long cells, above the default limit of the csv module.
csv.field_size_limit(2**24)


class TableRow(NamedTuple):
    """A row of a table: its file and line, from 1, and its cells by column."""

    source: tuple[str, int]
    cells: dict[str, Any]


def read_table(path: Path, columns: Mapping[str, str], required: Sequence[str]) -> tuple[list[TableRow], list[BadRow]]:
    """Rows of a table, with its columns renamed, and malformed rows.

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
    header, rows, bad = read(path, content, wanted)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {missing}. The columns are {header}. Map other names with `columns`. Separate "
            "cells of a CSV by commas, semicolons or tabs."
        )
    if not rows and not bad:
        raise ValueError(f"{path} has a header and no rows. Give a table with at least one row.")
    unknown = [name for name in columns.values() if name not in header]
    if unknown:
        raise ValueError(f"`columns` names {unknown}, which {path} does not have. The columns are {header}.")
    # A column that is mapped to another name is not available under its own name.
    for _, cells in rows:
        renamed = {name: cells[column] for name, column in columns.items() if column in cells}
        for name in (*columns, *columns.values()):
            cells.pop(name, None)
        cells.update(renamed)
    return rows, bad


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, optionally gzipped, without its byte-order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no table at {str(path)!r}. Check the path.")
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file ({error}). Copy the file again.") from error
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


def _csv_rows(path: Path, content: str, wanted: Sequence[str]) -> tuple[list[str], list[TableRow], list[BadRow]]:
    first = io.StringIO(content, newline="").readline()
    rows, bad, line = [], [], 1
    try:
        # Without `strict`, the cell of an unclosed quote would hold all rows after it.
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=_separator(first, wanted), strict=True)
        header = [name.strip() for name in next(reader, [])]
        repeated = sorted({name for name in header if name and header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path} has several columns of the name {repeated[0]!r}. The columns are {header}.")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                rule = f"the row has {len(cells)} cells and the header {len(header)}; quote cells that hold a separator"
                bad.append(BadRow(str(path), line, "", rule))
            elif any(cell.strip() for cell in cells):
                rows.append(TableRow((str(path), line), dict(zip(header, cells, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        fault = next((text for part, text in _CSV_FAULTS.items() if part in str(error)), str(error))
        raise ValueError(f"{path}, line {line}: {fault}.") from error
    return header, rows, bad


def _separator(first: str, wanted: Sequence[str]) -> str:
    """The separator that gives the header most of the wanted columns, then most columns."""

    def fit(separator: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        return sum(name in names for name in wanted), len(names)

    return max(_SEPARATORS, key=fit)


def _json_rows(path: Path, content: str, wanted: Sequence[str]) -> tuple[list[str], list[TableRow], list[BadRow]]:
    header: dict[str, None] = {}
    rows, bad = [], []
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
            rows.append(TableRow((str(path), line), cells))
        else:
            bad.append(BadRow(str(path), line, text[:200], rule))
    # If all lines are bad, report the lines and not missing columns.
    return list(header) if rows else list(wanted), rows, bad


class TableDataModule(ImageFilesDataModule):
    """Base of the data modules that read a table of images: bad rows, and splits by patient.

    A subclass reads good and bad rows; this class finds repeated ids, and patients in two splits.

    Args:
        fractions: Shares of the patients in train, val and test, if the files have no splits.
        on_bad_row: `error` raises with a list of the bad rows; `skip` leaves them out, counts them, and lists them in
            `skipped_rows.csv` in the log folder, or in the current folder without a trainer.
        kwargs: Arguments of `ImageFilesDataModule`.
    """

    def __init__(
        self,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        on_bad_row: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(TableDataModule.__init__, locals())
        check_fractions(fractions)
        self.fractions = fractions
        self.on_bad_row = on_bad_row

    @abstractmethod
    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """Pairs of the good rows, with an empty split if the table has none, and the bad rows."""

    def checked_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """All usable pairs, with their splits, and all bad rows, without reading pixels.

        Raises:
            FileNotFoundError: A table is missing.
            ValueError: A table cannot be read at all.
        """
        pairs, bad = self.read_rows()
        pairs, repeats = drop_repeats(pairs)
        if any(not pair.split for pair in pairs):
            splits = split_patients((pair.patient_id for pair in pairs), self.fractions, self.seed)
            pairs = [replace(pair, split=pair.split or splits[pair.patient_id]) for pair in pairs]
        pairs, leaks = drop_leaks(pairs)
        return pairs, sorted([*bad, *repeats, *leaks], key=lambda row: (row.file, row.line))

    def list_pairs(self) -> list[ImageTextPair]:
        """All pairs of good rows.

        Raises:
            FileNotFoundError: A table is missing.
            ValueError: A table cannot be read, or has bad rows and `on_bad_row` is `error`; the message names them.
        """
        pairs, bad = self.checked_rows()
        if bad and self.on_bad_row == "error":
            raise ValueError(
                f"{_several(bad)}\nCorrect these rows, or leave them out with on_bad_row: skip. `matex check-data` "
                "lists all bad rows."
            )
        if bad:
            folder = "" if self.trainer is None else self.trainer.log_dir or self.trainer.default_root_dir
            path = Path(folder, "skipped_rows.csv")
            write_bad_rows(path, bad)
            rank_zero_warn(f"Left out, listed in {path}: {_several(bad)}")
        return pairs


@rank_zero_only
def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """Write bad rows as CSV: `file, line, value, rule`."""
    # A value may be bad because it cannot be encoded.
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(BadRow.__dataclass_fields__)
        writer.writerows((row.file, row.line, row.value, row.rule) for row in bad)


def _several(bad: Sequence[BadRow]) -> str:
    lines = [f"{len(bad)} bad row{'s' * (len(bad) > 1)}:", *map(str, bad[:_SHOWN])]
    return "\n  ".join([*lines, f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else lines)


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
) -> tuple[list[ImageTextPair], list[BadRow]]:
    """Pairs of the good rows, and the bad rows, parsed in threads."""
    parts = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda part: [_pair_or_bad(row, pair_of) for row in part], parts)
        parsed = [row for part in progress(read, f"rows, by {_ROWS}", len(parts)) for row in part]
    return [row for row in parsed if isinstance(row, ImageTextPair)], [row for row in parsed if isinstance(row, BadRow)]


def _pair_or_bad(row: TableRow, pair_of: Callable[[TableRow], ImageTextPair]) -> ImageTextPair | BadRow:
    try:
        return pair_of(row)
    except RuleError as error:
        return error.at(row.source)
    except (OSError, ValueError) as error:
        name = next((str(row.cells[name]) for name in ("image", "path") if row.cells.get(name)), "")
        return BadRow(*row.source, name, str(error))
