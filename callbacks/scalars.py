"""How TensorBoard shows the scalars of `AttributionMetrics`: one chart per scalar, and a text on their meaning."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.loggers import TensorBoardLogger

from matex_pl.callbacks.loggers import log_text
from matex_pl.evaluation.columns import metric_columns

_TEXTS = {
    "mass": "Share of the map's mass in a structure of the image, over images with its mask.",
    "part": "The same for disjoint parts: left lung, right lung, the heart outside of the lungs, and the rest.",
    "consistency_mean": "Mean of the consistency C of MATEX over patches and pairs.",
    "consistency_min": "Smallest consistency C of MATEX. Near 1, the consistency has no effect.",
}


def describe_scalars(loggers: Iterable[Any], tags: Sequence[str], methods: Mapping[str, str], step: int) -> None:
    """Log a text on the scalars, and charts that show all methods of a scalar together.

    The text `attribution/scalars` goes to all loggers that accept texts. The charts are a layout of TensorBoard's tab
    CUSTOM SCALARS.

    Args:
        loggers: Loggers of the trainer.
        tags: Tags of the scalars: `attribution/cnr`, `attribution_center/cnr`, `attribution/cnr/<finding>`.
        methods: Names of the methods' classes by the prefix of their tags: `{"attribution_center": "CenterMap"}`.
        step: Step of the text.
    """
    text = _text(tags, methods)
    for logger in loggers:
        log_text(logger, "attribution/scalars", text, step)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(_layout(tags))


def _layout(tags: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts by category: one per scalar with all methods, and one per method and scalar with all findings or parts."""
    together: dict[str, list[str]] = defaultdict(list)
    findings: dict[str, list[str]] = defaultdict(list)
    structures: dict[str, list[str]] = defaultdict(list)
    for tag in tags:
        prefix, scalar, *finding = tag.split("/", 2)
        chart = f"{scalar}{prefix.removeprefix('attribution').replace('_', ' of ', 1)}" if finding else scalar
        parts = structures if scalar in ("mass", "part") else findings
        (parts if finding else together)[chart].append(tag)
    categories = {
        "attribution": together,
        "attribution per finding": findings,
        "attribution per structure": structures,
    }
    # TensorBoard reads each name as the beginning of a regular expression.
    return {
        name: {chart: ["Multiline", [f"{re.escape(tag)}$" for tag in found]] for chart, found in charts.items()}
        for name, charts in categories.items()
        if charts
    }


def _text(tags: Sequence[str], methods: Mapping[str, str]) -> str:
    """Markdown tables of the methods, and of the scalars with an arrow to the better side."""
    lines = ["| tags | method |", "|---|---|", *(f"| `{prefix}/` | {kind} |" for prefix, kind in methods.items())]
    lines += ["", "| scalar | | meaning |", "|---|---|---|"]
    for name in dict.fromkeys(tag.split("/")[1] for tag in tags):
        base = name.removeprefix("text_")
        column = metric_columns({base}).get(base)
        arrow = {True: "↑", False: "↓", None: ""}[column.higher_is_better if column else None]
        meaning = column.description if column else _TEXTS[name]
        if base != name:
            meaning = f"For words: {meaning[0].lower()}{meaning[1:]}"
        lines.append(f"| `{name}` | {arrow} | {meaning} |")
    return "\n".join(lines)
