"""Gradient checkpointing: a training that recomputes the activations of blocks in the backward pass."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel

from matex_pl.clip.towers import original, text_tower

# Flags of the modules of open_clip and timm, and of transformers.
_FLAGS = ("grad_checkpointing", "gradient_checkpointing")


def checkpoint_gradients(model: Any, sides: Collection[str] = ("image", "text")) -> None:
    """Switch on gradient checkpointing (Chen et al., 2016) in towers of a model.

    Losses and gradients do not change. A tower keeps the inputs of its blocks instead of all activations, and computes
    each block a second time in the backward pass.

    Args:
        model: CLIP model.
        sides: Towers, of `image` and `text`.

    Raises:
        NotImplementedError: A tower has no gradient checkpointing; the message names the tower.
    """
    for side in ("image", "text"):
        if side not in sides:
            continue
        tower = original(model.visual) if side == "image" else text_tower(model)
        # open_clip's plain CLIP is its own text tower, and its method would switch on both.
        part = tower.transformer if tower is original(model) else tower
        try:
            _switch_on(part)
            reason = "none of its modules does"
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not any(getattr(module, flag, False) is True for module in part.modules() for flag in _FLAGS):
            kind = type(getattr(tower, "trunk", tower)).__name__
            raise NotImplementedError(
                f"grad_checkpointing: the {side} tower {kind} cannot recompute its activations ({reason}). Leave "
                f"grad_checkpointing out, or freeze this tower with freeze: {side}."
            )


def _switch_on(part: Any) -> None:
    if isinstance(part, TimmModel):
        # open_clip's wrapper turns an error into a warning.
        part.trunk.set_grad_checkpointing(True)
    elif isinstance(part, HFTextEncoder):
        transformer: Any = part.transformer
        # Version 5 of transformers renamed the method. Reentrant checkpoints give no gradients to adapters behind
        # frozen embeddings.
        switch = getattr(transformer, "activation_checkpointing_enable", transformer.gradient_checkpointing_enable)
        switch({"use_reentrant": False})
    elif hasattr(part, "set_grad_checkpointing"):
        part.set_grad_checkpointing(True)
    elif hasattr(part, "grad_checkpointing"):
        part.grad_checkpointing = True
