"""Low-rank adapters, the sigmoid loss and gradient checkpointing of a training."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from open_clip.loss import SigLipLoss
from torch import Tensor, nn

from matex_pl import ClipModule
from matex_pl.attribution import LeGrad, Matex
from matex_pl.callbacks import RoarPlus
from matex_pl.cli import main
from matex_pl.clip import Clip, load_clip, load_trained
from matex_pl.data import PhantomDataModule, collate
from matex_pl.roar.finetune import read_module
from matex_pl.roar.plan import Protocol, Training
from matex_pl.training import load_module
from matex_pl.training.lora import Lora, adaptable_layers

pytestmark = [
    pytest.mark.usefixtures("messages"),
    pytest.mark.filterwarnings(
        "ignore:.*are longer than the model's",
        "ignore:The training ends after",
        "ignore:Checkpoint directory",
        "ignore:The number of training batches",
        "ignore:Found .* in eval mode",
        "ignore:LoRA finds no layer to adapt in the image tower",
    ),
]
PHRASES = ["left effusion", "small mass", "right lung"]
LORA = {"r": 2, "alpha": 4.0}


@pytest.fixture
def biased_json(tiny_json: str) -> str:
    """A model with a bias of its logits."""
    config = json.loads(tiny_json)
    return json.dumps({"model_cfg": config["model_cfg"] | {"init_logit_bias": -10.0, "init_logit_scale": math.log(10)}})


def _trainer(path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


def _inputs(clip: Clip) -> tuple[Tensor, Tensor]:
    images = torch.rand(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    return clip.normalize(images), clip.tokenize(PHRASES)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name.removeprefix("clip.model.") for name, value in before.items() if not torch.equal(value, after[name])}


@torch.no_grad()
def _adapted(module: ClipModule) -> ClipModule:
    """The module with updates that are not zero."""
    for name, value in module.named_parameters():
        if ".lora_B." in name:
            value.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return module


def _phantom(root: Path, *more: str) -> list[str]:
    sizes = {"num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4, "num_workers": 0}
    words = ["--config", "phantom.yaml", "--model.name=tiny.json", "--model.warmup_steps=1", f"--data.root={root}"]
    words += [f"--data.{name}={value}" for name, value in sizes.items()]
    return [*words, "--trainer.callbacks=null", "--trainer.logger=false", "--trainer.max_epochs=1", *more]


# --- low-rank adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """The folder of a training with adapters by the command line."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "tiny.json").write_bytes(Path(__file__).with_name("tiny.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("matex_pl.cli.show_messages", lambda: None)
        keep = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {dirpath: ., filename: last}}"
        main(["fit", *_phantom(image_root, keep, "--model.lora={r: 2, alpha: 8}", "--model.lr=0.01")])
    return folder


