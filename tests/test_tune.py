"""`matex tune`: objectives are the metrics of the benchmark, and the winner is the best setting on validation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap, Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.benchmark.bench import BenchmarkRun, Settings
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.cli import main
from matex_pl.clip import Clip
from matex_pl.data import ImageTextPair, PhantomDataModule
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.compared import MethodEntry, compared_rows
from matex_pl.evaluation.pairs import choose_pairs, model_inputs, prepare_data, read_pairs
from matex_pl.metrics import functional as F
from matex_pl.training import load_module
from matex_pl.tune import tune_matex
from matex_pl.tune.outcome import describe

TINY = Path(__file__).with_name("tiny.json")
PHANTOMS = {"num_train": 12, "num_val": 8, "num_test": 8, "stored_size": 96, "batch_size": 4, "num_workers": 0}
AXES = ("grad_layers", "flow", "flow_layers", "consistency_of", "prior_shape", "lambda_s", "lambda_c", "tau")
# Eight settings, six pairs.
SMALL: dict[str, Any] = {"lambda_s": [1.5, 3.5], "lambda_c": [0.2, 0.6], "tau": [0.2, 2.0], "num_pairs": 6}
SETTING: dict[str, Any] = {"lambda_s": 3.5, "lambda_c": 0.6, "tau": 2.0}


class Boxed(PhantomDataModule):
    """Only pairs with boxes, which the benchmark prefers."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [pair for pair in super().list_pairs() if pair.boxes]


class Boxless(PhantomDataModule):
    """Pairs without boxes."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [replace(pair, boxes=()) for pair in super().list_pairs()]


class Blind(Boxed):
    """No place of the thorax."""

    def thorax(self) -> None:  # type: ignore[override]
        return None

    def read_masks(self, pair: Any) -> dict[str, Any]:
        return {}


class Placeless(Boxed):
    """Phrases that name no place."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [replace(pair, phrase="nodule") for pair in super().list_pairs()]


class SidelessTest(Boxed):
    """Phrases that name a side on validation pairs alone."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [replace(s, phrase="nodule" if s.split == "test" else "left mass") for s in super().list_pairs()]


class OnePatient(Boxed):
    """One patient in each split."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [replace(pair, patient_id=pair.split) for pair in super().list_pairs()]


class LowerLeft(Boxed):
    """One finding, in the lower left lung."""

    def list_pairs(self) -> list[ImageTextPair]:
        told = {"phrase": "left lower lobe consolidation", "boxes": ((48.0, 58.0, 96.0, 96.0),)}
        return [replace(pair, **told) for pair in super().list_pairs()]


class Speck(LowerLeft):
    """The same as a box of 3 x 3 pixels of the image, one of the model."""

    def list_pairs(self) -> list[ImageTextPair]:
        return [replace(pair, boxes=((80.0, 80.0, 83.0, 83.0),)) for pair in super().list_pairs()]


class Planted(Matex):
    """MATEX with a gradient whose peak lies in the upper right lung."""

    peak = 5.0

    def attribute(self, *arguments: Any, **named: Any) -> Any:
        maps = super().attribute(*arguments, **named)
        grad = torch.ones_like(maps.parts["grad_blocks"])
        grad[..., 0, 0], grad[..., 0, 1] = self.peak, 0.0
        flat = torch.ones_like(maps.parts["attention_layers"])
        maps.parts |= {"grad_blocks": grad, "attention_layers": flat}
        return maps


class Towering(Planted):
    """The same with a peak that no prior overcomes."""

    peak = 50.0


