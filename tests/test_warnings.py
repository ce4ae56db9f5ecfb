"""Input that is plausible but wrong: a warning with value and consequence, and images that break during an epoch."""

from __future__ import annotations

import csv
import gzip
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image
from test_ms_cxr import annotation_rows, write_annotations, write_images
from test_nih import LABEL_HEADER

from matex_pl.cli import main
from matex_pl.commands.check_data import Report, check_data
from matex_pl.data import ManifestDataModule, MsCxrDataModule, NihDataModule
from matex_pl.data.nih import BOX_FILE, LABEL_FILE
from matex_pl.data.validation import WARNINGS, odd_view
from matex_pl.training.module import ClipModule

HEIGHT, WIDTH = 60, 80
FIRST = "as in t.csv, line 3"
SPLITS = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
Found = list[tuple[str, int, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str) -> Path:
    """A folder to run in, with twelve images of 80 x 60 pixels and a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("matex_pl"), "propagate", True)
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)
        cv2.imwrite(f"{number}.png", pixels)
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    return tmp_path


def _rows(number: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "id": f"pair {n}",
            "image": f"{n}.png",
            "phrase": f"Effusion {n}.",
            "patient_id": f"p{n}",
            "split": SPLITS[n],
            "boxes": "[[8, 6, 40, 30]]",
        }
        for n in range(number)
    ]


def _write(rows: list[dict[str, Any]], name: str = "t.csv") -> str:
    with Path(name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def _module(**settings: Any) -> ManifestDataModule:
    return ManifestDataModule("t.csv", **{"image_size": 32, "batch_size": 2, "num_workers": 0, **settings})


def _found(report: Report) -> Found:
    return [(row.kind, row.line, row.value) for row in report.warnings]


def _draw(name: str, shape: tuple[int, int], constant: bool = False) -> Callable[[], None]:
    pixels = np.full(shape, 90, dtype=np.uint8)
    if not constant:
        pixels[:, ::2] += 9
    return lambda: cv2.imwrite(name, pixels)  # type: ignore[return-value]


def _copy(name: str) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(Path("1.png").read_bytes())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("changes", "prepare", "expected"),
    [
        ({3: {"boxes": "[[70, 6, 80.5, 30]]"}}, None, [("box outside", 5, "[70.0, 6.0, 80.5, 30.0]")]),
        ({3: {"boxes": "[[-1, 6, 8, 30]]"}}, None, [("box outside", 5, "[-1.0, 6.0, 8.0, 30.0]")]),
        ({3: {"boxes": "[[0.1, 0.2, 0.5, 1]]"}}, None, [("box fraction", 5, "[0.1, 0.2, 0.5, 1.0]")]),
        ({3: {"boxes": "[[4, 4, 4.5, 20], [4, 4, 20, 20]]"}}, None, [("box small", 5, "[4.0, 4.0, 4.5, 20.0]")]),
        ({3: {"phrase": "..."}}, None, [("phrase", 5, "...")]),
        ({3: {"phrase": "\u200b\u2060"}}, None, [("phrase", 5, "\u200b\u2060")]),
        ({3: {"phrase": "\x07\x1b"}}, None, [("phrase", 5, "\x07\x1b")]),
        ({3: {"id": "a\x1b[2Jb"}}, None, [("id", 5, "a\x1b[2Jb")]),
        ({3: {"patient_id": "p\u200b3"}}, None, [("id", 5, "")]),
        ({3: {"boxes": ""}}, _draw("3.png", (1, 1), constant=True), [("shape", 5, "1 x 1"), ("constant", 5, "3.png")]),
        ({}, _draw("3.png", (60, 500)), [("shape", 5, "500 x 60")]),
        ({}, _draw("3.png", (60, 80), constant=True), [("constant", 5, "3.png")]),
        ({}, _copy("7.png"), [("splits", 9, FIRST), ("patients", 9, FIRST)]),
        ({}, _copy("2.png"), [("patients", 4, FIRST)]),
        ({2: {"patient_id": "p1"}}, _copy("2.png"), []),
        ({7: {"split": "test"}, 8: {"split": "test"}}, None, [("one pair", 8, "val")]),
        ({n: {"phrase": "Clear."} for n in range(6, 9)}, None, [("one phrase", 8, "Clear.")]),
        ({}, None, []),
    ],
)  # fmt: skip
def test_warnings_are_listed_and_logged_once_per_kind(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    changes: dict[int, dict[str, str]],
    prepare: Callable[[], None] | None,
    expected: Found,
) -> None:
    rows = _rows()
    for place, cells in changes.items():
        rows[place] |= cells
    _write(rows)
    if prepare:
        prepare()
    report = check_data(_module(), out="found.csv")
    assert _found(report) == expected
    assert not report.bad
    for kind, line, value in expected:
        assert f"  {WARNINGS[kind]}: {sum(other == kind for other, _, _ in expected)}\n" in report.text
        assert f"    t.csv, line {line}" + (f": {value!r}\n" if value else "\n") in report.text
    with Path("found.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [(row["line"], row["used"]) for row in listed] == [(str(line), "yes") for _, line, _ in expected]
    with caplog.at_level("WARNING", "matex_pl"):
        _module().setup("fit")
    # Pixels are not read at the start.
    known = {kind for kind, *_ in expected} - {"constant", "splits", "patients"}
    if not changes.get(3, {"boxes": "known"}).get("boxes", "known"):
        known -= {"shape"}
    logged = [record.message for record in caplog.records]
    assert len(logged) == len(known)
    for kind in known:
        assert sum(message.startswith(f"{WARNINGS[kind]} (") for message in logged) == 1


def test_many_warnings_are_counted(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "boxes": "[[0.1, 0.2, 0.5, 0.6]]"} for row in _rows()]
    _write(rows)
    with caplog.at_level("WARNING", "matex_pl"):
        _module().setup("fit")
    (message,) = (record.message for record in caplog.records)
    assert message.startswith(f"{WARNINGS['box fraction']} (12 rows):\n  t.csv, line 2: '[0.1, 0.2, 0.5, 0.6]'\n  ")
    assert message.endswith("and 9 more, see `matex check-data`")
    assert len(message.splitlines()) == 5


def test_rows_with_other_numbers_of_cells(here: Path) -> None:
    lines = Path(_write(_rows())).read_text(encoding="utf-8").splitlines()
    lines[2] += ","
    lines[4] = "pair 3,3.png,Effusion 3.,p3,train"
    Path("t.csv").write_text("\n".join(lines), encoding="utf-8")
    assert _found(check_data(_module())) == [("cells", 3, "7 of 6 cells"), ("cells", 5, "5 of 6 cells")]
    # Separators at the end of the header and of all rows are columns without a name.
    Path("t.csv").write_text("\n".join(f"{line},," for line in lines[:1] + lines[5:]), encoding="utf-8")
    assert not _found(check_data(_module(fractions=(0.5, 0.25, 0.25))))


def test_warnings_of_refused_rows_are_left_out(here: Path) -> None:
    rows = _rows()
    rows[3] |= {"phrase": "...", "boxes": "[[70, 6, 90, 30]]"}
    _write(rows)
    report = check_data(_module())
    assert [row.line for row in report.bad] == [5]
    assert not report.warnings


@pytest.mark.parametrize(
    ("annotated", "size", "value"),
    [
        ((250, 300), (300, 250), ""),
        ((2500, 3000), (30, 25), ""),
        ((2500, 3000), (300, 249), ""),
        ((300, 250), (300, 250), "300 x 250, and the file 250 x 300"),
        ((2500, 3000), (64, 64), "2500 x 3000, and the file 64 x 64"),
    ],
)
def test_annotated_sizes_that_contradict_the_file(
    here: Path, annotated: tuple[int, int], size: tuple[int, int], value: str
) -> None:
    rows = [
        {**row, "x": 20, "y": 20, "w": 60, "h": 60, "image_width": annotated[0], "image_height": annotated[1]}
        for row in annotation_rows(10)
    ]
    write_annotations(here, rows[:8])
    write_images(here, [row["path"] for row in rows[:8]], size)
    data = MsCxrDataModule(".", image_size=32)
    pairs, bad = data.checked_rows()
    assert not bad
    found = {row.value for row in data.list_warnings(pairs) if row.kind == "annotated size"}
    assert found == ({value} if value else set())


def test_lateral_images_by_mimics_metadata(here: Path) -> None:
    rows = annotation_rows(3)
    write_annotations(here, rows)
    write_images(here, [row["path"] for row in rows])
    views = ["dicom_id,ViewPosition", "aaaa-0000,PA", "aaaa-0001,LATERAL", "aaaa-0002,AP LLD"]
    Path("views.csv.gz").write_bytes(gzip.compress("\n".join(views).encode()))

    def lateral(**settings: Any) -> Found:
        data = MsCxrDataModule(".", image_size=32, **settings)
        pairs, _ = data.checked_rows()
        return [(row.kind, row.line, row.value) for row in data.list_warnings(pairs) if row.kind == "view"]

    assert not lateral()
    expected = [("view", line, "LATERAL") for line in range(6, 10)]
    assert lateral(metadata_file="views.csv.gz") == expected
    Path("views.csv.gz").rename("mimic-cxr-2.0.0-metadata.csv.gz")
    assert lateral() == expected
    with pytest.raises(FileNotFoundError, match=r"There is no table at 'none\.csv'"):
        lateral(metadata_file="none.csv")


def test_nih_views_and_boxes(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [f"{n}_000.png,Mass,0,{n},60,F,{'LL' if n == 4 else 'PA'},9,9,1,1" for n in range(12)]
    Path(LABEL_FILE).write_text("\n".join([LABEL_HEADER, *labels]), encoding="utf-8")
    for n in range(12):
        Path(f"{n}.png").rename(f"{n}_000.png")
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", "1_000.png,Mass,900,900,200,90,,,"]
    Path(BOX_FILE).write_text("\n".join(boxes), encoding="utf-8")
    data = NihDataModule(".", image_size=32)
    with caplog.at_level("WARNING", "matex_pl"):
        data.setup("test")
    assert [record.message.splitlines()[1].strip() for record in caplog.records if "frontal" in record.message] == [
        f"{LABEL_FILE}, line 6: 'LL'"
    ]
    assert any(WARNINGS["box outside"] in record.message for record in caplog.records)
    for box, message in [("1200,900,20,90", "covers nothing of its image of 1024 x 1024"), ("1,2,x,4", "not four num")]:
        Path(BOX_FILE).write_text("\n".join([boxes[0], f"1_000.png,Mass,{box}"]), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{BOX_FILE}, line 2: .*{message}"):
            data.list_pairs()
    Path(LABEL_FILE).write_bytes(f"{LABEL_HEADER}\n1_000.png,Ma\xdf,0,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{LABEL_FILE}, line 2: The byte 0xdf is not UTF-8"):
        data.list_pairs()


@pytest.mark.parametrize(
    ("view", "orientation", "odd"),
    [
        ("PA", ["L", "F"], ""),
        ("", [], ""),
        ("AP LLD", ["", ""], ""),
        ("ap_axial", ["LF"], ""),
        ("LL", [], "LL"),
        ("LATERAL", ["A", "F"], "LATERAL"),
        ("XTABLE LATERAL", [], "XTABLE LATERAL"),
        ("RAO", [], "RAO"),
        ("PA", ["R", "F"], r"PatientOrientation R\F"),
        ("", ["A", "F"], r"PatientOrientation A\F"),
        ("AP", ["L", "H"], r"PatientOrientation L\H"),
    ],
)
def test_odd_views(view: str, orientation: list[str], odd: str) -> None:
    assert odd_view(view, orientation) == odd


@pytest.mark.parametrize("boxes", ["", "[[8, 6, 40, 30]]"])
def test_views_of_dicom_headers(here: Path, caplog: pytest.LogCaptureFixture, boxes: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from test_dicom import write_dicom

    write_dicom(Path("3.dcm"), np.arange(4000, dtype=np.uint16).reshape(50, 80))
    header = pydicom.dcmread("3.dcm")
    header.ViewPosition, header.PatientOrientation = "PA", ["R", "F"]
    header.save_as("3.dcm")
    rows = [{**row, "boxes": boxes} for row in _rows()]
    rows[3]["image"] = "3.dcm"
    _write(rows)
    assert _found(check_data(_module())) == [("view", 5, r"PatientOrientation R\F")]
    with caplog.at_level("WARNING", "matex_pl"):
        _module().setup("fit")
    # At the start a header is read only where a size is needed.
    assert len(caplog.records) == bool(boxes)


def test_a_training_split_of_one_pair_is_refused(here: Path, tiny_json: str) -> None:
    rows = [{**row, "split": ["train", "val", "val", "test", "test"][n]} for n, row in enumerate(_rows(5))]
    _write(rows)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(
        ValueError, match="ManifestDataModule has one train pair, and contrastive training needs at least"
    ):
        trainer.fit(ClipModule(tiny_json), _module(image_size=None))
    assert re.search(r"\n  fit +no: .* one train pair.*\n  test +yes\n  benchmark +yes$", check_data(_module()).text)


def test_check_data_says_what_could_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "split": "train" if row["split"] == "val" else row["split"]} for row in _rows()]
    rows[0]["image"] = "none.png"
    _write(rows)
    words = ["check-data", "--data=ManifestDataModule", "--data.manifest=t.csv", "--model=tiny.json"]
    with pytest.raises(SystemExit):
        main(words)
    text = capsys.readouterr().out
    assert re.search(r"these data and tiny\.json:\n  fit +no: 1 bad row; ManifestDataModule has no val pairs", text)
    assert re.search(r"\n  test +no: 1 bad row\n  benchmark +no: 1 bad row; .* no val pairs", text)
    with pytest.raises(SystemExit):
        main([*words, "--data.on_bad_row=skip", "--data.image_size=48", "--pretrained=none.pt"])
    text = capsys.readouterr().out
    weights = "the weights 'none.pt' are neither a file nor a tag of tiny.json"
    size = "the data module's image_size is (48, 48), and the model takes (32, 32)"
    assert f"\n  test       no: {weights}; {size}\n" in text
    with pytest.raises(SystemExit):
        main([*words, "--data.on_bad_row=skip"])
    assert re.search(r"\n  test +yes\n", capsys.readouterr().out)


def test_check_data_reads_images_as_the_training_does(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that it fills is the one that the training reads."""
    _write(_rows())
    check_data(_module(cache_dir="kept", image_size=None), model="tiny.json")
    assert len(list(Path("kept").rglob("*.npz"))) == 12
    from matex_pl.data import cache

    monkeypatch.setattr(cache, "read_image", None)
    data = _module(cache_dir="kept")
    data.setup("fit")
    assert data.dataset("train")[0].image.shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_gzip_files_that_inflate_without_bound(here: Path, name: str) -> None:
    with gzip.open(name, "wb", compresslevel=9) as file:
        file.write(b"image,phrase\n")
        for _ in range(70):
            file.write(b"0" * 2**20)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(name)} inflates from \d+ bytes to more than 64 MiB, as no table"
    ):
        ManifestDataModule(name).checked_rows()


