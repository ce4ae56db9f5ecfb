"""Results of a benchmark and of ROAR+ as typed records, read from their `results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from matex_pl.files import read_json
from matex_pl.visualization.draw import single_line

BENCHMARK_FORMAT, ROAR_FORMAT = 2, 1
MODALITIES = {"image": "image", "text": "phrase"}
FEATURED = "Matex"
# Start of the groups of metrics of anatomical structures.
ANATOMY_GROUP = "Anatomy: "
# Significance level of the p-values after Holm's correction.
LEVEL = 0.05

R = TypeVar("R", bound="Results")
_CLASS: Any = Field(default="", validation_alias="class", serialization_alias="class")


class Record(BaseModel):
    """Base class of the parts of a results file; null stands for the default."""

    model_config = ConfigDict(frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return field.get_default(call_default_factory=True) if value is None and not field.is_required() else value

    def plain(self) -> dict[str, Any]:
        """Record as plain types, without fields that were not given."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def to_json(self) -> str:
        """Record as the text of its file."""
        return json.dumps(self.plain(), indent=1, allow_nan=False)


class Score(Record):
    """A value with its 95 % interval and the number of its pairs."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Difference(Record):
    """Difference of a method from a control: 95 % interval, number of pairs or repeats, Holm's p-value of a test."""

    row: str
    against: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    p_holm: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the difference has an interval."""
        return None not in (self.difference, self.low, self.high)

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def is_better(self, higher_is_better: bool | None) -> bool:
        """Whether the row is significantly better than the control; False for a metric without a better direction."""
        if self.difference is None or higher_is_better is None:
            return False
        return self.is_sure and (self.difference > 0) == higher_is_better


class Comparison(Difference):
    """Difference in one metric of a benchmark."""

    metric: str


class PairedTest(Difference):
    """Difference in ROAR+ at a fraction; None for the mean over the fractions."""

    modality: str
    fraction: float | None = None

    @property
    def is_sure(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_holm is not None and self.p_holm < LEVEL


class Metric(Record):
    """A metric of the tables; some have no better direction."""

    label: str = ""
    # One of `report.benchmark.GROUPS`, `paper`, or the title of a table of anatomical structures.
    group: str = ""
    higher_is_better: bool | None = None
    description: str = ""
    # Replacement of removed pixels, or the tokens of a phrase that count.
    fill: str = ""
    # Whether values are percent of pairs or percentage points of cosine.
    percent: bool = False

    @property
    def name(self) -> str:
        """Label with the fill, if there is one."""
        return f"{self.label} ({self.fill})" if self.fill else self.label

    @property
    def arrow(self) -> str:
        """Arrow of the better direction, with a no-break space before it; empty without a direction."""
        return {None: "", True: "\N{NO-BREAK SPACE}↑", False: "\N{NO-BREAK SPACE}↓"}[self.higher_is_better]


class Curve(Record):
    """Mean score `score[i]` over the pairs at the share `share[i]` of patches."""

    share: list[float] = []
    score: list[float | None] = []


class SanityCurve(Record):
    """Mean rank correlation with the original maps after each stage of the weight randomization."""

    stages: list[str] = []
    correlation: list[float | None] = []


class Method(Record):
    """A method or control and the modality of its maps; `error` is the reason for not supporting the model."""

    name: str
    modality: Literal["image", "text"]
    control: bool = False
    method_class: str = _CLASS
    settings: dict[str, Any] = {}
    note: str = ""
    key: str = ""
    error: str = ""


class MethodScores(Method):
    """Scores of a method by metric, and by finding and metric; `threshold` is that of the IoU.

    `quartiles` has the median of the pairs of a finding as value, and the quartiles as ends.
    """

    seconds_per_pair: float | None = None
    threshold: float | None = None
    scores: dict[str, Score] = {}
    per_finding: dict[str, dict[str, Score]] = {}
    quartiles: dict[str, dict[str, Score]] = {}
    curves: dict[str, Curve] = {}
    sanity_curve: SanityCurve = SanityCurve()


class RoarPoint(Record):
    """ROAR+ at a fraction: mean and deviation over the repeats, and dropped patches or tokens per pair."""

    fraction: float = 0.0
    units: float | None = None
    value: float | None = None
    std: float | None = None
    repeats: list[float | None] = []


class RoarMethod(Method):
    """ROAR+ of a method at each fraction, and the mean over the fractions."""

    points: list[RoarPoint] = []
    mean: RoarPoint = RoarPoint()

    def point(self, fraction: float) -> RoarPoint:
        """Point at a fraction; an empty point if there is none."""
        return next((point for point in self.points if math.isclose(point.fraction, fraction)), RoarPoint())


class Model(Record, extra="allow"):
    """The explained model: hash of its `weights` for a benchmark, of the `explained` and `start` weights for ROAR+."""

    checkpoint: str = ""
    weights: str = ""
    explained: str = ""
    start: str = ""
    image_size: list[int] = []
    grid: list[int] = []


class Data(Record, extra="allow"):
    """Pairs of the results."""

    data_class: str = _CLASS
    split: str = ""
    pairs: int | None = None
    patients: int | None = None
    boxed: int | None = None
    findings: dict[str, int] = {}
    fingerprint: str = ""
    train_pairs: int | None = None
    val_pairs: int | None = None


class Protocol(Record):
    """Published protocol that scored the maps in addition, see `benchmark.protocol`; without a name there is none."""

    name: str = ""
    smooth_sigma: float = 0.0
    prune_phrases: bool = False
    size: int = 0
    kept: float = 1.0
    tolerance: float = 0.0


class RoarSettings(Record, extra="allow"):
    """Protocol and fine-tuning of ROAR+."""

    fractions: list[float] = []
    repeats: int | None = None
    epochs: int | None = None
    fill: str = ""
    finetune: str = ""


class CleanRun(Record):
    """A fine-tuning on whole pairs."""

    repeat: int
    loss: float | None = None
    metrics: dict[str, float | None] = {}


class FailedRun(Record):
    """A fine-tuning that ended with an error."""

    run: str = ""
    error: str = ""
    log: str = ""


class RunTime(Record):
    """Planned and finished runs, their seconds, and the share of these outside training steps."""

    runs: int | None = None
    done: int | None = None
    seconds: float | None = None
    other_share: float | None = None


class Results(Record):
    """Fields that both kinds of results share."""

    created: str = ""
    model: Model = Model()
    data: Data = Data()
    seed: int | None = None
    versions: dict[str, str] = {}
    machine: str = ""


class BenchmarkResult(Results):
    """Content of the `results.json` of `matex benchmark`."""

    format: Literal[2]
    settings: dict[str, Any] = {}
    protocol: Protocol = Protocol()
    forward_seconds_per_pair: float | None = None
    metrics: dict[str, Metric] = {}
    rows: list[MethodScores] = []
    comparisons: list[Comparison] = []

    def methods(self, modality: str) -> list[MethodScores]:
        """Measured rows of a modality."""
        return [row for row in self.rows if row.modality == modality and not row.error]


class RoarResult(Results):
    """Content of the `results.json` of `matex roar`."""

    kind: Literal["roar"]
    format: Literal[1]
    settings: RoarSettings = RoarSettings()
    rows: list[RoarMethod] = []
    clean: list[CleanRun] = []
    tests: list[PairedTest] = []
    refused: dict[str, str] = {}
    failed: list[FailedRun] = []
    time: RunTime = RunTime()

    def methods(self, modality: str) -> list[RoarMethod]:
        """Measured rows of a modality, MATEX first and controls last."""
        rows = [row for row in self.rows if row.modality == modality and not row.error]
        return sorted(rows, key=lambda row: (row.control, row.method_class != FEATURED))

    @property
    def modalities(self) -> list[str]:
        """Modalities with a measured row."""
        return [modality for modality in MODALITIES if self.methods(modality)]

    def fractions(self, rows: Sequence[RoarMethod]) -> list[float]:
        """All fractions, in ascending order."""
        return sorted({*self.settings.fractions, *(point.fraction for row in rows for point in row.points)})


def parse(kind: type[R], data: Mapping[str, Any], source: str = "results.json") -> R:
    """Record of plain data, with text on one line and null for NaN; `source` names the file in errors.

    Raises:
        ValueError: If a key is missing or has a value of another type or format; the message names the key.
    """
    try:
        return kind.model_validate(clean(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        value = "missing" if first["type"] == "missing" else f"{first['input']!r:.60}"
        command = "matex roar" if kind is RoarResult else "matex benchmark"
        raise ValueError(
            f"The file {source} is not a results.json of this version's `{command}`: {key} is {value} "
            f"({first['msg']}). Run `{command}` again; finished work is read from disk."
        ) from None


def read(kind: type[R], path: Path) -> R:
    """Record of a results file.

    Raises:
        ValueError: If the file is damaged, or as in `parse`.
    """
    return parse(kind, read_json(path), str(path))


def clean(value: Any) -> Any:
    """Plain data with all text as `single_line`, and null for NaN and Inf."""
    if isinstance(value, str):
        return single_line(value)
    if isinstance(value, Mapping):
        return {clean(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