class NoWork(Matex):
    """Refuses to explain."""

    def attribute(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("Work began.")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def phantoms(images: Path, kind: type[PhantomDataModule] = PhantomDataModule) -> PhantomDataModule:
    return kind(root=str(images), **PHANTOMS)


def train(name: str, images: Path, path: Path) -> str:
    torch.manual_seed(0)
    run = Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(ClipModule(name, lr=1e-3, warmup_steps=0), phantoms(images))
    run.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def ckpt_path(images: Path) -> str:
    return train(str(TINY), images, images / "tiny.ckpt")


@pytest.fixture(scope="module")
def wide(images: Path) -> str:
    """A checkpoint whose frame is not square: the square images have a border on both sides."""
    model = json.loads(TINY.read_text(encoding="utf-8"))
    model["vision_cfg"]["image_size"] = [32, 48]
    return train(json.dumps(model), images, images / "wide.ckpt")


Tune = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def tune(images: Path, ckpt_path: str, tmp_path: Path) -> Tune:
    """The text and the content of `tune.json`."""

    def run(
        kind: type[PhantomDataModule] = PhantomDataModule, out: str = "out", ckpt: str = ckpt_path, **settings: Any
    ) -> tuple[str, dict[str, Any]]:
        text = tune_matex(phantoms(images, kind), ckpt, str(tmp_path / out), **SMALL | settings)
        return text, json.loads((tmp_path / out / "tune.json").read_text(encoding="utf-8"))

    return run


def read(
    ckpt_path: str, data: PhantomDataModule, split: str, number: int, **chosen: bool
) -> tuple[Clip, ImageTextBatch]:
    """The model and the pairs as one batch."""
    clip = load_module(ckpt_path).clip
    prepare_data(data, clip.image_size, split)
    (batch,) = read_pairs(data, split, choose_pairs(data, split, number, 0, **chosen), 99)
    return clip, batch


# --- the scores


@pytest.fixture(scope="module")
def benched(images: Path, ckpt_path: str) -> dict[str, Any]:
    """Scores of `matex benchmark` for the validation pairs, under the method's own setting and another."""
    settings = Settings("val", -1, 8, 99, 3, "quick", 16, 100, 0)
    bench = BenchmarkRun.open(load_module(ckpt_path).clip, phantoms(images, Boxed), images / "bench", settings)
    methods = {"own": Matex.recommended(), "setting": Matex.recommended(**SETTING)}
    return {name: bench.score(MethodEntry(name, method)) for name, method in methods.items()}


def benchmark_score(scored: Any, name: str) -> float:
    values = scored.values["text" if name.startswith("text_") else "image"]
    if name == "ap50":
        return float(values.detections.score())
    filled = name.startswith(("confidence", "top20_removal", "insertion", "deletion")) and "/" not in name
    sums = values.sums[f"{name}/mean_image" if filled else name.removeprefix("text_")]
    # The denominator of a curve's area is the same under every setting.
    return float(sums.above.mean() if name.startswith(("insertion", "deletion")) else sums.score())


NEED_BOXES = ["pointing_game", "cnr", "miou", "energy_pointing_game", "relevance_rank_accuracy", "iou", "acc50", "ap50"]
HIGHER = [*NEED_BOXES, "side_sensitivity"]
HIGHER += [
    "confidence_increase",
    "confidence_increase@50/mean_color",
    "top20_removal",
    "top20_removal/mean_color",
    "insertion",
]
HIGHER += ["text_confidence_increase", "text_confidence_increase@50", "text_top20_removal"]
LOWER = ["outside_thorax_mass", "mean_map_mass", "prompt_sensitivity", "sanity", "confidence_drop/mean_color"]
LOWER += ["confidence_drop", "confidence_drop@50", "deletion/mean_color"]
LOWER += ["text_mean_map_mass", "text_sanity", "text_confidence_drop", "text_confidence_drop@50"]
LOWER += ["text_mean_map_mass/words", "text_sanity/words", "text_confidence_drop/words"]


@pytest.mark.parametrize("name", [*HIGHER, *LOWER])
def test_objectives_are_the_metrics_of_the_benchmark(
    images: Path,
    ckpt_path: str,
    tmp_path: Path,
    benched: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    at_threshold = name in ("iou", "acc50", "ap50")
    # Pixels at the edge of a frame are equal but for rounding, which batches of another size than the benchmark's
    # change, and with it the highest fifth.
    batch_size = 3 if name.startswith("top20_removal") else 4
    objective = f"{name}/{benched['setting'].values['image'].threshold}" if at_threshold else name
    words = ["tune", f"--data={Boxed.__module__}.Boxed", f"--ckpt_path={ckpt_path}", f"--out={tmp_path}"]
    words += [f"--data.{key}={value}" for key, value in {"root": images, **PHANTOMS}.items()]
    words += [f"--objective={objective}", "--num_pairs=-1", f"--batch_size={batch_size}", "--raster=32"]
    main([*words, *(f"--{key}=[{value}]" for key, value in SETTING.items())])
    result = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    (setting,) = result["settings"]
    (exact,) = (row for row in result["on_all_pixels"] if all(row[name] == setting[name] for name in AXES))
    expected = benchmark_score(benched["setting"], name)
    assert exact["score"] == pytest.approx(expected, abs=1e-5)
    # A raster of 32 has all pixels of this model.
    assert setting["score"] == pytest.approx(expected, abs=1e-5)
    # The benchmark finds boxes of the own setting at another threshold.
    if not at_threshold:
        assert result["validation"]["own"] == pytest.approx(benchmark_score(benched["own"], name), abs=1e-5)
    better = max if name in HIGHER else min
    assert result["validation"]["winner"] == better(row["score"] for row in result["on_all_pixels"])
    assert f"{'higher' if name in HIGHER else 'lower'} is better" in capsys.readouterr().out
    gain = result["test"]["difference"]
    assert gain["value"] == pytest.approx(result["test"]["winner"] - result["test"]["own"], abs=1e-7)
    assert gain["low"] <= gain["value"] <= gain["high"]


FUSIONS: list[dict[str, Any]] = [
    {},
    {"fusion": "product"},
    {"fuse_at": "grid"},
    {"alpha": 0.1, "beta": 0.7, "delta": 0.9, "kappa": 1.0, "laterality": "paper"},
]


@pytest.mark.parametrize("settings", FUSIONS, ids=str)
@pytest.mark.parametrize("name", ["cnr", "border_mass", "outside_thorax_mass"])
def test_settings_are_compared_on_fused_maps_of_the_raster(
    images: Path, wide: str, tune: Tune, name: str, settings: dict[str, Any]
) -> None:
    axes = {"grad_layers": [1, 2], "prior_shape": ["gaussian", "plateau"]}
    method = Matex(**settings, grad_layers=1)
    text, result = tune(Boxed, ckpt=wide, method=method, objective=name, raster=24, **axes)
    assert "32 settings on a raster of 16 x 24 took" in text
    assert result["raster"] == [16, 24]
    clip, batch = read(wide, phantoms(images, Boxed), "val", 6, boxed=name == "cnr")
    maps = Matex(**settings, grad_layers=2).attribute(
        clip, *model_inputs(clip, batch), batch["phrase"], batch["content_box"]
    )
    y, x = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(24) + 0.5) / 24, indexing="ij")
    for row in result["settings"][:: 1 if name == "cnr" else 7]:
        image = Matex.fuse(maps.parts | {"size": (16, 24)}, **method.settings | {key: row[key] for key in AXES}).image
        if name == "cnr":
            inside = [
                sum((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1) for x0, y0, x1, y1 in boxes) > 0
                for boxes in batch["boxes"]
            ]
            values = F.contrast_to_noise(image, torch.stack(inside))
        elif name == "border_mass":
            # The image lies between 1/6 and 5/6 of the frame, its border is a tenth of it.
            inner = ((x - 0.5).abs() < 0.8 / 3) & ((y - 0.5).abs() < 0.4)
            values = (image * ~inner).sum((1, 2)) / image.sum((1, 2))
        else:
            zone = F.thorax_zone(batch["masks"], batch["image"][:, 0], phantoms_thorax(images, clip))
            cells = zone.float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
            values = (image * (cells <= 0.5)).sum((1, 2)) / image.sum((1, 2))
        assert row["score"] == pytest.approx(float(values.nanmean()), abs=1e-5)


