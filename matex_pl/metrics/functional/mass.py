"""Location of a map's mass: outside the thorax, at the border of the image, on a side of the patient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.maps import moved
from matex_pl.metrics.functional.localization import box_masks

OTHER_SIDE = {"right": "left", "left": "right", "": ""}
"""Opposite side of the patient; empty for no side."""


def outside_mass(maps: Tensor, inside: Tensor) -> Tensor:
    """Share of the map's mass outside a zone, `(B,)` in [0, 1]; NaN for a map of zeros and for an empty zone.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        inside: `(B, H, W)` bool mask of the zone, or `(1, H, W)` for all maps.
    """
    flat, zone = maps.flatten(1).float(), inside.to(maps.device).flatten(1)
    return ((flat * ~zone).sum(1) / flat.sum(1)).masked_fill(~zone.any(1), torch.nan)


def text_mass(text_map: Tensor, content: Tensor) -> Tensor:
    """Mean value of a text map `(B, T)` over its content tokens `(B, T)` bool, `(B,)`; NaN without content."""
    return (text_map * content).sum(1) / content.sum(1)


def border_mask(size: tuple[int, int], content_box: Tensor | None = None, width: float = 0.1) -> Tensor:
    """Border of the image: pixels whose centers lie outside the image or in its outer share `width` on any side.

    Args:
        size: Height and width of the frame in pixels.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame; the whole frame by
            default.
        width: Width of the border on each side, as a share of the image's width and height.

    Returns:
        `(B, H, W)` bool mask; `(1, H, W)` without `content_box`.

    Raises:
        ValueError: If the width is not in [0, 0.5).
    """
    if not 0 <= width < 0.5:
        raise ValueError(f"width must be in [0, 0.5), got {width}. Give the share of the image on each side.")
    content_box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if content_box is None else content_box
    margin = width * (content_box[:, 2:] - content_box[:, :2])
    inner = torch.cat([content_box[:, :2] + margin, content_box[:, 2:] - margin], 1)
    return ~box_masks(list(inner[:, None]), size)


def half_share(maps: Tensor, sides: Sequence[str], content_box: Tensor | None = None) -> Tensor:
    """Share of the map's mass in the half of the image on a side of the patient, `(B,)` in [0, 1].

    Pixels are weighted by `side_half`. NaN without a side, and for a map of zeros.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        sides: B sides: `right`, `left` or an empty string.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame; the whole frame by
            default.

    Raises:
        ValueError: If a side is unknown, or there is not one side for each map.
    """
    if len(sides) != len(maps):
        raise ValueError(f"sides must hold one side for each of {len(maps)} maps, got {len(sides)}.")
    content_box = None if content_box is None else content_box.to(maps.device)
    heat, half = maps.float(), side_half((maps.shape[1], maps.shape[2]), sides, content_box).to(maps.device)
    return (heat * half).sum((1, 2)) / heat.sum((1, 2))


def side_half(size: tuple[int, int], sides: Sequence[str], content_box: Tensor | None = None) -> Tensor:
    """Share of each pixel in the half of the image on a side of the patient, `(B, H, W)` in [0, 1]; NaN without a side.

    The patient's right is on the left of the image.

    Args:
        size: Height and width of the frame in pixels.
        sides: B sides: `right`, `left` or an empty string.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame; the whole frame by
            default.

    Raises:
        ValueError: If a side is unknown.
    """
    content_box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if content_box is None else content_box.float()
    right = {"right": 1.0, "left": 0.0, "": torch.nan}
    unknown = sorted(set(sides) - set(right))
    if unknown:
        raise ValueError(f"sides must be `right`, `left` or empty, got {unknown[0]!r}.")
    named = moved(torch.tensor([right[side] for side in sides]), content_box.device)
    x0, y0, x1, y1 = content_box.expand(len(sides), 4).unbind(1)
    middle = (x0 + x1) / 2
    is_right = named == 1
    columns = _covered(torch.where(is_right, x0, middle), torch.where(is_right, middle, x1), size[1])
    half = _covered(y0, y1, size[0])[:, :, None] * columns[:, None]
    return half.masked_fill(named.isnan()[:, None, None], torch.nan)


def side_sensitivity(maps: Tensor, swapped: Tensor, sides: Sequence[str], content_box: Tensor | None = None) -> Tensor:
    """Share of the mass that moves to the patient's other side when the phrase names that side, `(B,)` in [-1, 1].

    The value is the `half_share` of the side that the swapped phrase names: of the map under the swapped phrase minus
    that of the map under the true phrase. It is 0 for a map that ignores the side, and NaN if `half_share` is NaN.

    Args:
        maps: `(B, H, W)` maps under the true phrases.
        swapped: `(B, H, W)` maps under the phrases with right and left exchanged.
        sides: Side that each true phrase names: `right`, `left` or an empty string.
        content_box: `(B, 4)` rectangle of the image, as in `half_share`.
    """
    named = [OTHER_SIDE.get(side, side) for side in sides]
    return half_share(swapped, named, content_box) - half_share(maps, named, content_box)


def _covered(low: Tensor, high: Tensor, number: int) -> Tensor:
    """Share of each of `number` pixels of [0, 1] between `low` and `high` `(B,)`: `(B, number)`."""
    edge = torch.arange(number, device=low.device)
    reached = [(end[:, None] * number - edge).clamp(0, 1) for end in (low, high)]
    return (reached[1] - reached[0]).clamp(min=0)
