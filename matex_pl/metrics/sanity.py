"""Sanity checks for saliency maps (Adebayo et al. 2018): models with parameters randomized stage by stage."""

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

# Names in open_clip, timm and Hugging Face of the parts of towers before their first block.
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
    "pre_layrnorm",
    "reg_token",
    "token_embedding",
}
_STEM = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}


def randomized(clip: Clip, seed: int = 0) -> Iterator[tuple[str, Clip]]:
    """Copies of the model with more and more randomized parameters, from the output to the input.

    The stages are, in this order:

    - `head`: the parts after the last block of both towers (projections, final norms, pools)
    - `block -1`, `block -2`, ...: one block of both towers at a time, from the last
    - `embeddings`: the parts before the first block

    Each stage includes the earlier ones. The blocks of a ResNet are its four layers.

    A parameter is randomized by shuffling its entries, with a generator seeded by the seed and the parameter's name.
    Shuffling keeps the distribution of the entries, so no tower saturates. It also reaches every parameter, while
    `reset_parameters` of modules would miss a fifth of CLIP's. Unchanged are

    - parameters whose entries are all equal
    - the logit scale and bias, on which no map depends
    - buffers

    Args:
        clip: CLIP model; neither the model nor the global random state changes.
        seed: Random seed of the shuffling.

    Yields:
        Name of the stage, and a copy made from the previous one; all copies share the tokenizer.
    """
    for stage, names in stages(clip).items():
        # Some callers are in inference mode, whose tensors allow no gradients.
        with torch.inference_mode(False), torch.no_grad():
            clip = copy.deepcopy(clip, {id(part): part for part in (clip.tokenizer, clip._rows)})
            for name in names:
                weight = clip.get_parameter(name)
                weight.copy_(_shuffle(weight, f"{seed}/{name.replace('_orig_mod.', '')}"))
        yield stage, clip


def stages(clip: Clip) -> dict[str, list[str]]:
    """Names of the stages in the order of `randomized`, with the names of the parameters that each stage adds."""
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
    """Whether a parameter outside the blocks belongs to a part before them."""
    path = set(name.split("."))
    if "visual" in path and isinstance(towers.original(towers.original(model).visual), ModifiedResNet):
        return bool(path & _STEM) and "attnpool" not in path
    return bool(path & _BEFORE) and "text_decoder" not in path


def _shuffle(weight: Tensor, key: str) -> Tensor:
    """Entries of a parameter in another order; unchanged only if all are equal."""
    flat = weight.flatten()
    digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(digest))
    moved = flat[order.to(flat.device)]
    # With few entries a random order is often the original one.
    return (flat.roll(1) if torch.equal(moved, flat) else moved).view_as(weight)