def phantoms_thorax(images: Path, clip: Clip) -> Tensor:
    data = phantoms(images)
    data.image_size = clip.image_size
    return data.thorax()


def test_a_box_smaller_than_a_raster_cell_counts(tune: Tune) -> None:
    _, result = tune(Speck, method=Planted(), objective="energy_pointing_game", raster=5)
    assert result["raster"] == [5, 5]
    assert all(row["score"] > 0 for row in result["settings"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "confidence_drop",
            "The objective confidence_drop runs the model: 8 settings of 6 pairs take 48 forwards of the image tower",
        ),
        ("insertion", "8 settings of 6 pairs take 720 forwards of the image tower"),
        ("text_confidence_drop@50", "4 settings of 6 pairs take 24 forwards of the text tower"),
    ],
)
def test_forwards_are_announced(tune: Tune, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    text, result = tune(objective=name)
    assert said in capsys.readouterr().err
    assert "on a raster" not in text
    scores = [result["validation"]["own"], *(row["score"] for row in result["settings"])]
    assert result["validation"]["winner"] == (max if name == "insertion" else min)(scores)
    assert len(set(scores)) > 1


def test_a_confidence_drop_is_that_of_the_model(images: Path, ckpt_path: str, tune: Tune) -> None:
    _, result = tune(objective="confidence_drop")
    clip, batch = read(ckpt_path, phantoms(images), "val", 6, boxed=False)
    pixels, tokens = model_inputs(clip, batch)
    fill = clip.normalize(clip.mean_image.expand(1, 3, -1, -1))
    for row in (result["settings"][0], result["settings"][-1]):
        method = Matex.recommended(**{name: row[name] for name in ("lambda_s", "lambda_c", "tau")})
        maps = method.attribute(clip, pixels, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]).image[
            :, None
        ]
        with torch.no_grad():
            kept = clip.similarity(pixels * maps + fill * (1 - maps), tokens)
            drop = 100 * (clip.similarity(pixels, tokens) - kept).clamp(min=0)
        assert row["score"] == pytest.approx(float(drop.mean()), abs=1e-4)


