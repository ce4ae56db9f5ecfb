"""Masks of lungs and heart: from a manifest, from tables of CheXmask, and from a segmentation; every fault is named."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from test_cli import nih_folder
from test_ms_cxr import annotation_rows, write_annotations
from test_ms_cxr import write_images as write_mimic_images
from test_rle import counts_of, pairs_of
from torch import Tensor, nn

from matex_pl import ClipModule
from matex_pl.cli import main
from matex_pl.data import ManifestDataModule, MsCxrDataModule, NihDataModule
from matex_pl.data.chexmask import ChexmaskTable
from matex_pl.data.pair import ImageTextPair

HEIGHT, WIDTH = 60, 80
NAMES = ("left_lung", "right_lung", "heart")
SPLITS = ("train", "train", "val", "val", "test", "test")


def draw(scale: int = 1, shift: int = 0) -> dict[str, np.ndarray]:
    """Lungs and heart `(60, 80)` times a scale, with the patient's left on the right."""
    places = {"left_lung": (56, 28, 12, 22), "right_lung": (24 + shift, 28, 12, 22), "heart": (42, 40, 14, 10)}
    masks = {}
    for name, (x, y, across, down) in places.items():
        plane = np.zeros((HEIGHT * scale, WIDTH * scale), np.uint8)
        # Centers and axes in pixels whose centers lie at halves.
        center, axes = ([int((side + 0.5) * scale - 0.5) for side in pair] for pair in ((x, y), (across, down)))
        cv2.ellipse(plane, center, axes, 0, 0, 360, 1, -1)
        masks[name] = plane.astype(bool)
    return masks


def save(path: Path, mask: np.ndarray) -> str:
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), mask.astype(np.uint8) * 255)
    return f"{path.parent.name}/{path.name}"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def chexmask_row(name: str, column: str = "Image Index", masks: Any = None, **cells: Any) -> dict[str, Any]:
    """A row as CheXmask writes it: landmarks in a quoted cell, over several lines as in the MIMIC table."""
    masks = draw() if masks is None else masks
    height, width = masks["heart"].shape
    row = {column: name, "Dice RCA (Mean)": 0.85, "Dice RCA (Max)": 0.93, "Landmarks": "[[381 223]\n [345,227]]"}
    codes = {title: pairs_of(masks[title.lower().replace(" ", "_")]) for title in ("Left Lung", "Right Lung", "Heart")}
    return {**row, **codes, "Height": height, "Width": width, **cells}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of a manifest of six images of 80 x 60 pixels, each as bright as its left lung."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for number in range(6):
        save(tmp_path / "images" / f"{number}.png", draw()["left_lung"])
    return [
        {"image": f"images/{number}.png", "phrase": f"Image {number}.", "split": split}
        for number, split in enumerate(SPLITS)
    ]


@pytest.fixture
def manifest(tmp_path: Path, rows: list[dict[str, Any]]) -> Callable[..., ManifestDataModule]:
    """Data module of the rows, which a test may change."""

    def make(**settings: Any) -> ManifestDataModule:
        table = write_csv(tmp_path / "t.csv", rows)
        defaults = {"image_size": (HEIGHT, WIDTH), "batch_size": 2, "num_workers": 0}
        return ManifestDataModule(str(table), **{**defaults, **settings})

    return make


