"""A GPU, which is only pretended: what runs on it equals the CPU, and the host waits seldom; see `pretend_device`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import family
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from pretend_device import Pretended, Waits, held, pretended_gpu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_map

from matex_pl import ClipModule, metrics
from matex_pl import attribution as A
from matex_pl.attribution import AttributionMethod
from matex_pl.benchmark import run_benchmark
from matex_pl.callbacks import AttributionMaps, AttributionMetrics, MapWriter, PredictionWriter, RoarPlus
from matex_pl.clip.device import find_device
from matex_pl.clip.towers import on_host
from matex_pl.commands.explain import explain
from matex_pl.data import PhantomDataModule
from matex_pl.maps import Attribution, Word
from matex_pl.roar import Protocol, Training
from matex_pl.roar.finetune import train_run
from matex_pl.roar.images import PlanImages
from matex_pl.roar.plan import Run, read_plan
from matex_pl.roar.work import gpu_shares, prepare_maps
from matex_pl.training.guidance import Guidance
from matex_pl.tune import tune_matex

# Largest number of waits for the GPU's work per call of `attribute` or `attribute_phrases`: one check of the inputs, of
# the results, and of the weights behind a margin; single-pass methods of all blocks look for the blocks.
WAITS: dict[str, tuple[AttributionMethod, int]] = {
    "matex": (A.Matex(), 2),
    "matex recommended": (A.Matex.recommended(), 3),
    "matex rollout": (A.Matex(flow="rollout"), 2),
    "matex loosened": (A.Matex(spatial_weight="loosened"), 2),
    "chefer": (A.Chefer(), 2),
    "grad_cam": (A.GradCam(), 2),
    "grad_eclip": (A.GradEclip(), 2),
    "legrad": (A.LeGrad(), 3),
    "rollout": (A.Rollout(), 2),
    "saliency": (A.Saliency(), 3),
    "dense_similarity": (A.DenseSimilarity(), 2),
    "nib": (A.Nib(steps=2), 7),
    "word_regions": (A.WordRegions(steps=2), 7),
    "matex relevance": (A.Matex(flow="relevance"), 2),
    "prior_only": (A.PriorOnly(), 3),
    "center_map": (A.CenterMap(), 3),
    "integrated_gradients": (A.IntegratedGradients(steps=3), 4),
    "m2ib": (A.M2ib(steps=2, copies=2), 6),
    "rise": (A.Rise(masks=8), 9),
    "kernel_shap": (A.KernelShap(samples=8), 16),
    "submodular_regions": (A.SubmodularRegions(regions=3), 14),
    "random_map": (A.RandomMap(), 5),
}
PHRASES = ["Left lower lobe nodule.", "Small right effusion.", "Mass of the left lung."]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Waits]:
    def from_two_backwards(*args: Any) -> torch.Tensor:
        return torch.autograd.functional.jvp(*args)[1]

    with pretended_gpu() as waits, pytest.MonkeyPatch.context() as patch:
        # Forward-mode derivatives of torch crash on tensors without storage.
        patch.setattr("matex_pl.attribution.word_regions.forward_derivative", from_two_backwards)
        yield waits


@pytest.fixture
def mps(gpu: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretended, "place", torch.device("mps"))


@cache
def inputs(name: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and content boxes of three pairs for a model of a family."""
    pixels = torch.rand(3, 3, *family(name).image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(device), torch.tensor([[0.0, 0.05, 1.0, 0.95]]).repeat(3, 1).to(device)


def explained_by(
    method: AttributionMethod, clip: Any, device: str, name: str = "native"
) -> list[Callable[[], Attribution]]:
    """The calls for maps of pairs, and of one image and all phrases."""
    pixels, boxes = inputs(name, device)
    images, tokens = clip.normalize(pixels), clip.tokenize(PHRASES)
    return [
        lambda: method.attribute(clip, images, tokens, PHRASES, boxes, boxes),
        lambda: method.attribute_phrases(clip, images[0], PHRASES, boxes[0], boxes[0]),
    ]


def explained(method: AttributionMethod, clip: Any, device: str, name: str = "native") -> list[Attribution]:
    return [call() for call in explained_by(method, clip, device, name)]


@cache
def on_gpu(name: str = "native") -> Any:
    return copy.deepcopy(family(name)).to("cuda")


@pytest.mark.parametrize("name", WAITS)
def test_a_method_gives_the_maps_of_the_cpu_and_waits_seldom(gpu: Waits, name: str) -> None:
    method, most = WAITS[name]
    expected = explained(method, family("native"), "cpu")
    clip = on_gpu()
    # The first calls count blocks and encode references.
    calls = explained_by(method, clip, "cuda")
    assert_same([call() for call in calls], expected)
    for call in calls:
        with Waits().counted() as waits:
            call()
        assert waits.total() <= most, dict(waits)


def assert_same(found: list[Attribution], expected: list[Attribution]) -> None:
    for own, other in zip(found, expected, strict=True):
        for part in ("image", "grid", "text", "content", "score"):
            assert isinstance(getattr(own, part), Pretended), part
            torch.testing.assert_close(held(getattr(own, part)), getattr(other, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["biomedclip", "siglip", "average", "registers_pool", "coca", "prefixed"])
def test_other_towers_give_the_maps_of_the_cpu_and_wait_seldom(gpu: Waits, name: str) -> None:
    expected = explained(A.Matex(), family(name), "cpu", name)
    calls = explained_by(A.Matex(), on_gpu(name), "cuda", name)
    assert_same([call() for call in calls], expected)
    for call in calls:
        with Waits().counted() as waits:
            call()
        # Towers that attend to all text look for the longest phrase.
        assert waits.total() <= (3 if name in ("biomedclip", "average") else 2), dict(waits)


def test_tokens_of_lightnings_inference_mode_are_known_on_the_host(gpu: Waits) -> None:
    with torch.inference_mode():
        tokens = on_gpu().tokenize(PHRASES)
    assert not isinstance(on_host(tokens), Pretended)


def test_a_wait_is_counted_and_devices_do_not_mix(gpu: Waits) -> None:
    values = torch.arange(3.0, device="cuda")
    with Waits().counted() as waits:
        values.sum().item()
        values[values > 1]
        values.cpu()
    assert waits.total() == 3
    with pytest.raises(RuntimeError, match="same device"):
        _ = values + torch.ones(3)


@pytest.mark.parametrize("name", [name for name in WAITS if name != "kernel_shap"])
def test_no_method_needs_float64_on_mps(mps: None, name: str) -> None:
    maps = explained(WAITS[name][0], copy.deepcopy(family("native")).to("mps"), "mps")[0]
    assert held(maps.image).isfinite().all()


def test_kernel_shap_says_that_mps_lacks_float64(mps: None) -> None:
    with pytest.raises(NotImplementedError, match="float64, which Apple's MPS lacks"):
        explained(A.KernelShap(samples=8), copy.deepcopy(family("native")).to("mps"), "mps")


def metric_inputs() -> dict[str, tuple[Any, ...]]:
    """Inputs of every metric of the package, on the CPU."""
    drawn = torch.Generator().manual_seed(0)
    maps, others = torch.rand(2, 4, 9, 7, generator=drawn)
    boxes = [torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 1.0, 0.9]][: 1 + row % 2]) for row in range(4)]
    scores, curve = torch.rand(2, 4, generator=drawn), torch.rand(5, 4, generator=drawn).sort(0).values
    inside = torch.rand(4, 9, 7, generator=drawn) > 0.5
    words = [[Word("Left", 0, 4)], [Word("right", 6, 11)]] * 2
    phrases = ["Left effusion.", "Small right nodule."] * 2
    word_maps = list(torch.rand(4, 1, 3, 3, generator=drawn))
    of_boxes = ("AveragePrecision50", "BoxAccuracy", "BoxContrast", "ContrastToNoise", "EnergyPointingGame", "MeanIoU")
    return {
        **dict.fromkeys((*of_boxes, "PointingGame", "RelevanceRankAccuracy", "ThresholdedIoU"), (maps, boxes)),
        **dict.fromkeys(("ConfidenceDrop", "ConfidenceIncrease", "RemovalDrop"), tuple(scores)),
        "DeletionAUC": (curve.flip(0),),
        "InsertionAUC": (curve,),
        "MapMass": (maps,),
        "OutsideMass": (maps, inside),
        "RankCorrelation": (maps, others),
        "SideSensitivity": (maps, others, ["left", "right"] * 2),
        "WordLaterality": (word_maps, words, phrases),
    }