def test_the_ends_of_curves_are_computed_once(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [0], Clip.encode_image

    def count(self: Clip, images: Tensor) -> Tensor:
        encoded[0] += len(images)
        return encode(self, images)

    monkeypatch.setattr(Clip, "encode_image", count)
    numbers = []
    for taus in ([0.2], [0.2, 0.4, 2.0]):
        encoded[0] = 0
        tune(objective="insertion/mean_color", method=Matex(lambda_s=1.5, lambda_c=0.2, tau=0.2), tau=taus)
        numbers.append(encoded[0])
    # Four settings and the test pairs under a winner, then twelve: 15 forwards each of six pairs.
    assert numbers[1] - numbers[0] == 8 * 15 * 6


# --- the choice


def test_the_search_finds_the_strength_that_a_peak_asks_for(tune: Tune) -> None:
    method = {"fusion": "product", "lambda_s": 1.5, "lambda_c": 0.35, "tau": 0.2}
    axes = {"lambda_s": [1.5, 2.0, 2.5, 3.0, 3.5], "lambda_c": [0.35], "tau": [0.2]}
    # The prior counts squared: 2.5 lifts by 6.25.
    _, result = tune(LowerLeft, method=Planted(**method), **axes, raster=32)
    assert [row["score"] for row in result["settings"]] == [0, 0, 1, 1, 1]
    # Of equal scores the nearest to the method's own.
    assert result["winner"]["lambda_s"] == 2.5
    assert (result["validation"]["own"], result["validation"]["winner"]) == (0, 1)
    assert any(row["lambda_s"] == 1.5 for row in result["on_all_pixels"])
    # With a peak that no prior overcomes, all are equal, and the own one stays.
    text, result = tune(LowerLeft, method=Towering(**method), **axes)
    assert result["winner"] == result["own"]
    assert "Tuning gained nothing" in text


def test_a_setting_off_the_grid_may_stay_the_best(tune: Tune) -> None:
    method = Planted(fusion="product", lambda_s=3.1)
    _, result = tune(LowerLeft, method=method, lambda_s=[1.5, 2.0], lambda_c=[0.35], tau=[0.2])
    assert result["winner"] == result["own"] == method.settings
    assert all(row["lambda_s"] < 3 for row in result["settings"])


def test_of_equal_scores_the_nearest_comes_first(tune: Tune) -> None:
    """A difference counts as a share of the range of the values, in blocks for `grad_layers`; another shape is 1."""
    method = Towering(fusion="product", grad_layers=2, text_grad_layers=1, lambda_s=2.0)
    axes = {"lambda_s": [2.0, 3.0, 6.0], "prior_shape": ["parabola", "gaussian"], "lambda_c": [0.35], "tau": [0.2]}
    _, result = tune(LowerLeft, method=method, **axes)
    steps = [(row["prior_shape"] == "gaussian") + (row["lambda_s"] - 2) / 4 for row in result["on_all_pixels"]]
    assert steps == [0, 0.25, 1, 1, 1.25, 2]
    axes = {"lambda_s": [2.0, 3.0, 4.0], "grad_layers": [1, 2], "lambda_c": [0.35], "tau": [0.2]}
    _, result = tune(LowerLeft, method=method, **axes)
    steps = [(2 - row["grad_layers"]) + (row["lambda_s"] - 2) / 2 for row in result["on_all_pixels"]]
    assert steps == [0, 0.5, 1, 1, 1.5, 2]


@pytest.mark.parametrize(
    ("method", "tried", "left"),
    [
        # Two blocks: 2 and 99 are all of them, and the method's own word for that stays.
        (
            Matex(grad_layers="all", text_grad_layers=1),
            {"grad_layers": [99, 1, 2], "lambda_s": [3, 2, 2.0], "prior_shape": ["gaussian"], "lambda_c": None},
            {"grad_layers": [1, "all"], "lambda_s": [2.0, 3.0], "prior_shape": ["gaussian"], "lambda_c": [0.2, 0.6]},
        ),
        (
            Matex(grad_layers="all", skip_layers=1),
            {"grad_layers": [1, 2], "lambda_s": [2.0]},
            {"grad_layers": [1, "all"], "lambda_s": [2.0]},
        ),
        (Matex(flow="rollout"), {}, {"tau": [0.2], "grad_layers": [3], "prior_shape": ["parabola"]}),
        (
            Matex(flow_layers=2),
            {"flow": ["relevance", "rollout", "relevance"], "flow_layers": [9, 1, "all"], "lambda_s": [2.0]},
            {"tau": [0.2], "flow": ["relevance", "rollout"], "flow_layers": [1, 2], "consistency_of": ["attention"]},
        ),
        (Matex(beta=0.0), {"flow": ["sum", "relevance"], "lambda_s": [2.0]}, {"tau": [0.2], "flow": ["sum"]}),
        (Matex(grad_layers=2, beta=0.0), {"grad_layers": [1, 2]}, {"tau": [0.2], "grad_layers": [1, 2]}),
        (Matex(knowledge_prior=True), {}, {"lambda_s": [1.5, 3.5], "tau": [0.2, 2.0]}),
    ],
)
def test_each_value_with_an_effect_is_tried_once(
    tune: Tune, method: Matex, tried: dict[str, Any], left: dict[str, Any]
) -> None:
    given = {name: values for name, values in tried.items() if values is not None}
    _, result = tune(method=method, objective="cnr", **given)
    assert {name: result["tried"][name] for name in left} == left
    assert result["varied"] == [name for name, values in result["tried"].items() if len(values) > 1]
    assert len(result["settings"]) == np.prod([len(values) for values in result["tried"].values()])


def test_flows_are_compared_from_the_same_components(ckpt_path: str, images: Path, tune: Tune) -> None:
    axes = {
        "flow": ["sum", "rollout", "relevance"],
        "flow_layers": [1, 2],
        "consistency_of": ["attention", "relevance"],
    }
    method = Matex(beta=1.0, grad_layers=1)
    _, result = tune(objective="energy_pointing_game", method=method, lambda_s=[2.0], lambda_c=[0.6], tau=[0.2], **axes)
    clip, batch = read(ckpt_path, phantoms(images, Boxed), "val", 6)
    masks = F.box_masks(batch["boxes"], clip.image_size)
    scores = {}
    for row in result["settings"]:
        one = Matex(**method.settings | {name: row[name] for name in AXES})
        maps = one.attribute(
            clip, *model_inputs(clip, batch), batch["phrase"], batch["content_box"], batch["chest_box"]
        )
        # The raster of 56 points is finer than the image.
        expected = float(F.energy_pointing_game(maps.image, masks).nanmean())
        assert row["score"] == pytest.approx(expected, abs=1e-5)
        scores[row["flow"], row["flow_layers"], row["consistency_of"]] = row["score"]
    assert len(scores) == 12
    # A rollout of one block is half of its attention row, which the norm of the map does not see.
    assert len({round(score, 5) for score in scores.values()}) == 10


def test_one_setting_gains_nothing(tune: Tune) -> None:
    text, result = tune(lambda_s=[2.5], lambda_c=[0.35], tau=[0.2])
    assert "gained nothing" in text
    assert result["winner"] == result["own"]
    assert result["test"]["difference"]["value"] == 0


@pytest.mark.parametrize(("layers", "number"), [(None, 8), (2, 4)])
def test_words_are_tuned_without_the_prior(tune: Tune, layers: int | None, number: int) -> None:
    method = Matex(text_grad_layers=layers)
    text, result = tune(objective="text_mean_map_mass", method=method, grad_layers=[1, 2])
    assert "lambda_s: words have no place" in text
    assert {row["lambda_s"] for row in result["settings"]} == {2.5}
    assert len(result["settings"]) == number
    assert len({row["score"] for row in result["settings"]}) == number


@pytest.mark.parametrize("setting", [{"lambda_s": 1.0}, {"delta": 0.0}], ids=str)
def test_words_are_tuned_with_the_prior_off(tune: Tune, setting: dict[str, float]) -> None:
    _, result = tune(method=Matex(**setting), objective="text_mean_map_mass")
    assert result["own"] == Matex(**setting).settings
    assert len({row["score"] for row in result["settings"]}) == 4


def test_a_prior_without_a_place_is_not_tuned(tune: Tune) -> None:
    """And the text has the reason."""
    shapes = {"prior_shape": ["gaussian", "parabola"]}
    text, result = tune(Placeless, objective="cnr", **shapes)
    reason = "no phrase of the validation pairs names a place"
    assert f"lambda_s: {reason}; prior_shape: {reason}" in text
    assert {(row["lambda_s"], row["prior_shape"]) for row in result["settings"]} == {(2.5, "parabola")}
    assert len(result["settings"]) == 4


# --- the files and the text


def test_the_command_writes_what_it_found(images: Path, ckpt_path: str, tmp_path: Path, tune: Tune) -> None:
    # In a tower of two blocks: without the first one, both numbers would be the same setting.
    own = Matex.recommended(skip_layers=0)
    text, result = tune(method=own, grad_layers=[1, 2], prior_shape=["gaussian", "parabola"], out="new/tuned")
    out = tmp_path / "new" / "tuned"
    assert sorted(path.name for path in out.iterdir()) == ["surface.png", "surface.svg", "tune.json", "tuned.yaml"]
    assert len(result["settings"]) == 32
    assert "validation (used for the selection)" in text
    assert str(out / "tuned.yaml") in text
    tuned = load_method(str(out / "tuned.yaml"))
    assert isinstance(tuned, Matex)
    assert tuned.settings == result["winner"]
    assert result["own"] == own.settings
    for split, part in (("val", "validation"), ("test", "test")):
        clip, batch = read(ckpt_path, phantoms(images), split, 6)
        masks = F.box_masks(batch["boxes"], clip.image_size)
        for name, method in (("own", own), ("winner", tuned)):
            maps = method.attribute(
                clip, *model_inputs(clip, batch), batch["phrase"], batch["content_box"], batch["chest_box"]
            ).image
            assert result[part][name] == pytest.approx(float(F.pointing_game(maps, masks).mean()))
    assert result["validation"]["winner"] >= result["validation"]["own"]
    assert result["seconds"]["settings"] / result["seconds"]["components"] == pytest.approx(result["ratio"])
    with Image.open(out / "surface.png") as picture:
        assert min(picture.size) > 300
    assert "tau 2" in (out / "surface.svg").read_text(encoding="utf-8")


def test_tuned_yaml_goes_wherever_a_method_does(images: Path, tmp_path: Path, tune: Tune) -> None:
    # With a kappa that no shipped method has.
    _, result = tune(method=Matex(kappa=3.0))
    path = str(tmp_path / "out" / "tuned.yaml")
    maps = AttributionMaps(path, num_pairs=1)
    metrics = AttributionMetrics({"": path, "flat": {"lambda_s": 1.0}}, num_batches=1)
    run = Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_train_batches=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[maps, metrics],
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    run.fit(ClipModule(str(TINY), lr=1e-3, warmup_steps=0), phantoms(images))
    assert "attribution/pointing_game" in run.callback_metrics
    assert maps.validations == 1
    row = next(row for row in compared_rows([path], "quick") if row.name == "tuned")
    for method in (maps.method, metrics.methods[""], row.method):
        assert isinstance(method, Matex)
        assert method.settings == result["winner"]


def test_the_yaml_has_the_class_and_what_is_not_its_default(tune: Tune, tmp_path: Path) -> None:
    _, result = tune(LowerLeft, method=Planted(references=["mass"], alpha=0.4), objective="miou")
    written = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text(encoding="utf-8"))
    assert written["class_path"] == f"{Planted.__module__}.Planted"
    tuned = {name: result["winner"][name] for name in ("lambda_s", "lambda_c", "tau")}
    assert written["init_args"] == {"references": ["mass"], "alpha": 0.4} | tuned
    tune(out="shipped")
    text = (tmp_path / "shipped" / "tuned.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["class_path"] == "matex_pl.attribution.Matex"
    assert text.startswith("#")


def test_it_repeats(tune: Tune) -> None:
    timed = {"created", "seconds", "ratio"}
    first, again = (tune(method=Matex(), objective="miou", out=name)[1] for name in ("a", "b"))
    assert {key: first[key] for key in first.keys() - timed} == {key: again[key] for key in again.keys() - timed}


def test_no_file_is_left_half_written(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("yaml.safe_dump", fail)
    with pytest.raises(OSError, match="disk full"):
        tune(method=Matex())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("iou/0.3", "iou above 0.3, higher is better"),
        ("border_mass", "border mass, lower is better"),
        ("top20_removal/mean_color", "top20 removal (mean color), higher is better"),
        ("insertion", "insertion gain (mean image), higher is better"),
        ("deletion/mean_color", "deletion area above the fill alone (mean color), lower is better"),
        ("text_sanity", "text sanity, lower is better"),
        ("text_sanity/words", "text sanity without punctuation, lower is better"),
    ],
)
def test_titles(tune: Tune, name: str, title: str) -> None:
    assert tune(objective=name, lambda_s=[2.0], lambda_c=[0.2], num_pairs=2)[0].startswith(f"{title}; 2 settings")


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [(0.1, 0.3, "The test pairs confirm the gain"), (-0.3, -0.1, "Tuning lost"), (-0.1, 0.3, "contains 0")],
)
def test_the_test_pairs_have_the_last_word(tune: Tune, low: float, high: float, sentence: str) -> None:
    _, result = tune(method=Matex(lambda_s=3.0))
    result["winner"] = result["own"] | {"lambda_s": 3.5}
    result["test"]["difference"] = {"value": (low + high) / 2, "low": low, "high": high, "n": 6}
    assert sentence in describe(result)
    result["objective"]["higher_is_better"] = False
    turned = {"The test pairs confirm the gain": "Tuning lost", "Tuning lost": "The test pairs confirm the gain"}
    assert turned.get(sentence, sentence) in describe(result)


