"""Grad-CAM and HiResCAM on the tokens of a transformer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.relevance import gradients_of
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.towers import original
from matex_pl.maps import full_precision, min_max


class GradCam(TwoTowerMethod):
    """Grad-CAM (Selvaraju et al. 2017) and HiResCAM (Draelos and Carin 2020) on the tokens that enter a block.

    With g = dS/da, the map of a layer is

    - `gradcam`: `max(0, sum over channels of (mean over tokens of g) * a)`, where a is the input of the block's norm
    - `hires`: `max(0, sum over channels of g * a)`, where a is the output of that norm

    At the input of the norm `<g, a>` is 0 by Euler's theorem, because the score does not change with the length of a
    patch's last token. Tokens are the patches, or the content tokens of the phrase. Each layer is min-maxed before
    several are averaged. In a ResNet a is the map that enters the attention pool.

    Released code: the package `grad-cam` clips, min-maxes and averages layers as here, but enlarges each of them first.
    Its example for CLIP uses the output of the norm and explains a softmax over labels. Neither package supports text.

    Args:
        layers: Blocks, by index from 0 or from the end; the last by default. A negative index below the first block
            gives the first.
        variant: `gradcam` or `hires`.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    cost: ClassVar[str] = "1 forward and a backward to the first of the layers"

    def __init__(
        self,
        layers: list[int] | None = None,
        variant: Literal["gradcam", "hires"] = "gradcam",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(GradCam.__init__, locals())
        if layers is not None and not layers:
            raise ValueError("layers must name at least one block, got []. Leave layers out to use the last block.")
        self.layers = [-1] if layers is None else list(layers)
        self.variant = variant

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the tokens that enter the layers."""
        stream = Stream(tower.blocks or [original(tower.clip.model.visual).attnpool])
        places = sorted({block_index(layer, len(stream.blocks)) for layer in self.layers})
        with stream.capture(cut=places[:1]):
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            handles = [stream.before[place] for place in places]
            if self.variant == "hires":
                handles = [stream.normed.get(place, before) for place, before in zip(places, handles, strict=True)]
            keep = tower.keep.expand(len(direction), -1)
            gradients = gradients_of(embedding, handles, direction)
            maps = [self._layer(tower, *pair, keep) for pair in zip(handles, gradients, strict=True)]
            return Relevance(torch.stack(maps).mean(0))

        return Trace(embedding, relevance_for)

    def _layer(self, tower: Tower, tokens: Tensor, gradient: Tensor, keep: Tensor) -> Tensor:
        # The input of a ResNet's pool is `(B, C, Gh, Gw)`.
        at_map = tower.tokens_of if tokens.ndim == 3 else lambda grid: grid.flatten(2).transpose(1, 2)
        tokens, gradient = full_precision(at_map(tokens.detach())), full_precision(at_map(gradient))
        if self.variant == "gradcam":
            kept = keep[..., None] * gradient
            gradient = kept.sum(1, keepdim=True) / keep.sum(1).clamp(min=1)[:, None, None]
        return min_max((gradient * tokens).sum(-1).relu(), keep=keep, dtype=tower.clip.std.dtype)
