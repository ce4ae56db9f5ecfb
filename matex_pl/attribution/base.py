"""What an attribution method is: one class with plain-typed arguments and `attribute`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from inspect import Parameter, signature
from operator import and_
from typing import TYPE_CHECKING, Any, ClassVar

from matex_pl.anatomy.prior import check_content_boxes

# `matex target --help` names this class, and answers without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from matex_pl.clip.model import Clip
    from matex_pl.maps import Attribution


class AttributionMethod(ABC):
    """Explains the score of image-phrase pairs.

    Class attributes say what a caller has to know before calling:
        deterministic: The same input gives the same map.
        supports_text: `text` is a map of the method, not zeros.
        perturbs_inputs: The work is many forwards of each image, which `attribute_phrases` does once for all phrases.
        cost: Work of one call, in words, in forwards of both towers.
    """

    deterministic: ClassVar[bool] = True
    supports_text: ClassVar[bool] = True
    perturbs_inputs: ClassVar[bool] = False
    cost: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor by name, with those that `**kwargs` hands to a parent's.

        Raises:
            AttributeError: The method does not keep one of them under its name.
        """
        names: list[str] = []
        for kind in type(self).__mro__:
            parameters = signature(kind).parameters.values()
            names += [part.name for part in parameters if part.kind is not Parameter.VAR_KEYWORD]
            # Only `**kwargs` hands arguments on to the next class.
            if all(part.kind is not Parameter.VAR_KEYWORD for part in parameters):
                break
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def attribute(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], content_box: Tensor | None = None
    ) -> Attribution:
        """Maps of B pairs.

        Args:
            clip: The model; it is given back as it came.
            images: `(B, 3, H, W)` in the model's normalized frame.
            tokens: `(B, T)` of the phrases, cut to the context length.
            phrases: The B phrases in full; the spatial prior is read from them.
            content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the input frame; all of it by
                default.
        """

    def attribute_phrases(
        self, clip: Clip, image: Tensor, phrases: Sequence[str], content_box: Tensor | None = None
    ) -> Attribution:
        """Maps of one image and P phrases: what `attribute` gives for P pairs.

        Args:
            clip: The model; it is given back as it came.
            image: `(3, H, W)` in the model's normalized frame.
            phrases: The P phrases.
            content_box: `(4,)` rectangle of the image in the input frame; all of it by default.
        """
        tokens, content_box = check_phrases(clip, image, phrases, content_box)
        return self.attribute(clip, image.expand(len(phrases), -1, -1, -1), tokens, phrases, content_box)


def check_pairs(clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> None:
    """Refuse what cannot be explained before any work is done: other shapes and dtypes, NaN, images of no size."""
    if isinstance(phrases, str):
        raise ValueError(f"phrases must be a list, got the text {phrases!r}. Put it in brackets.")
    lengths = {"images": len(images), "tokens": len(tokens), "phrases": len(phrases)}
    if content_box is not None:
        lengths["content_box"] = len(content_box)
    if len(set(lengths.values())) > 1 or not len(images):
        raise ValueError(f"A pair needs one of each, got {lengths}.")
    wanted = (len(images), 3, *clip.image_size)
    if tuple(images.shape) != wanted or images.dtype != clip.std.dtype:
        raise ValueError(
            f"images must be {wanted} {clip.std.dtype} in the model's normalized frame, got {tuple(images.shape)} "
            f"{images.dtype}. `clip.normalize` gives them."
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"The image of sample {index} ({phrases[index]!r}) holds NaN or Inf; nothing can be explained from it."
        )
    if content_box is not None:
        check_content_boxes(content_box, len(phrases), phrases)


def check_phrases(
    clip: Clip, image: Tensor, phrases: Sequence[str], content_box: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens of P phrases on one image, and its content box for each, `(P, 4)`; refuses what `check_pairs` would."""
    if isinstance(phrases, str) or not len(phrases):
        raise ValueError(f"phrases must be a list of at least one phrase, got {phrases!r}.")
    if image.ndim != 3 or (content_box is not None and tuple(content_box.shape) != (4,)):
        raise ValueError(
            f"attribute_phrases takes one image (3, H, W) and one content_box (4,), got {tuple(image.shape)}"
            + ("." if content_box is None else f" and {tuple(content_box.shape)}.")
        )
    tokens = clip.tokenize(phrases)
    check_pairs(clip, image[None], tokens[:1], phrases[:1], None if content_box is None else content_box[None])
    return tokens, None if content_box is None else content_box.expand(len(phrases), 4)


def check_scores(score: Tensor, phrases: Sequence[str], *components: Tensor) -> None:
    """Refuse NaN and Inf in scores `(B,)` and in components `(B, ...)` of maps: `min_max` would make zeros of them."""
    broken = ~reduce(and_, [part.isfinite().reshape(len(score), -1).all(1) for part in (score, *components)])
    if broken.any():
        index = int(broken.nonzero()[0])
        raise ValueError(
            f"Sample {index} ({phrases[index]!r}) gets NaN or Inf from the model (its score is {float(score[index])}): "
            "the weights hold NaN or Inf, or overflow in float16. Load an earlier checkpoint, lower the learning rate, "
            "or explain in float32."
        )


def block_index(index: int, depth: int) -> int:
    """A block's place from the front among `depth` blocks; a negative index reaches at most to the first."""
    if index >= depth:
        raise ValueError(f"The tower has {depth} blocks, counted from 0; there is no block {index}. -1 is the last.")
    return index if index >= 0 else max(depth + index, 0)
