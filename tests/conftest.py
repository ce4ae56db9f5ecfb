"""A model and a data set so small that a test may train on them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from matex_pl.clip import Clip, load_clip
from matex_pl.data import PhantomDataModule

# The models of the tests are too small for threads to pay, and on busy cores threads wait for each other.
torch.set_num_threads(1)

TINY = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
}


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
