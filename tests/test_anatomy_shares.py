"""Shares of maps in structures of the image, and the prior in the rectangle around the lungs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from reference import matex as slow_matex
from torch import Tensor

from matex_pl import ClipModule
from matex_pl.anatomy import parse_phrase, prior_map
from matex_pl.attribution import CenterMap, Chefer, Matex, PriorOnly
from matex_pl.attribution.several import attribute_methods
from matex_pl.benchmark import run_benchmark
from matex_pl.callbacks import AttributionMetrics
from matex_pl.callbacks.reader import Reader
from matex_pl.callbacks.scalars import _layout
from matex_pl.clip import Clip
from matex_pl.data import ImageTextPair, PhantomDataModule
from matex_pl.data.chest import chest_boxes
from matex_pl.evaluation.pairs import choose_pairs, prepare_data, read_pairs, shuffled_phrases
from matex_pl.evaluation.store import MapStore, fill_store, pair_keys
from matex_pl.metrics import functional as F
from matex_pl.roar.foreign import GatheredPairs
from matex_pl.roar.images import PlanImages, write_images
from matex_pl.tune import tune_matex

TINY = str(Path(__file__).with_name("tiny.json"))
NAMES = ("left_lung", "right_lung", "heart")


class Masked(PhantomDataModule):
    """Boxes as masks: every third image has none, every third the heart alone."""

    def read_masks(self, pair: ImageTextPair) -> Mapping[str, np.ndarray]:
        kind, size = int(pair.image) % 3, self.stored_size
        edges = {"right_lung": (0.1, 0.2, 0.4, 0.8), "left_lung": (0.6, 0.2, 0.9, 0.7), "heart": (0.3, 0.5, 0.7, 0.8)}
        masks = {}
        for name, box in edges.items():
            x0, y0, x1, y1 = (round(edge * size) for edge in box)
            masks[name] = np.zeros((size, size), bool)
            masks[name][y0:y1, x0:x1] = True
        return {0: masks, 1: {}, 2: {"heart": masks["heart"]}}[kind]


class Unplaced(Masked):
    """Without a usual place."""

    def thorax(self) -> None:
        return None


def masked(root: Path, kind: type[PhantomDataModule] = Masked) -> PhantomDataModule:
    return kind(
        root=str(root), num_train=12, num_val=8, num_test=8, stored_size=64, image_size=32, batch_size=4, num_workers=0
    )


@pytest.fixture
def batch(image_root: Path) -> Any:
    data = masked(image_root)
    prepare_data(data, (32, 32), "test")
    return read_pairs(data, "test", data.pairs["test"], 99)[0]


def random_masks(seed: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Six maps, masks that are absent in some images and overlap in others, and rectangles of the images."""
    torch.manual_seed(seed)
    maps, masks = torch.rand(6, 7, 9), {name: torch.rand(6, 7, 9) > 0.6 for name in (*NAMES, "clavicle")}
    masks["left_lung"][1], masks["heart"][2], masks["right_lung"][3] = False, False, False
    maps[4], maps[5] = 0, 0.5
    return maps, masks, torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.0, 0.8, 1.0], [0.0, 0.3, 1.0, 0.7]] * 2)


def slow_shares(heat: Tensor, masks: dict[str, Tensor], box: list[float]) -> dict[str, float]:
    """The shares of one map, pixel by pixel."""
    height, width = heat.shape
    pixels = [(row, column) for row in range(height) for column in range(width)]
    x0, y0, x1, y1 = box
    content = [(r, c) for r, c in pixels if x0 <= (c + 0.5) / width < x1 and y0 <= (r + 0.5) / height < y1]
    total = sum(float(heat[p]) for p in pixels)
    peak = max(pixels, key=lambda p: float(heat[p]))
    found = {}
    for name, mask in masks.items():
        inside = [p for p in pixels if mask[p]]
        if not inside:
            continue
        mass = sum(float(heat[p]) for p in inside) / total if total else float("nan")
        area = sum(p in content for p in inside) / len(content)
        found |= {f"mass/{name}": mass, f"area/{name}": area, f"mass_ratio/{name}": mass / area}
        if float(heat.max()) > float(heat.min()):
            found[f"peak/{name}"] = float(peak in inside)
    if masks["left_lung"].any() and masks["right_lung"].any():
        parts: dict[str, float] = {name: 0.0 for name in (*NAMES, "rest") if name == "rest" or masks[name].any()}
        for p in pixels:
            first = next((name for name in NAMES if masks[name][p]), "rest")
            parts[first] += float(heat[p])
        found |= {f"part/{name}": part / total if total else float("nan") for name, part in parts.items()}
    return found


