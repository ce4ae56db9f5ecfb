"""PEFT's adapter of torch's attention, without changes of the base weights. Importing this file needs PEFT."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer
from torch import Tensor, nn
from torch.func import functional_call


class LoraAttention(layer.MultiheadAttention):
    """Low-rank updates of the input and output projections of `nn.MultiheadAttention`.

    PEFT's own layer adds the update to the weights before each forward and subtracts it afterwards. The weights drift
    by rounding, and each listing of the modules replaces the parameters.
    """

    state_dict = nn.Module.state_dict
    named_modules = nn.Module.named_modules

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention of the base layer with the updated weights; arguments and result are those of the base layer."""
        attention: Any = self.base_layer
        [name] = self.active_adapters
        weight, out = attention.in_proj_weight, attention.out_proj
        updated = {
            "in_proj_weight": weight + self.get_delta_weight(name).to(weight.dtype),
            "out_proj.base_layer.weight": out.weight + out.get_delta_weight(name).to(weight.dtype),
        }
        return functional_call(attention, updated, (query, *args), kwargs)
