"""Any two encoders as a model: two functions, and the layers whose activations are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

Reads = Literal["inputs", "gradients", "layer", "blocks"]
"""Parts of a model that a method reads: inputs and embeddings, gradients by the inputs, a layer, or all blocks."""

# CLIP's own bound, near which its models end.
_LOGIT_SCALE = math.log(100)


class DualEncoder(nn.Module):
    """Two functions as a model, with the members of open_clip's that two functions can have.

    One forward of a gray image and of a phrase finds the raster, the word embeddings, and whether gradients flow.

    Args:
        model: Module that holds the weights of both encoders.
        encode_image: Function from normalized images `(B, 3, H, W)` to embeddings `(B, D)`.
        encode_text: Function from token ids `(B, T)` to embeddings `(B, D)`.
        image_size: Height and width of the images in pixels.
        tokens: `(1, T)` token ids of any phrase.
        layer: Name in `model` of the layer of the image encoder that Grad-CAM reads. Its output is `(B, C, h, w)`, or
            `(B, n, C)` with the patches last.
        text_layer: Name in `model` of a layer of the text encoder with output `(B, T, C)`; the word embeddings by
            default.
        grid: Rows and columns of the map's raster; that of `layer` by default.

    Attributes:
        grid_size: Rows and columns of the map's raster.

    Raises:
        ValueError: A function does not give embeddings, a layer is missing or does not run once, or there is no raster.
    """

    def __init__(
        self,
        model: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        image_size: tuple[int, int],
        tokens: Tensor,
        layer: str | None = None,
        text_layer: str | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        # In a tuple: encoders that are modules are parts of the model already.
        self._encoders = encode_image, encode_text
        self.image_size = image_size
        self._layer = layer
        self._text_layer = text_layer
        self._logit_scale = torch.tensor(_LOGIT_SCALE)
        rasters: list[Tensor] = []
        words: list[Tensor] = []
        tables: list[str] = []
        weight = next((part for part in model.parameters() if part.ndim == 4), next(model.parameters()))
        images = torch.zeros(1, 3, *image_size, dtype=weight.dtype, device=weight.device, requires_grad=True)
        tokens = tokens.to(weight.device)
        with _eval_mode(model), torch.enable_grad(), ExitStack() as stack:
            for name, part in model.named_modules():
                if isinstance(part, nn.Embedding):
                    stack.enter_context(part.register_forward_hook(partial(_looked_up, tables, name, tokens)))
            with _recording(self.image_layer, rasters):
                image = _embedding("encode_image", encode_image, images)
            with _recording(self._named("text_layer", text_layer), words):
                text = _embedding("encode_text", encode_text, tokens)
        if image.shape != text.shape:
            raise ValueError(
                f"encode_image gives embeddings of {image.shape[1]} numbers, encode_text of {text.shape[1]}. Include "
                "the projections to the common space in both functions."
            )
        for argument, found, outputs in (("layer", layer, rasters), ("text_layer", text_layer, words)):
            if found is not None and len(outputs) != 1:
                raise ValueError(
                    f"{argument}={found!r} runs {len(outputs)} times in one forward of its encoder, and must run once. "
                    "Name another layer of `model`."
                )
        if words and (words[0].ndim != 3 or words[0].shape[1] > tokens.shape[1]):
            raise ValueError(
                f"text_layer={text_layer!r} gives {tuple(words[0].shape)} for {tokens.shape[1]} tokens, not (B, T, C). "
                "Name a layer whose output has one row per token."
            )
        self.grid_size = _raster(rasters[0] if rasters else None, layer, grid)
        self._table = tables[0] if tables else None
        self._without_graph = [
            name
            for name, embedding, is_known in (("encode_image", image, True), ("encode_text", text, bool(tables)))
            if is_known and not embedding.requires_grad
        ]

    @property
    def visual(self) -> DualEncoder:
        """The model itself, which has the image's size and raster."""
        return self

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor between cosines and logits: `model.logit_scale`, or log(100) without it."""
        own = getattr(self.model, "logit_scale", None)
        if isinstance(own, Tensor) and own.numel() == 1:
            return own
        return self._logit_scale.to(next(self.model.parameters()))

    @property
    def image_layer(self) -> nn.Module | None:
        """Named layer of the image encoder, if there is one."""
        return self._named("layer", self._layer)

    @property
    def text_layer(self) -> nn.Module:
        """Named layer of the text encoder, or the word embeddings."""
        return self._named("text_layer", self._text_layer) or self.token_embedding

    @property
    def token_embedding(self) -> nn.Module:
        """Word embeddings: the table that gets the token ids from `encode_text`."""
        assert self._table is not None
        return self.model.get_submodule(self._table)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image embeddings `(B, D)` of normalized images `(B, 3, H, W)`."""
        return self._encoders[0](images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings `(B, D)` of tokens `(B, T)`."""
        return self._encoders[1](tokens)

    def lacks(self, reads: Reads) -> str:
        """Part that a method reads and the functions do not show, as text with the way out; empty if all is there."""
        if reads == "inputs":
            return ""
        if reads == "blocks":
            return "the blocks of both towers, which two functions do not show"
        if self._without_graph:
            way = "Remove `torch.no_grad()` or `detach()` from the function"
            return f"gradients, but {self._without_graph[0]} returns embeddings without a graph. {way}"
        if reads == "layer" and self._layer is None:
            return "a layer of the image encoder, which is not named. Give `layer` to `Clip.from_encoders`"
        if self._table is None and (reads == "gradients" or self._text_layer is None):
            way = " Give `text_layer` to `Clip.from_encoders`" if reads == "layer" else " Look the ids up in one"
            return f"word embeddings, but encode_text looks the token ids up in no nn.Embedding of `model`.{way}"
        return ""

    def _named(self, argument: str, name: str | None) -> nn.Module | None:
        if name is None:
            return None
        parts = dict(self.model.named_modules())
        if name not in parts or not name:
            near = get_close_matches(name, parts, n=3, cutoff=0.3)
            raise ValueError(
                f"{argument}={name!r} is no module of {type(self.model).__name__}. Give a name of "
                f"`model.named_modules()`, such as {', '.join(near) or 'encoder.layer4'}."
            )
        return parts[name]


def _looked_up(tables: list[str], name: str, tokens: Tensor, module: nn.Module, args: Any, output: Tensor) -> Any:
    """Note a table that is given the token ids, and let gradients begin at its output."""
    ids = args[0] if args else None
    if ids is None or ids.ndim != 2 or not torch.equal(ids, tokens[:, : ids.shape[1]]):
        return None
    tables.append(name)
    return output.detach().requires_grad_()


@contextmanager
def _recording(layer: nn.Module | None, outputs: list[Tensor]) -> Iterator[None]:
    """Context that keeps the outputs of a layer: tensors, or the first of tuples of tensors."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise ValueError(
                f"A named layer must give a tensor, {type(module).__name__} gives {type(first).__name__}. Name a layer "
                "within it."
            )
        outputs.append(first)

    if layer is None:
        yield
        return
    with layer.register_forward_hook(keep):
        yield


