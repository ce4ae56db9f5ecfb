"""Settings of models and image processors: from transformers to open_clip, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.timm_model import TimmModel
from timm.models import vision_transformer as timm_vit
from torch import nn

from matex_pl.clip import towers
from matex_pl.clip.record import activation_name

CLEAN = "none"
"""Value of open_clip's setting `tokenizer_kwargs.clean` for a tokenizer that takes sentences as they are."""
# The three activations, with the other names that transformers has for them.
_QUICK, _EXACT, _TANH = "quick_gelu", "gelu", "gelu_pytorch_tanh"
_ACTIVATIONS = {_QUICK: _QUICK, _EXACT: _EXACT, "gelu_python": _EXACT}
_ACTIVATIONS |= dict.fromkeys((_TANH, "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), _TANH)
_TIMM_ACTIVATIONS = {_QUICK: "quick_gelu", _EXACT: "gelu", _TANH: "gelu_tanh"}
# Constants of the norms in open_clip and in timm's vision transformers.
_EPS, _TIMM_EPS = 1e-5, 1e-6
# The rule of transformers for a `CLIPModel` with this id: the text is read at the position of its largest id.
_LEGACY_EOS = 2
# Numbers of PIL.
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def model_settings(config: Any, source: str, context_length: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`model_cfg` of open_clip for a `CLIPConfig` or `SiglipConfig`, and the config of a timm trunk for the latter.

    Args:
        config: Config of transformers.
        source: Folder of the config, for errors.
        context_length: Number of tokens that a phrase is padded or cut to.

    Raises:
        ValueError: open_clip cannot express a setting; the message names it.
    """
    text, vision = config.text_config, config.vision_config
    is_siglip = config.model_type == "siglip"
    size, patch = (_square(vision, name, source) for name in ("image_size", "patch_size"))
    _refuse(source, "vision_config.num_channels", vision.num_channels, [3])
    acts = [_activation(tower, name, source) for tower, name in ((text, "text_config"), (vision, "vision_config"))]
    words: dict[str, Any] = {
        "context_length": context_length,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": _ratio(text),
        "tokenizer_kwargs": {"clean": CLEAN},
    }
    words |= _norm(text) | _approximation(acts[0])
    if is_siglip:
        width = getattr(text, "projection_size", None) or text.hidden_size
        _refuse(source, "text_config.projection_size", width, [vision.hidden_size])
        _refuse(source, "vision_config.vision_use_head", getattr(vision, "vision_use_head", True), [True])
        _refuse(source, "vision_config.layer_norm_eps", vision.layer_norm_eps, [_TIMM_EPS])
        trunk = {
            "img_size": size,
            "patch_size": patch,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            "act_layer": _TIMM_ACTIVATIONS[acts[1]],
        }
        words |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        model = {
            "embed_dim": vision.hidden_size,
            "init_logit_bias": -10,
            "custom_text": True,
            # Only the text tower reads it: the trunk has its own activation.
            "quick_gelu": acts[0] == _QUICK,
            "vision_cfg": {
                # Replaced by the folder of the trunk's config, wherever that is unpacked.
                "timm_model_name": "local-dir:timm",
                "timm_model_pretrained": False,
                "image_size": size,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": words,
        }
        return model, {"architecture": "vit_base_patch16_siglip_224", "model_args": trunk, "pretrained_cfg": {}}
    if (acts[0] == _QUICK) != (acts[1] == _QUICK):
        raise ValueError(
            f"{source} has text_config.hidden_act {text.hidden_act} and vision_config.hidden_act {vision.hidden_act}. "
            "open_clip has QuickGELU in both towers or in none. Give a model with one of the two."
        )
    if not isinstance(text.eos_token_id, int):
        raise ValueError(
            f"{source} has text_config.eos_token_id {text.eos_token_id}. A text is read at one id. Set it to the id of "
            "the token that ends a text."
        )
    is_legacy = text.eos_token_id == _LEGACY_EOS
    words |= {"pool_type": "argmax"} if is_legacy else {"pool_type": "eos", "eos_id": text.eos_token_id}
    image: dict[str, Any] = {
        "image_size": size,
        "patch_size": patch,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "layers": vision.num_hidden_layers,
        "mlp_ratio": _ratio(vision),
    }
    image |= _norm(vision) | _approximation(acts[1])
    model = {"embed_dim": config.projection_dim, "quick_gelu": acts[0] == _QUICK}
    return model | {"vision_cfg": image, "text_cfg": words}, None


def preprocess_settings(processor: Mapping[str, Any], size: int, source: str) -> tuple[dict[str, Any], str]:
    """`preprocess_cfg` of open_clip for the settings of an image processor, and its difference as text.

    Args:
        processor: Settings of the image processor.
        size: Side of the model's input in pixels.
        source: Folder of the settings, for errors.

    Raises:
        ValueError: The processor's images do not fit the model, or open_clip cannot express its resampling.
    """
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    mean, std = (
        (_three(processor["image_mean"]), _three(processor["image_std"]))
        if processor.get("do_normalize", True)
        else ([0.0] * 3, [1.0] * 3)
    )
    # The mean and the deviation belong to `scale` times the bytes, open_clip's to values in [0, 1].
    factor = 255 * scale
    if abs(factor - 1) > 1e-6:
        mean, std = [value / factor for value in mean], [value / factor for value in std]
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    frame = processor.get("size") or {}
    frame = {"shortest_edge": frame} if isinstance(frame, int) else frame
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    difference, mode = "", "squash"
    final = crop if crop else frame
    if "shortest_edge" in frame:
        mode = "shortest"
        final = crop or {"height": frame["shortest_edge"], "width": frame["shortest_edge"]}
        if crop and frame["shortest_edge"] != size:
            difference = (
                f"{source} resizes the shortest edge to {frame['shortest_edge']} pixels and crops {size}. open_clip's "
                f"resize_mode shortest resizes to {size} pixels and crops less"
            )
    elif "longest_edge" in frame:
        mode, final = "longest", {"height": frame["longest_edge"], "width": frame["longest_edge"]}
    elif crop and (frame.get("height"), frame.get("width")) != (crop["height"], crop["width"]):
        difference = f"{source} squashes images to {frame} and crops {crop}. open_clip's squash does not crop"
    if not processor.get("do_resize", True):
        final = crop or {"height": size, "width": size}
    if (final.get("height"), final.get("width")) != (size, size):
        raise ValueError(
            f"The image processor of {source} makes images of {final.get('height')} x {final.get('width')} pixels, and "
            f"config.json has an input of {size} x {size}. Set size and crop_size in preprocessor_config.json to "
            f"{size}."
        )
    resample = processor.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        raise ValueError(
            f"The image processor of {source} has resample {resample}. Supported numbers: 0 (nearest), 2 (bilinear) "
            "and 3 (bicubic)."
        )
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": _INTERPOLATIONS[resample],
        "resize_mode": mode,
        "fill_color": 0,
    }, difference


def _three(values: Any) -> list[float]:
    values = [values] * 3 if isinstance(values, (int, float)) else list(values)
    return [float(value) for value in (values * 3 if len(values) == 1 else values)]


def _square(tower: Any, name: str, source: str) -> int:
    value = getattr(tower, name)
    height, width = towers.height_width(value)
    if height != width:
        raise ValueError(f"{source} has vision_config.{name} {value}. transformers takes square images and patches.")
    return height


def _refuse(source: str, name: str, value: Any, supported: list[Any]) -> None:
    if value not in supported:
        raise ValueError(f"{source} has {name} {value}. open_clip can only express {supported[0]} here.")


def _activation(tower: Any, name: str, source: str) -> str:
    if tower.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"{source} has {name}.hidden_act {tower.hidden_act}. Supported activations: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[tower.hidden_act]


def _ratio(tower: Any) -> float:
    """Ratio that open_clip and timm turn into the width of the hidden layer, by `int(width * ratio)`."""
    ratio = tower.intermediate_size / tower.hidden_size
    is_exact = int(tower.hidden_size * ratio) == tower.intermediate_size
    return ratio if is_exact else (tower.intermediate_size + 0.5) / tower.hidden_size


def _norm(tower: Any) -> dict[str, Any]:
    return {} if tower.layer_norm_eps == _EPS else {"norm_kwargs": {"eps": tower.layer_norm_eps}}


def _approximation(act: str) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if act == _TANH else {}


# --- back: the settings of transformers for a model of open_clip


def transformers_settings(model: Any, ids: Mapping[str, int | None], largest: int) -> dict[str, Any]:
    """Settings of a `CLIPConfig`, or of a `SiglipConfig` for a timm trunk, that describe an open_clip model.

    Args:
        model: Model of open_clip.
        ids: Special tokens of its tokenizer: `bos_token_id`, `eos_token_id` and `pad_token_id`.
        largest: Largest id of the tokenizer.

    Raises:
        NotImplementedError: transformers has no such model; the message names the part.
    """
    visual, text = towers.original(model.visual), towers.text_tower(model)
    problems = _siglip_problems(model, visual, text) if isinstance(visual, TimmModel) else _clip_problems(model, text)
    height, width = towers.height_width(visual.image_size)
    if height != width:
        problems.append(f"an input of {height} x {width} pixels, which is not square")
    if problems:
        raise NotImplementedError(_not_expressed(problems[0]))
    words = {
        **_tower_settings(towers.text_blocks(model), text.ln_final, "text"),
        **ids,
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": text.token_embedding.embedding_dim,
        "max_position_embeddings": len(text.positional_embedding),
    }
    trunk = getattr(visual, "trunk", visual)
    patch = towers.height_width(trunk.patch_embed.patch_size if trunk is not visual else visual.patch_size)
    norm = trunk.norm if trunk is not visual else visual.ln_post
    image = {
        **_tower_settings(towers.image_blocks(visual), norm, "image"),
        "hidden_size": norm.normalized_shape[0],
        "image_size": height,
        "patch_size": patch[0],
    }
    if patch[0] != patch[1]:
        raise NotImplementedError(_not_expressed(f"patches of {patch[0]} x {patch[1]} pixels"))
    if trunk is not visual:
        return {"text_config": words | {"projection_size": image["hidden_size"]}, "vision_config": image}
    rule, end = getattr(text, "text_pool_type", None) or text.pool_type, ids["eos_token_id"]
    if rule == "argmax" and end != largest:
        words["eos_token_id"] = _LEGACY_EOS
    elif rule == "eos":
        words["eos_token_id"] = getattr(text, "text_eos_id", None) or text.eos_id
        if words["eos_token_id"] == _LEGACY_EOS:
            raise NotImplementedError(_not_expressed("a text read at the id 2, which transformers takes for a mark"))
    embed = model.visual.proj.shape[1]
    projected = {"projection_dim": embed}
    return {"text_config": words | projected, "vision_config": image | projected, **projected}


def processor_settings(preprocess: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Settings of a `CLIPImageProcessor` for a `preprocess_cfg`: sizes, mean, deviation and resampling."""
    frame = {"height": size, "width": size}
    is_squashed = preprocess.get("resize_mode") == "squash"
    numbers = {name: number for number, name in _INTERPOLATIONS.items()}
    return {
        "size": frame if is_squashed else {"shortest_edge": size},
        "do_center_crop": not is_squashed,
        "crop_size": frame,
        "resample": numbers.get(preprocess.get("interpolation", "bicubic"), 3),
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _not_expressed(part: str) -> str:
    return (
        f"The format transformers cannot express this model, because of {part}. It has CLIPModel and SiglipModel. "
        "Export with --format open_clip."
    )


def _clip_problems(model: Any, text: Any) -> list[str]:
    visual = towers.original(model.visual)
    problems = _common_problems(model, text)
    if isinstance(visual, nn.Module) and not hasattr(visual, "class_embedding"):
        return [*problems, f"the image tower {type(visual).__name__}"]
    if problems:
        return problems
    checks = {
        "an attention pool": visual.attn_pool is not None,
        f"the pooling {visual.pool_type!r} of the image": visual.pool_type != "tok",
        "no norm before the blocks of the image tower": not isinstance(visual.ln_pre, nn.LayerNorm),
        "no causal mask in the text tower": text.attn_mask is None,
        f"the pooling {_pooling(text)!r} of the text": _pooling(text) not in ("argmax", "eos"),
        "a text projection with bias, or none": not isinstance(text.text_projection, nn.Parameter),
        "no projection of the image": visual.proj is None,
        "a logit bias": getattr(model, "logit_bias", None) is not None,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def _siglip_problems(model: Any, visual: Any, text: Any) -> list[str]:
    problems = _common_problems(model, text)
    trunk = visual.trunk
    pool, name = getattr(trunk, "attn_pool", None), type(trunk).__name__
    if problems or type(trunk) is not timm_vit.VisionTransformer or pool is None:
        return problems or [f"the timm trunk {name} without SigLIP's attention pool"]
    first: Any = trunk.blocks[0]
    checks = {
        "an attention pool with several queries": pool.latent_len != 1 or pool.pool != "token",
        "a class token or register tokens": trunk.num_prefix_tokens != 0,
        "a projection behind the timm trunk": len(visual.head) > 0,
        "heads of the attention pool that differ from those of the blocks": (pool.num_heads != first.attn.num_heads),
        "a causal mask in the text tower": text.attn_mask is not None,
        f"the pooling {_pooling(text)!r} of the text": _pooling(text) != "last",
        "no bias in the text projection": getattr(text.text_projection, "bias", None) is None,
        "no logit bias": getattr(model, "logit_bias", None) is None,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def _common_problems(model: Any, text: Any) -> list[str]:
    if hasattr(model, "text_decoder"):
        return ["the text decoder of CoCa"]
    if isinstance(text, open_clip.hf_model.HFTextEncoder):
        return [f"the Hugging Face text tower {type(text.transformer).__name__}"]
    return ["a class token behind the text"] if getattr(text, "cls_emb", None) is not None else []


def _pooling(text: Any) -> str:
    return str(getattr(text, "text_pool_type", None) or text.pool_type)


def _tower_settings(blocks: list[Any], norm: Any, name: str) -> dict[str, Any]:
    """Settings that both towers have, from their blocks.

    Raises:
        NotImplementedError: The blocks have an activation or norms that transformers lacks.
    """
    mlp = blocks[0].mlp
    hidden, act = (mlp.c_fc, mlp.gelu) if hasattr(mlp, "c_fc") else (mlp.fc1, mlp.act)
    kind = {"QuickGELU": _QUICK, "GELU": _EXACT, "tanh GELU": _TANH}.get(activation_name(act))
    if kind is None:
        raise NotImplementedError(_not_expressed(f"the activation {type(act).__name__} in the {name} tower"))
    constants = {norm.eps} | {
        part.eps for block in blocks for part in block.modules() if isinstance(part, nn.LayerNorm)
    }
    if len(constants) > 1:
        raise NotImplementedError(_not_expressed(f"norms with the constants {sorted(constants)} in the {name} tower"))
    return {
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": hidden.out_features,
        "hidden_act": kind,
        "layer_norm_eps": constants.pop(),
    }
