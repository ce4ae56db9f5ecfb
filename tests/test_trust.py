"""What is refused, what stops a run, and what is left when a disk or a process fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from families import bert
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from open_clip.tokenizer import HFTokenizer

from matex_pl import ClipModule
from matex_pl.arguments import argument_names
from matex_pl.attribution import CenterMap
from matex_pl.callbacks import AttributionMaps, PredictionWriter
from matex_pl.callbacks.loggers import is_local
from matex_pl.cli import main
from matex_pl.clip import load_clip, load_tokenizer, load_trained
from matex_pl.data import PhantomDataModule
from matex_pl.explain import explain_batch
from matex_pl.files import check_folder, whole_folder, write_text
from matex_pl.training import load_module
from matex_pl.training.checkpoints import WholeCheckpointIO
from matex_pl.training.description import describe_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are longer than the model's", "ignore:The training ends after", "ignore:Checkpoint directory"
)


def _trainer(path: Path, *callbacks: Callback, **settings: object) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


@pytest.fixture
def checkpoint(tiny_json: str, tmp_path: Path) -> Path:
    """A checkpoint of a module that was not trained."""
    trainer = _trainer(tmp_path)
    trainer.strategy.connect(ClipModule(tiny_json))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    return tmp_path / "plain.ckpt"


def _changed(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint with other content."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path.with_name(name))
    return path.with_name(name)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _uses(path: Path, data: PhantomDataModule, tiny_json: str) -> dict[str, Callable[[], object]]:
    """The ways in which a checkpoint gets in."""
    run = _trainer(path.parent)
    return {
        "explain": lambda: load_trained(str(path)),
        "benchmark": lambda: load_module(str(path)),
        "pretrained": lambda: load_clip(tiny_json, str(path)),
        "fit": lambda: run.fit(ClipModule(tiny_json), data, ckpt_path=str(path)),
        "test": lambda: run.test(ClipModule(tiny_json), data, ckpt_path=str(path)),
    }


WAYS = ("explain", "benchmark", "pretrained", "fit", "test")


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_would_run_code_is_refused_by_its_name(
    tiny_json: str, tiny_images: PhantomDataModule, checkpoint: Path, way: str
) -> None:
    trace = checkpoint.with_name("trace")
    evil = _changed(checkpoint, "evil.ckpt", lambda content: content.update(callbacks=Touch(trace)))
    with pytest.raises(ValueError, match=r"evil\.ckpt is no .*it would run posix\.system"):
        _uses(evil, tiny_images, tiny_json)[way]()
    assert not trace.exists()


def test_a_function_that_a_checkpoint_names_is_not_called(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's loading imports the `_instantiator` of the settings."""
    folder = checkpoint.parent
    (folder / "made_to_run.py").write_text(f"open({str(folder / 'trace')!r}, 'w').close()", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    named = {"_instantiator": "made_to_run.make"}
    evil = _changed(checkpoint, "evil.ckpt", lambda content: content["hyper_parameters"].update(named))
    load_module(str(evil))
    load_trained(str(evil))
    assert not (folder / "trace").exists()


def _with_code(folder: Path, trace: Path) -> None:
    """A tokenizer whose files name a class in a file of Python, which leaves a trace."""
    shutil.copytree(bert()["hf_tokenizer_name"], folder)
    (folder / "tok.py").write_text(f"# {folder}\nopen({str(trace)!r}, 'w').close()\n", encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["tok.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("way", ["config", "folder", "hub", "checkpoint"])
def test_a_config_does_not_decide_whether_code_is_run(
    tiny_json: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A tokenizer of transformers runs code of its folder if `trust_remote_code` is true."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("open_clip.pretrained.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    trace, folder = tmp_path / "trace", tmp_path / "hub" / "models--org--repo" / "snapshots" / "0123"
    _with_code(tmp_path / "first", trace)
    with pytest.raises(AttributeError, match="Words"):
        HFTokenizer(str(tmp_path / "first"), trust_remote_code=True)
    assert trace.exists()
    trace.unlink()
    _with_code(folder, trace)
    (tmp_path / "hub" / "models--org--repo" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--repo" / "refs" / "main").write_text("0123", encoding="utf-8")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    packed = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
    config = json.loads(tiny_json)
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder),
        "tokenizer_kwargs": {"clean": "lower", "trust_remote_code": True},
    }
    torch.save(load_clip(tiny_json).model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")

    def change(content: dict[str, Any]) -> None:
        recorded = json.loads(content["hyper_parameters"]["name"])
        recorded["model_cfg"]["text_cfg"] |= config["model_cfg"]["text_cfg"]
        content["hyper_parameters"]["name"] = json.dumps(recorded)
        content["model_files"] = packed

    ways = {"config": json.dumps(config), "folder": str(folder), "hub": "hf-hub:org/repo"}
    name = ways.get(way) or str(_changed(checkpoint, "evil.ckpt", change))
    for load in (load_clip, load_tokenizer):
        with pytest.raises(ValueError, match=r"has the settings trust_remote_code in text_cfg\.tokenizer_kwargs"):
            load(name)
    if way in ("config", "folder"):
        # Without the setting, transformers would ask at the keyboard.
        del config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["trust_remote_code"]
        (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setattr("builtins.input", lambda _: "y")
        with suppress(ValueError):
            load_clip(name if way == "folder" else json.dumps(config))
    assert not trace.exists()


class Size(str, Enum):
    SMALL = "small"


class Odd(LightningDataModule):
    """A data module that keeps more than its arguments, and arguments of odd types."""

    def __init__(self, root: Path, margin: float, size: Size, spans: Any, patients: Any, model: Any) -> None:
        super().__init__()
        self.root, self.margin, self.size, self.spans = root, margin, size, spans
        self.patients, self.model = patients, model
        self.ids = ["patient 7"]


def test_only_arguments_of_a_data_module_are_recorded(tmp_path: Path) -> None:
    """In types that are read without running code."""
    spans = {"all": (1, Path("a")), 3: None}
    data = Odd(tmp_path, np.float64(0.5), Size.SMALL, spans, {"a", "b"}, torch.nn.Linear(1, 1))
    torch.save(describe_data(data), tmp_path / "record.pt")
    assert torch.load(tmp_path / "record.pt", weights_only=True) == {
        "class": "Odd",
        "settings": {"root": str(tmp_path), "margin": 0.5, "size": "small", "spans": {"all": [1, "a"], "3": None}},
    }


def test_the_record_of_phantoms_has_their_numbers(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    settings = describe_data(tiny_images)["settings"]
    assert settings["num_train"] == 12
    assert settings["root"] == str(tiny_images.root)
    assert settings.keys() == set(argument_names(PhantomDataModule)) - {"geometry"}


def test_the_command_line_refuses_it_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    evil = _changed(checkpoint, "evil.ckpt", lambda content: content.update(callbacks=Touch(Path("trace"))))
    Path("image.png").write_bytes(b"")
    words = ["test", "--config=phantom.yaml", "--data.num_test=2", f"--ckpt_path={evil}"]
    with pytest.raises(SystemExit, match=r"evil\.ckpt is no checkpoint .*it would run posix\.system"):
        main(words)
    assert not Path("trace").exists()
    evil.write_bytes(evil.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"evil\.ckpt is no checkpoint"):
        main(words)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers_are_named(
    tiny_json: str, tiny_images: PhantomDataModule, checkpoint: Path, way: str, bad: float
) -> None:
    spoilt = _changed(checkpoint, "bad.ckpt", lambda content: _weight(content, "ln_final.weight")[3].fill_(bad))
    with pytest.raises(ValueError, match=r"bad\.ckpt.* holds NaN or Inf in .*ln_final\.weight \(1 tensors\)"):
        _uses(spoilt, tiny_images, tiny_json)[way]()


def _weight(content: dict[str, Any], name: str) -> torch.Tensor:
    return content["state_dict"][f"clip.model.{name}"]


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_another_shape_are_named(
    tiny_json: str, tiny_images: PhantomDataModule, checkpoint: Path, way: str
) -> None:
    wide = {"clip.model.ln_final.weight": torch.ones(48)}
    spoilt = _changed(checkpoint, "wide.ckpt", lambda content: content["state_dict"].update(wide))
    with pytest.raises(ValueError, match=r"wide\.ckpt does not fit .*1 key \(ln_final\.weight \(48,\) instead of"):
        _uses(spoilt, tiny_images, tiny_json)[way]()


def _other_tokenizer(content: dict[str, Any]) -> None:
    content["tokenizer"]["name"] = "a/tokenizer"
    content["tokenizer"]["tokens"][2] += 1


@pytest.mark.parametrize("way", WAYS)
def test_another_tokenizer_is_named(tiny_json: str, tiny_images: PhantomDataModule, checkpoint: Path, way: str) -> None:
    spoilt = _changed(checkpoint, "other.ckpt", _other_tokenizer)
    with pytest.raises(
        ValueError, match=r"other\.ckpt.* was trained with the tokenizer a/tokenizer, this model has CLIP's"
    ):
        _uses(spoilt, tiny_images, tiny_json)[way]()


def test_checkpoints_without_a_mark_are_taken(checkpoint: Path) -> None:
    old = _changed(checkpoint, "old.ckpt", lambda content: content.pop("tokenizer"))
    load_module(str(old))
    load_trained(str(old))


class BadImage(ClipModule):
    """Whatever a pair's image is, the model sees no numbers in it."""

    bad = ""

    def inputs(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, tokens = super().inputs(batch)
        images[[name == self.bad for name in batch["id"]]] = torch.nan
        return images, tokens


def _finite(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for name, value in state.items() if name != "clip.mean_image")
    return state


def test_a_loss_that_is_nan_names_the_pairs_and_keeps_the_weights(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    tiny_images.setup("fit")
    batches = [batch["id"] for batch in tiny_images.train_dataloader()]
    module = BadImage(tiny_json, warmup_steps=0, lr=1e-3)
    module.bad = batches[2][1]
    with pytest.raises(FloatingPointError, match="The loss is nan in epoch 0 at step 2") as caught:
        _trainer(tmp_path, limit_val_batches=0).fit(module, tiny_images)
    message = str(caught.value)
    assert f"with the pairs {', '.join(batches[2])}." in message
    assert f"The embeddings of {module.bad} are not finite." in message
    path = tmp_path / "before_nan-epoch=0-step=2.ckpt"
    assert str(path) in message
    state = _finite(path)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    # It can be gone on from, once the image is mended, also with the same module.
    module.bad = ""
    _trainer(tmp_path, limit_val_batches=0, max_steps=1).fit(module, tiny_images)
    run = _trainer(tmp_path, limit_val_batches=0, max_epochs=2)
    run.fit(ClipModule(tiny_json, warmup_steps=0, lr=1e-3), tiny_images, ckpt_path=path, weights_only=True)
    assert run.global_step > 2
    assert float(run.callback_metrics["train/loss"]) < 5


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    class Spoilt(ClipModule):
        def on_after_backward(self) -> None:
            if self.global_step == 1:
                self.clip.model.ln_final.weight.grad[0] = torch.inf

    module = Spoilt(tiny_json, warmup_steps=0, lr=1e-3)
    run = _trainer(tmp_path, limit_val_batches=0, accumulate_grad_batches=2, gradient_clip_val=1.0)
    with pytest.raises(FloatingPointError, match="The norm of the gradient is inf in epoch 0 at step 1") as caught:
        run.fit(module, tiny_images)
    batches = [batch["id"] for batch in tiny_images.train_dataloader()]
    assert f"with the pairs {', '.join(batches[2] + batches[3])}." in str(caught.value)
    _finite(tmp_path / "before_nan-epoch=0-step=1.ckpt")


def test_weights_that_are_spoilt_already_are_not_kept_as_good_ones(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    class Spoilt(ClipModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                torch.nn.init.constant_(self.clip.model.ln_final.weight, torch.nan)

    with pytest.raises(FloatingPointError, match="The weights are not finite either: resume from an earlier"):
        _trainer(tmp_path, limit_val_batches=0).fit(Spoilt(tiny_json, warmup_steps=0), tiny_images)
    assert not list(tmp_path.rglob("before_nan*"))


class Elsewhere(Logger):
    """A logger that takes pictures and sends them away."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, np.ndarray] = {}

    name = version = "elsewhere"

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        self.pictures[key] = images[0]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, *_: Any) -> None: ...


def _logged(
    tiny_json: str, data: PhantomDataModule, folder: Path, show_text: bool | None
) -> tuple[Elsewhere, dict[bool, dict[str, np.ndarray]], ClipModule]:
    """What a remote logger got, and the panels with words and without."""
    torch.manual_seed(0)
    module, remote = ClipModule(tiny_json), Elsewhere()
    callback = AttributionMaps(CenterMap(), num_pairs=2, show_text=show_text)
    _trainer(folder, callback, logger=[TensorBoardLogger(folder), remote]).validate(module, data, verbose=False)
    batch = data.dataset("val").batch(callback.chosen["val"])
    panels = {
        shown: dict(
            zip(
                [f"maps/matex/{name}" for name in batch["id"]],
                explain_batch(module, CenterMap(), batch, "matex | epoch 0", show_text=shown, stacked=True),
                strict=True,
            )
        )
        for shown in (True, False)
    }
    return remote, panels, module


@pytest.mark.parametrize(("show_text", "shown"), [(None, False), (False, False), (True, True)])
def test_words_leave_the_machine_only_when_asked(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, show_text: bool | None, shown: bool
) -> None:
    remote, panels, _ = _logged(tiny_json, tiny_images, tmp_path, show_text)
    assert len(remote.pictures) == 2
    for tag, picture in remote.pictures.items():
        assert np.array_equal(picture, panels[shown][tag])
        assert not np.array_equal(picture, panels[not shown][tag])


def test_a_panel_without_words_is_the_same_for_all_of_their_lengths(
    tiny_json: str, tiny_images: PhantomDataModule
) -> None:
    tiny_images.setup("fit")
    module = ClipModule(tiny_json).eval()
    pictures = []
    for phrase, finding in (("Edema here.", "edema"), ("Nodule gone.", "nodule")):
        batch = {**tiny_images.dataset("val").batch([tiny_images.pairs["val"][0].id])}
        batch |= {"phrase": [phrase], "finding": [finding]}
        maps = explain_batch(module, Unworded(), batch, "", show_text=False)
        pictures.append(maps[0])
    assert len(tokens := {tuple(module.clip.tokenize([p])[0].tolist()) for p in ("Edema here.", "Nodule gone.")}) == 2
    assert tokens
    assert np.array_equal(*pictures)


class Unworded(CenterMap):
    """The same score and relevance whatever the words."""

    def attribute(self, clip: Any, images: Any, tokens: Any, phrases: Any, *boxes: Any) -> Any:
        maps = super().attribute(clip, images, tokens, phrases, *boxes)
        maps.score = torch.zeros(1)
        maps.content = torch.zeros_like(maps.content)
        maps.content[:, 1:4] = True
        return maps


def test_tensorboard_on_an_address_is_elsewhere(tmp_path: Path) -> None:
    assert is_local(TensorBoardLogger(tmp_path))
    assert not is_local(TensorBoardLogger("memory://bucket/logs"))
    assert not is_local(Elsewhere())


def test_no_patient_id_is_logged(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    class Secret(PhantomDataModule):
        def list_pairs(self) -> list[Any]:
            return [type(pair)(**{**vars(pair), "patient_id": "MRN4711"}) for pair in super().list_pairs()]

    sizes = {"num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4, "num_workers": 0}
    data = Secret(root=str(tiny_images.root), **sizes)
    callbacks = [AttributionMaps(CenterMap(), num_pairs=2), PredictionWriter(str(tmp_path / "rows.csv"))]
    run = _trainer(tmp_path, *callbacks, logger=TensorBoardLogger(tmp_path))
    module = ClipModule(tiny_json, warmup_steps=0)
    run.fit(module, data)
    run.predict(module, data, return_predictions=False)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".ckpt", ".csv"} <= {path.suffix for path in files}
    assert not [path for path in files if b"MRN4711" in path.read_bytes()]


# --- disks and processes that fail


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Nothing can be written in .*file/maps: Not a directory\. Give another folder"):
        check_folder(tmp_path / "file" / "maps")
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_predictions_that_cannot_be_written_are_not_made(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    class Never(ClipModule):
        def predict_step(self, *_: Any) -> Any:
            pytest.fail("predicted in vain")

    run = _trainer(tmp_path, PredictionWriter(str(tmp_path / "file" / "rows.csv")))
    with pytest.raises(OSError, match=r"Nothing can be written in .*file"):
        run.predict(Never(tiny_json), tiny_images)


def test_what_a_killed_process_left_half_written_goes_after_an_hour(checkpoint: Path) -> None:
    old, new, other = (checkpoint.with_name(name) for name in (".a.ckpt.1.part", ".a.ckpt.2.part", "a.part"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    WholeCheckpointIO().save_checkpoint({"a": 1}, checkpoint.with_name("a.ckpt"))
    assert not old.exists()
    assert new.exists()
    assert other.exists()
    assert torch.load(checkpoint.with_name("a.ckpt"), weights_only=True) == {"a": 1}


def test_an_interruption_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames, and if nothing can be renamed back."""
    path, abandoned, others = (tmp_path / name for name in ("out", ".out.1.part", ".other.1.part"))
    for folder in (path, abandoned, others):
        folder.mkdir()
        (folder / "weights").write_text("old", encoding="utf-8")
    for folder in (abandoned, others):
        os.utime(folder, (time.time() - 4000, time.time() - 4000))
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    def broken(self: Path, target: Path) -> Path:
        if self != path:
            raise OSError(errno.EIO, "Broken disk", str(self))
        return rename(self, target)

    def write() -> None:
        with whole_folder(path) as folder:
            (folder / "weights").write_text("new", encoding="utf-8")

    for replace, error in ((interrupted, KeyboardInterrupt), (broken, OSError)):
        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(error):
            write()
        assert "old" in [(found / "weights").read_text() for found in tmp_path.glob("*out*")]
        assert path.exists() == (replace is interrupted)
        monkeypatch.setattr(Path, "replace", rename)
    (old,) = tmp_path.glob(".out.*.old")
    old.replace(path)
    write()
    assert (path / "weights").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [others, path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old")
    for method in ("write_text", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, _no_room)
            with pytest.raises(OSError, match="No space left"):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def _no_room(self: Path, *_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_log_folder_that_is_a_file_stops_before_training(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    steps = []

    class Steps(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append(1)

    run = _trainer(tmp_path, Steps(), logger=TensorBoardLogger(tmp_path / "runs" / "logs"))
    with pytest.raises(OSError, match="runs"):
        run.fit(ClipModule(tiny_json), tiny_images)
    assert not steps


def test_a_checkpoint_folder_that_takes_no_files_stops_before_training(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    class Never(ClipModule):
        def training_step(self, *_: Any) -> Any:
            pytest.fail("trained in vain")

    for folder, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "kept", "Not a directory")):
        last = ModelCheckpoint(folder, filename="last")
        run = _trainer(tmp_path, last, logger=TensorBoardLogger(tmp_path / "logs"))
        with pytest.raises(OSError, match=rf"Nothing can be written in {folder}: {reason}\. Give another folder"):
            run.fit(Never(tiny_json), tiny_images)


def test_a_second_run_in_one_log_folder_keeps_the_first(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    for count in (1, 2):
        logger = TensorBoardLogger(tmp_path, name="run")
        _trainer(tmp_path, logger=logger, max_steps=1, limit_val_batches=0).fit(ClipModule(tiny_json), tiny_images)
        assert len(list((tmp_path / "run").iterdir())) == count
        assert len(list(tmp_path.rglob("*.ckpt"))) == count


class FailSecondEpoch(Callback):
    """Fills the disk, or kills the process in the midst of the checkpoint of the second epoch.

    With the system's temporary folder on another disk, from which files are copied.
    """

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and self.how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        elif trainer.current_epoch == 1:
            os.rename = _other_disk
            shutil.copyfile = _half
            torch.save, self.save = self._save, torch.save

    def _save(self, content: Any, file: Any) -> None:
        self.save(content, file)
        if isinstance(file, Path):
            _half(file, file)


def _other_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def _half(source: Any, target: Any, **_: Any) -> None:
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_checkpoint_that_is_not_written_leaves_the_one_before(tmp_path: Path, image_root: Path, how: str) -> None:
    code = f"""
import warnings; warnings.simplefilter("ignore")
from lightning.pytorch.callbacks import ModelCheckpoint
from test_trust import FailSecondEpoch, _trainer
from conftest import TINY
from pathlib import Path
import json
from matex_pl import ClipModule
from matex_pl.data import PhantomDataModule
data = PhantomDataModule(root={str(image_root)!r}, num_train=12, num_val=6, num_test=6, stored_size=64, num_workers=0)
last = ModelCheckpoint({str(tmp_path)!r}, filename="last", enable_version_counter=False)
run = _trainer(Path({str(tmp_path)!r}), FailSecondEpoch({how!r}), last, max_epochs=3, limit_val_batches=0)
run.fit(ClipModule(json.dumps(TINY), warmup_steps=0), data)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (
        (done.returncode == -signal.SIGKILL) if how == "kill" else ("last.ckpt could not be written" in done.stderr)
    ), done.stderr
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert load_module(str(tmp_path / "last.ckpt")).clip.mean_image.isfinite().all()


@pytest.mark.parametrize("way", ["explain", "fit", "test"])
def test_half_a_checkpoint_is_none(tiny_json: str, tiny_images: PhantomDataModule, checkpoint: Path, way: str) -> None:
    content = checkpoint.read_bytes()
    for size in (0, 5000, len(content) - 100):
        checkpoint.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"plain\.ckpt is no checkpoint"):
            _uses(checkpoint, tiny_images, tiny_json)[way]()


def test_a_checkpoint_that_is_not_there_is_named(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        _uses(tmp_path / "none.ckpt", tiny_images, tiny_json)["fit"]()