def check(found: Mapping[str, Tensor], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert (found[name].numpy() == mask).all(), name


def test_columns_of_a_manifest_hold_files_and_codes(tmp_path: Path, rows: list[Any], manifest: Any) -> None:
    masks = draw()
    rows[2]["mask_left_lung"] = save(tmp_path / "masks" / "2.png", masks["left_lung"])
    rows[2]["mask_right_lung"] = pairs_of(masks["right_lung"])
    rows[2]["mask_spine"] = json.dumps({"size": [HEIGHT, WIDTH], "counts": counts_of(masks["heart"])})
    rows[3]["heart"] = save(tmp_path / "masks" / "3.png", draw(16)["heart"])
    data = manifest(columns={"mask_heart": "heart"})
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert set(batch["masks"]) == {"left_lung", "right_lung", "spine", "heart"}
    check(
        {name: batch["masks"][name][0] for name in ("left_lung", "right_lung", "spine")},
        {"left_lung": masks["left_lung"], "right_lung": masks["right_lung"], "spine": masks["heart"]},
    )
    # A mask at sixteen times the size of its image is fitted.
    assert (batch["masks"]["heart"][1].numpy() ^ masks["heart"]).sum() < 30
    assert not batch["masks"]["heart"][0].any()
    assert not batch["masks"]["spine"][1].any()
    # Images without masks have none, and training reads none.
    assert all(data.read_masks(pair) == {} for pair in data.pairs["test"])
    assert all(batch["masks"] == {} for batch in data.train_dataloader())


def test_json_lines_hold_lists_and_objects(tmp_path: Path, rows: list[Any]) -> None:
    masks = draw()
    rows[4]["mask_heart"] = list(map(int, pairs_of(masks["heart"]).split()))
    rows[4]["mask_left_lung"] = {"size": [HEIGHT, WIDTH], "counts": counts_of(masks["left_lung"])}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ManifestDataModule(str(tmp_path / "t.jsonl"), image_size=(HEIGHT, WIDTH))
    data.setup("test")
    check(data.dataset("test")[0].masks, {name: masks[name] for name in ("heart", "left_lung")})


@pytest.mark.parametrize("resize_mode", ["longest", "shortest", "squash"])
def test_masks_follow_the_image_under_augmentation(rows: list[Any], manifest: Any, resize_mode: str) -> None:
    rows[1]["mask_left_lung"] = rows[1]["image"]
    data = manifest(resize_mode=resize_mode, image_size=(64, 64))
    data.setup("fit")
    plain = data.dataset("train", masks=True)[1]
    for epoch in range(4):
        sample = data.dataset("train", augment=True, masks=True)[epoch, 1]
        bright, mask = sample.image[0] > int(sample.image.max()) / 2, sample.masks["left_lung"]
        # A shift by one pixel changes a seventh of the mask.
        assert (bright ^ mask).sum() <= 0.08 * mask.sum()
        assert not sample.masks["left_lung"].equal(plain.masks["left_lung"])
    assert data.dataset("train", augment=True)[0, 1].masks == {}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("masks/none.png", r"t\.csv, line 3: mask_heart: there is no such file below '.*', got 'masks/none\.png'"),
        ("../heart.png", r"line 3: mask_heart: the path leads out of the root .*, got '\.\./heart\.png'"),
        ("masks/wide.png", r"line 3: mask_heart: the mask has another shape than its image of 80 x 60, got '90 x 60'"),
        ("t.csv", r"line 3, 'images/1\.png': No readable image at '.*t\.csv'"),
        ("4790 20", r"line 3: mask_heart: the runs of the mask reach beyond the 4800 pixels of 80 x 60, got '9 pixels"),
        ("10 5 7", r"line 3: mask_heart: the number of values is odd.*, got '3'"),
        ("10 5 12 -3", r"line 3: mask_heart: the length of a run of the mask is not positive, got '-3 in run 2'"),
        ("10 5 x 3", r"line 3: mask_heart: a run of the mask is not a whole number, got 'x'"),
        ('{"size": [60, 80]}', r"line 3: mask_heart: the counts of the mask are neither text nor a list, got 'None'"),
        ('{"size": [60], "counts": []}', r"line 3: mask_heart: the size of the mask is not \[height, width\]"),
        ('{"size": [60, 90], "counts": [5400]}', r"the mask has another shape .* of 80 x 60, got '90 x 60'"),
        ('{"size": [60, 80], "counts": [47]}', r"the counts do not sum to the 4800 pixels of 80 x 60, got '47'"),
        ('{"size": [60', r"line 3: mask_heart: the mask is no JSON of COCO"),
    ],
)
def test_bad_masks_of_a_manifest_are_refused(
    tmp_path: Path, rows: list[Any], manifest: Any, cell: str, message: str
) -> None:
    save(tmp_path / "masks" / "wide.png", np.ones((HEIGHT, 90)))
    rows[1]["mask_heart"] = cell
    with pytest.raises(ValueError, match=message):
        manifest().setup("fit")
    pairs, bad = manifest(on_bad_row="skip").checked_rows()
    assert (len(pairs), len(bad)) == (5, 1)


