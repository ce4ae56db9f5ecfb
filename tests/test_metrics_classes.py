"""The torchmetrics classes: what they reduce to, repeats, processes, and what users expect of a metric."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import MetricCollection

from matex_pl.maps import Word
from matex_pl.metrics import (
    AveragePrecision50,
    BoxAccuracy,
    BoxContrast,
    ConfidenceDrop,
    ConfidenceIncrease,
    ContrastToNoise,
    DeletionAUC,
    EnergyPointingGame,
    InsertionAUC,
    MapMass,
    MeanIoU,
    OutsideMass,
    PointingGame,
    RankCorrelation,
    RelevanceRankAccuracy,
    RemovalDrop,
    SideSensitivity,
    ThresholdedIoU,
    WordLaterality,
    confidence,
    functional,
    localization,
    sensitivity,
)
from matex_pl.metrics.base import BoxMetric, PairMetric
from matex_pl.metrics.functional import THRESHOLDS, box_masks

matplotlib.use("Agg")

SIZE = (9, 7)
PAIRS = 8
IDS = [f"pair {index}" for index in range(PAIRS)]
SIDES = ["right", "left", "", "left", "right", "right", "", "left"]
# Only the first word has a map.
SIDE_PHRASES = [f"{side} effusion" if side else "effusion" for side in SIDES]
SIDE_WORDS = [[Word(phrase.split()[0], 0, len(phrase.split()[0]))] for phrase in SIDE_PHRASES]


def _maps(seed: int = 0) -> Tensor:
    return torch.randint(0, 6, (PAIRS, *SIZE), generator=torch.Generator().manual_seed(seed)) / 5


def _boxes() -> list[Tensor]:
    """None to three boxes per pair."""
    corners = torch.rand(PAIRS, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    boxes = [torch.cat([corner.amin(1), corner.amax(1)], 1)[: n % 4] for n, corner in enumerate(corners)]
    boxes[2] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    return boxes


def _masks() -> Tensor:
    return box_masks(_boxes(), SIZE)


def _scores(seed: int = 0) -> Tensor:
    return torch.rand(PAIRS, generator=torch.Generator().manual_seed(seed))


def _curves() -> Tensor:
    """From the blank to the whole image, which scores higher in the sum, but not in every pair."""
    curves = torch.rand(5, PAIRS, generator=torch.Generator().manual_seed(0))
    curves[-1] += 0.2
    assert 0 < (curves[-1] < curves[0]).sum() < PAIRS
    return curves


def _pick(values: Any, rows: list[int]) -> Any:
    return [values[row] for row in rows] if isinstance(values, list) else values[rows]


def _mean(values: Tensor) -> float:
    counted = [value for value in values.tolist() if not math.isnan(value)]
    return sum(counted) / len(counted)


def _ratio(curves: Tensor) -> float:
    """Of curves from the blank to the whole image, or back."""
    gain, span = functional.curve_area(curves, _curves()[0], _curves()[-1])
    return float(gain.sum() / span.sum())


def _precision() -> float:
    found = functional.components(_maps(), 0.5)
    hits = functional.match_components(found, _boxes())
    number = torch.tensor([len(box) for box in _boxes()])
    return float(functional.average_precision(found.peak, hits, found.pair, number))


@dataclass
class Case:
    """A metric, the arguments of `update` for some of the pairs, and its value over all of them."""

    make: Callable[[], PairMetric]
    inputs: Callable[[list[int]], tuple[Any, ...]]
    value: Callable[[], float]


def _boxed(make: Callable[[], PairMetric], value: Callable[[], float]) -> Case:
    return Case(make, lambda rows: (_maps()[rows], _pick(_boxes(), rows)), value)


def _scored(make: Callable[[], PairMetric], function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    return Case(make, lambda rows: (_scores()[rows], _scores(1)[rows]), lambda: _mean(function(_scores(), _scores(1))))


CASES: dict[str, Case] = {
    "confidence_drop": _scored(ConfidenceDrop, functional.confidence_drop),
    "confidence_increase": _scored(ConfidenceIncrease, functional.confidence_increase),
    "removal_drop": _scored(RemovalDrop, functional.confidence_drop),
    "insertion": Case(InsertionAUC, lambda rows: (_curves()[:, rows],), lambda: _ratio(_curves())),
    "deletion": Case(DeletionAUC, lambda rows: (_curves().flip(0)[:, rows],), lambda: _ratio(_curves().flip(0))),
    "pointing_game": _boxed(PointingGame, lambda: _mean(functional.pointing_game(_maps(), _masks()))),
    "cnr": _boxed(ContrastToNoise, lambda: _mean(functional.contrast_to_noise(_maps(), _masks()))),
    "box_contrast": _boxed(BoxContrast, lambda: _mean(functional.box_contrast(_maps(), _boxes()))),
    "energy": _boxed(EnergyPointingGame, lambda: _mean(functional.energy_pointing_game(_maps(), _masks()))),
    "relevance_rank_accuracy": _boxed(
        RelevanceRankAccuracy, lambda: _mean(functional.relevance_rank_accuracy(_maps(), _masks()))
    ),
    "mean_iou": _boxed(MeanIoU, lambda: _mean(functional.mean_iou(_maps(), _masks()))),
    "iou_best": _boxed(
        ThresholdedIoU, lambda: max(_mean(functional.iou(_maps(), _masks(), [t])[:, 0]) for t in THRESHOLDS)
    ),
    "iou_given": _boxed(lambda: ThresholdedIoU(0.33), lambda: _mean(functional.iou(_maps(), _masks(), [0.33])[:, 0])),
    "box_accuracy": _boxed(
        lambda: BoxAccuracy(0.1, iou=0.2),
        lambda: _mean(functional.box_accuracy(functional.components(_maps(), 0.1), _boxes(), PAIRS, 0.2)),
    ),
    "ap50": _boxed(AveragePrecision50, _precision),
    "correlation": Case(
        RankCorrelation,
        lambda rows: (_maps()[rows], _maps(1)[rows], _masks()[rows]),
        lambda: _mean(functional.spearman(_maps().flatten(1), _maps(1).flatten(1), _masks().flatten(1))),
    ),
    "side_sensitivity": Case(
        SideSensitivity,
        lambda rows: (_maps()[rows], _maps(1)[rows], _pick(SIDES, rows)),
        lambda: _mean(functional.side_sensitivity(_maps(), _maps(1), SIDES)),
    ),
    "word_laterality": Case(
        WordLaterality,
        lambda rows: (_pick(list(_maps()[:, None]), rows), _pick(SIDE_WORDS, rows), _pick(SIDE_PHRASES, rows)),
        lambda: _mean(functional.half_share(_maps(), SIDES)),
    ),
    "outside_mass": Case(
        OutsideMass,
        lambda rows: (_maps()[rows], _masks()[rows]),
        lambda: _mean(functional.outside_mass(_maps(), _masks())),
    ),
    "map_mass": Case(MapMass, lambda rows: (_maps()[rows],), lambda: float(_maps().mean())),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _seen(case: Case, *batches: list[int], named: bool = True) -> PairMetric:
    """The metric after batches of these pairs."""
    metric = case.make()
    for rows in batches:
        metric.update(*case.inputs(rows), ids=_pick(IDS, rows) if named else None)
    return metric


def test_every_class_has_a_case() -> None:
    import matex_pl.metrics

    assert {type(case.make()).__name__ for case in CASES.values()} == set(matex_pl.metrics.__all__)


@every_case
def test_a_class_reduces_its_function_over_updates(case: Case) -> None:
    wanted = pytest.approx(case.value(), abs=1e-6)
    assert not math.isnan(case.value())
    for named in (True, False):
        metric = _seen(case, [0, 1, 2, 3, 4], [5], [6, 7], named=named)
        assert float(metric.compute()) == wanted
        assert metric.compute().dtype == torch.float32
        assert metric.compute().ndim == 0
        metric.reset()
        metric.update(*case.inputs(list(range(PAIRS))))
        assert float(metric.compute()) == wanted


@every_case
def test_repeats_count_once_by_id_and_always_without(case: Case) -> None:
    # Three times over, so that no class can come to the same value by chance.
    repeats = [[0, 1, 1, 1, 2, 3], [1, 4, 5], [1, 6, 7, 7, 1]]
    assert float(_seen(case, *repeats).compute()) == pytest.approx(case.value(), abs=1e-6)
    doubled = float(_seen(case, list(range(PAIRS)), list(range(PAIRS)), named=False).compute())
    assert len(_seen(case, *repeats, named=False)._counted().nonzero()) == 14
    assert len(_seen(case, *repeats)._counted().nonzero()) == PAIRS
    # What counts twice throughout is the same mean; a precision, too.
    assert doubled == pytest.approx(case.value(), abs=1e-6)
    uneven = float(_seen(case, [0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 3, 1], named=False).compute())
    assert uneven != pytest.approx(case.value(), abs=1e-6)


@every_case
def test_pairs_with_and_without_id_may_be_mixed(case: Case) -> None:
    mixed = _seen(case, [0, 1, 2], [1, 2])
    for rows in ([3, 4, 5], [6, 7]):
        mixed.update(*case.inputs(rows))
    assert float(mixed.compute()) == pytest.approx(case.value(), abs=1e-6)


@every_case
def test_the_order_of_pairs_changes_nothing(case: Case) -> None:
    assert float(_seen(case, [6, 2, 7], [0, 5, 3, 1], [4]).compute()) == pytest.approx(case.value(), abs=1e-6)


@every_case
def test_states_merge_and_forward_gives_the_batch(case: Case) -> None:
    first, second = _seen(case, [0, 1, 2, 3]), _seen(case, [3, 4, 5, 6, 7, 0])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(case.value(), abs=1e-6)
    stepwise = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = stepwise(*case.inputs([1, 2, 3]), ids=_pick(IDS, [1, 2, 3]))
        alone = _seen(case, [1, 2, 3]).compute()
    torch.testing.assert_close(batch, alone, equal_nan=True)
    rest = [0, 4, 5, 6, 7, 1]
    stepwise.update(*case.inputs(rest), ids=_pick(IDS, rest))
    assert float(stepwise.compute()) == pytest.approx(case.value(), abs=1e-6)


TOGETHER = {
    "boxes": [name for name, case in CASES.items() if issubclass(type(case.make()), BoxMetric)],
    "scores": ["confidence_drop", "confidence_increase", "removal_drop"],
    "curves": ["insertion", "deletion"],
}


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_metrics_of_a_collection_keep_their_own_values(names: list[str]) -> None:
    """After a first pair whose value is 0 in each of them, by which a collection would take them for one."""
    first = {
        "boxes": (torch.zeros(1, *SIZE), [torch.tensor([[0.5, 0.5, 1.0, 1.0]])]),
        "scores": (torch.ones(1), torch.ones(1)),
        "curves": (torch.ones(3, 1),),
    }[next(group for group, members in TOGETHER.items() if members is names)]
    collection = MetricCollection({name: CASES[name].make() for name in names}, compute_groups=True)
    alone = {name: CASES[name].make() for name in names}
    for inputs in (first, CASES[names[0]].inputs([0, 1, 2, 3]), CASES[names[0]].inputs([4, 5, 6, 7])):
        collection.update(*inputs)
        for metric in alone.values():
            metric.update(*inputs)
    wanted = {name: metric.compute() for name, metric in alone.items()}
    torch.testing.assert_close(collection.compute(), wanted, equal_nan=True)
    assert len({float(value) for value in wanted.values()}) > 1


def test_equal_metrics_of_a_collection_share_their_states() -> None:
    collection = MetricCollection({"a": BoxAccuracy(0.2), "b": BoxAccuracy(0.2), "c": BoxAccuracy(0.3)})
    collection.update(*CASES["box_accuracy"].inputs([1, 2]))
    assert sorted(map(sorted, collection.compute_groups.values())) == [["a", "b"], ["c"]]


def test_contrast_without_the_padding() -> None:
    """The map is 0.5 in the padding; alone it is a step in a noise-free image."""
    maps = torch.full((1, 4, 8), 0.5)
    maps[:, :, 2:4], maps[:, :, 4:6] = torch.tensor([0.9, 0.7]), torch.tensor([0.1, 0.3])
    boxes, place = [torch.tensor([[0.25, 0.0, 0.5, 1.0]])], torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    whole, content = ContrastToNoise(), ContrastToNoise(content_only=True)
    whole.update(maps, boxes)
    content.update(maps, boxes, content_box=place)
    # By hand: 0.8 - 0.2 over the root of two variances of 0.01.
    assert float(content.compute()) == pytest.approx(0.6 / 0.02**0.5, abs=1e-4)
    assert float(whole.compute()) < float(content.compute())
    with pytest.raises(ValueError, match="needs the place of each image"):
        content.update(maps, boxes)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_the_same_values(case: Case, dtype: torch.dtype) -> None:
    def cast(value: Any, kind: torch.dtype) -> Any:
        return value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value

    half, full = case.make(), case.make()
    inputs = [cast(value, dtype) for value in case.inputs(list(range(PAIRS)))]
    half.update(*inputs)
    full.update(*(cast(value, torch.float32) for value in inputs))
    torch.testing.assert_close(half.compute(), full.compute(), atol=1e-3, rtol=1e-2)


def test_components_rank_by_the_scores_of_their_pairs() -> None:
    """Of two maps that peak at 1, the one of the alike pair comes first: against pycocotools."""
    maps = _maps()
    boxes = [box if len(box) else torch.tensor([[0.1, 0.1, 0.4, 0.5]]) for box in _boxes()]
    pair_scores = torch.linspace(-0.5, 0.9, PAIRS)[torch.randperm(PAIRS, generator=torch.Generator().manual_seed(3))]
    metric, by_peak = AveragePrecision50(0.3, iou=0.2), AveragePrecision50(0.3, iou=0.2)
    metric.update(maps, boxes, pair_scores=pair_scores)
    by_peak.update(maps, boxes)
    found = functional.components(maps, 0.3)
    assert (found.peak == 1).sum() > 2
    coco = COCO()
    frame = {"width": 1, "height": 1}
    truth = [(pair, box.tolist()) for pair, own in enumerate(boxes) for box in own]
    coco.dataset = {
        "images": [{"id": pair, **frame} for pair in range(PAIRS)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": number + 1, "image_id": pair, "category_id": 1, "iscrowd": 0, "bbox": _corner_and_size(box),
             "area": (box[2] - box[0]) * (box[3] - box[1])}
            for number, (pair, box) in enumerate(truth)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        detections = [
            {"image_id": int(pair), "category_id": 1, "bbox": _corner_and_size(box.tolist()), "score": float(score)}
            for pair, box, score in zip(
                found.pair, found.boxes, functional.detection_scores(found, pair_scores), strict=True
            )
        ]
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.params.iouThrs = np.array([0.2])
        evaluation.params.recThrs = np.linspace(0, 1, 100_001)
        evaluation.evaluate()
        evaluation.accumulate()
    expected = float(evaluation.eval["precision"][0, :, 0, 0, 2].mean())
    assert 0 < expected < 1
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-3)
    assert float(by_peak.compute()) != pytest.approx(expected, abs=1e-2)


def _corner_and_size(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


@every_case
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_nan_with_a_warning(case: Case) -> None:
    for metric in (case.make(), _seen(case, []), _seen(case, [], named=False)):
        with pytest.warns(UserWarning, match="is NaN: none of the 0 pairs counts"):
            assert metric.compute().isnan()


@pytest.mark.parametrize("make", [case.make for name, case in CASES.items() if "iou" in name or "ap50" in name])
def test_pairs_without_boxes_do_not_count(make: Callable[[], PairMetric]) -> None:
    metric = make()
    metric.update(_maps()[:2], [torch.zeros(0, 4)] * 2)
    with pytest.warns(UserWarning, match="none of the 2 pairs counts"):
        assert metric.compute().isnan()
    maps = torch.zeros(1, *SIZE)
    maps[:, :, 1:] = 1
    metric.update(maps, [torch.tensor([[1 / SIZE[1], 0.0, 1.0, 1.0]])])
    assert metric.compute() == 1 if not isinstance(metric, AveragePrecision50) else metric.compute() > 0


@every_case
def test_ids_of_another_number_are_refused(case: Case) -> None:
    for ids in (["one"], "pair 1", [*IDS, "more"]):
        with pytest.raises(ValueError, match="ids must be a list of one id for each of 2 pairs"):
            case.make().update(*case.inputs([0, 1]), ids=ids)


@pytest.mark.parametrize("name", ["pointing_game", "iou_best", "box_accuracy", "ap50"])
def test_maps_and_boxes_of_different_number_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="2 maps, but boxes of 1 pairs"):
        CASES[name].make().update(_maps()[:2], _boxes()[:1])


@pytest.mark.parametrize("make", [ThresholdedIoU, BoxAccuracy, AveragePrecision50])
def test_a_threshold_is_in_the_range_of_maps(make: Callable[[float], PairMetric]) -> None:
    for threshold in (-0.1, 1.0, 50, math.nan):
        with pytest.raises(ValueError, match="threshold must be in"):
            make(threshold)


@pytest.mark.filterwarnings("ignore:.*is NaN")
def test_the_best_threshold_goes_to_another_split() -> None:
    metric = _seen(CASES["iou_best"], list(range(PAIRS)))
    means = [_mean(functional.iou(_maps(), _masks(), [t])[:, 0]) for t in THRESHOLDS]
    best = metric.best_threshold()
    # Maps of six values have the same IoU at several thresholds: the lowest is taken.
    assert best == THRESHOLDS[means.index(max(means))]
    assert means.count(max(means)) > 1
    again = ThresholdedIoU(best)
    again.update(_maps(), _boxes())
    torch.testing.assert_close(again.compute(), metric.compute())
    assert again.best_threshold() == best
    assert math.isnan(ThresholdedIoU().best_threshold())


def test_an_area_is_a_ratio_of_means() -> None:
    # The second model sees nothing in its image: its ratio alone would be -100.
    curve = torch.tensor([[0.0, 0.0], [0.4, -0.1], [0.4, 0.001]])
    metric = InsertionAUC()
    metric.update(curve)
    gain = (0.2 + 0.4) / 2 + (-0.05 + (-0.1 + 0.001) / 2) / 2
    assert float(metric.compute()) == pytest.approx(gain / 0.401, abs=1e-6)
    # Two images of NaN and of no span are left out, or leave nothing.
    metric.update(torch.full((3, 1), torch.nan))
    assert float(metric.compute()) == pytest.approx(gain / 0.401, abs=1e-6)
    flat = DeletionAUC()
    flat.update(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="DeletionAUC is NaN"):
        assert flat.compute().isnan()
    # A model to which images are less like their phrases than the fill is.
    less = InsertionAUC()
    less.update(torch.tensor([[0.3], [0.2], [0.1]]))
    with pytest.warns(UserWarning, match="InsertionAUC is NaN"):
        assert less.compute().isnan()


def test_an_area_takes_uneven_shares() -> None:
    metric = InsertionAUC()
    metric.update(torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([0.0, 0.2, 1.0]))
    assert float(metric.compute()) == pytest.approx(0.9)


def test_directions() -> None:
    lower = {ConfidenceDrop, DeletionAUC, RankCorrelation, OutsideMass}
    for case in CASES.values():
        metric = case.make()
        expected = None if isinstance(metric, MapMass) else type(metric) not in lower
        assert metric.higher_is_better is expected


@every_case
def test_plot(case: Case) -> None:
    metric = _seen(case, list(range(PAIRS)))
    figure, axes = metric.plot()
    assert figure is axes.get_figure()
    assert float(axes.lines[0].get_ydata()[0]) == pytest.approx(case.value(), abs=1e-6)
    _, axes = metric.plot([metric.compute(), metric.compute()])
    assert len(axes.lines[0].get_xdata()) == 2
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("module", [confidence, localization, sensitivity])
def test_examples(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert not failed
    assert tried >= 15


# --- two processes

# Padded shards: pair 0 comes in both, pair 5 twice in one.
SHARDS = [[[0, 2], [4, 6, 1]], [[1, 3, 5], [5, 7, 0]]]


def _process(rank: int, folder: str) -> None:
    """What each metric says in one of two processes, written to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found: dict[str, list[float]] = {}
    for name, case in CASES.items():
        apart = _seen(case, *SHARDS[rank])
        # All pairs on one process, nothing on the other.
        lopsided = _seen(case, *(SHARDS[0] + SHARDS[1] if rank else []))
        values = [float(apart.compute()), float(lopsided.compute())]
        # Afterwards each has its own again, and goes on.
        apart.update(*case.inputs([2]), ids=["pair 2"])
        values.append(float(apart.compute()))
        values.append(float(len(apart._gathered("keys"))))
        found[name] = values
    best = _seen(CASES["iou_best"], *SHARDS[rank])
    found["best_threshold"] = [best.best_threshold()]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_repeats_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, case in CASES.items():
            assert found[name][:3] == [pytest.approx(case.value(), abs=1e-6)] * 3, name
            assert found[name][3] == sum(map(len, SHARDS[rank])) + 1
        assert found["best_threshold"] == [_seen(CASES["iou_best"], list(range(PAIRS))).best_threshold()]


