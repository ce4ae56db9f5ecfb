"""Low-rank adaptation (LoRA) of a model's linear and attention layers, by PEFT."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from matex_pl.arguments import check_positive
from matex_pl.clip.model import Clip
from matex_pl.clip.weights import first_line
from matex_pl.training.freeze import PROJECTIONS

log = logging.getLogger(__name__)

SIDES = ("image", "text")


@dataclass
class Lora:
    """Low-rank updates of a model (Hu et al., 2022): W becomes W + alpha / r * B A, and only A and B are trained.

    Args:
        r: Rank of the updates, the number of rows of A and of columns of B.
        alpha: Factor of the updates before the division by `r`.
        dropout: Probability of dropout on the inputs of A. Attention of open_clip's own towers accepts only 0.
        targets: Names of the updated layers, whole or from a dot to the end (`attn`, `mlp.c_fc`). By default all linear
            and attention layers that the towers call, except the projections to the embedding.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        check_positive(**{"lora.r": self.r, "lora.alpha": self.alpha})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}.")
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"lora.targets must be a list of names of layers, got {self.targets!r}.")


def add_lora(clip: Clip, lora: Lora, sides: Collection[str] = SIDES, whole: Collection[str] = ()) -> set[str]:
    """Add adapters to a model, and freeze all other parameters; the updates begin at zero.

    Args:
        clip: CLIP model.
        lora: Settings of the adapters.
        sides: Towers that get adapters, of `image` and `text`.
        whole: Names of parameters of the model that are trained as they are.

    Returns:
        The towers that have adapters now.

    Raises:
        ImportError: PEFT cannot be imported.
        ValueError: A target matches no layer, no layer can be adapted, or the dropout meets torch's own attention.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        # A release of peft that does not fit transformers fails here too.
        raise ImportError(
            f"LoRA needs peft, whose import failed ({first_line(error)}). Install peft with: pip install -U "
            "'matex_pl[lora]'."
        ) from error
    layers = {name: layer for name, layer in adaptable_layers(clip).items() if _side(name) in sides}
    names = _chosen(layers, lora.targets)
    attention = [name for name in names if isinstance(layers[name], nn.MultiheadAttention)]
    if lora.dropout and attention:
        raise ValueError(
            f"lora.dropout is {lora.dropout}, but {attention[0]} is an attention of torch. Its weights are updated as "
            "a whole, without inputs to drop. Set lora.dropout to 0, or give lora.targets without the attention."
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        # A list would also match the ends of longer names, as those of the other tower.
        target_modules="|".join(map(re.escape, names)),
    )
    if attention:
        from matex_pl.training.lora_attention import LoraAttention

        config._register_custom_module({nn.MultiheadAttention: LoraAttention})
    inject_adapter_in_model(config, clip.model)
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name in whole)
    _report(clip, lora, names, sides)
    return {_side(name) for name in names}


def adaptable_layers(clip: Clip) -> dict[str, nn.Module]:
    """Layers that can be adapted, by their names in the model: linear layers, and torch's attention with one width.

    One forward of one sample finds the layers that a tower calls. Some towers read the weights of a layer instead
    (ResNets in their pool, BEiT in its queries), or never reach the layer (CoCa's decoder). An adapter there would
    change nothing. The projections to the embedding are left out: open_clip tests the type of one.
    """
    called: dict[str, nn.Module] = {}
    hooks = []
    for name, layer in clip.model.named_modules():
        one_width = isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim
        if (isinstance(layer, nn.Linear) or one_width) and not f"{name}.".startswith(PROJECTIONS):
            hooks.append(layer.register_forward_hook(lambda layer, *_, name=name: called.update({name: layer})))
    try:
        with torch.no_grad():
            clip.encode_image(torch.zeros(1, 3, *clip.image_size).to(clip.std))
            clip.encode_text(clip.tokenize(["Chest radiograph."]))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: called[name] for name, _ in clip.model.named_modules() if name in called}


def _chosen(layers: dict[str, nn.Module], targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that the targets match; all without targets."""
    kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in layers)
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds.items()) or "none"
    if not layers:
        raise ValueError(
            "LoRA finds no layer to adapt: the trained towers call no linear layer and no attention of torch. Leave "
            "lora out, or choose another freeze."
        )
    if targets is None:
        return list(layers)
    chosen = {target: [name for name in layers if name == target or name.endswith(f".{target}")] for target in targets}
    unmatched = [target for target, names in chosen.items() if not names]
    if unmatched:
        raise ValueError(
            f"lora.targets: {', '.join(map(repr, unmatched))} matches no layer that can be adapted. Layers of this "
            f"model, with their number: {listed}. Give such a name, or its end from a dot on."
        )
    return [name for name in layers if any(name in names for names in chosen.values())]


def _side(name: str) -> str:
    return "image" if name.startswith("visual.") else "text"


def _report(clip: Clip, lora: Lora, names: Sequence[str], sides: Collection[str]) -> None:
    counts = Counter(map(_side, names))
    sizes = [(value.numel(), value.requires_grad) for value in clip.model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    parts = ", ".join(f"{counts[side]} in the {side} tower" for side in SIDES)
    log.info(
        f"LoRA of rank {lora.r}: {len(names)} adapted layers, {parts}. {trained:,} of {total:,} parameters "
        f"({trained / total:.2%}) are trained."
    )
    for side in SIDES:
        if lora.targets is None and side in sides and not counts[side]:
            tower = clip.model.visual if side == "image" else getattr(clip.model, "text", clip.model)
            rank_zero_warn(
                f"LoRA finds no layer to adapt in the {side} tower {type(tower).__name__}, which stays as it is."
            )
