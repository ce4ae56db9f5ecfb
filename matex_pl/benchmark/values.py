"""What each study adds to the metrics of a row, as it is kept on disk, and the scores that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from matex_pl.benchmark.intervals import Detections, Score, Sums, estimate

NO_SCORE: dict[str, Any] = {"value": None, "low": None, "high": None, "n": 0}


@dataclass
class Values:
    """What the n studies add to the metrics of one modality of a row.

    Args:
        sums: By metric.
        curves: By name as `insertion/blur`: shares `(S + 1,)` and scores `(S + 1, n)`.
        threshold: Of the IoU, chosen on validation.
        detections: For the average precision, if boxes were looked for.
        stages: Names of the stages of the randomisation.
        correlation: `(stages, m)` of the maps of each with the original ones, over the first m studies.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    curves: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    threshold: float | None = None
    detections: Detections | None = None
    stages: list[str] = field(default_factory=list)
    correlation: Tensor | None = None

    def add_sanity(self, stages: Sequence[tuple[str, Tensor]], number: int) -> None:
        """The curve of the sanity check, and its mean over the stages as a metric of the pairs that took part.

        Args:
            stages: Name and `(m,)` rank correlations of each.
            number: n.
        """
        self.stages = [name for name, _ in stages]
        self.correlation = torch.stack([found for _, found in stages])
        mean = torch.full((number,), torch.nan)
        mean[: self.correlation.shape[1]] = self.correlation.nanmean(0)
        self.sums["sanity"] = Sums.of(mean)

    def scores(self, studies: Tensor, drawn: Tensor) -> dict[str, dict[str, Any]]:
        """Every metric with its interval.

        Args:
            studies: `(n,)` bool, the studies that count.
            drawn: `(R, n)` of `draw_patients`.
        """
        sums = {name: sums.among(studies) for name, sums in self.sums.items()}
        found: dict[str, Score] = dict(sums)
        if self.detections is not None:
            found["ap50"] = self.detections.among(studies)
        scores = {name: estimate(one.score()[0], one.score(drawn), one.count) for name, one in found.items()}
        return scores | {name: NO_SCORE for name in self.curves if not sums[name].spans(drawn)}

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as tensors by name, and the rest as plain types."""
        tensors = {
            f"sums/{name}/{part}": side for name, sums in self.sums.items() for part, side in asdict(sums).items()
        }
        tensors |= {f"curves/{name}/share": shares for name, (shares, _) in self.curves.items()}
        tensors |= {f"curves/{name}/score": scores for name, (_, scores) in self.curves.items()}
        if self.detections is not None:
            tensors |= {f"detections/{name}": column for name, column in vars(self.detections).items()}
        if self.correlation is not None:
            tensors["correlation"] = self.correlation
        return tensors, {"threshold": self.threshold, "stages": self.stages}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Values:
        """What `packed` was made of."""
        sums, curves = _nested(tensors, "sums/"), _nested(tensors, "curves/")
        detections = {name[11:]: column for name, column in tensors.items() if name.startswith("detections/")}
        return cls(
            sums={name: Sums(**parts) for name, parts in sums.items()},
            curves={name: (parts["share"], parts["score"]) for name, parts in curves.items()},
            threshold=about["threshold"],
            detections=Detections(**detections) if detections else None,
            stages=about["stages"],
            correlation=tensors.get("correlation"),
        )


def _nested(tensors: dict[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    """The tensors `<kind><name>/<part>` by name and part."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith(kind):
            name, _, part = path.removeprefix(kind).rpartition("/")
            found.setdefault(name, {})[part] = value
    return found
