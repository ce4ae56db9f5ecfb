"""Names of weights in models of transformers and of open_clip: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.weights import key_misfit

_QKV = tuple(f"self_attn.{part}_proj.{{}}" for part in "qkv")
# Parts of a block: a name of open_clip or timm, and the names of transformers. The braces are `weight` and `bias`.
_BLOCK = {
    "ln_1.{}": ("layer_norm1.{}",),
    "attn.in_proj_{}": _QKV,
    "attn.out_proj.{}": ("self_attn.out_proj.{}",),
    "ln_2.{}": ("layer_norm2.{}",),
    "mlp.c_fc.{}": ("mlp.fc1.{}",),
    "mlp.c_proj.{}": ("mlp.fc2.{}",),
}
_TIMM_BLOCK = {
    "norm1.{}": ("layer_norm1.{}",),
    "attn.qkv.{}": _QKV,
    "attn.proj.{}": ("self_attn.out_proj.{}",),
    "norm2.{}": ("layer_norm2.{}",),
    "mlp.fc1.{}": ("mlp.fc1.{}",),
    "mlp.fc2.{}": ("mlp.fc2.{}",),
}
_KINDS = ("weight", "bias")
POSITIONS = "vision_model.embeddings.position_embedding.weight"
"""Positions of the patches in models of transformers."""


@dataclass(frozen=True)
class Row:
    """One row of the table: weights of both libraries that hold the same numbers, joined along their first axis.

    Args:
        ours: Names in open_clip.
        theirs: Names in transformers.
        form: How transformers stores the numbers of open_clip: `same`, `transposed`, `flat` (without the first axis) or
            `one` (a scalar as one element).
        shares: Relative lengths of `ours` along the first axis. The weights of `theirs` have equal lengths.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: str = "same"
    shares: tuple[int, ...] = (1,)


def _both(ours: str, *theirs: str) -> Iterator[Row]:
    """Rows of weight and bias."""
    return (Row((ours.format(kind),), tuple(name.format(kind) for name in theirs)) for kind in _KINDS)


def rows(model: Any) -> list[Row]:
    """The table for a model of open_clip: `SiglipModel` for a timm trunk, `CLIPModel` for all others."""
    is_siglip, text = hasattr(model.visual, "trunk"), "text." if hasattr(model, "text") else ""
    table = [
        Row((f"{text}token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",)),
        Row((f"{text}positional_embedding",), ("text_model.embeddings.position_embedding.weight",)),
        *_both(f"{text}ln_final.{{}}", "text_model.final_layer_norm.{}"),
        *_blocks(f"{text}transformer.resblocks", "text_model", _BLOCK, len(towers.text_blocks(model))),
    ]
    image = len(towers.image_blocks(model.visual))
    if is_siglip:
        trunk, head = "visual.trunk.", "vision_model.head."
        pool = f"{trunk}attn_pool."
        table += [
            *_both(f"{text}text_projection.{{}}", "text_model.head.{}"),
            Row((f"{trunk}pos_embed",), (POSITIONS,), "flat"),
            *_both(f"{trunk}patch_embed.proj.{{}}", "vision_model.embeddings.patch_embedding.{}"),
            *_blocks(f"{trunk}blocks", "vision_model", _TIMM_BLOCK, image),
            *_both(f"{trunk}norm.{{}}", "vision_model.post_layernorm.{}"),
            Row((f"{pool}latent",), (f"{head}probe",)),
            *(
                Row((f"{pool}q.{kind}", f"{pool}kv.{kind}"), (f"{head}attention.in_proj_{kind}",), shares=(1, 2))
                for kind in _KINDS
            ),
            *_both(f"{pool}proj.{{}}", f"{head}attention.out_proj.{{}}"),
            *_both(f"{pool}norm.{{}}", f"{head}layernorm.{{}}"),
            *_both(f"{pool}mlp.fc1.{{}}", f"{head}mlp.fc1.{{}}"),
            *_both(f"{pool}mlp.fc2.{{}}", f"{head}mlp.fc2.{{}}"),
            Row(("logit_scale",), ("logit_scale",), "one"),
            Row(("logit_bias",), ("logit_bias",), "one"),
        ]
        return table
    return [
        *table,
        Row((f"{text}text_projection",), ("text_projection.weight",), "transposed"),
        Row(("visual.class_embedding",), ("vision_model.embeddings.class_embedding",)),
        Row(("visual.positional_embedding",), (POSITIONS,)),
        Row(("visual.conv1.weight",), ("vision_model.embeddings.patch_embedding.weight",)),
        # transformers spells the name so.
        *_both("visual.ln_pre.{}", "vision_model.pre_layrnorm.{}"),
        *_blocks("visual.transformer.resblocks", "vision_model", _BLOCK, image),
        *_both("visual.ln_post.{}", "vision_model.post_layernorm.{}"),
        Row(("visual.proj",), ("visual_projection.weight",), "transposed"),
        Row(("logit_scale",), ("logit_scale",)),
    ]


