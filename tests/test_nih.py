"""The NIH images on a small made-up copy of the distribution's layout."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from matex_pl.data import NihDataModule
from matex_pl.data.nih import BOX_FILE, LABEL_FILE, finding_name, read_boxes, read_labels, side_word, split_patients

LABEL_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
QUOTED_BOX_HEADER = 'Image Index,Finding Label,"Bbox [x","y","w","h]",,,'

LABELS = [
    ("00000001_000.png", "Infiltration|Mass", "1"),
    ("00000001_001.png", "No Finding", "1"),
    ("00000002_000.png", "Effusion", "2"),
    ("00000003_000.png", "No Finding", "3"),
    ("00000004_000.png", "Cardiomegaly|Pleural_Thickening", "4"),
]
# Boxes in the 1024 x 1024 frame: the patient's right is the left of the image.
BOXES = [
    ("00000001_000.png", "Infiltrate", (100, 200, 50, 80)),
    ("00000002_000.png", "Effusion", (700, 600, 200, 300)),
    ("00000002_000.png", "Effusion", (100, 600, 200, 300)),
    ("00000004_000.png", "Cardiomegaly", (300, 500, 500, 400)),
]

Write = Callable[..., Path]


@pytest.fixture
def distribution(tmp_path: Path) -> Write:
    """Writes a copy: label and box rows, and an image of height x width per label row."""

    def write(
        labels: list[tuple[str, str, str]] = LABELS,
        boxes: list[tuple[str, str, tuple[object, ...]]] = BOXES,
        size: tuple[int, int] = (512, 512),
        suffix: str = ".png",
        box_header: str = BOX_HEADER,
    ) -> Path:
        rows = [f"{image},{names},0,{patient},60,F,PA,2048,2500,0.171,0.171" for image, names, patient in labels]
        (tmp_path / LABEL_FILE).write_text("\n".join([LABEL_HEADER, *rows]) + "\n", encoding="utf-8")
        drawn = [f"{image},{label},{','.join(map(str, box))}" for image, label, box in boxes]
        (tmp_path / BOX_FILE).write_text("\n".join([box_header, *drawn]) + "\n", encoding="utf-8")
        folder = tmp_path / "images" / "part_1"
        folder.mkdir(parents=True, exist_ok=True)
        for image, _, _ in labels:
            cv2.imwrite(str(folder / image.replace(".png", suffix)), np.full(size, 80, dtype=np.uint8))
        return tmp_path

    return write


def _pairs(root: Path, **settings: object) -> dict[str, object]:
    data = NihDataModule(str(root), image_size=64, num_workers=0, **settings)
    return {pair.id: pair for pair in data.list_pairs()}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("header", [BOX_HEADER, QUOTED_BOX_HEADER])
def test_pairs_of_images(distribution: Write, suffix: str, header: str) -> None:
    pairs = _pairs(distribution(suffix=suffix, box_header=header))
    assert set(pairs) == {
        "00000001_000-infiltration",
        "00000001_000-lung_mass",
        "00000001_001-normal",
        "00000002_000-pleural_effusion",
        "00000003_000-normal",
        "00000004_000-cardiomegaly",
        "00000004_000-pleural_thickening",
    }
    infiltration = pairs["00000001_000-infiltration"]
    assert infiltration.boxes == [(50, 100, 75, 140)]
    assert infiltration.image_findings == ("infiltration", "lung mass")
    assert infiltration.patient_id == "1"
    assert infiltration.image.endswith(f"images/part_1/00000001_000{suffix}")
    assert pairs["00000001_000-lung_mass"].boxes == []
    assert len(pairs["00000002_000-pleural_effusion"].boxes) == 2
    assert pairs["00000001_001-normal"].finding == ""
    assert pairs["00000001_001-normal"].image_findings == ()


def test_boxes_are_scaled_per_axis(distribution: Write) -> None:
    root = distribution(size=(256, 512))
    assert _pairs(root)["00000001_000-infiltration"].boxes == [(50, 50, 75, 70)]
    data = NihDataModule(str(root), fractions=(0.5, 0.25, 0.25), image_size=64, resize_mode="squash", num_workers=0)
    data.setup("fit")
    split, pair = next((split, s) for split, found in data.pairs.items() for s in found if s.finding == "infiltration")
    sample = data.dataset(split)[data.pairs[split].index(pair)]
    torch.testing.assert_close(sample.boxes, torch.tensor([[100, 200, 150, 280]]) / 1024)


def test_stored_orientation_is_ignored(distribution: Write, tmp_path: Path) -> None:
    from PIL import Image

    root = distribution(suffix=".jpg")
    path = root / "images" / "part_1" / "00000001_000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.full((30, 60), 80, dtype=np.uint8)).save(path, exif=exif)
    data = NihDataModule(str(root), image_size=64)
    pair = next(pair for pair in data.list_pairs() if pair.finding == "infiltration")
    assert data.read_image(pair).shape == (30, 60)
    assert pair.boxes[0][2] < 60


@pytest.mark.parametrize("boxed_only", [False, True])
def test_no_patient_in_two_splits(distribution: Write, boxed_only: bool) -> None:
    labels = [(f"{n:08d}_{k:03d}.png", "Effusion", str(n)) for n in range(20) for k in range(3)]
    root = distribution(labels, [(image, "Effusion", (10, 10, 20, 20)) for image, _, _ in labels], size=(8, 8))
    data = NihDataModule(str(root), boxed_only=boxed_only, image_size=8)
    data.setup("fit")
    patients = [{pair.patient_id for pair in data.pairs[split]} for split in ("train", "val", "test")]
    assert [len(found) for found in patients] == [14, 2, 4]
    assert len(set.union(*patients)) == 20
    other = NihDataModule(str(root), image_size=8, seed=1)
    other.setup("fit")
    assert {pair.patient_id for pair in other.pairs["val"]} != patients[1]


def test_split_patients_does_not_depend_on_order() -> None:
    names = [str(n) for n in range(50)]
    split = split_patients(names, (0.7, 0.1, 0.2), seed=0)
    assert split == split_patients(names[::-1] + names, (0.7, 0.1, 0.2), seed=0)
    assert [list(split.values()).count(name) for name in ("train", "val", "test")] == [35, 5, 10]
    assert set(split_patients(names, (1.0, 0.0, 0.0), seed=0).values()) == {"train"}


def test_side_is_told_only_on_request(distribution: Write) -> None:
    root = distribution(size=(256, 512))
    plain, sided = _pairs(root), _pairs(root, name_side=True)
    words = ("right", "left", "bilateral")
    assert not any(word in pair.phrase.lower() for pair in plain.values() for word in words)
    assert "right infiltration" in sided["00000001_000-infiltration"].phrase.lower()
    assert "bilateral pleural effusion" in sided["00000002_000-pleural_effusion"].phrase.lower()
    # No box, no side; the heart has none.
    for name in ("00000001_000-lung_mass", "00000004_000-cardiomegaly", "00000001_001-normal"):
        assert sided[name].phrase == plain[name].phrase


def test_side_word() -> None:
    assert side_word([(0, 0, 400, 9)]) == "right"
    assert side_word([(600, 0, 700, 9), (520, 0, 530, 9)]) == "left"
    assert side_word([(0, 0, 400, 9), (600, 0, 700, 9)]) == "bilateral"
    assert side_word([]) == ""


def test_boxed_only(distribution: Write) -> None:
    pairs = _pairs(distribution(), boxed_only=True)
    assert {pair.finding for pair in pairs.values()} == {"infiltration", "pleural effusion", "cardiomegaly"}
    assert all(pair.boxes for pair in pairs.values())
    # What else is on the image is still known.
    assert pairs["00000004_000-cardiomegaly"].image_findings == ("cardiomegaly", "pleural thickening")


def test_phrases_depend_on_the_seed_alone(distribution: Write) -> None:
    root = distribution()
    assert [s.phrase for s in _pairs(root).values()] == [s.phrase for s in _pairs(root).values()]
    many = {
        pair.phrase for seed in range(12) for pair in _pairs(root, seed=seed).values() if pair.finding == "lung mass"
    }
    assert len(many) > 2
    assert all(phrase[0].isupper() and phrase.endswith(".") for phrase in many)


def test_missing_images_are_counted(distribution: Write) -> None:
    root = distribution()
    (root / "images" / "part_1" / "00000003_000.png").unlink()
    with pytest.warns(UserWarning, match=rf"1 of 5 images of {LABEL_FILE} are not below"):
        assert not any(name.startswith("00000003") for name in _pairs(root))
    for path in root.rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="None of the 5 images"):
        _pairs(root)


def test_complete_copy_warns_of_nothing(distribution: Write) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _pairs(distribution())


def test_missing_files_are_named(distribution: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=LABEL_FILE):
        NihDataModule(str(tmp_path / "nowhere")).setup("fit")
    root = distribution()
    (root / BOX_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{BOX_FILE} is missing. data.root must hold"):
        _pairs(root)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (("a", 2, 3, 4), r"line 3: the box is not four numbers x, y, w, h, got .*'a', '2', '3', '4'"),
        ((1, 2, 3), r"line 3: the box is not four numbers x, y, w, h, got .*'1', '2', '3', ''"),
        ((1, 2, 0, 4), r"line 3: the box has no positive, finite size, got .*'1', '2', '0', '4'"),
        ((1, 2, -3, 4), "no positive, finite size"),
        ((1, "nan", 3, 4), "no positive, finite size"),
        ((1, 2, "inf", 4), "no positive, finite size"),
    ],
)
def test_bad_box_rows_are_named(distribution: Write, box: tuple[object, ...], message: str) -> None:
    root = distribution(boxes=[BOXES[0], ("00000002_000.png", "Effusion", box)])
    with pytest.raises(ValueError, match=rf"{BOX_FILE}, {message}" if message.startswith("line") else message):
        _pairs(root)


def test_missing_columns_are_named(distribution: Write) -> None:
    root = distribution(box_header="Image Index,Finding Label,x,y,width,height")
    with pytest.raises(ValueError, match=rf"{BOX_FILE} lacks the columns \['Bbox \[x', 'w', 'h\]'\]\. The columns are"):
        read_boxes(root / BOX_FILE)
    (root / LABEL_FILE).write_text("Image Index,Labels\n1.png,Mass\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{LABEL_FILE} lacks the columns \['Finding Labels', 'Patient ID'\]"):
        read_labels(root / LABEL_FILE)
    (root / LABEL_FILE).write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_labels(root / LABEL_FILE)


def test_rows_with_empty_cells_and_blank_lines(distribution: Write) -> None:
    root = distribution()
    text = (root / LABEL_FILE).read_text(encoding="utf-8")
    # A byte-order mark, a blank line and Windows line ends, as spreadsheet programs leave them.
    (root / LABEL_FILE).write_bytes(("\ufeff" + text + "\n").replace("\n", "\r\n").encode())
    rows, bad = read_labels(root / LABEL_FILE)
    assert len(rows) == len(LABELS)
    assert not bad
    (root / LABEL_FILE).write_text(text + "00000009_000.png,Mass,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 7: the cell of Patient ID is empty, got '00000009_000.png'"):
        _pairs(root)


def test_image_listed_twice_is_refused(distribution: Write) -> None:
    root = distribution([*LABELS, LABELS[0]])
    with pytest.raises(ValueError, match=r"the id is taken already by .*line 2, got '00000001_000-infiltration'"):
        NihDataModule(str(root)).setup("fit")


def test_unreadable_images_are_named(distribution: Write) -> None:
    root = distribution()
    boxed, plain = (root / "images" / "part_1" / f"{name}.png" for name in ("00000002_000", "00000003_000"))
    plain.write_bytes(b"not an image")
    data = NihDataModule(str(root), fractions=(0.5, 0.25, 0.25), image_size=64, num_workers=0)
    data.setup("fit")
    split, place = next(
        (split, n) for split, found in data.pairs.items() for n, s in enumerate(found) if s.image == str(plain)
    )
    with pytest.raises(ValueError, match=r"00000003_000-normal.*00000003_000\.png.*No readable image"):
        data.dataset(split)[place]
    boxed.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"No readable image at '.*00000002_000\.png'"):
        _pairs(root)


def test_bad_rows_are_left_out_and_listed(distribution: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    labels = [*LABELS, ("00000005_000.png", "", "5"), LABELS[3]]
    bad_box = ("00000004_000.png", "Cardiomegaly", (300, 500, 0, 400))
    root = distribution(labels, [*BOXES[:3], bad_box, ("00000002_000.png", "Mass", (1, "x", 3, 4))])
    with pytest.raises(ValueError, match="5 bad rows, the first 3:"):
        _pairs(root)
    with pytest.warns(UserWarning, match=r"Left out, listed in skipped_rows\.csv: 5 bad rows"):
        pairs = _pairs(root, on_bad_row="skip")
    # The label without the bad box stays.
    assert "00000004_000-pleural_thickening" in pairs
    assert "00000004_000-cardiomegaly" not in pairs
    assert len(pairs["00000002_000-pleural_effusion"].boxes) == 2
    with Path("skipped_rows.csv").open(encoding="utf-8", newline="") as file:
        listed = {(Path(row["file"]).name, row["line"]): (row["value"], row["rule"]) for row in csv.DictReader(file)}
    assert {key: value for key, (value, _) in listed.items() if key[0] == LABEL_FILE} == {
        (LABEL_FILE, "6"): "",
        (LABEL_FILE, "7"): "00000005_000.png",
        (LABEL_FILE, "8"): "00000003_000-normal",
    }
    assert listed[LABEL_FILE, "6"][1].startswith("a box of the pair is bad: ")
    assert {line for file, line in listed if file == BOX_FILE} == {"5", "6"}


def test_bad_fractions_are_refused() -> None:
    for fractions in ((0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match="three shares that sum to 1"):
            NihDataModule("x", fractions=fractions)  # type: ignore[arg-type]


def test_findings_by_name(distribution: Write) -> None:
    assert finding_name("Infiltrate") == finding_name("Infiltration") == "infiltration"
    assert finding_name("Pleural_Thickening") == "pleural thickening"
    data = NihDataModule(str(distribution()), fractions=(0.5, 0.25, 0.25), image_size=64)
    data.setup("fit")
    assert data.findings == ("cardiomegaly", "infiltration", "lung mass", "pleural effusion", "pleural thickening")
