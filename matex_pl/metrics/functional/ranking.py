"""Highest entries of each row, and rank correlation."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def top_ranked(values: Tensor, counts: Tensor, among: Tensor | None = None) -> Tensor:
    """Mask of exactly the `counts[b]` highest entries of each row, or of all if there are fewer; ties in raster order.

    Args:
        values: `(B, N)` values.
        counts: `(B,)` integers.
        among: `(B, N)` bool mask of the ranked entries; all by default.

    Returns:
        `(B, N)` bool mask.
    """
    order = values.argsort(dim=1, descending=True, stable=True)
    among = torch.ones_like(values, dtype=torch.bool) if among is None else among
    ranked = among.gather(1, order)
    top = ranked & (ranked.cumsum(1) <= counts[:, None])
    return torch.zeros_like(top).scatter(1, order, top)


def top_share(values: Tensor, share: float, among: Tensor | None = None, at_least: int = 0) -> Tensor:
    """Mask of the floor(share * n) highest of the n ranked entries of each row; ties in raster order. `(B, N)` bool.

    The share is converted to the nearest simple fraction, which makes .29 of 100 exactly 29.

    Args:
        values: `(B, N)` values.
        share: Share in [0, 1].
        among: `(B, N)` bool mask of the ranked entries; all by default.
        at_least: Minimum number of selected entries, if a row has as many.

    Raises:
        ValueError: If the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}. Give a share, not a percentage.")
    part = Fraction(share).limit_denominator(1_000_000)
    number = torch.full_like(values[:, 0], values.shape[1], dtype=torch.long) if among is None else among.sum(1)
    counts = number * part.numerator // part.denominator
    return top_ranked(values, torch.maximum(counts, number.clamp(max=at_least)), among)


def spearman(a: Tensor, b: Tensor, among: Tensor | None = None) -> Tensor:
    """Rank correlation of each row of `a` and `b`, `(B,)` in [-1, 1]; ties get their average rank.

    NaN if a row is constant in `a` or `b`, or contains NaN.

    Args:
        a: `(B, N)` values.
        b: `(B, N)` values.
        among: `(B, N)` bool mask of the compared entries; all by default.
    """
    among = torch.ones_like(a, dtype=torch.bool) if among is None else among
    first, second = _centered_ranks(a, among), _centered_ranks(b, among)
    scale = (first.square().sum(1) * second.square().sum(1)).sqrt()
    spoilt = ((a.isnan() | b.isnan()) & among).any(1)
    return ((first * second).sum(1) / scale).clamp(-1, 1).masked_fill(spoilt, torch.nan)


def _centered_ranks(values: Tensor, among: Tensor) -> Tensor:
    """Average rank minus the mean rank of the compared entries; 0 for the others. `(B, N)` float."""
    values = values.masked_fill(~among, torch.inf).contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    number = among.sum(1, keepdim=True)
    # An infinite entry of the mask ties with the entries outside the mask.
    up_to = torch.minimum(up_to, number)
    return ((below + up_to - number) / 2).masked_fill(~among, 0)
