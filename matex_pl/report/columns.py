"""What the columns of a benchmark are called, and how they are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FILL_NAMES = {"mean_colour": "mean colour", "mean_film": "mean film", "blur": "blurred film"}


@dataclass(frozen=True)
class Column:
    """A metric as the tables show it.

    Args:
        label: Its name, without the fill.
        group: `localisation`, `confidence`, `curves`, `sensitivity`, `mass` or `sanity`.
        higher_is_better: None where neither is.
        says: One sentence on how to read it.
        fill: What stands in for removed pixels.
        percent: A share of studies in percent, or percent points of the cosine.
    """

    label: str
    group: str
    higher_is_better: bool | None
    says: str
    fill: str | None = None
    percent: bool = False


_LOCALISATION = {
    "pointing_game": Column("Pointing game", "localisation", True, "Share of maps whose maximum lies in a box."),
    "cnr": Column(
        "CNR", "localisation", True, "Contrast of box and rest over their noise; negative if the rest is brighter."
    ),
    "miou": Column("mIoU", "localisation", True, "IoU of map and boxes, mean over the thresholds .1 to .5."),
    "iou": Column("IoU", "localisation", True, "IoU at one threshold per method, which validation pairs chose."),
    "acc50": Column(
        "Acc@0.5", "localisation", True, "Share of studies whose best component, as a box, has an IoU above .5."
    ),
    "ap50": Column(
        "AP50", "localisation", True, "Average precision of all components as boxes, hits from an IoU of .5."
    ),
    "energy_in_box": Column("Energy in box", "localisation", True, "Share of the map's mass inside of the boxes."),
    "rank_accuracy": Column(
        "Rank accuracy", "localisation", True, "Share of the K highest pixels that lie in the boxes of K pixels."
    ),
}
_CONFIDENCE = {
    "confidence_drop": ("Drop", False, "Percent points of cosine lost when only what is highlighted is kept."),
    "confidence_increase": ("Increase", True, "Percent of studies whose cosine rises when only that is kept."),
    "fixed_drop": ("Drop, half kept", False, "The same with exactly half of the pixels or words kept, by rank."),
    "fixed_increase": ("Increase, half kept", True, "The same with exactly half of the pixels or words kept, by rank."),
    "remove": ("Drop, top fifth removed", True, "Percent points lost when the highest fifth is taken away."),
}
_CURVES = {
    "insertion": (
        "Insertion AUC",
        True,
        "How soon the cosine rises as patches come by the map, 1 at once; none where films score as their fill does.",
    ),
    "deletion": (
        "Deletion AUC",
        False,
        "How long the cosine stays as patches go by the map; none where films score as their fill does.",
    ),
}
_REST = {
    "prompt_sensitivity": Column(
        "Other phrase", "sensitivity", False, "Rank correlation with the map under another study's phrase."
    ),
    "side_sensitivity": Column(
        "Sides swapped", "sensitivity", True, "Share of mass that changes sides when the phrase does."
    ),
    "sanity": Column(
        "Weights shuffled", "sanity", False, "Rank correlation with the map while weights are shuffled, block by block."
    ),
    "outside_thorax_mass": Column(
        "Outside thorax", "mass", False, "Share of the map's mass outside of where lungs and heart usually are."
    ),
    "border_mass": Column("At the border", "mass", False, "Share of the map's mass in the outer tenth of the film."),
    "mean_map_mass": Column(
        "Mean value", "mass", None, "A map of all ones has a perfect confidence drop: read this beside it."
    ),
}


def metric_columns(keys: set[str]) -> dict[str, dict[str, Any]]:
    """The columns of metrics such as `cnr` or `insertion/blur`, in the order of the tables, as plain types."""
    return {key: asdict(column) for key, column in _all_columns().items() if key in keys}


def _all_columns() -> dict[str, Column]:
    columns = dict(_LOCALISATION)
    for fill in (None, "mean_colour", "mean_film"):
        for name, (label, better, says) in _CONFIDENCE.items():
            columns[f"{name}/{fill}" if fill else name] = Column(label, "confidence", better, says, fill, True)
    for name, (label, better, says) in _CURVES.items():
        for fill in FILL_NAMES:
            columns[f"{name}/{fill}"] = Column(label, "curves", better, says, fill)
    return columns | _REST
