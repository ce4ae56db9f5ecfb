"""Per-pair metric values shared by the benchmark and `matex tune`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from matex_pl.maps import Attribution, Content
from matex_pl.metrics import functional as F

IN_BOXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointing_game": F.pointing_game,
    "cnr": F.contrast_to_noise,
    "miou": F.mean_iou,
    "energy_pointing_game": F.energy_pointing_game,
    "relevance_rank_accuracy": F.relevance_rank_accuracy,
}
"""By metric: function of maps and masks of boxes, `(B, H, W)` each."""


def map_correlation(maps: Attribution, reference: Attribution, side: str, content: Content = "tokens") -> Tensor:
    """Rank correlation of each map with its reference, `(B,)`, over patches (`image`) or `content` (`text`)."""
    if side == "text":
        return F.spearman(maps.text, reference.text, reference.content_mask(content))
    return F.spearman(maps.grid.flatten(1), reference.grid.flatten(1))
