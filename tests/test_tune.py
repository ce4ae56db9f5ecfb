"""`matex tune`: the raster holds what `Matex.fuse` gives, and the choice is the best on validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import family
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap, Matex
from matex_pl.attribution.shipped import load_method
from matex_pl.benchmark.bench import BenchmarkRun, Settings
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.cli import main
from matex_pl.clip import Clip
from matex_pl.data import PhantomDataModule, Study
from matex_pl.evaluation.compared import Row, compared_rows
from matex_pl.evaluation.intervals import Detections, Sums
from matex_pl.evaluation.pairs import choose_pairs, prepare_data, read_pairs
from matex_pl.maps import min_max, upsample
from matex_pl.metrics import functional as F
from matex_pl.metrics.removal import patch_curve
from matex_pl.training import load_module
from matex_pl.tune import choose, tune_matex
from matex_pl.tune.choose import Choice, Scored, best_first, choose_setting
from matex_pl.tune.coarse import box_accuracy, cells_in_boxes, correlations, detections, precision
from matex_pl.tune.grid import Grid, depths, fused_maps, make_grid, search
from matex_pl.tune.objective import (
    AT_THRESHOLD,
    CONFIDENCE,
    LOCATED,
    Objective,
    Pairs,
    find_objective,
    gather_pairs,
    score_setting,
)
from matex_pl.tune.outcome import as_yaml, describe, report, verdict
from matex_pl.tune.run import LAMBDA_C, LAMBDA_S, TAU, raster_size
from matex_pl.tune.surface import draw_surface

TINY = str(Path(__file__).with_name("tiny.json"))
PHRASES = [
    "left lower lobe consolidation",
    "nodule",
    "right apical pneumothorax and bilateral effusions",
    "enlarged heart",
]
FILM = torch.tensor([[0.1, 0.0, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0], [-0.2, -0.1, 1.2, 1.3], [0.0, 0.3, 1.0, 1.4]])
BOXES = [
    torch.tensor([[0.5, 0.5, 0.9, 0.9]]),
    torch.tensor([[0.1, 0.2, 0.4, 0.5], [0.6, 0.2, 0.8, 0.9]]),
    torch.zeros(0, 4),
    torch.tensor([[0.3, 0.4, 0.7, 0.8]]),
]
WIDE = Grid([1, 2, 9], ["parabola", "gaussian", "plateau"], [1.0, 1.5, 3.5], [0.0, 0.6], [0.0, 0.2, 2.0])
FUSIONS: list[dict[str, Any]] = [
    {},
    {"fusion": "product"},
    {"fuse_at": "grid"},
    {"fusion": "product", "fuse_at": "grid", "prior_power": 3.0},
    {"alpha": 0.1, "beta": 0.7, "delta": 0.9, "kappa": 1.0, "laterality": "paper"},
]


def attribute(method: Matex, film: Tensor | None = None) -> tuple[Clip, Pairs]:
    """Pairs of a small model whose frame is not square."""
    clip = family("native")
    images = torch.randn(len(PHRASES), 3, *clip.image_size, generator=torch.Generator().manual_seed(7))
    tokens = clip.tokenize(PHRASES)
    parts = method.attribute(clip, images, tokens, PHRASES, film).parts
    batch: Any = {"boxes": BOXES, "image": torch.zeros(len(PHRASES), 3, *clip.image_size, dtype=torch.uint8)}
    return clip, Pairs(batch, parts, tokens)


# --- the raster


@pytest.mark.parametrize("film", [None, FILM], ids=["frame", "film"])
@pytest.mark.parametrize("settings", FUSIONS, ids=str)
@pytest.mark.parametrize("raster", [(10, 15), (3, 5)], ids=str)
def test_the_raster_holds_what_fuse_gives(
    settings: dict[str, Any], film: Tensor | None, raster: tuple[int, int]
) -> None:
    method = Matex(**settings)
    parts = attribute(Matex(**settings | {"grad_layers": 4}), film)[1].parts
    found = torch.full((*WIDE.shape, len(PHRASES), raster[0] * raster[1]), torch.nan)
    for place, rows, fused in fused_maps(parts, method, WIDE, raster):
        found[place][:, :, rows] = min_max(fused.flatten(0, 2)).view_as(fused).permute(1, 2, 0, 3)
    for mine, setting in zip(found.flatten(0, 4), WIDE.settings(), strict=True):
        whole = Matex.fuse(parts | {"size": raster}, **method.settings | setting).image.flatten(1)
        torch.testing.assert_close(mine, whole, atol=2e-5, rtol=0, msg=lambda text, s=setting: f"{s}: {text}")


def test_a_raster_in_small_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = attribute(Matex(grad_layers=4))[1].parts
    whole = [fused for *_, fused in fused_maps(parts, Matex(), WIDE, (6, 6))]
    monkeypatch.setattr("matex_pl.tune.grid._BLOCK", 3 * 6 * 36 + 1)
    blocks = list(fused_maps(parts, Matex(), WIDE, (6, 6)))
    assert max(len(fused) for *_, fused in blocks) == 3
    torch.testing.assert_close(torch.cat([fused for *_, fused in blocks]), torch.cat(whole), rtol=0, atol=0)


def test_a_rollout_is_fused_as_it_is() -> None:
    method = Matex(flow="rollout", fusion="product")
    parts = attribute(method)[1].parts
    grid = Grid([3], ["parabola"], [2.5], [0.35], [0.2])
    ((_, _, fused),) = fused_maps(parts, method, grid, (8, 12))
    expected = Matex.fuse(parts | {"size": (8, 12)}).image.flatten(1)
    torch.testing.assert_close(min_max(fused[:, 0, 0]), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", LOCATED)
def test_metrics_on_the_raster_are_those_of_finished_maps(name: str) -> None:
    """Whatever the scale of a map; a map of one value has no peak."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(4, 5, 12, 9, generator=generator)
    maps[1, 2], maps[2, :, 4:] = 0.0, 0.0
    fused = maps * 7 - 3
    fused[1, 2] = 0.0
    inside = cells_in_boxes([BOXES[0], BOXES[1], BOXES[3], torch.tensor([[0.0, 0.0, 1.0, 0.7]])], (12, 9))
    _, exact, coarse = LOCATED[name]
    found = coarse(fused.flatten(2), inside.flatten(1))
    expected = torch.stack([exact(min_max(column), inside) for column in maps.unbind(1)], 1)
    # Of equal values the metric takes the first in raster order, the raster none.
    expected[1, 2] = 0.0 if name == "rank_accuracy" else expected[1, 2]
    torch.testing.assert_close(found, expected.float(), atol=2e-4, rtol=2e-4)
    assert expected.unique().numel() > 1


