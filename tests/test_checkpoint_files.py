"""Files of weights that other code has written: wrappers, prefixes, archives, shards, and hostile files."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import open_clip
import pytest
import torch
from families import family
from huggingface_hub import save_torch_state_dict
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from matex_pl.attribution import Chefer, GradCam, Matex, Rollout
from matex_pl.cli import main
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.archive import read_archive
from matex_pl.clip.hf_names import to_transformers
from matex_pl.clip.weights import read_weights
from matex_pl.files import find_config

State = dict[str, Tensor]
PHRASES = ["Left base.", "Mass.", "Edema of both lungs."]


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The package's messages, also after a command line has run in this process."""
    monkeypatch.setattr(logging.getLogger("matex_pl"), "propagate", True)
    monkeypatch.setattr("matex_pl.cli.show_messages", lambda: None)
    caplog.set_level(logging.INFO, "matex_pl")
    return caplog


@pytest.fixture
def state(tiny_clip: Clip) -> State:
    return tiny_clip.model.state_dict()


def _with(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def _said(messages: pytest.LogCaptureFixture) -> list[str]:
    """Messages next to the line on the assumed meaning."""
    return [record.message for record in messages.records if "does not record the meaning" not in record.message]


def _same(model: nn.Module, clip: Clip) -> None:
    """The embeddings are those of the open_clip model that was saved."""
    images = torch.rand(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(PHRASES)
    with torch.no_grad():
        torch.testing.assert_close(clip.model.encode_image(images), model.encode_image(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(clip.model.encode_text(tokens), model.encode_text(tokens), atol=1e-5, rtol=0)


# --- wrappers

WRAPPED: dict[str, Callable[[State], Any]] = {
    **{
        key: lambda state, key=key: {key: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
        for key in ("state_dict", "model", "model_state_dict", "module", "net", "ema", "model_ema", "ema_state_dict")
    },
    "timm": lambda state: {"arch": "vit", "epoch": 1, "state_dict": state, "args": {"lr": 1e-3}},
    "mmpretrain": lambda state: {"meta": {"seed": 0}, "state_dict": _with("backbone.", state), "message_hub": {}},
    "nested": lambda state: {"model": {"state_dict": _with("module.", state)}, "epoch": 3},
    "averages": lambda state: {"ema": {"module": state}, "step": 2},
    "averaged model": lambda state: {"n_averaged": torch.tensor(3), **_with("module.", state)},
    "extra state": lambda state: {"state_dict": {**state, "visual._extra_state": None}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_weights_are_found(tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path, wrapper: str) -> None:
    torch.save(WRAPPED[wrapper](state), tmp_path / "weights.pt")
    _same(tiny_clip.model, load_clip(tiny_json, str(tmp_path / "weights.pt")))


def test_a_file_of_old_torch(tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path) -> None:
    """It is read with its wrapper. Next to objects it is refused, because torch alone reads this form."""
    path = tmp_path / "weights.pt"
    torch.save({"model": _with("module.", state), "epoch": 1}, path, _use_new_zipfile_serialization=False)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    torch.save({"model": state, "args": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"weights\.pt is no plain state dict \(it would run argparse\.Namespace\)"):
        load_clip(tiny_json, str(path))


PREFIXES = ["module.", "model.", "clip.", "net.", "clip_model.", "backbone.", "_orig_mod.", "student.encoder."]
PREFIXES += ["model._orig_mod.module.", "module.clip_model.", "module.model.clip.net.", "any_name_at_all."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_common_prefix_is_removed(
    tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path, prefix: str
) -> None:
    torch.save({"model": _with(prefix, state)}, tmp_path / "weights.pt")
    _same(tiny_clip.model, load_clip(tiny_json, str(tmp_path / "weights.pt")))


@pytest.mark.parametrize("name", ["siglip", "biomedclip", "resnet"])
def test_prefixes_of_other_towers(name: str, tmp_path: Path) -> None:
    clip = family(name)
    torch.save({"state_dict": _with("model.", clip.model.state_dict())}, tmp_path / "weights.pt")
    again = load_clip(json.dumps(clip.config), str(tmp_path / "weights.pt"))
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in clip.model.state_dict().items())


def test_maps_are_those_of_the_saved_weights(tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": _with("model.clip.", state)}, tmp_path / "weights.ckpt")
    clip = load_clip(tiny_json, str(tmp_path / "weights.ckpt"))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method in (Matex(), Rollout(), Chefer(), GradCam()):
        first, second = (
            method.attribute(model, model.normalize(images), model.tokenize(PHRASES), PHRASES)
            for model in (tiny_clip, clip)
        )
        torch.testing.assert_close(second.image, first.image)


class Own:
    """A setting of a class that only its training has."""

    def __init__(self) -> None:
        self.rate = 1e-3


class Settings(dict):
    """A dict of a class."""


class Training(pl.LightningModule):
    """Another project's training of an open_clip model."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = load_clip(json.dumps(settings.config)).model
        self.head = nn.Linear(16, 3)


def test_a_lightning_checkpoint_of_another_project(
    tiny_json: str, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    settings = argparse.Namespace(config=json.loads(tiny_json), folder=Path("data"), own=Own(), more=Settings(a=1))
    settings.seed = np.float64(2)
    training, path = Training(settings), tmp_path / "theirs.ckpt"
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint(path)
    _same(training.model.eval(), load_clip(tiny_json, str(path)))
    skipped, others = (record for record in _said(messages) if str(path) in record)
    assert skipped.startswith(f"{path} also holds objects of argparse.Namespace, ")
    assert skipped.endswith("more. They are left out, and no code is run.")
    assert others == (
        f"{path} also holds 2 keys (head.weight, head.bias), which belong to other modules and are left out."
    )


# --- several models in a file, and other modules


def test_weights_and_their_averages(
    tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    path, averages = tmp_path / "weights.pt", {key: value / 2 for key, value in state.items()}
    torch.save({"model": state, "model_ema": averages}, path)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    (said,) = _said(messages)
    assert said.startswith(f"{path} holds weights under 'model', and averages of them under 'model_ema'. The weights")
    messages.clear()
    torch.save({"state_dict": _with("ema.", averages) | _with("net.", state)}, path)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    first, second = _said(messages)
    assert "holds weights under 'net.', and averages of them under 'ema.'. The weights under 'net.' are read." in first
    assert "62 keys (ema.positional_embedding" in second


def test_a_second_model_is_left_out_or_refused(
    tiny_json: str, tiny_clip: Clip, state: State, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "weights.pt", {key: value + 1 for key, value in state.items()}
    torch.save(_with("teacher.", other) | _with("clip.", state), path)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    assert "62 keys (teacher." in _said(messages)[0]
    torch.save(_with("first.", state) | _with("second.", other), path)
    with pytest.raises(ValueError, match=r"weights\.pt holds several models, under 'first\.' and 'second\.'"):
        load_clip(tiny_json, str(path))
    # A module that is held twice.
    torch.save(_with("first.", state) | _with("second.", state), path)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    torch.save({"model": state, "net": other}, path)
    with pytest.raises(ValueError, match=r"weights\.pt holds several models, under 'model' and 'net'\. Save one"):
        load_clip(tiny_json, str(path))


HEAD = {"head.weight": torch.ones(3, 16), "queue": torch.ones(2), "criterion.center": torch.ones(1)}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_other_modules_are_named(
    tiny_json: str,
    tiny_clip: Clip,
    state: State,
    tmp_path: Path,
    messages: pytest.LogCaptureFixture,
    prefix: str,
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(_with(prefix, state | HEAD), path)
    _same(tiny_clip.model, load_clip(tiny_json, str(path)))
    assert _said(messages)[0].startswith(f"{path} also holds 3 keys ({prefix}head.weight, {prefix}queue, ")
    del state["visual.proj"]
    torch.save(_with(prefix, state | HEAD), path)
    with pytest.raises(ValueError, match=r"missing: 1 key \(visual\.proj\); of other modules: 3 keys"):
        load_clip(tiny_json, str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"layers": 3}}, r"extra: 12 keys \(visual\.transformer\.resblocks\.2\."),
        ({"text_cfg": {"layers": 3}}, r"extra: 12 keys \(transformer\.resblocks\.2\."),
        ({"init_logit_bias": -10}, r"extra: 1 key \(logit_bias\)"),
        ({"text_cfg": {"width": 64}}, r"of another shape: .*positional_embedding \(16, 64\) instead of \(16, 32\)"),
        ({"vision_cfg": {"layers": 1}}, r"missing: 12 keys \(visual\.transformer\.resblocks\.1\."),
    ],
)
def test_weights_of_another_architecture_are_refused(
    tiny_json: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Deeper towers, for example, whose first layers would fit."""
    config = json.loads(tiny_json)["model_cfg"]
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    torch.save({"model": _with("clip.", load_clip(json.dumps(config)).model.state_dict())}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_clip(tiny_json, str(tmp_path / "weights.pt"))


# --- archives of OpenAI

SMALL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture
def published(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model as OpenAI publishes its own: traced, with three integers next to the weights."""
    torch.manual_seed(0)
    first = load_clip(json.dumps(SMALL)).model
    model = (
        open_clip.model.build_model_from_openai_state_dict(first.state_dict(), cast_dtype=torch.float32).float().eval()
    )
    for name, number in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        # The attribute of the same name goes.
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (torch.rand(2, 3, 32, 32), tokens), check_trace=False).save(tmp_path / "ViT-B-32.pt")
    return model, tmp_path / "ViT-B-32.pt"


def test_an_archive_of_openai_is_read_for_its_weights(
    published: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = published
    monkeypatch.setattr(torch.jit, "load", None)
    _same(model, load_clip(json.dumps(SMALL), str(path)))
    assert not read_weights(str(path)).checkpoint
    plain = {key: value for key, value in SMALL.items() if key != "quick_gelu"}
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt holds OpenAI's weights, which were trained with QuickGELU"):
        load_clip(json.dumps(plain), str(path))


@pytest.mark.parametrize("kind", ["half", "trained"])
def test_weights_of_openai_in_the_layout_of_transformers(tmp_path: Path, kind: str) -> None:
    """OpenAI's matrices are the only ones of half precision. The layout of transformers does not hide them."""
    torch.manual_seed(0)
    model = load_clip(json.dumps(SMALL)).model
    with torch.no_grad():
        model.logit_scale.fill_(np.log(100))
        for name, value in model.named_parameters():
            if kind == "half" and name.endswith(("in_proj_weight", "text_projection")):
                value.copy_(value.half())
    torch.save(to_transformers(model), tmp_path / "pytorch_model.bin")
    plain = json.dumps({key: value for key, value in SMALL.items() if key != "quick_gelu"})
    if kind == "trained":
        load_clip(plain, str(tmp_path / "pytorch_model.bin"))
        return
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds OpenAI's weights"):
        load_clip(plain, str(tmp_path / "pytorch_model.bin"))
    _same(model, load_clip(json.dumps(SMALL), str(tmp_path / "pytorch_model.bin")))


def test_the_state_dict_of_an_archive(published: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """With its three integers, plain and as the start of a training."""
    model, path = published
    state = torch.jit.load(path).state_dict()
    assert {"input_resolution", "context_length", "vocab_size"} < state.keys()
    for content in (state, {"model": _with("module.", state)}, {"state_dict": _with("clip.", state)}):
        torch.save(content, tmp_path / "weights.pt")
        _same(model, load_clip(json.dumps(SMALL), str(tmp_path / "weights.pt")))


def test_a_torch_script_archive_of_something_else_is_refused(tiny_json: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "linear.pt")
        torch.jit.script(nn.Identity()).save(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"linear\.pt does not fit the model"):
        load_clip(tiny_json, str(tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match=r"nothing\.pt is a TorchScript archive, .*convert it: torch\.save\("):
        load_clip(tiny_json, str(tmp_path / "nothing.pt"))


# --- shards


@pytest.mark.parametrize("safe", [True, False])
def test_an_index_of_shards(tiny_json: str, tiny_clip: Clip, tmp_path: Path, safe: bool) -> None:
    save_torch_state_dict(tiny_clip.model.state_dict(), tmp_path, max_shard_size="2MB", safe_serialization=safe)
    (index,) = tmp_path.glob("*.index.json")
    shards = sorted(path for path in tmp_path.iterdir() if path != index)
    assert len(shards) > 1
    _same(tiny_clip.model, load_clip(tiny_json, str(index)))
    shards[0].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {shards[0].name}, which is missing"):
        load_clip(tiny_json, str(index))
    index.write_text('{"weight_map": {"visual.proj": "../outside.bin"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"names '\.\./outside\.bin', which leads out of its folder"):
        load_clip(tiny_json, str(index))
    for text in ("{}", "[", '{"weight_map": [1]}'):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"index\.json is no plain state dict"):
            load_clip(tiny_json, str(index))


# --- hostile files


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


TRACE = "open('trace', 'w').close()"


def _hostile() -> dict[str, Any]:
    import os

    return {
        "system": Call(os.system, "touch trace"),
        "eval": Call(eval, TRACE),
        "exec": Call(exec, TRACE),
        "open": Call(open, "trace", "w"),
        "import": Call(getattr, Call(__import__, "os"), "system"),
        "nested": Call(list, [Call(os.system, "touch trace"), {"deep": [Call(exec, TRACE)]}]),
        "key": {Call(tuple, [Call(os.system, "touch trace")]): 1},
        "state": Call(dict, state={"a": Call(os.system, "touch trace")}),
        "setstate": Call(Own, state={"__setstate__": Call(eval, TRACE), "__class__": Call(type, "A", (), {})}),
        "torch": Call(torch.load, "evil.pt", None, None),
        "pickle": Call(pickle.loads, pickle.dumps(Call(exec, TRACE))),
        "dunder": Call(getattr, Own, "__init__"),
        "globals": Call(getattr, Call(getattr, Own, "__init__"), "__globals__"),
        "code": Call(compile, TRACE, "f", "exec"),
    }


@pytest.mark.parametrize("name", _hostile())
@pytest.mark.parametrize("place", ["settings", "state_dict", "weight", "archive"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_a_file_is_run(
    tiny_json: str,
    tiny_clip: Clip,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: str,
    protocol: int,
) -> None:
    """Next to complete weights the object is left out. Weights that depend on it are refused."""
    monkeypatch.chdir(tmp_path)
    evil = _hostile()[name]
    contents: dict[str, Any] = {
        "settings": {"state_dict": state, "hyper_parameters": evil},
        "archive": {"state_dict": state, "hyper_parameters": evil},
        "state_dict": {"state_dict": evil},
        "weight": {"state_dict": state | {"visual.proj": evil}},
    }
    torch.save(contents[place], "evil.pt", pickle_protocol=protocol)
    if place == "archive":
        with zipfile.ZipFile("evil.pt", "a") as archive:
            archive.writestr("evil/constants.pkl", b"\x80\x02).")
    if place in ("settings", "archive"):
        _same(tiny_clip.model, load_clip(tiny_json, "evil.pt"))
    else:
        with pytest.raises(ValueError, match=r"^evil\.pt "):
            load_clip(tiny_json, "evil.pt")
    assert not Path("trace").exists()


# Changes of torch's own functions and of the classes that the reader hands out.
RAW = {
    "defaults": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "attributes": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "class": b"\x80\x02cargparse\nNamespace\n}X\x05\x00\x00\x00stateK\x01sb.",
    "slots": b"\x80\x02cargparse\nNamespace\nN}X\x05\x00\x00\x00stateK\x01s\x86b.",
    "ordered": b"\x80\x02ccollections\nOrderedDict\nN}X\x05\x00\x00\x00itemsK\x01s\x86b.",
    "called": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\neval\nX\x01\x00\x00\x001\x86R)R.",
    "storage": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    "endless": b"\x80\x02}X\x0a\x00\x00\x00state_dicth\x00s.",
    "cut": b"\x80\x02}X\x0a\x00\x00\x00state",
}


@pytest.mark.parametrize("name", RAW)
def test_a_pickle_changes_nothing_of_the_reader(tiny_json: str, tmp_path: Path, name: str) -> None:
    from matex_pl.clip import archive

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/data.pkl", RAW[name])
    before = {key: dict(vars(value)) for key, value in vars(archive).items() if isinstance(value, type)}
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match=r"evil\.pt is no plain state dict"):
        load_clip(tiny_json, str(path))
    assert {key: dict(vars(value)) for key, value in vars(archive).items() if isinstance(value, type)} == before
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert not vars(torch._utils._rebuild_tensor_v2)


def test_a_tensor_stays_in_its_storage(tmp_path: Path, state: State) -> None:
    """A size that leads out of the values would read other bytes of the file."""
    torch.save({"a": torch.ones(4), "own": Own()}, tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "wide.pt", "w") as file:
        for name, data in parts.items():
            # K\x04\x85 is the size (4,).
            file.writestr(name, data.replace(b"K\x04\x85", b"K\x7f\x85") if name.endswith("data.pkl") else data)
    assert torch.equal(read_archive(str(tmp_path / "weights.pt"))[0]["a"], torch.ones(4))
    with pytest.raises(RuntimeError, match=r"resiz|bounds"):
        read_archive(str(tmp_path / "wide.pt"))


# --- files of another layout


def test_weights_of_transformers_are_named(tiny_json: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.save({"state_dict": _with("model.", CLIPModel(config).state_dict())}, tmp_path / "theirs.bin")
    with pytest.raises(
        ValueError, match=r"theirs\.bin does not fit its model.*Give the folder that the weights belong"
    ):
        load_clip(tiny_json, str(tmp_path / "theirs.bin"))


def test_the_text_tower_of_unimed_clip(tmp_path: Path) -> None:
    """It is open_clip's tower of Hugging Face under another name, next to BERT's positions."""
    clip = family("biomedclip")
    state = {key.replace("text.", "text_encoder.", 1): value for key, value in clip.model.state_dict().items()}
    assert any(key.startswith("text_encoder.") for key in state)
    state["text_encoder.transformer.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save({"epoch": 1, "state_dict": _with("module.", state)}, tmp_path / "unimed.pt")
    again = load_clip(json.dumps(clip.config), str(tmp_path / "unimed.pt"))
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in clip.model.state_dict().items())


def test_an_interpolation_of_positions_is_said(
    tiny_json: str, state: State, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    """The size of the training is in no setting of the file."""
    torch.save({"model": state}, tmp_path / "weights.pt")
    load_clip(tiny_json, str(tmp_path / "weights.pt"), 48)
    assert _said(messages) == [
        f"{tmp_path / 'weights.pt'} holds positions of 4 x 4 patches. They are interpolated to the model's 6 x 6."
    ]


# --- CheXzero, and pictures of any model


def test_chexzero(tmp_path: Path) -> None:
    """The shipped config is OpenAI's ViT-B/32 with another deviation; a smaller model of the same form is read."""
    config = json.loads(find_config("models/chexzero.json").read_text(encoding="utf-8"))
    assert config["model_cfg"] == open_clip.get_model_config("ViT-B-32-quickgelu")
    for name, value in (("mean", 101.48761), ("std", 83.43944)):
        assert config["preprocess_cfg"][name] == pytest.approx([value / 255] * 3, abs=5e-6)
    config["model_cfg"] |= {"vision_cfg": SMALL["vision_cfg"], "text_cfg": SMALL["text_cfg"], "embed_dim": 16}
    theirs = open_clip.model.build_model_from_openai_state_dict(
        load_clip(json.dumps(SMALL)).model.state_dict(), cast_dtype=torch.float32
    )
    theirs.float().eval()
    torch.save(theirs.state_dict(), tmp_path / "best.pt")
    clip = load_clip(json.dumps(config), str(tmp_path / "best.pt"))
    _same(theirs, clip)
    assert clip.resize_mode == "longest"
    torch.testing.assert_close(clip.mean.flatten(), torch.full((3,), 101.48761 / 255), atol=1e-5, rtol=0)


@pytest.fixture
def models(tiny_json: str, tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide image, a config, weights of another training, and folders in open_clip's form, one of which squashes."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.tile(np.linspace(0, 255, 96, dtype=np.uint8), (48, 1))).save("image.png")
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    torch.save({"model": _with("clip.", tiny_clip.model.state_dict()), "args": argparse.Namespace(a=1)}, "theirs.pt")
    for name in ("folder", "squash"):
        Path(name).mkdir()
        preprocess = tiny_clip.config["preprocess_cfg"] | {"resize_mode": {"squash": "squash"}.get(name, "shortest")}
        text = json.dumps(tiny_clip.config | {"preprocess_cfg": preprocess})
        Path(name, "open_clip_config.json").write_text(text, encoding="utf-8")
        torch.save(tiny_clip.model.state_dict(), Path(name, "open_clip_pytorch_model.bin"))


def _picture(*words: str) -> np.ndarray:
    main(["explain", "image.png", "Left base.", "--method", "rollout", "--out", "panel.png", *words])
    return np.array(Image.open("panel.png"))


@pytest.mark.usefixtures("models")
def test_a_picture_of_any_model_without_a_checkpoint() -> None:
    """A folder and its weights in a file of another training give one picture, with the fit that the model states."""
    folder = _picture("--model", "local-dir:folder")
    assert np.array_equal(_picture("--model", "tiny.json", "--pretrained", "theirs.pt"), folder)
    assert np.array_equal(_picture("--model", "local-dir:folder", "--resize_mode", "longest"), folder)
    squashed = _picture("--model", "local-dir:squash")
    assert np.array_equal(_picture("--model", "local-dir:folder", "--resize_mode", "squash"), squashed)
    assert not np.array_equal(squashed, folder)
    assert np.array_equal(_picture("--model", "local-dir:squash", "--resize_mode", "longest"), folder)


@pytest.mark.usefixtures("models")
def test_a_checkpoint_is_drawn_with_the_fit_of_its_training() -> None:
    from matex_pl import ClipModule

    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(ClipModule("local-dir:squash"))
    trainer.save_checkpoint("last.ckpt")
    for recorded, expected in ((None, "squash"), ("longest", "longest"), ("shortest", "shortest")):
        content = torch.load("last.ckpt", weights_only=True) | {"resize_mode": recorded}
        torch.save(content, "changed.ckpt")
        assert load_clip("changed.ckpt").resize_mode == expected
        assert load_clip("local-dir:squash", "changed.ckpt").resize_mode == expected
