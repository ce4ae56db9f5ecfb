"""Maps of a split, written from the command line and from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap, Chefer
from matex_pl.callbacks import MapWriter
from matex_pl.cli import main
from matex_pl.data import PhantomDataModule, collate
from matex_pl.evaluation.store import MapStore, pair_keys, weight_hash
from matex_pl.evaluation.tensors import read_head

pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than the model's", "ignore:The training ends after")

TINY = Path(__file__).with_name("tiny.json")


def _trainer(folder: Path, *callbacks: MapWriter, **settings: object) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **settings})


class Counted(CenterMap):
    """Counts the pairs that it explains."""

    def __init__(self) -> None:
        self.pairs = 0

    @property
    def settings(self) -> dict[str, object]:
        return {}

    def attribute(self, clip, images, tokens, phrases, *boxes):
        self.pairs += len(phrases)
        return super().attribute(clip, images, tokens, phrases, *boxes)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_maps_of_a_split_are_those_of_the_method(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, verb: str
) -> None:
    module, root = ClipModule(tiny_json), tmp_path / "maps"
    getattr(_trainer(tmp_path, MapWriter(Chefer(), str(root))), verb)(module, tiny_images)
    module.eval()
    batch = collate(list(tiny_images.dataset("val" if verb == "validate" else "test")))
    images, tokens = module.inputs(batch)
    expected = Chefer().attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"])
    store = MapStore(root, weight_hash(module.clip), Chefer())
    assert len(store) == len(batch["id"])
    found = store.read(pair_keys(batch))
    for name in ("image", "grid", "text", "content", "score"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)


def test_what_is_there_is_not_explained_again(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module, method = ClipModule(tiny_json), Counted()
    counts = []
    for limit in (1, 1.0, 1.0):
        writer = MapWriter(method, str(tmp_path / "maps"))
        _trainer(tmp_path, writer, limit_test_batches=limit).test(module, tiny_images, verbose=False)
        counts.append(method.pairs)
    pairs = len(tiny_images.pairs["test"])
    assert counts == [4, pairs, pairs]
    with torch.no_grad():
        module.clip.logit_scale.add_(0.1)
    _trainer(tmp_path, MapWriter(method, str(tmp_path / "maps"))).test(module, tiny_images, verbose=False)
    assert method.pairs == 2 * pairs


def test_training_writes_no_maps(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    method = Counted()
    run = _trainer(tmp_path, MapWriter(method, str(tmp_path / "maps")), max_steps=1)
    run.fit(ClipModule(tiny_json, warmup_steps=0), tiny_images)
    assert method.pairs == 0
    assert not (tmp_path / "maps").exists()


def test_a_folder_that_takes_no_files_is_refused_first(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    method = Counted()
    for root in (tmp_path / "taken", tmp_path / "taken" / "maps", Path("/proc/maps")):
        with pytest.raises(OSError, match=rf"Nothing can be written in {root}: .*Give another folder"):
            _trainer(tmp_path, MapWriter(method, str(root))).test(ClipModule(tiny_json), tiny_images)
    assert method.pairs == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_line_writes_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, tmp_path)
    words = ["predict", "--config=phantom.yaml", "--model.name=tiny.json", "--data.num_train=8", "--data.num_val=2"]
    words += ["--data.num_test=6", "--data.stored_size=64", "--data.num_workers=0", "--data.root=images"]
    main([*words, "--trainer.callbacks+=MapWriter", "--trainer.callbacks.method=chefer"])
    [folder] = (tmp_path / "maps").iterdir()
    assert folder.name.startswith("Chefer-")
    rows = (tmp_path / "runs/phantom/version_0/predictions.csv").read_text(encoding="utf-8").splitlines()
    main([*words, "--trainer.callbacks+=MapWriter", "--trainer.callbacks.method=chefer"])
    [path] = folder.iterdir()
    assert len(read_head(path)["pairs"]) == len(rows) - 1