@pytest.mark.parametrize("seed", range(3))
def test_shares_against_a_loop(seed: int) -> None:
    maps, masks, boxes = random_masks(seed)
    found = F.anatomy_shares(maps, masks, boxes)
    for row in range(len(maps)):
        slow = slow_shares(maps[row], {name: mask[row] for name, mask in masks.items()}, boxes[row].tolist())
        for name, values in found.items():
            assert float(values[row]) == pytest.approx(slow.get(name, float("nan")), abs=1e-6, nan_ok=True), (name, row)
        assert set(slow) <= found.keys()


def test_limits_of_the_shares() -> None:
    lungs = torch.zeros(1, 4, 8, dtype=torch.bool)
    masks = {"left_lung": lungs.clone(), "right_lung": lungs.clone(), "heart": lungs.clone()}
    masks["right_lung"][0, :, 2:4], masks["left_lung"][0, :, 4:6], masks["heart"][0, 1:3, 3:5] = True, True, True
    # The image is the middle half of the frame, which the lungs fill.
    box = torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    even = torch.zeros(1, 4, 8)
    even[..., 2:6] = 0.5
    found = {name: float(value) for name, value in F.anatomy_shares(even, masks, box).items()}
    assert found["mass_ratio/left_lung"] == found["mass_ratio/right_lung"] == found["mass_ratio/heart"] == 1
    assert (found["area/left_lung"], found["area/heart"]) == (0.5, 0.25)
    # The lungs hide the heart whole.
    parts = {name: found[f"part/{name}"] for name in (*NAMES, "rest")}
    assert parts == {"left_lung": 0.5, "right_lung": 0.5, "heart": 0, "rest": 0}
    point = torch.zeros(1, 4, 8)
    point[0, 0, 5] = 1
    found = {name: float(value) for name, value in F.anatomy_shares(point, masks, box).items()}
    assert (found["mass/left_lung"], found["peak/left_lung"], found["mass/heart"], found["peak/heart"]) == (1, 1, 0, 0)
    assert F.anatomy_shares(torch.zeros(1, 4, 8), masks)["mass/heart"].isnan().all()
    assert F.anatomy_shares(point, {}) == {}
    # Without one of the lungs there is no partition, and without a heart it is part of the rest.
    alone = F.anatomy_shares(point, {"left_lung": masks["left_lung"], "right_lung": torch.zeros_like(lungs)})
    assert alone["part/rest"].isnan().all()
    assert "part/rest" not in F.anatomy_shares(point, {"heart": masks["heart"]})


def test_outside_is_by_the_masks_of_the_image_or_else_by_the_usual_place() -> None:
    maps, masks, _ = random_masks()
    usual = torch.rand(7, 9) > 0.5
    zone = F.thorax_zone(masks, maps, usual)
    union = masks["left_lung"] | masks["right_lung"] | masks["heart"]
    for row in range(6):
        assert torch.equal(zone[row], usual if row in (1, 3) else union[row])
    without = F.outside_mass(maps, F.thorax_zone(masks, maps))
    assert without.isnan().tolist() == [False, True, False, True, True, False]
    assert torch.equal(F.thorax_zone({}, maps, usual), usual.expand(6, 7, 9))


def test_the_rectangle_around_the_lungs_against_a_loop() -> None:
    _, masks, _ = random_masks()
    for name in NAMES:
        masks[name] &= torch.rand(6, 7, 9) > 0.8
    found = chest_boxes(masks, 6)
    for row in range(6):
        lungs = [masks[name][row].nonzero().tolist() for name in ("left_lung", "right_lung")]
        if not all(lungs):
            assert found[row].isnan().all()
            continue
        rows, columns = zip(*(lungs[0] + lungs[1]), strict=True)
        edges = [min(columns) / 9, min(rows) / 7, (max(columns) + 1) / 9, (max(rows) + 1) / 7]
        assert found[row].tolist() == pytest.approx(edges)
    assert not found.isnan().all()
    assert chest_boxes({}, 2).isnan().all()
    assert chest_boxes({"left_lung": masks["left_lung"]}, 6).shape == (6, 4)