def test_masks_are_measured_before_they_are_decoded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (9000, 9000)).save("mask.png")
    _write([{**row, "boxes": "", "mask": "mask.png"} for row in _rows()])
    from matex_pl.data import boxes

    monkeypatch.setattr(boxes, "read_mask_file", None)
    bad = _module().checked_rows()[1]
    assert {row.rule for row in bad} == {"the mask is 9000 x 9000 and its image 80 x 60"}


def _break_after_setup(data: ManifestDataModule, *names: str) -> None:
    data.setup("fit")
    for name in names:
        Path(name).write_bytes(b"broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_an_epoch(here: Path, workers: int) -> None:
    """One clear message, also from a worker of the loader."""
    _write([{**row, "boxes": ""} for row in _rows()])
    data = _module(num_workers=workers)
    _break_after_setup(data, "2.png")
    with pytest.raises(ValueError, match=r"^Pair 'pair 2' \(.*2\.png\): No readable image at") as caught:
        list(data.train_dataloader())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_covers_images_that_break(
    here: Path, caplog: pytest.LogCaptureFixture, tiny_json: str, workers: int
) -> None:
    rows = [{**row, "boxes": ""} for row in _rows()]
    rows.append({**rows[0], "image": "none.png", "id": "missing"})
    _write(rows)
    data = _module(num_workers=workers, on_bad_row="skip", image_size=None, batch_size=3)
    with pytest.warns(UserWarning, match="1 bad row"):
        _break_after_setup(data, "2.png", "7.png", "9.png", "10.png", "11.png")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=2, num_sanity_val_steps=0,
        default_root_dir="run",
    )  # fmt: skip
    with caplog.at_level("WARNING", "matex_pl"):
        trainer.fit(ClipModule(tiny_json, warmup_steps=0), data)
    assert trainer.global_step == 4
    assert trainer.callback_metrics["val/loss"].isfinite()
    logged = [r.message for r in caplog.records if r.message.startswith("Left out because their images cannot be read")]
    assert logged[-1].splitlines()[0].endswith("run/skipped_rows.csv: 2 bad rows:")
    with Path("run/skipped_rows.csv").open(newline="", encoding="utf-8") as file:
        listed = [(Path(row["value"]).name, row["line"]) for row in csv.DictReader(file)]
    assert listed == [("none.png", "14"), ("2.png", "4"), ("7.png", "9")]
    with pytest.raises(ValueError, match=r"No image of a whole batch can be read\. The first error: Pair 'pair 9'"):
        trainer.test(ClipModule(tiny_json), data)


