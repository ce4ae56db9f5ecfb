"""Grad-CAM and HiResCAM on the tokens of a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import block_index
from matex_pl.attribution.core.relevance import gradients_of
from matex_pl.attribution.core.stream import Stream, output_of
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.clip.towers import original
from matex_pl.maps import full_precision, min_max


class GradCam(TwoTowerMethod):
    """Grad-CAM (Selvaraju et al. 2017) and HiResCAM (Draelos and Carin 2020) on the tokens of a block.

    With the tokens a at the block's first norm and g = dS/da, the map of a layer is

    - `gradcam`: `max(0, sum over channels of (mean over tokens of g) * a)`
    - `hires`: `max(0, sum over channels of g * a)`

    Each layer is min-maxed before several are averaged. In a ResNet, or in a block without a first norm, a is the input
    of the attention pool or of the block. For two functions (`Clip.from_encoders`) a is the output of the named layer.

    The argument `at` selects the published form of `gradcam`:

    - `norm`: a is the output of the norm, and the mean is over the patches without the class token, or over the content
      tokens of the phrase. Users of the package `grad-cam` name this norm as the target layer of a CLIP.
    - `input`: a is the input of the norm, and the mean is over all tokens with the class token, as in the released code
      of Grad-ECLIP (Zhao et al. 2024).

    Released code: the package `grad-cam` clips, min-maxes and averages layers as here, but enlarges each of them first.
    Its example for CLIP explains a softmax over labels. Neither package supports text.

    Args:
        layers: Blocks, by index from 0 or from the end; the last by default. A negative index below the first block
            gives the first.
        variant: `gradcam` or `hires`.
        at: Place of the tokens: `norm`, the output of the block's first norm, or `input`, its input. `hires` needs
            `norm`: at the input `<g, a>` is 0, because the score does not change with the length of a patch's token.
        kwargs: `target` and `references` of `TwoTowerMethod`.

    Raises:
        ValueError: If `layers` is empty, or `hires` is combined with `input`.
    """

    reads: ClassVar[Reads] = "layer"
    cost: ClassVar[str] = "1 forward and a backward to the first of the layers"

    def __init__(
        self,
        layers: list[int] | None = None,
        variant: Literal["gradcam", "hires"] = "gradcam",
        at: Literal["norm", "input"] = "norm",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choices(GradCam.__init__, locals())
        if layers is not None and not layers:
            raise ValueError("layers must name at least one block, got []. Leave layers out to use the last block.")
        if (variant, at) == ("hires", "input"):
            raise ValueError("variant='hires' is 0 at the input of the norm. Use at='norm', or variant='gradcam'.")
        self.layers = [-1] if layers is None else list(layers)
        self.variant = variant
        self.at = at

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the tokens of the layers."""
        if tower.layer is not None:
            return self._trace_layer(tower, tower.layer)
        stream = Stream(tower.blocks or [original(tower.clip.model.visual).attnpool])
        # Refuses a tower of unknown pooling before its forward.
        _ = tower.pooling
        places = sorted({block_index(layer, len(stream.blocks)) for layer in self.layers})
        with stream.capture(cut=places[:1]):
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            handles = [stream.before[place] for place in places]
            if self.at == "norm":
                handles = [stream.normed.get(place, before) for place, before in zip(places, handles, strict=True)]
            return self._relevance_of(tower, embedding, handles, direction)

        return Trace(embedding, relevance_for)

    def _trace_layer(self, tower: Tower, layer: nn.Module) -> Trace:
        """Run one forward of an encoder with a single named layer, recording its output."""
        for index in self.layers:
            block_index(index, 1)
        with output_of(layer) as outputs:
            embedding = tower.encode()
        return Trace(embedding, lambda direction: self._relevance_of(tower, embedding, outputs, direction))

    def _relevance_of(self, tower: Tower, embedding: Tensor, handles: Sequence[Tensor], direction: Tensor) -> Relevance:
        """Mean of the maps of the layers whose tokens are `handles`."""
        keep = tower.keep.expand(len(direction), -1)
        gradients = gradients_of(embedding, handles, direction)
        maps = [self._layer(tower, *pair, keep) for pair in zip(handles, gradients, strict=True)]
        return Relevance(torch.stack(maps).mean(0))

    def _layer(self, tower: Tower, tokens: Tensor, gradient: Tensor, keep: Tensor) -> Tensor:
        # The input of a ResNet's pool is `(B, C, Gh, Gw)`.
        is_raster = tokens.ndim == 4
        at_map = (lambda raster: raster.flatten(2).transpose(1, 2)) if is_raster else tower.tokens_of
        everywhere = full_precision(gradient)
        tokens, gradient = full_precision(at_map(tokens.detach())), at_map(everywhere)
        if self.variant == "gradcam":
            # The scale of the mean is that of the whole map, which is min-maxed.
            counted = everywhere if self.at == "input" and not is_raster else keep[..., None] * gradient
            gradient = counted.sum(1, keepdim=True)
        return min_max((gradient * tokens).sum(-1).relu(), keep=keep, dtype=tower.clip.std.dtype)
