"""Frozen parts of a model."""

from __future__ import annotations

from typing import Literal

from torch import nn

Freeze = Literal["none", "text", "image", "all-but-projections", "all-but-head"]
PROJECTIONS = ("visual.proj", "visual.head.", "text_projection", "text.text_projection", "text.proj")
_FINAL_NORMS = ("visual.ln_post.", "visual.trunk.norm.", "visual.trunk.fc_norm.", "ln_final.", "text.ln_final.")


def freeze_parameters(model: nn.Module, freeze: Freeze) -> None:
    """Switch off the gradients of the frozen parts; see `freeze` of `ClipModule`.

    Raises:
        ValueError: `freeze` is `all-but-projections` or `all-but-head`, and the model has no known projection.
    """
    projections = 0
    for name, parameter in model.named_parameters():
        is_image, is_projection = name.startswith("visual."), name.startswith(PROJECTIONS)
        is_frozen = {
            "none": False,
            "image": is_image,
            "text": not is_image,
            "all-but-projections": not is_projection,
            "all-but-head": not (is_projection or name.startswith(_FINAL_NORMS)),
        }[freeze]
        projections += is_projection
        parameter.requires_grad_(parameter.requires_grad and (not is_frozen or name.startswith("logit_")))
    if freeze.startswith("all-but") and not projections:
        raise ValueError(f"{type(model).__name__} has no projection by a known name. Freeze 'text' or 'image' instead.")