def test_every_metric_gives_the_value_of_the_cpu(gpu: Waits) -> None:
    given = metric_inputs()
    assert set(given) == set(metrics.__all__)
    for name, values in given.items():
        expected, found = getattr(metrics, name)(), getattr(metrics, name)().to("cuda")
        expected.update(*values)
        found.update(*tree_map(lambda part: part.to("cuda") if isinstance(part, torch.Tensor) else part, values))
        torch.testing.assert_close(held(found.compute()), expected.compute(), rtol=1e-5, atol=1e-6, msg=name)
        assert isinstance(found.compute(), Pretended), name


class CountedSteps(Callback):
    """Waits of each training step, with the boxes that it saw."""

    def __init__(self) -> None:
        self.steps: list[Waits] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.steps.append(Waits())
        self.context = self.steps[-1].counted()
        self.context.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.context.__exit__(None, None, None)


def trainer(folder: Path, accelerator: str, *callbacks: Callback, **settings: Any) -> Trainer:
    # A pretended tensor cannot be sliced in inference mode.
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False}
    settings = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_steps": 3} | quiet | settings
    return Trainer(default_root_dir=folder, accelerator=accelerator, devices=1, callbacks=list(callbacks), **settings)


def fitted(
    folder: Path, accelerator: str, data: PhantomDataModule, tiny_json: str, guidance: Guidance | None
) -> tuple[dict[str, Any], Any, Any]:
    """Scores of fit, validate and test, the counted steps, and the rows of predict."""
    torch.manual_seed(0)
    module, steps = ClipModule(tiny_json, lr=1e-3, warmup_steps=0, guidance=guidance), CountedSteps()
    choices = {"": A.Matex.recommended(), "words": A.WordRegions(steps=1)}
    scalars = AttributionMetrics(choices, sensitivity=True, per_finding=True, num_batches=1)
    logger = TensorBoardLogger(folder)
    run = trainer(folder, accelerator, steps, scalars, AttributionMaps(num_pairs=2), logger=logger)
    scores = {}
    for stage in (run.fit, run.validate, run.test):
        stage(module, datamodule=data)
        scores |= {name: held(value).float() for name, value in run.callback_metrics.items()}
    shown = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    assert len(shown.Tags()["images"]) == 4
    writers = MapWriter(root=str(folder / "maps")), PredictionWriter(str(folder / "predictions.csv"))
    trainer(folder, accelerator, *writers).predict(module, datamodule=data, return_predictions=False)
    return scores, steps, (folder / "predictions.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "guidance", [None, Guidance(boxes=1.0, anatomy=0.5), Guidance(regions=0.5, loss="l1", second_order=False)]
)
def test_training_with_callbacks_gives_the_scores_of_the_cpu(
    gpu: Waits, tiny_images: PhantomDataModule, tiny_json: str, tmp_path: Path, guidance: Guidance | None
) -> None:
    expected, _, rows = fitted(tmp_path / "cpu", "cpu", copy.deepcopy(tiny_images), tiny_json, guidance)
    found, counted, own_rows = fitted(tmp_path / "gpu", "gpu", copy.deepcopy(tiny_images), tiny_json, guidance)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, equal_nan=True, msg=name)
    assert len(own_rows.splitlines()) == len(rows.splitlines())
    # The first steps make the buffers of the optimizer.
    assert counted.steps[-1].total() <= 1, dict(counted.steps[-1])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_does_not_round_boxes(
    tiny_images: PhantomDataModule, tiny_json: str, tmp_path: Path, precision: str
) -> None:
    seen: list[Any] = []

    class Look(Callback):
        def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            seen.append(batch)

    trainer(tmp_path, "cpu", Look(), precision=precision, limit_predict_batches=1).predict(
        _Still(tiny_json), datamodule=tiny_images
    )
    batch = tiny_images.dataset("test").batch(seen[0]["id"])
    for name in ("content_box", "chest_box"):
        torch.testing.assert_close(seen[0][name], batch[name], rtol=0, atol=0, equal_nan=True)
    for own, other in zip(seen[0]["boxes"], batch["boxes"], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


class _Still(ClipModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_a_resumed_training_restores_the_random_state_of_the_gpu(
    gpu: Waits, tiny_images: PhantomDataModule, tiny_json: str, tmp_path: Path
) -> None:
    module = ClipModule(tiny_json, lr=1e-3, warmup_steps=0)
    run = trainer(tmp_path, "gpu", max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=tiny_images)
    state = torch.arange(16, dtype=torch.uint8) + 7
    torch.cuda.set_rng_state(state)
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(torch.cuda.get_rng_state())

    again = trainer(tmp_path, "gpu", Look(), max_steps=2, limit_val_batches=0)
    again.fit(ClipModule(tiny_json, lr=1e-3, warmup_steps=0), tiny_images, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(seen[0], state)


@pytest.mark.parametrize(("accelerator", "is_pinned"), [("cpu", False), ("gpu", True)])
def test_memory_is_pinned_only_for_a_trainer_on_a_gpu(
    gpu: Waits, tiny_images: PhantomDataModule, tmp_path: Path, accelerator: str, is_pinned: bool
) -> None:
    tiny_images.setup("fit")
    assert not tiny_images.train_dataloader().pin_memory
    tiny_images.trainer = trainer(tmp_path, accelerator)
    assert tiny_images.train_dataloader().pin_memory is is_pinned


def test_the_cpu_is_chosen_without_a_look_at_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("CUDA was asked.")

    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or mps, got 'tpu'"):
        find_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no such GPU here"):
        find_device("cuda")


@pytest.mark.parametrize(
    "settings",
    [
        {"phrases": ["Left effusion."], "out": "panel.png"},
        {"phrases": ["Left effusion."], "out": "other.png", "compare": "Right effusion."},
        {"phrases": ["Left effusion.", "Right nodule."], "out": "folder"},
    ],
)
def test_explain_uses_the_gpu(gpu: Waits, workdir: Path, settings: dict[str, Any]) -> None:
    for device in ("auto", "cpu"):
        out = f"{device}/{settings['out']}"
        with Waits().counted() as waits:
            explain("image.png", ckpt_path="good.ckpt", method="chefer", device=device, **settings | {"out": out})
        assert Path(out).exists()
        assert bool(waits) is (device == "auto")


@pytest.mark.parametrize(
    ("visible", "accelerator", "shares"),
    [
        (None, "auto", ["0", "1", "0"]),
        ("5,7", "gpu", ["5", "7", "5"]),
        ("MIG-a,MIG-b,MIG-c", "cuda", ["MIG-a", "MIG-b", "MIG-c"]),
        (None, "cpu", [None] * 3),
    ],
)
def test_processes_of_roar_share_out_the_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, accelerator: str, shares: list[str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan: Any = SimpleNamespace(training=SimpleNamespace(accelerator=accelerator))
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in gpu_shares(plan, 3)] == shares


@pytest.fixture(scope="module")
def trained(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a mean image."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    run = trainer(folder, "cpu", max_steps=1, limit_val_batches=0)
    run.fit(ClipModule(str(Path(__file__).with_name("tiny.json")), warmup_steps=0), images(image_root))
    run.save_checkpoint(folder / "last.ckpt")
    return str(folder / "last.ckpt")


def images(root: Path) -> PhantomDataModule:
    sizes: dict[str, Any] = {"num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "image_size": 32}
    return PhantomDataModule(root=str(root), **sizes, batch_size=4, num_workers=0)


def numbers(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a JSON file by their place, without times."""
    if isinstance(content, dict):
        for name, part in content.items():
            # A ratio is one of times.
            if "seconds" not in name and name != "ratio":
                yield from numbers(part, f"{place}/{name}")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            yield from numbers(part, f"{place}/{index}")
    elif isinstance(content, float):
        yield place, content


def test_the_benchmark_gives_the_numbers_of_the_cpu(gpu: Waits, image_root: Path, trained: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"num_pairs": 4, "validation_pairs": 3, "sanity_pairs": 2, "batch_size": 4, "steps": 2}
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run_benchmark(images(image_root), trained, str(out), ["chefer"], resamples=100, device=device, **small)
        found[device] = dict(numbers(json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]))
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2e-3)


def test_tune_gives_the_numbers_of_the_cpu(gpu: Waits, image_root: Path, trained: str, tmp_path: Path) -> None:
    tried: dict[str, Any] = {"lambda_s": [1.5, 3.5], "lambda_c": [0.2], "tau": [0.2], "num_pairs": 4}
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        tune_matex(images(image_root), trained, str(out), objective="cnr", device=device, **tried)
        found[device] = dict(numbers(json.loads((out / "tune.json").read_text(encoding="utf-8"))))
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2e-3)


def test_roar_runs_on_the_gpu_and_frees_the_memory_of_the_trained_model(
    gpu: Waits, image_root: Path, tiny_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, devices = ClipModule(tiny_json, lr=1e-3, warmup_steps=0), []

    def prepare(plan: Any) -> None:
        devices.append(module.device.type)
        prepare_maps(plan)

    monkeypatch.setattr("matex_pl.callbacks.roar_plus.prepare_maps", prepare)
    protocol = Protocol(modalities=["image"], fractions=[0.5], repeats=1)
    roar = RoarPlus(["chefer"], protocol, Training(epochs=1, batch_size=4), out=str(tmp_path / "roar"))
    trainer(tmp_path, "gpu", roar, max_steps=1, limit_val_batches=0).fit(module, images(image_root))
    assert devices == ["cpu"]
    # As after a training on the second GPU.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def stop(**given: Any) -> None:
        assert given["devices"] == [1]
        raise InterruptedError

    monkeypatch.setattr("matex_pl.roar.finetune.Trainer", stop)
    with pytest.raises(InterruptedError):
        train_run(read_plan(tmp_path / "roar"), PlanImages(tmp_path / "roar"), Run(0))
    result = json.loads((tmp_path / "roar" / "results.json").read_text(encoding="utf-8"))
    assert not result["failed"]


def test_the_check_of_a_gpu_ends_without_errors_on_the_cpu(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks/gpu_check.py"
    out = tmp_path / "check.json"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = json.loads(out.read_text(encoding="utf-8"))
    assert not result["errors"]
    assert all(row["cpu_gpu"]["image_rho"] > 0.999 for row in result["parity"].values())
    assert {row["method"] for row in result["throughput"]} > {"plain forward", "Matex recommended"}
    assert [row["steps"] for row in result["fit"]] == [2] * 3
