"""What is left of the score when only what a map highlights is kept, or when patches come and go in its order."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_highlighted(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """What is highlighted stays, x' = x * map + fill * (1 - map): `(B, 3, H, W)` with maps `(B, H, W)` in [0, 1]."""
    keep = maps[:, None].to(images)
    return images * keep + fill * (1 - keep)


def keep_relevant_tokens(tokens: Tensor, text_map: Tensor, content: Tensor, pad_id: int) -> Tensor:
    """Tokens `(B, T)` with pads for all content that is not strictly above the map's median over content.

    Whatever is no content (BOS, EOT, pads) stays where it is.
    """
    return tokens.masked_fill(not_above_median(text_map, content), pad_id)


def not_above_median(text_map: Tensor, content: Tensor) -> Tensor:
    """Content tokens `(B, T)` that are not strictly above the map's median over content, bool."""
    median = text_map.masked_fill(~content, torch.nan).nanquantile(0.5, dim=1, keepdim=True)
    return content & ~(text_map > median)


def confidence_drop(score: Tensor, kept_score: Tensor) -> Tensor:
    """Loss of score when only what is highlighted is kept, in percent points of the cosine, `(B,)`; lower is better."""
    return 100 * (score - kept_score).clamp(min=0)


def confidence_increase(score: Tensor, kept_score: Tensor) -> Tensor:
    """100 where keeping only what is highlighted raises the score, else 0, NaN for NaN; `(B,)`; higher is better."""
    return (100 * (kept_score > score).to(score)).masked_fill((kept_score - score).isnan(), torch.nan)


# Which end of a curve is the image without any patch, and which the whole image.
_ENDS = {"insertion": (0, -1), "deletion": (-1, 0)}


def curve_ends(curve: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scores with no patch of the image and of the whole image, `(B,)` each, of an insertion or deletion curve."""
    blank, full = _ENDS[kind]
    return curve[blank], curve[full]


def curve_area(curve: Tensor, blank: Tensor, full: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Area under insertion or deletion curves, not yet divided by what they could span: gain and span, `(B,)` each.

    The gain is the trapezoid area of S - S_blank over the share of patches in [0, 1], the span S_full - S_blank. The
    AUC over pairs is sum(gain) / sum(span), a ratio of means: where a model sees nothing in an image its span is about
    0, may be negative, and would blow up a mean of ratios.

    Args:
        curve: `(S + 1, B)` scores from one end to the other.
        blank: `(B,)` score with no patch of the image.
        full: `(B,)` score of the whole image.
        shares: `(S + 1,)` the share of patches of each score; evenly spread by default.
    """
    shares = torch.linspace(0, 1, len(curve), device=curve.device) if shares is None else shares
    return torch.trapezoid(curve - blank, shares.to(curve), dim=0), full - blank
