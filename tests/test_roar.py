"""ROAR+: what is dropped, what is trained, and what the scores say."""

from __future__ import annotations

import json
import logging
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import family
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from patterns import CONFIG, PatternImages
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matex_pl import ClipModule
from matex_pl.attribution import RandomMap
from matex_pl.callbacks import RoarPlus
from matex_pl.cli import main
from matex_pl.data.images import GrayImage
from matex_pl.evaluation.compared import BLURRED, RANDOM
from matex_pl.roar.collect import _holm, _paired, collect
from matex_pl.roar.drop import drop_of, top_units
from matex_pl.roar.finetune import RoarModule, build_module, train_run
from matex_pl.roar.images import PlanImages, split_rows
from matex_pl.roar.make import BOXES, make_plan, plan_methods
from matex_pl.roar.plan import Plan, Protocol, Run, Training, read_plan, take_shard
from matex_pl.roar.work import prepare_maps, work_here

QUICK = Training(epochs=1, batch_size=16, lr=1e-3, warmup_steps=0, accelerator="cpu")


def _module(**settings) -> ClipModule:
    torch.manual_seed(0)
    return ClipModule(json.dumps(CONFIG), warmup_steps=0, **settings)


def _plan(folder: Path, methods=("chefer",), training=QUICK, images=40, data=None, module=None, **protocol) -> Plan:
    module = module or _module()
    protocol = Protocol(**{"fractions": [0.25], "repeats": 2, **protocol})
    data = data or PatternImages(images)
    return make_plan(folder, data, module, module, methods, protocol, training, {"checkpoint": "here"})


def _run(plan: Plan) -> dict:
    prepare_maps(plan)
    work_here(plan, plan.runs())
    return collect(plan)


# What is dropped.


def test_the_top_floor_of_the_units_is_dropped_and_ties_come_in_a_seeded_order():
    values = torch.tensor([[3.0, 1, 3, 2, 3, 0, 9], [0, 0, 0, 0, 0, 0, 0]])
    among = torch.ones_like(values, dtype=torch.bool)
    among[:, 6] = False
    drawn = set()
    for seed in range(40):
        drop = top_units(values, among, 0.34, seed)
        # floor(.34 * 6) = 2 of the three threes, and of the row of zeros any two that take part.
        assert drop.sum(1).tolist() == [2, 2]
        assert not drop[:, 6].any()
        assert not drop[0, [1, 3, 5]].any()
        assert torch.equal(drop, top_units(values, among, 0.34, seed))
        drawn.add(tuple(drop[0].nonzero()[:, 0].tolist()))
    assert drawn == {(0, 2), (0, 4), (2, 4)}


@pytest.mark.parametrize(
    ("fraction", "units", "dropped"), [(0.29, 100, 29), (0.1, 30, 3), (0.1, 9, 1), (0.0, 9, 0), (1.0, 7, 7)]
)
def test_units_are_counted_exactly(fraction, units, dropped):
    values = torch.rand(3, units)
    drop = top_units(values, torch.ones_like(values, dtype=torch.bool), fraction, 0)
    assert drop.sum(1).tolist() == [dropped] * 3
    for row, value in zip(drop, values, strict=True):
        assert dropped in (0, units) or value[row].min() > value[~row].max()


@pytest.mark.parametrize("fill", ["mean_image", "mean_color", "blur"])
def test_only_dropped_patches_and_tokens_change(tmp_path, fill):
    plan = _plan(tmp_path, fill=fill)
    stored, module = PlanImages(tmp_path), build_module(plan).eval()
    batch = stored.batch([3, 5])
    whole, tokens = ClipModule.inputs(module, batch)
    drop = torch.zeros(2, 4, 4, dtype=torch.bool)
    drop[0, 1, 2] = drop[1, 3, 0] = True
    words = torch.zeros(tokens.shape, dtype=torch.bool)
    words[0, 2] = True
    images, left = module.inputs({**batch, "drop_patches": drop, "drop_tokens": words})
    expected = whole.clone()
    for row, y, x in ((0, 1, 2), (1, 3, 0)):
        for v in range(8 * y, 8 * y + 8):
            for u in range(8 * x, 8 * x + 8):
                if fill == "mean_image":
                    for channel in range(3):
                        value = module.clip.mean_image[0, v, u]
                        expected[row, channel, v, u] = (value - module.clip.mean[channel]) / module.clip.std[channel]
                elif fill == "mean_color":
                    expected[row, :, v, u] = 0
                else:
                    expected[row, :, v, u] = images[row, :, v, u]
    torch.testing.assert_close(images, expected)
    assert not torch.equal(images, whole)
    assert left[0, 2] == module.clip.pad_id
    assert torch.equal(left[~words], tokens[~words])


