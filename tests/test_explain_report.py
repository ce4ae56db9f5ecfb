"""`matex explain` on reports, phrases and tables: folders, pictures, and refusals before the model is loaded."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shlex
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_refusals import listing, refused

from matex_pl.attribution import CenterMap, Matex
from matex_pl.cli import main
from matex_pl.clip import Clip, load_trained
from matex_pl.commands.explain_compared import other_phrase
from matex_pl.data.pair import ImageTextPair, Sample, collate
from matex_pl.explain.phrases import explain_phrases, frame_image
from matex_pl.visualization.difference import HIGHER, LOWER, difference_overlay

MODEL = "--ckpt_path=good.ckpt"
REPORT = """HISTORY: cough.

FINDINGS: Left lower lobe consolidation. No pneumothorax. The heart is enlarged.
IMPRESSION: 1. Left lower lobe pneumonia with a parapneumonic effusion, which is larger
than on the earlier study and extends from the left costophrenic angle along the lateral chest wall to the level of the
aortic arch, with compression of the adjacent lung and a shift of the mediastinum to the right side.
"""
TEXTS = ["Left lower lobe consolidation.", "The heart is enlarged."]


@pytest.fixture
def report(workdir: Path) -> Path:
    path = workdir / "report.txt"
    path.write_text(REPORT, encoding="utf-8")
    return path


def record(folder: str | Path = "out") -> dict[str, Any]:
    return json.loads((Path(folder) / "explain.json").read_text(encoding="utf-8"))


def test_a_report_gives_a_folder(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "image.png", "--report", "report.txt", MODEL, "--out", "out"])
    assert capsys.readouterr().out.strip() == "out"
    found = record()
    sentences = found["sentences"]
    assert [(s["text"][:21], s["status"], s["reason"]) for s in sentences] == [
        ("cough.", "without map", "history"),
        ("Left lower lobe conso", "mapped", ""),
        ("No pneumothorax.", "without map", "negated"),
        ("The heart is enlarged", "mapped", ""),
        ("Left lower lobe pneum", "mapped", ""),
    ]
    for sentence in sentences:
        assert " ".join(REPORT[sentence["start"] : sentence["end"]].split()) == sentence["text"]
    mapped = [s for s in sentences if s["status"] == "mapped"]
    assert sorted(path.name for path in Path("out").iterdir()) == found["files"]
    assert {s["panel"] for s in mapped} | {"sheet.png", "report.html", "explain.json"} == set(found["files"])
    assert Image.open("out/sentence-02.png").size[0] == 880
    assert Image.open("out/sheet.png").info["Software"] == "matex_pl"
    # The model of the tests reads 48 tokens: the words behind them are named.
    assert mapped[2]["cut"].endswith("to the right side")
    assert mapped[0]["cut"] == ""
    assert mapped[0]["regions"] == [{"side": "left", "zone": "lower"}]
    assert sum(word["share"] for word in mapped[0]["words"]) == pytest.approx(1, abs=1e-4)
    assert found["method"]["class_path"].endswith("Matex")
    assert found["method"]["init_args"]["target"] == "margin"
    assert found["image"] == {
        "file": "image.png",
        "sha256": sha256(Path("image.png").read_bytes()).hexdigest(),
        "width": 70,
        "height": 90,
    }


def test_scores_and_margins_are_those_of_the_pairs(report: Path, tiny_clip: Clip) -> None:
    clip, method = load_trained("good.ckpt"), Matex.recommended()
    image = frame_image(clip, "image.png")
    seen: list[int] = []
    alone = explain_phrases(clip, method, image, TEXTS[:1])
    with clip.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
        explained = explain_phrases(clip, method, image, [*TEXTS, "Right effusion."])
    # One image passes the tower once, for three phrases.
    assert seen == [1]
    batch = collate(_samples(explained))
    images, tokens = clip.inputs(batch)
    with torch.no_grad():
        cosines = clip.similarity(images, tokens)
        references = clip.encode_text(clip.tokenize(method.references)).mean(0)
        margins = cosines - clip.encode_image(images[:1])[0] @ references
    numbers = explained.numbers(0.5)
    assert [n["score"] for n in numbers] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert [n["margin"] for n in numbers] == pytest.approx(margins.tolist(), abs=1e-5)
    torch.testing.assert_close(explained.maps.image[:1], alone.maps.image, atol=1e-5, rtol=0)


def _samples(explained: Any) -> list[Any]:
    framed = explained.image.framed
    return [Sample(ImageTextPair(t, "", t, t, t), *framed) for t in explained.batch["phrase"]]


@pytest.mark.parametrize("resize_mode", ["longest", "shortest", "squash"])
@pytest.mark.parametrize("size", [(200, 120), (120, 200)])
def test_peak_and_boxes_are_in_pixels_of_the_image(
    tiny_clip: Clip, tmp_path: Path, resize_mode: Any, size: Any
) -> None:
    """The map of `CenterMap` is highest in the middle of the image in every mode."""
    width, height = size
    Image.fromarray(np.full((height, width), 90, np.uint8)).save(tmp_path / "gray.png")
    explained = explain_phrases(
        tiny_clip, CenterMap(), frame_image(tiny_clip, tmp_path / "gray.png", resize_mode), ["Edema."]
    )
    (numbers,) = explained.numbers(0.5)
    pixel = 200 / 32
    assert abs(numbers["peak"]["x"] - width / 2) <= pixel
    assert abs(numbers["peak"]["y"] - height / 2) <= pixel
    (box,) = numbers["boxes"]
    assert 0 <= box["x0"] < width / 2 < box["x1"] <= width
    assert 0 <= box["y0"] < height / 2 < box["y1"] <= height
    assert abs(box["x0"] + box["x1"] - width) <= pixel
    # A higher threshold gives a smaller box.
    (small,) = explained.numbers(0.9)[0]["boxes"]
    assert small["x1"] - small["x0"] < box["x1"] - box["x0"]


def test_places_are_in_the_upright_image(report: Path) -> None:
    """The file is stored on its side, with the EXIF tag that turns it."""
    upright = Image.open("image.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save("turned.png", exif=exif)
    assert turned.size == (90, 70)
    for name in ("image", "turned"):
        main(["explain", f"{name}.png", "--report", "report.txt", MODEL, "--out", name])
    there, here = record("image"), record("turned")
    assert (here["image"]["width"], here["image"]["height"]) == (70, 90)
    assert here["sentences"] == there["sentences"]


def test_phrases_give_a_folder_or_a_sheet(workdir: Path) -> None:
    # Options may stand between the phrases.
    main(["explain", "image.png", TEXTS[0], "--out", "out", TEXTS[1], MODEL, "No effusion."])
    found = record()
    assert [s["text"] for s in found["sentences"]] == [*TEXTS, "No effusion."]
    assert {s["status"] for s in found["sentences"]} == {"mapped"}
    assert found["report"]["text"].splitlines() == [*TEXTS, "No effusion."]
    main(["explain", "image.png", *TEXTS, MODEL, "--out", "sheet.png"])
    assert Image.open("sheet.png").size[0] == 960
    main(["explain", "image.png", TEXTS[0], MODEL, "--out", "single", "--method", "chefer", "--threshold", "0.3"])
    assert record("single")["threshold"] == {"value": 0.3, "source": "as given"}
    # Without --out, one phrase gives a panel, and several give a folder.
    main(["explain", "image.png", *TEXTS, MODEL])
    assert record("explained")["files"]


def test_all_sentences_and_standard_input(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"No pneumothorax. Lungs are clear."))
    monkeypatch.setattr(sys, "stdin", stdin)
    main(["explain", "image.png", "--report", "-", "--all_sentences", MODEL, "--out", "out"])
    assert [(s["status"], s["reason"]) for s in record()["sentences"]] == [("mapped", "negated"), ("mapped", "normal")]
    main(["explain", "image.png", "--report", "Left effusion. No edema.", MODEL, "--out", "text"])
    assert [s["status"] for s in record("text")["sentences"]] == ["mapped", "without map"]


def test_a_folder_replaces_only_its_own_kind(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "image.png", "--report", "report.txt", MODEL, "--out", "out"]
    main(words)
    main(["explain", "image.png", "--report=Left effusion.", MODEL, "--out=out"])
    assert record()["files"] == ["explain.json", "report.html", "sentence-01.png", "sheet.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == record()["files"]
    Path("out/notes.txt").write_text("Keep.", encoding="utf-8")
    Path("other").mkdir()
    Path("other/explain.json").write_text("{}", encoding="utf-8")
    Path("link").symlink_to("other")
    before = listing(report.parent)
    for out, name in (("out", "notes.txt"), ("other", "explain.json"), ("link", "no folder"), (".", "present folder")):
        said = refused(capsys, *words[:-1], out)
        assert name in said
        assert len(said.splitlines()) == 1
    assert listing(report.parent) == before


BAD = {
    "a report without a finding": (
        ["--report", "No effusion. Lungs are clear."],
        ["no sentence to map", "negated: No eff"],
    ),
    "an empty report": (["--report", "empty.csv"], ["'empty.csv' is empty"]),
    "an empty text": (["--report", " "], ["is empty"]),
    "a missing file": (["--report", "none.txt"], ["There is no report at 'none.txt'"]),
    "a missing file without a suffix": (["--report", "none"], ["There is no report at 'none'"]),
    "an image as report": (["--report", "image.png"], ["'image.png' is an image"]),
    "a folder as report": (["--report", "plan_old"], ["'plan_old' is a folder"]),
    "Latin-1": (["--report", "latin.txt"], ["no UTF-8 text", "line 2", "0xe9"]),
    "UTF-16": (["--report", "utf16.txt"], ["UTF-16"]),
    "a PDF": (["--report", "report.pdf"], ["no plain text"]),
    "a report and phrases": (["Nodule.", "--report", "Left nodule."], ["--report does not go with phrases", "Nodule."]),
    "no phrase": ([], ["No phrase given"]),
    "an empty phrase": (["Nodule.", " "], ["The phrase is empty"]),
    "a picture of another kind": (["Nodule.", "Mass.", "--out=out.jpg"], ["out must end in .png", "or name a folder"]),
    "an output that cannot be written": (["Nodule.", "Mass.", "--out=/proc/none"], ["/proc"]),
    "a file as folder": (["Nodule.", "Mass.", "--out=images.csv"], ["out must end in .png", "or name a folder"]),
    "all methods": (["Nodule.", "Mass.", "--method=all"], ["--method all compares methods on one phrase"]),
    "a threshold above 1": (["Nodule.", "Mass.", "--threshold=1.5"], ["--threshold must be in [0, 1), got 1.5"]),
    "a threshold of words": (["Nodule.", "Mass.", "--threshold=high"], ["--threshold must be a number", "'high'"]),
    "a comparison of two phrases": (["Nodule.", "Mass.", "--compare=mirrored"], ["--compare takes one phrase"]),
    "a comparison as folder": (["Nodule.", "--compare=Mass.", "--out=out"], ["out must end in .png"]),
    "a missing word": (["Left nodule.", "--compare=right/left"], ["does not have the words 'right'"]),
    "no side": (["Cardiomegaly.", "--compare=mirrored"], ["names no side"]),
    "the same phrase": (["Nodule.", "--compare=Nodule."], ["changes nothing"]),
    "a missing image": (["none.png", "Nodule.", "Mass."], ["none.png"]),
    "a table and an image": (["--manifest=images.csv"], ["--manifest brings its own images"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_before_the_model(
    workdir: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("latin.txt").write_bytes(b"Left effusion.\nCaf\xe9.")
    Path("utf16.txt").write_text("Left effusion.", encoding="utf-16")
    Path("report.pdf").write_bytes(b"%PDF-1.7 Left effusion.")
    words, parts = BAD[case]
    monkeypatch.setattr("matex_pl.clip.load_trained", lambda *_: pytest.fail("The model was loaded."))
    before = listing(workdir)
    said = refused(capsys, "explain", *([] if words[:1] == ["none.png"] else ["image.png"]), *words, MODEL)
    for part in parts:
        assert part in said
    assert listing(workdir) == before


@pytest.fixture
def table(workdir: Path) -> Path:
    (workdir / "a").mkdir()
    for name in ("a/1", "a/2", "3", "4"):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (60, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    rows = [("a/1.png", REPORT), ("a/2.png", "Left effusion."), ("3.png", "Lungs are clear."), ("4.png", "Edema.")]
    with Path("reports.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "report"), *rows])
    # Its header is whole, and its pixels are not.
    Path("4.png").write_bytes(Path("4.png").read_bytes()[:200])
    return workdir


def test_a_table_gives_a_folder_per_image_and_goes_on(table: Path) -> None:
    words = ["explain", "--manifest", "reports.csv", MODEL, "--out", "out"]
    main(words)
    with Path("out/reports.csv").open(encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert [rows[name]["folder"] for name in ("a/1.png", "a/2.png", "3.png", "4.png")] == ["a/1", "a/2", "", ""]
    assert rows["3.png"]["note"] == "no sentence to map"
    assert rows["4.png"]["note"].startswith("unreadable")
    assert rows["a/1.png"]["mapped"] == "3"
    made = {name: Path(f"out/{name}/explain.json").stat().st_mtime_ns for name in ("a/1", "a/2")}
    # An interrupted folder lacks files.
    Path("out/a/2/sheet.png").unlink()
    main(words)
    assert Path("out/a/1/explain.json").stat().st_mtime_ns == made["a/1"]
    assert Path("out/a/2/explain.json").stat().st_mtime_ns != made["a/2"]
    assert Path("out/a/2/sheet.png").is_file()
    # Other settings, or another report, are other maps.
    main([*words, "--threshold=0.4"])
    assert record("out/a/1")["threshold"]["value"] == 0.4


def test_bad_tables_are_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(text: str) -> str:
        Path("bad.csv").write_text(text, encoding="utf-8")
        before = listing(table)
        message = refused(capsys, "explain", "--manifest=bad.csv", MODEL, "--out=out")
        assert listing(table) == before
        return message

    assert "lacks the columns ['report']" in said("image,phrase\n3.png,Edema.\n")
    assert "line 3" in said("image,report\n3.png,Edema.\nnone.png,Edema.\n")
    assert "the report is empty" in said('image,report\n3.png," "\n')
    assert "has the same folder" in said("image,report\n3.png,Edema.\n3.png,Mass.\n")
    assert "leads out of the root" in said("image,report,id\n3.png,Edema.,../x\n")
    Path("out/3").mkdir(parents=True)
    Path("out/3/mine.txt").touch()
    assert "mine.txt" in said("image,report\n3.png,Edema.\n")


def test_a_comparison_draws_both_maps_and_their_difference(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "image.png", "Left lower lobe consolidation.", MODEL]
    main([*words, "--compare", "mirrored"])
    main([*words, "--compare", "left/right", "--out", "words.png"])
    main([*words, "--compare", "Right lower lobe consolidation.", "--out", "phrase.png"])
    pictures = [np.asarray(Image.open(name)) for name in ("compare.png", "words.png", "phrase.png")]
    assert pictures[0].shape[1] == 1320
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    main([*words, "--compare", "consolidation/mass", "--out", "other.png"])
    assert not np.array_equal(pictures[0], np.asarray(Image.open("other.png")))


@pytest.mark.parametrize(
    ("phrase", "compare", "other"),
    [
        ("Left lower lobe mass.", "mirrored", "Right lower lobe mass."),
        ("LLL opacity.", "mirrored", "RLL opacity."),
        ("Left lower lobe mass.", "left/right", "Right lower lobe mass."),
        ("Left lower lobe mass.", "lower lobe/upper lobe", "Left upper lobe mass."),
        ("Small left effusion.", "small/", "left effusion."),
        ("Left effusion.", "No finding.", "No finding."),
    ],
)
def test_the_other_phrase(phrase: str, compare: str, other: str) -> None:
    assert other_phrase(phrase, compare) == other


def test_colors_of_a_difference() -> None:
    gray = np.full((1, 3, 3), 100, np.uint8)
    lower, same, higher = difference_overlay(gray, np.array([[-1.0, 0.0, 1.0]], np.float32))[0].astype(int)
    assert same.tolist() == [100, 100, 100]
    assert np.abs(lower - LOWER).max() < np.abs(lower - HIGHER).max()
    assert np.abs(higher - HIGHER).max() < np.abs(higher - LOWER).max()


def test_the_page_is_alone_and_safe(report: Path) -> None:
    report.write_text('Left <b>effusion</b> "</script><script>alert(1)</script>".', encoding="utf-8")
    main(["explain", "image.png", "--report", "report.txt", MODEL, "--out", "out"])
    html = Path("out/report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", html)
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert html.count("<script") == 2
    assert "<script>alert" not in html
    # The policy of the page runs its own script and no other.
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(sha256(script[1].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html or f"script-src 'sha256-{digest}'" in html
    entries = re.search(r'<script type="application/json" id="entries">(.*?)</script>', html, re.DOTALL)
    assert entries is not None
    (entry,) = json.loads(entries[1])
    heat = Image.open(io.BytesIO(base64.b64decode(entry["map"].partition(",")[2])))
    assert heat.size == (70, 90)
    assert heat.mode == "P"


CHEXMASK = "image_id,Dice RCA (Mean),Left Lung,Right Lung,Heart,Height,Width\n"


def test_masks_of_an_image_give_shares_of_its_maps(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A map in the middle, on masks of CheXmask: the left half of the image is the right lung."""
    right = " ".join(f"{row * 70 + 1} 35" for row in range(90))
    left = " ".join(f"{row * 70 + 36} 35" for row in range(90))
    Path("masks.csv").write_text(f"{CHEXMASK}image.png,0.9,{left},{right},1 700,90,70\n", encoding="utf-8")
    words = ["explain", "image.png", "--report", "report.txt", MODEL, "--out", "out", "--method", "center_map"]
    main([*words, "--anatomy", "masks.csv"])
    found = record()
    assert found["anatomy"] == "masks.csv"
    rows = {row["structure"]: row for row in found["sentences"][1]["structures"]}
    # The frame has 25 columns of the image.
    assert rows["left_lung"]["mass"] == pytest.approx(0.5, abs=0.03)
    assert rows["left_lung"]["ratio"] == pytest.approx(rows["left_lung"]["mass"] / rows["left_lung"]["area"], rel=1e-4)
    assert rows["heart"]["mass"] < rows["heart"]["area"] < 0.15
    assert [rows[name]["peak_inside"] for name in ("left_lung", "heart")] == [True, False]
    text = Path("out/report.html").read_text(encoding="utf-8")
    assert '<th scope="row">right lung</th><td>' in text
    # Without masks there is no table, and other masks make another folder.
    main(words)
    assert record()["sentences"][1]["structures"] == []
    assert 'class="shares"' not in Path("out/report.html").read_text(encoding="utf-8")
    Path("other.csv").write_text(f"{CHEXMASK}another,0.9,1 1,2 1,3 1,90,70\n", encoding="utf-8")
    for value, rule in (("other.csv", "other.csv"), ("none.csv", "none.csv")):
        assert rule in refused(capsys, *words, "--anatomy", value)
    assert "--out with a folder" in refused(capsys, "explain", "image.png", "Mass.", MODEL, "--anatomy=masks.csv")


