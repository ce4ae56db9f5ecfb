"""Gradients along the way from a baseline."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.core.fill import Fill, check_fill, fill_images
from matex_pl.attribution.core.target import Target
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, TextTower, Tower, Trace, TwoTowerMethod
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.maps import full_precision


class IntegratedGradients(TwoTowerMethod):
    """Integrated gradients (Sundararajan et al. 2017), (x - x0) times the mean of dS/dx on the line from x0 to x.

    The integral is a Gauss-Legendre sum. The map is the positive part of the sum over channels. x0 is the fill for
    images; for phrases the embeddings of the same phrase with pad tokens in place of its content.

    Released code: captum has the same rule with 50 nodes, and leaves sign and channels as they are.

    Args:
        steps: Nodes of the sum.
        fill: x0 of images: `mean_color` (as published), `mean_image` or `blur`.
        chunk_size: Most samples in one forward and backward, or the batch where that is larger.
        target: `cosine` or `margin`, the cosine less its mean over `references`.
        references: Phrases of the margin; the package's list of findings by side and zone by default.

    `parts` holds signed `(B, H, W)` and text_signed `(B, T)`, the sums over channels; completeness_error and
    text_completeness_error `(B,)`, what their total differs from S(x) - S(x0) by, which more steps make smaller.
    """

    cost: ClassVar[str] = "2 forwards, and `steps` forwards and backwards"

    def __init__(
        self,
        steps: int = 32,
        fill: Fill = "mean_color",
        chunk_size: int = 64,
        target: Target = "cosine",
        references: list[str] | None = None,
    ) -> None:
        check_choices(IntegratedGradients.__init__, locals())
        super().__init__(target, references)
        check_positive(steps=steps, chunk_size=chunk_size)
        self.steps = steps
        self.fill = fill
        self.chunk_size = chunk_size

    def check(self, clip: Clip) -> None:
        """Refuse a model without the fill."""
        check_fill(self.fill, clip)

    def trace(self, tower: Tower) -> Trace:
        """One forward; the rest needs the direction."""
        embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            end = tower.signal
            start = tower.blank if isinstance(tower, TextTower) else fill_images(self.fill, tower.clip, end)
            end = end.expand(len(direction), *end.shape[1:])
            start = start.expand_as(end)
            signed = full_precision(end - start) * self._mean_gradient(tower, start, end, direction)
            signed = signed.sum(1 if isinstance(tower, ImageTower) else -1)
            first = full_precision(tower.encode_signal(start))
            gain = ((full_precision(embedding) - first) * direction).sum(-1)
            error = signed.flatten(1).sum(1) - gain
            return Relevance(signed.relu(), {"signed": signed, "completeness_error": error})

        return embedding, relevance_for

    def _mean_gradient(self, tower: Tower, start: Tensor, end: Tensor, direction: Tensor) -> Tensor:
        """Gauss-Legendre sum of the gradients at `steps` places between `start` and `end` `(B, ...)`."""
        places, weights = legendre(self.steps, direction)
        chunk = max(1, self.chunk_size // len(direction))
        total = torch.zeros_like(full_precision(end))
        for place, weight in progress(list(zip(places.split(chunk), weights.split(chunk), strict=True)), "steps"):
            with torch.enable_grad():
                points = torch.lerp(start, end, place.view(-1, *[1] * end.ndim).to(end)).requires_grad_()
                embedding = tower.encode_signal(points.flatten(0, 1))
            towards = direction.repeat(len(place), 1).to(embedding.dtype)
            gradient = torch.autograd.grad(embedding, points, towards)[0]
            total += torch.einsum("k,k...->...", weight, full_precision(gradient))
        return total


def legendre(steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights, which sum to 1, of the Gauss-Legendre rule; `(steps,)` each."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((nodes + 1) / 2).to(like), torch.from_numpy(weights / 2).to(like)
