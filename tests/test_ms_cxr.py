"""MS-CXR on a small made-up copy of the layout of both distributions: nothing of the real ones is in here."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matex_pl.data import ImageTextPair, MsCxrDataModule
from matex_pl.data.ms_cxr import COLUMNS

WIDTH, HEIGHT = 2500, 3000
PHRASES = {"Pneumothorax": "Small right apical pneumothorax", "Edema": "Mild edema", "Pneumonia": "Mild edema"}


def image_path(patient: int, image: str) -> str:
    return f"files/p{10 + patient // 10}/p100{patient:05d}/s5{patient:07d}/{image}.jpg"


def annotation_rows(patients: int = 10) -> list[dict[str, Any]]:
    """Per patient: a phrase with two boxes, and one phrase under two categories."""
    rows = []
    for patient in range(patients):
        image = f"aaaa-{patient:04d}"
        for category, box in [
            ("Pneumothorax", (250, 300, 500, 600)),
            ("Edema", (1250, 1500, 250, 300)),
            ("Pneumothorax", (1500, 300, 500, 600)),
            ("Pneumonia", (0, 0, WIDTH, HEIGHT)),
        ]:
            cells = (category, PHRASES[category], image_path(patient, image), *box, image, WIDTH, HEIGHT)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def write_annotations(root: Path, rows: Sequence[dict[str, Any]], version: str = "1.1.0") -> None:
    with (root / f"MS_CXR_Local_Alignment_v{version}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_coco(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As the distribution has it: an image record per annotation, so that most images have several."""
    categories = sorted({row["category_name"] for row in rows})
    images, annotations = [], []
    for place, row in enumerate(rows):
        size = {"width": row["image_width"], "height": row["image_height"]}
        images.append({"id": 1000 + place, "path": row["path"], "file_name": Path(row["path"]).name, **size})
        annotations.append(
            {
                "id": place,
                "image_id": 1000 + place,
                "category_id": categories.index(row["category_name"]) + 1,
                "bbox": [row[name] for name in "xywh"],
                "label_text": row["label_text"],
                **size,
                **({"split": row["split"]} if "split" in row else {}),
            }
        )
    named = [{"id": place + 1, "name": name} for place, name in enumerate(categories)]
    content = {"info": {}, "categories": named, "images": images, "annotations": annotations}
    (root / "MS_CXR_Local_Alignment_v1.1.0.json").write_text(json.dumps(content), encoding="utf-8")


def write_images(root: Path, paths: Sequence[str], size: tuple[int, int] = (300, 250), suffix: str = ".jpg") -> None:
    """Down-sized images, a tenth of their size."""
    for place, path in enumerate(dict.fromkeys(paths)):
        file = (root / path).with_suffix(suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full(size, 20 + place, dtype=np.uint8))


def write_splits(root: Path, splits: dict[str, str]) -> Path:
    """MIMIC's file of splits, gzipped as it comes."""
    lines = ["dicom_id,study_id,subject_id,split", *(f"{image},5,1,{split}" for image, split in splits.items())]
    path = root / "mimic-cxr-2.0.0-split.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = annotation_rows()
    write_annotations(tmp_path, rows)
    write_images(tmp_path, [row["path"] for row in rows])
    return tmp_path


def _module(root: Path, **settings: Any) -> MsCxrDataModule:
    return MsCxrDataModule(str(root), **{"image_size": 32, "batch_size": 2, "num_workers": 0, **settings})


def _plain(pairs: Sequence[ImageTextPair]) -> list[tuple[Any, ...]]:
    return [
        (s.id, s.patient_id, s.image, s.phrase, tuple(s.boxes), s.finding, s.image_findings, s.split) for s in pairs
    ]


def test_rows_of_a_phrase_make_one_pair(root: Path) -> None:
    pairs, bad = _module(root).checked_rows()
    assert not bad
    assert len(pairs) == 30
    first = pairs[0]
    assert (first.id, first.image_id, first.patient_id) == ("aaaa-0000", "aaaa-0000", "10000000")
    assert first.phrase == "Small right apical pneumothorax"
    assert first.boxes == [(25, 30, 75, 90), (150, 30, 200, 90)]
    assert first.image_findings == ("edema", "pneumonia", "pneumothorax")
    assert [pair.finding for pair in pairs[:3]] == ["pneumothorax", "edema", "pneumonia"]
    assert [pair.phrase for pair in pairs[1:3]] == ["Mild edema"] * 2
    data = _module(root)
    data.setup("fit")
    patients = [{pair.patient_id for pair in data.pairs[split]} for split in ("train", "val", "test")]
    assert [len(found) for found in patients] == [7, 1, 2]
    sample = data.dataset("train")[0]
    torch.testing.assert_close(sample.content_box, torch.tensor([2.5, 0, 29.5, 32]) / 32, atol=0.02, rtol=0)