@pytest.mark.parametrize("corrupt_val", [False, True])
def test_validation_is_whole_unless_asked(tmp_path, monkeypatch, corrupt_val):
    plan = _plan(tmp_path, corrupt_val=corrupt_val)
    inputs, is_dropped = RoarModule.inputs, {True: set(), False: set()}

    def seen(self, batch):
        is_dropped[self.training].add("drop_patches" in batch)
        return inputs(self, batch)

    monkeypatch.setattr(RoarModule, "inputs", seen)
    train_run(plan, PlanImages(tmp_path), Run(0, BOXES, "image", 0.25))
    assert is_dropped == {True: {True}, False: {corrupt_val}}


def test_what_a_method_marks_most_is_dropped(tmp_path):
    plan = _plan(tmp_path)
    prepare_maps(plan)
    images = PlanImages(tmp_path)
    train, _ = split_rows(images.pairs, 0.8, 0)
    boxes = drop_of(plan, images, Run(0, BOXES, "image", 1 / 16))["drop_patches"]
    for row in train:
        x0, y0, *_ = images.pairs[row].boxes[0]
        assert boxes[row].nonzero().tolist() == [[y0 // 8, x0 // 8]]
    ((name, tokens),) = drop_of(plan, images, Run(0, "Chefer", "text", 0.25)).items()
    content = plan_content(plan, images, train)
    assert name == "drop_tokens"
    assert tokens[train].sum(1).tolist() == [int(0.25 * number) for number in content.sum(1).tolist()]
    assert not (tokens[train] & ~content).any()


def plan_content(plan, images, rows):
    clip = build_module(plan).clip
    return clip.content(clip.tokenize([images.pairs[row].phrase for row in rows]))


# The images.


def test_images_are_decoded_once_and_stay_as_the_data_module_gives_them(tmp_path):
    data = PatternImages(40)
    plan = _plan(tmp_path, data=data)
    # Once for the plan; the mean image of a model without one reads the training images too.
    module_reads = 40
    assert data.reads == 40 + module_reads
    _run(plan)
    assert data.reads == 40 + module_reads
    images, wanted = PlanImages(tmp_path), data.dataset("train").batch([f"image-{index}" for index in range(40)])
    batch = images.batch(range(40))
    assert torch.equal(batch["image"], wanted["image"])
    torch.testing.assert_close(batch["content_box"], wanted["content_box"])
    for one, other in zip(batch["boxes"], wanted["boxes"], strict=True):
        torch.testing.assert_close(one, other)
    assert batch["phrase"] == wanted["phrase"]


def test_images_are_opened_as_a_training_opens_them(tmp_path, monkeypatch):
    def half(self, pair, transform):
        return GrayImage(self.read_image(pair)[::2, ::2], (32, 32))

    monkeypatch.setattr(PatternImages, "open_image", half)
    data = PatternImages(20)
    _plan(tmp_path, data=data)
    wanted = data.dataset("train").batch([f"image-{index}" for index in range(20)])
    batch = PlanImages(tmp_path).batch(range(20))
    assert torch.equal(batch["image"], wanted["image"])
    for one, other in zip(batch["boxes"], wanted["boxes"], strict=True):
        torch.testing.assert_close(one, other)


def test_a_repeat_splits_by_patient_and_the_next_one_otherwise(tmp_path):
    _plan(tmp_path, data=PatternImages(40, per_patient=4))
    images = PlanImages(tmp_path)
    splits = [split_rows(images.pairs, 0.8, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for train, val in splits:
        assert (len(train), len(val)) == (32, 8)
        assert not {images.pairs[row].patient_id for row in train} & {images.pairs[row].patient_id for row in val}


def test_a_repeat_has_the_same_batches_for_every_method(tmp_path, monkeypatch):
    plan = _plan(tmp_path, training=replace(QUICK, epochs=2))
    inputs, seen = RoarModule.inputs, []

    def noted(self, batch):
        seen[-1].append((self.training, batch["id"]))
        return inputs(self, batch)

    monkeypatch.setattr(RoarModule, "inputs", noted)
    for run in (Run(0), Run(0, BOXES, "image", 0.25), Run(1)):
        seen.append([])
        train_run(plan, PlanImages(tmp_path), run)
    assert seen[0] == seen[1] != seen[2]
    # 32 of 40 pairs to train on, in two batches; the second epoch has another order.
    trained = [ids for is_training, ids in seen[0] if is_training]
    assert sorted(trained[0] + trained[1]) == sorted(trained[2] + trained[3])
    assert trained[:2] != trained[2:]


# The training.


def test_a_fraction_of_nothing_gives_exactly_the_clean_loss(tmp_path):
    found = _run(_plan(tmp_path, fractions=[0.0], repeats=1))
    assert len(found["rows"]) == 8
    assert all(row["points"][0]["value"] == 0 for row in found["rows"])


def test_a_run_is_a_function_of_its_description(tmp_path):
    plan = _plan(tmp_path, images=40)
    images = PlanImages(tmp_path)
    first = train_run(plan, images, Run(1, BOXES, "image", 0.25))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = train_run(read_plan(tmp_path), images, Run(1, BOXES, "image", 0.25))
    assert torch.equal(torch.get_rng_state(), state)
    assert first["loss"] == again["loss"]
    assert first["loss"] != train_run(plan, images, Run(0, BOXES, "image", 0.25))["loss"]


def test_runs_leave_nothing_in_memory(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "matex_pl.roar.finetune.build_module",
        lambda *arguments: kept.append(weakref.ref(module := build_module(*arguments))) or module,
    )
    plan = _plan(tmp_path, modalities=["image"], repeats=1)
    _run(plan)
    assert len(kept) == len(plan.runs())
    assert all(module() is None for module in kept)


@pytest.mark.parametrize("finetune", ["full", "head", "lora"])
def test_what_is_trained(tmp_path, finetune, monkeypatch):
    if finetune == "lora":
        pytest.importorskip("peft")
    plan = _plan(tmp_path, training=replace(QUICK, finetune=finetune))
    kept: list[RoarModule] = []
    monkeypatch.setattr(
        "matex_pl.roar.finetune.build_module", lambda *arguments: kept.append(build_module(*arguments)) or kept[-1]
    )
    train_run(plan, PlanImages(tmp_path), Run(0))
    before = dict(build_module(plan).named_parameters())
    changed = {name for name, value in kept[0].named_parameters() if not torch.equal(value, before[name])}
    changed -= {"clip.model.logit_scale"}
    if finetune == "full":
        assert "clip.model.visual.conv1.weight" in changed
    elif finetune == "head":
        assert changed == {
            f"clip.model.{name}"
            for name in (
                "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
                "ln_final.weight", "ln_final.bias", "text_projection",
            )
        }  # fmt: skip
    else:
        assert changed
        assert all("lora_" in name for name in changed)


def test_a_training_that_cannot_run_is_refused_before_the_plan(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"training\.finetune=lora needs peft"):
        _plan(tmp_path / "lora", training=replace(QUICK, finetune="lora"))
    model = ClipModule(json.dumps(family("resnet").config))
    with pytest.raises(NotImplementedError, match="grad_checkpointing: the image tower ModifiedResNet"):
        _plan(tmp_path / "resnet", training=replace(QUICK, grad_checkpointing=True), module=model)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_true_boxes_score_above_noise_and_smooth_noise_near_noise(tmp_path):
    training = Training(epochs=12, batch_size=16, lr=3e-3, warmup_steps=5, accelerator="cpu")
    found = _run(_plan(tmp_path, (), training, images=200, modalities=["image"], fractions=[1 / 16], repeats=3))
    points = {row["name"]: row["points"][0] for row in found["rows"]}
    boxes, noise, smooth = (points[name] for name in (BOXES, RANDOM, BLURRED))
    spread = max(point["std"] for point in points.values())
    assert boxes["value"] - noise["value"] > spread
    assert min(boxes["repeats"]) > max(noise["repeats"] + smooth["repeats"])
    assert abs(noise["value"] - smooth["value"]) < (boxes["value"] - noise["value"]) / 4
    test = next(test for test in found["tests"] if (test["row"], test["against"]) == (BOXES, RANDOM))
    assert test["difference"] == pytest.approx(boxes["value"] - noise["value"])


# The scores.


def test_scores_are_what_the_definition_says(tmp_path):
    plan = _plan(tmp_path, fractions=[0.25, 0.5])
    found = _run(plan)
    losses = {run: json.loads((plan.path(run) / "result.json").read_text())["loss"] for run in plan.runs()}
    row = next(row for row in found["rows"] if (row["name"], row["modality"]) == ("Chefer", "image"))
    for point in row["points"]:
        scores = []
        for repeat in range(2):
            clean = losses[Run(repeat)]
            scores.append(100 * (losses[Run(repeat, "Chefer", "image", point["fraction"])] - clean) / clean)
        assert point["repeats"] == pytest.approx(scores)
        assert point["value"] == pytest.approx(sum(scores) / 2)
        assert point["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        assert point["units"] == 16 * point["fraction"]
    both = [sum(point["repeats"][repeat] for point in row["points"]) / 2 for repeat in range(2)]
    assert row["mean"]["repeats"] == pytest.approx(both)
    assert [clean["loss"] for clean in found["clean"]] == [losses[Run(0)], losses[Run(1)]]
    assert found["time"]["done"] == found["time"]["runs"] == len(plan.runs()) == 2 * (1 + 2 * (5 + 3))


def test_what_is_missing_is_named_and_never_averaged_over(tmp_path):
    plan = _plan(tmp_path)
    _run(plan)
    lost = Run(1, "Chefer", "image", 0.25)
    (plan.path(lost) / "result.json").rename(plan.path(lost) / "error.log")
    found = collect(plan)
    point = next(row for row in found["rows"] if row["name"] == "Chefer")["points"][0]
    assert point["value"] is None
    assert point["repeats"][0] is not None
    assert point["missing"] == ["repeat-1/image/chefer/0.25 (failed)"]
    assert [failed["run"] for failed in found["failed"]] == [lost.id]
    tests = [test for test in found["tests"] if (test["row"], test["modality"]) == ("Chefer", "image")]
    assert all(test["p"] is None and test["difference"] is None for test in tests)


def test_the_paired_test_is_students_with_a_corrected_variance():
    mine, theirs = [3.0, 5.0, 4.5, 6.0], [1.0, 2.0, 4.0, 2.5]
    test, wanted = _paired(mine, theirs, 0.0), stats.ttest_rel(mine, theirs)
    interval = wanted.confidence_interval(0.95)
    assert test["p"] == pytest.approx(wanted.pvalue)
    assert (test["low"], test["high"]) == pytest.approx((interval.low, interval.high))
    # By hand: differences 2, 3, .5, 3.5 with mean 2.25 and variance 1.75; one validation for four training pairs.
    corrected = _paired(mine, theirs, 0.25)
    t = 2.25 / (1.75 * (1 / 4 + 1 / 4)) ** 0.5
    assert corrected["p"] == pytest.approx(2 * stats.t.sf(t, 3))
    assert corrected["high"] - corrected["low"] == pytest.approx(2**0.5 * (interval.high - interval.low))
    # By hand: three tests, the least p counts three times, the next twice but not less than that.
    assert _holm([0.04, 0.01, None, 0.015]) == pytest.approx([0.04, 0.03, None, 0.03])


def test_smooth_noise_is_smooth(tiny_clip):
    images, phrases = torch.rand(4, 3, 32, 32), ["a b c d e f g h"] * 4
    tokens = tiny_clip.tokenize(phrases)
    rough, smooth = (RandomMap(blur=blur).attribute(tiny_clip, images, tokens, phrases) for blur in (0.0, 1.5))

    def step(values):
        return (values.diff(dim=-1).abs().mean() / values.std()).item()

    assert step(smooth.grid) < 0.7 * step(rough.grid)
    words = [maps.text[maps.content].view(4, -1) for maps in (smooth, rough)]
    assert step(words[0]) < 0.7 * step(words[1])
    with pytest.raises(ValueError, match="blur must be a finite number of at least 0, got -1"):
        RandomMap(blur=-1.0)


# Plans.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": [10]}, r"fractions must be in \[0, 1\], got 10. Give a share"),
        ({"fractions": [0.1, 0.1]}, "each once"),
        ({"modalities": ["picture"]}, "modalities must be one of image, text, got 'picture'"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"fill": "white"}, "fill must be one of"),
        ({"train_share": 1.0}, "train_share must be in"),
        ({"num_pairs": 2}, "num_pairs must be at least 4"),
        ({"splits": []}, "splits must name at least one"),
    ],
)
def test_bad_protocols_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_methods_are_named_once_and_controls_are_always_there():
    names = [row.name for row in plan_methods(["matex", "random_map"], 3, 4)]
    assert names == ["MATEX", "MATEX, delta = 0", "PriorOnly", RANDOM, BLURRED, "CenterMap", BOXES]
    assert [row.name for row in plan_methods(["chefer"], 0, 4)] == ["Chefer", RANDOM, BLURRED, "CenterMap"]
    with pytest.raises(ValueError, match="Two methods have the name 'MATEX'"):
        plan_methods(["matex", "matex"], 0, 4)
    with pytest.raises(ValueError, match="There is no method 'mattex'"):
        plan_methods(["mattex"], 0, 4)


def test_one_patient_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="20 pairs of 1 patients cannot be split"):
        _plan(tmp_path, data=PatternImages(20, per_patient=99))


def test_a_shard_is_every_nth_run():
    runs = [Run(repeat) for repeat in range(10)]
    shards = [take_shard(runs, f"{first}/4") for first in range(4)]
    assert sorted(run.repeat for shard in shards for run in shard) == list(range(10))
    for wrong in ("4/4", "3", "/2", "a/b"):
        with pytest.raises(ValueError, match="shard must be I/N"):
            take_shard(runs, wrong)


# From where users enter.


def test_the_command_with_the_shipped_config(tmp_path, image_root, capsys):
    module = _module()
    data = PatternImages(20)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    words = [
        "roar", "run", "--config", "roar_phantom.yaml", f"--data.root={image_root}", "--data.num_train=20",
        "--data.stored_size=64", "--data.num_workers=0", "--processes=1", "--methods=chefer", "--protocol.repeats=1",
        "--protocol.fractions=[0.5]", "--training.epochs=1", "--training.batch_size=8",
        f"--ckpt_path={tmp_path / 'last.ckpt'}", f"--out={tmp_path / 'roar'}",
    ]  # fmt: skip
    main(words)
    printed = capsys.readouterr().out
    assert "True boxes" in printed
    assert "Chefer" in printed
    for name in ("results.json", "table.md", "curves_image.png", "curves_text.svg", "report.html"):
        assert (tmp_path / "roar" / name).stat().st_size > 500
    main(["roar", "status", str(tmp_path / "roar")])
    assert capsys.readouterr().out.startswith("9 of 9 runs are done, 0 running, 0 failed.")
    with pytest.raises(SystemExit):
        main([*words, "--training.lr=1.0"])
    assert "training.lr is 0.0001 in the plan, 1.0 in this command" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(f"out: {tmp_path / 'roar'}\n", encoding="utf-8")
    main(["roar", "collect", "--config", str(tmp_path / "mine.yaml")])
    assert "Chefer" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["roar", "status"])
    assert "matex roar: No plan given. Pass the folder of the plan, or --config" in capsys.readouterr().err