def test_boxes_found_on_the_raster_are_those_of_finished_maps() -> None:
    """Also of a flat map, which finds none, and of a study without boxes."""
    generator = torch.Generator().manual_seed(3)
    fused = upsample(torch.rand(4, 6, 4, 4, generator=generator), (12, 9)) * 5 - 2
    boxes = [BOXES[0], torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.4, 0.4, 0.9, 0.9]]), torch.zeros(0, 4), BOXES[3]]
    fused[1, :3] += 10 * F.box_masks([boxes[1][:1]], (12, 9))
    fused[1, 2] = 0.5
    counts = detections(fused.flatten(2), boxes, (12, 9), 0.6)
    accuracy = box_accuracy(fused.flatten(2), F.pad_boxes(boxes, fused), (12, 9), 0.6)
    for setting in range(6):
        found = F.components(min_max(fused[:, setting]), 0.6)
        exact = F.box_accuracy(found, boxes, 4)
        torch.testing.assert_close(accuracy[:, setting], exact.nan_to_num(0))
        wanted = float(Detections.of(found, boxes).score())
        assert float(precision(counts.double())[setting]) == pytest.approx(wanted, abs=1e-4)
    assert 0 < accuracy.mean() < 1
    assert accuracy[1, 2] == 0
    # Flat but for rounding.
    hair = torch.ones(1, 1, 108)
    hair[..., 40:60] += 2e-7
    assert box_accuracy(hair, torch.tensor([[[0, 4 / 12, 1, 7 / 12]]]), (12, 9), 0.3) == 0
    assert precision(counts.double()).unique().numel() == 2


def test_every_box_has_a_cell() -> None:
    generator = torch.Generator().manual_seed(5)
    middle, size = torch.rand(500, 2, generator=generator), 10 ** (-4 * torch.rand(500, 2, generator=generator))
    # Boxes of whole pixels lie on the borders of cells more often than chance would have it.
    middle[:200] = (middle[:200] * 32).round() / 32
    boxes = list(torch.cat([(middle - size / 2), (middle + size / 2)], 1).clamp(0, 1)[:, None])
    cells = cells_in_boxes(boxes, (16, 8))
    assert cells.flatten(1).any(1).all()
    large = torch.tensor([bool((box[0, 2:] - box[0, :2] > 0.2).all()) for box in boxes])
    assert torch.equal(cells[large], F.box_masks(boxes, (16, 8))[large])
    assert large.any()
    tiny = torch.tensor([[0.43, 0.61, 0.431, 0.611]])
    assert cells_in_boxes([tiny, torch.zeros(0, 4)], (16, 8)).nonzero().tolist() == [[0, 9, 3]]


# Not the pointing game: maxima next to the frame's edge are flat, and rounding decides which of their pixels is first.
SEARCHED = [*list(LOCATED)[1:], "iou/0.3", "acc50/0.35", "ap50/0.35", "border_mass", "outside_thorax_mass"]
SEARCHED += ["mean_map_mass", "prompt_sensitivity", "side_sensitivity", "sanity", "text_mean_map_mass", "text_sanity"]


def gathered(objective: Objective, method: Matex) -> tuple[Clip, list[Pairs]]:
    """All that the objective asks for, of a batch of three pairs and one of the fourth."""
    clip = family("native")
    images = torch.randint(256, (len(PHRASES), 3, *clip.image_size), generator=torch.Generator().manual_seed(7))
    batches: Any = [
        {
            "image": images[rows].to(torch.uint8),
            "phrase": PHRASES[rows],
            "finding": ["consolidation", "nodule", "", ""][rows],
            "film": FILM[rows],
            "boxes": BOXES[rows],
        }
        for rows in (slice(3), slice(3, None))
    ]
    thorax = F.box_masks([torch.tensor([[0.2, 0.1, 0.83, 0.75]])], clip.image_size)[0]
    return clip, gather_pairs(clip, method, batches, objective, thorax=thorax)[0]


@pytest.mark.parametrize("settings", FUSIONS[:4], ids=str)
@pytest.mark.parametrize("name", SEARCHED)
def test_on_all_pixels_the_search_is_the_exact_score(name: str, settings: dict[str, Any]) -> None:
    objective, method = find_objective(name), Matex(**settings)
    clip, pairs = gathered(objective, Matex(**settings | {"grad_layers": 4}))
    drawn = np.random.default_rng(11).random((3, 2))
    strengths = {"lambda_s": 1 + 3 * drawn[0], "lambda_c": drawn[1], "tau": 2 * drawn[2]}
    axes = tried(grad_layers=[1, 3], prior_shape=["parabola", "plateau"])
    axes |= {key: values.tolist() for key, values in strengths.items()}
    grid = make_grid(method, objective, (4, 4), axes, PHRASES)
    found = search(pairs, method, grid, objective, clip.image_size)
    for score, setting in zip(found.flatten(), grid.settings(), strict=True):
        exact = score_setting(clip, pairs, Matex(**method.settings | setting), objective)
        # Of equal values at the border, of which fusing on the patches makes some, the metric takes the first.
        close = 5e-3 if name == "rank_accuracy" else 1e-4
        assert float(score) == pytest.approx(float(exact.score()), abs=close)
    assert found.unique().numel() > 1


