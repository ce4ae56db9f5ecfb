"""Maps that do not ask the model where it looked: what any method has to be compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase, prior_maps
from matex_pl.anatomy.prior import LATERALITIES, SHAPES
from matex_pl.attribution.base import AttributionMethod, check_choice, check_pairs, check_scores
from matex_pl.attribution.capture import borrowed
from matex_pl.clip import Clip
from matex_pl.maps import AttributionMaps, full_precision, min_max, patch_mean


class _Control(AttributionMethod):
    """An image map without a text map."""

    serves_text: ClassVar[bool] = False
    cost: ClassVar[str] = "1 forward, for the score"

    def attribute(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], film: Tensor | None = None
    ) -> AttributionMaps:
        """Maps of B pairs; see `AttributionMethod.attribute`. `text` is zero."""
        check_pairs(clip, images, tokens, phrases, film)
        with borrowed(clip):
            score = full_precision(clip.similarity(images, tokens))
            check_scores(score, phrases)
            image = self._draw(clip, phrases, film, score.device)
            content = clip.content(tokens)
            text = image.new_zeros(content.shape)
            return AttributionMaps(image, patch_mean(image, clip.grid), text, content, score)

    @abstractmethod
    def _draw(self, clip: Clip, phrases: Sequence[str], film: Tensor | None, device: torch.device) -> Tensor:
        """Image maps `(B, H, W)` in [0, 1]."""


class CenterMap(_Control):
    """The centre of the frame: 1 there, falling linearly with the distance to 0 in the corners."""

    def _draw(self, clip: Clip, phrases: Sequence[str], film: Tensor | None, device: torch.device) -> Tensor:
        height, width = clip.image_size
        y = torch.linspace(-1, 1, height, device=device)[:, None]
        x = torch.linspace(-1, 1, width, device=device)[None]
        return min_max(-torch.hypot(x, y)[None]).expand(len(phrases), -1, -1)


class PriorOnly(_Control):
    """The spatial prior of the phrase alone (M of eq. 5, min-maxed): what the words give away; zeros if they name none.

    Args:
        prior_shape: `parabola`, `gaussian` or `plateau`.
        laterality: `patient` or `paper`.
        knowledge_prior: A finding that names no place takes its usual one.
    """

    def __init__(
        self, prior_shape: str = "parabola", laterality: str = "patient", knowledge_prior: bool = False
    ) -> None:
        check_choice("prior_shape", prior_shape, SHAPES)
        check_choice("laterality", laterality, LATERALITIES)
        self.prior_shape = prior_shape
        self.laterality = laterality
        self.knowledge_prior = knowledge_prior

    def _draw(self, clip: Clip, phrases: Sequence[str], film: Tensor | None, device: torch.device) -> Tensor:
        regions = [parse_phrase(phrase, knowledge_prior=self.knowledge_prior).regions for phrase in phrases]
        prior = prior_maps(
            regions,
            clip.image_size,
            shape=self.prior_shape,
            laterality=self.laterality,
            film=film,
            ids=phrases,
            device=device,
        )
        return min_max(prior)
