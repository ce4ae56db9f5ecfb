"""A model and a data set so small that a test may train on them."""

from __future__ import annotations

import gc
import gzip
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from matex_pl import ClipModule
from matex_pl.clip import Clip, load_clip
from matex_pl.data import PhantomDataModule

# The models of the tests are too small for threads to pay, and on busy cores threads wait for each other. The
# second line is for the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TINY = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, as far as marks tell, so that two workers end at about one time."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += 60 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Spare the garbage collector the hundreds of thousands of objects that imports have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's messages reach `caplog`, also after a command line has run in this process."""
    monkeypatch.setattr(logging.getLogger("matex_pl"), "propagate", True)
    monkeypatch.setattr("matex_pl.cli.show_messages", lambda: None)


@pytest.fixture
def tiny_json() -> str:
    """The text of a model config: 4 x 4 patches, 16 tokens."""
    return json.dumps(TINY)


@pytest.fixture
def tiny_clip(tiny_json: str) -> Clip:
    return load_clip(tiny_json)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def tiny_images(image_root: Path) -> PhantomDataModule:
    """Twelve images for training, six for validation and for test, in 32 x 32 pixels."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return PhantomDataModule(
        root=str(image_root),
        num_train=12,
        num_val=6,
        num_test=6,
        stored_size=64,
        image_size=32,
        batch_size=4,
        num_workers=0,
    )


TABLE = "image,phrase\nimage.png,A patient of ours.\n"


@pytest.fixture(scope="session")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a checkpoint, an image, a table, and a bad file of each sort."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(Path(__file__).with_name("tiny.json"), folder)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(ClipModule(str(folder / "tiny.json")))
    trainer.save_checkpoint(folder / "good.ckpt")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    (folder / "images.csv").write_text(TABLE, encoding="utf-8")
    for name in ("empty.ckpt", "empty.png", "empty.csv", "empty.yaml"):
        (folder / name).touch()
    (folder / "cut.ckpt").write_bytes((folder / "good.ckpt").read_bytes()[:5000])
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:2000])
    (folder / "cut.csv.gz").write_bytes(gzip.compress(TABLE.encode())[:-9])
    (folder / "list.json").write_text("[1]", encoding="utf-8")
    odd = json.loads((folder / "tiny.json").read_text(encoding="utf-8"))
    odd["vision_cfg"]["width"] = 33
    (folder / "odd_width.json").write_text(json.dumps(odd), encoding="utf-8")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, folder / "other.ckpt")
    (folder / "cut.yaml").write_text("upper: {left: [0.5, 0", encoding="utf-8")
    for name, text in (("empty", ""), ("cut", '{"format": 2, "proto'), ("other", "[]"), ("old", '{"format": 1}')):
        (folder / f"plan_{name}").mkdir()
        (folder / f"plan_{name}" / "plan.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def workdir(bad_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the inputs to run in."""
    shutil.copytree(bad_inputs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def phantom_words(image_root: Path) -> list[str]:
    """Words for a small data set and a small model."""
    sizes = {"root": image_root, "num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4}
    words = [f"--data.{name}={value}" for name, value in (sizes | {"num_workers": 0}).items()]
    return ["--config", "phantom.yaml", *words]
