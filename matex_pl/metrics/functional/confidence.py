"""Scores with only the highlighted part kept, and areas under insertion and deletion curves."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_highlighted(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Images with only the highlighted part kept, x' = x * map + fill * (1 - map), for maps `(B, H, W)` in [0, 1]."""
    keep = maps[:, None].to(images)
    return images * keep + fill * (1 - keep)


def keep_relevant_tokens(tokens: Tensor, text_map: Tensor, content: Tensor, pad_id: int) -> Tensor:
    """Tokens `(B, T)` with pads for all content that is not strictly above the map's median over content.

    Other tokens (BOS, EOT, pads) stay in place.
    """
    return tokens.masked_fill(not_above_median(text_map, content), pad_id)


def not_above_median(text_map: Tensor, content: Tensor) -> Tensor:
    """Mask `(B, T)` bool of content tokens that are not strictly above the map's median over content."""
    median = text_map.masked_fill(~content, torch.nan).nanquantile(0.5, dim=1, keepdim=True)
    return content & ~(text_map > median)


def confidence_drop(score: Tensor, kept_score: Tensor) -> Tensor:
    """Loss of score with only the highlighted part kept, `(B,)`, in percentage points of cosine; lower is better."""
    return 100 * (score - kept_score).clamp(min=0)


def confidence_increase(score: Tensor, kept_score: Tensor) -> Tensor:
    """100 if keeping only the highlighted part raises the score, else 0; NaN for NaN; `(B,)`; higher is better."""
    return (100 * (kept_score > score).to(score)).masked_fill((kept_score - score).isnan(), torch.nan)


# Index of the image without any patch in a curve, and of the whole image.
_ENDS = {"insertion": (0, -1), "deletion": (-1, 0)}


def curve_ends(curve: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scores without any patch and of the whole image, `(B,)` each, from an insertion or deletion curve."""
    blank, full = _ENDS[kind]
    return curve[blank], curve[full]


def curve_area(curve: Tensor, blank: Tensor, full: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gain and span of insertion or deletion curves, `(B,)` each; their ratio is the area under the curve.

    The gain is the trapezoid area of S - S_blank over the share of patches in [0, 1]. The span is S_full - S_blank. The
    AUC over pairs is sum(gain) / sum(span), a ratio of means. If a model sees nothing in an image, its span is about 0
    or negative, which would dominate a mean of ratios.

    Args:
        curve: `(S + 1, B)` scores from one end to the other.
        blank: `(B,)` score without any patch of the image.
        full: `(B,)` score of the whole image.
        shares: `(S + 1,)` share of patches of each score; evenly spaced by default.
    """
    shares = torch.linspace(0, 1, len(curve), device=curve.device) if shares is None else shares
    return torch.trapezoid(curve - blank, shares.to(curve), dim=0), full - blank
