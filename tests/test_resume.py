"""A run that is killed and resumed ends where an uninterrupted one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

TINY = Path(__file__).with_name("tiny.json")


class KillDuringSecondEpoch(Callback):
    """Ends the process without warning, as a power cut does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _fit(folder: Path, images: Path, *more: str) -> int:
    folder.mkdir(exist_ok=True)
    words = [
        "fit",
        "--config",
        "phantom.yaml",
        f"--model.name={TINY}",
        "--model.warmup_steps=1",
        f"--data.root={images}",
    ]
    words += [
        "--data.num_train=24",
        "--data.num_val=12",
        "--data.num_test=2",
        "--data.stored_size=96",
        "--data.batch_size=8",
    ]
    words += ["--trainer.max_epochs=3", "--trainer.deterministic=true", *more]
    # The package that is tested here, wherever another one is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "matex_pl.cli", *words], cwd=folder, env=environment, capture_output=True, check=False
    ).returncode


def _last(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "runs/phantom/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2
    return checkpoint["state_dict"]


@pytest.mark.slow
def test_killed_in_the_second_epoch_and_resumed(tmp_path):
    images, whole, broken = tmp_path / "images", tmp_path / "whole", tmp_path / "broken"
    assert _fit(whole, images) == 0
    assert _fit(broken, images, "--trainer.callbacks+=test_resume.KillDuringSecondEpoch") == -signal.SIGKILL
    assert _fit(broken, images, "--ckpt_path=last") == 0
    expected, found = _last(whole), _last(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