def test_a_checkpoint_holds_the_adapters_beside_unchanged_weights(trained: Path) -> None:
    content = torch.load(trained / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["lora"] == {"r": 2, "alpha": 8.0, "dropout": 0.0, "targets": None}
    torch.manual_seed(0)
    start = load_clip(str(trained / "tiny.json")).model.state_dict()
    plain = {
        name.replace(".base_layer.", ".").removeprefix("clip.model."): value
        for name, value in content["state_dict"].items()
        if ".lora_" not in name and name.startswith("clip.model.")
    }
    assert plain.keys() == start.keys()
    # To the bit: PEFT's own attention adds and subtracts its update in each forward.
    assert {name for name, value in plain.items() if not torch.equal(value, start[name])} == {"logit_scale"}
    merged = load_module(str(trained / "last.ckpt")).clip.model.state_dict()
    moved = {name for name, value in plain.items() if not torch.equal(value, merged[name])}
    assert len(moved) == 2 * 2 * 4
    assert all(name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")) for name in moved)
    trained_states = content["optimizer_states"][0]["state"]
    assert sum(state["exp_avg"].numel() for state in trained_states.values()) < 5000


def test_base_weights_do_not_move_and_the_count_is_logged(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "matex_pl"):
        module = ClipModule(tiny_json, lora=Lora(r=2), lr=1e-2, warmup_steps=0)
    count = sum(value.numel() for value in module.parameters() if value.requires_grad)
    assert "LoRA of rank 2: 12 adapted layers, 6 in the image tower, 6 in the text tower." in caplog.text
    assert f" {count:,} of " in caplog.text
    before = _weights(module)
    _trainer(tmp_path, max_steps=3, limit_val_batches=1).fit(module, tiny_images)
    changed = _changed(before, _weights(module))
    assert changed == {name for name, value in module.clip.model.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or name == "logit_scale" for name in changed)


@pytest.mark.parametrize("way", ["explain", "validate", "test", "fit from it"])
def test_every_command_reads_adapters_without_peft(
    trained: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setitem(sys.modules, "peft", None)
    if way == "explain":
        import numpy as np
        from PIL import Image

        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(
            tmp_path / "chest.png"
        )
        out = ["--ckpt_path=last.ckpt", f"--out={tmp_path / 'map.png'}"]
        main(["explain", str(tmp_path / "chest.png"), "Left effusion.", *out])
        assert (tmp_path / "map.png").is_file()
    elif way == "fit from it":
        main(["fit", *_phantom(image_root, "--model.name=last.ckpt", "--trainer.fast_dev_run=true")])
    else:
        main([way, *_phantom(image_root, "--ckpt_path=last.ckpt")])


def test_a_resumed_training_ends_as_an_uninterrupted_one(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    def module() -> ClipModule:
        torch.manual_seed(1)
        return ClipModule(tiny_json, lora=LORA, lr=1e-2, warmup_steps=1)

    class SaveFirstEpoch(Callback):
        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.sanity_checking and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    whole, resumed = module(), module()
    torch.manual_seed(2)
    _trainer(tmp_path, SaveFirstEpoch(), max_epochs=2).fit(whole, tiny_images)
    _trainer(tmp_path, max_epochs=2).fit(resumed, tiny_images, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert not _changed(_weights(whole), _weights(resumed))


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_those_of_the_merged_model(name: str, tmp_path: Path) -> None:
    """In every family: all adapters get gradients, and maps are those of the model that a checkpoint gives."""
    config = json.dumps(family(name).config)
    torch.manual_seed(0)
    module = ClipModule(config, family_weights(name, tmp_path), lora=LORA)
    trained = [part for part, value in module.clip.model.named_parameters() if value.requires_grad]
    assert any(".lora_" in part for part in trained)
    images, tokens = _inputs(module.clip)
    (module.clip.encode_image(images).sum() + module.clip.encode_text(tokens).sum()).backward()
    without = [part for part in trained if module.clip.model.get_parameter(part).grad is None]
    assert set(without) <= {"logit_scale", "logit_bias"}
    _adapted(module)
    trainer = _trainer(tmp_path, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    merged = load_trained(str(tmp_path / "last.ckpt"))
    assert "lora" not in " ".join(merged.state_dict())
    base, method = family(name), LeGrad() if name != "resnet" else Matex()
    ours, other, start = (method.attribute(clip, images, tokens, PHRASES) for clip in (module.clip, merged, base))
    torch.testing.assert_close(ours.grid, other.grid, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours.text, other.text, atol=2e-4, rtol=0)
    moved = [(getattr(ours, part) - getattr(start, part)).abs().max() for part in ("grid", "text")]
    # The ResNet gets no adapters.
    assert moved[name == "resnet"] > 1e-3


def family_weights(name: str, folder: Path) -> str:
    torch.save(family(name).model.state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


@pytest.mark.parametrize(
    ("freeze", "adapted", "whole"),
    [
        ("image", {"text"}, set()),
        ("text", {"image"}, set()),
        ("all-but-projections", {"image", "text"}, {"visual.proj", "text_projection"}),
    ],
)
def test_frozen_towers_get_no_adapters_and_heads_train_with_them(
    tiny_json: str, freeze: str, adapted: set[str], whole: set[str]
) -> None:
    module = ClipModule(tiny_json, freeze=freeze, lora=LORA)
    trained = {name for name, value in module.clip.model.named_parameters() if value.requires_grad}
    sides = {"image" if name.startswith("visual.") else "text" for name in trained if ".lora_" in name}
    assert sides == adapted
    assert {name for name in trained if ".lora_" not in name} == whole | {"logit_scale"}
    assert module.clip.model.visual.training is ("image" in adapted)
    assert module.clip.model.transformer.training is ("text" in adapted)


def test_a_tower_without_layers_to_adapt_stays_as_it_is() -> None:
    with pytest.warns(UserWarning, match="no layer to adapt in the image tower ModifiedResNet, which stays"):
        module = ClipModule(json.dumps(family("resnet").config), lora=LORA)
    # Its norms would collect statistics otherwise.
    assert not module.clip.model.visual.training
    with pytest.raises(ValueError, match="LoRA finds no layer to adapt"):
        ClipModule(json.dumps(family("resnet").config), lora=LORA, freeze="text")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": ["qproj"]},
            r"lora\.targets: 'qproj' matches no layer.* visual\.transformer\.resblocks\.\*\.attn \(2\)",
        ),
        ({"targets": ["attn", "out_proj"]}, r"lora\.targets: 'out_proj' matches no layer"),
        ({"targets": ["visual.conv1"]}, r"'visual\.conv1' matches no layer"),
        ({"targets": []}, r"lora\.targets must be a list of names of layers, got \[\]"),
        (
            {"dropout": 0.1},
            r"lora\.dropout is 0\.1, but visual\.transformer\.resblocks\.0\.attn is an attention of torch",
        ),
        ({"dropout": 1.0}, r"lora\.dropout must be in \[0, 1\), got 1\.0"),
        ({"r": 0}, r"lora\.r must be .* got 0"),
        ({"alpha": -1.0}, r"lora\.alpha must be .* got -1\.0"),
    ],
)
def test_wrong_settings_of_adapters_are_refused_by_name(tiny_json: str, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipModule(tiny_json, lora=lora)


def test_targets_are_whole_names_or_ends(tiny_json: str) -> None:
    # The first is also the end of a name of the image tower.
    targets = ["transformer.resblocks.0.attn", "c_fc"]
    module = ClipModule(tiny_json, freeze="image", lora={"targets": targets, "r": 2})
    layers = {name.split(".lora_")[0] for name, _ in module.clip.model.named_parameters() if ".lora_A." in name}
    assert layers == {
        "transformer.resblocks.0.attn",
        "transformer.resblocks.0.attn.base_layer.out_proj",
        *(f"transformer.resblocks.{block}.mlp.c_fc" for block in range(2)),
    }


def test_dropout_reaches_layers_with_inputs(tiny_json: str) -> None:
    module = _adapted(ClipModule(tiny_json, lora={"targets": ["c_fc"], "dropout": 0.5}))
    images = _inputs(module.clip)[0]
    with torch.no_grad():
        first, second = (module.clip.encode_image(images) for _ in range(2))
        assert not torch.equal(first, second)
        module.eval()
        assert torch.equal(module.clip.encode_image(images), module.clip.encode_image(images))


def test_layers_whose_weights_a_tower_reads_itself_are_no_targets() -> None:
    config = {**json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))}
    vision = {"timm_model_name": "beit_base_patch16_224", "timm_model_pretrained": False, "image_size": 32}
    config["vision_cfg"] = vision | {"timm_pool": "", "timm_proj": "linear"}
    layers = adaptable_layers(load_clip(json.dumps(config)))
    assert "visual.trunk.blocks.0.mlp.fc1" in layers
    assert not any(name.endswith("qkv") for name in layers)


def test_without_peft_the_error_names_the_extra(tiny_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs peft, .*matex_pl\[lora\]"):
        ClipModule(tiny_json, lora=LORA)


@pytest.mark.parametrize(("now", "shown"), [(None, "None here"), ({"r": 3}, "'r': 3")])
def test_other_adapters_than_the_checkpoints_are_refused(
    trained: Path, tiny_images: PhantomDataModule, tmp_path: Path, now: Any, shown: str
) -> None:
    module = ClipModule(str(trained / "tiny.json"), lora=now)
    with pytest.raises(
        ValueError, match=r"last\.ckpt contradicts the settings: lora is .*'r': 2.* in the checkpoint"
    ) as e:
        _trainer(tmp_path).fit(module, tiny_images, ckpt_path=trained / "last.ckpt", weights_only=True)
    assert shown in str(e.value)


def test_averages_of_adapters_are_saved_and_explained(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    module = ClipModule(tiny_json, lora=LORA, lr=1e-2, warmup_steps=0)
    run = _trainer(tmp_path, EMAWeightAveraging(decay=0.5), max_epochs=2)
    run.fit(module, tiny_images)
    run.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any(".lora_B." in name for name in content["current_model_state"])
    again = load_trained(str(tmp_path / "last.ckpt"))
    images, tokens = _inputs(again)
    with torch.no_grad():
        torch.testing.assert_close(again.similarity(images, tokens), module.eval().clip.similarity(images, tokens))


def test_compiled_towers_train_adapters(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module = ClipModule(tiny_json, lora=LORA, lr=1e-2, warmup_steps=0, grad_checkpointing=True)
    module.clip.model.visual = torch.compile(module.clip.model.visual, backend="eager")
    before = _weights(module)
    run = _trainer(tmp_path, max_steps=2, limit_val_batches=1)
    run.fit(module, tiny_images)
    changed = _changed(before, _weights(module))
    assert changed == {name for name, value in module.clip.model.named_parameters() if value.requires_grad}
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert load_trained(str(tmp_path / "last.ckpt"))
    torch.compiler.reset()


def test_roar_at_the_end_of_a_training_with_adapters(
    biased_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    """ROAR+ starts from merged weights, with the loss of the training, and adds adapters of its own."""
    settings = Training(epochs=1, batch_size=4, finetune="lora", lora_rank=2, grad_checkpointing=True)
    protocol = Protocol(modalities=["image"], fractions=[0.5], repeats=1)
    roar = RoarPlus(["chefer"], protocol, settings, start="after", out=str(tmp_path / "roar"))
    module = ClipModule(biased_json, lora=LORA, lr=1e-2, warmup_steps=0)
    _trainer(tmp_path, roar, limit_val_batches=1).fit(module, tiny_images)
    start = read_module(tmp_path / "roar" / "start.safetensors", ClipModule)
    assert (start.hparams["loss"], start.hparams["lora"]) == ("sigmoid", None)
    images, tokens = _inputs(start.clip)
    with torch.no_grad():
        expected = module.eval().clip.similarity(images, tokens)
        torch.testing.assert_close(start.eval().clip.similarity(images, tokens), expected)
    results = json.loads((tmp_path / "roar" / "results.json").read_text(encoding="utf-8"))
    assert not results["failed"]


# --- the sigmoid loss


def test_the_loss_is_the_models_by_default(tiny_json: str, biased_json: str) -> None:
    plain, biased = ClipModule(tiny_json), ClipModule(biased_json)
    assert (plain.hparams["loss"], plain.hparams["max_logit_scale"]) == ("softmax", 100)
    assert (biased.hparams["loss"], biased.hparams["max_logit_scale"]) == ("sigmoid", None)
    assert float(biased.clip.model.logit_bias.detach()) == -10
    assert biased.clip.model.logit_bias.requires_grad
    assert float(biased.clip.logit_scale.detach().exp()) == pytest.approx(10)
    other = ClipModule(biased_json, loss="softmax")
    assert not other.clip.model.logit_bias.requires_grad
    with pytest.raises(ValueError, match=r"loss: sigmoid needs a model with a bias.*add init_logit_bias"):
        ClipModule(tiny_json, loss="sigmoid")
    with pytest.raises(ValueError, match="loss must be one of softmax, sigmoid, got 'hinge'"):
        ClipModule(tiny_json, loss="hinge")


def test_a_large_scale_of_siglip_is_not_cut(biased_json: str) -> None:
    module = ClipModule(biased_json)
    with torch.no_grad():
        module.clip.logit_scale.fill_(math.log(117))
    module.on_train_batch_end()
    assert float(module.clip.logit_scale.detach().exp()) == pytest.approx(117)


def test_a_training_with_the_sigmoid_loss(biased_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module = ClipModule(biased_json, lr=1e-2, warmup_steps=0)
    run = _trainer(tmp_path, max_epochs=2)
    run.fit(module, tiny_images)
    bias = float(module.clip.model.logit_bias.detach())
    assert float(run.callback_metrics["train/logit_bias"]) == pytest.approx(bias, abs=0.05)
    assert bias != -10
    scores = _trainer(tmp_path, limit_val_batches=1).validate(module, tiny_images, verbose=False)[0]
    batch = collate(list(tiny_images.dataset("val"))[:4])
    assert len(set(batch["phrase"])) == 4
    with torch.no_grad():
        image, text = module.eval()(batch)
        expected = SigLipLoss()(image, text, module.clip.logit_scale.exp(), module.clip.model.logit_bias)
    assert scores["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = load_module(str(tmp_path / "last.ckpt"))
    assert again.hparams["loss"] == "sigmoid"
    assert torch.equal(again.clip.model.logit_bias, module.clip.model.logit_bias)
    with pytest.raises(ValueError, match="loss is 'sigmoid' in the checkpoint and 'softmax' here"):
        _trainer(tmp_path, max_epochs=3).fit(
            ClipModule(biased_json, lr=1e-2, warmup_steps=0, loss="softmax"),
            tiny_images,
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
        )


def test_a_checkpoint_from_before_the_option_was_trained_by_softmax(
    biased_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    run = _trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(ClipModule(biased_json, loss="softmax"), tiny_images)
    run.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name in ("loss", "lora", "grad_checkpointing"):
        del content["hyper_parameters"][name]
    torch.save(content, tmp_path / "old.ckpt")
    assert load_module(str(tmp_path / "old.ckpt")).hparams["loss"] == "softmax"
    with pytest.raises(ValueError, match="loss is 'softmax' in the checkpoint and 'sigmoid' here"):
        _trainer(tmp_path).fit(ClipModule(biased_json), tiny_images, ckpt_path=tmp_path / "old.ckpt", weights_only=True)


# --- gradient checkpointing


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "resnet"])
def test_losses_and_gradients_do_not_depend_on_checkpointing(name: str, lora: Any, tmp_path: Path) -> None:
    found = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        module = ClipModule(
            json.dumps(family(name).config),
            family_weights(name, tmp_path),
            lora=lora,
            grad_checkpointing=grad_checkpointing,
        )
        images, tokens = _inputs(module.clip)
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = (module.clip.encode_image(images) @ module.clip.encode_text(tokens).T).square().sum()
        loss.backward()
        grads = {part: value.grad for part, value in module.named_parameters() if value.grad is not None}
        found.append((loss.detach(), grads, saved))
    (plain, plain_grads, plain_saved), (ours, grads, saved) = found
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    assert grads.keys() == plain_grads.keys()
    for part, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[part], atol=1e-6, rtol=1e-5)
    assert saved < 0.5 * plain_saved


@pytest.mark.parametrize("name", ["native", "siglip", "biomedclip"])
def test_maps_do_not_depend_on_checkpointing(name: str, tmp_path: Path) -> None:
    weights = family_weights(name, tmp_path)
    maps = []
    for grad_checkpointing in (False, True):
        module = ClipModule(json.dumps(family(name).config), weights, grad_checkpointing=grad_checkpointing)
        images, tokens = _inputs(module.clip)
        maps.append(Matex().attribute(module.clip, images, tokens, PHRASES))
    assert torch.equal(maps[0].grid, maps[1].grid)
    assert torch.equal(maps[0].text, maps[1].text)


def test_a_checkpointed_training_is_the_same(
    tiny_images: PhantomDataModule, tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, with patch dropout and maps."""
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
    config["vision_cfg"]["patch_dropout"] = 0.5
    Path("tiny.json").write_text(json.dumps(config), encoding="utf-8")
    states = []
    for value in ("false", "true"):
        keep = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {dirpath: %s, filename: last}}"
        main(
            [
                "fit",
                *_phantom(image_root, keep % f"in_{value}", f"--model.grad_checkpointing={value}", "--model.lr=0.001"),
            ]
        )
        states.append(torch.load(f"in_{value}/last.ckpt", weights_only=True)["state_dict"])
    for name, ours in states[1].items():
        torch.testing.assert_close(ours, states[0][name], atol=1e-6, rtol=0)


def test_towers_without_checkpointing_are_refused_by_name(tiny_json: str) -> None:
    resnet = json.dumps(family("resnet").config)
    with pytest.raises(NotImplementedError, match=r"grad_checkpointing: the image tower ModifiedResNet cannot"):
        ClipModule(resnet, grad_checkpointing=True)
    # A frozen tower keeps no activations.
    module = ClipModule(resnet, grad_checkpointing=True, freeze="image")
    assert module.clip.model.transformer.grad_checkpointing is True
    text = ClipModule(tiny_json, grad_checkpointing=True, freeze="text").clip.model
    assert (text.visual.transformer.grad_checkpointing, text.transformer.grad_checkpointing) == (True, False)
