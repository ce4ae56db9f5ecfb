"""Agreement of a map with the boxes of its pair, as masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.maps import double_precision, min_max
from matex_pl.metrics.functional.ranking import top_ranked

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""Candidates for the threshold chosen on the validation split."""
MEAN_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Thresholds of the mean IoU."""


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Pixels whose centers lie in any box, `(B, H, W)` bool.

    A box that is too narrow or too flat for a center has the column or the row of its middle. Every metric counts it.

    Args:
        boxes: B lists `(K, 4)` of boxes `x0, y0, x1, y1` in [0, 1].
        size: Height and width in pixels.
    """
    height, width = size
    if not boxes:
        return torch.zeros(0, height, width, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence([box.float() for box in boxes], batch_first=True, padding_value=torch.nan)
    x0, y0, x1, y1 = padded.unbind(-1)
    in_x, in_y = _pixels_between(x0, x1, width), _pixels_between(y0, y1, height)
    return torch.einsum("bkh,bkw->bhw", in_y.float(), in_x.float()) > 0


def masks_of(maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """`box_masks` in the size and on the device of maps `(_, H, W)`."""
    return box_masks(boxes, (maps.shape[1], maps.shape[2])).to(maps.device)


def _pixels_between(low: Tensor, high: Tensor, number: int) -> Tensor:
    """Pixels of [0, 1] with their center in `[low, high)`, or the pixel of the middle, with one more last axis."""
    pixels = torch.arange(number, device=low.device)
    centers = (pixels + 0.5) / number
    inside = (centers >= low[..., None]) & (centers < high[..., None])
    middle = ((low + high) / 2 * number).floor().clamp(max=number - 1)[..., None]
    return inside | (~inside.any(-1, keepdim=True) & (pixels == middle))


def has_order(maps: Tensor) -> Tensor:
    """Maps `(B, H, W)` with a highest and a lowest pixel, `(B,)` bool: neither flat maps nor maps with NaN."""
    flat = maps.flatten(1)
    return flat.amax(1) > flat.amin(1)


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0.0) -> Tensor:
    """1 if the maximum of the map lies in a box or near one, else 0; NaN without boxes and for flat maps. `(B,)`.

    Args:
        maps: `(B, H, W)` maps.
        masks: `(B, H, W)` bool masks of the boxes.
        tolerance: Largest distance in pixels from the maximum to the nearest pixel of a box, between their centers.
    """
    height, width = maps.shape[1:]
    peak = maps.flatten(1).argmax(1, keepdim=True)
    row, column = peak // width, peak % width
    rows, columns = (torch.arange(side, device=maps.device) for side in (height, width))
    near = ((rows - row) ** 2)[:, :, None] + ((columns - column) ** 2)[:, None] <= tolerance**2
    hit = (masks & near).flatten(1).any(1).float()
    return hit.masked_fill(~(masks.flatten(1).any(1) & has_order(maps)), torch.nan)


NOISE_FLOOR = 0.01
"""Lowest noise of the contrast-to-noise ratio, as a share of the map's range."""


def contrast_to_noise(maps: Tensor, masks: Tensor, counted: Tensor | None = None, floor: float = NOISE_FLOOR) -> Tensor:
    """Signed contrast-to-noise ratio (Boecking et al. 2022), `(B,)`: (mean_in - mean_out) / sqrt(var_in + var_out).

    NaN with nothing inside or nothing outside. The noise is at least `floor` of the map's range. Without a floor, a
    single pixel decides whether the ratio of a nearly binary map is 1 or thousands. Without any noise the ratio is 0.

    Args:
        maps: `(B, H, W)` maps.
        masks: `(B, H, W)` bool masks of the boxes.
        counted: `(B, H, W)` bool pixels that count, for example those of the image without its padding; all by default.
        floor: Lowest noise as a share of the map's range; 0 for the ratio as published.
    """
    flat, inside = double_precision(maps.flatten(1)), masks.flatten(1)
    counted = torch.ones_like(inside) if counted is None else counted.flatten(1)
    return _contrast(flat, inside & counted, ~inside & counted, floor).float()


def box_contrast(maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Mean over the boxes of a pair of the absolute contrast between a box and the rest of the frame, `(B,)`.

    Some papers publish this form of the contrast-to-noise ratio: abs(mean_in - mean_out) / sqrt(var_in + var_out) per
    box, with the floor of `contrast_to_noise`. Low values in the box score as well as high ones.

    Args:
        maps: `(B, H, W)` maps.
        boxes: B lists `(K, 4)` of boxes `x0, y0, x1, y1` in [0, 1].
    """
    pair = torch.repeat_interleave(torch.tensor([len(box) for box in boxes], dtype=torch.long))
    each = [row[None] for box in boxes for row in box]
    masks = masks_of(maps, each).flatten(1)
    pair = pair.to(maps.device)
    ratios = _contrast(double_precision(maps.flatten(1))[pair], masks, ~masks).abs()
    total = torch.zeros(len(maps), dtype=ratios.dtype, device=maps.device).index_add(0, pair, ratios)
    return (total / pair.bincount(minlength=len(maps))).float()


def _contrast(values: Tensor, inside: Tensor, outside: Tensor, floor: float = NOISE_FLOOR) -> Tensor:
    """Contrast-to-noise ratio of values `(B, n)` float64 between two masks `(B, n)` bool, `(B,)`."""
    (mean_in, var_in), (mean_out, var_out) = _moments(values, inside), _moments(values, outside)
    counted = inside | outside
    span = values.masked_fill(~counted, -torch.inf).amax(1) - values.masked_fill(~counted, torch.inf).amin(1)
    noise = torch.maximum((var_in + var_out).sqrt(), floor * span)
    return (mean_in - mean_out) / torch.where(noise == 0, torch.inf, noise)


def _moments(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the second axis; NaN without any entry."""
    total = among.sum(1)
    mean = (values * among).sum(1) / total
    return mean, ((values - mean[:, None]) ** 2 * among).sum(1) / total


def iou(maps: Tensor, masks: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Intersection over union of `map > threshold` and the mask of the boxes, `(B, K)`.

    NaN without boxes and for flat maps.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: `(B, H, W)` bool masks of the boxes.
        thresholds: K thresholds.
    """
    flat, inside = maps.flatten(1).float(), masks.flatten(1)
    size = inside.sum(1)
    overlaps = []
    for threshold in thresholds:
        above = flat > threshold
        common = (above & inside).sum(1)
        overlaps.append(common / (above.sum(1) + size - common))
    scored = (size > 0) & has_order(maps)
    return torch.stack(overlaps, 1).masked_fill(~scored[:, None], torch.nan)


def mean_iou(maps: Tensor, masks: Tensor, *, signed: bool = False) -> Tensor:
    """Mean of `iou` over the thresholds .1, .2, .3, .4, .5, `(B,)`; NaN without boxes and for flat maps.

    Args:
        maps: `(B, H, W)` maps in [0, 1], or on any scale if `signed`.
        masks: `(B, H, W)` bool masks of the boxes.
        signed: Whether each map is rescaled to [-1, 1] first, as in published tables of zero-shot grounding. The lowest
            threshold is then .55 of the map's range.
    """
    return iou(2 * min_max(maps) - 1 if signed else maps, masks, MEAN_THRESHOLDS).mean(1)


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's mass in the boxes (Wang et al. 2020), `(B,)`; NaN without boxes and for a map of zeros.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        masks: `(B, H, W)` bool masks of the boxes.
    """
    flat, inside = maps.flatten(1).float(), masks.flatten(1)
    mass = flat.sum(1)
    return ((flat * inside).sum(1) / mass).masked_fill(~inside.any(1) | (mass == 0), torch.nan)


def relevance_rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the K highest pixels that lie in the boxes of K pixels (Arras et al. 2022), `(B,)`.

    Ties are in raster order. NaN without boxes and for flat maps.

    Args:
        maps: `(B, H, W)` maps.
        masks: `(B, H, W)` bool masks of the boxes.
    """
    inside = masks.flatten(1)
    size = inside.sum(1)
    share = (top_ranked(maps.flatten(1), size) & inside).sum(1) / size
    return share.masked_fill(~has_order(maps), torch.nan)
