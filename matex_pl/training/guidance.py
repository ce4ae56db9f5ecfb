"""Guidance: a loss on the image map of a training step, by boxes, by named regions or by the anatomy of the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from matex_pl.arguments import check_choice
from matex_pl.attribution.core.capture import FollowedBlock, borrowed, count_blocks, follow_attention, sample
from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling, image_blocks, original
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextBatch
from matex_pl.maps import moved
from matex_pl.training.distributed import process_count
from matex_pl.training.guidance_loss import LOSSES, GuidanceLoss, share_inside
from matex_pl.training.guidance_map import guided_map, kept_patches, margin_directions
from matex_pl.training.guidance_targets import anatomy_share, box_share, named_regions, region_boxes

TARGETS = ("boxes", "regions", "anatomy")
_MISSING = {"boxes": "none has boxes (guidance.boxes)", "regions": "no phrase names a place (guidance.regions)"}
COMPILED = (
    "guidance reads the attention of a training step, which torch.compile hides. Train without torch.compile, or leave "
    "guidance out."
)


@dataclass
class Guidance:
    """A loss that draws the image map of each pair into a target (Rao et al., 2023), added to the contrastive loss.

    The map is the gradient part of MATEX in the last blocks, of the pair's margin over the other phrases of the batch.
    A pair without a target adds nothing.

    Args:
        weight: Weight of the guidance; the contrastive loss has 1.
        boxes: Weight of pairs with boxes, whose target is the boxes.
        regions: Weight of pairs without boxes, whose target is the regions that the phrase names.
        anatomy: Weight of pairs with masks of both lungs, whose target is lungs and heart.
        loss: `energy`, `-log` of the density of the map inside over the sum of its densities inside and outside; `l1`,
            the distance of the map, divided by its maximum, from the target; or `outside`, the squared share of the
            map outside the target.
        blocks: Number of last image blocks whose map is guided.
        second_order: Whether the gradient in the map is trained as well. If not, it is a constant weight, and a step
            takes less time.
        warmup_steps: Steps over which the weight rises linearly from 0.
    """

    weight: float = 1.0
    boxes: float = 1.0
    regions: float = 0.0
    anatomy: float = 0.0
    loss: GuidanceLoss = "energy"
    blocks: int = 1
    second_order: bool = True
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_choice("guidance.loss", self.loss, tuple(LOSSES))
        weights = {"weight": self.weight, **{name: getattr(self, name) for name in TARGETS}}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"guidance.{name} must be a finite number of at least 0, got {value}.")
        if not self.weight or not any(getattr(self, name) for name in TARGETS):
            raise ValueError(
                "guidance has no weight: weight, or all of boxes, regions and anatomy are 0. Leave guidance out to "
                "train without it."
            )
        if self.blocks < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"guidance.blocks must be at least 1 and guidance.warmup_steps not negative, got {self.blocks} and "
                f"{self.warmup_steps}."
            )


class Followed(NamedTuple):
    """Record of the forward of a training step.

    Attributes:
        blocks: The guided blocks.
        kept: `(B, k)` places of the patches that patch dropout kept, in the order of the tokens; empty without it.
    """

    blocks: list[FollowedBlock]
    kept: list[Tensor]

    def kept_pooling(self, pooling: Pooling) -> Pooling:
        """Pooling whose map has the kept patches."""
        return replace(pooling, length=self.kept[0].shape[1]) if self.kept else pooling

    def kept_targets(self, target: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
        """Targets `(B, N)` at the kept patches, and the samples `(B,)` bool with a part of their target there."""
        if self.kept:
            target = target.gather(1, self.kept[0].to(target.device))
        return target, has & target.any(1)


class Guide:
    """The guidance of one model.

    Args:
        settings: Settings of the guidance.
        clip: CLIP model, whose trained parameters are decided.

    Raises:
        NotImplementedError: The image tower has no attention, or the model is compiled or recomputes activations.
        ValueError: A guided block does not exist or is frozen.
    """

    def __init__(self, settings: Guidance, clip: Clip) -> None:
        self.settings, self.clip = settings, clip
        visual = original(clip.model.visual)
        if any(map(_is_compiled, (clip, clip.model, *clip.model.visual.modules()))):
            raise NotImplementedError(COMPILED)
        with borrowed(clip):
            self.depth = count_blocks(clip, *sample(clip))[0]
        if settings.blocks > self.depth:
            raise ValueError(f"guidance.blocks is {settings.blocks}, but the image tower has {self.depth} blocks.")
        # A tower that pools one token is differentiated by the output of each block's attention, any other by its
        # values: the second derivative then passes the attention of the first guided block too.
        self.first = self.depth - settings.blocks
        reads_values = clip.image_pooling(sample(clip)[0]).position is None
        self.twice_from = (self.first if reads_values else self.first + 1) if settings.second_order else self.depth
        blocks = image_blocks(clip.model.visual)
        recomputes = any(getattr(module, "grad_checkpointing", False) is True for module in visual.modules())
        if recomputes and self.twice_from < len(blocks):
            raise NotImplementedError(
                f"guidance of {settings.blocks} blocks needs the second derivative of their attention, which "
                "grad_checkpointing cannot compute again. Set guidance.second_order to false, or grad_checkpointing."
            )
        # The last attention of some towers is their pool, with names in timm and open_clip.
        pool = getattr(getattr(visual, "trunk", visual), "attn_pool", None) or getattr(visual, "attnpool", visual)
        blocks += [pool] * (self.depth - len(blocks))
        trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
        frozen = [place for place in range(self.first, self.depth) if not trained[place]]
        if frozen:
            raise ValueError(
                f"guidance.blocks is {settings.blocks}, but block {frozen[0]} of the image tower is frozen. Train "
                "the image tower (freeze: none or text, or lora with adapters in it), or leave guidance out."
            )

    @contextmanager
    def following(self) -> Iterator[Followed]:
        """Record the guided blocks of the image tower, and the patches that it keeps, in the forward of a step."""
        with (
            follow_attention(self.first, self.depth, twice_from=self.twice_from) as blocks,
            kept_patches(self.clip) as kept,
        ):
            yield Followed(blocks, kept)

    def __call__(
        self, batch: ImageTextBatch, followed: Followed, image: Tensor, text: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Guidance loss of a training step, a scalar, and the scalars to log, of all processes.

        Every process calls this at every step. With several processes, their mean is the loss of the whole batch. It is
        computed in float32 or better, outside of autocast.

        Args:
            batch: The batch in the model's frame.
            followed: Record of the forward.
            image: `(B, D)` unit embeddings of the images, on the graph.
            text: `(B, D)` unit embeddings of the phrases.
            step: Number of steps before this one.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self._loss(batch, followed, image, text, step)

    def _loss(
        self, batch: ImageTextBatch, followed: Followed, image: Tensor, text: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, processes = self.settings, process_count()
        targets = {
            name: followed.kept_targets(target.flatten(1), has) for name, (target, has) in self._targets(batch).items()
        }
        counts = torch.stack([has.sum() for _, has in targets.values()]).to(image.device, torch.float32)
        # Phrases of all processes, before any process leaves this function.
        direction = margin_directions(text, batch["phrase"])
        if processes > 1:
            dist.all_reduce(counts)
        pooling = followed.kept_pooling(self.clip.image_pooling(batch["image"]))
        heat = guided_map(followed.blocks, image, direction, pooling, second_order=settings.second_order)
        total = heat.sum() * 0
        scalars: dict[str, Tensor] = {}
        for (name, (target, has)), count in zip(targets.items(), counts, strict=True):
            losses = LOSSES[settings.loss](heat, target).masked_fill(~has, 0)
            total = total + getattr(settings, name) * losses.sum() * processes / count.clamp(min=1)
            if name == "boxes":
                # NaN in a step without boxes.
                scalars["energy_in_box"] = (share_inside(heat.detach(), target) * has).sum() * processes / count
        guided = torch.stack([has for _, has in targets.values()]).any(0)
        scalars |= {"guidance_loss": total.detach(), "guided_share": guided.float().mean()}
        if processes > 1:
            values = torch.stack([value.float() for value in scalars.values()])
            dist.all_reduce(values)
            scalars = dict(zip(scalars, (values / processes).unbind(), strict=True))
        warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return settings.weight * warmup * total, scalars

    def _targets(self, batch: ImageTextBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Target `(B, Gh, Gw)` and presence `(B,)` bool, by the kind of the target."""
        settings, grid, device = self.settings, self.clip.grid, batch["image"].device
        boxed = moved(torch.tensor([len(boxes) > 0 for boxes in batch["boxes"]]), device)
        found = {}
        if settings.boxes:
            found["boxes"] = box_share(batch["boxes"], grid, device), boxed
        if settings.regions:
            named = region_boxes(batch["phrase"], batch["content_box"])
            has = moved(torch.tensor([len(boxes) > 0 for boxes in named]), device)
            found["regions"] = box_share(named, grid, device), has & ~boxed
        if settings.anatomy:
            found["anatomy"] = anatomy_share(batch["masks"], len(boxed), grid, device)
        return found


def check_targets(settings: Guidance, data: ChestXrayDataModule) -> None:
    """Raise ValueError if no training pair has a target, or `anatomy` has a weight and no training image has masks."""
    pairs = data.pairs["train"]
    if settings.anatomy:
        if not any(map(data.has_masks, pairs)):
            raise ValueError(
                "guidance.anatomy needs masks of lungs, and no training image has masks. Set data.anatomy to a CSV "
                "file of CheXmask or to torchxrayvision, or set guidance.anatomy to 0."
            )
        return
    if settings.boxes and any(pair.boxes for pair in pairs):
        return
    if settings.regions and any(named_regions(pair.phrase) for pair in pairs):
        return
    missing = [reason for name, reason in _MISSING.items() if getattr(settings, name)]
    raise ValueError(
        f"guidance has no target among the {len(pairs)} training pairs: {' and '.join(missing)}. Give such pairs, set "
        "the weight of another target (guidance.boxes, regions or anatomy), or leave guidance out."
    )


def _is_compiled(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def guidance_of(value: Guidance | Mapping[str, Any] | None) -> Guidance | None:
    """Settings of a guidance, also from the plain types of a checkpoint."""
    return Guidance(**value) if isinstance(value, Mapping) else value