def _fit(tmp_path, name, callbacks, **settings):
    torch.manual_seed(1)
    module, data = _module(lr=1e-3), PatternImages(20)
    logger = TensorBoardLogger(str(tmp_path), name=name, version="")
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=logger, callbacks=callbacks, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, trainer


@pytest.mark.parametrize("start", ["before", "after"])
def test_the_callback_logs_curves_table_and_scores_and_leaves_the_training_alone(tmp_path, start):
    callback = RoarPlus(["chefer"], Protocol(fractions=[0.25, 0.5], repeats=2), QUICK, start)
    plain, _ = _fit(tmp_path, "plain", [])
    module, trainer = _fit(tmp_path, "roar", [callback])
    for name, value in module.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    plan = read_plan(Path(trainer.log_dir) / "roar")
    untrained, begun = _module(lr=1e-3).state_dict(), build_module(plan).state_dict()
    wanted = untrained if start == "before" else module.state_dict()
    assert all(torch.equal(begun[name], wanted[name]) for name in wanted if "mean_image" not in name)
    events = EventAccumulator(trainer.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    found = collect(plan)
    for row in found["rows"]:
        tag = f"roar/{row['modality']}/{re.sub('[^A-Za-z]+', '_', row['name'])}"
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == pytest.approx({round(100 * p["fraction"]): p["value"] for p in row["points"]}, rel=1e-5)
    assert any(tag.startswith("roar") for tag in events.Tags()["images"])
    assert any(tag.startswith("roar") for tag in events.Tags()["tensors"])


def test_the_callback_says_beforehand_how_much_it_is(tmp_path, caplog, monkeypatch):
    # The command line shows the messages itself.
    monkeypatch.setattr(logging.getLogger("matex_pl"), "propagate", True)
    with caplog.at_level("INFO", logger="matex_pl"):
        _fit(tmp_path, "run", [RoarPlus(["chefer"], Protocol(modalities=["image"], fractions=[0.5], repeats=1), QUICK)])
    said = next(record.message for record in caplog.records if record.message.startswith("ROAR+"))
    assert said.startswith("ROAR+: 6 fine-tunings of 1 steps, about ")


def test_the_callback_needs_this_projects_module_and_data(tmp_path):
    with pytest.raises(ValueError, match="start must be one of before, after, got 'middle'"):
        RoarPlus(start="middle")
    with pytest.raises(ValueError, match="There is no method 'nothing'"):
        RoarPlus(["nothing"])
    callback = RoarPlus(out=str(tmp_path / "roar"))
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback])
    data = PatternImages(20)
    data.setup("fit")
    with pytest.raises(
        TypeError, match="RoarPlus needs a ClipModule and a data module of matex_pl, got ClipModule and"
    ):
        trainer.fit(_module(), data.train_dataloader())


