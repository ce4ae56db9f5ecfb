"""Base class of attribution methods, and the checks of their inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, ClassVar

from matex_pl.anatomy.prior import check_content_boxes, have_size, whole_frame
from matex_pl.arguments import argument_names

# `matex target --help` names this class and must not import torch.
if TYPE_CHECKING:
    from torch import Tensor

    from matex_pl.clip.model import Clip
    from matex_pl.maps import Attribution


class AttributionMethod(ABC):
    """Base class of methods that explain the score of image-phrase pairs.

    Attributes:
        deterministic: Whether the same input gives the same map.
        supports_text: Whether `text` is a map of the method and not zeros.
        perturbs_inputs: Whether the method runs many forwards of each image, which `attribute_phrases` shares between
            phrases.
        cost: Work of one call in words, in forwards of both towers.
    """

    deterministic: ClassVar[bool] = True
    supports_text: ClassVar[bool] = True
    perturbs_inputs: ClassVar[bool] = False
    cost: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments by name, including arguments passed to a parent class through `**kwargs`.

        Raises:
            AttributeError: If the method does not keep an argument under its name.
        """
        return {name: getattr(self, name) for name in argument_names(type(self))}

    @abstractmethod
    def attribute(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of B image-phrase pairs.

        Args:
            clip: CLIP model; its state is restored after the call.
            images: `(B, 3, H, W)` images in the model's normalized frame.
            tokens: `(B, T)` tokens of the phrases, truncated to the context length.
            phrases: The B phrases in full; the spatial prior is parsed from them.
            content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the input frame; the whole frame
                by default.
            chest_box: `(B, 4)` rectangle around the lungs in the same frame, for `prior_frame="chest"`; NaN for an
                image without one.
        """

    def attribute_phrases(
        self,
        clip: Clip,
        image: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of one image and P phrases, equal to those of `attribute` for the P pairs.

        Args:
            clip: CLIP model; its state is restored after the call.
            image: `(3, H, W)` image in the model's normalized frame.
            phrases: The P phrases.
            content_box: `(4,)` rectangle of the image in the input frame; the whole frame by default.
            chest_box: `(4,)` rectangle around the lungs in the same frame; NaN for none.
        """
        tokens, *boxes = check_phrases(clip, image, phrases, content_box, chest_box)
        return self.attribute(clip, image.expand(len(phrases), -1, -1, -1), tokens, phrases, *boxes)

    def check_model(self, clip: Clip) -> None:
        """Check that the method has maps of a model, before any work: each tower encodes one input, without a backward.

        Args:
            clip: CLIP model; its state is restored after the call.

        Raises:
            NotImplementedError: The method does not support a tower; the message names the tower and the reason.
            ValueError: A setting of the method does not fit the model, such as a block that does not exist.
        """
        from matex_pl.attribution.core.capture import borrowed, check_embeddings, sample

        # Refuses image towers without a raster of patches, which no map fits.
        _ = clip.grid
        with borrowed(clip):
            check_embeddings(clip, *sample(clip))


def check_pairs(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    phrases: Sequence[str],
    content_box: Tensor | None,
    chest_box: Tensor | None = None,
) -> None:
    """Refuse invalid pairs before any work: wrong shapes and dtypes, NaN, boxes without a size."""
    import torch

    # Refuses image towers without a raster of patches, which no map fits.
    _ = clip.grid
    if isinstance(phrases, str):
        raise ValueError(f"phrases must be a list, got the text {phrases!r}. Put the text in brackets.")
    lengths = {"images": len(images), "tokens": len(tokens), "phrases": len(phrases)}
    lengths |= {
        name: len(box) for name, box in (("content_box", content_box), ("chest_box", chest_box)) if box is not None
    }
    if len(set(lengths.values())) > 1 or not len(images):
        raise ValueError(f"Inputs must have the same length, at least 1, got {lengths}. Give one of each per pair.")
    wanted = (len(images), 3, *clip.image_size)
    if tuple(images.shape) != wanted or images.dtype != clip.std.dtype:
        raise ValueError(
            f"images must be {wanted} {clip.std.dtype} in the model's normalized frame, got {tuple(images.shape)} "
            f"{images.dtype}. Convert the images with `clip.normalize`."
        )
    boxes = {name: box for name, box in (("content_box", content_box), ("chest_box", chest_box)) if box is not None}
    if chest_box is not None and tuple(chest_box.shape) == (len(phrases), 4):
        # A row of NaN stands for no lungs.
        boxes["chest_box"] = chest_box.where(~chest_box.isnan().all(1, keepdim=True), whole_frame(chest_box.device))
    finite = images.isfinite().flatten(1).all(1)
    is_shaped = all(tuple(box.shape) == (len(phrases), 4) for box in boxes.values())
    # One wait for the device, for all of these.
    if is_shaped and torch.stack([finite, *(have_size(box).to(finite.device) for box in boxes.values())]).all():
        return
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"The image of sample {index} ({phrases[index]!r}) holds NaN or Inf and cannot be explained. Remove the "
            "sample or repair the image."
        )
    for name, box in boxes.items():
        check_content_boxes(box, len(phrases), phrases, name)


def check_phrases(
    clip: Clip,
    image: Tensor,
    phrases: Sequence[str],
    content_box: Tensor | None,
    chest_box: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens of P phrases on one image, and the content and chest box of each, `(P, 4)`; refuses invalid input."""
    if isinstance(phrases, str) or not len(phrases):
        raise ValueError(f"phrases must be a list of at least one phrase, got {phrases!r}.")
    for name, box in (("content_box", content_box), ("chest_box", chest_box)):
        if image.ndim != 3 or (box is not None and tuple(box.shape) != (4,)):
            raise ValueError(
                f"`attribute_phrases` takes one image (3, H, W) and one {name} (4,), got {tuple(image.shape)}"
                + ("." if box is None else f" and {tuple(box.shape)}.")
            )
    tokens = clip.tokenize(phrases)
    first = [None if box is None else box[None] for box in (content_box, chest_box)]
    check_pairs(clip, image[None], tokens[:1], phrases[:1], *first)
    content_box, chest_box = (None if box is None else box.expand(len(phrases), 4) for box in (content_box, chest_box))
    return tokens, content_box, chest_box


def check_scores(score: Tensor, phrases: Sequence[str], *components: Tensor) -> None:
    """Refuse NaN and Inf in scores `(B,)` and components `(B, ...)`, which `min_max` would turn into zeros."""
    broken = ~reduce(and_, [part.isfinite().reshape(len(score), -1).all(1) for part in (score, *components)])
    if broken.any():
        index = int(broken.nonzero()[0])
        raise ValueError(
            f"The model gives NaN or Inf for sample {index} ({phrases[index]!r}), with the score "
            f"{float(score[index])}. The weights hold NaN or Inf, or overflow in float16. Load an earlier checkpoint, "
            "lower the learning rate, or explain in float32."
        )


def block_index(index: int, depth: int) -> int:
    """Index of a block from the front among `depth` blocks; a negative index below the first gives the first."""
    if index >= depth:
        raise ValueError(f"Block {index} does not exist: the tower has {depth} blocks, counted from 0. -1 is the last.")
    return index if index >= 0 else max(depth + index, 0)