def test_two_cells_per_patch_hold_the_means_of_patches() -> None:
    """So the correlations of the raster are nearly those of all pixels."""
    objective = find_objective("prompt_sensitivity")
    clip, pairs = gathered(objective, Matex(grad_layers=4))
    assert raster_size(20, clip, objective) == (8, 12)
    rough, fine = (search(pairs, Matex(), WIDE, objective, size) for size in ((8, 12), clip.image_size))
    torch.testing.assert_close(rough, fine, atol=0.05, rtol=0)


def test_correlations_of_equal_cells() -> None:
    """Average ranks where cells are equal; a flat map has none."""
    generator = torch.Generator().manual_seed(2)
    maps, *others = torch.randint(6, (3, 2, 4, 9), generator=generator).float()
    maps[0, 0], others[0][1, 2], maps[0, 1] = 3.0, -1.0, torch.arange(9.0)
    others[0][0, 1] = torch.rand(9, generator=generator)
    found = correlations(maps, others)
    expected = [F.spearman(maps.flatten(0, 1), other.flatten(0, 1)).view(2, 4) for other in others]
    torch.testing.assert_close(found, torch.stack(expected), equal_nan=True)
    assert found.isnan().nonzero().tolist() == [[0, 0, 0], [0, 1, 2], [1, 0, 0]]


@pytest.mark.parametrize("skew", [1, 3, 5])
def test_correlations_of_maps_with_a_few_high_cells(skew: int) -> None:
    """Where many cells share a step of the range, their order is not that of the other map."""
    generator = torch.Generator().manual_seed(2)
    maps, other = (skew * torch.randn(2, 3, 8, 400, generator=generator)).softmax(-1)
    expected = F.spearman(maps.flatten(0, 1).double(), other.flatten(0, 1).double()).view(3, 8).float()
    torch.testing.assert_close(correlations(maps, [other])[0], expected, atol=1e-3, rtol=0)


def test_a_raster_for_peaks_has_the_centres_of_the_patches() -> None:
    """There the largest of the enlarged maps lies, which no other sample reaches."""
    clip, peaks, areas = family("native"), find_objective("pointing_game"), find_objective("cnr")
    # Patches 4 x 6 of 8 x 8 pixels.
    wanted = [(1, (4, 6)), (12, (4, 6)), (13, (12, 18)), (28, (20, 30)), (400, (28, 42))]
    assert [(cells, raster_size(cells, clip, peaks)) for cells, _ in wanted] == wanted
    wanted = [(1, (1, 1)), (12, (8, 12)), (28, (19, 28)), (400, (32, 48))]
    assert [(cells, raster_size(cells, clip, areas)) for cells, _ in wanted] == wanted
    peak = torch.zeros(1, 4, 6)
    peak[0, 1, 2] = 1
    assert upsample(peak, (12, 18)).amax() == 1
    assert upsample(peak, (8, 12)).amax() < 1


# --- the choice


def planted(peak: float) -> Pairs:
    """A peak outside of the place that the phrase names, which the prior overcomes only if it is strong enough."""
    _, pairs = attribute(Matex(fusion="product"))
    grad = torch.full_like(pairs.parts["grad_blocks"], 1.0)
    grad[..., 0, 0], grad[..., 0, 1] = peak, 0.0
    parts = pairs.parts | {"grad_blocks": grad, "attention_layers": torch.ones_like(pairs.parts["attention_layers"])}
    lower_left: Any = [torch.tensor([[0.5, 0.6, 1.0, 1.0]])] + [torch.zeros(0, 4)] * 3
    return Pairs({**pairs.batch, "boxes": lower_left}, parts, pairs.tokens)


def test_the_search_finds_the_strength_that_a_peak_asks_for() -> None:
    method = Matex(fusion="product", lambda_s=1.5, tau=0.2)
    grid = make_grid(
        method, find_objective("pointing_game"), (4, 4), tried(lambda_s=[1.5, 2.0, 2.5, 3.0, 3.5]), PHRASES
    )
    # The prior counts squared: 2.5 lifts by 6.25.
    pairs = [planted(5.0)]
    distances = grid.distances(method, (4, 4))
    found = choose_setting(family("native"), pairs, method, grid, distances, find_objective("pointing_game"), (16, 24))
    assert found.scores.flatten().tolist() == [0, 0, 1, 1, 1]
    # Of equal scores the nearest to the method's own.
    assert found.winner.method.lambda_s == 2.5
    assert found.own.score == 0
    assert found.winner.score == 1
    assert any(scored.method.settings == method.settings for scored in found.best)
    # With a peak that no prior overcomes, all are equal, and the own one stays.
    found = choose_setting(
        family("native"), [planted(50.0)], method, grid, distances, find_objective("pointing_game"), (16, 24)
    )
    assert found.winner.method.settings == method.settings


def test_a_setting_off_the_grid_may_stay_the_best() -> None:
    method = Matex(fusion="product", lambda_s=3.1)
    grid = make_grid(method, find_objective("pointing_game"), (4, 4), tried(lambda_s=[1.5, 2.0]), PHRASES)
    found = choose_setting(
        family("native"),
        [planted(5.0)],
        method,
        grid,
        grid.distances(method, (4, 4)),
        find_objective("pointing_game"),
        (16, 24),
    )
    assert found.winner is found.own
    assert not grid.holds(found.winner.method)
    assert draw_surface(found, 1).axes


def test_best_first() -> None:
    scores, distances = torch.tensor([1.0, 3.0, torch.nan, 3.0, 2.0]), torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
    assert best_first(scores, distances, 1) == [3, 1, 4, 0, 2]
    assert best_first(scores, distances, -1) == [0, 4, 3, 1, 2]


def tried(**values: Sequence[Any]) -> dict[str, Any]:
    return {name: values.get(name) for name in ("grad_layers", "prior_shape", "lambda_s", "lambda_c", "tau")}


