"""The callbacks inside `trainer.fit`, `validate` and `test`."""

import gc
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from matex_pl import ClipModule
from matex_pl.anatomy import named_side, swap_sides
from matex_pl.attribution import AttributionMethod, CenterMap, Matex, PriorOnly, WordRegions
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.callbacks.attribution_maps import choose_pairs
from matex_pl.data import ImageTextPair, PhantomDataModule, collate
from matex_pl.evaluation.pairs import other_phrases
from matex_pl.metrics.base import PairMetric
from matex_pl.metrics.functional import (
    border_mask,
    outside_mass,
    side_sensitivity,
    spearman,
    thorax_zone,
    word_laterality,
)

TINY = str(Path(__file__).with_name("tiny.json"))
IMAGE_SCALARS = {"pointing_game", "cnr", "mean_map_mass", "confidence_drop", "confidence_increase"}
TEXT_SCALARS = {"text_confidence_drop", "text_confidence_increase"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def data(images):
    return PhantomDataModule(
        root=str(images), num_train=12, num_val=8, num_test=8, stored_size=96, batch_size=4, num_workers=0
    )


@pytest.fixture
def module():
    torch.manual_seed(0)
    return ClipModule(TINY, lr=1e-3, warmup_steps=1)


def trainer(tmp_path, *callbacks, logger=None, **settings):
    settings = {
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    } | settings
    logger = TensorBoardLogger(tmp_path, name="tb", version="0") if logger is None else logger
    return Trainer(accelerator="cpu", callbacks=list(callbacks), logger=logger, default_root_dir=tmp_path, **settings)


def events(tmp_path: Path) -> EventAccumulator:
    return EventAccumulator(str(tmp_path / "tb" / "0"), size_guidance={"images": 0, "scalars": 0}).Reload()


class Counted(CenterMap):
    """Counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def attribute(self, *args, **kwargs):
        self.calls += 1
        return super().attribute(*args, **kwargs)


def test_maps_and_scalars_run_through_training(tmp_path, data, module):
    run = trainer(tmp_path, AttributionMaps(num_pairs=3), AttributionMetrics({"": "matex", "center": CenterMap()}))
    run.fit(module, data)
    logged = events(tmp_path)
    tags = logged.Tags()
    assert len(tags["images"]) == 3
    assert all(tag.startswith("maps/matex/phantom-") for tag in tags["images"])
    steps = [event.step for event in logged.Images(tags["images"][0])]
    # One picture per validation and none from the sanity run, at the steps of the scalars beside them.
    assert steps == [event.step + 1 for event in logged.Scalars("attribution/pointing_game")]
    assert len(steps) == 2
    assert {f"attribution/{name}" for name in IMAGE_SCALARS | TEXT_SCALARS} <= set(tags["scalars"])
    assert {f"attribution_center/{name}" for name in IMAGE_SCALARS} <= set(tags["scalars"])
    assert not any(tag.startswith(("attribution_center/text", "attribution_center/cons")) for tag in tags["scalars"])
    lowest, mean = (logged.Scalars(f"attribution/consistency_{kind}")[-1].value for kind in ("min", "mean"))
    assert 0 < lowest < mean <= 1


def test_a_checkpoint_monitors_an_attribution_scalar(tmp_path, data, module):
    best = ModelCheckpoint(tmp_path / "best", monitor="attribution/pointing_game", mode="max")
    trainer(tmp_path, best, AttributionMetrics(num_batches=-1)).fit(module, data)
    assert best.best_model_score is not None
    assert Path(best.best_model_path).is_file()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_both_work_outside_of_fit(tmp_path, data, module, verb):
    callbacks = AttributionMaps(num_pairs=2), AttributionMetrics(Matex.paper(), fill="blur", per_finding=True)
    scores = getattr(trainer(tmp_path, *callbacks), verb)(module, data, verbose=False)[0]
    assert {f"attribution/{name}" for name in IMAGE_SCALARS | TEXT_SCALARS} <= set(scores)
    assert any(name.startswith("attribution/pointing_game/") for name in scores)
    assert len(events(tmp_path).Tags()["images"]) == 2


def test_the_scalars_are_those_of_the_explained_batches(tmp_path, data, module):
    scores = trainer(tmp_path, AttributionMetrics(PriorOnly(), num_batches=1)).validate(module, data, verbose=False)[0]
    module.eval()
    batch = next(iter(data.val_dataloader()))
    images, tokens = module.inputs(batch)
    maps = (
        PriorOnly()
        .attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"])
        .image
    )
    fill = module.clip.normalize(module.clip.mean_image.expand(3, -1, -1))
    with torch.no_grad():
        kept = module.clip.similarity(images * maps[:, None] + fill * (1 - maps[:, None]), tokens)
        drop = 100 * (module.clip.similarity(images, tokens) - kept).clamp(min=0).mean()
    assert scores["attribution/confidence_drop"] == pytest.approx(float(drop), abs=1e-4)
    assert scores["attribution/mean_map_mass"] == pytest.approx(float(maps.mean()), abs=1e-6)


def test_words_are_scored_without_their_punctuation(tmp_path, data, module):
    found = {}
    for content in ("tokens", "words"):
        callback = AttributionMetrics(Matex(), num_batches=1, content=content)
        found[content] = trainer(tmp_path / content, callback).validate(module, data, verbose=False)[0]
    batch = next(iter(data.val_dataloader()))
    maps, tokens, clip = explained(module, Matex(), batch), module.clip.tokenize(batch["phrase"]), module.clip
    drops = []
    for image, ids, values, content in zip(batch["image"], tokens, maps.text.tolist(), maps.content, strict=True):
        everything = content.nonzero().flatten().tolist()
        places = [place for place in everything if clip.pieces(ids[place, None]) != [" ."]]
        assert len(places) == len(everything) - 1
        left = ids.clone()
        left[[place for place in places if values[place] <= median(values[place] for place in places)]] = clip.pad_id
        with torch.no_grad():
            scores = [float(clip.similarity(clip.normalize(image[None]), row[None])) for row in (ids, left)]
        drops.append(100 * max(0.0, scores[0] - scores[1]))
    name = "attribution/text_confidence_drop"
    assert found["words"][name] == pytest.approx(sum(drops) / len(drops), abs=1e-4)
    assert found["words"][name] != pytest.approx(found["tokens"][name], abs=1e-4)
    assert found["words"]["attribution/confidence_drop"] == found["tokens"]["attribution/confidence_drop"]


def test_confidence_does_not_depend_on_the_precision_of_training(tmp_path, data, module):
    """Under autocast both scores are those of the model's own precision."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        run = trainer(tmp_path / precision, AttributionMetrics(CenterMap(), num_batches=1), precision=precision)
        found.append(run.validate(module, data, verbose=False)[0])
    for name in ("confidence_drop", "confidence_increase"):
        assert found[1][f"attribution/{name}"] == pytest.approx(found[0][f"attribution/{name}"], abs=1e-5)
    assert found[0]["attribution/confidence_drop"] > 0
    assert found[1]["val/loss"] != found[0]["val/loss"]


def explained(module, method, batch, phrases=None):
    """Maps of a batch, under other phrases where these are given."""
    module.eval()
    phrases = batch["phrase"] if phrases is None else phrases
    images = module.clip.normalize(batch["image"])
    return method.attribute(
        module.clip, images, module.clip.tokenize(phrases), phrases, batch["content_box"], batch["chest_box"]
    )


def test_mass_outside_of_the_thorax_and_for_foreign_data_at_the_border(tmp_path, data, module):
    metrics = AttributionMetrics(Matex(), num_batches=-1, per_finding=True)
    scores = trainer(tmp_path, metrics).validate(module, data, verbose=False)[0]
    batches = list(data.val_dataloader())
    maps = torch.cat([explained(module, Matex(), batch).image for batch in batches])
    masks = {name: torch.cat([batch["masks"][name] for batch in batches]) for name in batches[0]["masks"]}
    outside = outside_mass(maps, thorax_zone(masks, maps, data.thorax()))
    assert 0.1 < outside.mean() < 0.9
    assert scores["attribution/outside_thorax_mass"] == pytest.approx(float(outside.nanmean()), abs=1e-5)
    assert "attribution/border_mass" not in scores
    findings = [finding for batch in batches for finding in batch["finding"]]
    for name in set(findings):
        own = outside[[finding == name for finding in findings]]
        assert scores[f"attribution/outside_thorax_mass/{name}"] == pytest.approx(float(own.nanmean()), abs=1e-5)
    # What no pair of the batches is about is not logged, as NaN or otherwise.
    logged = {name.split("/")[2] for name in scores if name.startswith("attribution/outside_thorax_mass/")}
    assert logged == set(findings) < set(data.findings)

    torch.manual_seed(0)
    same = ClipModule(TINY)
    foreign = trainer(tmp_path, AttributionMetrics(Matex(), num_batches=-1, fill="blur"))
    bare = torch.utils.data.DataLoader(
        data.dataset("val"), batch_size=4, collate_fn=lambda samples: {**collate(samples), "masks": {}}
    )
    scores = foreign.validate(same, bare, verbose=False)[0]
    border = border_mask(tuple(maps.shape[1:]), torch.cat([batch["content_box"] for batch in batches]))
    expected = outside_mass(maps, ~border).nanmean()
    assert scores["attribution/border_mass"] == pytest.approx(float(expected), abs=1e-5)
    assert "attribution/outside_thorax_mass" not in scores


def test_the_thorax_is_asked_for_once_per_run(tmp_path, data, module, monkeypatch):
    calls = []
    zone = type(data).thorax
    monkeypatch.setattr(type(data), "thorax", lambda self: calls.append(1) or zone(self))
    trainer(tmp_path, AttributionMetrics(CenterMap()), max_epochs=3).fit(module, data)
    assert len(calls) == 1


def test_sensitivity_to_another_phrase_and_to_the_other_side(tmp_path, data, module):
    method = Matex(lambda_s=3.5)
    metrics = AttributionMetrics(method, num_batches=-1, sensitivity=True, per_finding=True)
    scores = trainer(tmp_path, metrics).validate(module, data, verbose=False)[0]
    prompts, moved, findings = [], [], []
    for batch in data.val_dataloader():
        true = explained(module, method, batch)
        other = explained(module, method, batch, other_phrases(batch["phrase"], batch["finding"]))
        prompts.append(spearman(true.grid.flatten(1), other.grid.flatten(1)))
        sides = [named_side(phrase) for phrase in batch["phrase"]]
        swapped = explained(module, method, batch, [swap_sides(phrase) for phrase in batch["phrase"]])
        moved.append(side_sensitivity(true.image, swapped.image, sides, batch["content_box"]))
        findings += batch["finding"]
    prompts, moved = torch.cat(prompts), torch.cat(moved)
    assert 0 < moved.isnan().sum() < len(moved)
    assert scores["attribution/prompt_sensitivity"] == pytest.approx(float(prompts.nanmean()), abs=1e-4)
    assert scores["attribution/side_sensitivity"] == pytest.approx(float(moved.nanmean()), abs=1e-4)
    own = prompts[[finding == findings[0] for finding in findings]].nanmean()
    assert scores[f"attribution/prompt_sensitivity/{findings[0]}"] == pytest.approx(float(own), abs=1e-4)


def test_words_of_side_are_scored_for_methods_with_maps_of_words(tmp_path, data, module):
    method = WordRegions(steps=1)
    metrics = AttributionMetrics({"": method, "center": CenterMap()}, num_batches=-1)
    scores = trainer(tmp_path, metrics).validate(module, data, verbose=False)[0]
    values = []
    for batch in data.val_dataloader():
        found = explained(module, method, batch)
        values.append(word_laterality(found.word_maps, found.words, batch["phrase"], batch["content_box"]))
    values = torch.cat(values)
    assert 0 < values.isnan().sum() < len(values)
    assert scores["attribution/word_laterality"] == pytest.approx(float(values.nanmean()), abs=1e-4)
    assert "attribution_center/word_laterality" not in scores


def test_sensitivity_of_maps_that_know_nothing_and_of_the_prior(tmp_path, data, module):
    metrics = AttributionMetrics({"center": CenterMap(), "prior": PriorOnly()}, num_batches=-1, sensitivity=True)
    scores = trainer(tmp_path, metrics).validate(module, data, verbose=False)[0]
    assert scores["attribution_center/prompt_sensitivity"] == pytest.approx(1)
    assert scores["attribution_center/side_sensitivity"] == pytest.approx(0, abs=1e-6)
    assert scores["attribution_prior/prompt_sensitivity"] < 0.5
    assert scores["attribution_prior/side_sensitivity"] == pytest.approx(1, abs=0.01)


def test_sensitivity_costs_nothing_unless_asked_for(tmp_path, data, module):
    method = Counted()
    trainer(tmp_path, AttributionMetrics(method, num_batches=1)).validate(module, data, verbose=False)
    assert method.calls == 1
    trainer(tmp_path, AttributionMetrics(method, num_batches=1, sensitivity=True)).validate(module, data, verbose=False)
    assert method.calls == 4


def test_a_batch_that_says_one_thing_has_no_prompt_sensitivity(tmp_path, data, module):
    data.image_size = module.clip.image_size
    data.prepare_data()
    data.setup("validate")
    images = data.dataset("val")
    images.pairs = images.pairs[:1] * 2
    loader = torch.utils.data.DataLoader(images, batch_size=2, collate_fn=collate)
    run = trainer(tmp_path, AttributionMetrics(sensitivity=True, fill="blur"))
    with pytest.warns(UserWarning, match="attribution/prompt_sensitivity is NaN"):
        scores = run.validate(module, loader, verbose=False)[0]
    assert torch.tensor(scores["attribution/prompt_sensitivity"]).isnan()


def test_a_pair_that_comes_twice_counts_once(tmp_path, data, module):
    settings = {"num_batches": -1, "sensitivity": True, "per_finding": True, "fill": "blur"}
    scores = []
    for times in (1, 3):
        data.image_size = module.clip.image_size
        data.prepare_data()
        data.setup("validate")
        images = data.dataset("val")
        # The first batch again and again, as a sampler that fills up shards would bring it.
        images.pairs = images.pairs[4:8] + images.pairs[:4] * times
        loader = torch.utils.data.DataLoader(images, batch_size=4, collate_fn=collate)
        run = trainer(tmp_path, AttributionMetrics(PriorOnly(), **settings))
        scores.append(run.validate(module, loader, verbose=False)[0])
    once, thrice = ({name: value for name, value in found.items() if "attribution" in name} for found in scores)
    assert len(once) > 10
    assert once == pytest.approx(thrice, abs=1e-6, nan_ok=True)


def test_each_epoch_counts_anew_and_leaves_nothing_to_python_s_collector(tmp_path, data, module):
    metrics = AttributionMetrics(PriorOnly(), num_batches=-1, sensitivity=True, per_finding=True, fill="blur")
    run = trainer(tmp_path, metrics)
    first = run.validate(module, data, verbose=False)[0]
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, PairMetric) for thing in gc.get_objects())
        tested = run.test(module, data, verbose=False)[0]
        again = run.validate(module, data, verbose=False)[0]
        after = sum(isinstance(thing, PairMetric) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert again == pytest.approx(first, nan_ok=True)
    assert tested["attribution/mean_map_mass"] != first["attribution/mean_map_mass"]
    # Pieces that are freed late keep the heap from shrinking: the memory of long runs grew by holes.
    assert after == before


def test_maps_come_at_every_nth_validation_and_cost_nothing_between(tmp_path, data, module):
    method = Counted()
    trainer(tmp_path, AttributionMaps(method, every_n_validations=2), max_epochs=3).fit(module, data)
    assert method.calls == 2
    off = Counted()
    trainer(tmp_path / "off", AttributionMaps(off, every_n_validations=0), max_epochs=1).fit(module, data)
    assert off.calls == 0


def test_metrics_explain_only_the_first_batches(tmp_path, data, module):
    method = Counted()
    trainer(tmp_path, AttributionMetrics(method, num_batches=2), max_epochs=1, num_sanity_val_steps=2).fit(module, data)
    assert method.calls == 2


def test_the_shown_pairs_survive_a_resume(tmp_path, data, module):
    data.setup("fit")
    first = AttributionMaps(pair_ids=None, num_pairs=2, every_n_validations=3)
    # Others than those that would be chosen again.
    first.chosen = {"val": [pair.id for pair in data.pairs["val"]][-2:]}
    run = trainer(tmp_path / "a", first, max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = AttributionMaps(num_pairs=2, every_n_validations=3)
    method = again.method = Counted()
    trainer(tmp_path / "b", again, max_epochs=3).fit(module, data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert again.chosen == first.chosen == {"val": [pair.id for pair in data.pairs["val"]][-2:]}
    assert again.validations == 3
    assert method.calls == 0


def test_explaining_changes_nothing_that_training_sees(tmp_path, data):
    weights = []
    for callbacks in ([], [AttributionMaps(), AttributionMetrics()]):
        torch.manual_seed(0)
        module = ClipModule(TINY, lr=1e-3, warmup_steps=1)
        trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path)).fit(module, data)
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*weights)


