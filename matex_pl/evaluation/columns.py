"""Metrics of an experiment: names, directions and explanations, in the order of the tables."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from torchmetrics import Metric

from matex_pl import metrics as M
from matex_pl.report.results import ANATOMY_GROUP
from matex_pl.report.results import Metric as Column

# Fills of pixels, `words` for the metrics of text without punctuation, and `findings` for means over findings.
FILL_NAMES = {
    "words": "without punctuation",
    "findings": "mean over findings",
    "mean_color": "mean color",
    "mean_image": "mean image",
    "blur": "blurred image",
}
# Fills by group, in the order of the tables; the empty fill is for the content tokens of text.
_FILLS = {
    "paper": ("", "words", "mean_color", "mean_image"),
    "confidence": ("", "words", "mean_color", "mean_image"),
    "curves": ("blur", "mean_color", "mean_image"),
    "sanity": ("", "words"),
    "mass": ("", "words"),
}


class _Row(NamedTuple):
    metric: type[Metric]
    label: str
    description: str


_GROUPS = {
    "localization": {
        "pointing_game": _Row(M.PointingGame, "Pointing game", "Share of maps whose maximum lies in a box."),
        "cnr": _Row(
            M.ContrastToNoise,
            "CNR",
            "Contrast of box and rest divided by their noise; negative if the rest is brighter.",
        ),
        "miou": _Row(M.MeanIoU, "mIoU", "IoU of map and boxes, mean over the thresholds .1 to .5."),
        "iou": _Row(M.ThresholdedIoU, "IoU", "IoU at one threshold per method, chosen on validation pairs."),
        "acc50": _Row(
            M.BoxAccuracy, "Acc@0.5", "Share of pairs whose highest component, as a box, has an IoU of at least .5."
        ),
        "ap50": _Row(
            M.AveragePrecision50,
            "AP50",
            "Average precision of all components as boxes; a hit has an IoU of at least .5.",
        ),
        "energy_pointing_game": _Row(
            M.EnergyPointingGame, "Energy in box", "Share of the map's mass inside the boxes."
        ),
        "relevance_rank_accuracy": _Row(
            M.RelevanceRankAccuracy,
            "Rank accuracy",
            "Share of the K highest pixels inside the boxes, which have K pixels.",
        ),
    },
    "paper": {
        "confidence_drop": _Row(
            M.ConfidenceDrop,
            "Drop",
            "Drop in cosine similarity (percentage points) when only the highlighted region is kept.",
        ),
        "confidence_increase": _Row(
            M.ConfidenceIncrease,
            "Increase",
            "Percentage of pairs whose cosine similarity rises when only the highlighted region is kept.",
        ),
    },
    "confidence": {
        "confidence_drop@50": _Row(
            M.ConfidenceDrop, "Drop, half kept", "The drop with exactly half of the pixels or words kept, by rank."
        ),
        "confidence_increase@50": _Row(
            M.ConfidenceIncrease,
            "Increase, half kept",
            "The increase with exactly half of the pixels or words kept, by rank.",
        ),
        "top20_removal": _Row(
            M.RemovalDrop,
            "Drop, top fifth removed",
            "Drop in cosine similarity (percentage points) when the highest fifth is removed.",
        ),
    },
    "curves": {
        "insertion": _Row(
            M.InsertionAUC,
            "Insertion AUC",
            "How soon the cosine rises as patches are inserted by rank; 1 is at once. Empty if images score no higher "
            "than their fill.",
        ),
        "deletion": _Row(
            M.DeletionAUC,
            "Deletion AUC",
            "How long the cosine stays high as patches are deleted by rank. Empty if images score no higher than "
            "their fill.",
        ),
    },
    "sensitivity": {
        "prompt_sensitivity": _Row(
            M.RankCorrelation, "Prompt sensitivity", "Rank correlation with the map under the phrase of another pair."
        ),
        "side_sensitivity": _Row(
            M.SideSensitivity,
            "Side sensitivity",
            "Share of the map's mass that moves to the other side when the phrase names it.",
        ),
        "word_laterality": _Row(
            M.WordLaterality,
            "Word laterality",
            "Share of the map of a word of side (left, right) on that side; 0.5 for a map that is even.",
        ),
    },
    "sanity": {
        "sanity": _Row(
            M.RankCorrelation,
            "Weight randomization",
            "Rank correlation with the map while weights are shuffled, block by block.",
        ),
    },
    "mass": {
        "outside_thorax_mass": _Row(
            M.OutsideMass,
            "Mass outside thorax",
            "Share of the map's mass outside lungs and heart: by the masks of the image, or else their usual place.",
        ),
        "border_mass": _Row(
            M.OutsideMass, "Mass at the border", "Share of the map's mass in the outer tenth of the image."
        ),
        "mean_map_mass": _Row(
            M.MapMass,
            "Mean value",
            "Mean of the map. Read it with the confidence drop, which is perfect for a map of all ones.",
        ),
    },
}


METRICS: dict[str, type[Metric]] = {name: row.metric for rows in _GROUPS.values() for name, row in rows.items()}


ANATOMY = {
    "mass": ("Mass", "Share of the map's mass inside the structure."),
    "area": ("Area", "Share of the image's area inside the structure."),
    "mass_ratio": ("Mass / area", "Share of the mass divided by the share of the area; 1 for a map that is even."),
    "peak": ("Peak inside", "Share of maps whose maximum lies inside the structure."),
    "shuffled_mass": ("Mass, shuffled phrases", "The mass on the same images under the phrases of other patients."),
    "mass_gain": ("Mass, gain", "The mass minus that under the phrases of other patients."),
    "part": ("Part", "Share of the mass in disjoint parts: the lungs, the heart outside of them, and the rest."),
}
"""Label and description of the shares of a map in anatomical structures; a key is `mass/left_lung`."""


FINDINGS = "/findings"
"""End of the key of a mean over findings, where each finding counts once."""

PROTOCOL = {
    "protocol/miou": (
        "Protocol mIoU",
        "IoU of map and boxes by the published protocol: mean over the thresholds .1 to .5 of the map on [-1, 1].",
    ),
    "protocol/cnr": ("Protocol CNR", "Signed contrast of box and rest divided by their noise, without a floor."),
    "protocol/pointing_game": ("Protocol pointing game", "Share of maps whose maximum lies in a box."),
    "protocol/pointing_game_near": (
        "Protocol pointing game, tolerant",
        "Share of maps whose maximum lies in a box or within the tolerance of one.",
    ),
}
"""Label and description of the scores of a published protocol; see `matex_pl.benchmark.protocol`."""

AVERAGED = {*_GROUPS["localization"], *PROTOCOL}
"""Metrics that also have a mean over findings."""


def metric_columns(keys: set[str]) -> dict[str, Column]:
    """Columns of metrics such as `cnr`, `insertion/blur` or `mass/left_lung`, in the order of the tables."""
    columns = {}
    for group, rows in _GROUPS.items():
        fills = _FILLS.get(group, ("",))
        # Curves are sorted by metric, then fill. Confidences are sorted by fill, then metric.
        named = product(rows, fills) if group == "curves" else ((name, fill) for fill in fills for name in rows)
        for name, fill in named:
            columns[f"{name}/{fill}" if fill else name] = Column(
                label=rows[name].label,
                group=group,
                higher_is_better=rows[name].metric.higher_is_better,
                description=rows[name].description,
                fill=FILL_NAMES.get(fill, ""),
                percent=group in ("paper", "confidence"),
            )
    for name in _GROUPS["localization"]:
        over_findings = {"group": "findings", "fill": FILL_NAMES["findings"]}
        columns[name + FINDINGS] = columns[name].model_copy(update=over_findings)
    for key, (label, description) in PROTOCOL.items():
        for suffix, mean in {"": "mean over pairs", FINDINGS: FILL_NAMES["findings"]}.items():
            columns[key + suffix] = Column(
                label=label, group="protocol", higher_is_better=True, description=description, fill=mean
            )
    structures = {key.partition("/")[2] for key in keys if key.partition("/")[0] in ANATOMY}
    first = ("left_lung", "right_lung", "heart")
    ordered = [*(name for name in first if name in structures), *sorted(structures - {*first})]
    # One table per structure, and one of the parts.
    places = [(name, structure) for structure in ordered for name in ANATOMY if name != "part"]
    for name, structure in [*places, *(("part", structure) for structure in ordered)]:
        (label, description), words = ANATOMY[name], structure.replace("_", " ")
        words += " outside of the lungs" * ((name, structure) == ("part", "heart"))
        columns[f"{name}/{structure}"] = Column(
            label=f"{label}, {words}",
            group=ANATOMY_GROUP + ("disjoint parts" if name == "part" else words),
            description=description,
        )
    return {key: column for key, column in columns.items() if key in keys}
