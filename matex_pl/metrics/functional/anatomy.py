"""Shares of a map's mass in the anatomical structures of its image, next to their shares of the image's area."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from matex_pl.data.chest import LUNGS
from matex_pl.metrics.functional.localization import masks_of, pointing_game

HEART = "heart"
REST = "rest"


def mass_share(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's mass inside a structure, `(B,)` in [0, 1].

    NaN for an image without the structure and for a map of zeros.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: `(B, H, W)` bool masks of the structure, False everywhere for an image without it.
    """
    return _share(maps, masks).masked_fill(~masks.to(maps.device).flatten(1).any(1), torch.nan)


def area_share(masks: Tensor, content_box: Tensor | None = None) -> Tensor:
    """Share of the image's area inside a structure, `(B,)` in [0, 1]; NaN for an image without the structure.

    Args:
        masks: `(B, H, W)` bool masks of the structure, False everywhere for an image without it.
        content_box: `(B, 4)` rectangle of the image, `x0, y0, x1, y1` in [0, 1] of the frame, whose padding does not
            count; the whole frame by default.
    """
    content = torch.ones_like(masks) if content_box is None else masks_of(masks, list(content_box[:, None]))
    inside = (masks & content).flatten(1).sum(1)
    return (inside / content.flatten(1).sum(1)).masked_fill(inside == 0, torch.nan)


def partition(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Disjoint masks `(B, H, W)` bool: `left_lung`, `right_lung`, the `heart` outside of the lungs, and the `rest`.

    Masks that overlap lose their common pixels to the first. The rest is the whole frame without the others, and False
    everywhere for an image without masks of both lungs. Empty without masks of lungs.

    Args:
        masks: Masks `(B, H, W)` bool by structure, False everywhere for an image without the structure.
    """
    if not set(LUNGS) <= masks.keys():
        return {}
    taken = torch.zeros_like(masks[LUNGS[0]])
    parts = {}
    for name in (*LUNGS, HEART):
        if name in masks:
            parts[name] = masks[name] & ~taken
            taken = taken | masks[name]
    return parts | {REST: ~taken & _has_lungs(masks)[:, None, None]}


def thorax_zone(masks: Mapping[str, Tensor], maps: Tensor, usual: Tensor | None = None) -> Tensor:
    """Lungs and heart of each image, `(B, H, W)` bool, for `outside_mass`.

    Args:
        masks: Masks `(B, H, W)` bool by structure, False everywhere for an image without the structure.
        maps: `(B, H, W)` maps, for size and device.
        usual: `(H, W)` bool, usual place of lungs and heart, for images without masks of both lungs; by default their
            zone is False everywhere, so they do not count.
    """
    zone = torch.zeros_like(maps, dtype=torch.bool)
    zone = zone if usual is None else zone | usual.to(maps.device)
    if not set(LUNGS) <= masks.keys():
        return zone
    parts = [masks[name].to(maps.device) for name in (*LUNGS, HEART) if name in masks]
    return torch.stack(parts).any(0).where(_has_lungs(masks).to(maps.device)[:, None, None], zone)


def anatomy_shares(maps: Tensor, masks: Mapping[str, Tensor], content_box: Tensor | None = None) -> dict[str, Tensor]:
    """Shares of the map in each structure, `(B,)` by name; NaN for an image without the structure.

    - `mass/<structure>` and `part/<name>`: `mass_shares`.
    - `area/<structure>`: `area_share`.
    - `mass_ratio/<structure>`: mass over area, 1 for a map that is even over the image and 0 elsewhere.
    - `peak/<structure>`: 1 if the maximum of the map is inside, else 0; NaN for a flat map.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: Masks `(B, H, W)` bool by structure, False everywhere for an image without the structure.
        content_box: `(B, 4)` rectangle of the image, as in `area_share`.
    """
    masks = {name: mask.to(maps.device) for name, mask in masks.items()}
    shares = mass_shares(maps, masks)
    for name, mask in masks.items():
        area = area_share(mask, content_box)
        shares |= {f"area/{name}": area, f"mass_ratio/{name}": shares[f"mass/{name}"] / area}
        shares[f"peak/{name}"] = pointing_game(maps, mask)
    return shares


def mass_shares(maps: Tensor, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shares of the map's mass, `(B,)` by name; NaN for an image without the structure.

    - `mass/<structure>`: `mass_share`.
    - `part/<name>`: share of the mass in each mask of the `partition`. The shares of an image sum to 1.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: Masks `(B, H, W)` bool by structure, False everywhere for an image without the structure.
    """
    masks = {name: mask.to(maps.device) for name, mask in masks.items()}
    shares = {f"mass/{name}": mass_share(maps, mask) for name, mask in masks.items()}
    for name, part in partition(masks).items():
        # A heart that the lungs cover whole has the share 0.
        counted = _has_lungs(masks) if name == REST else _has_lungs(masks) & masks[name].flatten(1).any(1)
        shares[f"part/{name}"] = _share(maps, part).masked_fill(~counted, torch.nan)
    return shares


def _share(maps: Tensor, masks: Tensor) -> Tensor:
    flat = maps.flatten(1).float()
    return (flat * masks.to(maps.device).flatten(1)).sum(1) / flat.sum(1)


def _has_lungs(masks: Mapping[str, Tensor]) -> Tensor:
    """Images with masks of both lungs, `(B,)` bool."""
    return torch.stack([masks[name].flatten(1).any(1) for name in LUNGS]).all(0)