def test_a_grid_tries_each_value_once() -> None:
    objective = find_objective("cnr")
    method = Matex(grad_layers=-1, text_grad_layers=2)
    grid = make_grid(
        method,
        objective,
        (3, 4),
        tried(grad_layers=[99, 2, 3, 1], lambda_s=[3, 2, 2.0], tau=[1.0], prior_shape=["gaussian"]),
        PHRASES,
    )
    # All but the first of three blocks are two: the own word for it stays.
    assert grid.grad_layers == [1, -1, 99]
    assert (grid.lambda_s, grid.lambda_c, grid.tau, grid.prior_shape) == ([2, 3], [0.35], [1.0], ["gaussian"])
    assert grid.varied == ["grad_layers", "lambda_s"]
    assert len(grid.settings()) == 6
    assert depths(-1, method, (3, 4)) == (2, 2)
    assert depths(-1, Matex(), (3, 4)) == (2, 3)


def test_what_has_no_part_is_not_tried() -> None:
    axes = tried(grad_layers=[1, 2], lambda_s=[2.0, 3.0], tau=[0.0, 1.0], prior_shape=["gaussian", "plateau"])
    text = make_grid(Matex(text_grad_layers=2), find_objective("text_top20_removal"), (4, 4), axes, PHRASES)
    assert text.shape == (1, 1, 1, 1, 2)
    assert make_grid(Matex(), find_objective("text_top20_removal"), (4, 4), axes, PHRASES).shape == (2, 1, 1, 1, 2)
    assert make_grid(Matex(flow="rollout"), find_objective("cnr"), (4, 4), axes, PHRASES).shape == (2, 2, 2, 1, 1)
    assert make_grid(Matex(beta=0.0), find_objective("cnr"), (4, 4), axes, PHRASES).tau == [0.2]
    placeless = ["consolidation", "nodule"]
    assert make_grid(Matex(), find_objective("cnr"), (4, 4), axes, placeless).shape == (2, 1, 1, 1, 2)
    usual = Matex(knowledge_prior=True)
    assert make_grid(usual, find_objective("cnr"), (4, 4), axes, ["edema"]).shape == (2, 2, 2, 1, 2)


def test_distances() -> None:
    method = Matex(grad_layers=2, lambda_s=2.0, tau=0.2)
    grid = Grid([1, 2, 4], ["parabola", "gaussian"], [2.0, 3.0, 4.0], [0.35], [0.2, 1.2])
    found = grid.distances(method, (4, 4)).view(grid.shape)
    assert float(found[1, 0, 0, 0, 0]) == 0
    assert float(found[1, 0, 2, 0, 0]) == pytest.approx(1)
    assert float(found[1, 0, 1, 0, 1]) == pytest.approx(1.5)
    # One block of a range of three, on either side.
    assert float(found[0, 1, 0, 0, 0]) == pytest.approx(1 / 3 + 1)


# --- the command


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


PHANTOMS = {"num_train": 12, "num_val": 8, "num_test": 8, "film_size": 96, "batch_size": 4, "num_workers": 0}


def phantoms(films: Path, kind: type[PhantomDataModule] = PhantomDataModule) -> PhantomDataModule:
    return kind(root=str(films), **PHANTOMS)


@pytest.fixture(scope="module")
def ckpt_path(films: Path) -> str:
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
    run.fit(ClipModule(TINY, lr=1e-3, warmup_steps=0), phantoms(films))
    run.save_checkpoint(films / "tiny.ckpt")
    return str(films / "tiny.ckpt")


SMALL: dict[str, Any] = {"lambda_s": [1.5, 3.5], "lambda_c": [0.2, 0.6], "tau": [0.2, 2.0], "num_pairs": 6}


def scores_of(ckpt_path: str, data: PhantomDataModule, method: Matex, split: str, number: int) -> Tensor:
    """Pointing game of each study, without any of what is tested."""
    clip = load_module(ckpt_path).clip
    prepare_data(data, clip.image_size, "val", "test")
    values = []
    for batch in read_pairs(data, split, choose_pairs(data, split, number, 0), 1):
        tokens = clip.tokenize(batch["phrase"])
        maps = method.attribute(clip, clip.normalise(batch["image"]), tokens, batch["phrase"], batch["film"]).image
        values.append(F.pointing_game(maps, F.box_masks(batch["boxes"], clip.image_size)))
    return torch.cat(values)


def test_the_command_writes_what_it_found(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tuned"
    text = tune_matex(
        phantoms(films), ckpt_path, str(out), grad_layers=[1, 2], prior_shape=["gaussian", "parabola"], **SMALL
    )
    assert sorted(path.name for path in out.iterdir()) == ["surface.png", "surface.svg", "tune.json", "tuned.yaml"]
    said = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    assert len(said["settings"]) == 32
    assert "optimistic" in text
    assert str(out / "tuned.yaml") in text
    tuned = load_method(str(out / "tuned.yaml"))
    assert isinstance(tuned, Matex)
    assert tuned.settings == said["winner"]
    assert said["own"] == Matex.measured().settings
    for split in ("val", "test"):
        part = said["validation" if split == "val" else split]
        for name, method in (("own", Matex.measured()), ("winner", tuned)):
            values = scores_of(ckpt_path, phantoms(films), method, split, 6)
            assert part[name] == pytest.approx(float(values.mean()))
    assert said["validation"]["winner"] >= said["validation"]["own"]
    assert said["seconds"]["settings"] / said["seconds"]["components"] == pytest.approx(said["ratio"])
    with Image.open(out / "surface.png") as picture:
        assert min(picture.size) > 300
    assert "tau 2" in (out / "surface.svg").read_text(encoding="utf-8")


def test_tuned_yaml_goes_wherever_a_method_does(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    # With a kappa that no shipped method has.
    tune_matex(phantoms(films), ckpt_path, str(tmp_path), method=Matex(kappa=3.0), **SMALL)
    winner = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))["winner"]
    path = str(tmp_path / "tuned.yaml")
    maps, metrics = AttributionMaps(path, num_studies=1), AttributionMetrics(path, num_batches=1)
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
    run.fit(ClipModule(TINY, lr=1e-3, warmup_steps=0), phantoms(films))
    assert "attribution/pointing_game" in run.callback_metrics
    assert maps.validations == 1
    row = next(row for row in compared_rows([path], "quick") if row.name == "tuned")
    for method in (maps.method, metrics.method, row.method):
        assert isinstance(method, Matex)
        assert method.settings == winner