def _embedding(name: str, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    found: Any = encode(inputs)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} must give embeddings (B, D), got {shape} for one sample. Return the pooled embedding."
        )
    return found


def _raster(output: Tensor | None, layer: str | None, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the map: those of the layer's output, or the given ones."""
    if output is None:
        if grid is None:
            raise ValueError(
                "The raster of the maps is unknown. Give `layer`, the last layer of the image encoder with a place, or "
                "`grid`, the rows and columns of the map."
            )
        return grid
    if output.ndim == 4:
        found = (output.shape[2], output.shape[3])
    else:
        side = isqrt(output.shape[1]) if output.ndim == 3 else 0
        # Tokens before the patches, such as a class token, are left out.
        found = grid or (side, side)
        if output.ndim != 3 or (grid is None and side**2 != output.shape[1]) or output.shape[1] < found[0] * found[1]:
            raise ValueError(
                f"layer={layer!r} gives {tuple(output.shape)}, not (B, C, h, w), nor (B, n, C) with a square number of "
                "patches. Name another layer, or give `grid`."
            )
    if grid not in (None, found):
        raise ValueError(f"grid={grid} is not the raster {found} of layer={layer!r}. Leave grid out.")
    return found


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode of a model, whose running statistics and random state stay as they are."""
    training = [part for part in model.modules() if part.training]
    with torch.random.fork_rng(devices=[]):
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True
