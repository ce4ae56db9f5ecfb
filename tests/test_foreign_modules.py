"""The callbacks in LightningModules and with loaders that know nothing of this package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_wrap import clip_model, processor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap, Matex
from matex_pl.callbacks import AttributionMaps, AttributionMetrics, MapWriter, Reader, RoarPlus
from matex_pl.clip import Clip
from matex_pl.roar.finetune import read_module
from matex_pl.roar.foreign import module_of
from matex_pl.roar.images import PlanImages
from matex_pl.roar.plan import Protocol, Training, read_plan

SIDE, MEAN, STD = 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PHRASES = ("Left effusion.", "Right pneumothorax.", "Large heart.", "Nodule in the left upper lobe.", "Clear lungs.")


class Films(Dataset[dict[str, Any]]):
    """Dictionaries with names of their own."""

    def __init__(self, number: int, **more: Any) -> None:
        pixels = np.random.default_rng(0).random((number, 3, SIDE, SIDE), dtype=np.float32)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self.pixels = (torch.from_numpy(pixels) - mean) / std
        self.more = more

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        more = {name: part(index) for name, part in self.more.items()}
        return {"pixel_values": self.pixels[index], "caption": PHRASES[index % len(PHRASES)]} | more


VISION = {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def small_clip() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(16, VISION, TEXT)


class TheirModule(LightningModule):
    """A training of somebody else: two loaders, manual optimization, a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.ModuleDict({"clip": small_clip()})
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        clip = self.net["clip"]
        images = clip.encode_image(batch["pixel_values"], normalize=True)
        texts = clip.encode_text(self.tokenizer(batch["caption"]).to(self.device), normalize=True)
        return nn.functional.cross_entropy(10 * images @ texts.T, torch.arange(len(images), device=self.device))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("their_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Noting(Reader):
    """Notes the ids of the last batch that it read, once."""

    def __init__(self, *words: Any, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.ids: list[str] = []

    def read(self, *words: Any, **settings: Any) -> Any:
        batch = super().read(*words, **settings)
        if self.ids[-len(batch["id"]) :] != batch["id"]:
            self.ids += batch["id"]
        return batch


def their_reader(module: TheirModule, **changes: Any) -> Noting:
    settings = {"image": "pixel_values", "phrase": "caption", "normalized": True}
    return Noting("net.clip", module.tokenizer, mean=MEAN, std=STD, **settings | changes)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder, name="tb", version="0"),
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
        }
        | settings,
    )


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tb" / "0"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_a_training_of_somebody_else(tmp_path: Path) -> None:
    module = TheirModule()
    reader = their_reader(module)
    metrics = AttributionMetrics({"": "matex", "center": "center_map"}, num_batches=-1, reader=reader)
    loaders = [DataLoader(Films(7), batch_size=3), DataLoader(Films(4), batch_size=3)]
    run = trainer(tmp_path, AttributionMaps(num_pairs=5, reader=reader), metrics)
    before = small_clip().state_dict()
    run.fit(module, DataLoader(Films(6), batch_size=3), loaders)
    assert any(not torch.equal(before[name], value) for name, value in module.net["clip"].state_dict().items())
    logged = events(tmp_path)
    tags = logged.Tags()
    # The first five of the first loader, at both validations.
    assert sorted(tags["images"]) == [f"maps/matex/val0-{index}" for index in range(5)]
    assert len(logged.Images("maps/matex/val0-4")) == 2
    scalars = {tag for tag in tags["scalars"] if tag.startswith("attribution")}
    without_boxes = {"confidence_drop", "confidence_increase", "mean_map_mass", "border_mass"}
    assert {tag.split("/")[1] for tag in scalars if "center" in tag} == without_boxes
    assert {f"attribution/{name}" for name in (*without_boxes, "text_confidence_drop", "consistency_mean")} <= scalars
    # Running ids, the same at both validations.
    ids = [f"val{loader}-{index}" for loader, number in ((0, 7), (1, 4)) for index in range(number)]
    assert reader.ids[-11:] == reader.ids[-22:-11] == ids


