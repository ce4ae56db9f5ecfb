"""MIMIC-CXR on a small made-up copy of its layout: nothing of the real one is in here."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from test_ms_cxr import write_images

from matex_pl.cli import main
from matex_pl.data import MimicCxrDataModule
from matex_pl.data.mimic import METADATA_FILE, SPLIT_FILE, sentences_of

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.  // Pneumonia?

 FINDINGS:

 There is a small left pleural effusion.  The heart is mildly
 enlarged, image {n}.  Normal.

 IMPRESSION:
 1.  Small left effusion of 1.5 cm.
 2. No pneumothorax is seen.  2. No pneumothorax is seen.

 NOTIFICATION:  Discussed with the ordering doctor by phone.
"""
FINDINGS = ["There is a small left pleural effusion.", "The heart is mildly enlarged, image {n}."]
IMPRESSION = ["Small left effusion of 1.5 cm.", "No pneumothorax is seen."]


def _path(patient: int, image: str) -> str:
    return f"files/p10/p{10000000 + patient}/s{50000000 + patient}/{image}.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sixteen patients with a frontal and a lateral image each; reports in a folder of their own."""
    splits = ["dicom_id,study_id,subject_id,split"]
    views = ["dicom_id,subject_id,study_id,ViewPosition,Rows"]
    names = ["train"] * 10 + ["validate"] * 3 + ["test"] * 3
    paths = []
    for patient in range(16):
        for image, view in ((f"f{patient}", "PA" if patient % 2 else "AP"), (f"l{patient}", "LATERAL")):
            splits.append(f"{image},{50000000 + patient},{10000000 + patient},{names[patient]}")
            views.append(f"{image},{10000000 + patient},{50000000 + patient},{view},3000")
            paths.append(_path(patient, image))
        report = tmp_path / "reports" / Path(_path(patient, "x")).parent.with_suffix(".txt")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(REPORT.replace("{n}", str(patient)), encoding="utf-8")
    (tmp_path / f"{SPLIT_FILE}.gz").write_bytes(gzip.compress("\n".join(splits).encode()))
    (tmp_path / METADATA_FILE).write_text("\n".join(views), encoding="utf-8")
    write_images(tmp_path, paths, (60, 50))
    return tmp_path


def _module(root: Path, **settings: Any) -> MimicCxrDataModule:
    defaults = {"reports": str(root / "reports"), "image_size": 32, "batch_size": 5, "num_workers": 0}
    return MimicCxrDataModule(str(root), **{**defaults, **settings})


def test_sections_and_sentences() -> None:
    assert sentences_of(REPORT, ["findings"]) == FINDINGS
    assert sentences_of(REPORT, ["impression"]) == IMPRESSION
    assert sentences_of(REPORT, ["impression", "findings"]) == FINDINGS + IMPRESSION
    both = "CHEST\n FINDINGS AND IMPRESSION: Lungs are clear. Unchanged since ___.\nADDENDUM: None of this is taken."
    assert sentences_of(both, ["impression"]) == ["Lungs are clear."]
    assert sentences_of("No title at all. Nothing is taken here.", ["findings"]) == []
    assert sentences_of("", ["findings"]) == []


def test_frontal_images_with_the_splits_of_the_file(root: Path) -> None:
    data = _module(root)
    pairs, bad = data.checked_rows()
    assert not bad
    assert [pair.id for pair in pairs] == [f"f{patient}" for patient in range(16)]
    assert [pair.split for pair in pairs] == ["train"] * 10 + ["val"] * 3 + ["test"] * 3
    assert pairs[3].patient_id == "10000003"
    assert pairs[3].image == str(root / _path(3, "f3"))
    for place, pair in enumerate(pairs):
        assert pair.phrase in [sentence.replace("{n}", str(place)) for sentence in FINDINGS + IMPRESSION]
    assert len(_module(root, views=[]).checked_rows()[0]) == 32
    assert len(_module(root, views=["PA"]).checked_rows()[0]) == 8
    only = _module(root, sections=["impression"]).checked_rows()[0]
    assert {pair.phrase for pair in only} == set(IMPRESSION)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_draws_sentences_by_the_seed(root: Path, workers: int) -> None:
    def epochs(number: int, **settings: Any) -> list[dict[str, str]]:
        data = _module(root, augment=False, **settings)
        data.setup("fit")
        loader, seen = data.train_dataloader(), []
        for epoch in range(number):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            batches = list(loader)
            seen.append({name: text for b in batches for name, text in zip(b["id"], b["phrase"], strict=True)})
        return seen

    drawn = epochs(12, num_workers=workers)
    assert drawn == epochs(12)
    assert drawn[:2] != epochs(2, seed=1)
    assert all(len(epoch) == 10 for epoch in drawn)
    for name in drawn[0]:
        possible = {sentence.replace("{n}", name[1:]) for sentence in FINDINGS + IMPRESSION}
        seen = {epoch[name] for epoch in drawn}
        assert seen <= possible
        assert len(seen) > 1


