"""Compared methods and the controls of every comparison."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matex_pl.attribution import AttributionMethod, CenterMap, Matex, PriorOnly, RandomMap
from matex_pl.attribution.controls import Control
from matex_pl.attribution.shipped import load_method, method_names
from matex_pl.clip.model import Clip
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.tensors import fingerprint
from matex_pl.metrics.functional import box_masks

# Numbers of repeated forwards by class under the `quick` budget, fewer than the defaults of the methods.
QUICK: dict[str, dict[str, int]] = {"Rise": {"masks": 500}, "KernelShap": {"samples": 300}}
BUDGETS = ("quick", "full")
# Methods that take many minutes per pair are compared only if they are named.
SLOW = ("submodular_regions",)
REPEATED = {"Rise": "masks", "KernelShap": "samples", "SubmodularRegions": "regions"}
REPEATED |= {"IntegratedGradients": "steps", "WordRegions": "steps"}


@dataclass(frozen=True)
class MethodEntry:
    """A method in a comparison.

    Args:
        name: Name in the tables.
        method: Attribution method.
        control: Whether the method is a baseline: maps without the model, or MATEX without one of its parts.
        note: Remark for the tables.
    """

    name: str
    method: AttributionMethod
    control: bool = False
    note: str = ""


class _MeanBox(Control):
    """Control that shows, for each place, the share of training images with a box of the same finding there.

    Args:
        finding_of: Finding of each phrase; a phrase without a finding gets a map of zeros.
        means: Mean box mask `(H, W)` of each finding.
    """

    def __init__(self, finding_of: Mapping[str, str], means: Mapping[str, Tensor]) -> None:
        self.finding_of = finding_of
        self.means = means

    @property
    def settings(self) -> dict[str, Any]:
        """Hashes that identify these boxes, because the boxes themselves are as many as the training images."""
        sums = {finding: mean.double().cumsum(0).sum(1).tolist() for finding, mean in self.means.items()}
        return {"boxes": fingerprint(sums), "findings": sorted(self.means), "phrases": fingerprint(self.finding_of)}

    def _draw(self, clip: Clip, images: Tensor, phrases: Sequence[str], content_box: Tensor | None) -> Tensor:
        blank = torch.zeros(clip.image_size)
        maps = [self.means.get(self.finding_of.get(phrase, ""), blank) for phrase in phrases]
        return torch.stack(maps).to(images.device)


def mean_box_row(
    train: Sequence[ImageTextBatch], compared: Sequence[ImageTextBatch], size: tuple[int, int]
) -> list[MethodEntry]:
    """Entry of the mean box of each finding over training pairs; an empty list if no training pair has a box.

    Args:
        train: Training pairs.
        compared: Pairs of the comparison.
        size: Height and width of the frame.
    """
    means = mean_boxes(train, size)
    pairs = [pair for batch in compared for pair in zip(batch["phrase"], batch["finding"], strict=True)]
    count = sum(bool(len(boxes)) for batch in train for boxes in batch["boxes"])
    note = f"mean box of the given finding over {count} training pairs, no model"
    return [MethodEntry(MEAN_BOX, _MeanBox(dict(pairs), means), True, note)] if means else []


def mean_boxes(batches: Sequence[ImageTextBatch], size: tuple[int, int]) -> dict[str, Tensor]:
    """Mean box mask `(H, W)` of each finding over training pairs, scaled to a maximum of 1."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(size))
    for batch in batches:
        for finding, mask in zip(batch["finding"], box_masks(batch["boxes"], size), strict=True):
            if finding and mask.any():
                sums[finding] += mask
    return {finding: mask / mask.max() for finding, mask in sums.items()}