def test_rows_of_one_image_share_its_masks_and_must_agree(tmp_path: Path, rows: list[Any], manifest: Any) -> None:
    rows[4]["mask_heart"] = "10 5"
    rows.append({**rows[4], "phrase": "Another phrase.", "mask_heart": ""})
    data = manifest()
    data.setup("test")
    assert [int(sample.masks["heart"].sum()) for sample in map(data.dataset("test").__getitem__, (0, 2))] == [5, 5]
    rows[-1]["mask_heart"] = "10 6"
    with pytest.raises(ValueError, match=r"line 8: mask_heart: the image has another mask .* in .*line 6, got '10 6'"):
        manifest().setup("test")
    with pytest.raises(ValueError, match=r"columns maps \['masks'\].*mask_<structure>"):
        manifest(columns={"masks": "heart"})


def test_unreadable_mask_file_is_named(tmp_path: Path, rows: list[Any], manifest: Any) -> None:
    rows[2]["mask_heart"] = save(tmp_path / "masks" / "2.png", np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.5)
    path = tmp_path / "masks" / "2.png"
    path.write_bytes(path.read_bytes()[:-300])
    data = manifest()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"mask_heart of .*images/2\.png: No readable image at '.*masks/2\.png'"):
        list(data.val_dataloader())
    assert [row.line for row in _bad_of(data)] == [4]


def _bad_of(data: ManifestDataModule) -> list[Any]:
    from matex_pl.commands.check_data import check_data

    return check_data(data, workers=1).bad


@pytest.mark.parametrize("column", ["image_id", "Unnamed: 0"])
@pytest.mark.parametrize("packed", [False, True])
def test_chexmask_joins_a_manifest(tmp_path: Path, manifest: Any, column: str, packed: bool) -> None:
    listed = [chexmask_row(f"{number}.png", "ImageID", draw(shift=number)) for number in range(5)]
    if column != "image_id":
        # pandas writes its index first.
        listed = [{column: place, **row} for place, row in enumerate(listed)]
    table = write_csv(tmp_path / "CheXmask.csv", [*listed, chexmask_row("other.png", "ImageID")])
    if packed:
        table = tmp_path / "CheXmask.csv.gz"
        table.write_bytes(gzip.compress((tmp_path / "CheXmask.csv").read_bytes()))
        with pytest.raises(ValueError, match=r"CheXmask\.csv\.gz is compressed.*set data\.cache_dir"):
            manifest(anatomy=str(table)).setup("test")
    data = manifest(anatomy=str(table), cache_dir=str(tmp_path / "cache") if packed else None)
    with pytest.warns(UserWarning, match=r"CheXmask\.csv(\.gz)? has rows for 5 of 6 images\. It has no masks of the"):
        data.setup("test")
    data = pickle.loads(pickle.dumps(data))
    # A mask in the cache is read from there.
    for _ in range(2):
        first, second = map(data.dataset("test").__getitem__, range(2))
        check(first.masks, draw(shift=4))
        assert second.masks == {}


def test_chexmask_joins_nih_and_ms_cxr(tmp_path: Path) -> None:
    root = nih_folder(tmp_path)
    stems = sorted(path.stem for path in (root / "images").rglob("*.png"))
    size = cv2.imread(str(next((root / "images").rglob("*.png")))).shape[:2]
    masks = {name: np.ones(np.multiply(size, 2), bool) for name in NAMES}
    table = write_csv(tmp_path / "nih.csv", [chexmask_row(f"{stem}.png", masks=masks) for stem in stems])
    data = NihDataModule(str(root), image_size=32, num_workers=0, anatomy=str(table))
    data.setup("fit")
    assert all(data.dataset("val")[0].masks[name].all() for name in NAMES)
    annotations = annotation_rows()
    write_annotations(tmp_path, annotations)
    write_mimic_images(tmp_path, [row["path"] for row in annotations], (300, 250))
    names = dict.fromkeys(row["dicom_id"] for row in annotations)
    full = {name: np.ones((3000, 2500), bool) for name in NAMES}
    # The images are copies at a tenth of the size.
    table = write_csv(tmp_path / "mimic.csv", [chexmask_row(name, "dicom_id", full) for name in names])
    scored = MsCxrDataModule(str(tmp_path), image_size=32, num_workers=0, anatomy=str(table))
    scored.setup("fit")
    sample = scored.dataset("val")[0]
    left, _, right, _ = (sample.content_box * 32).round().int().tolist()
    assert sample.masks["heart"][:, left:right].all()
    assert not sample.masks["heart"][:, :left].any()


