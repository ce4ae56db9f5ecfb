"""Losses of the guidance: how far a map lies outside its target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GuidanceLoss = Literal["energy", "l1", "outside"]
# Mean of a map that is added inside and outside, relative to a flat map: it bounds the loss and its gradient.
_FLOOR = 0.05


def share_inside(heat: Tensor, target: Tensor) -> Tensor:
    """Share of maps `(B, N)` inside targets `(B, N)`, area shares in [0, 1]: `(B,)`; 0 for a map of zeros."""
    return (heat * target).sum(1) / _or_one(heat.sum(1))


def energy_loss(heat: Tensor, target: Tensor) -> Tensor:
    """`-log(d_in / (d_in + d_out))` of the map's mean inside and outside the target, `(B,)`; `log 2` for a flat map.

    5 % of the mean of a flat map are added to both means: a map without a part inside has a finite loss.

    The energy loss of Rao et al. (2023), `-log` of the share inside, favors large boxes: means do not.
    """
    inside = share_inside(heat, target)
    area = target.mean(1)
    dense_in = inside / _or_one(area)
    dense_out = share_inside(heat, 1 - target) / _or_one(1 - area)
    return -torch.log((dense_in + _FLOOR) / (dense_in + dense_out + 2 * _FLOOR))


def l1_loss(heat: Tensor, target: Tensor) -> Tensor:
    """Mean distance of the map, divided by its maximum, from the target, `(B,)` (Rao et al., 2023)."""
    return (heat / _or_one(heat.amax(1, keepdim=True)) - target).abs().mean(1)


def outside_loss(heat: Tensor, target: Tensor) -> Tensor:
    """Squared share of the map outside the target, `(B,)`, after Ross et al. (2017); 1 for a map of zeros."""
    return (1 - share_inside(heat, target)) ** 2


def _or_one(total: Tensor) -> Tensor:
    """Divisors without zeros, whose gradient would be NaN."""
    return torch.where(total > 0, total, 1)


LOSSES = {"energy": energy_loss, "l1": l1_loss, "outside": outside_loss}