def test_patients_are_drawn_whole(tune: Tune) -> None:
    """One patient leaves nothing to draw; the same pairs of as many patients do."""
    one, many = (
        tune(kind, method=Matex(), objective="cnr", out=kind.__name__)[1]["test"] for kind in (OnePatient, Boxed)
    )
    gain = one["difference"]
    assert gain["low"] == pytest.approx(gain["value"])
    assert gain["high"] == pytest.approx(gain["value"])
    assert many["difference"]["low"] < gain["value"] < many["difference"]["high"]
    assert one["patients"] == 1 < many["patients"]
    assert one["pairs"] == many["pairs"] == 6


def test_pairs_that_do_not_count_are_left_out(tune: Tune) -> None:
    text, result = tune(SidelessTest, objective="side_sensitivity")
    assert result["test"]["own"] is None
    assert result["winner"] != result["own"]
    assert "No test pair counts" in text
    text, result = tune(Placeless, objective="side_sensitivity")
    assert {row["score"] for row in result["settings"]} == {None}
    assert result["winner"] == result["own"]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def test_the_picture_marks_both_settings(tune: Tune, figure: list[Figure]) -> None:
    method = Planted(fusion="product", lambda_s=2.0, lambda_c=0.35)
    axes = {"lambda_s": [2.0, 3.0], "lambda_c": [0.2, 0.35, 0.5], "tau": [0.2, 1.0]}
    _, result = tune(LowerLeft, method=method, objective="energy_pointing_game", **axes)
    first, second, bar = figure[0].axes
    assert [panel.get_title() for panel in (first, second)] == ["tau 0.2", "tau 1"]
    scores = np.array([row["score"] for row in result["settings"]]).reshape(2, 3, 2)
    for index, panel in enumerate((first, second)):
        assert np.array_equal(panel.images[0].get_array(), scores[..., index])
        assert panel.images[0].get_clim() == (scores.min(), scores.max())
    marks = {line.get_label(): (panel, *line.get_xydata()[0]) for panel in (first, second) for line in panel.lines}
    winner = result["winner"]
    place = axes["lambda_c"].index(winner["lambda_c"]), axes["lambda_s"].index(winner["lambda_s"])
    assert marks == {"own": (first, 1, 0), "winner": ((first, second)[axes["tau"].index(winner["tau"])], *place)}
    assert "higher is better" in bar.get_ylabel()
    assert "6 validation pairs on a raster of 32 x 32" in figure[0].get_suptitle()
    assert "not on these panels" not in figure[0].get_suptitle()