PHRASES = ["left lower lobe consolidation", "right apical pneumothorax", "cardiomegaly", "edema"]
CHEST = torch.tensor([[0.2, 0.1, 0.7, 0.9], [torch.nan] * 4, [0.3, 0.2, 0.9, 0.8], [torch.nan] * 4])
CONTENT = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 1.0, 0.75], [0.1, 0.0, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0]])


@pytest.fixture
def inputs(tiny_clip: Clip) -> tuple[Clip, Tensor, Tensor, list[str]]:
    torch.manual_seed(0)
    return tiny_clip, torch.randn(4, 3, 32, 32), tiny_clip.tokenize(PHRASES), PHRASES


def test_prior_in_the_rectangle_of_the_lungs(inputs: Any) -> None:
    """Each row has its own frame: that of the lungs, and of the image where there are none."""
    chosen = PriorOnly(prior_frame="chest").attribute(*inputs, CONTENT, CHEST).image
    for row, phrase in enumerate(PHRASES):
        frame = CONTENT[row] if CHEST[row].isnan().any() else CHEST[row]
        slow = prior_map(parse_phrase(phrase).regions, (32, 32), content_box=frame) - 1
        torch.testing.assert_close(chosen[row], slow / slow.max() if slow.max() else slow)
    image = PriorOnly().attribute(*inputs, CONTENT, CHEST).image
    assert torch.equal(image, PriorOnly().attribute(*inputs, CONTENT).image)
    assert [torch.equal(chosen[row], image[row]) for row in range(4)] == [False, True, True, True]
    # The third phrase names a place only if usual places count.
    usual = [PriorOnly(knowledge_prior=True, prior_frame=frame).attribute(*inputs, CONTENT, CHEST).image[2]
             for frame in ("image", "chest")]  # fmt: skip
    assert not torch.equal(*usual)


@pytest.mark.parametrize("method", [Matex(), Matex(fusion="product", fuse_at="grid"), PriorOnly()])
def test_a_chest_as_large_as_the_image_changes_nothing(inputs: Any, method: Any) -> None:
    chest = type(method)(**method.settings | {"prior_frame": "chest"})
    wanted = method.attribute(*inputs, CONTENT).image
    assert torch.equal(chest.attribute(*inputs, CONTENT, CONTENT).image, wanted)
    assert torch.equal(chest.attribute(*inputs, CONTENT, torch.full((4, 4), torch.nan)).image, wanted)
    assert torch.equal(chest.attribute(*inputs, CONTENT).image, wanted)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    assert torch.equal(chest.attribute(*inputs, None, CHEST).image, chest.attribute(*inputs, whole, CHEST).image)


@pytest.mark.parametrize("settings", [{}, {"fusion": "product"}, {"fuse_at": "grid", "prior_shape": "gaussian"}])
def test_matex_in_the_chest_against_the_reference(inputs: Any, settings: dict[str, Any]) -> None:
    clip, images, tokens, phrases = inputs
    frames = torch.where(CHEST.isnan(), CONTENT, CHEST)
    expected = slow_matex(clip, images, tokens, phrases, frames, **settings)
    method = Matex(**settings, prior_frame="chest")
    maps = method.attribute(*inputs, CONTENT, CHEST)
    torch.testing.assert_close(maps.image.double(), expected["image"].double(), atol=1e-4, rtol=0)
    # Both frames are reached from the parts of either.
    image = Matex(**settings).attribute(*inputs, CONTENT, CHEST)
    assert torch.equal(Matex.fuse(image.parts, prior_frame="chest").image, maps.image)
    assert torch.equal(Matex.fuse(maps.parts, prior_frame="image").image, image.image)
    assert not torch.equal(maps.image, image.image)
    both = attribute_methods({"a": Matex(**settings), "b": method, "c": PriorOnly(prior_frame="chest")}, *inputs,
                             CONTENT, CHEST)  # fmt: skip
    assert torch.equal(both["b"].image, maps.image)
    assert torch.equal(both["c"].image, PriorOnly(prior_frame="chest").attribute(*inputs, CONTENT, CHEST).image)


