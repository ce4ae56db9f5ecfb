"""Attribution quality as pure functions on tensors, batched over pairs; their names state the part that is kept."""

from matex_pl.metrics.functional.anatomy import anatomy_shares, area_share, mass_share, partition, thorax_zone
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
    detection_scores,
    map_accuracy,
    match_components,
    reaches,
)
from matex_pl.metrics.functional.localization import (
    MEAN_THRESHOLDS,
    THRESHOLDS,
    box_contrast,
    box_masks,
    contrast_to_noise,
    energy_pointing_game,
    has_order,
    iou,
    masks_of,
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
from matex_pl.metrics.functional.words import word_laterality

# Names before 0.2.
energy_in_box, rank_accuracy = energy_pointing_game, relevance_rank_accuracy

__all__ = [
    "MEAN_THRESHOLDS",
    "OTHER_SIDE",
    "THRESHOLDS",
    "Components",
    "anatomy_shares",
    "area_share",
    "average_precision",
    "best_box_iou",
    "border_mask",
    "box_accuracy",
    "box_contrast",
    "box_masks",
    "components",
    "confidence_drop",
    "confidence_increase",
    "contrast_to_noise",
    "curve_area",
    "curve_ends",
    "detection_scores",
    "energy_pointing_game",
    "half_share",
    "has_order",
    "iou",
    "keep_highlighted",
    "keep_relevant_tokens",
    "map_accuracy",
    "masks_of",
    "mass_share",
    "match_components",
    "mean_iou",
    "not_above_median",
    "outside_mass",
    "partition",
    "pointing_game",
    "reaches",
    "relevance_rank_accuracy",
    "side_half",
    "side_sensitivity",
    "spearman",
    "text_mass",
    "thorax_zone",
    "top_ranked",
    "top_share",
    "word_laterality",
]
