"""Low-rank updates of a CLIP model, by peft."""

from __future__ import annotations

from torch import nn


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a model but for its logit scale and low-rank updates of its linear layers, which it gets (Hu et al. 2022).

    Layers inside of torch's own attention, which multiplies with their weights itself, stay as they are.

    Args:
        model: A CLIP model; it is changed.
        rank: Of the updates.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("training.trained='lora' needs peft: pip install 'matex_pl[lora]'.") from error
    inside = [name for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)]
    targets = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and not any(name.startswith(f"{attention}.") for attention in inside)
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("logit_"))