def test_paths_of_chexpert_are_told_apart(tmp_path: Path) -> None:
    places = [tmp_path / f"patient{n}" / "study1" / "view1_frontal.jpg" for n in range(3)]
    pairs = [ImageTextPair(str(n), str(n), f"patient{n}/study1/{p.name}", str(p), "") for n, p in enumerate(places)]
    folder = "CheXpert-v1.0/train"
    listed = [chexmask_row(f"{folder}/patient{n}/study1/view1_frontal.jpg", "Path", draw(shift=n)) for n in (0, 1, 7)]
    table = ChexmaskTable(write_csv(tmp_path / "CheXpert.csv", listed))
    with pytest.warns(UserWarning, match="2 of 3"):
        assert table.join(pairs) == ([], [])
    assert (table.read(str(places[1]), (HEIGHT, WIDTH))["right_lung"] == draw(shift=1)["right_lung"]).all()
    assert [str(place) in table for place in places] == [True, True, False]
    write_csv(tmp_path / "CheXpert.csv", [chexmask_row("view1_frontal", "Path")])
    (bad,), _ = table.join(pairs)
    assert bad.rule.startswith("the id is of 3 images")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"Heart": "4790 20"}, r"Heart: the runs of the mask reach beyond the 4800 pixels of 80 x 60, got '9 pixels"),
        ({"Heart": "4790 x"}, r"Heart: a run of the mask is not a whole number, got 'x'"),
        ({"Heart": "4790"}, r"Heart: the number of values is odd, and .*, got '1'"),
        ({"Height": 90}, r"the mask has another shape than its image of 80 x 60, got '80 x 90'"),
        ({"Height": 0}, r"Width and Height are no size of an image, got '80 x 0'"),
        ({"Height": ""}, r"Height is not a number\n"),
        ({"Dice RCA (Mean)": "nan"}, r"Dice RCA \(Mean\) is not a number, got 'nan'"),
        ({"Dice RCA (Mean)": 85}, r"Dice RCA \(Mean\) is not between 0 and 1, got '85.0'"),
        ({"Image Index": "2.png"}, r"line 2 has the masks of this image already, got '2\.png'"),
        ({"Width": "80,1"}, r"the row has 10 cells and the header 9"),
    ],
)
def test_bad_rows_of_chexmask_are_refused_or_listed(
    tmp_path: Path, rows: list[Any], manifest: Any, cells: dict[str, Any], message: str
) -> None:
    for row in rows:
        # With a box, the size of the image is known before its masks are read.
        row["boxes"] = "[[0, 0, 9, 9]]"
    listed = [chexmask_row("2.png"), {**chexmask_row("3.png"), **cells}]
    table = write_csv(tmp_path / "CheXmask.csv", listed)
    if cells.get("Width"):
        table.write_text(table.read_text(encoding="utf-8").replace('"80,1"', "80,1"), encoding="utf-8")
    with (
        pytest.warns(UserWarning, match="images"),
        pytest.raises(ValueError, match=rf"CheXmask\.csv, line 4: {message}"),
    ):
        manifest(anatomy=str(table)).setup("fit")
    data = manifest(anatomy=str(table), on_bad_row="skip")
    data.trainer = Trainer(default_root_dir=str(tmp_path), logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.warns(UserWarning, match="Left out, listed in"):
        data.setup("fit")
    # The image stays, without masks.
    assert [bool(data.read_masks(pair)) for pair in data.pairs["val"]] == [True, False]
    assert "CheXmask.csv,4," in (tmp_path / "skipped_rows.csv").read_text(encoding="utf-8")


def test_faults_within_a_row_are_found_by_check_data_and_in_reading(tmp_path: Path, manifest: Any) -> None:
    listed = [chexmask_row(f"{number}.png") for number in range(6)]
    listed[3]["Heart"] = f"9 5 7 {listed[3]['Heart'].partition(' ')[2]}"
    # Without boxes, the size of the image is known only here.
    listed[4]["Height"] = 120
    data = manifest(anatomy=str(write_csv(tmp_path / "CheXmask.csv", listed)))
    data.setup("fit")
    with pytest.raises(ValueError, match=r"CheXmask\.csv, line 8: .*got .*Correct the row, or remove it"):
        list(data.val_dataloader())
    assert [row.line for row in _bad_of(data)] == [5, 6]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, r"There is no table of CheXmask at '.*x\.csv'.*torchxrayvision"),
        (
            "image,phrase\n2.png,Text.\n",
            ValueError,
            r"no table of CheXmask: it lacks the columns \['Left .*'image'",
        ),
        ("", ValueError, "no table of CheXmask"),
        (
            "NIH",
            ValueError,
            r"no row for any of the 6 images\..*'Image Index' are like '00000001_000\.png'.*/0\.png'",
        ),
        ("open", ValueError, r"x\.csv, line 4: A quote in this row is not closed"),
        ("twice", ValueError, "several columns of one name"),
    ],
)
def test_tables_that_are_not_of_the_data_are_refused(
    tmp_path: Path, manifest: Any, text: str | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    if text in ("NIH", "open", "twice"):
        write_csv(path, [chexmask_row("00000001_000.png"), chexmask_row("00000001_001.png")])
        whole = path.read_text(encoding="utf-8")
        changes = {"NIH": ("", ""), "open": ('345,227]]"', "345,227]]"), "twice": ("Dice RCA (Max)", "Heart")}
        old, new = changes[str(text)]
        if text == "open":
            whole = whole[::-1].replace(old[::-1], new[::-1], 1)[::-1]
        path.write_text(whole if text == "open" else whole.replace(old, new) if old else whole, encoding="utf-8")
    with pytest.raises(error, match=message):
        manifest(anatomy=str(path)).setup("fit")


def test_damaged_and_inflating_gzip_files_are_refused(tmp_path: Path, manifest: Any, monkeypatch: Any) -> None:
    table = tmp_path / "CheXmask.csv.gz"
    whole = gzip.compress(bytes(2**20))
    monkeypatch.setattr("matex_pl.data.chexmask._ALWAYS_INFLATED", 2**16)
    for content, message in ((whole[:-9], "no complete gzip file"), (whole, "inflates to more than 0 MiB")):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            manifest(anatomy=str(table), cache_dir=str(tmp_path / "cache")).setup("fit")
    assert not list((tmp_path / "cache").glob("*.csv"))


@pytest.mark.usefixtures("messages")
def test_check_data_counts_masks_and_warns(
    tmp_path: Path, rows: list[Any], manifest: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows[5]["mask_stomach"] = save(tmp_path / "masks" / "black.png", np.zeros((HEIGHT, WIDTH)))
    mirrored = {name: mask[:, ::-1] for name, mask in draw().items()}
    listed = [
        chexmask_row("0.png"),
        chexmask_row("1.png", masks=mirrored),
        chexmask_row("2.png", **{"Dice RCA (Mean)": 0.699}),
        chexmask_row("3.png", Heart=""),
        chexmask_row("4.png", **{"Left Lung": "", "Right Lung": " ", "Heart": ""}),
        chexmask_row("5.png"),
    ]
    data = manifest(anatomy=str(write_csv(tmp_path / "CheXmask.csv", listed)))
    data.setup("fit")
    assert "Dice RCA (Mean) is below 0.7. The masks of the row count as missing (1 row)" in caplog.text
    config = tmp_path / "c.yaml"
    config.write_text("data: {class_path: matex_pl.data.ManifestDataModule}\n", encoding="utf-8")
    words = [f"--data.manifest={tmp_path / 't.csv'}", f"--data.anatomy={tmp_path / 'CheXmask.csv'}"]
    main(["check-data", "--config", str(config), *words])
    text = capsys.readouterr().out
    table = next(part for part in text.split("\n\n") if part.startswith("images with a mask of"))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["left_lung", "2", "1", "0"],
        ["right_lung", "2", "1", "0"],
        ["heart", "2", "0", "0"],
        ["no", "mask", "0", "1", "2"],
    ]
    for line in (
        r"CheXmask.csv, line 6: '0.699 of 2.png'",
        r"CheXmask.csv, line 8: 'Heart of 3.png'",
        r"CheXmask.csv, line 10: 'Left Lung, Right Lung, Heart of 4.png'",
        r"t.csv, line 7: 'stomach'",
        r"t.csv, line 3: 'images/1.png'",
    ):
        assert line in text
    assert "No bad rows." in text


def test_cached_masks_are_read_once(tmp_path: Path, rows: list[Any], manifest: Any, monkeypatch: Any) -> None:
    path = tmp_path / "masks" / "2.png"
    rows[2]["mask_heart"] = save(path, draw()["heart"])
    data = manifest(cache_dir=str(tmp_path / "cache"), image_size=(30, 40))
    data.setup("fit")
    first = data.dataset("val")[0].masks["heart"]
    with monkeypatch.context() as patch:
        patch.setattr(ManifestDataModule, "read_masks", lambda *_: pytest.fail("The masks are in the cache."))
        assert data.dataset("val")[0].masks["heart"].equal(first)
    save(path, ~draw()["heart"])
    assert (data.dataset("val")[0].masks["heart"] ^ ~first).sum() < 20
    # Without masks, no file is touched.
    Path(data.pairs["val"][1].image).unlink()
    assert data.read_masks(data.pairs["val"][1]) == {}


class StandIn(nn.Module):
    """A module with the interface of torchxrayvision's PSPNet: a pixel above 0 belongs to all structures."""

    targets: ClassVar[list[str]] = [
        *("Left Clavicle", "Right Clavicle", "Left Scapula", "Right Scapula", "Left Lung", "Right Lung"),
        *("Left Hilus Pulmonis", "Right Hilus Pulmonis", "Heart", "Aorta", "Facies Diaphragmatica"),
        *("Mediastinum", "Weasand", "Spine"),
    ]
    calls: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, cache_dir: str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(14))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (1, 512, 512)
        assert x.min() == -1024
        assert x.max() == 1024
        assert not self.training
        self.calls.append(tuple(x.shape))
        # The heart is the dark part, to tell the structures apart.
        signs = torch.tensor([-1.0 if name == "Heart" else 1.0 for name in self.targets])
        return x * signs[:, None, None] * self.scale[:, None, None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    package = "torchxrayvision.baseline_models.chestx_det"
    for name in ("torchxrayvision", "torchxrayvision.baseline_models", package):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[package].PSPNet = StandIn  # type: ignore[attr-defined]
    StandIn.calls = []
    return StandIn


def test_images_without_masks_are_segmented_once(
    tmp_path: Path, rows: list[Any], manifest: Any, stand_in: type[StandIn], tiny_json: str
) -> None:
    rows[2]["mask_heart"] = "10 5"
    settings = {"anatomy": "torchxrayvision", "cache_dir": str(tmp_path / "cache"), "image_size": (32, 32)}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
    data = manifest(**settings)
    trainer.validate(ClipModule(tiny_json), datamodule=data, verbose=False)
    # One image has a mask of its own.
    assert stand_in.calls == [(1, 1, 512, 512)]
    data = manifest(**settings)
    data.setup("fit")
    assert len(stand_in.calls) == 1
    own, segmented = map(data.dataset("val").__getitem__, range(2))
    assert {name: int(mask.sum()) for name, mask in own.masks.items()} == {"heart": int(own.masks["heart"].sum())}
    lit = segmented.image[0] > 127
    assert (segmented.masks["left_lung"] ^ lit).sum() <= 20
    top, bottom = 4, 28
    assert (segmented.masks["heart"][top:bottom] ^ ~lit[top:bottom]).sum() <= 20
    # The padding belongs to no structure.
    assert not segmented.masks["heart"][: top - 1].any()
    # Training images are segmented when somebody asks for their masks.
    assert len(data.dataset("train", masks=True)[0].masks) == 3
    assert stand_in.calls[1:] == [(2, 1, 512, 512)]


def test_segmentation_that_cannot_run_is_refused(
    tmp_path: Path, manifest: Any, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    with pytest.raises(ValueError, match=r"anatomy: torchxrayvision segments each image once.*Set data\.cache_dir"):
        manifest(anatomy="torchxrayvision")
    data = manifest(anatomy=["torchxrayvision"], cache_dir=str(tmp_path / "cache"))

    def offline(*_: object) -> None:
        raise RuntimeError("no connection")

    monkeypatch.setattr(stand_in, "__init__", offline)
    with pytest.raises(OSError, match=r"The weights of PSPNet cannot be loaded \(no connection\).*copy pspnet_"):
        data.setup("fit")
    monkeypatch.setitem(sys.modules, "torchxrayvision.baseline_models.chestx_det", None)
    with pytest.raises(ImportError, match=r"pip install 'matex_pl\[anatomy\]'"):
        data.setup("test")


def test_unreadable_images_are_left_to_the_loader(tmp_path: Path, manifest: Any, stand_in: type[StandIn]) -> None:
    data = manifest(anatomy="torchxrayvision", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Pair 'images/2\.png' .*No readable image"):
        list(data.val_dataloader())
    assert len(stand_in.calls) == 1