def test_the_callback_refuses_before_the_first_step(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"table\.md' is not replaced"):
        _fit(tmp_path, "run", [RoarPlus(["chefer"], out=str(tmp_path / "mine"))])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["table.md"]
    module = _module()
    module.clip.model.visual.pool_type = "none"
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    trainer.callbacks.append(RoarPlus(["chefer", "rollout"], out=str(tmp_path / "new")))
    with pytest.raises(NotImplementedError, match="its pooling is 'none'"):
        trainer.fit(module, datamodule=PatternImages(20))
    assert trainer.global_step == 0
    assert not (tmp_path / "new").exists()


def test_a_plan_needs_room_on_its_disk(tmp_path, monkeypatch):
    data = PatternImages(40)
    free = SimpleNamespace(free=10_000)
    monkeypatch.setattr("matex_pl.files.shutil.disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"The files in .*new need [\d.]+ MiB, and the disk has 0\.0 MiB left"):
        _plan(tmp_path / "new", data=data)
    assert not (tmp_path / "new").exists()
    assert not data.reads
    free.free = 2**30
    _plan(tmp_path / "new", data=data)


def test_a_plan_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matex_pl.roar.make.write_module", full)
    with pytest.raises(OSError, match="No space left"):
        _plan(tmp_path / "a" / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match="No space left"):
        _plan(tmp_path / "here")
    assert {path.name for path in (tmp_path / "here").iterdir()} <= {"notes.txt", ".lock"}