def test_skip_does_not_train_on_nothing(here: Path) -> None:
    _write([{**row, "boxes": ""} for row in _rows()])
    data = _module(on_bad_row="skip")
    _break_after_setup(data, *(f"{n}.png" for n in range(5)))
    with pytest.raises(ValueError, match=r"No image of a whole batch can be read"):
        list(data.train_dataloader())
    assert len(data.dataset("train").batch(["pair 5", "pair 4"])["id"]) == 1
    with pytest.raises(ValueError, match=r"None of the images of the pairs pair 1, pair 2 can be read"):
        data.dataset("train").batch(["pair 1", "pair 2"])
    data.mean_image()
    _break_after_setup(data, "5.png")
    with pytest.raises(ValueError, match=r"None of 6 images for the mean training image can be read"):
        data.mean_image()


def test_several_processes_cannot_leave_out_during_an_epoch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write([{**row, "boxes": ""} for row in _rows()])
    data = _module(on_bad_row="skip")
    _break_after_setup(data, "2.png")
    from matex_pl.data import table

    monkeypatch.setattr(table.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(table.dist, "get_world_size", lambda: 2)
    with pytest.raises(
        ValueError, match=r"^Pair 'pair 2' .* With several processes, on_bad_row: skip cannot leave out"
    ):
        data.dataset("train").readable([1, 2])


def test_messages_of_several_sentences_end_once(here: Path) -> None:
    rows = _rows()
    Path("2.png").write_bytes(b"broken")
    _write(rows)
    (bad,) = _module().checked_rows()[1]
    assert re.fullmatch(
        r"t\.csv, line 4, '2\.png': No readable image at .*\. Copy the file again, or give another one\.", str(bad)
    )


def test_a_refusal_with_many_bad_rows_is_short(here: Path) -> None:
    _write([{**row, "phrase": ""} for row in _rows()])
    with pytest.raises(ValueError, match=r"^12 bad rows, the first 3:\n  t") as caught:
        _module().setup("fit")
    assert len(str(caught.value).splitlines()) == 5


def test_json_of_ms_cxr_is_refused_without_errors_of_python(here: Path) -> None:
    for text in ('{"images": []}', "{", "[]"):
        Path("x.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"x\.json is no COCO-style JSON .* Give the JSON or CSV file") as caught:
            MsCxrDataModule(".", annotations="x.json").checked_rows()
        assert "Error" not in str(caught.value)


def test_phantoms_log_that_they_are_drawn(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    from matex_pl.data import PhantomDataModule

    with caplog.at_level("INFO", "matex_pl"):
        for _ in range(2):
            PhantomDataModule("phantoms", num_train=4, num_val=2, num_test=2, stored_size=64, image_size=32).setup(
                "fit"
            )
    assert [r.message for r in caplog.records if "phantoms" in r.message] == [
        "Drawing 8 phantoms of 64 x 64 pixels in phantoms, once."
    ]


def test_a_scalar_without_boxes_is_reported_once(here: Path, tiny_json: str, recwarn: pytest.WarningsRecorder) -> None:
    from matex_pl.callbacks import AttributionMetrics

    _write([{**row, "boxes": ""} for row in _rows()])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=3, num_sanity_val_steps=0,
        callbacks=[AttributionMetrics(num_batches=1)],
    )  # fmt: skip
    trainer.fit(ClipModule(tiny_json, warmup_steps=0), _module(image_size=None))
    messages = [
        str(warning.message) for warning in recwarn if "attribution/pointing_game is NaN" in str(warning.message)
    ]
    assert len(messages) == 1
    assert trainer.callback_metrics["attribution/pointing_game"].isnan()


def test_the_list_is_complete_after_the_last_batch_of_a_resumed_epoch(here: Path) -> None:
    _write([{**row, "boxes": ""} for row in _rows()])
    data = _module(on_bad_row="skip", batch_size=2)
    data.setup("fit")
    loader: Any = data.train_dataloader()
    last = [index for _, index in loader.sampler][len(loader) * 2 - 1]
    path = data.pairs["train"][last].image
    Path(str(path)).write_bytes(b"broken")
    loader.load_state_dict(loader.state_dict() | {"batches": 1})
    # Lightning keeps the iterator after the last batch.
    batches = iter(loader)
    read = [next(batches) for _ in range(len(loader) - 1)]
    assert [len(batch["id"]) for batch in read] == [2] * (len(loader) - 2) + [1]
    assert Path(str(path)).name in Path("skipped_rows.csv").read_text(encoding="utf-8")


def test_the_list_of_left_out_rows_replaces_no_other_file(here: Path) -> None:
    _write(_rows())
    Path("skipped_rows.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'skipped_rows\.csv' is not replaced, because it is no earlier output"):
        _module(on_bad_row="skip").setup("fit")
    assert Path("skipped_rows.csv").read_text(encoding="utf-8") == "mine"
    _module().setup("fit")
    Path("skipped_rows.csv").write_text("file,line,value,rule,used\n", encoding="utf-8")
    _module(on_bad_row="skip").setup("fit")


def test_panels_leave_out_images_that_break(here: Path, tiny_json: str) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from matex_pl.callbacks import AttributionMaps

    _write([{**row, "boxes": ""} for row in _rows()])
    data = _module(on_bad_row="skip", image_size=None, batch_size=3)
    _break_after_setup(data, "7.png")
    trainer = Trainer(
        accelerator="cpu", logger=TensorBoardLogger("tb"), enable_checkpointing=False, max_epochs=1,
        callbacks=[AttributionMaps("rollout")],
    )  # fmt: skip
    trainer.fit(ClipModule(tiny_json, warmup_steps=0), data)
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()["images"]
    assert sorted(tags) == ["maps/matex/pair 6", "maps/matex/pair 8"]
