"""PadChest-GR, VinDr-CXR, CheXlocalize and ChestX-Det on small made-up copies of their layouts."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from matex_pl.cli import main
from matex_pl.data import (
    ChestXDetDataModule,
    CheXlocalizeDataModule,
    ImageTextPair,
    PadChestGrDataModule,
    VinDrDataModule,
)
from matex_pl.data.table import TableDataModule
from matex_pl.data.vindr import fuse_boxes

pydicom = pytest.importorskip("pydicom")
from test_dicom import write_dicom  # noqa: E402

HEIGHT, WIDTH = 60, 80
PATIENTS = 12


def pixels(seed: int, dtype: type = np.uint8, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, size).astype(dtype)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def padchest_records() -> list[dict[str, Any]]:
    """Per study: two sentences with one box, one of which a second reader saw too, and one without an abnormality."""
    effusion = {
        "sentence_en": "Left pleural effusion.",
        "sentence_es": "Derrame pleural izquierdo.",
        "abnormal": True,
        "boxes": [[0.5, 0.25, 0.75, 0.5]],
        "extra_boxes": [[0.5, 0.25, 0.8, 0.5]],
        "labels": ["Pleural Effusion"],
        "locations": [["left"]],
        "progression": None,
    }
    nodule = {
        "sentence_en": "Nodule in the right lung.",
        "sentence_es": "Nódulo en el pulmón derecho.",
        "abnormal": True,
        "boxes": [[0.125, 0.1, 0.25, 0.2]],
        "extra_boxes": [],
        "labels": ["nodule"],
    }
    normal = {"sentence_en": "No pneumothorax.", "sentence_es": "Sin neumotórax.", "abnormal": False}
    return [
        {
            "StudyID": f"{number}",
            "ImageID": f"{number}_a.png",
            "PriorImageID": None,
            "findings": [effusion, nodule, normal],
        }
        for number in range(PATIENTS)
    ]


def write_padchest_gr(root: Path, records: Sequence[dict[str, Any]] | None = None, photometric: bool = True) -> Path:
    """Images of 16 bits, the first of which is inverted, and a row of the table per label of a study."""
    records = padchest_records() if records is None else records
    (root / "grounded_reports_20240819.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    splits = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    rows = [
        [f"{n}", f"{n}_a.png", f"patient {n}", split, label, "MONOCHROME1" if n == 0 else "MONOCHROME2"]
        for n, split in enumerate(splits)
        for label in ("nodule", "pleural effusion")
    ]
    header = ["StudyID", "ImageID", "PatientID", "split", "label", "PhotometricInterpretation_DICOM"]
    cut = None if photometric else -1
    write_csv(root / "master_table.csv", header[:cut], [row[:cut] for row in rows])
    for number in range(PATIENTS):
        save(root / "Padchest_GR_files" / f"{number}_a.png", 20 * pixels(number, np.uint16))
    return root


# Three readers of the first image: two agree on an effusion, one of whom also sees a nodule; the third sees nothing.
READS = [
    ("R8", "Pleural effusion", (40, 10, 60, 30)),
    ("R9", "Pleural effusion", (42, 10, 62, 30)),
    ("R9", "Nodule/Mass", (4, 4, 12, 12)),
    ("R10", "No finding", None),
]


def write_vindr(root: Path, reads: Sequence[tuple[str, str, Any]] = READS) -> Path:
    train, test = [], []
    for number in range(PATIENTS):
        image = f"{number:032x}"
        if number < 8:
            rows = reads if number % 2 == 0 else [(reader, "No finding", None) for reader in ("R1", "R2", "R3")]
            train += [[image, reader, label, *(box or [""] * 4)] for reader, label, box in rows]
        elif number % 2:
            test.append([image, "No finding", "", "", "", ""])
        else:
            test += [[image, "Other lesion", 4, 4, 12.5, 12], [image, "Cardiomegaly", 20, 20, 70, 50]]
        path = root / ("train" if number < 8 else "test") / f"{image}.dicom"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_dicom(path, pixels(number, np.uint16))
    box = ["x_min", "y_min", "x_max", "y_max"]
    write_csv(root / "annotations" / "annotations_train.csv", ["image_id", "rad_id", "class_name", *box], train)
    write_csv(root / "annotations" / "annotations_test.csv", ["image_id", "class_name", *box], test)
    return root


def rle(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": coco.encode(np.asfortranarray(mask))["counts"].decode()}


def write_chexlocalize(root: Path, scale: int = 1) -> Path:
    """Masks of two parts and of none, and polygons; annotated at `scale` times the size. Also a lateral image."""
    size = (HEIGHT * scale, WIDTH * scale)
    effusion, edema = np.zeros((2, *size), dtype=np.uint8)
    effusion[10 * scale : 30 * scale, 20 * scale : 40 * scale] = 1
    effusion[40 * scale : 50 * scale, 60 * scale : 70 * scale] = 1
    edema[5 * scale : 15 * scale, 5 * scale : 25 * scale] = 1
    corners = [[[20, 10], [40, 10], [40, 30], [20, 30]], [[60, 40], [70, 50], [60, 50]]]
    polygons = [[[x * scale, y * scale] for x, y in polygon] for polygon in corners]
    nothing = rle(np.zeros(size, dtype=np.uint8))
    for split, numbers in (("val", range(4)), ("test", range(4, PATIENTS))):
        masks, contours = {}, {}
        for number in numbers:
            key = f"patient6{number:04d}_study1_view1_frontal"
            masks[key] = {"Pleural Effusion": rle(effusion), "Edema": rle(edema), "Cardiomegaly": nothing}
            contours[key] = {"img_size": list(size), "Pleural Effusion": polygons}
            save(root / "CheXpert" / split / f"patient6{number:04d}" / "study1" / "view1_frontal.jpg", pixels(number))
        masks[f"patient6{numbers[0]:04d}_study1_view2_lateral"] = {"Edema": rle(edema)}
        masks[f"patient6{numbers[1]:04d}_study2_view1_frontal"] = {"Edema": nothing}
        save(
            root / "CheXpert" / split / f"patient6{numbers[1]:04d}" / "study2" / "view1_frontal.jpg",
            pixels(numbers[1] + 50),
        )
        (root / f"gt_segmentations_{split}.json").write_text(json.dumps(masks), encoding="utf-8")
        (root / f"gt_annotations_{split}.json").write_text(json.dumps(contours), encoding="utf-8")
    return root


def det_record(name: str, number: int) -> dict[str, Any]:
    """Two boxes of one label and one of another, or no label."""
    if number % 3 == 2:
        return {"file_name": name, "syms": [], "boxes": [], "polygons": []}
    boxes = [[128, 256, 512, 640], [512, 0, 1024, 512], [100, 100, 200, 300]]
    polygons = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1]] for x0, y0, x1, y1 in boxes]
    return {"file_name": name, "syms": ["Effusion", "Effusion", "Diffuse Nodule"], "boxes": boxes, "polygons": polygons}


def write_chestx_det(root: Path, name: str = "ChestX_Det_{}.json") -> Path:
    for split, numbers in (("train", range(18)), ("test", range(18, 24))):
        # Two images per patient in training.
        names = {n: f"{(n // 2 if split == 'train' else n):08d}_{n:03d}.png" for n in numbers}
        records = [det_record(names[n], n) for n in numbers]
        (root / name.format(split)).write_text(json.dumps(records), encoding="utf-8")
        for n in numbers:
            save(root / f"{split}_data" / names[n], pixels(n, size=(64, 32)))
    return root


def read(module: type[TableDataModule], root: Path, **settings: Any) -> tuple[dict[str, ImageTextPair], list[Any]]:
    data = module(str(root), image_size=32, num_workers=0, **settings)
    pairs, bad = data.checked_rows()
    return {pair.id: pair for pair in pairs}, bad


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


SETS: dict[str, tuple[Callable[[Path], Path], type[TableDataModule]]] = {
    "padchest_gr.yaml": (write_padchest_gr, PadChestGrDataModule),
    "vindr.yaml": (write_vindr, VinDrDataModule),
    "chexlocalize.yaml": (write_chexlocalize, CheXlocalizeDataModule),
    "chestx_det.yaml": (write_chestx_det, ChestXDetDataModule),
}


@pytest.mark.parametrize("config", SETS)
def test_a_config_runs_from_check_data_to_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("tiny.json"), tmp_path)
    (tmp_path / "data").mkdir()
    SETS[config][0](tmp_path / "data")
    data = ["--config", config, "--data.root=data", "--data.cache_dir=null", "--data.num_workers=0"]
    data.append("--data.batch_size=4")
    main(["check-data", *data, "--model", "tiny.json", "--pretrained", "null"])
    checked = capsys.readouterr().out
    assert "No bad rows." in checked
    assert "  fit        yes" in checked
    few = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0"]
    main(["fit", *data, "--model.name=tiny.json", "--model.pretrained=null", *few])
    last = f"runs/{config.removesuffix('.yaml')}/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    small = ["--validation_pairs=2", "--sanity_pairs=2", "--steps=2", "--resamples=100", "--num_pairs=4"]
    main(["benchmark", *data, "--ckpt_path", last, "--methods=center_map,random_map", "--out=results", *small])
    results = json.loads(Path("results/results.json").read_text(encoding="utf-8"))
    assert {"CenterMap", "RandomMap"} <= {row["name"] for row in results["rows"]}


# A pair of each set, and its boxes in pixels of the image.
KNOWN = {
    "padchest_gr.yaml": ("0_a", [(40, 15, 60, 30)]),
    "vindr.yaml": (f"{0:032x}-pleural_effusion", [(41, 10, 61, 30)]),
    "chexlocalize.yaml": ("patient60000_study1_view1_frontal-pleural_effusion", [(20, 10, 40, 30), (60, 40, 70, 50)]),
    "chestx_det.yaml": ("00000000_000-pleural_effusion", [(4, 16, 16, 40), (16, 0, 32, 32)]),
}


@pytest.mark.parametrize("config", SETS)
def test_boxes_are_exact_in_the_image_and_in_the_frame(tmp_path: Path, config: str) -> None:
    """In a frame of the size of the image, where a pixel is a pixel of the image."""
    write, module = SETS[config]
    size = (64, 32) if module is ChestXDetDataModule else (HEIGHT, WIDTH)
    data = module(str(write(tmp_path)), image_size=size, num_workers=0)
    name, boxes = KNOWN[config]
    data.pairs = {"all": data.list_pairs()}
    index, pair = next((index, pair) for index, pair in enumerate(data.pairs["all"]) if pair.id == name)
    assert pair.size == size
    np.testing.assert_allclose(np.array(pair.boxes), boxes, atol=1e-6)
    sample = data.dataset("all")[index]
    np.testing.assert_allclose(sample.boxes * torch.tensor([size[1], size[0]] * 2), boxes, atol=1e-3)


def test_padchest_gr_pairs(tmp_path: Path) -> None:
    pairs, bad = read(PadChestGrDataModule, write_padchest_gr(tmp_path))
    assert not bad
    assert len(pairs) == 3 * PATIENTS
    effusion, nodule, normal = (pairs[name] for name in ("9_a", "9_a-2", "9_a-3"))
    assert [pair.phrase for pair in (effusion, nodule, normal)] == [
        "Left pleural effusion.",
        "Nodule in the right lung.",
        "No pneumothorax.",
    ]
    assert (effusion.finding, normal.finding, list(normal.boxes)) == ("pleural effusion", "", [])
    assert {pair.image_findings for pair in (effusion, normal)} == {("nodule", "pleural effusion")}
    assert (effusion.patient_id, effusion.split, pairs["11_a"].split) == ("patient 9", "val", "test")
    spanish, _ = read(PadChestGrDataModule, tmp_path, language="es", boxed_only=True)
    assert {pair.phrase for pair in spanish.values()} == {"Derrame pleural izquierdo.", "Nódulo en el pulmón derecho."}


def test_padchest_gr_boxes_of_a_second_reader(tmp_path: Path) -> None:
    root = write_padchest_gr(tmp_path)
    boxes = {readers: read(PadChestGrDataModule, root, readers=readers)[0] for readers in ("first", "second", "both")}
    first, second = (40, 15, 60, 30), (40, 15, 64, 30)
    assert [list(pairs["1_a"].boxes) for pairs in boxes.values()] == [[first], [second], [first, second]]
    assert [len(pairs["1_a-2"].boxes) for pairs in boxes.values()] == [1, 0, 1]
    with pytest.raises(ValueError, match="readers must be one of first, second, both, got 'third'"):
        PadChestGrDataModule(str(root), readers="third")  # type: ignore[arg-type]


def test_padchest_gr_merges_equal_sentences(tmp_path: Path) -> None:
    records = padchest_records()[:1]
    records[0]["findings"].append({**records[0]["findings"][0], "boxes": [[0, 0, 0.5, 0.5]]})
    pairs, bad = read(PadChestGrDataModule, write_padchest_gr(tmp_path, records))
    assert not bad
    assert list(pairs["0_a"].boxes) == [(40, 15, 60, 30), (0, 0, 40, 30)]


def test_padchest_gr_inverted_images(tmp_path: Path) -> None:
    """The first image is MONOCHROME1 in the table. All are stretched to the range of their 16 bits."""
    root = write_padchest_gr(tmp_path)
    data = PadChestGrDataModule(str(root), image_size=(HEIGHT, WIDTH), num_workers=0, augment=False)
    data.setup("fit")
    for number in (0, 1):
        stored = pixels(number).astype(float)
        shown = np.rint((stored - stored.min()) / (stored.max() - stored.min()) * 255)
        index, pair = next((i, p) for i, p in enumerate(data.pairs["train"]) if p.image_id == f"{number}_a")
        expected = 255 - shown if number == 0 else shown
        np.testing.assert_allclose(data.read_image(pair), expected, atol=1)
        np.testing.assert_allclose(data.dataset("train")[index].image[0], expected, atol=1)
    write_padchest_gr(root, photometric=False)
    with pytest.warns(UserWarning, match="has no column PhotometricInterpretation_DICOM.* data.metadata_file"):
        assert data.list_pairs()
    assert data.read_image(data.pairs["train"][0]).mean() > 100
    write_csv(root / "all.csv", ["ImageID", "PhotometricInterpretation_DICOM"], [["1_a.png", "MONOCHROME1"]])
    other = PadChestGrDataModule(str(root), metadata_file=str(root / "all.csv"))
    seen = {pair.image_id: other.read_image(pair) for pair in other.list_pairs()}
    np.testing.assert_array_equal(seen["0_a"], data.read_image(data.pairs["train"][0]))


def test_vindr_findings_of_three_readers(tmp_path: Path) -> None:
    root = write_vindr(tmp_path)
    image = f"{0:032x}"
    effusion, nodule = f"{image}-pleural_effusion", f"{image}-lung_nodule_or_mass"
    of_readers = {
        "fused": {effusion: [(41, 10, 61, 30)], nodule: [(4, 4, 12, 12)]},
        "majority": {effusion: [(41, 10, 61, 30)]},
        "all": {effusion: [(40, 10, 60, 30), (42, 10, 62, 30)], nodule: [(4, 4, 12, 12)]},
        "R8": {effusion: [(40, 10, 60, 30)]},
        "R10": {f"{image}-normal": []},
    }
    for readers, expected in of_readers.items():
        pairs, bad = read(VinDrDataModule, root, readers=readers)
        assert not bad
        assert {name: list(pair.boxes) for name, pair in pairs.items() if pair.image_id == image} == expected
    pairs, _ = read(VinDrDataModule, root, overlap=0.9)
    assert list(pairs[effusion].boxes) == of_readers["all"][effusion]
    with pytest.raises(ValueError, match=r"readers must be one of fused, majority, all, R1, R10, .* got 'R77'"):
        read(VinDrDataModule, root, readers="R77")


def test_vindr_majority_without_an_agreement(tmp_path: Path) -> None:
    reads = [("R8", "ILD", (40, 10, 60, 30)), ("R9", "Edema", (4, 4, 12, 12)), ("R10", "No finding", None)]
    root = write_vindr(tmp_path, reads)
    with pytest.warns(UserWarning, match=r"4 of 8 images of .*annotations_train\.csv have no finding that most"):
        pairs, bad = read(VinDrDataModule, root, readers="majority")
    assert not bad
    assert {pair.finding for pair in pairs.values() if pair.split != "test"} == {""}
    root = write_vindr(tmp_path, [("R8", "ILD", (40, 10, 60, 30)), *[(r, "No finding", None) for r in ("R9", "R10")]])
    assert f"{0:032x}-normal" in read(VinDrDataModule, root, readers="majority")[0]
    assert f"{0:032x}-interstitial_lung_disease" in read(VinDrDataModule, root)[0]


def test_vindr_test_images_labels_and_splits(tmp_path: Path) -> None:
    root = write_vindr(tmp_path)
    pairs, _ = read(VinDrDataModule, root, val_share=0.25)
    assert len({pair.image_id for pair in pairs.values() if pair.split == "val"}) == 2
    test = {name: list(pair.boxes) for name, pair in pairs.items() if pair.split == "test"}
    assert test[f"{8:032x}-other_lesion"] == [(4, 4, 12.5, 12)]
    assert test[f"{9:032x}-normal"] == []
    assert pairs[f"{9:032x}-normal"].phrase in (
        "No acute cardiopulmonary abnormality.",
        "Normal chest radiograph.",
        "The lungs are clear.",
    )
    few, _ = read(VinDrDataModule, root, skip_labels=["Other lesion"], boxed_only=True)
    assert {pair.finding for pair in few.values()} == {"pleural effusion", "lung nodule or mass", "cardiomegaly"}
    with pytest.raises(ValueError, match=r"skip_labels names \['Lesion'\]"):
        VinDrDataModule(str(root), skip_labels=["Lesion"])
    with pytest.raises(ValueError, match="overlap must be greater than 0"):
        VinDrDataModule(str(root), overlap=0)
    for module in (VinDrDataModule, ChestXDetDataModule):
        with pytest.raises(ValueError, match="val_share must be at least 0 and less than 1, got 20"):
            module(str(root), val_share=20)
    (root / "annotations" / "annotations_test.csv").unlink()
    with pytest.warns(UserWarning, match=r"annotations_test\.csv is missing"):
        assert {pair.split for pair in read(VinDrDataModule, root)[0].values()} == {"train", "val"}
    (root / "annotations" / "annotations_train.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.root must hold annotations/, train/ and test/"):
        read(VinDrDataModule, root)


def test_boxes_join_the_group_that_they_overlap_most() -> None:
    drawn = [((0, 0, 10, 10), "a"), ((20, 0, 30, 10), "a"), ((2, 0, 12, 10), "b"), ((21, 0, 31, 10), "c")]
    assert fuse_boxes(drawn, 0.5) == [
        ((1, 0, 11, 10), frozenset("ab")),
        ((20.5, 0, 30.5, 10), frozenset("ac")),
    ]
    assert fuse_boxes([], 0.5) == []


@pytest.mark.parametrize("annotations", ["segmentations", "polygons"])
@pytest.mark.parametrize("scale", [1, 3])
def test_chexlocalize_parts_of_masks_and_polygons(tmp_path: Path, annotations: str, scale: int) -> None:
    """Underscores of a key are slashes of the path, and a down-sized copy of an image has down-sized boxes."""
    root = write_chexlocalize(tmp_path, scale)
    with (
        pytest.warns(UserWarning, match="lateral|no segmentation") if annotations == "segmentations" else nullcontext()
    ):
        pairs, bad = read(CheXlocalizeDataModule, root, annotations=annotations)
    assert not bad
    name = "patient60004_study1_view1_frontal"
    pair = pairs[f"{name}-pleural_effusion"]
    assert Path(pair.image).relative_to(root) == Path("CheXpert/test/patient60004/study1/view1_frontal.jpg")
    assert (pair.patient_id, pair.split, pairs["patient60000_study1_view1_frontal-pleural_effusion"].split) == (
        "patient60004",
        "test",
        "val",
    )
    np.testing.assert_allclose(pair.boxes, [(20, 10, 40, 30), (60, 40, 70, 50)], atol=0.5 / scale)
    edema = annotations == "segmentations"
    assert pair.image_findings == (("edema", "pleural effusion") if edema else ("pleural effusion",))
    assert len(pairs) == (2 if edema else 1) * PATIENTS


def test_chexlocalize_folders_of_other_distributions(tmp_path: Path) -> None:
    root = write_chexlocalize(tmp_path)
    before = sorted(read(CheXlocalizeDataModule, root)[0])
    (root / "CheXlocalize").mkdir()
    for path in root.glob("gt_*.json"):
        path.rename(root / "CheXlocalize" / path.name)
    (root / "CheXpert" / "val").rename(root / "CheXpert" / "valid")
    (root / "CheXpert").rename(root / "CheXpert-v1.0")
    pairs, bad = read(CheXlocalizeDataModule, root)
    assert (sorted(pairs), bad) == (before, [])
    (root / "CheXlocalize" / "gt_segmentations_test.json").unlink()
    with pytest.warns(UserWarning, match=r"gt_segmentations_test\.json is missing"):
        read(CheXlocalizeDataModule, root)
    (root / "CheXlocalize" / "gt_segmentations_val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.annotations: polygons reads gt_annotations_val\.json"):
        read(CheXlocalizeDataModule, root)


def test_chexlocalize_has_no_training_images(tmp_path: Path) -> None:
    root = write_chexlocalize(tmp_path)
    data = CheXlocalizeDataModule(str(root), image_size=32)
    with pytest.raises(ValueError, match=r"no training images.* data\.splits: patients"):
        data.setup("fit")
    data.setup("test")
    drawn = CheXlocalizeDataModule(str(root), image_size=32, splits="patients", fractions=(0.5, 0.25, 0.25))
    drawn.setup("fit")
    patients = [{pair.patient_id for pair in pairs} for pairs in drawn.pairs.values()]
    assert [len(names) for names in patients] == [6, 3, 3]
    assert len(set.union(*patients)) == PATIENTS


@pytest.mark.parametrize("name", ["ChestX_Det_{}.json", "{}.json"], ids=["chestx_det", "chestx_det10"])
def test_chestx_det_pairs(tmp_path: Path, name: str) -> None:
    root = write_chestx_det(tmp_path, name)
    if name == "{}.json":
        for split in ("train", "test"):
            edit(root / f"{split}.json", lambda records: [record.pop("polygons") for record in records])
    pairs, bad = read(ChestXDetDataModule, root, val_share=0.3)
    assert not bad
    nodule, normal = pairs["00000000_000-diffuse_lung_nodularity"], pairs["00000001_002-normal"]
    np.testing.assert_allclose(nodule.boxes, [(3.125, 6.25, 6.25, 18.75)])
    assert nodule.image_findings == ("diffuse lung nodularity", "pleural effusion")
    assert (list(normal.boxes), normal.finding, normal.patient_id) == ([], "", "00000001")
    patients = {split: {p.patient_id for p in pairs.values() if p.split == split} for split in ("train", "val", "test")}
    assert [len(names) for names in patients.values()] == [6, 3, 6]
    boxed, _ = read(ChestXDetDataModule, root, boxed_only=True)
    assert len(boxed) == 2 * 16


def change_csv(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


def finding(number: int, **values: Any) -> Callable[[Path], None]:
    """Change of a finding of the second study."""

    def change(root: Path) -> None:
        path = root / "grounded_reports_20240819.json"
        edit(path, lambda records: records[1]["findings"][number].update(values))

    return change


def train_row(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: change_csv(root / "annotations" / "annotations_train.csv", old, new)


def val_record(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda root: edit(root / "gt_segmentations_val.json", change)


def det(**values: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "ChestX_Det_train.json", lambda records: records[1].update(values))


def small_mask(masks: Any) -> None:
    masks["patient60000_study1_view1_frontal"]["Edema"] = rle(np.ones((50, 80), dtype=np.uint8))


def long_mask(masks: Any) -> None:
    masks["patient60000_study1_view1_frontal"]["Edema"]["counts"] = [4000, 900]


PADCHEST, VINDR, CHEXLOCALIZE, DET = SETS
FAULTS = [
    (PADCHEST, finding(0, boxes=[[0.5, 0.25, 1.75, 0.5]]), "record 2, finding 1", r"reaches outside of \[0, 1\]"),
    (PADCHEST, finding(0, boxes=[[310, 420, 520, 600]]), "record 2, finding 1", r"reaches outside of \[0, 1\]"),
    (PADCHEST, finding(1, boxes=[[0.5, 0.25]]), "record 2, finding 2", r"the boxes are no list of \[x0, y0, x1, y1\]"),
    (PADCHEST, finding(2, sentence_en=None), "record 2, finding 3", "the phrase is empty"),
    (PADCHEST, finding(2, abnormal="no"), "record 2, finding 3", "abnormal is neither true nor false"),
    (PADCHEST, finding(0, labels="nodule"), "record 2, finding 1", "the labels are no list of texts"),
    (
        PADCHEST,
        lambda root: edit(root / "grounded_reports_20240819.json", lambda records: records[2].pop("findings")),
        "record 3",
        "the record has no ImageID and list of findings",
    ),
    (PADCHEST, lambda root: (root / "Padchest_GR_files" / "3_a.png").unlink(), "record 4", "there is no such file"),
    (
        PADCHEST,
        lambda root: save(root / "small" / "3_a.jpg", pixels(0)),
        "record 4",
        "several files have this name; give the folder of one of them as images",
    ),
    (
        PADCHEST,
        lambda root: change_csv(root / "master_table.csv", "3,3_a.png,patient 3,train,nodule,MONOCHROME2\n", ""),
        None,
        None,
    ),
    (
        PADCHEST,
        lambda root: change_csv(root / "master_table.csv", "patient 3,train,nodule", "patient 3,holdout,nodule"),
        "record 4",
        "the split is none of|an earlier row of the image has another split",
    ),
    (
        PADCHEST,
        lambda root: change_csv(root / "master_table.csv", "patient 3,train,pleural", "patient 4,train,pleural"),
        "master_table.csv",
        "an earlier row of the image has another PatientID",
    ),
    (VINDR, train_row("R10,No finding", "R10,Nothing"), "annotations_train.csv", "the label is none of"),
    (
        VINDR,
        train_row("42,10,62,30", "42,10,162,30"),
        "annotations_train.csv",
        "reaches outside of its image of 80 x 60",
    ),
    (VINDR, train_row("4,4,12,12", ",,,"), "annotations_train.csv", "a row with a finding needs a box"),
    (VINDR, train_row("4,4,12,12", "4,,12,12"), "annotations_train.csv", "a box is not four numbers"),
    (VINDR, train_row("No finding,,,,", "No finding,1,2,3,4"), "annotations_train.csv", "a row without one has none"),
    (
        VINDR,
        lambda root: (root / "test" / f"{8:032x}.dicom").unlink(),
        "annotations_test.csv",
        rf"there is no test/{8:032x}\.dicom below",
    ),
    (CHEXLOCALIZE, val_record(small_mask), "record 1, Edema", "has another shape than its file of 80 x 60"),
    (CHEXLOCALIZE, val_record(long_mask), "record 1, Edema", "the counts do not sum to the 4800 pixels"),
    (
        CHEXLOCALIZE,
        val_record(lambda masks: masks["patient60000_study1_view1_frontal"].update(Fracture={})),
        "record 1, Fracture",
        "the task is none of Atelectasis",
    ),
    (
        CHEXLOCALIZE,
        val_record(lambda masks: masks.update({"patient1/study1/view1": {"Edema": {}}})),
        "record 7, Edema",
        "the key is not like patient64622_study1_view1_frontal",
    ),
    (CHEXLOCALIZE, val_record(lambda masks: masks.update(more=[])), "record 7", "the record is no object"),
    (
        CHEXLOCALIZE,
        val_record(lambda masks: masks.update(patient9_study1_view1_frontal={"Edema": {}})),
        "record 7, Edema",
        r"there is no CheXpert/val/patient9/study1/view1_frontal\.jpg below",
    ),
    (DET, det(syms=["Effusion", "Effusion", "Nodules"]), "record 2, Nodules", "the label is none of Atelectasis"),
    (DET, det(syms=["Effusion"]), "record 2", "the numbers of syms and boxes differ"),
    (DET, det(syms=None), "record 2", "the record has no file_name, syms and boxes"),
    (
        DET,
        det(boxes=[[128, 256, 512, 640], [512, 0, 1024, 512], [0, 0, 1024, 1100]]),
        "record 2, Diffuse Nodule",
        "1024 x 1024",
    ),
    (DET, det(file_name="9.png"), "record 2", "there is no such file in the folder of the images"),
]


@pytest.mark.parametrize(("config", "break_it", "place", "rule"), FAULTS)
def test_a_fault_is_named_with_its_place(
    tmp_path: Path, config: str, break_it: Callable[[Path], None], place: str | None, rule: str | None
) -> None:
    """File and line, or file and record; and with on_bad_row: skip only its pairs are left out."""
    write, module = SETS[config]
    root = write(tmp_path)
    before, _ = read(module, root)
    break_it(root)
    after, bad = read(module, root)
    if rule is None:
        assert (after, bad) == (before, [])
        return
    assert bad
    assert place in bad[0].file
    assert bad[0].line or "record" in place
    assert all(re.search(rule, row.rule) or "another row of the same pair" in row.rule for row in bad)
    assert "\n" not in bad[0].rule
    assert len(before) - 3 <= len(after) <= len(before)
    assert {name: pair.boxes for name, pair in after.items() if name in before} == {
        name: before[name].boxes for name in after if name in before
    }
    with pytest.raises(ValueError, match=r"bad rows?.*\n.*Correct these rows, or leave them out|bad row"):
        module(str(root), image_size=32).list_pairs()


@pytest.mark.parametrize(
    ("config", "file", "content", "message"),
    [
        (PADCHEST, "grounded_reports_20240819.json", "{}", "is no list of records with ImageID and findings"),
        (PADCHEST, "grounded_reports_20240819.json", '[\n{"a": ', "line 2: The JSON ends or breaks here"),
        (PADCHEST, "grounded_reports_2.json", "[]", "has several files of reports"),
        (PADCHEST, "master_table.csv", "ImageID,split\na,b", r"lacks the columns \['PatientID'\]"),
        (VINDR, "annotations/annotations_test.csv", "image_id\na", "lacks the columns"),
        (CHEXLOCALIZE, "gt_segmentations_val.json", "[]", "is no object of images by patient"),
        (DET, "ChestX_Det_test.json", "{}", "is no list of records with file_name, syms and boxes"),
        (DET, "ChestX_Det_test.json", "[" * 100_000, "is no readable JSON"),
    ],
)
def test_files_of_another_layout_are_refused(
    tmp_path: Path, config: str, file: str, content: str, message: str
) -> None:
    write, module = SETS[config]
    root = write(tmp_path)
    (root / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(module, root)


@pytest.mark.parametrize("config", SETS)
def test_a_folder_without_the_set_is_named(tmp_path: Path, config: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root must hold"):
        read(SETS[config][1], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data\.root must hold"):
        read(SETS[config][1], tmp_path / "nothing")