def test_the_picture_shows_the_best_blocks_and_shape(tune: Tune, figure: list[Figure]) -> None:
    method = Matex(grad_layers=1, lambda_s=2.0)
    axes = {"grad_layers": [1, 2], "prior_shape": ["parabola", "gaussian"], "lambda_c": [0.35], "tau": [0.2]}
    _, result = tune(method=method, objective="border_mass", **axes)
    panel, _ = figure[0].axes
    winner = result["winner"]
    shown = [row for row in result["settings"] if all(row[name] == winner[name] for name in AXES[:-3])]
    assert panel.images[0].get_array().tolist() == [[row["score"]] for row in shown]
    assert panel.images[0].get_cmap().name == "viridis_r"
    title = figure[0].get_suptitle().replace("\n", " ")
    assert "panels at the best grad_layers and prior_shape" in title
    assert title.count("not on these panels") == 1
    assert len(panel.lines) == 1


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "pointing"}, r"pointing_game, cnr.*top20_removal/blur.*text_"),
        ({"objective": "cnr/blur"}, "There is no objective"),
        ({"objective": "iou"}, "At a threshold, as iou/0.3: iou, acc50, ap50"),
        ({"objective": "iou/30"}, "There is no objective"),
        ({"objective": "ap50"}, "At a threshold, as iou/0.3: iou, acc50, ap50"),
        ({"objective": "top20_removal/gray"}, "There is no objective"),
        ({"objective": "top20_removal/"}, "There is no objective"),
        (
            {"objective": "text_top20_removal/blur"},
            "without punctuation as text_top20_removal/words",
        ),
        ({"objective": "text_top20_removal/"}, "There is no objective"),
        ({"objective": "cnr/words"}, "There is no objective"),
        ({"tau": []}, "tau names no value"),
        ({"grad_layers": []}, "grad_layers names no value"),
        ({"lambda_s": [2.0, 0.5]}, "lambda_s must be at least 1"),
        ({"tau": [float("nan")]}, "tau must be a finite number"),
        ({"lambda_c": [float("inf")]}, "lambda_c must be a finite number"),
        ({"grad_layers": [0]}, "grad_layers must be at least 1"),
        ({"prior_shape": ["cone"]}, "prior_shape must be one of"),
        ({"method": CenterMap()}, "Only MATEX can be tuned, got CenterMap"),
        ({"method": Matex(delta=0.0)}, "delta=0, which switches the prior off"),
        ({"method": Matex(lambda_s=1.0)}, "lambda_s=1, which switches the prior off"),
        ({"num_pairs": 0}, "num_pairs must be positive"),
        ({"raster": 0}, "raster must be a number greater than 0"),
        ({"batch_size": 0}, "batch_size must be a number greater than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_read(
    images: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune_matex(phantoms(images), "missing.ckpt", str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_without_boxes_some_objectives_are_left(tmp_path: Path, tune: Tune) -> None:
    message = r"pointing_game needs boxes, but no val pair of Boxless has any\. Use one without boxes: "
    with pytest.raises(ValueError, match=message) as refused:
        tune(Boxless, method=NoWork())
    assert not (tmp_path / "out").exists()
    left = str(refused.value).partition("Use one without boxes: ")[2].removesuffix(".").split(", ")
    needless = {"border_mass", "mean_map_mass", "prompt_sensitivity", "side_sensitivity", "sanity", "text_sanity"}
    assert needless | {"top20_removal", "text_top20_removal", "insertion"} <= set(left)
    assert not {*NEED_BOXES} & set(left)
    assert "border mass, lower is better" in tune(Boxless, objective="border_mass")[0]


def test_the_thorax_has_to_be_known(tmp_path: Path, tune: Tune) -> None:
    with pytest.raises(ValueError, match=r"outside_thorax_mass.*Blind has no `thorax\(\)`.*border_mass"):
        tune(Blind, method=NoWork(), objective="outside_thorax_mass")
    assert not (tmp_path / "out").exists()


def test_the_default_grid_holds_the_settings_of_measured() -> None:
    own, defaults = Matex.recommended(), inspect.signature(tune_matex).parameters
    axes = {name: defaults[name].default for name in ("lambda_s", "lambda_c", "tau")}
    assert all(getattr(own, name) in values for name, values in axes.items())
    ends = [(min(axes[name]), max(axes[name])) for name in ("lambda_s", "lambda_c")]
    assert ends == [(1.5, 3.5), (0.2, 0.6)]
    assert len(list(product(*axes.values()))) > 500
