"""Attribution quality as pure functions on tensors, batched over pairs; their names state the part that is kept."""

from matex_pl.metrics.functional.confidence import (
    confidence_drop,
    confidence_increase,
    curve_area,
    curve_ends,
    keep_highlighted,
    keep_relevant_tokens,
    not_above_median,
)
from matex_pl.metrics.functional.detections import (
    Components,
    average_precision,
    best_box_iou,
    box_accuracy,
    components,
    match_components,
)
from matex_pl.metrics.functional.localization import (
    MEAN_THRESHOLDS,
    THRESHOLDS,
    box_masks,
    contrast_to_noise,
    energy_pointing_game,
    iou,
    mean_iou,
    pointing_game,
    relevance_rank_accuracy,
)
from matex_pl.metrics.functional.mass import (
    OTHER_SIDE,
    border_mask,
    half_share,
    outside_mass,
    side_half,
    side_sensitivity,
    text_mass,
)
from matex_pl.metrics.functional.ranking import spearman, top_ranked, top_share

# Names before 0.2.
energy_in_box, rank_accuracy = energy_pointing_game, relevance_rank_accuracy

__all__ = [
    "MEAN_THRESHOLDS",
    "OTHER_SIDE",
    "THRESHOLDS",
    "Components",
    "average_precision",
    "best_box_iou",
    "border_mask",
    "box_accuracy",
    "box_masks",
    "components",
    "confidence_drop",
    "confidence_increase",
    "contrast_to_noise",
    "curve_area",
    "curve_ends",
    "energy_pointing_game",
    "half_share",
    "iou",
    "keep_highlighted",
    "keep_relevant_tokens",
    "match_components",
    "mean_iou",
    "not_above_median",
    "outside_mass",
    "pointing_game",
    "relevance_rank_accuracy",
    "side_half",
    "side_sensitivity",
    "spearman",
    "text_mass",
    "top_ranked",
    "top_share",
]