def test_chosen_ids_are_checked_before_training(tmp_path, data, module):
    with pytest.raises(ValueError, match="there is no pair 'nobody' among"):
        trainer(tmp_path, AttributionMaps(pair_ids=["nobody"])).fit(module, data)


def test_two_under_one_name_are_refused(tmp_path, data, module):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttributionMaps`"):
        trainer(tmp_path, AttributionMaps(), AttributionMaps(CenterMap()))
    with pytest.raises(ValueError, match="under the name ''"):
        trainer(tmp_path, AttributionMetrics(), AttributionMetrics(CenterMap())).fit(module, data)


class Maps(AttributionMetrics):
    """Keeps the maps of the first batch."""

    def _localize(self, prefix, maps, batch):
        self.found = getattr(self, "found", {}) | {prefix: maps.image}
        super()._localize(prefix, maps, batch)


def test_settings_of_one_method_share_its_forward(tmp_path, data, module, monkeypatch):
    calls = []
    attribute = Matex.attribute
    monkeypatch.setattr(Matex, "attribute", lambda self, *args: calls.append(self) or attribute(self, *args))
    changes = {"no_prior": {"lambda_s": 1.0}, "shallow": Matex(grad_layers=1), "margin": {"target": "margin"}}
    together = Maps({"": Matex(grad_layers=2), **changes}, num_batches=1)
    scores = trainer(tmp_path, together).validate(module, data, verbose=False)[0]
    # The settings of another target need a forward of their own.
    assert [method.target for method in calls] == ["cosine", "margin"]
    for name, method in together.methods.items():
        alone = Maps(method, num_batches=1)
        found = trainer(tmp_path, alone).validate(module, data, verbose=False)[0]
        prefix = f"attribution_{name}" if name else "attribution"
        torch.testing.assert_close(together.found[prefix], alone.found["attribution"], rtol=0, atol=1e-6)
        for scalar in IMAGE_SCALARS | TEXT_SCALARS:
            assert scores[f"{prefix}/{scalar}"] == pytest.approx(found[f"attribution/{scalar}"], abs=1e-5, nan_ok=True)


def test_tensorboard_has_a_chart_per_scalar_and_a_text_on_them(tmp_path, data, module):
    metrics = AttributionMetrics({"": "matex", "center": "center_map"}, num_batches=1, per_finding=True)
    other = AttributionMetrics({"prior_only": PriorOnly()}, num_batches=1)
    trainer(tmp_path, metrics, other, max_epochs=2).fit(module, data)
    logged = events(tmp_path)
    scalars = logged.Tags()["scalars"]
    (stored,) = logged.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    charts = {category.title: {chart.title: chart for chart in category.chart} for category in layout.category}
    assert {f"attribution/{name}" for name in charts["attribution"]} <= set(scalars)

    def shown(chart):
        # As TensorBoard reads a chart: each name is a regular expression for the beginning of a tag.
        return [tag for name in chart.multiline.tag for tag in scalars if re.match(name, tag)]

    tags = ["attribution/pointing_game", "attribution_center/pointing_game", "attribution_prior_only/pointing_game"]
    assert shown(charts["attribution"]["pointing_game"]) == tags
    assert shown(charts["attribution"]["consistency_mean"]) == ["attribution/consistency_mean"]
    findings = shown(charts["attribution per finding"]["pointing_game of center"])
    assert findings
    assert all(tag.startswith("attribution_center/pointing_game/") for tag in findings)
    (text,) = logged.Tensors("attribution/scalars/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert "| `attribution_center/` | CenterMap |" in lines
    names = {line.split("`")[1] for line in lines[lines.index("") + 3 :]}
    assert names == {tag.split("/")[1] for tag in scalars if "attribution" in tag}
    assert any(line.startswith("| `text_confidence_drop` | ↓ | For words: drop in cosine similarity") for line in lines)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, "methods is empty"),
        ({"": {"lambda_s": 1.0}}, "Name a method first"),
        ({"": "matex", "b": {"lamda_s": 1.0}}, "Matex has no setting 'lamda_s', which 'b' changes. Nearest: lambda_s"),
        ({"": "matex", "b": {"lambda_s": -1.0}}, "lambda_s must be"),
        ({"a/b": "matex"}, "The name 'a/b' of a method has other characters"),
        ({"": "metax"}, "There is no method 'metax'"),
    ],
)
def test_wrong_methods_are_refused(methods, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttributionMetrics(methods)


def test_no_logger_for_images_is_said_once(tmp_path, data, module):
    with pytest.warns(UserWarning, match="No logger of the trainer accepts images"):
        trainer(tmp_path, AttributionMaps(), logger=CSVLogger(tmp_path), max_epochs=1).fit(module, data)


@pytest.mark.parametrize("settings", [{"num_batches": 0}, {"fill": "grey"}])
def test_wrong_metric_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        AttributionMetrics(**settings)


@pytest.mark.parametrize("settings", [{"num_pairs": 0}, {"every_n_validations": -1}])
def test_wrong_map_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        AttributionMaps(**settings)


def test_pairs_are_chosen_turn_by_turn_over_findings():
    pairs = [
        ImageTextPair(
            id=f"{finding}{number}", patient_id="", image_id="", image="", phrase="", finding=finding, boxes=boxes
        )
        for finding, boxes in (("edema", ((0, 0, 1, 1),)), ("nodule", ((0, 0, 1, 1),)), ("", ()))
        for number in range(3)
    ]
    assert choose_pairs(pairs, 5) == ["edema0", "nodule0", "0", "edema1", "nodule1"]
    assert len(choose_pairs(pairs, 50)) == 9


def test_a_method_of_ones_own_plugs_in(tmp_path, data, module):
    class Corner(CenterMap):
        def _draw(self, clip, phrases, image, device):
            maps = torch.zeros(len(phrases), *clip.image_size)
            maps[:, 0, 0] = 1
            return maps

    assert issubclass(Corner, AttributionMethod)
    scores = trainer(tmp_path, AttributionMetrics(Corner())).validate(module, data, verbose=False)[0]
    assert scores["attribution/pointing_game"] == 0
