"""Attribution quality as pure functions on tensors. Names say what is kept."""

from __future__ import annotations

from collections.abc import Sequence

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
    median = text_map.masked_fill(~content, torch.nan).nanquantile(0.5, dim=1, keepdim=True)
    return tokens.masked_fill(content & ~(text_map > median), pad_id)


def confidence_drop(score: Tensor, kept_score: Tensor) -> Tensor:
    """Loss of score when only what is highlighted is kept, in percent points of the cosine, `(B,)`; lower is better."""
    return 100 * (score - kept_score).clamp(min=0)


def confidence_increase(score: Tensor, kept_score: Tensor) -> Tensor:
    """100 where keeping only what is highlighted raises the score, else 0, NaN for NaN; `(B,)`; higher is better."""
    return (100 * (kept_score > score).to(score)).masked_fill((kept_score - score).isnan(), torch.nan)


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Which pixel centres lie in any box: B lists `(K, 4)` of `x0, y0, x1, y1` in [0, 1] to `(B, H, W)` bool."""
    height, width = size
    if not boxes:
        return torch.zeros(0, height, width, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence([box.float() for box in boxes], batch_first=True, padding_value=torch.nan)
    x0, y0, x1, y1 = padded.unbind(-1)
    x = (torch.arange(width, device=padded.device) + 0.5) / width
    y = (torch.arange(height, device=padded.device) + 0.5) / height
    in_x = (x >= x0[..., None]) & (x < x1[..., None])
    in_y = (y >= y0[..., None]) & (y < y1[..., None])
    return torch.einsum("bkh,bkw->bhw", in_y.float(), in_x.float()) > 0


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 where the maximum of the map `(B, H, W)` lies in a box, else 0; NaN without boxes. `(B,)`."""
    peak = maps.flatten(1).argmax(1, keepdim=True)
    hit = masks.flatten(1).gather(1, peak)[:, 0].float()
    return hit.masked_fill(~masks.flatten(1).any(1), torch.nan)


def contrast_to_noise(maps: Tensor, masks: Tensor) -> Tensor:
    """Signed (mean_in - mean_out) / sqrt(var_in + var_out) per map, `(B,)`; NaN with nothing inside or nothing outside.

    Where neither side varies the difference of the means is taken as it is, so that a constant map gives 0.
    """
    flat, inside = maps.flatten(1).float(), masks.flatten(1).float()
    (mean_in, var_in), (mean_out, var_out) = _moments(flat, inside), _moments(flat, 1 - inside)
    noise = (var_in + var_out).sqrt()
    return (mean_in - mean_out) / torch.where(noise > 0, noise, torch.ones_like(noise))


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the second axis; NaN where the weights are all 0."""
    total = weight.sum(1)
    mean = (values * weight).sum(1) / total
    return mean, ((values - mean[:, None]) ** 2 * weight).sum(1) / total
