"""Images of one's own by a table: what is read, and what is refused with file, line, value and rule."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from matex_pl.cli import main
from matex_pl.data import ManifestDataModule, table
from matex_pl.data import images as pixels
from matex_pl.data.boxes import box_of_cells, boxes_of_json
from matex_pl.data.images import _levels
from matex_pl.data.validation import (
    BadRow,
    RuleError,
    check_inside,
    find_image,
    split_name,
)

HEIGHT, WIDTH = 60, 80


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images of 80 x 60 pixels, each of its own gray."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.full((HEIGHT, WIDTH), 20 * number, dtype=np.uint8))
    return tmp_path


def _write(path: Path, rows: list[dict[str, Any]], separator: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _rows(number: int = 3, **cells: Any) -> list[dict[str, Any]]:
    return [{"image": f"images/{n}.png", "phrase": f"Image {n}, größer.", **cells} for n in range(number)]


def _module(manifest: Path, **settings: Any) -> ManifestDataModule:
    defaults: dict[str, Any] = {"image_size": 32, "batch_size": 2, "num_workers": 0, "fractions": (0.5, 0.25, 0.25)}
    return ManifestDataModule(str(manifest), **{**defaults, **settings})


def _bad(manifest: Path, **settings: Any) -> list[BadRow]:
    return _module(manifest, **settings).checked_rows()[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_tables_of_every_form_say_the_same(root: Path, separator: str, encoding: str) -> None:
    rows = _rows(boxes="[[8, 6, 40, 30], [0, 0, 80, 60]]", finding="nodule", patient_id="p")
    path = _write(root / "images.csv", rows, separator, encoding)
    lines = [json.dumps({**row, "boxes": json.loads(row["boxes"])}) for row in rows]
    (root / "images.jsonl").write_text("\n".join(lines), encoding=encoding)
    (root / "images.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    pairs, bad = _module(path).checked_rows()
    assert not bad
    assert [pair.phrase for pair in pairs] == [row["phrase"] for row in rows]
    assert pairs[1].boxes == [(8, 6, 40, 30), (0, 0, 80, 60)]
    assert (pairs[1].id, pairs[1].patient_id, pairs[1].finding) == ("images/1.png", "p", "nodule")
    assert pairs[1].size == (HEIGHT, WIDTH)
    assert pairs[1].source == (str(path), 3)
    for name in ("images.jsonl", "images.csv.gz"):
        again = _module(root / name).checked_rows()[0]
        assert [(s.id, s.phrase, s.boxes, s.split) for s in again] == [
            (s.id, s.phrase, s.boxes, s.split) for s in pairs
        ]


def test_columns_are_mapped_and_root_is_set(root: Path) -> None:
    rows = [
        {"file": "0.png", "caption": "Clear.", "phrase": "not this", "who": 7, "fold": "Valid"},
        {"file": "1.png", "caption": "Mass.", "phrase": "nor this", "who": 8, "fold": "training"},
    ]
    path = _write(root / "table.csv", rows)
    columns = {"image": "file", "phrase": "caption", "patient_id": "who", "split": "fold"}
    pairs, bad = _module(path, root=str(root / "images"), columns=columns).checked_rows()
    assert not bad
    assert [(s.phrase, s.patient_id, s.split) for s in pairs] == [("Clear.", "7", "val"), ("Mass.", "8", "train")]
    with pytest.raises(ValueError, match=r"lacks the columns \['image'\]\. The columns are \['file', 'caption'"):
        _module(path, columns={"phrase": "caption"}).checked_rows()
    with pytest.raises(ValueError, match=r"`columns` names \['fund'\], which .* does not have"):
        _module(path, columns={**columns, "finding": "fund"}).checked_rows()
    with pytest.raises(ValueError, match=r"columns maps \['pictures'\]\. Map only the names image, phrase, id"):
        _module(path, columns={"pictures": "file"})


def test_one_column_may_be_several_of_ours(root: Path) -> None:
    path = _write(root / "t.csv", [{"file": row["image"], "phrase": row["phrase"]} for row in _rows()])
    pairs, bad = _module(path, columns={"image": "file", "id": "file", "patient_id": "file"}).checked_rows()
    assert not bad
    assert [(pair.id, pair.patient_id) for pair in pairs] == [(f"images/{n}.png",) * 2 for n in range(3)]


def test_a_column_without_values_is_none(root: Path) -> None:
    """As spreadsheets write it: the split is then drawn, and ids are made."""
    empty = dict.fromkeys(("id", "patient_id", "split", "finding", "boxes", "x", "y", "w", "h"), "")
    blank, without = (_module(_write(root / f"{n}.csv", _rows(4, **cells))) for n, cells in enumerate((empty, {})))
    blank.setup("fit")
    without.setup("fit")
    as_lists = [{split: [(p.id, p.image) for p in pairs] for split, pairs in m.pairs.items()} for m in (blank, without)]
    assert as_lists[0] == as_lists[1]


def test_made_ids_are_no_images_and_do_not_hang_on_bad_rows(root: Path) -> None:
    for name in ("a", "a-2"):
        (root / name).write_bytes((root / "images" / "0.png").read_bytes())
    rows = [{"image": name, "phrase": f"Phrase {place}."} for place, name in enumerate(("a", "a", "a", "a-2"))]
    path = _write(root / "t.csv", rows)
    pairs, bad = _module(path).checked_rows()
    assert not bad
    assert [pair.id for pair in pairs] == ["a", "a-3", "a-4", "a-2"]
    rows[0]["phrase"] = rows[1]["phrase"] = ""
    pairs, bad = _module(_write(path, rows)).checked_rows()
    assert len(bad) == 2
    assert [pair.id for pair in pairs] == ["a-4", "a-2"]


@pytest.mark.parametrize(
    ("image", "patient", "shows"),
    [
        ("p10000032/s5/x.png", "10000032", False),
        ("00000007_001.png", "7", False),
        ("00000007_001.png", "07", False),
        ("smith_jane/1.png", "Smith", False),
        ("images/17.png", "7", True),
        ("images/x.png", "10000032", True),
    ],
)
def test_made_ids_hold_no_patient(root: Path, image: str, patient: str, shows: bool) -> None:
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    (root / image).write_bytes((root / "images" / "0.png").read_bytes())
    rows = [{"image": image, "phrase": phrase, "patient_id": patient} for phrase in ("Clear.", "Mass.")]
    pairs, bad = _module(_write(root / "t.csv", rows)).checked_rows()
    assert not bad
    if shows:
        assert [pair.id for pair in pairs] == [image, f"{image}-2"]
    else:
        assert re.fullmatch("[0-9a-f]{12}", pairs[0].id)
        assert pairs[1].id == f"{pairs[0].id}-2"


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_bad_row_takes_its_pair_with_it(root: Path, with_ids: bool) -> None:
    rows = [dict(_rows(1)[0], x=x, y=6, w=10, h=12) for x in (1, 75, 30)] + [dict(_rows(2)[1], x=5, y=6, w=10, h=12)]
    if with_ids:
        rows = [{"id": row["image"], **row} for row in rows]
    pairs, bad = _module(path := _write(root / "t.csv", rows)).checked_rows()
    assert [pair.image_id for pair in pairs] == ["images/1.png"]
    rule = f"another row of the same pair is bad: {path}, line 3"
    assert [(row.line, row.rule) for row in bad if row.line != 3] == [(2, rule), (4, rule)]
    assert "outside of its image" in bad[1].rule


def test_phrases_are_one_but_for_case_and_space(root: Path) -> None:
    rows = [
        dict(_rows(1)[0], phrase=phrase, x=x, y=6, w=10, h=12)
        for x, phrase in enumerate(("Small effusion", "small  Effusion"))
    ]
    (pair,), bad = _module(_write(root / "t.csv", rows)).checked_rows()
    assert not bad
    assert (pair.phrase, len(pair.boxes)) == ("Small effusion", 2)


@pytest.mark.parametrize("cell", ['["a", "b"]', "true", '{"a": 1}', "NaN", "-Infinity"])
@pytest.mark.parametrize("name", ["phrase", "image", "finding", "id"])
def test_json_cells_that_are_no_text_are_bad(root: Path, name: str, cell: str) -> None:
    row = json.dumps({"id": "0", "finding": "mass", **_rows(1)[0], name: "CELL"}).replace('"CELL"', cell)
    (root / "t.jsonl").write_text(f"{row}\n", encoding="utf-8")
    (bad,) = _bad(root / "t.jsonl")
    assert (bad.line, bad.value, bad.rule) == (1, str(json.loads(cell)), f"the {name} is neither text nor a number")


@pytest.mark.parametrize("with_ids", [False, True])
def test_rows_of_one_phrase_make_one_pair(root: Path, with_ids: bool) -> None:
    rows = _rows(1) * 3 + _rows(2)[1:]
    rows = [dict(row, x=x, y=6, w=10, h=12) for row, x in zip(rows, (1, 20, 1, 5), strict=True)]
    rows.append({**rows[0], "phrase": "Another.", "x": "", "y": "", "w": "", "h": ""})
    if with_ids:
        rows = [{"id": f"{row['image']} {row['phrase']}", **row} for row in rows]
    pairs, bad = _module(_write(root / "t.csv", rows)).checked_rows()
    assert not bad
    assert [pair.boxes for pair in pairs] == [[(1, 6, 11, 18), (20, 6, 30, 18)], [(5, 6, 15, 18)], []]
    assert len({pair.id for pair in pairs}) == 3
    if not with_ids:
        assert [pair.id for pair in pairs] == ["images/0.png", "images/1.png", "images/0.png-2"]
    with pytest.raises(ValueError, match=r"some of the columns x, y, w, h, but not \['h'\]"):
        _module(_write(root / "t.csv", _rows(x=1, y=1, w=1))).checked_rows()


def test_masks_give_boxes(root: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[10:20, 30:50], mask[40:60, 0:5] = 255, 255
    cv2.imwrite(str(root / "mask.png"), mask)
    cv2.imwrite(str(root / "small.png"), mask[:30])
    pairs, bad = _module(_write(root / "t.csv", _rows(mask="mask.png"))).checked_rows()
    assert not bad
    assert sorted(pairs[0].boxes) == [(0, 40, 5, 60), (30, 10, 50, 20)]
    bad = _bad(_write(root / "t.csv", _rows(1, mask="small.png")))
    assert bad[0].rule == "the mask is 80 x 30 and its image 80 x 60"
    cv2.imwrite(str(root / "faint.jpg"), (mask > 0).astype(np.uint8) * 40)
    bad = _bad(_write(root / "t.csv", _rows(1, mask="faint.jpg")))
    assert bad[0].rule == "the mask is a JPEG without a pixel above 127: save it as PNG"


@pytest.mark.parametrize(
    ("name", "kind", "values", "boxes"),
    [
        ("one.png", np.uint8, (0, 1), [(10, 20, 30, 50)]),
        ("labels.png", np.uint8, (0, 2), [(10, 20, 30, 50)]),
        ("gray.jpg", np.uint8, (0, 255), [(10, 20, 30, 50)]),
        ("deep.png", np.uint16, (0, 1), [(10, 20, 30, 50)]),
        ("full.png", np.uint16, (65535, 65535), [(0, 0, WIDTH, HEIGHT)]),
        ("both.tif", np.uint16, (1, 65535), [(0, 0, WIDTH, HEIGHT)]),
        ("black.png", np.uint8, (0, 0), []),
        ("black.png", np.uint16, (0, 0), []),
    ],
)
def test_masks_mark_what_is_not_black(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: type,
    values: tuple[int, int],
    boxes: list[tuple[int, ...]],
) -> None:
    """Each is decoded once."""
    mask = np.full((HEIGHT, WIDTH), values[0], dtype=kind)
    mask[20:50, 10:30] = values[1]
    cv2.imwrite(str(root / name), mask)
    decoded = []
    monkeypatch.setattr(pixels, "_levels", lambda file: decoded.append(file.path) or _levels(file))
    monkeypatch.setattr(cv2, "imread", None)
    (pair,), bad = _module(_write(root / "t.csv", _rows(1, mask=name))).checked_rows()
    assert not bad
    assert list(pair.boxes) == boxes
    assert decoded == [root / name]


@pytest.mark.parametrize("waiting", [0, math.inf], ids=["slow", "fast"])
def test_many_rows_stay_in_their_order(root: Path, monkeypatch: pytest.MonkeyPatch, waiting: float) -> None:
    """They are read side by side if the disk is slow."""
    monkeypatch.setattr(table, "_WAITING", waiting)
    monkeypatch.setattr(table, "_TRIED", 40)
    rows = [{**_rows()[n % 3], "phrase": f"Image {n}." if n % 7 else "", "id": str(n)} for n in range(300)]
    pairs, bad = _module(_write(root / "t.csv", rows)).checked_rows()
    assert [pair.id for pair in pairs] == [str(n) for n in range(300) if n % 7]
    assert [row.line for row in bad] == [n + 2 for n in range(0, 300, 7)]


@pytest.mark.parametrize(
    ("cells", "value", "rule"),
    [
        ({"image": "images/none.png"}, "images/none.png", "no such file"),
        ({"image": ""}, "", "image is missing"),
        ({"image": "../secret.png"}, "../secret.png", "leads out of the root"),
        ({"image": "/etc/hostname"}, "/etc/hostname", "leads out of the root"),
        ({"phrase": "  "}, "", "phrase is empty"),
        ({"phrase": "a \ufffd b"}, "a \ufffd b", "wrong encoding"),
        ({"boxes": "8 6 40 30"}, "8 6 40 30", "no JSON"),
        ({"boxes": "[8, 6, 40, 30]"}, "[8, 6, 40, 30]", "no list of"),
        ({"boxes": "[[8, 6, 40]]"}, "[[8, 6, 40]]", "no list of"),
        ({"boxes": '[[8, 6, 40, "x"]]'}, "[8, 6, 40, 'x']", "not four numbers"),
        ({"boxes": "[[8, 6, NaN, 30]]"}, "[8.0, 6.0, nan, 30.0]", "not finite"),
        ({"boxes": '[["1_0", 6, 40, 30]]'}, "['1_0', 6, 40, 30]", "not four numbers"),
        ({"boxes": "[[40, 6, 8, 30]]"}, "[40.0, 6.0, 8.0, 30.0]", "inverted"),
        ({"boxes": "[[8, 6, 8, 30]]"}, "[8.0, 6.0, 8.0, 30.0]", "empty"),
        ({"boxes": "[[8, 6, 82, 30]]"}, "[8.0, 6.0, 82.0, 30.0]", "outside of its image of 80 x 60"),
        ({"boxes": "[[-2, 6, 40, 30]]"}, "[-2.0, 6.0, 40.0, 30.0]", "outside"),
        ({"split": "left"}, "left", "split is none of train"),
        ({"split": ""}, "", "split is none of"),
        ({"patient_id": ""}, "", "patient_id is missing"),
        ({"id": "0"}, "0", "taken already by .*t.csv, line 2"),
        ({"patient_id": "0", "split": "test"}, "", "two splits: test here, train in .*t.csv, line 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{name}={cell}" for name, cell in value.items()),
)
def test_bad_rows_are_named(root: Path, cells: dict[str, str], value: str, rule: str) -> None:
    rows = [{**row, "boxes": "", "split": "train", "patient_id": str(n), "id": str(n)} for n, row in enumerate(_rows())]
    rows[1] |= cells
    path = _write(root / "t.csv", rows)
    (found,) = _bad(path)
    assert (found.file, found.line, found.value) == (str(path), 3, value)
    assert re.search(rule, found.rule)
    with pytest.raises(ValueError, match=r"^1 bad row:\n  .*t\.csv, line 3[:,] (?s:.*)on_bad_row: skip"):
        _module(path).setup("fit")


def test_a_bad_row_is_told_to_be_in_two_splits_too(root: Path) -> None:
    rows = [{**row, "patient_id": "0", "split": "train"} for row in _rows(4)]
    rows[1] |= {"split": "test", "image": "images/none.png"}
    rows[2] |= {"phrase": ""}
    rows[3] |= {"split": "test"}
    path = _write(root / "t.csv", rows)
    pairs, bad = _module(path).checked_rows()
    leak = f"the patient is in two splits: test here, train in {path}, line 2"
    assert [(row.line, row.rule) for row in bad] == [
        (3, f"{leak}; and there is no such file below {str(root)!r}"),
        (4, "the phrase is empty"),
        (5, leak),
    ]
    assert [pair.image_id for pair in pairs] == ["images/0.png"]


def test_unreadable_image_with_boxes_is_a_bad_row(root: Path) -> None:
    (root / "images" / "1.png").write_bytes(b"no image")
    (bad,) = _bad(_write(root / "t.csv", _rows(boxes="[[8, 6, 40, 30]]")))
    assert (bad.line, bad.value) == (3, "images/1.png")
    assert "No readable image" in bad.rule


def test_broken_tables_are_named(root: Path) -> None:
    path = root / "t.csv"
    for content, message in [
        (
            b"image|phrase\nimages/0.png|Clear.\n",
            r"lacks the columns \['image', 'phrase'\]\. The columns are \['image\|ph",
        ),
        ("image,phrase\nimages/0.png,gr\xf6\xdfer\n".encode("latin-1"), r"t\.csv, line 2: The byte 0xf6 is not UTF-8"),
        (b"\xef\xbb\xbfimage,phrase\nx,a\n\xf6\n", r"t\.csv, line 3: The byte 0xf6 is not UTF-8"),
        ("image,phrase\n".encode("utf-16"), "UTF-16"),
        (b"", r"lacks the columns \['image', 'phrase'\]\. The columns are \[\]"),
        (b"image,phrase\n", "a header and no rows"),
        (b"image,phrase,image\n1,2,3\n", "several columns of the name 'image'"),
        (
            b'image,phrase\nimages/0.png,"A\nB"\nimages/1.png,"Open\nimages/2.png,Clear\n',
            r"t\.csv, line 4: A quote in this row is not closed",
        ),
        (
            b'image,phrase\nimages/0.png,Clear\nimages/1.png,"A "lung" nodule"\n',
            r"t\.csv, line 3: Text follows the quote",
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _module(path).checked_rows()
    with pytest.raises(FileNotFoundError, match=r"There is no table at '.*none\.csv'"):
        _module(root / "none.csv").checked_rows()
    (root / "t.csv.gz").write_bytes(b"image,phrase\n")
    with pytest.raises(ValueError, match="no complete gzip"):
        _module(root / "t.csv.gz").checked_rows()
    # A line break within quotes is part of a phrase, and so is a quote within one that does not begin with it.
    path.write_text('image,phrase\nimages/0.png,"Clear,\ndry."\nimages/1.png,A 3" mass.\n', encoding="utf-8")
    assert [pair.phrase for pair in _module(path).checked_rows()[0]] == ["Clear, dry.", 'A 3" mass.']
    # An unquoted comma in a phrase; and lines that are no JSON.
    path.write_text("image,phrase\nimages/0.png,Clear, dry.\nimages/1.png,Mass.\n", encoding="utf-8")
    (bad,) = _bad(path)
    assert (bad.line, bad.rule) == (2, "the row has 3 cells and the header 2; quote cells that hold a separator")
    (root / "t.jsonl").write_text('{"image": "images/0.png", "phrase": "x"}\n[1]\n{"image": 1\n', encoding="utf-8")
    assert [(row.line, row.rule) for row in _bad(root / "t.jsonl")] == [
        (2, "the line is no JSON object"),
        (3, "the line is no JSON object"),
    ]


def test_skipped_rows_are_counted_and_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(12)
    rows[3]["phrase"], rows[7]["image"] = "", "images/none.png"
    path = _write(root / "t.csv", rows)
    monkeypatch.chdir(root)
    data = _module(path, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"listed in skipped_rows.csv: 2 bad rows:\n  .*line 5: the phrase is empty"):
        data.setup("fit")
    assert sum(map(len, data.pairs.values())) == 10
    with Path("skipped_rows.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [(row["line"], row["value"]) for row in listed] == [("5", ""), ("9", "images/none.png")]
    with pytest.raises(ValueError, match="on_bad_row must be one of error, skip, got 'ignore'"):
        _module(path, on_bad_row="ignore")


def test_skipped_rows_are_listed_beside_the_runs_log(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    rows = _rows(12)
    rows[3]["phrase"] = ""
    data = _module(_write(root / "t.csv", rows), on_bad_row="skip")
    data.trainer = Trainer(logger=TensorBoardLogger("logs", name="mine", version=7), accelerator="cpu")
    with pytest.warns(UserWarning, match=r"listed in logs/mine/version_7/skipped_rows\.csv: 1 bad row:"):
        data.setup("fit")
    assert [path.parent for path in root.rglob("skipped_rows.csv")] == [root / "logs" / "mine" / "version_7"]
    text = Path("logs/mine/version_7/skipped_rows.csv").read_text(encoding="utf-8")
    assert "t.csv,5,,the phrase is empty" in text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_names_the_image_that_broke(root: Path, workers: int) -> None:
    data = _module(_write(root / "t.csv", _rows(12)), num_workers=workers, batch_size=6)
    data.setup("fit")
    Path(data.pairs["train"][0].image).unlink()
    Path(data.pairs["train"][3].image).write_bytes(b"")
    with pytest.raises(ValueError, match=r"Pair 'images/\d+\.png' \(.*images/\d+\.png\): (There is|No readable)"):
        list(data.train_dataloader())


def test_crop_says_what_it_cuts(root: Path) -> None:
    rows = _rows(12, boxes="[[0, 0, 5, 30], [2, 0, 40, 30], [30, 10, 50, 30]]")
    data = _module(_write(root / "t.csv", rows), resize_mode="shortest")
    with pytest.warns(UserWarning, match=r"shortest cuts 18 of 27 boxes, 9 of them wholly"):
        data.setup("fit")
    boxes = data.dataset("train")[0].boxes
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0, 0.5, 0.5], [1 / 3, 1 / 6, 2 / 3, 0.5]]), atol=0.02, rtol=0)


def test_fit_from_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str) -> None:
    monkeypatch.chdir(root)
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    rows = [dict(row, legend=row.pop("phrase"), boxes="[[8, 6, 40, 30]]", finding="nodule") for row in _rows(12)]
    rows[5]["legend"] = ""
    path = _write(root / "t.csv", rows, ";")
    words = ["fit", "--model.name=tiny.json", "--model.warmup_steps=1", "--data=ManifestDataModule"]
    words += [f"--data.manifest={path}", "--data.columns.phrase=legend", "--data.batch_size=2", "--data.num_workers=0"]
    words += ["--data.fractions=[0.5,0.25,0.25]", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    words += ["--data.cache_dir=kept", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    with pytest.raises(SystemExit, match=r"t\.csv, line 7: the phrase is empty"):
        main(words)
    with pytest.warns(UserWarning, match="Left out, listed in .*skipped_rows.csv"):
        main([*words, "--data.on_bad_row=skip"])
    assert len(list(Path("kept").rglob("*.npz"))) >= 8


NUMBERS = st.floats() | st.integers() | st.text(max_size=4) | st.none() | st.booleans()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=5) | NUMBERS, max_size=3))
def test_any_boxes_are_read_or_refused(cells: list[Any]) -> None:
    for cell in (cells, json.dumps(cells)):
        try:
            boxes = boxes_of_json(cell)
            check_inside(boxes, (100, 100))
        except RuleError:
            continue
        for x0, y0, x1, y1 in boxes:
            assert -1 <= x0 < x1 <= 101
            assert -1 <= y0 < y1 <= 101


@settings(max_examples=150, deadline=None)
@given(st.lists(NUMBERS, min_size=4, max_size=4))
def test_any_box_cells_are_read_or_refused(cells: list[Any]) -> None:
    try:
        boxes = box_of_cells(cells)
    except RuleError:
        return
    assert all(math.isfinite(side) for box in boxes for side in box)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["a/../../b", "a//b", "./a", "..", "~", "a\\..\\..\\b", "."]))
def test_no_path_leads_out_of_the_root(name: str) -> None:
    with pytest.raises(RuleError):
        find_image(Path("/nowhere/at/all"), name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(alphabet='image,phrs;\t"\n\r{}:[]\0é ', max_size=120).map(str.encode))
def test_any_bytes_are_a_table_or_a_clear_error(tmp_path: Path, content: bytes) -> None:
    for name in ("t.csv", "t.jsonl", "t.csv.gz"):
        (tmp_path / name).write_bytes(content)
        # Any other kind of error is a bug.
        with contextlib.suppress(ValueError):
            pairs, bad = _module(tmp_path / name).checked_rows()
            assert not pairs
            assert all(row.rule and row.line for row in bad)


# Half characters, the sign of a wrong encoding, and NUL are refused.
PHRASE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufffd"), min_size=1, max_size=30)
BOX = st.tuples(*[st.floats(0, 1)] * 4).map(lambda ends: [*sorted(ends[::2]), *sorted(ends[1::2])])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    phrases=st.lists(PHRASE.filter(str.strip), min_size=3, max_size=8),
    box=BOX.filter(lambda box: box[1] - box[0] > 0.01 and box[3] - box[2] > 0.01),
    form=st.sampled_from([",", ";", "\t", "jsonl"]),
    resize_mode=st.sampled_from(["longest", "shortest", "squash"]),
)
def test_what_is_written_is_read(root: Path, phrases: list[str], box: list[float], form: str, resize_mode: Any) -> None:
    """Any phrases, by CSV and JSON lines, come out as they went in, but for white space; and boxes of every image."""
    corners = [box[0] * WIDTH, box[2] * HEIGHT, box[1] * WIDTH, box[3] * HEIGHT]
    rows = [{"image": f"images/{n}.png", "phrase": phrase, "boxes": [corners]} for n, phrase in enumerate(phrases)]
    path = root / ("t.jsonl" if form == "jsonl" else "t.csv")
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        _write(path, rows, form)
    data = _module(path, resize_mode=resize_mode, fractions=(1.0, 0.0, 0.0))
    pairs, bad = data.checked_rows()
    assert not bad
    assert [pair.phrase for pair in pairs] == [" ".join(phrase.split()) for phrase in phrases]
    assert all(pair.boxes == [tuple(corners)] for pair in pairs)
    data.pairs = {"train": pairs, "val": [], "test": []}
    batch = data.dataset("train").batch([pairs[0].id])
    assert batch["image"].shape == (1, 3, 32, 32)
    assert all(((boxes >= 0) & (boxes <= 1)).all() for boxes in batch["boxes"])


def test_half_characters_and_boxes_of_nothing_are_bad_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file cannot hold, or the transform would refuse in the midst of an epoch, is refused with its row."""
    monkeypatch.chdir(root)
    lines = [json.dumps(row) for row in _rows(4, boxes=[[0, 0, 9, 9]])]
    lines[0] = lines[0].replace("Image", "\\ud800")
    lines[1] = lines[1].replace("[0, 0, 9, 9]", "[-1, 5, -0.5, 9]")
    lines[2] = lines[2].replace("[0, 0, 9, 9]", "[5, 5, 5.000001, 9]")
    (root / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = _module(root / "t.jsonl", on_bad_row="skip", fractions=(1.0, 0.0, 0.0))
    rules = ["characters of a wrong encoding", *["covers nothing of its image of 80 x 60"] * 2]
    for bad, rule in zip(data.checked_rows()[1], rules, strict=True):
        assert rule in bad.rule
    with pytest.warns(UserWarning, match="3 bad rows"):
        assert len(data.list_pairs()) == 1
    assert "ud800" in Path("skipped_rows.csv").read_text(encoding="utf-8")


@given(st.text(max_size=8))
def test_split_names(name: str) -> None:
    known = {"train", "training", "val", "valid", "validate", "validation", "dev", "test", "testing"}
    if name.lower() in known:
        assert split_name(name) in ("train", "val", "test")
    else:
        with pytest.raises(RuleError, match="none of train"):
            split_name(name)
