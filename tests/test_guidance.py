"""The loss on maps in training: its map, its gradient, its targets, and what it does in `trainer.fit`."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from conftest import TINY
from families import FAMILIES, family
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matex_pl import ClipModule
from matex_pl.attribution import Matex
from matex_pl.attribution.core.capture import borrowed, count_blocks, follow_attention, sample
from matex_pl.cli import main
from matex_pl.data import PhantomDataModule
from matex_pl.roar import Protocol, Training
from matex_pl.roar.finetune import build_module
from matex_pl.roar.make import make_plan
from matex_pl.roar.work import prepare_maps, result, work_here
from matex_pl.training.freeze import freeze_parameters
from matex_pl.training.guidance import Followed, Guidance, Guide
from matex_pl.training.guidance_loss import energy_loss, l1_loss, outside_loss
from matex_pl.training.guidance_map import guided_map, kept_patches, margin_directions
from matex_pl.training.guidance_targets import anatomy_share, box_share, region_boxes
from matex_pl.training.module import load_module

PHRASES = ["Left lower lobe nodule.", "Right effusion, small.", "Mass of the right upper lobe."]


def _inputs(clip):
    images = torch.randn(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(1)).to(clip.std)
    return images, clip.tokenize(PHRASES), PHRASES


def _depth(clip):
    with borrowed(clip):
        return count_blocks(clip, *sample(clip))[0]


def _maps(clip, images, direction, blocks, second_order=True):
    """Maps of the last blocks, on the graph of a forward."""
    depth, pooling = _depth(clip), clip.image_pooling(images)
    twice = depth - blocks + (pooling.position is not None) if second_order else depth
    with follow_attention(depth - blocks, depth, twice_from=twice) as followed:
        embedding = clip.encode_image(images)
    return guided_map(followed, embedding, direction, pooling, second_order=second_order)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_guided_map_is_the_gradient_part_of_matex(name: str, blocks: int) -> None:
    clip = family(name)
    images, tokens, phrases = _inputs(clip)
    blocks = min(blocks, _depth(clip))
    expected = Matex(grad_layers=blocks, target="cosine").attribute(clip, images, tokens, phrases).parts["grad"]
    with torch.no_grad():
        text = clip.encode_text(tokens)
    for second_order in (True, False):
        found = _maps(clip, images, text.float(), blocks, second_order)
        torch.testing.assert_close(found.detach(), expected.flatten(1), atol=1e-5 * float(expected.max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["native", "siglip", "average", "resnet", "coca"])
def test_second_derivative_against_differences(name: str) -> None:
    """The gradient of a loss on the map, along a random direction of all weights, in float64."""
    clip = copy.deepcopy(family(name)).double()
    images, tokens, _ = _inputs(clip)
    text, blocks = clip.encode_text(tokens).detach(), min(2, _depth(clip))
    draw = torch.Generator().manual_seed(0)
    weights = list(clip.model.visual.parameters())
    steps = [torch.randn(weight.shape, generator=draw).double() * weight.detach().abs().mean() for weight in weights]
    target = torch.rand(len(images), clip.grid[0] * clip.grid[1], generator=draw).double()

    def loss(moved: float = 0.0):
        with torch.no_grad():
            for weight, step in zip(weights, steps, strict=True):
                weight += moved * step
        return energy_loss(_maps(clip, images, text, blocks), target).sum()

    gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
    expected = sum(float((gradient * step).sum()) for gradient, step in zip(gradients, steps, strict=True))
    size = 1e-6
    higher, lower = loss(size).item(), loss(-2 * size).item()
    assert abs(expected) > 1e-3
    assert (higher - lower) / (2 * size) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["native", "biomedclip"])
def test_patch_dropout_keeps_map_and_target_together(name: str) -> None:
    """The map of the kept patches is that of a forward in which the others are out of sight."""
    clip = copy.deepcopy(family(name))
    visual = clip.model.visual
    layer = (open_clip.transformer if name == "native" else timm.layers).PatchDropout(0.5)
    if name == "native":
        visual.patch_dropout = layer
    else:
        visual.trunk.patch_drop = layer
    layer.train()
    images = _inputs(clip)[0]
    torch.manual_seed(3)
    with kept_patches(clip) as kept:
        embedding = clip.encode_image(images)
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.testing.assert_close(clip.encode_image(images), embedding)
    assert torch.rand(1) == after
    places = kept[0]
    count = clip.grid[0] * clip.grid[1]
    assert places.shape == (3, count // 2)
    assert all(len(set(row)) == len(row) for row in places.tolist())
    layer.eval()
    stream = []
    with (visual.patch_dropout if name == "native" else layer).register_forward_hook(
        lambda _, __, out: stream.append(out)
    ):
        clip.encode_image(images)
    layer.train()
    torch.manual_seed(3)
    with layer.register_forward_hook(lambda _, __, out: stream.append(out)):
        clip.encode_image(images)
    prefix = stream[0].shape[1] - count
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(stream[1][:, prefix:], stream[0][:, prefix:][rows, places])


def test_losses_on_maps_with_known_answers() -> None:
    target = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    flat, inside, empty = torch.ones(2, 4), torch.tensor([[2.0, 1, 0, 0], [3.0, 0, 0, 0]]), torch.zeros(2, 4)
    # A flat map has the same energy in a target of any size.
    torch.testing.assert_close(energy_loss(flat, target), torch.full((2,), math.log(2)))
    torch.testing.assert_close(energy_loss(empty, target), torch.full((2,), math.log(2)))
    # All inside: the density is 2. Then half of a patch: densities .5 / .125 inside and .5 / .875 outside.
    known = [-math.log(2.05 / 2.1), -math.log(4.05 / (4.1 + 4 / 7))]
    torch.testing.assert_close(energy_loss(inside, target), torch.tensor(known))
    torch.testing.assert_close(l1_loss(inside, target), torch.tensor([0.125, 0.125]))
    torch.testing.assert_close(l1_loss(empty, target), target.mean(1))
    torch.testing.assert_close(outside_loss(flat, target), torch.tensor([0.5**2, 0.875**2]))
    torch.testing.assert_close(outside_loss(inside, target), torch.tensor([0, 0.5**2]))
    torch.testing.assert_close(outside_loss(empty, target), torch.ones(2))
    for loss in (energy_loss, l1_loss, outside_loss):
        torch.testing.assert_close(loss(7 * inside, target), loss(inside, target), atol=1e-5, rtol=0)


def test_targets_are_area_shares() -> None:
    device = torch.device("cpu")
    boxes = [torch.tensor([[0.125, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]), torch.zeros(0, 4)]
    found = box_share(boxes, (2, 4), device)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 1, 0, 0], [0, 0, 1, 1]], [[0.0] * 4] * 2]))
    # The slow way: boxes on a fine raster.
    draw = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 17, (6, 4), generator=draw).float()
    random = torch.stack([edges[:, :2].sort(1).values, edges[:, 2:].sort(1).values], 2).flatten(1)[:, [0, 1, 2, 3]] / 16
    for x0, y0, x1, y1 in random.tolist():
        fine = torch.zeros(16, 16)
        fine[round(y0 * 16) : round(y1 * 16), round(x0 * 16) : round(x1 * 16)] = 1
        share = box_share([torch.tensor([[x0, y0, x1, y1]])], (4, 4), device)[0]
        torch.testing.assert_close(share, fine.view(4, 4, 4, 4).mean((1, 3)))


def test_half_precision_does_not_round_named_regions() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    [expected] = region_boxes(["Left lower lobe nodule."], whole)
    torch.set_default_dtype(torch.bfloat16)
    try:
        [found] = region_boxes(["Left lower lobe nodule."], whole)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_regions_and_anatomy_as_targets() -> None:
    whole = torch.tensor([[0.0, 0, 1, 1], [0.25, 0.0, 0.75, 1.0], [0.0, 0, 1, 1]])
    left, padded, none = region_boxes(["Left effusion.", "Left effusion.", "Effusion."], whole)
    assert len(none) == 0
    # The patient's left is on the right of the image.
    assert left[:, 0].min() > 0.4
    torch.testing.assert_close(padded[:, [0, 2]], 0.25 + left[:, [0, 2]] / 2)
    torch.testing.assert_close(padded[:, [1, 3]], left[:, [1, 3]])
    masks = {name: torch.zeros(2, 8, 8, dtype=torch.bool) for name in ("left_lung", "right_lung", "heart", "clavicle")}
    # One lung alone is no target.
    masks["left_lung"][1, :, 4:] = True
    masks["right_lung"][0, :, 7:] = True
    masks["left_lung"][0, :, 4:] = True
    masks["heart"][:, 4:, 2:4] = True
    masks["clavicle"][:] = True
    share, has = anatomy_share(masks, 2, (2, 2), torch.device("cpu"))
    assert has.tolist() == [True, False]
    torch.testing.assert_close(share[0], torch.tensor([[0, 1.0], [0.5, 1.0]]))
    share, has = anatomy_share({}, 2, (2, 2), torch.device("cpu"))
    assert not has.any()
    assert not share.any()


def test_the_margin_is_over_other_phrases_of_the_batch() -> None:
    """A direction that all phrases share is none, and copies of a phrase are no others."""
    text = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    text[2] = text[0]
    found = margin_directions(text, ["Edema.", "Mass.", "EDEMA.", "Nodule."])
    torch.testing.assert_close(found[0], text[0] - (text[1] + text[3]) / 2)
    torch.testing.assert_close(found[1], text[1] - (text[0] + text[2] + text[3]) / 3)
    torch.testing.assert_close(margin_directions(text[:1], ["Edema."]), text[:1])
    same = text[:1].expand(3, -1)
    assert margin_directions(same, ["a", "b", "c"]).abs().max() < 1e-6


def _trainer(tmp_path, steps):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )


def _fit(images, tmp_path, steps=6, **settings):
    torch.manual_seed(0)
    module = ClipModule(**{"name": json.dumps(TINY), "lr": 3e-3, "warmup_steps": 1} | settings)
    run = _trainer(tmp_path, steps)
    run.fit(module, images)
    return module, {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("loss", ["energy", "l1", "outside"])
def test_a_training_draws_maps_into_the_boxes(loss: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    tiny_images.batch_size = 16
    plain = _fit(tiny_images, tmp_path, steps=50, guidance=Guidance(loss=loss, weight=1e-9))[1]
    guided = _fit(tiny_images, tmp_path, steps=50, guidance=Guidance(loss=loss, weight=3))[1]
    assert guided["train/guided_share"] == 1
    assert guided["train/guidance_loss"] < 0.8 * plain["train/guidance_loss"]
    assert guided["train/energy_in_box"] > 1.3 * plain["train/energy_in_box"]


def test_anatomy_guides_with_masks_of_training_images(tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    """Masks are read in training only for this, and an image without masks cannot be guided."""
    settings = {"guidance": Guidance(boxes=0, anatomy=1)}
    module, scalars = _fit(tiny_images, tmp_path, steps=1, **settings)
    assert scalars["train/guided_share"] == 1
    assert scalars["train/guidance_loss"] > 0
    assert "train/energy_in_box" not in scalars
    assert set(next(iter(tiny_images.train_dataloader()))["masks"]) == {"left_lung", "right_lung", "heart"}
    _fit(tiny_images, tmp_path, steps=1)
    assert not next(iter(tiny_images.train_dataloader()))["masks"]
    tiny_images.has_masks = lambda pair: False
    with pytest.raises(ValueError, match=r"guidance\.anatomy needs masks of lungs"):
        _fit(tiny_images, tmp_path, steps=1, **settings)
    assert module.needs_masks


def test_without_guidance_nothing_changes(tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    """A weight of almost nothing trains as no guidance, whose steps record nothing."""
    plain, scalars = _fit(tiny_images, tmp_path)
    assert not [name for name in scalars if "guid" in name or "energy" in name]
    assert plain.guide is None
    guided, scalars = _fit(tiny_images, tmp_path, guidance=Guidance(weight=1e-12))
    assert {"train/guidance_loss", "train/energy_in_box", "train/guided_share"} <= scalars.keys()
    for one, other in zip(plain.parameters(), guided.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "image"}, "block 1 of the image tower is frozen"),
        ({"freeze": "all-but-head"}, "block 1 of the image tower is frozen"),
        ({"guidance": Guidance(blocks=3)}, "guidance.blocks is 3, but the image tower has 2 blocks"),
        ({"guidance": Guidance(blocks=2), "grad_checkpointing": True}, "grad_checkpointing cannot compute again"),
    ],
)
def test_refusals(settings: dict, message: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        _fit(tiny_images, tmp_path, **{"guidance": Guidance()} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l2"}, "guidance.loss must be"),
        ({"weight": -1}, "guidance.weight must be a finite number"),
        ({"boxes": 0}, "guidance has no weight"),
        ({"blocks": 0}, "guidance.blocks must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)


def test_a_compiled_model_is_refused(tiny_json: str, tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    whole, tower, module = (ClipModule(tiny_json, guidance=Guidance()) for _ in range(3))
    whole.clip.model = torch.compile(whole.clip.model)
    tower.clip.model.visual.compile(backend="aot_eager")
    for compiled in (whole, tower, torch.compile(module, backend="aot_eager")):
        with pytest.raises(NotImplementedError, match=r"torch\.compile hides"):
            _trainer(tmp_path, 1).fit(compiled, tiny_images)


@pytest.mark.parametrize(
    ("name", "freeze"),
    [("coca", "all-but-head"), ("coca", "all-but-projections"), ("registers_pool", "all-but-projections")],
)
def test_a_frozen_pool_is_refused(name: str, freeze: str) -> None:
    """The last attention of these towers is their pool; the projection behind it is trained."""
    clip = copy.deepcopy(family(name)).requires_grad_(True)
    freeze_parameters(clip.model, freeze)
    with pytest.raises(ValueError, match="of the image tower is frozen"):
        Guide(Guidance(), clip)


def test_pairs_without_any_target_are_refused(tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    listed = tiny_images.list_pairs()
    tiny_images.list_pairs = lambda: [replace(pair, boxes=(), phrase="Edema.") for pair in listed]
    with pytest.raises(ValueError, match=r"none has boxes \(guidance\.boxes\)\. Give"):
        _fit(tiny_images, tmp_path, steps=1, guidance=Guidance())
    with pytest.raises(ValueError, match=r"none has boxes .* and no phrase names a place \(guidance\.regions\)"):
        _fit(tiny_images, tmp_path, steps=1, guidance=Guidance(regions=0.5))


def test_a_target_outside_of_the_image_guides_nothing() -> None:
    target, has = torch.tensor([[0.0, 0.0], [0.0, 0.5], [1.0, 1.0]]), torch.tensor([True, True, False])
    assert Followed([], []).kept_targets(target, has)[1].tolist() == [False, True, False]


def test_runs_of_roar_train_a_guided_model_without_its_guidance(tiny_images: PhantomDataModule, tmp_path: Path) -> None:
    module, _ = _fit(tiny_images, tmp_path, steps=1, guidance=Guidance(weight=5.0))
    origins = {"checkpoint": "here", "start_checkpoint": "here"}
    for finetune in ("head", "lora"):
        training, folder = Training(epochs=1, accelerator="cpu", finetune=finetune), tmp_path / finetune
        plan = make_plan(folder, tiny_images, module, module, ["chefer"], Protocol(repeats=1), training, origins)
        assert build_module(plan).hparams["guidance"] is None
        clean = next(run for run in plan.runs() if not run.method)
        prepare_maps(plan)
        work_here(plan, [clean])
        assert result(plan, clean)["loss"] > 0


@pytest.mark.parametrize("config", ["phantom_guided.yaml", "phantom_shortcut_guided.yaml"])
def test_shipped_configs_train(config: str, phantom_words: list[str], workdir: Path) -> None:
    words = ["--model.name=tiny.json", "--model.guidance.blocks=1", "--trainer.max_steps=2"]
    words += ["--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    main(["fit", "--config", config, *phantom_words[2:], *words])
    [run] = Path("runs").rglob("events.*")
    found = EventAccumulator(str(run.parent)).Reload()
    assert {"train/guidance_loss", "train/guided_share"} <= set(found.Tags()["scalars"])
    assert found.Scalars("train/guided_share")[-1].value == 1
    [checkpoint] = Path("runs").rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["guidance"]["blocks"] == 1
    # The settings of a checkpoint are read again, and a model is explained without them.
    main(["explain", "image.png", "Left nodule.", f"--ckpt_path={checkpoint}"])
    guidance = load_module(str(checkpoint)).hparams["guidance"]
    assert (guidance["boxes"], guidance["anatomy"]) == ((0, 1) if "shortcut" in config else (1, 0))
