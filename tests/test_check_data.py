"""`matex check-data` on good data and on data with one fault of each kind."""

from __future__ import annotations

import csv
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from families import CONFIGS as FAMILY_CONFIGS
from test_cli import nih_folder

from matex_pl.cli import main
from matex_pl.clip import cut_text, load_clip, load_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str) -> Path:
    """Twelve images of 80 x 60 pixels, a tiny model, and a config for a table `t.csv`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(12):
        cv2.imwrite(f"images/{number}.jpg", np.random.default_rng(number).integers(0, 255, (60, 80), dtype=np.uint8))
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    Path("mine.yaml").write_text(
        "model: {name: tiny.json}\n"
        "data: {class_path: matex_pl.data.ManifestDataModule, init_args: {manifest: t.csv}}\n",
        encoding="utf-8",
    )
    return tmp_path


def _rows() -> list[dict[str, Any]]:
    phrases = ["Right effusion.", "Left effusion.", "Bilateral effusion.", "Cardiomegaly.", "No nodule.", "Mass."]
    return [
        {
            "image": f"images/{n}.jpg",
            "phrase": phrases[n % 6],
            "patient_id": n // 2,
            "finding": ["effusion", "", "mass"][n % 3],
            "split": ["train", "train", "val", "test"][n // 2 % 4],
            "boxes": "[[0, 10, 30, 40]]" if n % 2 else "",
        }
        for n in range(12)
    ]


def _write(rows: list[dict[str, Any]]) -> None:
    with Path("t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _table(text: str, title: str) -> dict[str, list[int]]:
    part = next(part for part in text.split("\n\n") if part.startswith(title))
    lines = [re.split(r"\s{2,}", line.strip()) for line in part.splitlines()[1:]]
    return {name: list(map(int, numbers)) for name, *numbers in lines}


def test_good_data_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(_rows())
    main(["check-data", "--config", "mine.yaml"])
    text = capsys.readouterr().out
    assert _table(text, "split") == {"train": [8, 8, 4, 4, 4], "val": [2, 2, 1, 1, 1], "test": [2, 2, 1, 1, 1]}
    assert _table(text, "finding") == {"effusion": [3, 0, 1], "mass": [3, 1, 0], "no finding": [2, 1, 1]}
    sides = _table(text, "side")
    assert sides["right"] == sides["left"] == [1, 0, 1]
    assert sides["both sides"] == [2, 0, 0]
    assert sum(map(sum, sides.values())) == 12
    assert "All phrases fit into the 16 tokens of tiny.json." in text
    assert "No warnings.\n\nNo bad rows.\n\n" in text
    assert text.strip().splitlines()[-4:] == [
        "Could start with these data and tiny.json:",
        "  fit        yes",
        "  test       yes",
        "  benchmark  yes",
    ]


def test_boxes_are_cut_to_the_frame_of_the_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(_rows())
    words = ["check-data", "--config", "mine.yaml", "--data.resize_mode=shortest"]
    for more, frame, cut in [
        ([], load_clip("tiny.json").image_size, 6),
        (["--image_size=[30,40]"], (30, 40), 0),
        (["--image_size=[30,40]", "--data.image_size=64"], (64, 64), 6),
    ]:
        main([*words, *more])
        text = capsys.readouterr().out
        assert f"shortest to {frame[1]} x {frame[0]} cuts {cut} of 6 boxes, 0 of them wholly." in text
    described = Path("mine.yaml").read_text(encoding="utf-8")
    described = described.replace("{name: tiny.json}", "{name: tiny.json, image_size: [60, 80]}")
    Path("mine.yaml").write_text(described, encoding="utf-8")
    main(words)
    assert "shortest to 80 x 60 cuts 0 of 6 boxes" in capsys.readouterr().out


def test_every_fault_is_in_the_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows()
    rows[0]["phrase"] = ""
    rows[1]["boxes"] = "[[0, 10, 90, 40]]"
    rows[2]["image"] = "../images/2.jpg"
    rows[3]["patient_id"] = 2
    rows[9]["phrase"] = "Mass in " + " ".join(f"word{n}" for n in range(30)) + " the very end."
    _write(rows)
    whole = Path("images/6.jpg").read_bytes()
    Path("images/6.jpg").write_bytes(whole[: len(whole) // 2])
    Path("images/8.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["check-data", "--config=mine.yaml", "--out", "bad/rows.csv", "--workers=2"])
    assert end.value.code == 1
    text = capsys.readouterr().out
    for line, rule in {
        2: "the phrase is empty",
        3: r"a box .* reaches outside of its image of 80 x 60, got '\[0\.0, 10\.0, 90\.0, 40\.0\]'",
        4: r"the path leads out of the root '\.', got '\.\./images/2\.jpg'",
        6: "the patient is in two splits: val here, train in t.csv, line 5\n",
        7: "the patient is in two splits: val here, train in t.csv, line 5\n",
        8: r"'images/6\.jpg': No readable image at '.*images/6\.jpg' \(the JPEG is .*truncated\).*another one\.\n",
        10: r"'images/8\.jpg': No readable image at '.*images/8\.jpg'.*another one\.\n",
    }.items():
        assert re.search(rf"  t\.csv, line {line}[:,] .*{rule}", text), rule
    assert "Phrases longer than the 16 tokens of tiny.json: 1" in text
    assert re.search(r"t\.csv, line 11, images/9\.jpg: cut off: '.*the very end \.'", text)
    assert "Bad rows: 7" in text
    assert re.search(r"\n  fit +no: 7 bad rows; .* has no val pairs.*\n  test +no: 7 bad rows\n", text)
    with Path("bad/rows.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [int(row["line"]) for row in listed] == [2, 3, 4, 6, 7, 8, 10, 11]
    assert [row["used"] for row in listed] == ["no"] * 7 + ["yes"]
    assert [row["value"] for row in listed[-3:-1]] == ["images/6.jpg", "images/8.jpg"]
    assert listed[-1]["rule"] == "the phrase is longer than the 16 tokens of tiny.json: this is cut off"
    assert listed[-1]["value"].endswith("the very end .")


def test_a_table_that_cannot_be_read_ends_with_status_2(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("image|phrase\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["check-data", "--config", "mine.yaml"])
    assert end.value.code == 2
    assert "matex check-data: t.csv lacks the columns ['image', 'phrase']. The columns are" in capsys.readouterr().err
    Path("t.csv").write_bytes(b"\xef\xbb\xbfimage,phrase\nimages/0.jpg,gr\xf6\xdfer\n")
    with pytest.raises(SystemExit) as end:
        main(["check-data", "--config", "mine.yaml"])
    assert end.value.code == 2
    assert "t.csv, line 2: The byte 0xf6 is not UTF-8. Save the file as UTF-8." in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"No data module given\. Pass --config"):
        main(["check-data"])
    _write(_rows())
    with pytest.raises(SystemExit, match="workers must be at least 1, got 0"):
        main(["check-data", "--config", "mine.yaml", "--workers=0"])
    with pytest.raises(SystemExit, match="Unknown model 'ViT-C'"):
        main(["check-data", "--config", "mine.yaml", "--model=ViT-C"])


def test_other_data_modules_are_checked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = nih_folder(here / "nih")
    (root / "images" / "00000004_000.png").write_bytes((root / "images" / "00000003_000.png").read_bytes()[:900])
    words = ["check-data", "--config", "nih.yaml", f"--data.root={root}"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    text = capsys.readouterr().out
    assert re.search(r"Bad rows: 1\n  .*Data_Entry_2017_v2020\.csv, line 6, '.*00000004_000\.png': No readable", text)
    assert _table(text, "finding")["pleural effusion"]
    assert "tokens of models/phantom_vit.json" in text


@pytest.mark.parametrize("options", ["{method: m2ib}", "{methods: {'': legrad, other: {num_blocks: 1}, third: m2ib}}"])
def test_the_methods_of_all_callbacks_are_checked(here: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A ResNet has no stream of tokens."""
    _write(_rows())
    kind = "AttributionMaps" if "{method:" in options else "AttributionMetrics"
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config = json.loads(Path("tiny.json").read_text(encoding="utf-8"))
    config["model_cfg"]["vision_cfg"] = vision
    Path("resnet.json").write_text(json.dumps(config), encoding="utf-8")
    described = Path("mine.yaml").read_text(encoding="utf-8").replace("tiny.json", "resnet.json")
    described += f"trainer: {{callbacks: [{{class_path: {kind}, init_args: {options}}}]}}\n"
    Path("mine.yaml").write_text(described, encoding="utf-8")
    with suppress(SystemExit):
        main(["check-data", "--config=mine.yaml"])
    assert re.search(r"\n  test +no: .*M2ib: ", capsys.readouterr().out)


def test_what_is_cut_is_what_the_model_does_not_read(tiny_json: str) -> None:
    tokenizer, clip = load_tokenizer(tiny_json), load_clip(tiny_json)
    for length in range(10, 20):
        phrase = " ".join(["lung"] * length)
        expected = max(clip.count_tokens(phrase) - clip.context_length, 0)
        assert cut_text(tokenizer, phrase).split() == ["lung"] * expected


@pytest.mark.parametrize("family", ["biomedclip", "siglip"])
def test_what_hugging_face_tokenizers_cut(family: str) -> None:
    config = json.dumps(FAMILY_CONFIGS[family]() | {"embed_dim": 32})
    tokenizer, clip = load_tokenizer(config), load_clip(config)
    for phrase in ("Mild edema", "Small right apical pneumothorax", "a" * 30):
        # Each letter of the end is a token.
        cut = cut_text(tokenizer, phrase)
        assert len(cut) == max(clip.count_tokens(phrase) - clip.context_length, 0)
        assert phrase.lower().endswith(cut)
    assert cut
