"""Fuzz test of tables of images: thousands of broken tables, each made from its seed, are read or clearly refused.

    python benchmarks/fuzz_manifests.py
    python benchmarks/fuzz_manifests.py --first 4711 --number 1      repeats one table, with its traceback if it fails

A correct table is corrupted in up to four ways (cells, columns, bytes). It goes through `ManifestDataModule.setup` and
the function of `matex check-data`. If this finds no error, all of its images go through the dataset. The expected
result is pairs with valid boxes and images below the root, or an error that names the file and the reason. Any other
result is printed with its seed, and the exit status is 1. Counts of the outcomes are printed as a Markdown table.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jsonargparse import auto_cli
from tqdm import tqdm

from matex_pl.commands.check_data import check_data
from matex_pl.data import ManifestDataModule

HEIGHT, WIDTH = 30, 40
COLUMNS = ("image", "phrase", "id", "patient_id", "boxes", "finding", "split", "mask", "x", "y", "w", "h")
# CPU seconds of a slow table.
SLOW_SECONDS = 10
# Patterns of the clear errors, including the list of bad rows; {} is the table.
CLEAR = {
    "bad rows": r"^\d+ bad rows?(, the first 3)?:\n  {}, line \d+(, '.+')?: .+",
    "no such encoding": r"^{}(, line \d+: The byte 0x.. is not UTF-8| is UTF-16)",
    "no whole gzip file": r"^{} is no complete gzip file",
    "a gzip file without bound": r"^{} inflates from",
    "columns are missing": r"^{} (lacks the columns|has some of the columns x, y, w, h)",
    "a column is there twice": r"^{} has several columns of the name",
    "a mapped column is missing": r"^`columns` names .* which {} does not have",
    "no rows": r"^{} has a header and no rows",
    "no CSV": r"^{}, line \d+: .+",
    "no pairs in a split": r"^ManifestDataModule has no (train|val|test) pairs, which",
    "one pair": r"^ManifestDataModule has one train pair, and",
}

Rows = list[dict[str, Any]]


def images(root: Path) -> None:
    """Write images to `root/images`, and invalid entries: broken, empty, folders, links in and out and in a circle."""
    outside = root.parent / "outside.png"
    folder = root / "images"
    folder.mkdir(parents=True)
    for number in range(8):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((HEIGHT, WIDTH), 20 * number, dtype=np.uint8))
    whole = (folder / "7.png").read_bytes()
    outside.write_bytes(whole)
    cv2.imwrite(str(folder / "mask.png"), np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 255)
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("1.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    os.mkfifo(folder / "pipe.png")


PATHS = [
    *(f"images/{name}.png" for name in ("half", "empty", "text", "folder", "link", "out", "circle", "nowhere", "pipe")),
    *("../outside.png", "/etc/passwd", "images/../../outside.png", "images\\0.png", "..\\outside.png", "C:\\0.png"),
    *("", " ", ".", "..", "/", "~", "images", "images/0.png/", "images//0.png", "./images/0.png", "images/0.png\0.png"),
    *("images/" + "a" * 5000 + ".png", "a/" * 3000 + "0.png", "http://a.b/c.png", "images/\ud800.png", "images/ü.png"),
]
WORDS = [
    *("", " ", "\0", "a\0b", "\ufffd", "\ud800", "\udcff half", "x" * 50_000, "word " * 5000, "\n", "a\nb", "\r\n"),
    *('"', '""', "'", '"a', "a,b", "a;b", "a\tb", "=1+1", "NaN", "null", "None", "\u202eabc", "\u0000", "e\u0301"),
    *(
        "Left effusion.",
        "no no no without, but",
        "right " * 400,
        "🫁",
        "﷽",
        "-",
        "train",
        "val",
        "test",
        "TRAIN",
        "\u017fplit",
    ),
]
NUMBERS = [
    *(0, -1, 1, 5, 1e308, -1e308, 1e-320, 10**400, 2**63, 0.1, True, None, [], {}, [[]], [1, 2], "1e400", "inf", "NaN"),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "5", "0x10", "1_000", "٣", "5,5", "1 000", "nan", "-0", "x"),
]


def boxes_cell(rng: random.Random) -> Any:
    """Boxes that are valid, almost valid or invalid."""
    box = [rng.choice([0, 1, 5, 10, 20, WIDTH, 1e9, rng.uniform(-50, 50), rng.choice(NUMBERS)]) for _ in range(4)]
    boxes: Any = rng.choice([[box], [box, [1, 1, 9, 9]], box, [box[:3]], [[box]], {"a": box}, [], "", "[[", "[" * 5000])
    return boxes if rng.random() < 0.4 or isinstance(boxes, str) else json.dumps(boxes)


def any_cell(rng: random.Random, column: str) -> Any:
    """Value for a cell of that column, mostly an invalid one."""
    if rng.random() < 0.15:
        return rng.choice(PATHS + WORDS + NUMBERS)
    if column in ("image", "mask"):
        return rng.choice(PATHS)
    if column == "boxes":
        return boxes_cell(rng)
    return rng.choice(NUMBERS if column in "xywh" else WORDS)


def right_rows(rng: random.Random) -> Rows:
    """Rows of a valid table, with some of the optional columns."""
    rows: Rows = []
    wanted = {name for name in ("id", "patient_id", "finding", "split", "boxes", "mask", "x") if rng.random() < 0.4}
    for number in range(rng.randrange(6, 9)):
        image = number % 8
        row: dict[str, Any] = {"image": f"images/{image}.png", "phrase": f"Right effusion, image {number}."}
        row |= {"id": f"s{number}", "patient_id": f"p{image}", "finding": rng.choice(["effusion", "mass", ""])}
        row |= {"split": ("train", "train", "val", "test")[image % 4], "boxes": "[[2, 3, 20, 15]]", "mask": ""}
        row |= {"x": 1, "y": 2, "w": 10, "h": 9}
        rows.append(
            {k: row[k] for k in row if k in ("image", "phrase") or k in wanted or (k in "ywh" and "x" in wanted)}
        )
    return rows


def spoil_rows(rng: random.Random, rows: Rows) -> Rows:
    """Rows with an error in a cell, a column or their number."""
    how = rng.randrange(9)
    names = list(rows[0]) if rows and rows[0] else ["image"]
    name, row = rng.choice(names), rng.randrange(len(rows)) if rows else 0
    if how <= 4 and rows:
        rows[row] = {**rows[row], name: any_cell(rng, name)}
    elif how == 5:
        new = rng.choice([*COLUMNS, "", " image", "\ufeffimage", "IMAGE", "a" * 9999, "x\ny", "\0", "\ud800"])
        value = any_cell(rng, new if new in COLUMNS else "phrase")
        rows = [{**row, new: value} for row in rows]
    elif how == 6:
        rows = [{k: v for k, v in row.items() if k != name} for row in rows]
    elif how == 7:
        rows = [{**row, **{f"c{n}": n for n in range(rng.choice([3, 3000]))}} for row in rows]
    else:
        rows = rng.choice([[], rows[:1], rows * 2, [*rows, {}]])
    return rows


def as_csv(rng: random.Random, rows: Rows) -> str:
    """Rows as CSV, with a random separator and quoting."""
    file = io.StringIO(newline="")
    writer = csv.writer(
        file,
        delimiter=rng.choice(list(",,,,;;;\t\t\t| ")),
        quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        lineterminator=rng.choice(["\n", "\r\n", "\n", "\r"]),
    )
    header = list(dict.fromkeys(name for row in rows for name in row))
    if header and rng.random() < 0.03:
        header[0] = header[-1]
    writer.writerow(header)
    writer.writerows([row.get(name, "") for name in header] for row in rows)
    return file.getvalue()


def as_lines(rng: random.Random, rows: Rows) -> str:
    """Rows as JSON lines; some lines may not be objects."""
    lines = [json.dumps(row) for row in rows]
    if lines and rng.random() < 0.2:
        lines[rng.randrange(len(lines))] = rng.choice(
            ["[1]", "{", "null", "", '{"image": 1e999}', "[" * 9999, "\0", "{}"]
        )
    return "\n".join(lines)


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some replaced, removed, inserted or cut off."""
    place, length = rng.randrange(len(content) + 1), rng.choice([0, 1, 1, 4, 40])
    random_bytes = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8])))
    odd = [
        b"\0",
        b'"',
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n\n",
        b",",
        b"\t",
        b"\\",
        b"\xed\xa0\x80",
        b"\x1a",
        b"=" * 9,
    ]
    put = rng.choice([b"", random_bytes, rng.choice(odd), b'"' * 100_001, b"," * 3000, content[place:][:200]])
    return rng.choice([content[:place] + put + content[place + length :], content[:place]])