def test_phrases_of_one_image_have_its_lungs(inputs: Any) -> None:
    clip, images, _, phrases = inputs
    for method in (Matex(prior_frame="chest"), PriorOnly(prior_frame="chest")):
        maps = method.attribute_phrases(clip, images[0], phrases, CONTENT[1], CHEST[0])
        wanted = method.attribute(clip, images[:1], clip.tokenize(phrases[:1]), phrases[:1], CONTENT[1:2], CHEST[:1])
        torch.testing.assert_close(maps.image[:1], wanted.image)


@pytest.mark.parametrize(
    ("chest", "message"),
    [
        (CHEST[:2], "'chest_box': 2"),
        (CHEST[:, :2], r"chest_box must be \(4, 4\)"),
        (CHEST[0], r"chest_box must be \(4, 4\)"),
        (CHEST.flip(1), "chest_box of pair 'left lower lobe consolidation' has no size"),
        (CHEST.nan_to_num(1.0).where(torch.tensor([True, True, True, False]), torch.nan), "chest_box of pair"),
    ],
)
def test_wrong_rectangles_are_refused(inputs: Any, chest: Tensor, message: str) -> None:
    for method in (Matex(), PriorOnly()):
        with pytest.raises(ValueError, match=message):
            method.attribute(*inputs, CONTENT, chest)
    clip, images, _, phrases = inputs
    with pytest.raises(ValueError, match=r"one chest_box \(4,\)"):
        Matex().attribute_phrases(clip, images[0], phrases, CONTENT[0], CHEST)


def test_an_unknown_frame_is_refused() -> None:
    for method in (Matex, PriorOnly):
        with pytest.raises(ValueError, match="prior_frame"):
            method(prior_frame="film")


# --- where maps are made


