"""What a command imports: nothing that it does not need, so that help, refusals and `matex prior` come at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from matex_pl import ClipModule, attribution, data

HEAVY = ("torch", "lightning", "open_clip", "torchvision", "torchmetrics", "scipy", "pandas", "matplotlib", "ray")
OTHER_COMMANDS = ("ray", "matex_pl.report", "matex_pl.tune", "matex_pl.roar", "matex_pl.benchmark")
# Prints, for each command line, the exit status and the modules that were imported for it.
RUN = """
import json, sys
found, known = [], set()
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        from matex_pl.cli import main
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    found.append((status, sorted(set(sys.modules) - known)))
    known = set(sys.modules)
print()
print(json.dumps(found))
"""


def run(folder: Path, *lines: list[str]) -> list[tuple[int, set[str]]]:
    """Command lines in one new process: of each, the exit status and the modules that those before did not import."""
    command = [sys.executable, "-c", RUN, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return [(status, set(modules)) for status, modules in json.loads(done.stdout.splitlines()[-1])]


LIGHT: list[tuple[int, list[str]]] = [
    (0, ["--help"]),
    (0, ["--version"]),
    (0, ["prior", "--help"]),
    (0, ["explain", "--help"]),
    (0, ["export", "--help"]),
    (0, ["roar", "--help"]),
    (0, ["roar", "collect", "--help"]),
    (0, ["prior", "Left lower lobe consolidation."]),
    (0, ["prior", "Cardiomegaly.", "--out=m.png", "--prior_shape=gaussian", "--laterality=paper"]),
    (2, ["prior", "Cardiomegaly.", "--prior_shape=cone"]),
    (2, []),
    (2, ["train"]),
    (2, ["fit"]),
    (2, ["fit", "--config", "none.yaml"]),
    (2, ["check-data", "-c", "none.yaml"]),
    (2, ["benchmark", "--config", "phantom.yaml", "--out", "x"]),
    (2, ["tune", "--ckpt_path", "x"]),
    (2, ["explain", "image.png"]),
    (2, ["export", "--format=onnx", "--out=o"]),
    (2, ["export", "--format=open_clip", "--out=o"]),
    (2, ["roar", "run", "--config", "none.yaml"]),
    (2, ["roar", "status"]),
]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, set[str]]]:
    """What `run` finds of each line of `LIGHT`."""
    found = run(tmp_path_factory.mktemp("light"), *(words for _, words in LIGHT))
    return {str(words): line for (_, words), line in zip(LIGHT, found, strict=True)}


@pytest.mark.parametrize(
    ("status", "words"), LIGHT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_needs_no_model_imports_no_torch(
    light: dict[str, tuple[int, set[str]]], status: int, words: list[str]
) -> None:
    ended, modules = light[str(words)]
    assert ended == status
    assert not modules & set(HEAVY)


def test_explain_imports_no_trainer_and_no_other_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("tiny.json"), "tiny.json")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(ClipModule("tiny.json"))
    trainer.save_checkpoint("tiny.ckpt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)).save("image.png")
    [(status, modules)] = run(tmp_path, ["explain", "image.png", "Left nodule.", "--ckpt_path", "tiny.ckpt"])
    assert status == 0
    assert Path("panel.png").is_file()
    assert not modules & {*OTHER_COMMANDS, "lightning", "albumentations", "matplotlib"}


@pytest.mark.parametrize("package", [attribution, data])
def test_public_names_are_found_when_they_are_asked_for(package: object) -> None:
    # Those two are aliases.
    names = set(package.__all__) - {"Study", "StudyBatch"}  # type: ignore[attr-defined]
    assert names <= set(dir(package))
    assert all(getattr(package, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