def compared_rows(methods: Sequence[str] | None, budget: str) -> list[MethodEntry]:
    """Entries of the requested methods and of the controls, which are always included.

    Args:
        methods: Names of shipped methods and YAML files; by default all shipped methods but the slow ones.
        budget: `quick` or `full`.

    Raises:
        ValueError: If a method is unknown, or named twice.
    """
    names = [name for name in method_names() if name not in SLOW] if methods is None else list(methods)
    asked = [method_row(name, load_method(name), budget) for name in names]
    rows = [row for row in asked if not isinstance(row.method, Control)]
    versions = {row.name: row.method for row in rows if isinstance(row.method, Matex)}
    rows.sort(key=lambda row: row.name not in versions)
    if MATEX in versions and PRINTED not in versions:
        rows.insert(1, MethodEntry(PRINTED, Matex.paper(), note="equations and numbers of the paper"))
    always = [row for row in controls(versions.get(MATEX, Matex.recommended())) if row.name != BLURRED]
    always[1:1] = [_without_prior(name, matex) for name, matex in versions.items() if name not in (MATEX, PRINTED)]
    settings = {row.name: row.method.settings for row in always}
    rows += always
    rows += [row for row in asked if isinstance(row.method, Control) and settings.get(row.name) != row.method.settings]
    counts = Counter([*(row.name for row in rows), MEAN_BOX])
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"Two methods have the name {twice[0]!r}. Name each method once; a YAML file gets its file name."
        )
    return rows


MATEX, PRINTED, MEAN_BOX = "MATEX", "MATEX, as printed", "Mean box"
WITHOUT_PRIOR, USUAL_PLACES, PRIOR = "MATEX, delta = 0", "MATEX, usual places", "PriorOnly"
RANDOM, BLURRED, CENTER = "RandomMap", "RandomMap, blurred", "CenterMap"
_BLUR = 1.5


def controls(matex: Matex | None) -> list[MethodEntry]:
    """Controls of a comparison: variants of MATEX and its prior, if MATEX is compared, and maps without a model.

    `matex benchmark` leaves out the blurred noise, and `matex roar` the usual places.
    """
    entries = [
        MethodEntry(RANDOM, RandomMap(), True, "noise"),
        MethodEntry(BLURRED, RandomMap(blur=_BLUR), True, "noise as smooth as the maps of methods"),
        MethodEntry(CENTER, CenterMap(), True, "center of the frame"),
    ]
    if matex is None:
        return entries
    usual = Matex(**matex.settings | {"knowledge_prior": True})
    prior = PriorOnly(matex.prior_shape, matex.laterality, matex.knowledge_prior, matex.prior_frame)
    return [
        _without_prior(MATEX, matex),
        MethodEntry(USUAL_PLACES, usual, True, "a finding without a place gets its usual one: leakage by design"),
        MethodEntry(PRIOR, prior, True, "regions that the phrase names, no model"),
        *entries,
    ]


def _without_prior(name: str, matex: Matex) -> MethodEntry:
    return MethodEntry(f"{name}, delta = 0", Matex(**matex.settings | {"delta": 0.0}), True, "without its prior")


def method_row(name: str, method: AttributionMethod, budget: str) -> MethodEntry:
    """Entry of a method under its name in the tables: the class of a shipped method, the file name of a YAML.

    Args:
        name: Name or path for `load_method`.
        method: Attribution method.
        budget: `quick` or `full`.
    """
    kind = type(method).__name__
    if isinstance(method, Matex) and method.settings == Matex.paper().settings:
        title = PRINTED
    elif name in method_names():
        quick = QUICK.get(kind, {}) if budget == "quick" else {}
        method = type(method)(**method.settings | quick) if quick else method
        title = MATEX if kind == "Matex" else kind
    else:
        title = Path(name).stem
    repeated = [f"{getattr(method, REPEATED[kind])} {REPEATED[kind]}"] if kind in REPEATED else []
    fill = [f"fill: {method.fill.replace('_', ' ')}"] if hasattr(method, "fill") else []
    return MethodEntry(title, method, note=", ".join(repeated + fill))