def encoded(rng: random.Random, text: str) -> bytes:
    """Text as bytes, mostly in UTF-8; characters that the encoding lacks are replaced."""
    encoding = rng.choice(["utf-8"] * 40 + ["utf-8-sig", "utf-16", "latin-1", "utf-32", "utf-7"])
    return text.encode(encoding, rng.choice(["surrogatepass", "replace"]) if encoding == "utf-8" else "replace")


def write_table(rng: random.Random, root: Path) -> Path:
    """Write the table of a seed to `root`, corrupted in up to four ways, and return its path."""
    rows = right_rows(rng)
    ways = rng.randrange(5)
    bytewise = rng.randrange(3) if ways else 0
    for _ in range(max(ways - bytewise, 0)):
        rows = spoil_rows(rng, rows)
    lines = rng.random() < 0.4
    content = encoded(rng, as_lines(rng, rows) if lines else as_csv(rng, rows))
    for _ in range(min(bytewise, ways)):
        content = spoil_bytes(rng, content)
    suffix = ".jsonl" if lines != (rng.random() < 0.03) else ".csv"
    if rng.random() < 0.1:
        content, suffix = gzip.compress(content, 1), f"{suffix}.gz"
        content = spoil_bytes(rng, content) if rng.random() < 0.5 else content
    path = root / f"table{suffix}"
    path.write_bytes(content)
    return path


