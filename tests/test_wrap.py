"""Models in memory: transformers' and open_clip's own, with adapters, and any two encoders."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import pytorch_grad_cam
import torch
import torchvision
import transformers
from families import CLIP_TEXT, FAMILIES, NATIVE, bert, family, folder, redraw, unigram
from open_clip.tokenizer import SimpleTokenizer
from peft import LoraConfig, LoraModel, PromptTuningConfig, get_peft_model
from PIL import Image
from test_methods import METHODS, assert_close_maps
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from matex_pl.attribution import GradCam, LeGrad, Matex
from matex_pl.attribution.shipped import shipped_methods
from matex_pl.clip import Clip, load_clip
from matex_pl.evaluation.store import weight_hash
from matex_pl.explain import compare_methods, explain_pair, pair_batch
from matex_pl.maps import min_max
from matex_pl.metrics.sanity import randomized, stages

PHRASES = ["Left lower lobe consolidation.", "effusion", "Small nodule of the right upper lung and a mass!"]
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]


def draw(clip: Clip) -> tuple[Tensor, Tensor, list[str]]:
    images = torch.rand(len(PHRASES), 3, *clip.image_size, generator=torch.Generator().manual_seed(3))
    clip.mean_image.copy_(torch.linspace(0.2, 0.6, clip.mean_image.numel()).view_as(clip.mean_image))
    return clip.normalize(images), clip.tokenize(PHRASES), PHRASES


def test_mean_and_deviation_that_move_in_inference_mode_train_later(tiny_clip: Clip) -> None:
    tiny_clip.model.to("meta")
    with torch.inference_mode():
        assert tiny_clip.mean.device.type == tiny_clip.std.device.type == "meta"
    assert not tiny_clip._mean.is_inference()
    assert not tiny_clip._std.is_inference()


# --- models of transformers, and the same weights in open_clip's form


@cache
def clip_words() -> Any:
    """transformers' CLIP tokenizer with the vocabulary of open_clip's."""
    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): index for piece, index in own.encoder.items()}
    path = folder("clip_words")
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks)]
    (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return transformers.CLIPTokenizerFast.from_pretrained(path)


def processor(size: int = 32) -> Any:
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    return transformers.CLIPProcessor(images, clip_words())


def clip_model(**settings: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    text = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return drawn(transformers.CLIPModel._from_config(config, **settings))


def siglip_model() -> Any:
    layers = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_act": "gelu"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 24, "intermediate_size": 96, "vocab_size": 64, "max_position_embeddings": 12}
    config = transformers.SiglipConfig(
        text_config=layers | text | {"projection_size": 32, "num_attention_heads": 3},
        vision_config=layers | vision,
    )
    model = drawn(transformers.SiglipModel(config))
    # As timm's own draw in `families`: no norm stands before the query.
    nn.init.normal_(model.vision_model.head.probe, std=1.5, generator=torch.Generator().manual_seed(8))
    return model


def drawn(model: Any) -> Any:
    redraw(model, torch.Generator().manual_seed(7))
    return model.eval()


def blocks_of(state: dict[str, Tensor], path: str, to: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Weights of the blocks below `path`, q, k and v joined."""
    found: dict[str, Tensor] = {}
    for name in (name for name in state if name.startswith(f"{path}.encoder.layers.")):
        index, part = name.removeprefix(f"{path}.encoder.layers.").split(".", 1)
        module, kind = part.rsplit(".", 1)
        if module in names:
            found[f"{to}.{index}.{names[module]}.{kind}"] = state[name]
        elif module.endswith("q_proj"):
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            key = f"attn.qkv.{kind}" if "qkv" in names else f"attn.in_proj_{kind}"
            found[f"{to}.{index}.{key}"] = torch.cat(parts)
    return found


NAMES = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
NAMES |= {"self_attn.out_proj": "attn.out_proj"}
TIMM_NAMES = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
TIMM_NAMES |= {"self_attn.out_proj": "attn.proj", "qkv": ""}