def test_the_maps_are_those_of_the_model_at_each_validation(tmp_path: Path) -> None:
    module = TheirModule()
    reader = their_reader(module)
    films = Films(4, boxes=lambda index: torch.tensor([[0.1, 0.1, 0.6, 0.6]]))

    def boxed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = {name: [row[name] for row in rows] for name in rows[0]}
        return found | {"pixel_values": torch.stack(found["pixel_values"])}

    loader = DataLoader(films, batch_size=4, collate_fn=boxed)
    run = trainer(tmp_path, AttributionMetrics(Matex(), num_batches=-1, fill="blur", reader=reader))
    scores = run.validate(module, loader, verbose=False)[0]
    clip = reader.clip_of(module)
    batch = next(iter(loader))
    images, phrases = batch["pixel_values"], batch["caption"]
    maps = Matex().attribute(clip, images, clip.tokenize(phrases), phrases)
    assert scores["attribution/mean_map_mass"] == pytest.approx(float(maps.image.mean()), abs=1e-5)
    peaks = maps.image.flatten(1).argmax(1)
    rows, columns = (peaks // SIDE + 0.5) / SIDE, (peaks % SIDE + 0.5) / SIDE
    inside = (rows > 0.1) & (rows < 0.6) & (columns > 0.1) & (columns < 0.6)
    assert scores["attribution/pointing_game"] == pytest.approx(float(inside.float().mean()))


def test_maps_of_foreign_pairs_are_written_once(tmp_path: Path) -> None:
    module = TheirModule()
    loader = DataLoader(Films(5), batch_size=2)
    for _ in range(2):
        writer = MapWriter(CenterMap(), str(tmp_path / "maps"), their_reader(module))
        trainer(tmp_path, writer).predict(module, loader, return_predictions=False)
        assert writer.store is not None
        assert len(writer.store) == 5


class Stream(IterableDataset[dict[str, Any]]):
    """Films without a length."""

    def __iter__(self) -> Any:
        films = Films(5)
        return (films[index] for index in range(5))


def test_a_loader_without_a_length_and_batches_of_another_form(tmp_path: Path) -> None:
    module = TheirModule()
    reader = their_reader(module, image=0, phrase=1, batch=lambda batch: list(batch.values()))
    metrics = AttributionMetrics(CenterMap(), num_batches=-1, reader=reader)
    maps = AttributionMaps(CenterMap(), num_pairs=3, reader=reader)
    trainer(tmp_path, maps, metrics).validate(module, DataLoader(Stream(), batch_size=2), verbose=False)
    assert reader.ids == [f"val-{index}" for index in range(5)]
    assert len(events(tmp_path).Tags()["images"]) == 3


def test_pairs_are_named_and_survive_a_resume(tmp_path: Path) -> None:
    module = TheirModule()
    loader = DataLoader(Films(6, name=lambda index: f"film {index}"), batch_size=2)
    first = AttributionMaps(CenterMap(), num_pairs=2, reader=their_reader(module, id="name"))
    run = trainer(tmp_path / "a", first, max_epochs=1)
    first.chosen = {"val": ["film 3", "film 4"]}
    run.fit(module, loader, loader)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = AttributionMaps(CenterMap(), num_pairs=2, reader=their_reader(module, id="name"))
    trainer(tmp_path / "b", again).fit(module, loader, loader, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert again.chosen == {"val": ["film 3", "film 4"]}
    assert sorted(events(tmp_path / "b").Tags()["images"]) == ["maps/matex/film 3", "maps/matex/film 4"]
    gone = AttributionMaps(CenterMap(), pair_ids=["film 9"], reader=their_reader(module, id="name"))
    with pytest.warns(UserWarning, match="the loader has no pairs film 9"):
        trainer(tmp_path / "c", gone).validate(module, loader, verbose=False)


class TransformersModule(LightningModule):
    """A training of transformers' own model by its own loss, on batches of its processor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = clip_model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch, return_loss=True).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch, return_loss=True).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_training_of_transformers(tmp_path: Path) -> None:
    words = processor()
    pixels = np.random.default_rng(1).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8)

    def collate(rows: list[int]) -> Any:
        texts = [PHRASES[row] for row in rows]
        images = [pixels[row] for row in rows]
        return words(text=texts, images=images, return_tensors="pt", padding="max_length", max_length=16)

    loader = DataLoader(range(4), batch_size=2, collate_fn=collate)
    module = TransformersModule()
    # The lines of the documentation.
    page = Path(__file__).parents[1] / "docs" / "guides" / "callbacks.md"
    (lines,) = (
        block for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S) if "Reader(" in block
    )
    assert len(lines.splitlines()) <= 13
    made: dict[str, Any] = {"module": module, "train_loader": loader, "val_loader": loader, "processor": words}
    made["Trainer"] = lambda callbacks, max_epochs: trainer(tmp_path, *callbacks)
    exec(lines, made)
    run = made["trainer"]
    assert sorted(events(tmp_path).Tags()["images"]) == [f"maps/matex/val-{index}" for index in range(4)]
    # The maps are those of the trained weights, under the phrases of the ids.
    clip = Clip.wrap(module.model, words)
    batches = [words.image_processor(list(pixels), return_tensors="pt").pixel_values, PHRASES[:4]]
    maps = Matex.recommended().attribute(
        clip, batches[0], clip.tokenize(batches[1]), [phrase.lower() for phrase in batches[1]]
    )
    logged = run.callback_metrics
    assert float(logged["attribution/mean_map_mass"]) == pytest.approx(float(maps.image.mean()), abs=1e-4)
    assert float(logged["attribution/consistency_min"]) == pytest.approx(
        float(maps.parts["consistency"].min()), abs=1e-4
    )


QUICK = {
    "methods": ["chefer"],
    "protocol": Protocol(modalities=["image"], fractions=[0.5], repeats=1, num_pairs=8),
    "training": Training(epochs=1, batch_size=2, warmup_steps=0),
}


def test_remove_and_retrain_in_a_training_of_somebody_else(tmp_path: Path) -> None:
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    preprocess = {"mean": MEAN, "std": STD, "size": SIDE}
    module = TheirModule()
    described = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    roar = RoarPlus(**QUICK, reader=their_reader(module), architecture=described)  # type: ignore[arg-type]
    films = Films(
        9, boxes=lambda index: torch.tensor([[0.1, 0.1, 0.6, 0.6]]), patient_id=lambda index: f"p{index // 2}"
    )

    def boxed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = {name: [row[name] for row in rows] for name in rows[0]}
        return found | {"pixel_values": torch.stack(found["pixel_values"])}

    loader = DataLoader(films, batch_size=4, collate_fn=boxed)
    trainer(tmp_path, roar, max_epochs=1).fit(module, loader, loader)
    tags = events(tmp_path).Tags()["scalars"]
    assert {"roar/image/Chefer", "roar/image/True_boxes"} <= set(tags)
    plan = read_plan(tmp_path / "tb" / "0" / "roar")
    assert (plan.about["data"]["pairs"], plan.about["data"]["patients"], plan.about["data"]["boxed"]) == (8, 4, 8)
    # The plan's images and weights are those of the training.
    images = PlanImages(plan.folder)
    gray = (films.pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).mean(1) * 255
    np.testing.assert_allclose(images.batch([3])["image"][0, 0], gray[3].round(), atol=1)
    explained = read_module(plan.folder / "explained.safetensors", ClipModule)
    torch.testing.assert_close(explained.clip.model.state_dict(), module.net["clip"].state_dict(), rtol=0, atol=0)


def test_remove_and_retrain_of_a_model_of_transformers(tmp_path: Path) -> None:
    module, words = TransformersModule(), processor()
    reader = Reader("model", words, image="pixel_values", phrase="input_ids", normalized=True)
    clip = reader.clip_of(module)
    copied = module_of(clip)
    images = clip.normalize(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert copied.clip.tokenize(list(PHRASES)).tolist() == clip.tokenize(list(PHRASES)).tolist()
    with torch.no_grad():
        torch.testing.assert_close(copied.clip.encode_image(images), clip.encode_image(images), atol=1e-5, rtol=0)
        tokens = clip.tokenize(list(PHRASES))
        torch.testing.assert_close(copied.clip.encode_text(tokens), clip.encode_text(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(copied.clip.mean, clip.mean)


def test_models_that_cannot_be_trained_again_are_refused(tmp_path: Path) -> None:
    module = TheirModule()
    loader = DataLoader(Films(4), batch_size=2)
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    quick = json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, "size": SIDE}})
    unknown, wrong = r"RoarPlus\(architecture='ViT-B-32'\)", "not of the architecture 'RN50'"
    for architecture, message in ((None, unknown), ("RN50", wrong), (quick, "computes other embeddings")):
        reader = their_reader(module)
        roar = RoarPlus(**QUICK, reader=reader, architecture=architecture, start="after")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, roar).fit(module, loader, loader)
    with pytest.raises(TypeError, match=r"RoarPlus\(reader=Reader\(\.\.\.\)\)"):
        trainer(tmp_path, RoarPlus(**QUICK)).fit(module, loader, loader)  # type: ignore[arg-type]


def test_ids_findings_patients_and_boxes_of_other_types(tmp_path: Path) -> None:
    module = TheirModule()
    reader = their_reader(module, id="name")
    films = Films(4, name=lambda i: 10 + i, patient_id=lambda i: i // 2, finding=lambda i: i % 2)
    batch = next(iter(DataLoader(films, batch_size=4)))
    batch["boxes"] = [torch.zeros(0), [[0.1, 0.2, 0.3, 0.4]], [], torch.zeros(0, 4)]
    run = trainer(tmp_path)
    found = reader.read(run, module, batch)
    assert found["id"] == ["10", "11", "12", "13"]
    assert (found["patient_id"], found["finding"]) == (["0", "0", "1", "1"], ["0", "1", "0", "1"])
    assert [tuple(box.shape) for box in found["boxes"]] == [(0, 4), (1, 4), (0, 4), (0, 4)]
    with pytest.raises(ValueError, match=r"have the id '7'"):
        reader.read(run, module, batch | {"name": torch.tensor([7, 8, 9, 7])})
    for boxes in ([[1.0, 2.0]] * 4, [[[10.0, 20.0, 30.0, 40.0]]] * 4):
        with pytest.raises(ValueError, match=r"Boxes must be \(K, 4\)"):
            reader.read(run, module, batch | {"boxes": boxes})


def test_another_loader_gets_panels_of_its_own(tmp_path: Path) -> None:
    module = TheirModule()
    loaders = [DataLoader(Films(2, name=lambda i, s=start: f"film {s + i}"), batch_size=2) for start in (0, 5)]
    maps = AttributionMaps(CenterMap(), num_pairs=2, reader=their_reader(module, id="name"))
    for place, loader in enumerate(loaders):
        trainer(tmp_path / str(place), maps).validate(module, loader, verbose=False)
        maps.chosen.clear()
        names = {f"maps/matex/film {5 * place + row}" for row in range(2)}
        assert set(events(tmp_path / str(place)).Tags()["images"]) == names
    # Pairs of a checkpoint that are gone are chosen again.
    maps.chosen = {"val": ["film 0", "film 1"]}
    with pytest.warns(UserWarning, match="It chooses others at the next validation"):
        trainer(tmp_path / "again", maps, max_epochs=2).fit(module, loaders[1], loaders[1])
    assert set(events(tmp_path / "again").Tags()["images"]) == {"maps/matex/film 5", "maps/matex/film 6"}


REFUSED = {
    "clip": ({"clip": "model"}, r"TheirModule has no 'model', .* Say where it is: Reader\(clip='net.clip'\)"),
    "tokenizer": ({"tokenizer": None}, "needs a tokenizer"),
    "mean": ({"mean": None}, "The mean of the images is missing"),
    "image": ({"image": "image"}, "no images at 'image': it holds 'pixel_values', 'caption'"),
    "phrase": ({"phrase": "report"}, r"no phrases at 'report'.*Reader\(phrase=\.\.\.\)"),
    "position": ({"image": 0}, "no images at 0"),
    "normalized": ({"normalized": None}, r"Reader\(normalized=True\)"),
    "ids": ({"phrase": "pixel_values"}, "token ids"),
}


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path, kind: str, sanity: int) -> None:
    module = TheirModule()
    changes, message = REFUSED[kind]
    settings = {"clip": "net.clip", "tokenizer": module.tokenizer, "mean": MEAN, "std": STD}
    settings |= {"image": "pixel_values", "phrase": "caption", "normalized": True}
    reader = Reader(**settings | changes)  # type: ignore[arg-type]
    loader = DataLoader(Films(4), batch_size=2)
    for callback in (AttributionMaps(reader=reader), AttributionMetrics(reader=reader)):
        run = trainer(tmp_path, callback, num_sanity_val_steps=sanity)
        with pytest.raises(ValueError, match=message):
            run.fit(module, loader, loader)
        assert run.global_step == 0
