"""Control maps that do not depend on the model: baselines for every method."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase, prior_maps
from matex_pl.anatomy.prior import Laterality, PriorFrame, PriorShape, frame_boxes
from matex_pl.arguments import check_choices
from matex_pl.attribution.base import AttributionMethod, check_pairs, check_scores
from matex_pl.attribution.core.capture import borrowed, check_embeddings
from matex_pl.clip.model import Clip
from matex_pl.clip.words import tokenized
from matex_pl.maps import Attribution, full_precision, min_max, moved, patch_mean, token_map, upsample


class Control(AttributionMethod):
    """Base class of maps that use the model for the score alone.

    Attributes:
        prior_frame: `chest` if `_draw` gets the rectangle around the lungs as its `content_box`.
    """

    prior_frame: PriorFrame = "image"
    supports_text: ClassVar[bool] = False
    cost: ClassVar[str] = "1 forward, for the score"

    def attribute(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of B pairs; see `AttributionMethod.attribute`."""
        check_pairs(clip, images, tokens, phrases, content_box, chest_box)
        with borrowed(clip):
            check_embeddings(clip, images, tokens)
            embeddings = full_precision(clip.encode_image(images)), full_precision(clip.encode_text(tokens))
            return self.draw(clip, images, tokens, phrases, content_box, embeddings, chest_box)

    def draw(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None,
        embeddings: tuple[Tensor, Tensor],
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of B pairs without a forward, from their unit embeddings `(B, D)`; see `AttributionMethod.attribute`."""
        with borrowed(clip):
            score = (embeddings[0] * embeddings[1]).sum(-1)
            check_scores(score, phrases)
            image = self._draw(clip, images, phrases, frame_boxes(self.prior_frame, content_box, chest_box))
            content = clip.content(tokens)
            text = torch.zeros(tokens.shape, device=tokens.device)
            if self.supports_text:
                text = token_map(self._draw_words(clip, images, tokens, phrases), content)
            grid, found = patch_mean(image, clip.grid), tokenized(clip.tokenizer, tokens, content, phrases)
            return Attribution(image, grid, text, content, score, {"embeddings": embeddings}, found)

    @abstractmethod
    def _draw(self, clip: Clip, images: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> Tensor:
        """Image maps `(B, H, W)` in [0, 1]."""

    def _draw_words(self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str]) -> Tensor:
        """Relevance of the tokens `(B, T)`, with `supports_text`."""
        raise NotImplementedError


class RandomMap(Control):
    """Noise: a uniform number per patch, enlarged like any map, and one per content token.

    The noise of a pair depends on the seed, the gray levels of the image and the phrase only: not on the device and the
    precision.

    Args:
        seed: Random seed of the noise.
        blur: Standard deviation, in patches and in tokens, of the Gaussian that smooths the noise over neighbors; 0 for
            none. Smoothed noise has neighbors as similar as those in the maps of methods.
    """

    supports_text: ClassVar[bool] = True

    def __init__(self, seed: int = 0, blur: float = 0.0) -> None:
        if not 0 <= blur < torch.inf:
            raise ValueError(f"blur must be a finite number of at least 0, got {blur}.")
        self.seed = seed
        self.blur = blur

    def _draw(self, clip: Clip, images: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> Tensor:
        grid = self._noise(clip, "image", images, phrases, clip.grid)
        return min_max(upsample(min_max(grid), clip.image_size))

    def _draw_words(self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str]) -> Tensor:
        return self._noise(clip, "phrase", images, phrases, tokens.shape[1:])

    def _noise(self, clip: Clip, side: str, images: Tensor, phrases: Sequence[str], shape: Sequence[int]) -> Tensor:
        """Noise `(B, *shape)` in [0, 1)."""
        pixels = 255 * (images.detach().float() * clip.std.float() + clip.mean.float())
        drawn = []
        for image, phrase in zip(pixels.round().clamp(0, 255).byte().cpu(), phrases, strict=True):
            key = hashlib.blake2b(f"{self.seed} {side} {phrase}".encode(), digest_size=7)
            key.update(image.numpy().tobytes())
            generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "big"))
            drawn.append(torch.rand(*shape, generator=generator))
        return moved(_blurred(torch.stack(drawn), self.blur), images.device)


def _blurred(noise: Tensor, sigma: float) -> Tensor:
    """Noise `(B, ...)` smoothed along each axis by a Gaussian, truncated at three sigma and at the edges."""
    if not sigma:
        return noise
    for axis in range(1, noise.ndim):
        place = torch.arange(noise.shape[axis], dtype=noise.dtype)
        distance = (place[:, None] - place[None]).abs()
        weight = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= 3 * sigma)
        noise = torch.tensordot(noise, weight / weight.sum(1, keepdim=True), dims=([axis], [1])).movedim(-1, axis)
    return noise


class CenterMap(Control):
    """Distance to the center of the frame as a map: 1 at the center, falling linearly to 0 in the corners."""

    def _draw(self, clip: Clip, images: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> Tensor:
        device, (height, width) = images.device, clip.image_size
        y = torch.linspace(-1, 1, height, device=device)[:, None]
        x = torch.linspace(-1, 1, width, device=device)[None]
        return min_max(-torch.hypot(x, y)[None]).expand(len(phrases), -1, -1)


class PriorOnly(Control):
    """Spatial prior of the phrase alone (M of eq. 5, min-maxed); zeros if the phrase names no place.

    The control shows how much of a map the words alone give away.

    Args:
        prior_shape: `parabola`, `gaussian` or `plateau`.
        laterality: `patient` or `paper`.
        knowledge_prior: Whether a finding without a named place gets its usual one.
        prior_frame: `image` (the rectangle of the image, as printed) or `chest` (the rectangle around the lungs, where
            the image has masks of both).
    """

    def __init__(
        self,
        prior_shape: PriorShape = "parabola",
        laterality: Laterality = "patient",
        knowledge_prior: bool = False,
        prior_frame: PriorFrame = "image",
    ) -> None:
        check_choices(PriorOnly.__init__, locals())
        self.prior_frame = prior_frame
        self.prior_shape = prior_shape
        self.laterality = laterality
        self.knowledge_prior = knowledge_prior

    def _draw(self, clip: Clip, images: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> Tensor:
        regions = [parse_phrase(phrase, knowledge_prior=self.knowledge_prior).regions for phrase in phrases]
        prior = prior_maps(
            regions,
            clip.image_size,
            shape=self.prior_shape,
            laterality=self.laterality,
            content_box=content_box,
            checked=True,
            ids=phrases,
            device=images.device,
        )
        return min_max(prior)
