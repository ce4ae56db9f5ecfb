"""Fine-tuning as a LightningModule, from plain Python."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, family
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from matex_pl import ClipModule
from matex_pl.clip import load_clip
from matex_pl.data import ImageTextPair, PhantomDataModule, collate
from matex_pl.training.freeze import freeze_parameters
from matex_pl.training.loss import gathered_loss
from matex_pl.training.module import decay_groups, warmup_cosine
from matex_pl.training.scores import ImageTextRecall

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training ends after"),
    pytest.mark.filterwarnings("ignore:.*are longer than the model's"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def _trainer(path: Path, **settings: object) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, **{"max_epochs": 1, **quiet, **settings})


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_use_with_defaults(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ClipModule(tiny_json)
    before = {name: value.clone() for name, value in module.clip.model.named_parameters()}
    trainer = Trainer(max_epochs=2, accelerator="cpu")
    trainer.fit(module, tiny_images)
    assert {f"val/{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= set(
        trainer.callback_metrics
    )
    assert {"train/loss", "train/logit_scale", "val/loss", "val/zero_shot_top1", "val/zero_shot_auroc"} <= set(
        trainer.callback_metrics
    )
    assert all(not torch.equal(value, before[name]) for name, value in module.clip.model.named_parameters())
    assert module.clip.mean_image.isfinite().all()
    assert set(trainer.test(module, tiny_images, verbose=False)[0]) >= {"test/loss", "test/zero_shot_auroc"}
    rows = [row for batch in trainer.predict(module, tiny_images) for row in batch]
    assert [row["id"] for row in rows] == [pair.id for pair in tiny_images.pairs["test"]]
    assert set(rows[0]) == {"id", "phrase", "cosine", *tiny_images.findings}
    assert all(-1 <= row["cosine"] <= 1 for row in rows)


def test_scores_are_those_of_the_embeddings(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module = ClipModule(tiny_json)
    found = _trainer(tmp_path).validate(module, tiny_images, verbose=False)[0]
    batch = collate(list(tiny_images.dataset("val")))
    with torch.no_grad():
        image, text = module.eval()(batch)
    metric = ImageTextRecall()
    metric.update(image, text, batch["id"], batch["image_id"], batch["phrase"])
    for name, value in metric.compute().items():
        assert found[f"val/{name}"] == pytest.approx(float(value))


def test_loaders_without_a_data_module(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    tiny_images.setup("fit")
    loader = DataLoader(tiny_images.dataset("val"), batch_size=4, collate_fn=collate)
    module, trainer = ClipModule(tiny_json), _trainer(tmp_path)
    trainer.fit(module, loader, loader)
    assert "val/image_to_text_recall@1" in trainer.callback_metrics
    assert not any("zero_shot" in name for name in trainer.callback_metrics)
    assert module.clip.mean_image.isnan().all()
    named = ClipModule(tiny_json, findings=["edema", "pneumothorax"])
    assert "val/zero_shot_top1" in _trainer(tmp_path).validate(named, loader, verbose=False)[0]


def test_own_findings_and_prompts(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module = ClipModule(tiny_json, findings=["edema", "nodule"], prompt="There is {finding}.")
    module.eval()
    _trainer(tmp_path).validate(module, tiny_images, verbose=False)
    assert module.findings == ("edema", "nodule")
    with torch.no_grad():
        prompts = module.clip.encode_text(module.clip.tokenize(["There is edema.", "There is nodule."]))
    torch.testing.assert_close(module._prompts.clone(), prompts)


FROZEN = {
    "none": lambda name: False,
    "image": lambda name: name.startswith("visual."),
    "text": lambda name: not name.startswith("visual.") and name != "logit_scale",
    "all-but-projections": lambda name: name not in ("visual.proj", "text_projection", "logit_scale"),
}


@pytest.mark.parametrize("freeze", FROZEN)
def test_freeze_trains_the_rest_and_no_more(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, freeze: str
) -> None:
    module = ClipModule(tiny_json, freeze=freeze, lr=1e-3, warmup_steps=0)
    names = [name for name, _ in module.clip.model.named_parameters()]
    assert _trained(module.clip.model) == {name for name in names if not FROZEN[freeze](name)}
    before = {name: value.clone() for name, value in module.clip.model.named_parameters()}
    _trainer(tmp_path, max_steps=2, limit_val_batches=1).fit(module, tiny_images)
    changed = {name for name, value in module.clip.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == _trained(module.clip.model)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    module = ClipModule(json.dumps(family(name).config))
    images = module.clip.normalize(torch.rand(3, 3, *module.clip.image_size))
    phrases = ["left effusion", "small mass", "right lung"]
    image, text = module.clip.encode_image(images), module.clip.encode_text(module.clip.tokenize(phrases))
    gathered_loss(image, text, module.clip.logit_scale.exp(), phrases, logit_bias=module._bias).backward()
    trained = {part: value for part, value in module.clip.model.named_parameters() if value.requires_grad}
    # DDP would wait for one that has none.
    assert [part for part, value in trained.items() if value.grad is None] == []
    assert {part.split(".")[0] for part in trained} >= {"visual", "logit_scale"}


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(
    ("freeze", "image", "text"),
    [("none", True, True), ("image", False, True), ("text", True, False), ("all-but-projections", False, False)],
)
def test_frozen_towers_stay_in_eval_mode(
    tiny_json: str, freeze: str, image: bool, text: bool, custom_text: bool
) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["custom_text"] = custom_text
    module = ClipModule(json.dumps(config), freeze=freeze)
    model = module.clip.model
    for _ in range(2):
        assert {part.training for part in model.visual.modules()} == {image}
        transformer = model.text.transformer if custom_text else model.transformer
        assert {part.training for part in transformer.modules()} == {text}
        assert module.training
        module.eval()
        assert not any(part.training for part in module.modules())
        module.train()


def test_no_projection_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no projection by a known name"):
        freeze_parameters(nn.Linear(2, 2), "all-but-projections")


def test_decay_groups(tiny_json: str) -> None:
    model = load_clip(tiny_json).model
    model.visual.proj.requires_grad_(False)
    decayed, plain = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    no_decay = {names[id(parameter)] for parameter in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {"logit_scale", "ln_final.weight", "ln_final.bias", "visual.ln_pre.weight"} <= no_decay
    assert all(
        name.endswith("bias") or "ln_" in name or name in ("logit_scale", "visual.class_embedding") for name in no_decay
    )
    both = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert len(both) == len(set(both)) == len(names) - 1


def test_a_logit_scale_that_is_a_vector_is_not_decayed(tiny_json: str) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["custom_text"] = True
    config["model_cfg"]["nonscalar_logit_scale"] = True
    model = load_clip(json.dumps(config)).model
    assert any(parameter is model.logit_scale for parameter in decay_groups(model, 0.1)[1]["params"])


def test_warmup_and_cosine() -> None:
    factors = [warmup_cosine(step, 4, 12) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for step in range(4, 13):
        assert factors[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 4) / 8)))
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == factors[13] == 0
    assert warmup_cosine(0, 0, 10) == 1
    assert warmup_cosine(5, 5, 5) == 1


def test_learning_rate_over_a_run(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    rates = []

    class Rates(ClipModule):
        def on_train_batch_start(self, *_: object) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

    _trainer(tmp_path, max_steps=6, max_epochs=-1, limit_val_batches=0).fit(
        Rates(tiny_json, lr=0.01, warmup_steps=2), tiny_images
    )
    assert rates == pytest.approx([0.01 * warmup_cosine(step, 2, 6) for step in range(6)])


def test_training_without_an_end_and_long_warmup(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Set trainer\.max_epochs or trainer\.max_steps"):
        _trainer(tmp_path, max_epochs=-1).fit(ClipModule(tiny_json), tiny_images)
    with pytest.warns(UserWarning, match="ends after 2 steps, within its warm-up of 200"):
        _trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(ClipModule(tiny_json), tiny_images)


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(50)), (-3.0, 0.0), (2.0, 2.0)])
def test_logit_scale_is_clamped(tiny_json: str, start: float, end: float) -> None:
    module = ClipModule(tiny_json, max_logit_scale=50)
    with torch.no_grad():
        module.clip.logit_scale.fill_(start)
    module.on_train_batch_end()
    assert float(module.clip.logit_scale.detach()) == pytest.approx(end)


class LongPhrases(PhantomDataModule):
    """Phantoms whose first phrase of each split is as long as a report."""

    def list_pairs(self) -> list[ImageTextPair]:
        pairs = super().list_pairs()
        firsts = {pair.split: pair.id for pair in reversed(pairs)}.values()
        return [replace(pair, phrase="No effusion. " * 20 if pair.id in firsts else "Edema.") for pair in pairs]


@pytest.mark.filterwarnings("default:.*are longer than the model's")
def test_cut_phrases_are_reported_per_pair(tiny_json: str, image_root: Path, tmp_path: Path) -> None:
    sizes = {"num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4, "num_workers": 0}
    data = LongPhrases(root=str(image_root), **sizes)
    with pytest.warns(UserWarning, match="longer than the model's 16 tokens") as caught:
        _trainer(tmp_path, max_steps=1, limit_val_batches=1).fit(ClipModule(tiny_json), data)
    told = [str(warning.message) for warning in caught if "longer than the model's 16 tokens" in str(warning.message)]
    assert len(told) == 2
    for split, message in zip(("train", "val"), told, strict=True):
        assert message.startswith(f"1 of {len(data.pairs[split])} {split} phrases")
        assert message.endswith(f": {data.pairs[split][0].id}")


def test_short_phrases_are_not_reported(tiny_images: PhantomDataModule, tiny_json: str, tmp_path: Path) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["text_cfg"]["context_length"] = 77
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are longer than")
        _trainer(tmp_path).validate(ClipModule(json.dumps(config)), tiny_images, verbose=False)


def test_checkpoint_rebuilds_the_module_anywhere(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    start.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(start)
    Path("model.json").write_text(tiny_json, encoding="utf-8")
    torch.save(load_clip("model.json").model.state_dict(), "weights.pt")
    module = ClipModule("model.json", "weights.pt", betas=(0.9, 0.95), findings=["edema"], freeze="text")
    trainer = _trainer(start)
    trainer.fit(module, tiny_images)
    trainer.save_checkpoint(elsewhere / "last.ckpt")
    Path("model.json").unlink()
    Path("weights.pt").unlink()
    monkeypatch.chdir(elsewhere)
    stored = torch.load("last.ckpt", weights_only=True)
    assert {"freeze": "text", "findings": ["edema"], "pretrained": None}.items() <= stored["hyper_parameters"].items()
    again = ClipModule.load_from_checkpoint("last.ckpt", weights_only=True)
    state, others = module.state_dict(), again.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(state[name], others[name]) for name in state)
    assert again.clip.mean_image.isfinite().all()
    assert again.clip.config == module.clip.config
    assert _trained(again.clip.model) == _trained(module.clip.model)


def test_a_loaded_checkpoint_does_not_touch_the_random_numbers_of_a_new_run(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(ClipModule(tiny_json), tiny_images)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    draws = []

    class Draws(ClipModule):
        def on_train_batch_start(self, *_: object) -> None:
            draws.append(float(torch.rand(1)))

    for seed in (1, 2):
        module = Draws.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        torch.manual_seed(seed)
        _trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, tiny_images)
    assert draws[0] != draws[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_ends_as_an_uninterrupted_one(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, workers: int
) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
    tiny_images.num_workers = workers

    class SaveFirstEpoch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    torch.manual_seed(0)
    whole, resumed = (ClipModule(json.dumps(config), lr=1e-3, warmup_steps=1) for _ in range(2))
    _trainer(tmp_path, max_epochs=3, callbacks=[SaveFirstEpoch()]).fit(whole, tiny_images)
    trainer = _trainer(tmp_path, max_epochs=3)
    trainer.fit(resumed, tiny_images, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    state, others = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[name], others[name]) for name in state)


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped_as_by_lightning(
    tmp_path: Path, tiny_images: PhantomDataModule, tiny_json: str, algorithm: str | None
) -> None:
    class OfLightning(ClipModule):
        configure_gradient_clipping = LightningModule.configure_gradient_clipping

    found = []
    for kind in (ClipModule, OfLightning):
        torch.manual_seed(0)
        module = kind(tiny_json, lr=1e-3, warmup_steps=0)
        settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
        _trainer(tmp_path, max_steps=3, limit_val_batches=0, **settings).fit(module, tiny_images)
        found.append(torch.cat([value.detach().flatten() for value in module.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions_with_clipping(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path, precision: str
) -> None:
    module = ClipModule(tiny_json, freeze="none")
    trainer = _trainer(tmp_path, precision=precision, gradient_clip_val=1.0, limit_train_batches=2)
    trainer.fit(module, tiny_images)
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_size_of_the_data_module_is_checked_first(
    tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path
) -> None:
    tiny_images.image_size = (64, 64)
    with pytest.raises(ValueError, match=r"image_size is \(64, 64\), the model takes \(32, 32\)"):
        _trainer(tmp_path).fit(ClipModule(tiny_json), tiny_images)
    tiny_images.image_size = None
    _trainer(tmp_path, fast_dev_run=True).fit(ClipModule(tiny_json), tiny_images)


def test_no_validation_at_all(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    _trainer(tmp_path, limit_val_batches=0).fit(ClipModule(tiny_json), tiny_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"freeze": "vision"},
            "freeze must be one of none, text, image, .* got 'vision'",
        ),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": -1e-3}, "lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps not negative"),
        ({"max_logit_scale": 0.5}, "Give the factor, not its log"),
        ({"prompt": "an image"}, r"prompt must contain \{finding\}, got 'an image'"),
    ],
)
def test_bad_arguments_are_refused(tiny_json: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipModule(tiny_json, **arguments)
