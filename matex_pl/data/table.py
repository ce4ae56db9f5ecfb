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

SKIPPED = "skipped_rows.csv"
"""Name of the list of rows that were left out."""

_SEPARATORS = (",", ";", "\t")
_JSON_LINES = {".jsonl", ".ndjson"}
_SHOWN = 5
# So many are read by a thread at a time: few, so that an interruption is not waited for.
_ROWS = 16
# Reports are long cells, longer than what the csv module takes by default.
csv.field_size_limit(2**24)


class TableRow(NamedTuple):
    """A row of a table: its file and line, from 1, and its cells by column."""

    source: tuple[str, int]
    cells: dict[str, Any]


def read_table(path: Path, columns: Mapping[str, str], required: Sequence[str]) -> tuple[list[TableRow], list[BadRow]]:
    """Rows of a table, with the columns under our names, and rows that do not fit.

    CSV with commas, semicolons or tabs and a header, or JSON lines (`.jsonl`, `.ndjson`), UTF-8 with or without a
    byte-order mark; also gzipped (`.gz`).

    Args:
        path: The table.
        columns: The file's name of a column, by ours, where they differ.
        required: Our names of the columns that have to be there.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not UTF-8, has no rows, or lacks a column; the message lists those it has.
    """
    content = read_text(path)
    suffixes = {suffix.lower() for suffix in path.suffixes}
    read = _json_rows if suffixes & _JSON_LINES else _csv_rows
    wanted = [columns.get(name, name) for name in required]
    header, rows, bad = read(path, content, wanted)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {missing}; it has {header}. Map names by `columns`; CSV takes a comma, a "
            "semicolon or a tab between cells."
        )
    if not rows and not bad:
        raise ValueError(f"{path} has a header and no rows.")
    unknown = [theirs for theirs in columns.values() if theirs not in header]
    if unknown:
        raise ValueError(f"`columns` names {unknown}, which {path} does not have; it has {header}.")
    return [_renamed(row, columns) for row in rows] if columns else rows, bad


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, perhaps gzipped, without its byte-order mark.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8, with the line; or no gzip file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no table at {str(path)!r}.")
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16, which is not read. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error counts from behind a byte-order mark.
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: the byte {error.object[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        ) from None


def read_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        UnicodeEncodeError: It holds half of a surrogate pair, which JSON can write and no file can hold.
        ValueError: It is no JSON.
        RecursionError: It is nested too deeply.
    """
    found = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _renamed(row: TableRow, columns: Mapping[str, str]) -> TableRow:
    # A column that is mapped to another is not itself any more.
    taken = {*columns, *columns.values()}
    kept = {name: cell for name, cell in row.cells.items() if name not in taken}
    ours = {our: row.cells[theirs] for our, theirs in columns.items() if theirs in row.cells}
    return TableRow(row.source, kept | ours)


def _csv_rows(path: Path, content: str, wanted: Sequence[str]) -> tuple[list[str], list[TableRow], list[BadRow]]:
    first = io.StringIO(content, newline="").readline()
    rows, bad, line = [], [], 1
    try:
        # Otherwise a quote that nothing closes takes all rows after it into its cell.
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=_separator(first, wanted), strict=True)
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise ValueError(f"{path} has several columns of the name {twice[0]!r}; it has {header}.")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                rule = f"the row has {len(cells)} cells and the header {len(header)}; quote cells that hold a separator"
                bad.append(BadRow(str(path), line, "", rule))
            elif any(cell.strip() for cell in cells):
                rows.append(TableRow((str(path), line), dict(zip(header, cells, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {_csv_fault(error)}.") from error
    return header, rows, bad


def _csv_fault(error: csv.Error) -> str:
    """What is wrong with a row, in words."""
    if "unexpected end of data" in str(error):
        return "a quote opens in this row that nothing closes. Close it, or write a quote within a quoted cell twice"
    if "expected after" in str(error):
        return "text follows the quote that closes a cell. Write a quote within a quoted cell twice"
    return str(error)


def _separator(first: str, wanted: Sequence[str]) -> str:
    """The separator under which the header has most of the wanted columns, then most columns."""

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
    # Rows may leave out what they do not have; if all lines are broken, that is what to say.
    return list(header) if rows else list(wanted), rows, bad


class TableDataModule(ImageFilesDataModule):
    """Base of the data modules that read a table of images: what happens to bad rows, and splits by patient.

    A subclass reads its rows and says which of them are bad; repeated ids and patients in two splits are found here.

    Args:
        fractions: Shares of the patients in train, val and test, where the files name no splits.
        on_bad_row: `error` stops with a list of the bad rows; `skip` leaves them out, counts them, and lists them in
            `skipped_rows.csv` in the log folder, or in the current one without a trainer.
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
        """Pairs of the rows that are right, without a split where the table names none, and the other rows."""

    def checked_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """All pairs that can be used, with their splits, and all bad rows, without reading pixels.

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
        """All pairs whose rows are right.

        Raises:
            FileNotFoundError: A table is missing.
            ValueError: A table cannot be read, or has bad rows and `on_bad_row` is `error`; the message names them.
        """
        pairs, bad = self.checked_rows()
        if bad and self.on_bad_row == "error":
            raise ValueError(
                f"{_several(bad)}\nCorrect them, or leave them out by on_bad_row: skip. `matex check-data` lists all."
            )
        if bad:
            place = self._skipped_path()
            write_bad_rows(place, bad)
            rank_zero_warn(f"Left out, listed in {place}: {_several(bad)}")
        return pairs

    def _skipped_path(self) -> Path:
        if self.trainer is None:
            return Path(SKIPPED)
        return Path(self.trainer.log_dir or self.trainer.default_root_dir) / SKIPPED


@rank_zero_only
def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """Write bad rows as CSV: `file, line, value, rule`."""
    # What is wrong may be that a value cannot be written.
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
    """The pairs without those of which another row is bad, and all bad rows: a part of the boxes is no truth.

    Args:
        pairs: One per row that is right.
        bad: The other rows.
        rows: All of them.
        key_of: What rows of one pair share.
    """
    keys = {row.source: key_of(row) for row in rows}
    broken = {keys[row.file, row.line]: place_of((row.file, row.line)) for row in reversed(bad)}
    lost = [
        BadRow(*pair.source, "", f"another row of the same pair is bad: {broken[keys[pair.source]]}")
        for pair in pairs
        if keys[pair.source] in broken
    ]
    return [pair for pair in pairs if keys[pair.source] not in broken], [*bad, *lost]


def flag_patient_leakage(
    pairs: Sequence[ImageTextPair],
    bad: Sequence[BadRow],
    rows: Iterable[TableRow],
    owner_of: Callable[[TableRow], tuple[str, str]],
) -> list[BadRow]:
    """The bad rows, those of a patient who is in another split elsewhere with that rule too.

    Args:
        pairs: Those that are right.
        bad: The other rows.
        rows: All of them.
        owner_of: Patient and split of a row, empty where it names none.
    """
    cells = {row.source: row for row in rows}
    owners = []
    for row in bad:
        try:
            patient, split = owner_of(cells[row.file, row.line])
        except RuleError:
            continue
        owners.append(ImageTextPair("", patient, "", "", "", split=split, source=(row.file, row.line)))
    _, leaks = drop_leaks([pair for pair in (*pairs, *owners) if pair.patient_id and pair.split])
    rules = {(leak.file, leak.line): leak.rule for leak in leaks}
    told = ((row, rules.get((row.file, row.line))) for row in bad)
    return [replace(row, rule=f"{leak}; and {row.rule}") if leak else row for row, leak in told]


def parse_rows(
    rows: Sequence[TableRow], pair_of: Callable[[TableRow], ImageTextPair]
) -> tuple[list[ImageTextPair], list[BadRow]]:
    """The pairs of the rows that are right, and the others; rows are read side by side, as far as files are."""
    pairs: list[ImageTextPair] = []
    bad: list[BadRow] = []
    parts = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda part: [_pair_or_bad(row, pair_of) for row in part], parts)
        for found in progress(read, f"rows, by {_ROWS}", len(parts)):
            pairs += [made for made in found if isinstance(made, ImageTextPair)]
            bad += [made for made in found if isinstance(made, BadRow)]
    return pairs, bad


def _pair_or_bad(row: TableRow, pair_of: Callable[[TableRow], ImageTextPair]) -> ImageTextPair | BadRow:
    try:
        return pair_of(row)
    except RuleError as error:
        return error.at(row.source)
    except (OSError, ValueError) as error:
        name = next((str(row.cells[name]) for name in ("image", "path") if row.cells.get(name)), "")
        return BadRow(*row.source, name, str(error))