def test_folders_within_each_other_are_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first, second in (("x", "x/y"), ("x/y", "x")):
        rows = f"image,report,id\n3.png,Left effusion.,{first}\na/1.png,Edema.,{second}\n"
        Path("nested.csv").write_text(rows, encoding="utf-8")
        assert "is within that of line" in refused(capsys, "explain", "--manifest=nested.csv", MODEL, "--out=out")
        assert not Path("out").exists()


def test_masks_of_a_table_move_the_prior(table: Path) -> None:
    """The columns of a manifest; with lungs, the prior of MATEX has their frame."""
    main(["explain", "--manifest", "reports.csv", MODEL, "--out", "plain", "--method", "prior_only"])
    with Path("reports.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        # Images of 50 x 60 pixels.
        row["mask_left_lung"] = " ".join(f"{line * 50 + 13} 12" for line in range(30))
        row["mask_right_lung"] = " ".join(f"{line * 50 + 1} 12" for line in range(30))
    with Path("reports.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    main(["explain", "--manifest", "reports.csv", MODEL, "--out", "masked", "--method", "prior_only"])
    one, other = (next(iter(sorted(Path(name).rglob("explain.json")))) for name in ("plain", "masked"))
    before, after = (json.loads(path.read_text(encoding="utf-8"))["sentences"] for path in (one, other))
    mapped = [number for number, sentence in enumerate(after) if sentence["status"] == "mapped" and sentence["regions"]]
    assert mapped
    for number in mapped:
        assert {row["structure"] for row in after[number]["structures"]} == {"left_lung", "right_lung"}
        # The frame is the upper left part of the image.
        assert after[number]["peak"]["y"] < before[number]["peak"]["y"]


def test_the_threshold_of_a_benchmark(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "image.png", *TEXTS, MODEL, "--out", "out"])
    found = record()
    row = {
        "name": "Matex",
        "modality": "image",
        "class": "Matex",
        "settings": found["method"]["init_args"],
        "threshold": 0.35,
    }
    results = {"format": 2, "model": {"weights": found["model"]["weights"]}, "rows": [row]}
    Path("bench").mkdir()
    Path("bench/results.json").write_text(json.dumps(results), encoding="utf-8")
    words = ["explain", "image.png", *TEXTS, MODEL, "--out", "out", "--threshold", "bench"]
    main(words)
    assert record()["threshold"] == {"value": 0.35, "source": "chosen on validation pairs by a benchmark"}
    assert "has no threshold for Chefer" in refused(capsys, *words, "--method=chefer")
    results["model"]["weights"] = "0"
    Path("bench/results.json").write_text(json.dumps(results), encoding="utf-8")
    assert "is of other weights" in refused(capsys, *words)


def test_commands_of_the_guide_run(table: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "reports.md").read_text(encoding="utf-8")
    Path("image.png").rename("chest.png")
    Path("report.txt").write_text(REPORT, encoding="utf-8")
    commands = [
        shlex.split(line)[1:]
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("matex explain") and "--threshold" not in line
    ]
    assert len(commands) == 9
    Path("CheXmask.csv").write_text(f"{CHEXMASK}chest.png,0.9,1 9,11 9,1 20,90,70\n", encoding="utf-8")
    for words in commands:
        main([word.replace("runs/phantom/checkpoints/last.ckpt", "good.ckpt") for word in words])
        assert Path(words[words.index("--out") + 1]).exists()