def module(rng: random.Random, path: Path) -> ManifestDataModule:
    """Data module with the settings of a seed."""
    return ManifestDataModule(
        str(path),
        columns=rng.choice([None, None, None, None, {"phrase": "caption"}, {"finding": "c1"}, {"image": "image"}]),
        fractions=rng.choice([(0.6, 0.2, 0.2), (0.5, 0.5, 0.0)]),
        on_bad_row=rng.choice(["error", "skip"]),
        image_size=16,
        batch_size=2,
        num_workers=0,
        resize_mode=rng.choice(["longest", "shortest", "squash"]),
    )


def outcome(path: Path, work: Callable[[], str]) -> str:
    """Result of a piece of work, or the name of its clear error; other errors are raised."""
    try:
        return work()
    except ValueError as error:
        place = re.escape(str(path))
        for name, pattern in CLEAR.items():
            if re.search(pattern.replace("{}", place), str(error)):
                return f"refused: {name}"
        raise


def set_up(data: ManifestDataModule) -> str:
    """Set up the data module, check its pairs, and return the outcome."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data.setup("fit")
    root = str(data.root.resolve())
    for pair in (pair for split in data.pairs.values() for pair in split):
        right = pair.phrase.strip() and pair.id and pair.patient_id
        inside = os.path.commonpath([root, Path(pair.image).absolute()]) == root
        boxed = all(-1 <= x0 < x1 <= WIDTH + 1 and -1 <= y0 < y1 <= HEIGHT + 1 for x0, y0, x1, y1 in pair.boxes)
        if not (right and inside and boxed):
            raise AssertionError(f"{pair} should have been refused")
    return "read, bad rows left out" if any("Left out" in str(one.message) for one in said) else "read"


def checked(data: ManifestDataModule) -> str:
    """Check the data, and write and read the report; if there is no error, load every image from the dataset."""
    report = check_data(data, workers=1, out="bad.csv")
    report.text.encode()
    if report.bad:
        assert all(row.rule and row.file for row in report.bad)
        assert len(Path("bad.csv").read_text(encoding="utf-8").splitlines()) > len(report.bad)
        return "bad rows listed"
    data.on_bad_row = "error"
    data.pairs = {"train": data.list_pairs()}
    for sample in map(data.dataset("train").__getitem__, range(len(data.pairs["train"]))):
        assert sample.image.shape == (3, 16, 16)
        assert sample.boxes.isfinite().all()
    return "right"


def run(seed: int, root: Path) -> tuple[str, str]:
    """Outcomes of the table of a seed: that of the set-up and that of the check."""
    rng = random.Random(seed)
    path = write_table(rng, root)
    data = module(rng, path)
    try:
        return outcome(path, lambda: set_up(data)), outcome(path, lambda: checked(data))
    finally:
        path.unlink()


def main(number: int = 10_000, first: int = 0) -> None:
    """Print the outcomes, and every table that is neither read nor clearly refused.

    Args:
        number: Number of tables.
        first: Seed of the first table.
    """
    for name in ("lightning.pytorch", "matex_pl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    counts: Counter[str] = Counter()
    broken, start = [], time.perf_counter()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "root"
        images(root)
        os.chdir(folder)
        for seed in tqdm(range(first, first + number), disable=None):
            since = time.process_time()
            try:
                counts.update(
                    f"{name}: {what}" for name, what in zip(("fit", "check-data"), run(seed, root), strict=True)
                )
            except Exception:
                broken.append(seed)
                print(f"seed {seed}:\n{traceback.format_exc()}", flush=True)
            if time.process_time() - since > SLOW_SECONDS:
                print(f"seed {seed} took {time.process_time() - since:.0f} s", flush=True)
                broken.append(seed)
        os.chdir(here)
    print("| outcome | tables |\n|---|---|")
    print("\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items())))
    print(f"\n{number} tables in {time.perf_counter() - start:.0f} s; {len(broken)} neither read nor clearly refused.")
    sys.exit(bool(broken))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
