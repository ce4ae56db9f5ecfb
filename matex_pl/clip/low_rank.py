"""Low-rank adapters in the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
# The weight that an adapter updates, in a linear layer and in torch's attention.
_UPDATED = ("weight", "in_proj_weight")


def merge_adapters(state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by their plain names, with the updates added to their layers: W + alpha / r * B A (Hu et al., 2022).

    Args:
        state: Weights of a model with adapters, by the names of PEFT.
        lora: Settings of the adapters, with `r` and `alpha`.

    Raises:
        ValueError: An adapter has no second matrix or no layer.
    """
    merged = dict(state)
    for name in [name for name in state if name.endswith(_DOWN)]:
        layer = name.removesuffix(_DOWN)
        bases = [key for part in _UPDATED if (key := f"{layer}.base_layer.{part}") in merged]
        if not bases or layer + _UP not in merged:
            raise ValueError(f"the adapter {name} has no second matrix or no layer")
        down, up, base = merged.pop(name), merged.pop(layer + _UP), merged[bases[0]]
        update = up.float() @ down.float() * (float(lora["alpha"]) / int(lora["r"]))
        merged[bases[0]] = (base.to(update) + update).to(base.dtype)
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}
