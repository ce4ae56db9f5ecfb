"""What an attribution method is: one class with plain-typed arguments and `attribute`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from matex_pl.clip import Clip
from matex_pl.maps import AttributionMaps


class AttributionMethod(ABC):
    """Explains the score of image-phrase pairs.

    Class attributes say what a caller has to know before calling:
        deterministic: The same input gives the same map.
        serves_text: `text` is a map of the method, not zeros.
        cost: Work of one call, in words, in forwards of both towers.
    """

    deterministic: ClassVar[bool] = True
    serves_text: ClassVar[bool] = True
    cost: ClassVar[str]

    @abstractmethod
    def attribute(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], film: Tensor | None = None
    ) -> AttributionMaps:
        """Maps of B pairs.

        Args:
            clip: The model; it is given back as it came.
            images: `(B, 3, H, W)` in the model's normalised frame.
            tokens: `(B, T)` of the phrases, cut to the context length.
            phrases: The B phrases in full; the spatial prior is read from them.
            film: `(B, 4)` rectangle of the film, `x0, y0, x1, y1` in [0, 1] of the input frame; all of it by default.
        """

    def attribute_phrases(
        self, clip: Clip, image: Tensor, phrases: Sequence[str], film: Tensor | None = None
    ) -> AttributionMaps:
        """Maps of one image and P phrases: what `attribute` gives for P pairs.

        Args:
            clip: The model; it is given back as it came.
            image: `(3, H, W)` in the model's normalised frame.
            phrases: The P phrases.
            film: `(4,)` rectangle of the film in the input frame; all of it by default.
        """
        images = image.expand(len(phrases), -1, -1, -1)
        film = None if film is None else film.expand(len(phrases), -1)
        return self.attribute(clip, images, clip.tokenize(phrases), phrases, film)


def check_pairs(images: Tensor, tokens: Tensor, phrases: Sequence[str], film: Tensor | None) -> None:
    """Refuse what cannot be explained before any work is done.

    Raises:
        ValueError: Lengths differ, or an image holds NaN or Inf; the message names the sample.
    """
    lengths = {"images": len(images), "tokens": len(tokens), "phrases": len(phrases)}
    if film is not None:
        lengths["film"] = len(film)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A pair needs one of each, got {lengths}.")
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"The image of sample {index} ({phrases[index]!r}) holds NaN or Inf; nothing can be explained from it."
        )


def check_scores(score: Tensor, phrases: Sequence[str], *components: Tensor) -> None:
    """Refuse to draw maps from what is no number: the norm of a NaN would be a map of zeros.

    Args:
        score: `(B,)` score of each pair.
        phrases: The B phrases.
        components: `(B, ...)` whatever the map is made of.

    Raises:
        ValueError: One of them is NaN or Inf, which broken weights make of finite images; the message names the sample.
    """
    broken = ~torch.stack([part.isfinite().reshape(len(score), -1).all(1) for part in (score, *components)]).all(0)
    if broken.any():
        index = int(broken.nonzero()[0])
        raise ValueError(
            f"Sample {index} ({phrases[index]!r}) gets NaN or Inf from the model (its score is {float(score[index])}): "
            "the weights hold NaN or Inf, or overflow in float16. Load an earlier checkpoint, lower the learning rate, "
            "or explain in float32."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value of an argument that is not among its choices, listing them.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