def test_it_repeats(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    timed = {"created", "seconds", "ratio"}
    for name in ("a", "b"):
        tune_matex(phantoms(films), ckpt_path, str(tmp_path / name), method=Matex(), objective="miou", **SMALL)
    first, again = (json.loads((tmp_path / name / "tune.json").read_text(encoding="utf-8")) for name in ("a", "b"))
    assert {key: first[key] for key in first.keys() - timed} == {key: again[key] for key in again.keys() - timed}


def test_one_setting_gains_nothing(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    only = {"lambda_s": [2.5], "lambda_c": [0.35], "tau": [0.2]}
    text = tune_matex(phantoms(films), ckpt_path, str(tmp_path), num_pairs=4, **only)
    assert "gained nothing" in text
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert said["winner"] == said["own"]
    assert said["test"]["difference"]["value"] == 0


def test_confidence_is_asked_of_the_model(
    films: Path, ckpt_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune_matex(phantoms(films), ckpt_path, str(tmp_path), objective="confidence_drop", **SMALL)
    assert "8 settings of 6 pairs take 48 forwards" in capsys.readouterr().err
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    # Lower is better, and every setting was scored.
    assert said["validation"]["winner"] == pytest.approx(
        min(said["validation"]["own"], *(setting["score"] for setting in said["settings"]))
    )
    clip, data = load_module(ckpt_path).clip, phantoms(films)
    prepare_data(data, clip.image_size, "val")
    (batch,) = read_pairs(data, "val", choose_pairs(data, "val", 6, 0, boxed=False), 6)
    images, tokens = clip.normalise(batch["image"]), clip.tokenize(batch["phrase"])
    fill = clip.normalise(clip.mean_film.expand(1, 3, -1, -1))
    for setting in (said["settings"][0], said["settings"][-1]):
        method = Matex.measured(**{name: setting[name] for name in ("lambda_s", "lambda_c", "tau")})
        maps = method.attribute(clip, images, tokens, batch["phrase"], batch["film"]).image[:, None]
        with torch.no_grad():
            kept = clip.similarity(images * maps + fill * (1 - maps), tokens)
            drop = 100 * (clip.similarity(images, tokens) - kept).clamp(min=0)
        assert setting["score"] == pytest.approx(float(drop.mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("iou/0.3", "8 settings on a raster of 32 x 32 took"),
        ("acc50/0.2", "on a raster of 32 x 32"),
        ("border_mass", "on a raster of 32 x 32"),
        ("ap50/0.2", "on a raster of 32 x 32"),
        ("insertion", "insertion asks the model: 8 settings of 6 pairs take 720 forwards of the image tower"),
        ("deletion/mean_colour", "720 forwards"),
    ],
)
def test_metrics_on_all_pixels(
    films: Path, ckpt_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    """The scores are those of the metric, computed from the maps of the setting."""
    text = tune_matex(phantoms(films), ckpt_path, str(tmp_path), objective=name, raster=32, **SMALL)
    assert said in text + capsys.readouterr().err
    found = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    scores = [found["validation"]["own"], *(setting["score"] for setting in found["settings"])]
    best = min(scores) if name.startswith(("deletion", "border")) else max(scores)
    assert found["validation"]["winner"] == pytest.approx(best)
    clip, data = load_module(ckpt_path).clip, phantoms(films)
    prepare_data(data, clip.image_size, "val")
    boxed = name.startswith(("iou", "acc50", "ap50"))
    (batch,) = read_pairs(data, "val", choose_pairs(data, "val", 6, 0, boxed=boxed), 6)
    images, tokens = clip.normalise(batch["image"]), clip.tokenize(batch["phrase"])
    setting = found["settings"][-1]
    method = Matex.measured(**{key: setting[key] for key in ("lambda_s", "lambda_c", "tau")})
    maps = method.attribute(clip, images, tokens, batch["phrase"], batch["film"])
    values = {
        "iou/0.3": lambda: F.iou(maps.image, F.box_masks(batch["boxes"], clip.image_size), torch.tensor([0.3]))[:, 0],
        "acc50/0.2": lambda: F.box_accuracy(F.components(maps.image, 0.2), batch["boxes"], 6),
        "ap50/0.2": lambda: Detections.of(F.components(maps.image, 0.2), batch["boxes"]).score(),
        "border_mass": lambda: F.outside_mass(maps.image, ~F.border_mask(clip.image_size, batch["film"])),
        "insertion": lambda: _gain(clip, images, tokens, maps.grid, "mean_film", "insertion"),
        "deletion/mean_colour": lambda: _gain(clip, images, tokens, maps.grid, "mean_colour", "deletion"),
    }[name]()
    assert setting["score"] == pytest.approx(float(values.nanmean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["insertion", "deletion"])
def test_the_ends_of_curves_are_computed_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    objective = find_objective(f"{kind}/mean_colour")
    clip, pairs = gathered(objective, Matex())
    sizes, encode = [], clip.encode_image

    def count(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return encode(images)

    monkeypatch.setattr(clip, "encode_image", count)
    score = score_setting(clip, pairs, Matex(), objective).score()
    assert sum(sizes) == objective.forwards * len(PHRASES)
    anew = [replace(batch, ends=None) for batch in pairs]
    torch.testing.assert_close(score_setting(clip, anew, Matex(), objective).score(), score, rtol=0, atol=0)
    assert sum(sizes) > 2 * objective.forwards * len(PHRASES)


class Boxed(PhantomDataModule):
    """Only films with boxes, which the benchmark takes first."""

    def list_studies(self) -> list[Study]:
        return [study for study in super().list_studies() if study.boxes]


class Blind(Boxed):
    """Does not know where the thorax is."""

    def thorax(self) -> None:  # type: ignore[override]
        return None


SETTING: dict[str, Any] = {"lambda_s": 3.5, "lambda_c": 0.6, "tau": 2.0}
BESIDE = {"ap50": True, "side_sensitivity": True, "prompt_sensitivity": False, "sanity": False, "text_sanity": False}
BESIDE |= {"outside_thorax_mass": False, "mean_map_mass": False, "text_mean_map_mass": False}
BESIDE |= {"iou": True, "acc50": True, "miou": True}


@pytest.fixture(scope="module")
def benched(films: Path, ckpt_path: str) -> dict[str, Any]:
    """What `matex benchmark` makes of the validation pairs, under the own setting and another."""
    settings = Settings("val", -1, 8, 99, 3, "quick", 1, 100, 0)
    bench = BenchmarkRun.open(load_module(ckpt_path).clip, phantoms(films, Boxed), films / "bench", settings)
    methods = {"own": Matex.measured(), "setting": Matex.measured(**SETTING)}
    return {name: bench.score(Row(name, method)) for name, method in methods.items()}


@pytest.mark.parametrize(("name", "higher_is_better"), BESIDE.items())
def test_objectives_are_the_metrics_of_the_benchmark(
    films: Path,
    ckpt_path: str,
    tmp_path: Path,
    benched: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    name: str,
    higher_is_better: bool,
) -> None:
    at_threshold = name in AT_THRESHOLD
    objective = f"{name}/{benched['setting'].values['image'].threshold}" if at_threshold else name
    words = ["tune", f"--data={Boxed.__module__}.Boxed", f"--ckpt_path={ckpt_path}", f"--out={tmp_path}"]
    words += [f"--data.{key}={value}" for key, value in {"root": films, **PHANTOMS}.items()]
    words += [f"--objective={objective}", "--num_pairs=-1", "--batch_size=4", "--raster=32"]
    main([*words, *(f"--{key}=[{value}]" for key, value in SETTING.items())])
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    (setting,) = said["settings"]
    exact = [row for row in said["on_all_pixels"] if all(row[key] == value for key, value in SETTING.items())]
    if not name.startswith("text_"):
        assert [row["score"] for row in exact] == [pytest.approx(benchmark_score(benched["setting"], name), abs=1e-5)]
    # A raster of 32 holds all pixels; correlations take two cells per patch.
    close = 0.05 if find_objective(objective).patches else 1e-4
    assert setting["score"] == pytest.approx(benchmark_score(benched["setting"], name), abs=close)
    # The benchmark looks for boxes at another threshold there.
    if not at_threshold:
        assert said["validation"]["own"] == pytest.approx(benchmark_score(benched["own"], name), abs=1e-5)
        assert said["validation"]["own"] != setting["score"]
    better = max if higher_is_better else min
    assert said["validation"]["winner"] == better(row["score"] for row in said["on_all_pixels"])
    assert f"{'higher' if higher_is_better else 'lower'} is better" in capsys.readouterr().out
    gain = said["test"]["difference"]
    assert gain["value"] == pytest.approx(said["test"]["winner"] - said["test"]["own"], abs=1e-7)
    assert gain["low"] <= gain["value"] <= gain["high"]


def benchmark_score(scored: Any, name: str) -> float:
    values = scored.values["text" if name.startswith("text_") else "image"]
    return float((values.detections if name == "ap50" else values.sums[name.removeprefix("text_")]).score())


def test_the_thorax_has_to_be_known(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"outside_thorax_mass.*Blind has no `thorax\(\)`.*border_mass"):
        tune_matex(phantoms(films, Blind), ckpt_path, out, method=NoWork(), objective="outside_thorax_mass")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def _gain(clip: Clip, images: Tensor, tokens: Tensor, grid: Tensor, fill: str, kind: str) -> Tensor:
    """Area between the curve and its blank end, by the trapezoid rule."""
    shares, scores = patch_curve(clip, images, grid, fill, clip.encode_text(tokens), kind, steps=16)
    blank = scores[0] if kind == "insertion" else scores[-1]
    raised = scores - blank
    return sum((shares[k + 1] - shares[k]) * (raised[k] + raised[k + 1]) / 2 for k in range(len(shares) - 1))


def test_words_are_tuned_without_the_prior(
    films: Path, ckpt_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tune_matex(phantoms(films), ckpt_path, str(tmp_path), objective="text_confidence_drop", **SMALL)
    assert "4 settings of 6 pairs take 24 forwards of the text tower" in capsys.readouterr().err
    assert "lambda_s: words have no place" in text
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert {setting["lambda_s"] for setting in said["settings"]} == {2.5}
    assert len({setting["score"] for setting in said["settings"]}) > 1


@pytest.mark.parametrize("setting", [{"lambda_s": 1.0}, {"delta": 0.0}], ids=str)
def test_words_are_tuned_with_the_prior_off(
    films: Path, ckpt_path: str, tmp_path: Path, setting: dict[str, float]
) -> None:
    tune_matex(
        phantoms(films), ckpt_path, str(tmp_path), method=Matex(**setting), objective="text_mean_map_mass", **SMALL
    )
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert said["own"] == Matex(**setting).settings
    assert len({found["score"] for found in said["settings"]}) == 4


class Placeless(Boxed):
    """Says what it is, not where."""

    def list_studies(self) -> list[Study]:
        return [replace(study, phrase="nodule") for study in super().list_studies()]


def test_a_prior_without_a_place_is_not_tuned(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    """And the text says why."""
    shapes = {"prior_shape": ["gaussian", "parabola"]}
    text = tune_matex(phantoms(films, Placeless), ckpt_path, str(tmp_path), objective="cnr", **shapes, **SMALL)
    reason = "no phrase of the validation pairs names a place"
    assert f"lambda_s: {reason}; prior_shape: {reason}" in text
    said = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert {(setting["lambda_s"], setting["prior_shape"]) for setting in said["settings"]} == {(2.5, "parabola")}
    assert len(said["settings"]) == 4


@pytest.mark.parametrize("name", [*CONFIDENCE, "top20_removal/blur", *(f"text_{name}" for name in CONFIDENCE)])
def test_every_objective_that_asks_the_model(films: Path, ckpt_path: str, name: str) -> None:
    """Each is a number per study, and the directions are those of the metrics."""
    clip, data, objective = load_module(ckpt_path).clip, phantoms(films), find_objective(name)
    prepare_data(data, clip.image_size, "val")
    (batch,) = read_pairs(data, "val", choose_pairs(data, "val", 4, 0), 4)
    images, tokens = clip.normalise(batch["image"]), clip.tokenize(batch["phrase"])
    maps = Matex().attribute(clip, images, tokens, batch["phrase"], batch["film"])
    with torch.no_grad():
        pairs = Pairs(batch, maps.parts, tokens, clip.encode_image(images), clip.encode_text(tokens))
    whole, nothing = torch.ones_like(maps.image), torch.zeros_like(maps.image)
    values = objective.value(clip, pairs, maps)
    assert values.shape == (4,)
    assert not values.isnan().any()
    assert objective.sign == (-1 if name.removeprefix("text_") in ("confidence_drop", "confidence_drop@50") else 1)
    if name == "confidence_drop":
        maps.image = whole
        torch.testing.assert_close(objective.value(clip, pairs, maps), torch.zeros(4), atol=1e-3, rtol=0)
        maps.image = nothing
        assert (objective.value(clip, pairs, maps) != values).any()


class Boxless(PhantomDataModule):
    """Films without boxes."""

    def list_studies(self) -> list[Study]:
        return [Study(**{**vars(study), "boxes": ()}) for study in super().list_studies()]


class NoWork(Matex):
    """Refuses to explain."""

    def attribute(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("Work began.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "pointing"}, r"pointing_game, cnr.*top20_removal/blur.*text_"),
        ({"objective": "cnr/blur"}, "No objective"),
        ({"objective": "iou"}, "at a threshold, as iou/0.3"),
        ({"objective": "iou/30"}, "No objective"),
        ({"objective": "ap50"}, "at a threshold, as iou/0.3"),
        ({"objective": "top20_removal/grey"}, "No objective"),
        ({"objective": "text_top20_removal/blur"}, "No objective"),
        ({"tau": []}, "tau names no value"),
        ({"grad_layers": []}, "grad_layers names no value"),
        ({"lambda_s": [2.0, 0.5]}, "lambda_s must be at least 1"),
        ({"tau": [float("nan")]}, "tau must be a finite number"),
        ({"lambda_c": [float("inf")]}, "lambda_c must be a finite number"),
        ({"grad_layers": [0]}, "whole numbers, not 0"),
        ({"prior_shape": ["cone"]}, "prior_shape must be one of"),
        ({"method": CenterMap()}, "Only MATEX .* got CenterMap"),
        ({"method": Matex(delta=0.0)}, "delta=0, which takes the prior out"),
        ({"method": Matex(lambda_s=1.0)}, "lambda_s=1, which takes the prior out"),
        ({"num_pairs": 0}, "num_pairs must be positive"),
        ({"raster": 0}, "raster must be a number greater than 0"),
        ({"batch_size": 0}, "batch_size must be a number greater than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_read(
    films: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune_matex(phantoms(films), "missing.ckpt", str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_without_boxes_some_objectives_are_left(films: Path, ckpt_path: str, tmp_path: Path) -> None:
    message = r"pointing_game needs boxes, and no val study of Boxless has any\. Take .* needs none: "
    with pytest.raises(ValueError, match=message) as refused:
        tune_matex(phantoms(films, Boxless), ckpt_path, str(tmp_path / "out"), method=NoWork())
    assert not (tmp_path / "out").exists()
    left = str(refused.value).partition("needs none: ")[2].removesuffix(".").split(", ")
    needless = {"border_mass", "mean_map_mass", "prompt_sensitivity", "side_sensitivity", "sanity", "text_sanity"}
    assert needless | {"top20_removal", "text_top20_removal", "insertion"} <= set(left)
    assert not {*LOCATED, *AT_THRESHOLD} & set(left)
    titles = {"top20_removal/mean_colour": "top20 removal (mean colour), higher", "border_mass": "border mass, lower"}
    for name, title in titles.items():
        text = tune_matex(phantoms(films, Boxless), ckpt_path, str(tmp_path), objective=name, **SMALL)
        assert f"{title} is better" in text


def test_no_file_is_left_half_written(
    films: Path, ckpt_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_matex(phantoms(films), ckpt_path, str(tmp_path), **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matex_pl.tune.outcome.as_yaml", fail)
    with pytest.raises(OSError, match="disk full"):
        tune_matex(phantoms(films), ckpt_path, str(tmp_path), method=Matex(), **SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- what it says


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("iou/0.3", "iou above 0.3, higher is better"),
        ("acc50/0.35", "acc50 above 0.35, higher is better"),
        ("ap50/0.35", "ap50 above 0.35, higher is better"),
        ("insertion", "insertion gain (mean film), higher is better"),
        ("deletion/mean_colour", "deletion area above the fill alone (mean colour), lower is better"),
        ("text_sanity", "text sanity, lower is better"),
    ],
)
def test_titles(name: str, title: str) -> None:
    assert find_objective(name).title == title


def choice(values: Tensor, **found: Any) -> Choice:
    """Four studies under three settings, the last the method's own."""
    grid = Grid([-1], ["parabola"], [2.0, 3.0], [0.2, 0.35], [0.2, 1.0])
    own = Scored(Matex.measured(lambda_s=3.0), 0.0, Sums.of(values[0]))
    best = Scored(Matex.measured(lambda_s=2.0, lambda_c=0.2, tau=1.0), 1.0, Sums.of(values[1]))
    scores = torch.arange(8.0, dtype=torch.float64).view(grid.shape)
    fields = {"best": [best, own], "raster": (28, 28), "seconds": {"settings": 0.1, "finalists": 0.2}} | found
    return Choice(
        find_objective("pointing_game"), grid, scores, fields["raster"], own, fields["best"], fields["seconds"]
    )


def studies(patients: Sequence[str]) -> list[Study]:
    return [Study(str(place), patient, str(place), "", "nodule") for place, patient in enumerate(patients)]


def said_of(own: list[float], winner: list[float], patients: Sequence[str], **found: Any) -> dict[str, Any]:
    values = torch.tensor([own, winner], dtype=torch.float64)
    split = studies(patients)
    return report(choice(values, **found), [Sums.of(row) for row in values], {"val": split, "test": split}, 1.0, 0)


@pytest.mark.parametrize(
    ("own", "winner", "sentence"),
    [([0] * 8, [1] * 8, "is better"), ([1] * 8, [0] * 8, "Tuning lost"), ([0, 1] * 4, [1, 0] * 4, "holds 0")],
    ids=["better", "worse", "alike"],
)
def test_the_test_pairs_have_the_last_word(own: list[float], winner: list[float], sentence: str) -> None:
    said = said_of(own, winner, "abcdefgh")
    assert sentence in verdict(said)
    assert sentence in describe(said)
    said["objective"]["higher_is_better"] = False
    turned = {"is better": "Tuning lost", "Tuning lost": "is better"}
    assert turned.get(sentence, sentence) in verdict(said)


def test_patients_are_drawn_whole() -> None:
    """One patient leaves nothing to draw; the same studies of as many patients do."""
    own, winner = [0.0] * 8, [1.0, 0.0] * 4
    one, many = (said_of(own, winner, patients)["test"] for patients in ("aaaaaaaa", "abcdefgh"))
    assert one["difference"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 8}
    assert many["difference"]["low"] < 0.5 < many["difference"]["high"]
    assert (one["patients"], many["patients"]) == (1, 8)


def test_studies_that_do_not_count_are_left_out() -> None:
    nan = float("nan")
    said = said_of([0.0, nan, 1.0], [1.0, 1.0, 1.0], "abc")
    assert said["test"]["difference"]["value"] == 0.5
    assert said["test"]["own"] == 0.5
    none = said_of([nan, nan], [nan, nan], "ab")
    assert none["test"]["own"] is None
    assert "No test study counts" in describe(none)
    json.dumps(none, allow_nan=False)


def test_a_method_of_ones_own_keeps_its_class() -> None:
    said = said_of([0.0], [1.0], "a") | {"created": "today", "seed": 0}
    said |= {"model": {"weights": "0123"}, "data": {"class": "PhantomDataModule"}}
    written = yaml.safe_load(as_yaml(NoWork(lambda_s=3.0), said))
    assert written["class_path"] == f"{NoWork.__module__}.NoWork"
    assert written["init_args"] == {"lambda_s": 3.0, "lambda_c": 0.35, "tau": 0.2}
    text = as_yaml(Matex.measured(references=["mass"]), said)
    assert yaml.safe_load(text)["class_path"] == "matex_pl.attribution.Matex"
    assert yaml.safe_load(text)["init_args"]["references"] == ["mass"]
    assert text.startswith("#")


def test_the_picture_marks_both_settings() -> None:
    figure = draw_surface(choice(torch.zeros(2, 4)), 4)
    first, second, bar = figure.axes
    assert [panel.get_title() for panel in (first, second)] == ["tau 0.2", "tau 1"]
    # The disc at lambda_c .35 and lambda_s 3, the star at .2 and 2: across and up in steps of the grid.
    ((disc,), (star,)) = first.lines, second.lines
    assert (disc.get_xdata()[0], disc.get_ydata()[0]) == (1, 1)
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0, 0)
    # Scores count up over tau first, then lambda_c, then lambda_s.
    assert np.array_equal(first.images[0].get_array(), [[0, 2], [4, 6]])
    assert {image.get_clim() for panel in (first, second) for image in panel.images} == {(0, 7)}
    assert "higher is better" in bar.get_ylabel()
    assert "4 validation pairs" in figure.get_suptitle()
    assert "not on these panels" not in figure.get_suptitle()


def test_the_picture_shows_the_best_blocks_and_shape() -> None:
    grid = Grid([1, 2], ["parabola", "gaussian"], [2.0, 3.0], [0.35], [0.2])
    own = Scored(Matex(grad_layers=1, lambda_s=2.0), 0.0, Sums.of(torch.zeros(1)))
    best = Scored(Matex(grad_layers=2, prior_shape="gaussian", lambda_s=3.0), 3.0, Sums.of(torch.ones(1)))
    scores = torch.arange(8.0, dtype=torch.float64).view(grid.shape)
    found = Choice(find_objective("confidence_drop"), grid, scores, None, own, [best, own], {})
    panel, _ = draw_surface(found, 1).axes
    assert panel.images[0].get_array().tolist() == [[6], [7]]
    assert panel.images[0].get_cmap().name == "viridis_r"
    assert len(panel.lines) == 1
    title = panel.figure.get_suptitle().replace("\n", " ")
    assert "panels at the best grad_layers and prior_shape" in title
    assert title.count("not on these panels") == 1


def test_the_default_grid_holds_the_settings_of_measured() -> None:
    own = Matex.measured()
    assert own.lambda_s in LAMBDA_S
    assert own.lambda_c in LAMBDA_C
    assert own.tau in TAU
    assert (min(LAMBDA_S), max(LAMBDA_S), min(LAMBDA_C), max(LAMBDA_C)) == (1.5, 3.5, 0.2, 0.6)
    assert len(list(product(LAMBDA_S, LAMBDA_C, TAU))) > 500
    assert choose.FINALISTS > 1
