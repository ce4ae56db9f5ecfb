"""Agreement of a map with the boxes of its pair, as masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.metrics.functional.ranking import top_ranked

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""Candidates for the threshold chosen on the validation split."""
MEAN_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Thresholds of the mean IoU."""


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int], *, keep_small: bool = False) -> Tensor:
    """Mask of the pixels whose centers lie in any box.

    Args:
        boxes: B lists `(K, 4)` of `x0, y0, x1, y1` in [0, 1].
        size: Height and width in pixels.
        keep_small: Whether a box too narrow or too flat for any center gets the column or row of its middle.

    Returns:
        `(B, H, W)` bool mask.
    """
    height, width = size
    if not boxes:
        return torch.zeros(0, height, width, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence([box.float() for box in boxes], batch_first=True, padding_value=torch.nan)
    x0, y0, x1, y1 = padded.unbind(-1)
    in_x, in_y = _pixels_between(x0, x1, width, keep_small), _pixels_between(y0, y1, height, keep_small)
    return torch.einsum("bkh,bkw->bhw", in_y.float(), in_x.float()) > 0


def _pixels_between(low: Tensor, high: Tensor, number: int, keep_small: bool) -> Tensor:
    """Mask of the `number` pixels of [0, 1] with centers in `[low, high)`; the pixels are an added last axis."""
    pixels = torch.arange(number, device=low.device)
    centers = (pixels + 0.5) / number
    inside = (centers >= low[..., None]) & (centers < high[..., None])
    if keep_small:
        middle = ((low + high) / 2 * number).floor()[..., None]
        inside |= ~inside.any(-1, keepdim=True) & (pixels == middle)
    return inside


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 if the maximum of the map `(B, H, W)` lies in a box, else 0; NaN without boxes. `(B,)`."""
    peak = maps.flatten(1).argmax(1, keepdim=True)
    hit = masks.flatten(1).gather(1, peak)[:, 0].float()
    return hit.masked_fill(~masks.flatten(1).any(1), torch.nan)


def contrast_to_noise(maps: Tensor, masks: Tensor) -> Tensor:
    """Signed (mean_in - mean_out) / sqrt(var_in + var_out) per map, `(B,)`; NaN if the inside or the outside is empty.

    If both variances are 0, the result is the difference of the means, therefore 0 for a constant map.
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


def iou(maps: Tensor, masks: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Intersection over union of `map > threshold` and the mask of the boxes, `(B, K)`; NaN without boxes.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: `(B, H, W)` bool masks of the boxes.
        thresholds: The K thresholds.
    """
    flat, inside = maps.flatten(1), masks.flatten(1)
    size = inside.sum(1)
    overlaps = []
    for threshold in thresholds:
        above = flat > threshold
        common = (above & inside).sum(1)
        overlaps.append(common / (above.sum(1) + size - common))
    return torch.stack(overlaps, 1).masked_fill(size[:, None] == 0, torch.nan)


def mean_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of `iou` over the thresholds .1, .2, .3, .4, .5, `(B,)`; NaN without boxes."""
    return iou(maps, masks, MEAN_THRESHOLDS).mean(1)


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's mass inside the boxes (Wang et al. 2020), `(B,)`; NaN without boxes, 0 for a map of zeros."""
    flat, inside = maps.flatten(1).float(), masks.flatten(1)
    mass = flat.sum(1)
    share = (flat * inside).sum(1) / torch.where(mass > 0, mass, torch.ones_like(mass))
    return share.masked_fill(~inside.any(1), torch.nan)


def relevance_rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy (Arras et al. 2022): share of the K highest pixels inside the boxes, `(B,)`.

    K is the number of pixels in the boxes. Ties are broken in raster order. NaN without boxes.
    """
    inside = masks.flatten(1)
    size = inside.sum(1)
    return (top_ranked(maps.flatten(1), size) & inside).sum(1) / size
