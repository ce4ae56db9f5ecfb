"""Per-pair metric values shared by the benchmark and `matex tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from matex_pl.maps import Attribution
from matex_pl.metrics import functional as F

IN_BOXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointing_game": F.pointing_game,
    "cnr": F.contrast_to_noise,
    "miou": F.mean_iou,
    "energy_pointing_game": F.energy_pointing_game,
    "relevance_rank_accuracy": F.relevance_rank_accuracy,
}
"""By metric: function of maps and masks of boxes, `(B, H, W)` each."""


def box_masks(maps: Tensor, boxes: Sequence[Tensor], *, keep_small: bool = False) -> Tensor:
    """`functional.box_masks` in the size and on the device of maps `(B, H, W)`."""
    return F.box_masks(boxes, (maps.shape[1], maps.shape[2]), keep_small=keep_small).to(maps.device)


def map_correlation(maps: Attribution, reference: Attribution, side: str) -> Tensor:
    """Rank correlation of each map with its reference, over patches (`image`) or content tokens (`text`); `(B,)`."""
    if side == "text":
        return F.spearman(maps.text, reference.text, reference.content)
    return F.spearman(maps.grid.flatten(1), reference.grid.flatten(1))