def test_the_tolerance_of_the_pointing_game_is_in_pixels_of_a_size() -> None:
    """The maximum lies three pixels left of the box on maps of 20 px."""
    maps = torch.zeros(1, 20, 20)
    maps[0, 10, 5] = 1
    boxes = [torch.tensor([[0.4, 0.4, 0.6, 0.6]])]
    for settings, hit in [
        ({}, 0.0),
        ({"tolerance": 2.9}, 0.0),
        ({"tolerance": 3}, 1.0),
        ({"tolerance": 15, "size": 100}, 1.0),
        ({"tolerance": 14, "size": 100}, 0.0),
        ({"tolerance": 15, "size": 518}, 0.0),
    ]:
        metric = PointingGame(**settings)
        metric.update(maps, boxes)
        assert float(metric.compute()) == hit, settings


@pytest.mark.parametrize("settings", [{"tolerance": -1}, {"tolerance": math.nan}, {"tolerance": 1, "size": 0}])
def test_a_wrong_tolerance_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be a number of pixels from [01], got"):
        PointingGame(**settings)


def test_mean_iou_of_rescaled_maps() -> None:
    maps, boxes = torch.tensor([[[0.2, 0.1], [0.1, 0.15]]]), [torch.tensor([[0.0, 0.0, 0.5, 0.5]])]
    for signed, value in ((False, 0.1), (True, 1.0)):
        metric = MeanIoU(signed=signed)
        metric.update(maps, boxes)
        assert float(metric.compute()) == pytest.approx(value, abs=1e-6)