def _blocks(ours: str, tower: str, block: Mapping[str, tuple[str, ...]], layers: int) -> Iterator[Row]:
    for layer in range(layers):
        for name, theirs in block.items():
            names = (f"{tower}.encoder.layers.{layer}.{part}" for part in theirs)
            yield from _both(f"{ours}.{layer}.{name}", *names)


def are_transformers(names: Mapping[str, Any]) -> bool:
    """Whether weights have the names of a `CLIPModel` or `SiglipModel`, or of one of their towers."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in names)


def to_transformers(model: Any) -> dict[str, Tensor]:
    """Weights of an open_clip model by the names of transformers.

    Raises:
        KeyError: The model lacks a weight of the table.
    """
    state: dict[str, Tensor] = {}
    own = model.state_dict()
    for row in rows(model):
        joined = _joined([own[name] for name in row.ours])
        if row.form == "one":
            joined = joined.reshape(1)
        elif row.form != "same":
            joined = joined.T if row.form == "transposed" else joined[0]
        state |= _split(joined, row.theirs, (1,) * len(row.theirs))
    return state


def to_open_clip(
    state: Mapping[str, Tensor], model: Any, source: str, *, other_size: bool = False
) -> dict[str, Tensor]:
    """Weights of transformers by the names of an open_clip model.

    Args:
        state: Weights of a `CLIPModel` or `SiglipModel` by their names.
        model: Model that the weights are for.
        source: File or folder of the weights, for errors.
        other_size: Whether the input of the model has another size than that of the weights.

    Raises:
        ValueError: Weights are missing, extra or of another shape; the message names them.
    """
    # A buffer that older versions of transformers saved.
    state = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    for tower, other in (("vision", "text"), ("text", "vision")):
        if not any(name.startswith(f"{tower}_model.") for name in state):
            raise ValueError(
                f"{source} holds half a model: weights of the {other} tower, and none of the {tower} tower "
                f"({tower}_model.*). Give the weights of a whole CLIPModel or SiglipModel."
            )
    try:
        expected = to_transformers(model)
    except KeyError as error:
        raise ValueError(
            f"{source} holds weights of transformers, and the model has another architecture: it lacks {error}. Give "
            "the folder of the weights as the model."
        ) from error
    if other_size and POSITIONS in state:
        expected[POSITIONS] = state[POSITIONS]
    problem = key_misfit(expected, state)
    if problem:
        raise ValueError(f"{source} does not fit its model: {problem}. Give the folder that the weights belong to.")
    found: dict[str, Tensor] = {}
    for row in rows(model):
        joined = _joined([state[name] for name in row.theirs])
        if row.form == "one":
            joined = joined.reshape(())
        elif row.form != "same":
            joined = joined.T if row.form == "transposed" else joined[None]
        found |= _split(joined, row.ours, row.shares)
    return found


def without_row(model: nn.Module) -> list[str]:
    """Names of the model's weights that the table lacks: transformers has no place for them."""
    known = {name for row in rows(model) for name in row.ours}
    return [name for name in model.state_dict() if name not in known]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _split(joined: Tensor, names: tuple[str, ...], shares: tuple[int, ...]) -> dict[str, Tensor]:
    if len(names) == 1:
        return {names[0]: joined}
    one = len(joined) // sum(shares)
    return dict(zip(names, joined.split([one * share for share in shares]), strict=True))