def clip_twin(model: Any) -> Any:
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": NATIVE, "text_cfg": CLIP_TEXT}
    state = model.state_dict()
    plain = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms["ln_final"] = "text_model.final_layer_norm"
    plain |= {f"{to}.{kind}": f"{name}.{kind}" for to, name in norms.items() for kind in ("weight", "bias")}
    found = {to: state[name] for to, name in plain.items()}
    found |= {"visual.proj": state["visual_projection.weight"].T, "text_projection": state["text_projection.weight"].T}
    found |= blocks_of(state, "vision_model", "visual.transformer.resblocks", NAMES)
    found |= blocks_of(state, "text_model", "transformer.resblocks", NAMES)
    twin = load_clip(json.dumps({"model_cfg": config})).model
    twin.load_state_dict(found)
    return twin


def siglip_twin(model: Any) -> Any:
    trunk = folder("square_trunk")
    size = {"img_size": [32, 32], "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3, "mlp_ratio": 2}
    described = {"architecture": "test_vit", "model_args": size | {"class_token": False}, "pretrained_cfg": {}}
    (trunk / "config.json").write_text(json.dumps(described), encoding="utf-8")
    vision = {"timm_model_name": f"local-dir:{trunk}", "timm_model_pretrained": False, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 64, "hf_tokenizer_name": unigram(), "no_causal_mask": True}
    text |= {"width": 24, "heads": 3, "layers": 3, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
    config = {"custom_text": True, "embed_dim": 32, "init_logit_bias": -10, "text_cfg": text}
    config |= {"vision_cfg": vision | {"timm_pool": "map", "timm_proj": "none"}}
    state = model.state_dict()
    embeddings = state["vision_model.embeddings.position_embedding.weight"]
    head, pool = "vision_model.head", "visual.trunk.attn_pool"
    found = {
        "visual.trunk.pos_embed": embeddings[None],
        f"{pool}.latent": state[f"{head}.probe"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "logit_scale": state["logit_scale"][0],
        "logit_bias": state["logit_bias"][0],
    }
    for kind in ("weight", "bias"):
        joined = state[f"{head}.attention.in_proj_{kind}"]
        found |= {f"{pool}.q.{kind}": joined[:32], f"{pool}.kv.{kind}": joined[32:]}
        others = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        found |= {f"{pool}.{to}.{kind}": state[f"{head}.{name}.{kind}"] for to, name in others.items()}
        found |= {
            f"visual.trunk.patch_embed.proj.{kind}": state[f"vision_model.embeddings.patch_embedding.{kind}"],
            f"visual.trunk.norm.{kind}": state[f"vision_model.post_layernorm.{kind}"],
            f"text.ln_final.{kind}": state[f"text_model.final_layer_norm.{kind}"],
            f"text.text_projection.{kind}": state[f"text_model.head.{kind}"],
        }
    found |= blocks_of(state, "vision_model", "visual.trunk.blocks", TIMM_NAMES)
    found |= blocks_of(state, "text_model", "text.transformer.resblocks", NAMES)
    twin = load_clip(json.dumps({"model_cfg": config})).model
    twin.load_state_dict(found)
    return twin


def wrapped(kind: str) -> Clip:
    if kind == "clip":
        return Clip.wrap(clip_model(), processor())
    words = transformers.AutoTokenizer.from_pretrained(unigram())
    return Clip.wrap(siglip_model(), words, mean=0.5, std=0.5)


@cache
def both(kind: str) -> tuple[Clip, Clip]:
    """A wrapped model of transformers, and the same weights in open_clip's form."""
    clip = wrapped(kind)
    twin = {"clip": clip_twin, "siglip": siglip_twin}[kind](clip.model.model)
    tokenizer = open_clip.SimpleTokenizer(context_length=16) if kind == "clip" else clip.tokenizer
    return clip.double(), Clip(twin, tokenizer, clip.config).eval().double()


MORE = {"recommended": Matex.recommended(), "rollout": Matex.paper(spatial_weight="loosened", flow="rollout")}
MORE |= {"hires": GradCam([-1, -2], variant="hires"), "last": LeGrad(1)}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("method", (METHODS | MORE).values(), ids=METHODS | MORE)
def test_maps_are_those_of_the_same_weights_in_the_form_of_open_clip(kind: str, method: Any) -> None:
    clip, twin = both(kind)
    images, tokens, phrases = draw(clip)
    _, other, _ = draw(twin)
    maps, expected = method.attribute(clip, images, tokens, phrases), method.attribute(twin, images, other, phrases)
    assert torch.equal(clip.content(tokens), twin.content(other))
    assert maps.image.any()
    assert_close_maps(maps, expected, 1e-5)
    assert_close_maps(
        method.attribute_phrases(clip, images[0], phrases), method.attribute_phrases(twin, images[0], phrases), 1e-5
    )
    for module in clip.modules():
        assert not {**module._forward_hooks, **module._forward_pre_hooks}
        assert "forward" not in vars(module)


def test_nothing_is_copied_and_training_reaches_the_maps() -> None:
    model = clip_model().train()
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    clip = Clip.wrap(model, processor())
    assert {id(weight) for weight in clip.parameters()} == {id(weight) for weight in model.parameters()}
    assert before == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    inputs = draw(clip)
    torch.testing.assert_close(clip.logit_scale, model.logit_scale)
    # Under the gradient of a loss of the wrapped model, the original takes the step.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in (Matex.recommended(), METHODS["Rise"]):
        first = method.attribute(clip, *inputs)
        clip.similarity(*inputs[:2]).sum().backward()
        assert model.vision_model.embeddings.patch_embedding.weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
        second = method.attribute(clip, *inputs)
        assert not torch.equal(first.score, second.score)
        assert not torch.equal(first.image, second.image)
    assert all(part.training for part in model.modules())
    # Sent elsewhere as a whole, without the `Clip`.
    model.double()
    assert (clip.std.dtype, clip.normalize(torch.rand(1, 3, 32, 32)).dtype) == (torch.float64, torch.float64)
    assert Matex().attribute(clip, clip.normalize(torch.rand(3, 3, 32, 32)), *inputs[1:]).image.isfinite().all()


def test_embeddings_are_those_of_the_model_on_its_own_inputs() -> None:
    model, ours = clip_model(), processor()
    clip = Clip.wrap(model, ours)
    image = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    given = ours(text=PHRASES, images=image.numpy(), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**given)
        found = clip.encode_image(clip.normalize(image.permute(2, 0, 1)[None]))
        torch.testing.assert_close(found, output.image_embeds)
        torch.testing.assert_close(clip.encode_text(clip.tokenize(PHRASES)), output.text_embeds)


@pytest.mark.parametrize("phrase", [*PHRASES, "  Naïve   café; 3 cm. ", "", "word " * 30, "!", "a&amp;b <b> 🙂"])
def test_tokens_of_transformers_clip_tokenizer(phrase: str) -> None:
    """Words, content and pieces are those of open_clip, whose pad token differs behind the end of text."""
    clip, twin = both("clip")
    ours, others = clip.tokenize([phrase]), twin.tokenize([phrase])
    assert torch.equal(ours, torch.as_tensor(clip_words()([phrase], **PADDED).input_ids))
    if "&" in phrase:
        # open_clip alone unescapes HTML.
        return
    content = clip.content(ours)
    assert torch.equal(content, twin.content(others))
    assert torch.equal(ours[content], others[content])
    assert clip.pieces(ours[0][content[0]]) == twin.pieces(others[0][content[0]])
    assert clip.count_tokens(phrase) == twin.count_tokens(phrase)
    assert clip.pad_id == 0 != clip_words().pad_token_id


PADDED: dict[str, Any] = {"padding": "max_length", "max_length": 16, "truncation": True}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_implementation_of_attention_is_switched_for_the_explanation(kind: str) -> None:
    clip = wrapped(kind)
    inputs = draw(clip)
    expected = Matex().attribute(clip, *inputs)
    model = clip.model.model
    configs = (model.config, model.config.text_config, model.config.vision_config)
    for config in configs:
        config._attn_implementation_internal = "eager"
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    assert_close_maps(Matex().attribute(clip, *inputs), expected, 0)
    with pytest.raises(ValueError, match="NaN or Inf"):
        Matex().attribute(clip, inputs[0] * torch.nan, *inputs[1:])
    assert [config._attn_implementation for config in configs] == ["eager", "flash_attention_2", "eager"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_parameters_are_randomized_stage_by_stage(kind: str) -> None:
    clip = wrapped(kind)
    inputs, model = draw(clip), clip.model.model
    named, seen = stages(clip), [Matex().attribute(clip, *inputs).image]
    assert list(named) == ["head", *(f"block {-n - 1}" for n in range(4 if kind == "clip" else 3)), "embeddings"]
    own = {f"model.model.{name}" for name, _ in model.named_parameters() if not name.startswith("logit_")}
    assert {name for part in named.values() for name in part} == own
    assert all("embed" in name or "pre_layrnorm" in name for name in named["embeddings"])
    assert not any(".encoder." in name or ".embeddings." in name for name in named["head"])
    for _, changed in randomized(clip):
        seen.append(Matex().attribute(changed, *inputs).image)
        assert not torch.equal(seen[-1], seen[-2])
    torch.testing.assert_close(Matex().attribute(clip, *inputs).image, seen[0])


# --- adapters of PEFT


def with_lora(model: nn.Module, targets: list[str]) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return adapted


def native_model() -> Any:
    config = {"embed_dim": 16, "vision_cfg": NATIVE, "text_cfg": CLIP_TEXT}
    return drawn(load_clip(json.dumps({"model_cfg": config})).model)


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_lora_is_part_of_the_explained_model(kind: str) -> None:
    is_open_clip = kind == "open_clip"
    model = native_model() if is_open_clip else clip_model()
    words = SimpleTokenizer(context_length=16) if is_open_clip else processor()
    plain = Clip.wrap(copy.deepcopy(model), words)
    lora = with_lora(model, ["attn"] if is_open_clip else ["q_proj", "v_proj"])
    clip = Clip.wrap(lora, words)
    # PEFT makes its attention's parameters anew at each look, around the same numbers.
    assert {part.data_ptr() for part in clip.parameters()} == {part.data_ptr() for part in lora.parameters()}
    inputs = draw(clip)
    maps = [method.attribute(clip, *inputs) for method in METHODS.values()]
    clip.similarity(*inputs[:2]).sum().backward()
    assert all(weight.grad.any() for name, weight in lora.named_parameters() if "lora_A" in name)
    merged = Clip.wrap(lora.merge_and_unload(), words)
    draw(merged), draw(plain)
    for method, found in zip(METHODS.values(), maps, strict=True):
        assert_close_maps(found, method.attribute(merged, *inputs), 1e-3)
    assert not torch.allclose(maps[0].score, METHODS["Matex"].attribute(plain, *inputs).score, atol=1e-3)


def test_a_layer_that_peft_replaces_later_is_seen() -> None:
    model = clip_model()
    clip = Clip.wrap(model, processor())
    inputs = draw(clip)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"])
    lora = get_peft_model(model, settings)
    before = clip.similarity(*inputs[:2])
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "visual_projection" in name and weight.requires_grad:
                weight.neg_()
    torch.testing.assert_close(clip.similarity(*inputs[:2]), -before)


@pytest.mark.parametrize("kind", ["mixed", "tuner"])
def test_every_wrapper_of_peft_is_left_out(kind: str) -> None:
    model, settings = clip_model(), LoraConfig(r=2, target_modules=["q_proj"])
    around = get_peft_model(model, settings, mixed=True) if kind == "mixed" else LoraModel(model, settings, "default")
    assert Clip.wrap(around, processor()).model.model is model


# --- models of open_clip


def test_a_model_of_open_clip_brings_its_own_normalization() -> None:
    model, _, transform = open_clip.create_model_and_transforms("RN50", image_mean=(0.1, 0.2, 0.3))
    words = open_clip.get_tokenizer("RN50")
    clip = Clip.wrap(model, words)
    assert clip.model is model
    torch.testing.assert_close(clip.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(Clip.wrap(model, words, transform).mean, clip.mean)
    assert Clip.wrap(model, words, mean=0.5, std=[0.25]).std.flatten().tolist() == [0.25] * 3
    other = open_clip.image_transform(224, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert Clip.wrap(model, words, other).mean.flatten().tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=r"Compose makes images of \(112, 112\) pixels, the model takes \(224, 224\)"):
        Clip.wrap(model, words, open_clip.image_transform(112, is_train=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_open_clip_is_wrapped_as_it_was_loaded(name: str) -> None:
    loaded = family(name)
    clip = Clip.wrap(loaded.model, loaded.tokenizer)
    assert clip.model is loaded.model
    inputs = draw(clip)
    assert_close_maps(Matex().attribute(clip, *inputs), Matex().attribute(loaded, *inputs), 0)
    assert (clip.grid, clip.context_length) == (loaded.grid, loaded.context_length)


HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}


def siglip_images() -> Any:
    return transformers.SiglipImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )


def open_clip_images(mode: str) -> Any:
    return open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.25,) * 3, resize_mode=mode)


def torchvision_images() -> Any:
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToImage()]
    scale = [transforms.ToDtype(torch.float32, scale=True), transforms.Normalize([0.5], [0.25])]
    return transforms.Compose([transforms.Compose(steps), *scale])


PREPROCESS: dict[str, tuple[Any, str]] = {
    "siglip": (siglip_images, "squash"),
    "open_clip crops": (lambda: open_clip_images("shortest"), "shortest"),
    "open_clip pads": (lambda: open_clip_images("longest"), "longest"),
    "open_clip stretches": (lambda: open_clip_images("squash"), "squash"),
    "torchvision": (torchvision_images, "shortest"),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_preprocessing_of_several_libraries(name: str) -> None:
    make, mode = PREPROCESS[name]
    clip = Clip.wrap(small(), clip_words(), make())
    assert clip.config["preprocess_cfg"] == HALF | {"size": [32, 32], "resize_mode": mode}
    torch.testing.assert_close(clip.normalize(torch.full((1, 3, 32, 32), 1.0)), torch.full((1, 3, 32, 32), 2.0))
    assert len(weight_hash(clip)) == 64


@cache
def small() -> Any:
    return clip_model()


class OwnEmbeddings(transformers.CLIPModel):
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_image_features(*args, **kwargs)


def own_embeddings() -> Any:
    return OwnEmbeddings(small().config)


def with_prompt() -> Any:
    sizes = {"token_dim": 24, "num_layers": 4, "num_attention_heads": 3, "num_transformer_submodules": 1}
    return get_peft_model(
        clip_model(), PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2, **sizes)
    )


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "another model": (
        lambda: Clip.wrap(nn.Linear(2, 2), clip_words()),
        NotImplementedError,
        "got Linear.*from_encoders",
    ),
    "another of transformers": (
        lambda: Clip.wrap(small().vision_model, clip_words()),
        NotImplementedError,
        "got CLIPVisionModel",
    ),
    "its own embeddings": (
        lambda: Clip.wrap(own_embeddings(), processor()),
        NotImplementedError,
        r"OwnEmbeddings computes its embeddings in a way of its own \(get_image_features\)",
    ),
    "a prompt": (lambda: Clip.wrap(with_prompt(), processor()), NotImplementedError, "PROMPT_TUNING of PEFT"),
    "no normalization": (
        lambda: Clip.wrap(small(), clip_words()),
        ValueError,
        r"The mean and std of the images is missing. Give `preprocess`",
    ),
    "no deviation": (
        lambda: Clip.wrap(small(), clip_words(), mean=0.5),
        ValueError,
        "The std of the images is missing",
    ),
    "two means": (
        lambda: Clip.wrap(small(), processor(), mean=0.5),
        ValueError,
        r"The mean is \[0.5, 0.5, 0.5\] in the arguments and \[0.48, 0.45, 0.4\] in CLIPImageProcessor",
    ),
    "two processors": (
        lambda: Clip.wrap(small(), processor(), transformers.CLIPImageProcessor(size=32, crop_size=32)),
        ValueError,
        "The mean is .* in CLIPImageProcessor",
    ),
    "another size": (
        lambda: Clip.wrap(small(), processor(64)),
        ValueError,
        r"CLIPImageProcessor makes images of \(64, 64\) pixels, the model takes \(32, 32\)",
    ),
    "another scale": (
        lambda: Clip.wrap(small(), clip_words(), transformers.CLIPImageProcessor(rescale_factor=0.5)),
        ValueError,
        r"does not scale images by 1/255 \(do_rescale, rescale_factor 0.5\)",
    ),
    "no preprocessing": (
        lambda: Clip.wrap(small(), clip_words(), lambda image: image),
        ValueError,
        "preprocess is function without a Normalize",
    ),
    "no deviation above 0": (
        lambda: Clip.wrap(small(), clip_words(), mean=0.5, std=0),
        ValueError,
        r"std must be positive, got \[0.0, 0.0, 0.0\]",
    ),
    "two channels": (
        lambda: Clip.wrap(small(), clip_words(), mean=[0.5, 0.5], std=1),
        ValueError,
        r"mean must be one number or three, got \[0.5, 0.5\]",
    ),
    "no tokenizer": (lambda: Clip.wrap(small(), str.split, mean=0, std=1), ValueError, "got method_descriptor"),
    "another length": (
        lambda: Clip.wrap(small(), SimpleTokenizer(), mean=0, std=1),
        ValueError,
        "The tokenizer gives 77 tokens, but the text tower takes 16",
    ),
    "more words": (
        lambda: Clip.wrap(siglip_model(), clip_words(), mean=0, std=1),
        ValueError,
        r"The tokenizer gives the id 49407, but SiglipModel has embeddings of 64 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


# --- any two encoders


class Foreign(nn.Module):
    """A ResNet and a BERT with projections, as in CXR-CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = torchvision.models.resnet18(num_classes=12)
        self.bert = transformers.BertModel._from_config(
            transformers.BertConfig.from_pretrained(bert()["hf_model_name"])
        )
        self.text_projection = nn.Linear(32, 12)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.resnet(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        output = self.bert(input_ids=tokens, attention_mask=(tokens != 0).long())
        return self.text_projection(output.last_hidden_state[:, 0])


def foreign(**settings: Any) -> Clip:
    model = drawn(Foreign()).train()
    words = transformers.AutoTokenizer.from_pretrained(bert()["hf_tokenizer_name"])
    given = {"layer": "resnet.layer4", "context_length": 16} | settings
    encoders = given.pop("encode_image", model.encode_image), given.pop("encode_text", model.encode_text)
    return Clip.from_encoders(model, *encoders, words, 96, 0.5, 0.25, **given)


WORKING = {"Saliency", "IntegratedGradients", "Rise", "KernelShap", "SubmodularRegions", "GradCam"}
WORKING |= {"RandomMap", "CenterMap", "PriorOnly"}


def test_every_shipped_method_on_two_encoders_works_or_refuses_by_name() -> None:
    clip = foreign()
    inputs = draw(clip)
    before = {name: value.clone() for name, value in clip.model.model.state_dict().items()}
    for name, method in shipped_methods().items():
        cheap = METHODS[name]
        if name not in WORKING:
            with pytest.raises(NotImplementedError, match=rf"^{name} reads the blocks of both towers.*Saliency"):
                method.attribute(clip, *inputs)
            with pytest.raises(NotImplementedError, match=f"^{name} reads"):
                method.attribute_phrases(clip, inputs[0][0], PHRASES)
            continue
        maps = cheap.attribute(clip, *inputs)
        assert tuple(maps.grid.shape) == (3, 3, 3)
        assert tuple(maps.image.shape) == (3, 96, 96)
        assert maps.image.any(), name
        assert not cheap.supports_text or maps.text.any(), name
        together = cheap.attribute(clip, inputs[0][:1].expand(3, -1, -1, -1), *inputs[1:])
        assert_close_maps(cheap.attribute_phrases(clip, inputs[0][0], PHRASES), together, 1e-4)
    after = clip.model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(part.training for part in clip.model.model.modules())
    assert not any(part._forward_hooks for part in clip.modules())


def test_methods_go_on_without_those_that_two_encoders_cannot_give() -> None:
    clip = foreign()
    draw(clip)
    image = np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)
    methods = {name: METHODS[name] for name in ("Matex", "Saliency", "RandomMap")}
    assert compare_methods(clip, methods, pair_batch(clip, image, PHRASES[0])).ndim == 3
    with pytest.raises(NotImplementedError, match=r"^Matex reads"):
        compare_methods(clip, {"Matex": methods["Matex"]}, pair_batch(clip, image, PHRASES[0]))


@pytest.mark.parametrize("variant", ["gradcam", "hires"])
def test_the_camera_on_a_named_layer_is_that_of_grad_cam(variant: str) -> None:
    clip = foreign()
    images, tokens, phrases = draw(clip)
    model = copy.deepcopy(clip.model.model).eval()
    kind = {"gradcam": pytorch_grad_cam.GradCAM, "hires": pytorch_grad_cam.HiResCAM}[variant]
    directions = nn.functional.normalize(model.encode_text(tokens), dim=1).detach()
    targets = [lambda output, row=row: nn.functional.normalize(output, dim=0) @ row for row in directions]
    camera = kind(model.resnet, [model.resnet.layer4])
    # It enlarges by OpenCV; at the size of the raster it leaves the maps as they are.
    camera.get_target_width_height = lambda _: (3, 3)
    expected = min_max(torch.from_numpy(np.asarray(camera(images, targets))))
    assert expected.any()
    torch.testing.assert_close(
        GradCam(variant=variant).attribute(clip, images, tokens, phrases).grid, expected, atol=1e-4, rtol=0
    )


def test_words_of_the_camera_are_read_at_a_named_layer_of_the_text_encoder() -> None:
    """The last block gives other words than the word embeddings, and the same image."""
    first, last = foreign(), foreign(text_layer="bert.encoder.layer.1")
    inputs = draw(first)
    maps, others = (GradCam().attribute(clip, *inputs) for clip in (first, last))
    torch.testing.assert_close(maps.image, others.image)
    assert others.text.any()
    assert not torch.allclose(maps.text, others.text)
    with pytest.raises(ValueError, match="Block 1 does not exist: the tower has 1 blocks"):
        GradCam([1]).attribute(first, *inputs)


def test_the_camera_reads_patches_behind_a_class_token() -> None:
    sizes = {"image_size": 96, "patch_size": 32, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    model = drawn(Foreign())
    model.resnet = drawn(torchvision.models.VisionTransformer(**sizes, num_classes=12))
    words = transformers.AutoTokenizer.from_pretrained(bert()["hf_tokenizer_name"])
    settings: dict[str, Any] = {"layer": "resnet.encoder.layers.encoder_layer_0.ln_1", "context_length": 16}
    functions = model.encode_image, model.encode_text
    clip = Clip.from_encoders(model, *functions, words, 96, 0.5, 0.25, grid=(3, 3), **settings)
    images, tokens, phrases = draw(clip)
    score = clip.similarity(images, tokens)
    seen: list[Tensor] = []
    with model.get_submodule(settings["layer"]).register_forward_hook(lambda *given: seen.append(given[2])):
        score = clip.similarity(images, tokens)
    gradient = torch.autograd.grad(score.sum(), seen[0])[0][:, 1:]
    expected = (gradient.mean(1, keepdim=True) * seen[0][:, 1:]).sum(2).relu()
    maps = GradCam().attribute(clip, images, tokens, phrases)
    torch.testing.assert_close(maps.grid.flatten(1), min_max(expected.detach()), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"gives \(1, 10, 16\), not \(B, C, h, w\), nor .* a square number of patches"):
        Clip.from_encoders(model, *functions, words, 96, 0.5, 0.25, **settings)


def test_two_encoders_that_are_modules_or_functions_give_equal_maps() -> None:
    clip = foreign()
    inputs, model = draw(clip), clip.model.model
    functions = model.resnet, lambda ids: model.encode_text(ids)
    settings: dict[str, Any] = {"grid": (3, 3), "context_length": 16}
    other = Clip.from_encoders(model, *functions, clip.tokenizer.tokenizer, (96, 96), [0.5] * 3, 0.25, **settings)
    other.mean_image.copy_(clip.mean_image)
    for name in ("Saliency", "KernelShap"):
        assert_close_maps(METHODS[name].attribute(other, *inputs), METHODS[name].attribute(clip, *inputs), 1e-6)
    assert other.grid == (3, 3)
    assert weight_hash(other) != weight_hash(Clip.wrap(small(), processor()))
    assert float(other.logit_scale.exp()) == pytest.approx(100)
    model.logit_scale = nn.Parameter(torch.tensor(3.0))
    assert other.logit_scale is model.logit_scale
    with pytest.raises(NotImplementedError, match="GradCam reads a layer of the image encoder, which is not named"):
        GradCam().attribute(other, *inputs)
    with pytest.raises(NotImplementedError, match="DualEncoder has no list of transformer blocks"):
        next(randomized(other))


def test_functions_without_a_graph_leave_the_methods_of_forwards() -> None:
    model = drawn(Foreign())
    clip = foreign(encode_image=torch.no_grad()(model.encode_image), layer=None, grid=(3, 3))
    inputs = draw(clip)
    assert METHODS["Rise"].attribute(clip, *inputs).image.any()
    with pytest.raises(NotImplementedError, match="Saliency reads gradients, but encode_image returns"):
        METHODS["Saliency"].attribute(clip, *inputs)
    clip = foreign(encode_text=lambda ids: nn.functional.one_hot(ids, 70).float().mean(1)[:, :12])
    draw(clip)
    with pytest.raises(NotImplementedError, match=r"looks the token ids up in no nn\.Embedding"):
        METHODS["IntegratedGradients"].attribute(clip, *inputs)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no raster": ({"layer": None}, "The raster of the maps is unknown. Give `layer`"),
    "two rasters": ({"grid": (2, 2)}, r"grid=\(2, 2\) is not the raster \(3, 3\) of layer='resnet.layer4'"),
    "no such layer": ({"layer": "resnet.layer5"}, r"layer='resnet.layer5' is no module of Foreign.*resnet\.layer"),
    "a layer without places": ({"layer": "resnet.fc"}, r"layer='resnet.fc' gives \(1, 12\), not \(B, C, h, w\)"),
    "a layer without a tensor": ({"layer": None, "text_layer": "bert.encoder"}, "gives BaseModelOutput"),
    "a layer of the other encoder": ({"layer": "bert"}, "layer='bert' runs 0 times in one forward"),
    "no words": ({"text_layer": "text_projection"}, r"text_layer='text_projection' gives \(1, 12\) for 16 tokens"),
    "no embeddings": (
        {"encode_image": lambda images: images},
        r"encode_image must give embeddings .*, got \(1, 3",
    ),
    "two widths": (
        {"encode_text": lambda ids: ids[:, :5].float()},
        "encode_image gives embeddings of 12 numbers, encode_text of 5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_encoders_are_refused(name: str) -> None:
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        foreign(**settings)


# --- one image


def test_one_call_explains_an_image_file_or_its_pixels(tmp_path: Path) -> None:
    clip = Clip.wrap(clip_model(), processor())
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    drawn_file = explain_pair(clip, tmp_path / "image.png", PHRASES[0])
    assert drawn_file.dtype == np.uint8
    assert drawn_file.ndim == 3
    for mode in ("longest", "squash"):
        batches = [pair_batch(clip, image, PHRASES[0], mode) for image in (tmp_path / "image.png", pixels)]
        assert torch.equal(batches[0]["image"], batches[1]["image"])
    maps = Matex.recommended().attribute(
        clip, *clip.inputs(batches[0]), batches[0]["phrase"], batches[0]["content_box"]
    )
    assert maps.image.any()
    with pytest.raises(ValueError, match="The phrase is empty"):
        explain_pair(clip, pixels, " ")
    with pytest.raises(ValueError, match=r"pixels must be \(h, w\) uint8"):
        explain_pair(clip, pixels / 255, PHRASES[0])