def test_validation_keeps_its_sentences(root: Path) -> None:
    data = _module(root)
    data.setup("fit")
    phrases = [[phrase for batch in data.val_dataloader() for phrase in batch["phrase"]] for _ in range(2)]
    assert phrases[0] == phrases[1] == [pair.phrase for pair in data.pairs["val"]]


def test_what_is_missing_is_said(root: Path) -> None:
    report = root / "reports" / Path(_path(2, "x")).parent.with_suffix(".txt")
    report.write_text("FINAL REPORT\n COMPARISON: None of the day before.\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 of 16 images have no sentence in findings or impression"):
        assert len(_module(root).checked_rows()[0]) == 15
    report.unlink()
    (root / _path(5, "f5")).unlink()
    bad = _module(root).checked_rows()[1]
    assert [row.line for row in bad] == [6, 12]
    assert "there is no such report below" in bad[0].rule
    assert bad[1].value == _path(5, "f5")
    views = (root / METADATA_FILE).read_text(encoding="utf-8")
    (root / METADATA_FILE).write_text(f"{views}\nf1,1,1,PA,3000,one,more\n", encoding="utf-8")
    named = _module(root).checked_rows()[1]
    assert any(row.file.endswith(METADATA_FILE) and "7 cells and the header 5" in row.rule for row in named)
    with pytest.raises(
        ValueError, match=r"has one of the views \['AP axial'\]\. The views are \['AP', 'LATERAL', 'PA'\]"
    ):
        _module(root, views=["AP axial"]).checked_rows()
    with pytest.raises(ValueError, match=r"sections must be some of findings, impression, got \['history'\]"):
        _module(root, sections=["history"])
    (root / f"{SPLIT_FILE}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=SPLIT_FILE):
        _module(root).checked_rows()


def test_ids_lead_to_no_report_outside(root: Path) -> None:
    (root / "secret").mkdir()
    (root / "secret" / "f0.jpg").write_bytes((root / _path(0, "f0")).read_bytes())
    (root / "secret.txt").write_text(REPORT, encoding="utf-8")
    lines = gzip.decompress((root / f"{SPLIT_FILE}.gz").read_bytes()).decode()
    lines = lines.replace("f0,50000000,10000000", "f0,/../../../../secret,10000000")
    (root / SPLIT_FILE).write_text(lines, encoding="utf-8")
    assert any("leads out of the root" in row.rule for row in _module(root).checked_rows()[1])


def test_check_data_measures_all_sentences(
    root: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    report = root / "reports" / Path(_path(2, "x")).parent.with_suffix(".txt")
    long = " ".join(["lung"] * 30)
    report.write_text(f" FINDINGS: A {long} one. A {long} two. A {long} three.\n", encoding="utf-8")
    main(["check-data", "--data=MimicCxrDataModule", "--data.root=.", "--data.reports=reports", "--model=tiny.json"])
    assert "Phrases longer than the 16 tokens of tiny.json: 3" in capsys.readouterr().out


def test_fit_from_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str) -> None:
    monkeypatch.chdir(root)
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    words = ["fit", "--model.name=tiny.json", "--model.warmup_steps=1", "--data=MimicCxrDataModule"]
    words += ["--data.root=.", "--data.reports=reports", "--data.batch_size=4", "--data.num_workers=0"]
    words += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
    main([*words, "--trainer.logger=false"])
    assert list(Path("run").rglob("*.ckpt"))
