"""Plain gradients by pixels and token embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from matex_pl.attribution.core.relevance import gradients_of
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.maps import full_precision


class Saliency(TwoTowerMethod):
    """Gradients (Simonyan et al. 2014): largest `abs(dS/dx)` over the channels of each pixel.

    The value of a token is the L2 norm of the gradient by its embedding, because its channels have no meaning of their
    own.

    Released code: captum returns `abs(dS/dx)` of each channel; the maximum and the norm over channels are computed
    here.
    """

    reads: ClassVar[Reads] = "gradients"
    cost: ClassVar[str] = "1 forward and 1 backward"

    def trace(self, tower: Tower) -> Trace:
        """Run one forward with gradients from the pixels or token embeddings on."""
        with torch.enable_grad():
            signal = tower.signal.detach().requires_grad_()
            embedding = tower.encode_signal(signal)

        def relevance_for(direction: Tensor) -> Relevance:
            gradient = full_precision(gradients_of(embedding, [signal], direction)[0])
            return Relevance(gradient.abs().amax(1) if isinstance(tower, ImageTower) else gradient.norm(dim=-1))

        return Trace(embedding, relevance_for)
