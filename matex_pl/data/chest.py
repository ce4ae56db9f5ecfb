"""The rectangle around the lungs of an image, the frame of the spatial prior with `prior_frame="chest"`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LUNGS = ("left_lung", "right_lung")


def chest_boxes(masks: Mapping[str, Tensor], number: int) -> Tensor:
    """Rectangles around both lungs of B images, `(B, 4)` float32; NaN for an image without masks of both lungs.

    A rectangle `x0, y0, x1, y1` is in [0, 1] of the frame and has the outer edges of the outermost pixels. One lung
    alone gives no rectangle: it covers half a chest.

    Args:
        masks: Masks `(B, H, W)` bool by structure, False everywhere for an image without the structure.
        number: The number B of images, which decides the shape if there are no masks.
    """
    if not set(LUNGS) <= masks.keys():
        return torch.full((number, 4), torch.nan)
    lungs = torch.stack([masks[name] for name in LUNGS]).bool()
    both, union = lungs.flatten(2).any(2).all(0), lungs.any(0)
    edges = [_ends(union.any(1)), _ends(union.any(2))]
    boxes = torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1)
    return boxes.masked_fill(~both[:, None], torch.nan)


def _ends(held: Tensor) -> tuple[Tensor, Tensor]:
    """First edge of the first, and last edge of the last marked pixel of each row `(B, n)`, as shares of the row."""
    marked, number = held.float(), held.shape[1]
    return marked.argmax(1) / number, (number - marked.flip(1).argmax(1)) / number
