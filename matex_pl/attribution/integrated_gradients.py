"""Gradients integrated along the line from a baseline to the input."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.core.fill import Fill, fill_images
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, TextTower, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.console import progress
from matex_pl.maps import full_precision, moved


class IntegratedGradients(TwoTowerMethod):
    """Integrated gradients (Sundararajan et al. 2017): `(x - x0)` times the mean of dS/dx on the line from x0 to x.

    The integral is a Gauss-Legendre sum. The map is the positive part of the sum over channels. For images x0 is the
    fill. For phrases x0 is the embeddings of the same phrase with its content replaced by pad tokens.

    Released code: captum uses the same rule with 50 nodes, and keeps sign and channels.

    Args:
        steps: Number of nodes of the sum.
        fill: x0 of images: `mean_color` (as published), `mean_image` or `blur`.
        chunk_size: Maximum number of samples in one forward and backward; the batch size if that is larger.
        kwargs: `target` and `references` of `TwoTowerMethod`.

    `parts` holds

    - `signed` `(B, H, W)` and `text_signed` `(B, T)`, the sums over channels
    - `completeness_error` and `text_completeness_error` `(B,)`, the total of these sums minus S(x) - S(x0); more steps
      make them smaller
    """

    reads: ClassVar[Reads] = "gradients"
    cost: ClassVar[str] = "2 forwards, and `steps` forwards and backwards"

    def __init__(
        self,
        steps: int = 32,
        fill: Fill = "mean_color",
        chunk_size: int = 64,
        **kwargs: Any,
    ) -> None:
        check_choices(IntegratedGradients.__init__, locals())
        super().__init__(**kwargs)
        check_positive(steps=steps, chunk_size=chunk_size)
        self.steps = steps
        self.fill = fill
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward; the gradients need the direction and follow later."""
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

        return Trace(embedding, relevance_for)

    def _mean_gradient(self, tower: Tower, start: Tensor, end: Tensor, direction: Tensor) -> Tensor:
        """Gauss-Legendre mean of the gradients at `steps` points between `start` and `end` `(B, ...)`."""
        places, weights = gauss_legendre(self.steps, direction)
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


def gauss_legendre(steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes in [0, 1] and weights of a Gauss-Legendre sum, `(steps,)` each, in dtype and device of a tensor."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    # From numpy's interval -1 to 1 to the interval 0 to 1.
    parts = (torch.from_numpy(part / 2).to(like.dtype) for part in (nodes + 1, weights))
    places, halves = (moved(part, like.device) for part in parts)
    return places, halves