def test_json_says_the_same_as_csv(root: Path) -> None:
    rows = [dict(row, split="train") for row in annotation_rows()]
    write_annotations(root, rows)
    write_coco(root, rows)
    expected = _module(root).checked_rows()[0]
    found, bad = _module(root, annotations=str(root / "MS_CXR_Local_Alignment_v1.1.0.json")).checked_rows()
    assert not bad
    assert _plain(found) == _plain(expected)
    (root / "MS_CXR_Local_Alignment_v1.1.0.csv").unlink()
    assert _plain(_module(root).checked_rows()[0]) == _plain(expected)


@pytest.mark.parametrize(("size", "suffix"), [((300, 250), ".png"), ((64, 64), ".jpg"), ((3000, 2500), ".jpg")])
def test_boxes_follow_the_size_of_the_file(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    rows = annotation_rows(1)
    write_annotations(tmp_path, rows)
    # Without `files/`, as some copies are.
    write_images(tmp_path, [row["path"].removeprefix("files/") for row in rows], size, suffix)
    pairs, bad = _module(tmp_path).checked_rows()
    assert not bad
    x0, y0, x1, y1 = pairs[0].boxes[0]
    assert (x0 / size[1], y0 / size[0], x1 / size[1], y1 / size[0]) == pytest.approx((0.1, 0.1, 0.3, 0.3))


def test_splits_of_the_files(root: Path) -> None:
    names = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    write_annotations(root, [dict(row, split=names[place // 4]) for place, row in enumerate(annotation_rows())])
    assert [pair.split for pair in _module(root).checked_rows()[0][::3]] == names
    official = ["train"] * 5 + ["validate"] * 3 + ["test"] * 2
    path = write_splits(root, {f"aaaa-{patient:04d}": split for patient, split in enumerate(official)})
    with pytest.warns(UserWarning, match=r"3 of 30 phrases are in another split in MS-CXR .*: aaaa-0005, "):
        pairs = _module(root, split_file=str(path)).checked_rows()[0]
    assert [pair.split for pair in pairs[::3]] == ["train"] * 5 + ["val"] * 3 + ["test"] * 2
    drawn = _module(root, splits="patients").checked_rows()[0]
    assert sorted({pair.split for pair in drawn}) == ["test", "train", "val"]
    assert [pair.split for pair in drawn[::3]] != names
    with pytest.raises(ValueError, match="Leave split_file out"):
        _module(root, split_file=str(path), splits="patients")
    with pytest.raises(ValueError, match="splits must be one of file, patients, got 'own'"):
        _module(root, splits="own")


def test_bad_rows_are_named(root: Path) -> None:
    rows = annotation_rows()
    rows[0]["image_width"] = ""
    rows[4]["path"] = "files/p10/scan.jpg"
    rows[8]["w"] = 2400
    rows[12]["label_text"] = " "
    rows[16]["path"] = rows[16]["path"].replace("aaaa", "bbbb")
    write_annotations(root, rows)
    (root / "files" / "p10").mkdir(exist_ok=True, parents=True)
    cv2.imwrite(str(root / "files" / "p10" / "scan.jpg"), np.zeros((30, 25), dtype=np.uint8))
    bad = _module(root).checked_rows()[1]
    assert "line 2" in next(row.rule for row in bad if row.line == 4)
    bad = [row for row in bad if "another row" not in row.rule]
    assert [row.line for row in bad] == [2, 6, 10, 14, 18]
    rules = ["not two positive numbers", "no patient and study", "outside of its image of 2500 x 3000", "is empty"]
    for row, rule in zip(bad, [*rules, "no such file"], strict=True):
        assert rule in row.rule
    write_coco(root, annotation_rows())
    path = root / "MS_CXR_Local_Alignment_v1.1.0.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"][2]["image_id"] = 7
    del content["annotations"][5]["bbox"]
    path.write_text(json.dumps(content), encoding="utf-8")
    bad = _module(root, annotations=str(path)).checked_rows()[1]
    assert [str(row).partition(",")[2].partition(":")[0] for row in bad] == [" annotation 2", " annotation 5"]
    assert "a box is not four numbers" in bad[1].rule


def test_images_that_the_split_file_lacks_are_bad(root: Path) -> None:
    path = write_splits(root, {f"aaaa-{patient:04d}": "train" for patient in range(9)})
    bad = _module(root, split_file=str(path)).checked_rows()[1]
    assert {(row.value, row.rule) for row in bad} == {("aaaa-0009", f"the image is not in {path}")}


def test_a_patient_in_two_splits_is_bad(root: Path) -> None:
    rows = annotation_rows()
    rows += [dict(row, dicom_id="cccc", path=image_path(0, "cccc"), split="test") for row in rows[:1]]
    write_images(root, [rows[-1]["path"]])
    write_annotations(root, [{"split": "train", **row} for row in rows])
    (bad,) = _module(root).checked_rows()[1]
    assert not bad.value
    assert "two splits: test here, train in" in bad.rule
    rows[-1]["w"] = 9000
    write_annotations(root, [{"split": "train", **row} for row in rows])
    (bad,) = _module(root).checked_rows()[1]
    assert re.match(r"the patient is in two splits: test here, .*; and a box .* reaches outside", bad.rule)


def test_rows_without_a_split_are_in_their_patients(root: Path) -> None:
    rows = [dict(row, split=["", "test"][place % 2]) for place, row in enumerate(annotation_rows())]
    rows[0]["label_text"] = rows[0]["label_text"].upper()
    write_annotations(root, rows)
    pairs, bad = _module(root).checked_rows()
    assert not bad
    assert {pair.split for pair in pairs} == {"test"}
    assert (len(pairs), len(pairs[0].boxes)) == (30, 2)


def test_a_bad_row_takes_its_pair_with_it(root: Path) -> None:
    rows = annotation_rows()
    rows[2]["w"] = 2400
    write_annotations(root, rows)
    pairs, bad = _module(root).checked_rows()
    assert [row.line for row in bad] == [2, 4]
    assert bad[0].rule == f"another row of the same pair is bad: {root / 'MS_CXR_Local_Alignment_v1.1.0.csv'}, line 4"
    assert len(pairs) == 29
    assert pairs[0].id == "aaaa-0000-2"


def test_annotation_files_are_found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match=r"no MS_CXR_Local_Alignment_\* .*give data.annotations"):
        _module(tmp_path_factory.mktemp("empty")).checked_rows()
    write_annotations(root, annotation_rows(), "1.0.0")
    with pytest.raises(ValueError, match=r"has several MS-CXR files: .*Choose one with data.annotations"):
        _module(root).checked_rows()
    for content in ("[]", "{", '{"images": []}'):
        (root / "x.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"x\.json is no COCO-style JSON"):
            _module(root, annotations=str(root / "x.json")).checked_rows()
    (root / "x.csv").write_text("path,label_text\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.csv lacks the columns \['category_name', 'x'"):
        _module(root, annotations=str(root / "x.csv")).checked_rows()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["image_id", "category_id", "bbox", "label_text", "split", "path", "width", "height", "id", "name"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """One value of a right file exchanged for another: an error of the file, a bad row, or a pair with right boxes."""
    rows = annotation_rows(1)
    write_images(tmp_path, [row["path"] for row in rows], (30, 25))
    write_coco(tmp_path, rows)
    path = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    part = data.draw(st.sampled_from(["images", "annotations", "categories"]))
    content[part][0][data.draw(st.sampled_from(FIELDS))] = data.draw(ANY)
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        pairs, bad = _module(tmp_path).checked_rows()
    except ValueError as error:
        if "no COCO-style JSON" not in str(error):
            raise
        return
    assert len(pairs) + len(bad) >= 3
    assert all(row.rule for row in bad)
    for pair in pairs:
        assert all(-0.1 <= x0 < x1 <= 25.1 and -0.1 <= y0 < y1 <= 30.1 for x0, y0, x1, y1 in pair.boxes)
