"""`matex benchmark` from the command line, its scores against what the methods give, and its intervals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ms_cxr import annotation_rows, write_annotations, write_images

from matex_pl import ClipModule
from matex_pl.anatomy import prune_phrase
from matex_pl.attribution import Chefer, Matex, Rise
from matex_pl.benchmark import run_benchmark
from matex_pl.benchmark.evaluate import Values
from matex_pl.benchmark.protocol import GroundingProtocol
from matex_pl.cli import main
from matex_pl.data import MsCxrDataModule, PhantomDataModule
from matex_pl.evaluation.columns import ANATOMY, AVERAGED, FINDINGS
from matex_pl.evaluation.compared import compared_rows, mean_boxes
from matex_pl.evaluation.intervals import Detections, Sums, draw_patients, estimate
from matex_pl.evaluation.pairs import choose_pairs, prepare_data, read_pairs
from matex_pl.evaluation.tensors import read_tensors
from matex_pl.metrics import functional as F
from matex_pl.metrics.removal import image_score
from matex_pl.report.results import Score
from matex_pl.report.tables import MISSING
from matex_pl.training import load_module

IMAGES = {"num_train": 12, "num_val": 6, "num_test": 10, "stored_size": 64, "batch_size": 4, "num_workers": 0}
SMALL = {"num_pairs": 7, "validation_pairs": 3, "sanity_pairs": 3, "batch_size": 3, "steps": 4, "resamples": 100}
CONTROLS = ["MATEX, delta = 0", "MATEX, usual places", "PriorOnly", "RandomMap", "CenterMap", "Mean box"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def data(images):
    return PhantomDataModule(root=str(images), **IMAGES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    """A model after two steps, which carries a mean image."""
    from lightning.pytorch import Trainer

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    module = ClipModule(str(Path(__file__).with_name("tiny.json")), lr=1e-3, warmup_steps=1)
    trainer.fit(module, PhantomDataModule(root=str(images), **IMAGES))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def run(data, checkpoint, out, **changes):
    run_benchmark(data, str(checkpoint), str(out), **{**SMALL, "methods": ["matex", "chefer"], **changes})
    return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))


def without_times(results):
    """What must not depend on when or how often a benchmark ran."""
    rows = [{name: value for name, value in row.items() if name != "seconds_per_pair"} for row in results["rows"]]
    return {**results, "rows": rows, "created": "", "forward_seconds_per_pair": 0}


def words(images, checkpoint, out, *more):
    data = [f"--data.{name}={value}" for name, value in {**IMAGES, "root": images}.items()]
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    command = ["benchmark", "--config", "phantom.yaml", *data, "--ckpt_path", str(checkpoint), "--out", str(out)]
    return [*command, *small, *more]


@pytest.mark.slow
def test_every_shipped_method_from_the_command_line(tmp_path, images, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("matex_pl.evaluation.compared.QUICK", {"Rise": {"masks": 6}, "KernelShap": {"samples": 6}})
    main(words(images, checkpoint, tmp_path))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    image = [row for row in results["rows"] if row["modality"] == "image"]
    text = [row for row in results["rows"] if row["modality"] == "text"]
    assert [row["name"] for row in image if row["control"]] == CONTROLS
    shown = {row["name"] for row in image if not row["control"]}
    assert {"MATEX", "MATEX, as printed", "Rise", "KernelShap", "M2ib", "GradCam", "LeGrad"} <= shown
    assert "SubmodularRegions" not in shown
    assert {"DenseSimilarity", "CenterMap", "PriorOnly"}.isdisjoint(row["name"] for row in text)
    assert next(row["note"] for row in image if row["name"] == "Rise") == "6 masks, fill: mean image"
    wanted = {
        "pointing_game",
        "cnr",
        "miou",
        "iou",
        "acc50",
        "ap50",
        "energy_pointing_game",
        "relevance_rank_accuracy",
        "sanity",
    }
    wanted |= {"prompt_sensitivity", "side_sensitivity", "outside_thorax_mass", "mean_map_mass"}
    wanted |= {"insertion/blur", "insertion/mean_image", "deletion/mean_color", "deletion/mean_image"}
    wanted |= {name + FINDINGS for name in AVERAGED & wanted}
    kinds = ("confidence_drop", "confidence_increase", "confidence_drop@50", "confidence_increase@50", "top20_removal")
    wanted |= {f"{kind}/{fill}" for kind in kinds for fill in ("mean_color", "mean_image")}
    for row in image:
        assert row["error"] == ""
        # Only one method has maps of single words.
        own = {"word_laterality"} if row["class"] == "WordRegions" else set()
        assert _without_structures(row["scores"]) == wanted | own
    of_tokens = {*kinds, "mean_map_mass", "sanity"}
    of_text = of_tokens | {f"{name}/words" for name in of_tokens}
    for row in text:
        assert set(row["scores"]) == of_text
    assert _without_structures(results["metrics"]) == wanted | of_text | {"word_laterality"}
    for name in ("report.html", "tables.md"):
        assert "Chefer" in (tmp_path / name).read_text(encoding="utf-8")
    assert "MATEX, delta = 0" in printed
    assert "report.html" in printed


def _without_structures(names):
    return {name for name in names if name.partition("/")[0] not in ANATOMY}


def curves(clip, images, grid, fill, text, kind):
    """Of each image: scores in steps of four patches `(5,)`, the area above the fill, and what the curve spans."""
    height, width = (side // cells for side, cells in zip(clip.image_size, clip.grid, strict=True))
    for image, cells, phrase in zip(images, grid, text, strict=True):
        order = sorted(np.ndindex(*cells.shape), key=lambda cell: (-float(cells[cell]), cell))
        scores = []
        for count in (0, 4, 8, 12, 16):
            keep = torch.full(clip.image_size, kind == "deletion")
            for row, column in order[:count]:
                keep[row * height : (row + 1) * height, column * width : (column + 1) * width] = kind == "insertion"
            scores.append(float(image_score(clip, image[None], keep[None], fill, phrase[None])))
        blank, full = (scores[0], scores[-1]) if kind == "insertion" else (scores[-1], scores[0])
        yield scores, (sum(scores) - (blank + full) / 2) / 4 - blank, full - blank


def test_scores_are_those_of_the_maps(tmp_path, data, checkpoint):
    """The mean over all pairs, computed in one piece from the method's own maps."""
    # In one batch, as below: the kept half of a coarse map ends among near-equal pixels, and another batch size rounds
    # them into another order.
    results = run(data, checkpoint, tmp_path, batch_size=100)
    clip = load_module(str(checkpoint)).clip
    prepare_data(data, clip.image_size, "test")
    pairs = choose_pairs(data, "test", SMALL["num_pairs"], 0)
    [batch] = read_pairs(data, "test", pairs, 100)
    assert results["data"]["pairs"] == len(pairs) == SMALL["num_pairs"]
    about = results["data"]["settings"]
    assert (about["stored_size"], about["num_test"], about["root"]) == (64, 10, str(data.root))
    assert not {"trainer", "prepare_data_per_node", "pairs"} & about.keys()
    images, tokens = clip.normalize(batch["image"]), clip.tokenize(batch["phrase"])
    maps = Chefer().attribute(clip, images, tokens, batch["phrase"], batch["content_box"])
    masks = F.box_masks(batch["boxes"], clip.image_size)
    row = next(row for row in results["rows"] if row["name"] == "Chefer" and row["modality"] == "image")
    with torch.no_grad():
        text, score = clip.encode_text(tokens), clip.similarity(images, tokens)
    rest = ~F.top_share(maps.image.flatten(1), 0.2).view_as(maps.image)
    order = maps.image.flatten(1).argsort(descending=True, stable=True)
    half = torch.zeros_like(order).scatter(1, order[:, : order.shape[1] // 2], 1).view_as(maps.image)
    half_score = {fill: image_score(clip, images, half, fill, text) for fill in ("mean_color", "mean_image")}
    threshold = row["threshold"]
    found = F.components(maps.image, threshold)
    by_hand = {
        "pointing_game": F.pointing_game(maps.image, masks),
        "cnr": F.contrast_to_noise(maps.image, masks),
        "miou": F.mean_iou(maps.image, masks),
        "iou": F.iou(maps.image, masks, torch.tensor([threshold]))[:, 0],
        "acc50": F.box_accuracy(found, batch["boxes"], len(pairs)),
        "energy_pointing_game": F.energy_pointing_game(maps.image, masks),
        "relevance_rank_accuracy": F.relevance_rank_accuracy(maps.image, masks),
        "outside_thorax_mass": F.outside_mass(maps.image, F.thorax_zone(batch["masks"], maps.image, data.thorax())),
        "mean_map_mass": maps.image.mean((1, 2)),
        "confidence_drop/mean_color": F.confidence_drop(
            score, image_score(clip, images, maps.image, "mean_color", text)
        ),
        "top20_removal/mean_image": F.confidence_drop(score, image_score(clip, images, rest, "mean_image", text)),
        "confidence_drop@50/mean_color": 100 * (score - half_score["mean_color"]).clamp(min=0),
        "confidence_increase@50/mean_image": 100.0 * (half_score["mean_image"] > score),
    }
    for name, values in by_hand.items():
        assert row["scores"][name]["value"] == pytest.approx(float(values.nanmean()), abs=2e-4), name
        assert row["scores"][name]["n"] == int((~values.isnan()).sum())
    everything = [read_tensors(path)[0] for path in (tmp_path / "values").iterdir()]
    for name in ("insertion/mean_image", "deletion/mean_color"):
        kind, _, fill = name.partition("/")
        by_image = list(curves(clip, images, maps.grid, fill, text, kind))
        scores, gain, span = (np.array(column) for column in zip(*by_image, strict=True))
        assert row["curves"][name]["score"] == pytest.approx(scores.mean(0), abs=1e-5), name
        # Where images score less than their fill there is no value, but there are its parts.
        own = next(kept for kept in everything if np.allclose(kept[f"image/curves/{name}"][:, 1:].T, scores, atol=1e-5))
        np.testing.assert_allclose(own[f"image/sums/{name}"], [gain, span], atol=1e-5)
    assert row["scores"]["deletion/mean_color"]["value"] == pytest.approx(gain.sum() / span.sum(), abs=1e-4)
    hits = F.match_components(found, batch["boxes"])
    boxes = torch.tensor([len(box) for box in batch["boxes"]])
    precision = F.average_precision(found.peak, hits, found.pair, boxes)
    assert row["scores"]["ap50"]["value"] == pytest.approx(float(precision), abs=1e-5)
    about = torch.tensor([pair.finding == pairs[0].finding for pair in pairs])
    own = row["per_finding"][pairs[0].finding]["cnr"]
    assert own["value"] == pytest.approx(float(by_hand["cnr"][about].nanmean()), abs=2e-4)


def test_text_scores_are_those_of_the_maps(tmp_path, data, checkpoint):
    """Phrase by phrase, with pads for what is taken."""
    results = run(data, checkpoint, tmp_path, methods=["chefer"])
    clip = load_module(str(checkpoint)).clip
    prepare_data(data, clip.image_size, "test")
    pairs = choose_pairs(data, "test", SMALL["num_pairs"], 0)
    [batch] = read_pairs(data, "test", pairs, 100)
    images, tokens = clip.normalize(batch["image"]), clip.tokenize(batch["phrase"])
    maps = Chefer().attribute(clip, images, tokens, batch["phrase"], batch["content_box"])
    drops = defaultdict(list)
    for image, ids, values, content in zip(images, tokens, maps.text, clip.content(tokens), strict=True):
        everything = content.nonzero().flatten().tolist()
        # Hyphens are inside of words here.
        signs = [place for place in everything if clip.pieces(ids[place : place + 1])[0].strip() in ".,"]
        assert signs
        for kind, counted in (("", everything), ("/words", [place for place in everything if place not in signs])):
            places = sorted(counted, key=lambda place, values=values: -float(values[place]))
            middle = np.median([float(values[place]) for place in places])
            dropped = {
                "confidence_drop": [place for place in places if float(values[place]) <= middle],
                "confidence_drop@50": places[len(places) // 2 :],
                "top20_removal": places[: max(1, len(places) // 5)],
            }
            drops[f"mean_map_mass{kind}"].append(np.mean([float(values[place]) for place in places]))
            with torch.no_grad():
                whole = float(clip.similarity(image[None], ids[None]))
                for name, gone in dropped.items():
                    left = torch.tensor([clip.pad_id if place in gone else int(one) for place, one in enumerate(ids)])
                    score = float(clip.similarity(image[None], left[None]))
                    drops[name + kind].append(100 * max(0.0, whole - score))
    assert not np.allclose(drops["confidence_drop"], drops["confidence_drop/words"])
    row = next(row for row in results["rows"] if row["name"] == "Chefer" and row["modality"] == "text")
    for name, values in drops.items():
        assert row["scores"][name]["value"] == pytest.approx(np.mean(values), abs=2e-4), name
    assert row["scores"]["sanity/words"]["n"] == row["scores"]["sanity"]["n"] > 0
    assert row["scores"]["sanity/words"]["value"] != row["scores"]["sanity"]["value"]
    page = (tmp_path / "tables.md").read_text(encoding="utf-8")
    for name in ("confidence_drop/words", "top20_removal/words", "sanity/words", "mean_map_mass/words"):
        assert results["metrics"][name]["fill"] == "without punctuation"
    assert page.count("without punctuation") >= 4


def test_the_threshold_is_chosen_on_validation(tmp_path, data, checkpoint):
    results = run(data, checkpoint, tmp_path)
    clip = load_module(str(checkpoint)).clip
    prepare_data(data, clip.image_size, "val")
    [batch] = read_pairs(data, "val", choose_pairs(data, "val", SMALL["validation_pairs"], 0), 100)
    images, tokens = clip.normalize(batch["image"]), clip.tokenize(batch["phrase"])
    maps = Chefer().attribute(clip, images, tokens, batch["phrase"], batch["content_box"]).image
    thresholds = torch.tensor(F.THRESHOLDS)
    best = F.iou(maps, F.box_masks(batch["boxes"], clip.image_size), thresholds).mean(0).argmax()
    row = next(row for row in results["rows"] if row["name"] == "Chefer" and row["modality"] == "image")
    assert row["threshold"] == pytest.approx(float(thresholds[best]))


def test_controls_that_see_no_model_say_so(tmp_path, data, checkpoint):
    results = run(data, checkpoint, tmp_path, methods=["chefer"])
    rows = {row["name"]: row["scores"] for row in results["rows"] if row["modality"] == "image"}
    for name in ("PriorOnly", "CenterMap", "RandomMap", "Mean box"):
        assert rows[name]["sanity"]["value"] == pytest.approx(1, abs=1e-6)
    assert rows["CenterMap"]["prompt_sensitivity"]["value"] == pytest.approx(1, abs=1e-6)
    assert rows["CenterMap"]["side_sensitivity"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["PriorOnly"]["side_sensitivity"]["value"] > 0.9
    assert rows["Chefer"]["sanity"]["value"] < 0.9
    assert {"MATEX, delta = 0", "MATEX, usual places"} <= rows.keys()
    assert "MATEX" not in rows


class Counting:
    """How often methods were asked while it was in place."""

    def __init__(self, monkeypatch, stop_after=None):
        self.calls = 0
        for kind in (Matex, Chefer):
            original = kind.attribute

            def counted(method, *args, original=original, **kwargs):
                self.calls += 1
                if stop_after is not None and self.calls > stop_after:
                    raise KeyboardInterrupt
                return original(method, *args, **kwargs)

            monkeypatch.setattr(kind, "attribute", counted)


def test_a_second_run_computes_nothing_and_says_the_same(tmp_path, data, checkpoint, monkeypatch):
    first = run(data, checkpoint, tmp_path)
    with monkeypatch.context() as patch:
        count = Counting(patch)
        assert without_times(run(data, checkpoint, tmp_path)) == without_times(first)
        assert count.calls == 0
        run(data, checkpoint, tmp_path, resamples=200)
        assert count.calls == 0
        run(data, checkpoint, tmp_path, methods=["matex", "chefer", "rollout"])
        assert count.calls == 0


def test_other_weights_are_explained_anew(tmp_path, data, checkpoint, monkeypatch):
    first = run(data, checkpoint, tmp_path / "out")
    changed = torch.load(checkpoint, weights_only=True)
    changed["state_dict"]["clip.model.visual.conv1.weight"][0, 0, 0, 0] += 0.5
    torch.save(changed, tmp_path / "other.ckpt")
    count = Counting(monkeypatch)
    second = run(data, tmp_path / "other.ckpt", tmp_path / "out")
    assert count.calls > 0
    assert second["model"]["weights"] != first["model"]["weights"]
    assert {row["key"] for row in second["rows"]}.isdisjoint(row["key"] for row in first["rows"])


def test_interrupted_anywhere_the_numbers_are_the_same(tmp_path, data, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        count = Counting(patch)
        whole = run(data, checkpoint, tmp_path / "whole")
    stops = (0, 1, 4, 7, 12)
    for stop_after in stops:
        with monkeypatch.context() as patch:
            Counting(patch, stop_after)
            with pytest.raises(KeyboardInterrupt):
                run(data, checkpoint, tmp_path / "parts")
        assert not (tmp_path / "parts" / "results.json").exists()
    left = Counting(monkeypatch)
    assert without_times(run(data, checkpoint, tmp_path / "parts")) == without_times(whole)
    assert left.calls == count.calls - sum(stops)


def test_interrupted_under_shuffled_weights_it_makes_only_what_is_missing(tmp_path, data, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        count = Counting(patch)
        whole = run(data, checkpoint, tmp_path / "whole", methods=["chefer"])
    maps = len(list((tmp_path / "whole" / "maps").glob("Chefer-*/*.safetensors")))
    values = tmp_path / "parts" / "values"
    # All maps and one stage, then another stage.
    for stop_after, stages in ((maps + 1, 1), (1, 2)):
        with monkeypatch.context() as patch:
            Counting(patch, stop_after)
            with pytest.raises(KeyboardInterrupt):
                run(data, checkpoint, tmp_path / "parts", methods=["chefer"])
        [kept] = values.iterdir()
        # Of the image, of content tokens, and of those of words.
        assert len(read_tensors(kept)[0]) == 3 * stages
    left = Counting(monkeypatch)
    results = run(data, checkpoint, tmp_path / "parts", methods=["chefer"])
    assert without_times(results) == without_times(whole)
    assert left.calls == count.calls - maps - 2
    # Beneath the key of the row, and gone when that is written.
    names = {path.name for path in values.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole" / "values").iterdir()}
    assert kept.name.replace(".stages", "") in names
    assert not any(".stages" in name for name in names)


@pytest.mark.slow
def test_killed_twice_the_numbers_are_the_same(tmp_path, images, checkpoint):
    methods = "--methods=[matex,chefer,grad_cam,rollout]"
    command = [sys.executable, "-m", "matex_pl.cli"]
    subprocess.run([*command, *words(images, checkpoint, tmp_path / "whole", methods)], check=True, capture_output=True)
    for files in (2, 9):
        process = subprocess.Popen([*command, *words(images, checkpoint, tmp_path / "parts", methods)])
        while process.poll() is None and len(list((tmp_path / "parts").rglob("*.safetensors"))) < files:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, *words(images, checkpoint, tmp_path / "parts", methods)], check=True, capture_output=True)
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert without_times(one) == without_times(other)


def test_a_method_that_refuses_the_model_is_a_row_with_its_reason(tmp_path, data, checkpoint, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise NotImplementedError("no <tokens> here")

    monkeypatch.setattr(Chefer, "attribute", refuse)
    results = run(data, checkpoint, tmp_path)
    rows = [row for row in results["rows"] if row["name"] == "Chefer"]
    assert [row["error"] for row in rows] == ["no <tokens> here"] * 2
    assert not rows[0]["scores"]
    assert "no <tokens> here" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no &lt;tokens&gt; here" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_yaml_of_ones_own_is_a_row(tmp_path, data, checkpoint):
    own = tmp_path / "weaker.yaml"
    own.write_text("class_path: matex_pl.attribution.Matex\ninit_args: {lambda_s: 1.5}\n", encoding="utf-8")
    results = run(data, checkpoint, tmp_path / "out", methods=[str(own)])
    row = next(row for row in results["rows"] if row["name"] == "weaker")
    assert row["settings"]["lambda_s"] == 1.5
    assert not row["control"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "split must be one of test, val, got 'train'"),
        ({"budget": "huge"}, "budget must be one of quick, full"),
        ({"num_pairs": 1}, "num_pairs must be at least 2"),
        ({"steps": 33}, "steps must be from 1 to 32"),
        ({"resamples": 1}, "resamples must be at least 100"),
        ({"methods": ["gradcam"]}, "There is no method 'gradcam'. Use one of"),
        ({"methods": ["chefer", "chefer"]}, "Two methods have the name 'Chefer'"),
        ({"device": "tpu"}, "device must be auto, cpu"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tmp_path, data, checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        run(data, checkpoint, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_errors_of_the_command_line(tmp_path, images, checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--ckpt_path", str(checkpoint), "--out", str(tmp_path)])
    assert "Pass --config with a `matex fit` config, or --data" in capsys.readouterr().err
    for more, message in (
        (["--split=train"], "--split must be one of 'test', 'val', got 'train'"),
        (["--methods=chefer,nope"], "There is no method 'nope'. Use one of"),
        (["--ckpt_path=none.ckpt"], "No checkpoint at 'none.ckpt'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words(images, checkpoint, tmp_path, *more))
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    broken = tmp_path / "no_data.yaml"
    broken.write_text("model: {name: x}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(broken), "--ckpt_path", str(checkpoint), "--out", str(tmp_path)])
    assert "describes no data module" in capsys.readouterr().err


def test_quick_takes_fewer_masks_and_full_the_methods_own():
    quick, full = (
        {row.name: row.method for row in compared_rows(["rise", "kernel_shap"], budget)} for budget in ("quick", "full")
    )
    assert (quick["Rise"].masks, full["Rise"].masks) == (500, Rise().masks)
    assert (quick["KernelShap"].samples, full["KernelShap"].samples) == (300, 512)
    assert quick["Rise"].settings == {**full["Rise"].settings, "masks": 500}


def saved(path, name, **settings):
    path.write_text(f"class_path: matex_pl.attribution.{name}\ninit_args: {json.dumps(settings)}\n", encoding="utf-8")
    return str(path)


def test_controls_are_those_of_each_matex_that_is_asked_for(tmp_path):
    tuned = saved(tmp_path / "tuned.yaml", "Matex", lambda_s=3.5, fusion="sum")
    rows = {row.name: row for row in compared_rows(["matex", tuned, "paper/matex", "center_map"], "quick")}
    assert list(rows) == [
        *("MATEX", "tuned", "MATEX, as printed"),
        *("MATEX, delta = 0", "tuned, delta = 0", "MATEX, usual places", "PriorOnly", "RandomMap", "CenterMap"),
    ]
    for name in ("MATEX", "tuned"):
        left = rows[f"{name}, delta = 0"]
        assert left.control
        assert left.method.settings == rows[name].method.settings | {"delta": 0.0}


@pytest.mark.parametrize(
    ("name", "method", "settings"), [("RandomMap", "RandomMap", {"seed": 3}), ("Mean box", "Chefer", {})]
)
def test_nothing_else_has_the_name_of_a_control(tmp_path, name, method, settings):
    path = saved(tmp_path / f"{name}.yaml", method, **settings)
    with pytest.raises(ValueError, match=f"Two methods have the name '{name}'"):
        compared_rows([path], "quick")


class Boxless(PhantomDataModule):
    """The same images, of which nobody has drawn where the finding is."""

    def list_pairs(self):
        return [replace(pair, boxes=()) for pair in super().list_pairs()]


def test_without_boxes_the_controls_are_compared_by_what_the_model_says(tmp_path, images, data, checkpoint):
    found = run(Boxless(root=str(images), **IMAGES), checkpoint, tmp_path / "boxless")
    compared = {comparison["metric"] for comparison in found["comparisons"]}
    assert compared == {"top20_removal/mean_image", "insertion/mean_image", "deletion/mean_image"}
    page = (tmp_path / "boxless" / "report.html").read_text(encoding="utf-8")
    assert "Drop, top fifth removed (mean image): MATEX minus each control" in page
    assert "Pointing game: MATEX minus" not in page
    boxed = run(data, checkpoint, tmp_path / "boxed")
    assert boxed["data"]["fingerprint"] != found["data"]["fingerprint"]


def test_mean_boxes_against_a_loop(data):
    prepare_data(data, (32, 32), "train")
    pairs = data.pairs["train"]
    means = mean_boxes(read_pairs(data, "train", pairs, 5), (32, 32))
    assert set(means) == {pair.finding for pair in pairs}
    for finding, mean in means.items():
        [batch] = read_pairs(data, "train", [pair for pair in pairs if pair.finding == finding], 100)
        count = sum(F.box_masks([boxes], (32, 32))[0].float() for boxes in batch["boxes"])
        torch.testing.assert_close(mean, count / count.max())


def test_patients_are_drawn_together():
    patients = ["a", "b", "a", "c", "b", "a"]
    drawn = draw_patients(patients, 500, 0)
    assert drawn.shape == (500, 6)
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    assert torch.equal(drawn[:, 1], drawn[:, 4])
    assert torch.equal(drawn[:, 0] + drawn[:, 1] + drawn[:, 3], torch.full((500,), 3.0, dtype=torch.float64))
    assert torch.equal(draw_patients(patients, 500, 0), drawn)
    assert not torch.equal(draw_patients(patients, 500, 1), drawn)
    assert drawn[:, 0].mean() == pytest.approx(1, abs=0.15)


def test_intervals_against_a_loop():
    rng = np.random.default_rng(0)
    patients = [f"p{number}" for number in rng.integers(0, 9, 30)]
    values = torch.from_numpy(rng.normal(size=30))
    values[::7] = torch.nan
    sums, drawn = Sums.of(values), draw_patients(patients, 300, 3)
    slow = []
    for row in drawn.long().tolist():
        picked = [
            value for value, times in zip(values.tolist(), row, strict=True) for _ in range(times) if value == value
        ]
        slow.append(np.mean(picked))
    np.testing.assert_allclose(sums.score(drawn).numpy(), slow)
    score = estimate(sums, drawn)
    assert score.value == pytest.approx(float(values.nanmean()))
    assert (score.low, score.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))
    assert score.n == int((~values.isnan()).sum())
    assert estimate(sums, drawn, sums) == Score(value=0, low=0, high=0, n=score.n)


def test_intervals_of_nothing_and_of_constants():
    drawn = draw_patients(list("abcd"), 100, 0)
    assert estimate(Sums.of(torch.full((4,), torch.nan)), drawn) == Score(value=None, low=None, high=None, n=0)
    assert estimate(Sums.of(torch.full((4,), 2.0)), drawn) == Score(value=2, low=2, high=2, n=4)


def test_a_curve_of_images_that_score_as_their_fill_has_no_score():
    spans = {"seen": torch.full((8,), 0.2), "unseen": torch.full((8,), -0.2), "unsure": torch.linspace(-1, 1.1, 8)}
    values = Values({f"curves/insertion/{name}": torch.zeros(3, 9) for name in spans})
    ones = torch.ones(8, dtype=torch.float64)
    values.add_sums({f"insertion/{name}": Sums(ones, span.double()) for name, span in spans.items()})
    scores = values.scores(torch.ones(8, dtype=torch.bool), draw_patients(list("abcdefgh"), 200, 0))
    assert scores["insertion/seen"].value == pytest.approx(5)
    assert scores["insertion/unseen"] == scores["insertion/unsure"] == Score(n=0)


def test_detections_of_batches_are_those_of_all_and_some_are_drawn_like_the_rest():
    generator = torch.Generator().manual_seed(2)
    maps = torch.nn.functional.avg_pool2d(torch.rand(6, 24, 24, generator=generator)[:, None], 5, 1, 2)[:, 0]
    corners = torch.rand(6, 2, generator=generator) / 2
    boxes = [torch.cat([corner, corner + 0.4])[None][: int(row != 4)] for row, corner in enumerate(corners)]
    maps = maps + 0.3 * F.box_masks(boxes, (24, 24))
    scores = torch.linspace(-0.2, 0.6, 6)
    whole = Detections.of(F.components(maps, 0.55), boxes, scores)
    halves = (slice(0, 4), slice(4, 6))
    parts = [Detections.of(F.components(maps[rows], 0.55), boxes[rows], scores[rows]) for rows in halves]
    for one, other in zip(vars(Detections.joined(parts)).values(), vars(whole).values(), strict=True):
        assert torch.equal(one, other)
    assert whole.hit.any()
    assert whole.count == 5
    some = torch.tensor([True, False, True, True, True, False])
    assert (whole.among(some).count, len(whole.among(some).pair)) == (3, int(some[whole.pair].sum()))
    drawn = draw_patients([*"abcdef"], 20, 0)
    torch.testing.assert_close(whole.among(some).score(drawn), whole.score(drawn * some), equal_nan=True)
    assert 0 < float(whole.score()) < 1
    assert whole.among(some).score() != whole.score()
    assert Detections.of(F.components(maps[4:5], 0.55), boxes[4:5], scores[4:5]).score().isnan()


def test_an_out_folder_that_is_a_file_is_an_error(tmp_path, data, checkpoint):
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="out"):
        run(data, checkpoint, tmp_path / "out")


def image_rows(results):
    return {row["name"]: row for row in results["rows"] if row["modality"] == "image"}


def test_a_protocol_scores_the_maps_that_are_there(tmp_path, data, checkpoint, monkeypatch):
    before = run(data, checkpoint, tmp_path)
    with monkeypatch.context() as patch:
        count = Counting(patch)
        after = run(data, checkpoint, tmp_path, protocol="ms-cxr")
    assert count.calls == 0
    assert without_times(before)["protocol"] == {}
    assert after["protocol"]["name"] == "ms-cxr"
    clip = load_module(str(checkpoint)).clip
    prepare_data(data, clip.image_size, "test")
    pairs = choose_pairs(data, "test", SMALL["num_pairs"], 0)
    [batch] = read_pairs(data, "test", pairs, 100)
    images, tokens = clip.normalize(batch["image"]), clip.tokenize(batch["phrase"])
    grid = Chefer().attribute(clip, images, tokens, batch["phrase"], batch["content_box"]).grid
    values = GroundingProtocol("ms-cxr").values(grid, batch["content_box"], pairs, [(64, 64)] * len(pairs))
    rows = image_rows(after)
    for name, value in values.items():
        findings = defaultdict(list)
        for pair, one in zip(pairs, value.tolist(), strict=True):
            findings[pair.finding] += [one] if one == one else []
        means = [np.mean(kept) for kept in findings.values() if kept]
        scores = rows["Chefer"]["scores"]
        assert scores[f"protocol/{name}"]["value"] == pytest.approx(float(value.nanmean()), abs=1e-4)
        assert scores[f"protocol/{name}/findings"]["value"] == pytest.approx(np.mean(means), abs=1e-4)
    for name, row in image_rows(before).items():
        assert row["scores"].items() <= rows[name]["scores"].items()
        game = [
            one["pointing_game"] for one in row["per_finding"].values() if one["pointing_game"]["value"] is not None
        ]
        mean = np.mean([one["value"] for one in game])
        assert row["scores"]["pointing_game/findings"]["value"] == pytest.approx(mean)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "## Localization, mean over findings" in text
    assert "## Protocol ms-cxr: maps at 518 px, Gaussian of 1.5 patches, the central 87.5" in text
    assert "Published figures are left out: they are on MS-CXR, with" in text
    assert "MedKLIP" not in text


def test_pruned_phrases_have_maps_of_their_own(tmp_path, data, checkpoint, monkeypatch):
    plain = run(data, checkpoint, tmp_path, methods=["chefer"], protocol="ms-cxr", smooth_sigma=0.0)
    with monkeypatch.context() as patch:
        count = Counting(patch)
        pruned = run(data, checkpoint, tmp_path, methods=["chefer"], protocol="ms-cxr", prune_phrases=True)
    assert count.calls > 0
    assert pruned["protocol"]["prune_phrases"]
    before, after = image_rows(plain)["Chefer"]["scores"], image_rows(pruned)["Chefer"]["scores"]
    assert {name for name in before if before[name] != after[name]} <= {n for n in before if n.startswith("protocol/")}
    prepare_data(data, (32, 32), "test")
    phrases = [pair.phrase for pair in choose_pairs(data, "test", SMALL["num_pairs"], 0)]
    shorter = [phrase for phrase in phrases if prune_phrase(phrase) != phrase]
    assert 0 < len(shorter) < len(phrases)
    # The control knows the finding of a pruned phrase, too.
    assert image_rows(pruned)["Mean box"]["scores"]["protocol/cnr"]["n"] == len(phrases)


def test_published_figures_stand_with_their_data_and_settings_alone(tmp_path, checkpoint):
    annotations = annotation_rows(12)
    for row in annotations:
        row["split"] = ("test", "val")[int(row["dicom_id"][-2:]) % 2]
    write_annotations(tmp_path, annotations)
    write_images(tmp_path, sorted({row["path"] for row in annotations}), (60, 50))
    data = MsCxrDataModule(root=str(tmp_path), batch_size=4, num_workers=0, cache_dir=None)
    for changes, is_published in (({}, True), ({"smooth_sigma": 0.5}, False)):
        results = run(data, checkpoint, tmp_path / "out", methods=["center_map"], protocol="ms-cxr", **changes)
        text, page = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("tables.md", "report.html"))
        line = "| GLoRIA (published only) | " + f"{MISSING} | " * 8 + "0.242 | 1.280 | 0.656 |"
        assert (line in text) == is_published
        assert ("1162 pairs of MS-CXR" in page) == is_published
        assert (f"Measured here: {SMALL['num_pairs']} pairs, which is another set." in text) == is_published
        assert "0.367" not in text
        assert ("Published figures are left out" in page) != is_published
    scores = image_rows(results)["CenterMap"]["scores"]
    assert scores["protocol/pointing_game"]["n"] == SMALL["num_pairs"]


def test_a_protocol_that_the_data_cannot_serve_is_refused_before_work(tmp_path, images, checkpoint, capsys):
    def refused(data, message, **changes):
        with pytest.raises(ValueError, match=message):
            run(data, checkpoint, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    data = PhantomDataModule(root=str(images), **IMAGES)
    refused(Boxless(root=str(images), **IMAGES), "none of the 7 pairs of Boxless has a box", protocol="ms-cxr")
    refused(Nameless(root=str(images), **IMAGES), "no pair of Nameless with a box has a finding", protocol="ms-cxr")
    refused(data, "protocol must be one of ms-cxr, padchest-gr, got 'vindr'", protocol="vindr")
    refused(data, "smooth_sigma and prune_phrases are settings of a published protocol", prune_phrases=True)
    with pytest.raises(SystemExit) as end:
        main(words(images, checkpoint, tmp_path / "out", "--protocol=vindr"))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "--protocol must be one of 'ms-cxr', 'padchest-gr'" in message
    assert "got 'vindr'" in message


class Nameless(PhantomDataModule):
    """The same images without the names of their findings."""

    def list_pairs(self):
        return [replace(pair, finding="") for pair in super().list_pairs()]
