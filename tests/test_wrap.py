"""Models in memory: transformers' and open_clip's own, with adapters, and any two encoders."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import open_clip
import pytest
import torch
import transformers
from families import CLIP_TEXT, NATIVE, folder, redraw, unigram
from open_clip.tokenizer import SimpleTokenizer
from peft import LoraConfig, get_peft_model
from test_methods import METHODS, assert_close_maps
from torch import Tensor, nn

from matex_pl.attribution import GradCam, LeGrad, Matex
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.adapters import TransformersClip
from matex_pl.metrics.sanity import randomized, stages

PHRASES = ["Left lower lobe consolidation.", "effusion", "Small nodule of the right upper lung and a mass!"]
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]


def draw(clip: Clip) -> tuple[Tensor, Tensor, list[str]]:
    images = torch.rand(len(PHRASES), 3, *clip.image_size, generator=torch.Generator().manual_seed(3))
    clip.mean_image.copy_(torch.linspace(0.2, 0.6, clip.mean_image.numel()).view_as(clip.mean_image))
    return clip.normalize(images), clip.tokenize(PHRASES), PHRASES


# --- models of transformers, and the same weights in open_clip's form


@cache
def clip_words() -> Any:
    """transformers' CLIP tokenizer with the vocabulary of open_clip's."""
    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): index for piece, index in own.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks))


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
