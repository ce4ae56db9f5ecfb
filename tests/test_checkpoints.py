"""A checkpoint brings its own meaning, resumes within an epoch, and gets on with Lightning's own callbacks."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from families import CONFIGS, family
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.cli import main
from matex_pl.clip import Clip, load_clip, load_tokenizer, load_trained
from matex_pl.clip.weights import plain_name
from matex_pl.data import PhantomDataModule, collate
from matex_pl.files import CONFIG_FOLDER, shipped_configs
from matex_pl.roar.finetune import read_module, write_module
from matex_pl.training import load_module

pytestmark = [
    pytest.mark.usefixtures("messages"),
    pytest.mark.filterwarnings(
        "ignore:.*are longer than the model's",
        "ignore:The training ends after",
        "ignore:Checkpoint directory",
        "ignore:The number of training batches",
    ),
]


def _trainer(path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


def _saved(module: ClipModule, path: Path) -> Path:
    """A checkpoint of a module that was not trained."""
    trainer = _trainer(path.parent, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def _changed(text: str, changes: dict[str, Any]) -> str:
    """A config with other settings, by dotted names."""
    config = json.loads(text)
    for name, value in changes.items():
        *parts, last = name.split(".")
        place = config["model_cfg"] if parts != ["preprocess_cfg"] else config
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return json.dumps(config)


def _similarity(clip: Clip) -> torch.Tensor:
    images = torch.rand(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return clip.eval().similarity(clip.normalize(images), clip.tokenize(["left base", "mass", "edema"]))


@pytest.fixture
def quick_json(tiny_json: str) -> str:
    """Another activation, mean, head width and context length than open_clip's defaults."""
    settings = {"quick_gelu": True, "preprocess_cfg.mean": [0.4, 0.4, 0.4], "preprocess_cfg.std": [0.2, 0.2, 0.2]}
    return _changed(tiny_json, settings)


# --- the record of a checkpoint


