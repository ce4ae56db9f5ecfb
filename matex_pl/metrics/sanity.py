"""Sanity checks for saliency maps (Adebayo et al. 2018): the model with its parameters randomized, stage by stage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.model import Clip

# Parts of towers that run before their first block, as open_clip, timm and Hugging Face name them.
_BEFORE = {
    "class_embedding",
    "cls_emb",
    "cls_token",
    "conv1",
    "embeddings",
    "ln_pre",
    "norm_pre",
    "patch_embed",
    "pos_embed",
    "positional_embedding",
    "reg_token",
    "token_embedding",
}
_STEM = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}


def randomized(clip: Clip, seed: int = 0) -> Iterator[tuple[str, Clip]]:
    """Copies of the model with ever more of its parameters randomized, from the output to the input.

    First what lies behind the last block of both towers (`head`: projections, final norms, pools), then block by block
    from the last, both towers together (`block -1`, `block -2`, ...), at last what lies before the first
    (`embeddings`). Each stage keeps the earlier ones. The blocks of a ResNet are its four layers.

    Randomized is a parameter whose entries are shuffled, by a generator of its own from the seed and its name. This
    keeps their distribution, so that no tower saturates, and forgets none: `reset_parameters` of modules misses
    parameters that belong to none that has it, a fifth of CLIP's. What stays: parameters whose entries are all equal,
    the logit scale and bias, which no map depends on, and buffers.

    Args:
        clip: The model; it is not touched, nor is the global random state.
        seed: Random seed of the shuffling.

    Yields:
        Name of the stage, and the copy, which is made of the one before; it shares the tokenizer.
    """
    for stage, names in stages(clip).items():
        # Some callers are in inference mode, whose tensors take no part in gradients.
        with torch.inference_mode(False), torch.no_grad():
            clip = copy.deepcopy(clip, {id(part): part for part in (clip.tokenizer, clip._rows)})
            for name in names:
                weight = clip.get_parameter(name)
                weight.copy_(_shuffle(weight, f"{seed}/{name.replace('_orig_mod.', '')}"))
        yield stage, clip


def stages(clip: Clip) -> dict[str, list[str]]:
    """Names of the stages in the order of `randomized`, and of the parameters of `clip` that each adds."""
    model = clip.model
    image, text = _image_blocks(model), towers.text_blocks(model)
    depth = max(len(image), len(text))
    stage = {}
    for blocks in (image, text):
        for index, block in enumerate(blocks):
            stage.update({id(weight): f"block {index - len(blocks)}" for weight in block.parameters()})
    result: dict[str, list[str]] = {name: [] for name in ["head", *(f"block {-n - 1}" for n in range(depth))]}
    result["embeddings"] = []
    for name, weight in clip.named_parameters():
        if name.split(".")[-1] not in ("logit_scale", "logit_bias"):
            result[stage.get(id(weight)) or ("embeddings" if _is_before(model, name) else "head")].append(name)
    return result


def _image_blocks(model: Any) -> list[nn.Module]:
    tower = towers.original(towers.original(model).visual)
    if isinstance(tower, ModifiedResNet):
        return [tower.layer1, tower.layer2, tower.layer3, tower.layer4]
    return towers.image_blocks(tower)


def _is_before(model: Any, name: str) -> bool:
    """Whether a parameter, which is in no block, belongs to what runs before them."""
    path = set(name.split("."))
    if "visual" in path and isinstance(towers.original(towers.original(model).visual), ModifiedResNet):
        return bool(path & _STEM) and "attnpool" not in path
    return bool(path & _BEFORE) and "text_decoder" not in path


def _shuffle(weight: Tensor, key: str) -> Tensor:
    """The entries of a parameter in another order; the same only where they are all equal."""
    flat = weight.flatten()
    digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(digest))
    moved = flat[order.to(flat.device)]
    # Of few entries, one in a few orders is the one they have.
    return (flat.roll(1) if torch.equal(moved, flat) else moved).view_as(weight)