def test_batches_and_stores_know_the_lungs(tmp_path: Path, image_root: Path, tiny_clip: Clip, batch: Any) -> None:
    there = ~batch["chest_box"].isnan().any(1)
    data = masked(image_root)
    prepare_data(data, (32, 32), "test")
    assert there.tolist() == [int(pair.image) % 3 == 0 for pair in data.pairs["test"]]
    assert batch["chest_box"][there].tolist() == [pytest.approx([0.1, 0.2, 0.9, 0.8], abs=0.04)] * int(there.sum())
    method = PriorOnly(prior_frame="chest", knowledge_prior=True)
    keys, store = pair_keys(batch), MapStore(tmp_path, "weights", method)
    fill_store(tiny_clip, method, store, batch, keys, 3)
    images, tokens = tiny_clip.inputs(batch)
    wanted = method.attribute(tiny_clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"])
    assert torch.equal(store.read(keys).image, wanted.image)
    # Other lungs are another map.
    moved = pair_keys({**batch, "chest_box": batch["chest_box"] * 0.9})
    assert [key != other for key, other in zip(keys, moved, strict=True)] == there.tolist()


def test_roar_keeps_the_lungs(tmp_path: Path, image_root: Path, batch: Any) -> None:
    data = masked(image_root)
    prepare_data(data, (32, 32), "test")
    write_images(data, data.pairs["test"], tmp_path)
    plan = PlanImages(tmp_path)
    kept = plan.batch(range(len(plan.pairs)))
    rows = {name: row for row, name in enumerate(batch["id"])}
    order = [rows[name] for name in kept["id"]]
    torch.testing.assert_close(kept["chest_box"], batch["chest_box"][order], equal_nan=True, rtol=0, atol=0)
    assert pair_keys(kept) == plan.keys == [pair_keys(batch)[row] for row in order]
    # Pairs that a callback gathers keep their masks.
    gathered = GatheredPairs([("test", batch)])
    gathered.image_size = (32, 32)
    gathered.setup("test")
    (again,) = read_pairs(gathered, "test", gathered.pairs["test"], 99)
    torch.testing.assert_close(again["chest_box"], batch["chest_box"], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_phrases_are_of_other_patients(seed: int) -> None:
    generator = np.random.default_rng(seed)
    patients = generator.integers(0, 6, 20).astype(str).tolist()
    phrases = [f"phrase {row} of {patient}" for row, patient in enumerate(patients)]
    batches: Any = [
        {"phrase": phrases[start : start + 7], "patient_id": patients[start : start + 7]} for start in (0, 7, 14)
    ]
    found = [phrase for part in shuffled_phrases(batches, seed) for phrase in part]
    assert Counter(found) == Counter(phrases)
    assert not any(str(phrase).endswith(f" of {patient}") for phrase, patient in zip(found, patients, strict=True))
    assert found != [phrase for part in shuffled_phrases(batches, seed + 1) for phrase in part]


def test_a_patient_with_most_pairs_keeps_some_without() -> None:
    batches: Any = [{"phrase": ["a", "b", "c", "d"], "patient_id": ["x", "x", "x", "y"]}]
    (found,) = shuffled_phrases(batches, 0)
    assert found[3] in ("a", "b", "c")
    assert Counter(found[:3]) == {"d": 1, None: 2}
    assert shuffled_phrases([{"phrase": ["a", "b"], "patient_id": ["x", "x"]}], 0) == [[None, None]]  # type: ignore[typeddict-item]


# --- scalars, tables and the search


@pytest.mark.parametrize("kind", [Masked, Unplaced])
def test_scalars_of_the_structures(image_root: Path, kind: type[PhantomDataModule]) -> None:
    torch.manual_seed(0)
    module, data = ClipModule(TINY), masked(image_root, kind)
    metrics = AttributionMetrics({"": Chefer(), "center": CenterMap()}, num_batches=-1, fill="blur", per_finding=True)
    run = Trainer(accelerator="cpu", callbacks=[metrics], logger=False, enable_progress_bar=False)
    scores = run.validate(module, data, verbose=False)[0]
    (batch,) = read_pairs(data, "val", data.pairs["val"], 99)
    images, tokens = module.clip.inputs(batch)
    for prefix, method in (("attribution", Chefer()), ("attribution_center", CenterMap())):
        maps = method.attribute(module.clip, images, tokens, batch["phrase"]).image
        shares = F.anatomy_shares(maps, batch["masks"], batch["content_box"])
        logged = {name.partition("/")[2] for name in scores if name.startswith(f"{prefix}/")}
        structures = {name for name in logged if name.startswith(("mass/", "part/"))}
        assert structures == {*(f"mass/{name}" for name in NAMES), *(f"part/{name}" for name in (*NAMES, "rest"))}
        for name in structures:
            assert scores[f"{prefix}/{name}"] == pytest.approx(float(shares[name].nanmean()), abs=1e-5)
        outside = F.outside_mass(maps, F.thorax_zone(batch["masks"], maps, data.thorax()))
        assert scores[f"{prefix}/outside_thorax_mass"] == pytest.approx(float(outside.nanmean()), abs=1e-5)
        assert ("border_mass" in logged) == (kind is Unplaced)
        finding = batch["finding"][0]
        own = outside[torch.tensor([name == finding for name in batch["finding"]])].nanmean()
        if not own.isnan():
            assert scores[f"{prefix}/outside_thorax_mass/{finding}"] == pytest.approx(float(own), abs=1e-5)


def test_charts_of_the_structures() -> None:
    charts = _layout(["attribution/mass/heart", "attribution/mass/left_lung", "attribution/cnr/nodule"])
    assert charts["attribution per structure"] == {
        "mass": ["Multiline", ["attribution/mass/heart$", "attribution/mass/left_lung$"]]
    }
    assert list(charts["attribution per finding"]) == ["cnr"]


def test_masks_of_foreign_batches() -> None:
    """A reader finds masks of any number type, and refuses those of another size."""
    module = ClipModule(TINY)
    trainer: Any = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    lungs = torch.zeros(2, 32, 32, dtype=torch.uint8)
    lungs[0, 4:20, 8:12] = 1
    their = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "phrase": ["a", "b"]}
    read = Reader(masks="organs").read(trainer, module, their | {"organs": {"left_lung": lungs, "right_lung": lungs}})
    assert read["masks"]["left_lung"].dtype == torch.bool
    assert read["chest_box"][0].tolist() == [8 / 32, 4 / 32, 12 / 32, 20 / 32]
    assert read["chest_box"][1].isnan().all()
    assert Reader().read(trainer, module, their)["masks"] == {}
    with pytest.raises(ValueError, match=r"masks 'heart' must be \(2, 32, 32\).*got \(2, 16, 16\)"):
        Reader().read(trainer, module, their | {"masks": {"heart": lungs[:, ::2, ::2]}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_steps": 1, "enable_checkpointing": False, "limit_val_batches": 0}
    run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, num_sanity_val_steps=0, **settings)
    module = ClipModule(TINY, warmup_steps=0)
    run.fit(module, masked(image_root))
    run.save_checkpoint(path)
    return path


def test_the_benchmark_has_tables_of_the_structures(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    small: dict[str, Any] = {"num_pairs": 8, "validation_pairs": 2, "sanity_pairs": 1, "steps": 2, "resamples": 100}
    data = masked(image_root)
    run_benchmark(data, str(checkpoint), str(tmp_path), ["chefer"], **small)
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    row = next(row for row in result["rows"] if row["name"] == "Chefer" and row["modality"] == "image")
    clip = ClipModule.load_from_checkpoint(checkpoint, map_location="cpu").eval().clip
    (batch,) = read_pairs(data, "test", choose_pairs(data, "test", 8, 0), 99)
    images, tokens = clip.inputs(batch)
    maps = Chefer().attribute(clip, images, tokens, batch["phrase"]).image
    wanted = F.anatomy_shares(maps, batch["masks"], batch["content_box"])
    ((*phrases,),) = shuffled_phrases([batch], 0)
    shuffled = Chefer().attribute(clip, images, clip.tokenize(phrases), phrases).image
    for name, mask in batch["masks"].items():
        wanted[f"shuffled_mass/{name}"] = F.mass_share(shuffled, mask)
        wanted[f"mass_gain/{name}"] = wanted[f"mass/{name}"] - F.mass_share(shuffled, mask)
    for name, values in wanted.items():
        score = row["scores"][name]
        assert score["value"] == pytest.approx(float(values.nanmean()), abs=1e-4), name
        assert score["n"] == int((~values.isnan()).sum())
    assert wanted.keys() | {"outside_thorax_mass"} <= row["scores"].keys()
    finding = next(iter(row["quartiles"]))
    about = torch.tensor([name == finding for name in batch["finding"]])
    kept = wanted["mass/heart"][about]
    kept = kept[~kept.isnan()]
    if len(kept):
        score = row["quartiles"][finding]["mass/heart"]
        ends = torch.quantile(kept, torch.tensor([0.5, 0.25, 0.75])).tolist()
        assert [score["value"], score["low"], score["high"]] == pytest.approx(ends, abs=1e-4)
    tables, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("tables.md", "report.html"))
    for text in (tables, page):
        assert "Anatomy: left lung" in text
        assert "Anatomy: disjoint parts" in text
        assert "Part, heart outside of the lungs" in text
        assert "Mass, heart, median and quartiles" in text
        assert "Mass, gain, right lung" in text


def test_the_search_takes_the_place_of_the_lungs_from_the_masks(
    tmp_path: Path, image_root: Path, checkpoint: Path
) -> None:
    method, data = Matex(prior_frame="chest", knowledge_prior=True), masked(image_root, Unplaced)
    settings: dict[str, Any] = {"objective": "outside_thorax_mass", "lambda_s": [2.0, 3.0], "tau": [0.2]}
    tune_matex(data, str(checkpoint), str(tmp_path), method, lambda_c=[0.35], **settings)
    content = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert "prior_frame: chest" in (tmp_path / "tuned.yaml").read_text(encoding="utf-8")
    clip = ClipModule.load_from_checkpoint(checkpoint, map_location="cpu").eval().clip
    (batch,) = read_pairs(data, "test", data.pairs["test"], 99)
    images, tokens = clip.inputs(batch)
    maps = method.attribute(clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]).image
    outside = F.outside_mass(maps, F.thorax_zone(batch["masks"], maps))
    assert content["test"]["own"] == pytest.approx(float(outside.nanmean()), abs=1e-4)