def test_a_checkpoint_as_pretrained_decides_what_the_name_leaves_open(
    quick_json: str, tiny_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ClipModule(quick_json)
    path = str(_saved(module, tmp_path / "last.ckpt"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", json.loads(tiny_json)["model_cfg"])
    for clip in (load_clip("ViT-B-32", path), load_clip(tiny_json, path), load_clip(path), load_trained(path)):
        assert clip.config == module.clip.config
        assert clip.config["model_cfg"]["quick_gelu"] is True
        torch.testing.assert_close(_similarity(clip), _similarity(module.clip))
    assert ClipModule(path).hparams["name"] == module.hparams["name"]


CONTRADICTIONS = {
    "quick_gelu": False,
    "vision_cfg.head_width": 8,
    "vision_cfg.pool_type": "avg",
    "vision_cfg.image_size": 64,
    "text_cfg.heads": 4,
    "text_cfg.no_causal_mask": True,
    "text_cfg.context_length": 24,
    "preprocess_cfg.mean": [0.5, 0.5, 0.5],
    "preprocess_cfg.std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_a_checkpoint_are_refused_by_name(
    quick_json: str, tiny_images: PhantomDataModule, tmp_path: Path, name: str
) -> None:
    """As `model.pretrained`, and as `--ckpt_path` of a training and of a test."""
    path = str(_saved(ClipModule(quick_json), tmp_path / "last.ckpt"))
    other = _changed(quick_json, {name: CONTRADICTIONS[name]})
    key = name.removeprefix("preprocess_cfg.")
    with pytest.raises(ValueError, match=rf"last\.ckpt contradicts the model .*: {key} is .* in the checkpoint and"):
        load_clip(other, path)
    tiny_images.image_size = None
    run, module = _trainer(tmp_path, limit_val_batches=0), ClipModule(other)
    for verb in (run.fit, run.test):
        with pytest.raises(ValueError, match=rf"last\.ckpt was trained with another model: {key} is .* here\. Leave"):
            verb(module, tiny_images, ckpt_path=path)


def test_an_activation_that_a_config_leaves_open_differs_too(
    quick_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    path = _saved(ClipModule(quick_json), tmp_path / "last.ckpt")
    open_config = json.loads(quick_json)
    del open_config["model_cfg"]["quick_gelu"]
    with pytest.raises(ValueError, match="quick_gelu is True in the checkpoint and False here"):
        _trainer(tmp_path).test(ClipModule(json.dumps(open_config)), tiny_images, ckpt_path=path)


def test_size_and_patch_dropout_may_be_given_anew(quick_json: str, tmp_path: Path) -> None:
    """The size in so many words, and the regularization of the training."""
    path = str(_saved(ClipModule(quick_json), tmp_path / "last.ckpt"))
    assert load_clip(quick_json, path, 64).image_size == (64, 64)
    dropped = load_clip(_changed(quick_json, {"vision_cfg.patch_dropout": 0.25}), path)
    assert dropped.config["model_cfg"]["vision_cfg"]["patch_dropout"] == 0.25
    torch.testing.assert_close(_similarity(dropped), _similarity(load_clip(path)))


def test_a_file_that_is_no_checkpoint_gives_no_model(tiny_clip: Clip, tmp_path: Path) -> None:
    torch.save(tiny_clip.model.state_dict(), tmp_path / "weights.pt")
    for load in (load_clip, load_trained, load_module):
        with pytest.raises(ValueError, match=r"weights\.pt is no checkpoint of `matex fit`: it does not record"):
            load(str(tmp_path / "weights.pt"))


# --- weights from elsewhere


def test_what_is_assumed_of_foreign_weights_is_said_in_one_line(
    tiny_json: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(load_clip(tiny_json).model.state_dict(), path)
    with caplog.at_level(logging.INFO, "matex_pl"):
        load_clip(tiny_json, str(path))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{path} does not record the meaning of its weights. Assumed, as of '")
    assert "activation GELU, mean (0.4815, 0.4578, 0.4082), std (0.2686, 0.2613, 0.2758), 16 tokens" in message
    caplog.clear()
    ours = _saved(ClipModule(tiny_json), tmp_path / "last.ckpt")
    caplog.clear()
    with caplog.at_level(logging.INFO, "matex_pl"):
        load_clip(tiny_json)
        load_clip(str(ours))
    assert not caplog.records


@pytest.fixture
def openai(tiny_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights like OpenAI's, by open_clip's own conversion; the tag `openai` of two small architectures has them."""
    model = load_clip(tiny_json).model
    torch.nn.init.constant_(model.logit_scale, 4.6052)
    open_clip.model.convert_weights_to_lp(model, torch.float16)
    small = json.loads(tiny_json)["model_cfg"]
    state = {key: value.float() for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "openai.pt")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", small | {"quick_gelu": True})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "openai.pt"))
    return state


def test_openai_weights_from_a_file_need_quick_gelu(
    openai: dict[str, torch.Tensor], tiny_json: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "openai.pt")
    tagged = load_clip("ViT-B-32", "openai")
    with pytest.raises(ValueError, match=r"openai\.pt holds OpenAI's weights, .*Give the model ViT-B-32-quickgelu\."):
        load_clip("ViT-B-32", path)
    with pytest.raises(ValueError, match=r'Add "quick_gelu": true to the config'):
        load_clip(tiny_json, path)
    # The advice gives the function of the tag.
    torch.testing.assert_close(_similarity(load_clip("ViT-B-32-quickgelu", path)), _similarity(tagged))
    # A config that says so itself is followed.
    plain = load_clip(_changed(tiny_json, {"quick_gelu": False}), path)
    assert not torch.equal(_similarity(plain), _similarity(tagged))


def test_openai_weights_are_known_by_their_entries(
    openai: dict[str, torch.Tensor], tiny_clip: Clip, tmp_path: Path
) -> None:
    """As `torch.jit.load(...).state_dict()` gives them; weights of another training are taken."""
    entries = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(tiny_clip.model.state_dict() | entries, tmp_path / "archive.pt")
    with pytest.raises(ValueError, match=r"archive\.pt holds OpenAI's weights"):
        load_clip("ViT-B-32", str(tmp_path / "archive.pt"))
    assert load_clip("ViT-B-32-quickgelu", str(tmp_path / "archive.pt")).config["model_cfg"]["quick_gelu"]
    trained = {key: value + 1e-4 * torch.rand_like(value) for key, value in openai.items()}
    for state in (trained, {key: value.half() for key, value in openai.items()}):
        torch.save(state, tmp_path / "other.pt")
        assert "quick_gelu" not in load_clip("ViT-B-32", str(tmp_path / "other.pt")).config["model_cfg"]


def test_a_file_means_what_the_only_tag_of_its_architecture_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP by tag and by file, as siglip.yaml advises."""
    small, weights = {"embed_dim": 32} | CONFIGS["siglip"](), tmp_path / "webli.pt"
    torch.save(load_clip(json.dumps(small)).model.state_dict(), weights)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-SigLIP", small)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    tagged, by_file = load_clip("ViT-B-16-SigLIP", "webli"), load_clip("ViT-B-16-SigLIP", str(weights))
    assert tagged.mean.flatten().tolist() == by_file.mean.flatten().tolist() == [0.5] * 3
    assert tagged.std.flatten().tolist() == by_file.std.flatten().tolist() == [0.5] * 3
    torch.testing.assert_close(_similarity(by_file), _similarity(tagged))


@pytest.mark.parametrize("config", shipped_configs())
def test_shipped_configs_advise_the_right_architecture_for_a_file(config: str) -> None:
    text = (CONFIG_FOLDER / config).read_text(encoding="utf-8")
    if "pretrained: openai" in text and "Without a connection" in text:
        assert re.search(r"--model\.name ViT-B-32-quickgelu --model\.pretrained \S+", text)


def test_positions_of_words_are_never_interpolated(tiny_json: str, tmp_path: Path) -> None:
    torch.save(load_clip(tiny_json).model.state_dict(), tmp_path / "weights.pt")
    for length in (8, 24):
        with pytest.raises(ValueError, match=rf"positions of 16 tokens of text, the model has {length}\. .*to 16\."):
            load_clip(_changed(tiny_json, {"text_cfg.context_length": length}), str(tmp_path / "weights.pt"))


# --- names of weights


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_wrapped_weights_are_read_by_their_plain_names(tiny_json: str, tmp_path: Path, prefix: str) -> None:
    first = load_clip(tiny_json)
    torch.save({prefix + key: value for key, value in first.model.state_dict().items()}, tmp_path / "weights.pt")
    torch.testing.assert_close(_similarity(load_clip(tiny_json, str(tmp_path / "weights.pt"))), _similarity(first))


def test_plain_names() -> None:
    for key in ("visual._orig_mod.proj", "module.visual.proj", "base_model.model.visual.proj", "visual.proj"):
        assert plain_name(key) == "visual.proj"
        assert plain_name(f"_orig_mod.clip.model.{key}") == "clip.model.visual.proj"
    assert plain_name("visual.module.weight") == "visual.module.weight"


def test_a_compiled_tower_is_saved_under_its_plain_names(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    module = ClipModule(tiny_json)
    module.clip.model.visual = torch.compile(module.clip.model.visual, backend="eager")
    path = _saved(module, tmp_path / "compiled.ckpt")
    assert not [key for key in torch.load(path, weights_only=True)["state_dict"] if "_orig_mod" in key]
    torch.testing.assert_close(_similarity(load_trained(str(path))), _similarity(module.clip))
    torch.testing.assert_close(_similarity(load_module(str(path)).clip), _similarity(module.clip))
    other = ClipModule(tiny_json)
    other.clip.model.visual = torch.compile(other.clip.model.visual, backend="eager")
    _trainer(tmp_path).validate(other, tiny_images, ckpt_path=path, verbose=False)
    assert torch.equal(other.clip.model.visual.proj, module.clip.model.visual.proj)


def test_adapters_are_refused_by_name(tiny_json: str, tmp_path: Path) -> None:
    state = {f"base_model.model.{key}": value for key, value in load_clip(tiny_json).model.state_dict().items()}
    for layer in range(6):
        state[f"base_model.model.transformer.resblocks.{layer}.mlp.c_fc.lora_A.default.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt holds adapters of PEFT in 6 keys \(.*, \.\.\.\)\. Merge them"):
        load_clip(tiny_json, str(tmp_path / "lora.pt"))


@pytest.mark.parametrize("way", ["pretrained", "explain", "benchmark", "fit"])
def test_missing_extra_and_other_keys_are_counted(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, way: str
) -> None:
    path = _saved(ClipModule(tiny_json), tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    dropped = [key for key in state if "resblocks.0" in key][:7]
    for key in dropped:
        del state[key]
    state["clip.model.visual.more"] = torch.zeros(1)
    torch.save(content, path)
    uses: dict[str, Callable[[], object]] = {
        "pretrained": lambda: load_clip(tiny_json, str(path)),
        "explain": lambda: load_trained(str(path)),
        "benchmark": lambda: load_module(str(path)),
        "fit": lambda: _trainer(tmp_path).fit(ClipModule(tiny_json), tiny_images, ckpt_path=path),
    }
    with pytest.raises(ValueError, match=r"last\.ckpt does not fit") as caught:
        uses[way]()
    message = str(caught.value)
    assert "missing: 7 keys (" in message
    names = [key.removeprefix("clip.model.") for key in dropped]
    assert sum(name in message for name in names) == 5
    assert "extra: 1 key (visual.more)" in message
    assert "\n" not in message


def test_a_folder_whose_weights_do_not_fit_counts_the_keys(tiny_clip: Clip, tmp_path: Path) -> None:
    state = {key: value for key, value in tiny_clip.model.state_dict().items() if "resblocks.0" not in key}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_clip.config), encoding="utf-8")
    count = len(tiny_clip.model.state_dict()) - len(state)
    expected = rf"holds no weights that fit .*missing: {count} keys \((.*, ){{5}}\.\.\.\)"
    with pytest.raises(ValueError, match=expected) as caught:
        load_clip(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


# --- a file and `last` take one path


def _phantom(root: Path, *more: str) -> list[str]:
    sizes = {"num_train": 24, "num_val": 12, "num_test": 12, "stored_size": 96, "batch_size": 8, "num_workers": 0}
    words = ["--config", "phantom.yaml", "--model.name=tiny.json", "--model.warmup_steps=1", f"--data.root={root}"]
    words += [f"--data.{name}={value}" for name, value in sizes.items()]
    return [*words, "--trainer.max_epochs=1", "--trainer.limit_val_batches=1", *more]


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """A folder in which `matex fit` has run."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(Path(__file__).with_name("tiny.json"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *_phantom(image_root)])
    return folder


@pytest.mark.parametrize("ckpt_path", ["last", "runs/phantom/checkpoints/last.ckpt"])
def test_options_count_for_a_file_as_for_last(
    phantom_run: Path,
    image_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ckpt_path: str,
) -> None:
    monkeypatch.chdir(shutil.copytree(phantom_run, tmp_path / "here"))
    prompts = []
    monkeypatch.setattr(
        ClipModule, "on_test_epoch_start", lambda module: prompts.append(module.hparams["prompt"]), raising=True
    )
    monkeypatch.setattr(ClipModule, "test_step", lambda module, batch, batch_idx: {})
    monkeypatch.setattr(ClipModule, "on_test_epoch_end", lambda module: None)
    words = ["--model.prompt=An image of {finding}.", "--trainer.limit_test_batches=1", "--trainer.callbacks=null"]
    last = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "runs/phantom/checkpoints", "filename": "last"}}
    words[-1] = f"--trainer.callbacks={json.dumps([last])}"
    with caplog.at_level(logging.INFO, "matex_pl"):
        main(["test", *_phantom(image_root), *words, f"--ckpt_path={ckpt_path}"])
    assert prompts == ["An image of {finding}."]
    assert "prompt is 'There is {finding}.' in the checkpoint and 'An image of {finding}.' here" in caplog.text
    with pytest.raises((SystemExit, ValueError)):
        main(["fit", *_phantom(image_root), "--model.lr=0.5", words[-1], f"--ckpt_path={ckpt_path}"])


@pytest.mark.parametrize("setting", [{"lr": 2e-3}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.3}, {"freeze": "text"}])
def test_a_resumed_training_refuses_another_optimizer(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, setting: dict[str, Any]
) -> None:
    path = _saved(ClipModule(tiny_json, lr=1e-3), tmp_path / "last.ckpt")
    module = ClipModule(tiny_json, **{"lr": 1e-3} | setting)
    with pytest.raises(ValueError, match=rf"last\.ckpt contradicts the settings: {next(iter(setting))} is .* and .*"):
        _trainer(tmp_path).fit(module, tiny_images, ckpt_path=path)
    _trainer(tmp_path).validate(module, tiny_images, ckpt_path=path, verbose=False)


def test_weights_alone_do_not_resume(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    run = _trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(ClipModule(tiny_json), tiny_images)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"weights\.ckpt holds weights only, and no training resumes from it"):
        run.fit(ClipModule(tiny_json), tiny_images, ckpt_path=tmp_path / "weights.ckpt")
    assert load_clip(str(tmp_path / "weights.ckpt")).image_size == (32, 32)


# --- state of callbacks


def _fitted(folder: Path, data: PhantomDataModule, text: str, callback: Callback) -> Path:
    run = _trainer(folder, callback, logger=TensorBoardLogger(folder))
    run.fit(ClipModule(text, warmup_steps=0), data)
    run.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def _others(image_root: Path, **sizes: int) -> PhantomDataModule:
    sizes = {"num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4} | sizes
    return PhantomDataModule(root=str(image_root), num_workers=0, image_size=32, **sizes)


class Renamed(PhantomDataModule):
    """The same images under other ids, in a table that has changed."""

    def list_pairs(self) -> list[Any]:
        pairs = super().list_pairs()
        return [type(pair)(**{**vars(pair), "id": f"new {pair.id}"}) for pair in pairs]


class Reworded(PhantomDataModule):
    """Other phrases under the same ids."""

    def list_pairs(self) -> list[Any]:
        pairs = super().list_pairs()
        return [type(pair)(**{**vars(pair), "phrase": "No effusion."}) for pair in pairs]


@pytest.mark.parametrize("kind", [Renamed, Reworded])
def test_pairs_of_other_data_are_chosen_again(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type
) -> None:
    path = _fitted(tmp_path / "a", tiny_images, tiny_json, AttributionMaps(CenterMap(), num_pairs=3))
    data = kind(
        root=str(tiny_images.root), num_train=8, num_val=6, num_test=6, stored_size=64, batch_size=4, num_workers=0
    )
    again = AttributionMaps(CenterMap(), num_pairs=3)
    run = _trainer(tmp_path / "b", again, logger=TensorBoardLogger(tmp_path / "b"), max_epochs=2)
    with caplog.at_level(logging.INFO, "matex_pl"):
        run.fit(ClipModule(tiny_json, warmup_steps=0), data, ckpt_path=path)
    told = [record.message for record in caplog.records if "AttributionMaps 'matex'" in record.message]
    assert len(told) == 1
    assert ("3 of the 3 pairs in the checkpoint are not in the data" if kind is Renamed else "content") in told[0]
    assert set(again.chosen["val"]) <= {pair.id for pair in data.pairs["val"]}
    # The epoch of the checkpoint had ended: the next one reads the new data.
    steps = [len(module.pairs["train"]) // 4 for module in (tiny_images, data)]
    assert steps[0] > steps[1]
    assert (run.current_epoch, run.global_step) == (2, sum(steps))


def test_given_pairs_count_in_a_resumed_run(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    path = _fitted(tmp_path / "a", tiny_images, tiny_json, AttributionMaps(CenterMap(), num_pairs=3))
    wanted = [tiny_images.pairs["val"][-1].id]
    again = AttributionMaps(CenterMap(), pair_ids=wanted)
    run = _trainer(tmp_path / "b", again, logger=TensorBoardLogger(tmp_path / "b"), max_epochs=2)
    run.fit(ClipModule(tiny_json, warmup_steps=0), tiny_images, ckpt_path=path)
    assert again.chosen["val"] == wanted


# --- within an epoch


class Seen(ClipModule):
    """Notes the pairs of each training step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["id"])
        return super().training_step(batch, batch_idx)


def _dropping(text: str) -> str:
    return _changed(text, {"vision_cfg.patch_dropout": 0.5})


@pytest.mark.parametrize(("workers", "accumulated", "epoch"), [(0, 1, 0), (1, 1, 1), (0, 2, 0)])
def test_a_run_resumed_within_an_epoch_ends_as_an_uninterrupted_one(
    tiny_json: str, image_root: Path, tmp_path: Path, workers: int, accumulated: int, epoch: int
) -> None:
    """With the pairs not seen, drawn and dropped patches and the scores; the checkpoint is of step 1 of an epoch."""
    data = _others(image_root, num_train=20)
    data.num_workers = workers
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulated, "limit_val_batches": 1}
    data.setup("fit")
    batches = len(data.pairs["train"]) // 4
    steps = -(-batches // accumulated)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    torch.manual_seed(0)
    whole, resumed = (Seen(_dropping(tiny_json), lr=1e-3, warmup_steps=1) for _ in range(2))
    _trainer(tmp_path, save, **settings).fit(whole, data)
    path = tmp_path / f"step={epoch * steps + 2}.ckpt"
    _trainer(tmp_path, enable_checkpointing=False, **settings).fit(resumed, data, ckpt_path=path)
    assert 2 * accumulated < batches
    assert resumed.seen == whole.seen[batches * epoch + 2 * accumulated :]
    state, others = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[name], others[name]) for name in state)


def test_batches_after_the_last_step_of_the_optimizer_are_trained_on_again(
    tiny_json: str, image_root: Path, tmp_path: Path
) -> None:
    """A run that stops between two steps has lost the gradients since."""
    data = _others(image_root, num_train=24)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    torch.manual_seed(0)
    whole, resumed = (Seen(_dropping(tiny_json), lr=1e-3, warmup_steps=1) for _ in range(2))
    settings = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0, "enable_checkpointing": False}
    _trainer(tmp_path, Stop(), **settings).fit(whole, data)
    run = _trainer(tmp_path, **settings)
    run.fit(resumed, data, ckpt_path=tmp_path / "between.ckpt")
    assert resumed.seen == whole.seen[2:]
    assert run.global_step == -(-len(whole.seen) // 2)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"seed": 1}, {"num_train": 24}])
def test_other_batches_within_an_epoch_are_refused(
    tiny_json: str, image_root: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = _trainer(tmp_path, save, limit_val_batches=0)
    run.fit(ClipModule(tiny_json, warmup_steps=0), _others(image_root, num_train=20))
    name = {"batch_size": "pairs_per_step", "seed": "seed", "num_train": "pairs"}[next(iter(change))]
    run = _trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match=rf"middle of an epoch, after 2 batches, and the data changed since: .*{name}"):
        run.fit(
            ClipModule(tiny_json, warmup_steps=0),
            _others(image_root, **{"num_train": 20} | change),
            ckpt_path=tmp_path / "step=2.ckpt",
        )


def test_a_loader_without_a_state_is_refused_within_an_epoch(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    tiny_images.setup("fit")
    loader = DataLoader(tiny_images.dataset("train"), batch_size=4, collate_fn=collate)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _trainer(tmp_path, save, max_epochs=2).fit(ClipModule(tiny_json, warmup_steps=0), loader)
    run = _trainer(tmp_path, max_epochs=2)
    with pytest.raises(
        ValueError, match=r"step=2\.ckpt is from the middle of an epoch, after 2 batches, and its loader"
    ):
        run.fit(ClipModule(tiny_json, warmup_steps=0), loader, ckpt_path=tmp_path / "step=2.ckpt")


# --- Lightning's own callbacks


class Weights(AttributionMetrics):
    """Notes the weights that the scalars are computed with."""

    def __init__(self) -> None:
        super().__init__(CenterMap(), num_batches=1)
        self.sums: list[float] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **settings: Any) -> None:
        # Outputs, the batch and its index.
        if not trainer.sanity_checking and args[2] == 0:
            self.sums.append(float(pl_module.clip.model.visual.proj.detach().sum()))
        super().on_validation_batch_end(trainer, pl_module, *args, **settings)


class Noting(CenterMap):
    """Notes the weights that the panels are computed with."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def attribute(self, clip: Any, *args: Any, **settings: Any) -> Any:
        self.sums.append(float(clip.model.visual.proj.detach().sum()))
        return super().attribute(clip, *args, **settings)


class Unfreeze(BaseFinetuning):
    """Trains the image tower from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.clip.model.visual)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.clip.model.visual, optimizer)


STOCK: dict[str, Callable[[], Callback]] = {
    "average": lambda: WeightAveraging(use_buffers=False),
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
    "unfreeze": Unfreeze,
    "rate": lambda: LearningRateFinder(min_lr=1e-5, num_training_steps=30, early_stop_threshold=None),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:SWA is currently", "ignore:.*lr_find")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("kind", STOCK)
def test_stock_callbacks_work_before_and_after_ours(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, kind: str, is_first: bool
) -> None:
    metrics, maps, stock = Weights(), AttributionMaps(Noting(), num_pairs=1), STOCK[kind]()
    order = [stock, metrics, maps] if is_first else [metrics, maps, stock]
    module = ClipModule(tiny_json, lr=1e-2, warmup_steps=1)
    settings = {"logger": TensorBoardLogger(tmp_path), "max_epochs": 3, "log_every_n_steps": 1}
    run = _trainer(tmp_path, *order, **settings)
    run.fit(module, tiny_images)
    panels = maps.method.sums
    assert len(panels) == 3
    assert panels == metrics.sums
    assert len(set(panels)) > 1 or kind == "unfreeze"
    assert run.callback_metrics["val/loss"].isfinite()
    assert module.clip.mean_image.isfinite().all()
    run.save_checkpoint(tmp_path / "last.ckpt")
    clip = load_trained(str(tmp_path / "last.ckpt"))
    assert clip.mean_image.isfinite().all()
    if kind == "rate":
        return
    longer = _trainer(tmp_path, STOCK[kind](), **settings | {"max_epochs": 4})
    longer.fit(ClipModule(tiny_json, lr=1e-2, warmup_steps=1), tiny_images, ckpt_path=tmp_path / "last.ckpt")
    assert longer.current_epoch == 4


def test_an_average_of_masks_is_refused_by_name(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    """The mean of -inf and -inf is NaN, and so would be the text tower."""
    with pytest.raises(ValueError, match=r"WeightAveraging averages buffers.*Set its use_buffers to false\."):
        _trainer(tmp_path, WeightAveraging()).fit(ClipModule(tiny_json), tiny_images)


def test_the_panels_of_averaged_weights_are_averaged(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    """Not of the weights of the last step, which the callback puts back at the end of the validation."""
    maps, steps = AttributionMaps(Noting(), num_pairs=1), []

    class Last(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            steps.append(float(module.clip.model.visual.proj.detach().sum()))

    run = _trainer(tmp_path, EMAWeightAveraging(decay=0.9), maps, Last(), logger=TensorBoardLogger(tmp_path))
    run.fit(ClipModule(tiny_json, lr=1e-2, warmup_steps=1), tiny_images)
    assert abs(maps.method.sums[0] - steps[-1]) > 1e-4


def test_the_schedule_follows_the_learning_rate_finder(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    finder = LearningRateFinder(min_lr=1e-5, max_lr=1e-2, num_training_steps=30, early_stop_threshold=None)
    module = ClipModule(tiny_json, lr=0.5, warmup_steps=2)
    run = _trainer(tmp_path, finder, Rates(), max_epochs=6, limit_val_batches=0)
    run.fit(module, tiny_images)
    found = finder.optimal_lr.suggestion()
    assert found
    assert module.hparams["lr"] == found
    assert rates[0] == pytest.approx(found / 2)
    assert max(rates) == pytest.approx(found)
    path = _saved(ClipModule(tiny_json, lr=0.5), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="LearningRateFinder cannot work in a training that resumes"):
        _trainer(tmp_path, finder).fit(ClipModule(tiny_json, lr=0.5), tiny_images, ckpt_path=path)


def test_the_schedule_takes_in_parameters_that_are_unfrozen_later(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    run = _trainer(tmp_path, Unfreeze(), Rates(), max_epochs=3, limit_val_batches=0)
    run.fit(ClipModule(tiny_json, lr=1e-2, warmup_steps=1), tiny_images)
    steps = len(rates) // 3
    assert [len(row) for row in rates] == [2] * steps + [3] * 2 * steps
    # A tenth of the others' rate, down to the end of the cosine.
    assert all(row[2] == pytest.approx(row[0] / 10) for row in rates[steps:])
    assert rates[-1][2] == pytest.approx(0, abs=1e-9)


# --- without the folder that the model came from


@pytest.mark.parametrize("name", ["biomedclip", "siglip"])
def test_a_checkpoint_carries_the_files_of_its_tokenizer_and_towers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder and the hub are gone, and every verb's way of reading a checkpoint works."""
    config = copy.deepcopy(family(name).config)
    for part, key in (
        ("text_cfg", "hf_tokenizer_name"),
        ("text_cfg", "hf_model_name"),
        ("vision_cfg", "timm_model_name"),
    ):
        value = config["model_cfg"][part].get(key)
        folder = Path(str(value).removeprefix("local-dir:"))
        if value and folder.is_dir():
            copied = tmp_path / "model" / key
            shutil.copytree(folder, copied)
            config["model_cfg"][part][key] = "local-dir:" * str(value).startswith("local-dir:") + str(copied)
    module = ClipModule(json.dumps(config))
    path = _saved(module, tmp_path / "last.ckpt")
    write_module(module, tmp_path / "start.safetensors")
    expected = _similarity(module.clip)
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = load_module(str(path))
    clips = [load_trained(str(path)), again.clip, load_clip(str(path))]
    clips += [read_module(tmp_path / "start.safetensors", ClipModule).clip]
    # And what is trained further from there carries them too.
    clips += [load_trained(str(_saved(again, tmp_path / "second.ckpt")))]
    for clip in clips:
        torch.testing.assert_close(_similarity(clip), expected)
        assert clip.config == module.clip.config
    assert load_tokenizer(str(path)).context_length == module.clip.context_length


def test_another_config_of_a_text_tower_is_named(tmp_path: Path, tiny_images: PhantomDataModule) -> None:
    """Its activation is in no shape and in no setting of open_clip."""
    path, other = tmp_path / "last.ckpt", tmp_path / "other"
    config = copy.deepcopy(family("biomedclip").config)
    module = ClipModule(json.dumps(config))
    _saved(module, path)
    shutil.copytree(config["model_cfg"]["text_cfg"]["hf_model_name"], other)
    bert = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(bert | {"hidden_act": "relu"}), encoding="utf-8")
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(other)
    tiny_images.image_size = None
    with pytest.raises(ValueError, match=r"another model: bert\.hidden_act is .* in the checkpoint and 'relu' here"):
        _trainer(tmp_path).test(ClipModule(json.dumps(config)), tiny_images, ckpt_path=path)
    # As `pretrained`, the checkpoint decides.
    torch.testing.assert_close(_similarity(load_clip(json.dumps(config), str(path))), _similarity(module.clip))


def test_another_fit_of_the_images_is_warned_of(
    tiny_json: str, tiny_images: PhantomDataModule, image_root: Path, tmp_path: Path
) -> None:
    run = _trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(ClipModule(tiny_json), tiny_images)
    run.save_checkpoint(tmp_path / "last.ckpt")
    data = _others(image_root)
    data.resize_mode = "squash"
    with pytest.warns(UserWarning, match="trained with resize_mode: longest, and the data module has squash"):
        _trainer(tmp_path).test(ClipModule(tiny_json), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_file_of_a_checkpoint_stays_in_its_folder(tmp_path: Path) -> None:
    path = _saved(ClipModule(json.dumps(family("biomedclip").config)), tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["model_files"]["../outside.json"] = content["model_files"]["config.json"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint .*'\.\./outside\.json' leads out of its folder"):
        load_trained(str(path))
