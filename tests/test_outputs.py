"""Outputs never destroy inputs: only an earlier output of the same kind is replaced."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_refusals import listing, refused

from matex_pl.cli import main
from matex_pl.commands.explain import explain_image
from matex_pl.report.gallery import Panel, write_panels

WRITERS = {
    "explain": ["explain", "image.png", "Nodule.", "--ckpt_path=good.ckpt"],
    "prior": ["prior", "Left lower lobe nodule."],
}
FOLDERS = {
    "benchmark": ["report.html", "results.json", "tables.md", "panels/index.json"],
    "tune": ["tuned.yaml", "tune.json", "surface.png", "surface.svg"],
    "roar run": ["plan.json", "pairs.json", "images.npy", "explained.safetensors", "report.html"],
}


@pytest.mark.parametrize("kind", ["table", "checkpoint", "image", "folder", "link", "pipe", "socket", "device"])
@pytest.mark.parametrize("verb", WRITERS)
def test_a_picture_replaces_nothing_else(
    workdir: Path,
    verb: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = workdir / "target.png"
    if kind in ("table", "checkpoint", "image"):
        shutil.copy({"table": "images.csv", "checkpoint": "good.ckpt", "image": "image.png"}[kind], path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("image.png")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(workdir)
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        # A device of that name needs root: a link to one, and the device itself.
        path.symlink_to("/dev/null")
        assert "out must end in .png" in refused(capsys, *WRITERS[verb], "--out=/dev/null")
    before = listing(workdir)
    said = refused(capsys, *WRITERS[verb], f"--out={path}")
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert listing(workdir) == before


@pytest.mark.parametrize("verb", WRITERS)
def test_a_picture_replaces_an_earlier_one(workdir: Path, verb: str) -> None:
    for phrase in ("Nodule.", "Left base nodule."):
        words = [*WRITERS[verb], "--out=new/out.png"]
        words[-3 if verb == "explain" else 1] = phrase
        main(words)
    assert Image.open("new/out.png").info["Software"] == "matex_pl"


def test_a_picture_does_not_replace_its_own_image(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_image("image.png", "Nodule.", ckpt_path="good.ckpt", out="first.png")
    before = listing(workdir)
    said = refused(capsys, "explain", "first.png", "Nodule.", "--ckpt_path=good.ckpt", "--out=./first.png")
    assert "is an input of this command" in said
    assert listing(workdir) == before


# Root, too, cannot write in `/proc`.
@pytest.mark.parametrize("where", ["/proc/none/out.png", "images.csv/out.png"])
@pytest.mark.parametrize("verb", WRITERS)
def test_a_folder_that_cannot_be_written_is_named_before_the_model_loads(
    workdir: Path,
    verb: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded in vain"))
    assert "Nothing can be written in" in refused(capsys, *WRITERS[verb], f"--out={where}")


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in FOLDERS.items() for name in names])
def test_a_folder_with_a_foreign_file_is_refused(
    workdir: Path,
    phantom_words: list[str],
    verb: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = workdir / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    before = listing(workdir)
    start = ["--start=explained"] if verb == "roar run" else []
    config = ["--config", "roar_phantom.yaml", *phantom_words[2:]] if verb == "roar run" else phantom_words
    said = refused(capsys, *verb.split(), *config, "--ckpt_path=good.ckpt", "--out=out", *start)
    assert name in said
    assert listing(workdir) == before


def test_predictions_do_not_replace_a_table(
    workdir: Path,
    phantom_words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = listing(workdir)
    words = ["predict", *phantom_words, "--model.name=tiny.json", "--ckpt_path=good.ckpt"]
    words.append("--trainer.callbacks=matex_pl.callbacks.PredictionWriter")
    said = refused(capsys, *words, "--trainer.callbacks.path=images.csv")
    assert "images.csv" in said
    assert listing(workdir) == before
    for _ in range(2):
        main([*words, "--trainer.callbacks.path=predictions.csv"])
    assert Path("predictions.csv").read_text(encoding="utf-8").startswith("id,phrase,cosine")


def test_a_list_of_bad_rows_does_not_replace_a_table(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check-data", "--config=manifest.yaml", "--data.manifest=images.csv"]
    before = listing(workdir)
    for target in ("images.csv", "good.ckpt", "/dev/null", "plan_old"):
        assert target in refused(capsys, *words, f"--out={target}")
    assert listing(workdir) == before
    for _ in range(2):
        main([*words, "--out=bad.csv"])
    assert Path("bad.csv").read_text(encoding="utf-8").startswith("file,line,value,rule")


def test_a_training_does_not_replace_its_own_start(
    workdir: Path,
    phantom_words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = Path("runs/phantom/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    shutil.copy("good.ckpt", last)
    before = listing(workdir)
    said = refused(capsys, "fit", *phantom_words, "--model.name=tiny.json", f"--model.pretrained={last}")
    assert f"Resume with --ckpt_path {last}" in said
    assert listing(workdir) == before


def test_pictures_of_others_stay_in_the_folder_of_panels(tmp_path: Path) -> None:
    panel = Panel("MATEX", "best", "pair", "A nodule.", b"first")
    write_panels([panel], tmp_path)
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    write_panels([Panel("MATEX", "best", "pair", "A nodule.", b"second")], tmp_path)
    assert len(list(tmp_path.glob("*.jpg"))) == 2
    assert (tmp_path / "mine.jpg").read_bytes() == b"mine"
    assert np.all([path.stat().st_size for path in tmp_path.iterdir()])
