"""The nine findings: their selection for an image, and their changes to the normal chest.

A finding that fills air is a cover: a weight in [0, 1] that blends the lung with another opacity. Its boxes are
computed from this weight and are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from matex_pl.data.phantom.canvas import Canvas, Field, Points, closed_curve, ramp, ribbon, ribbons
from matex_pl.data.phantom.thorax import HEART_LEVEL, SIDES, SIGN, Build, Thorax, lung_outline

FINDINGS = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "lung opacity",
    "pleural effusion",
    "pneumonia",
    "pneumothorax",
    "nodule",
)
SIZES = ("small", "moderate", "large")

_ZONES: dict[str, tuple[tuple[str, float], ...]] = {
    "atelectasis": (("lower", 0.75), ("mid", 0.25)),
    "cardiomegaly": (("cardiac", 1.0),),
    "consolidation": (("upper", 0.34), ("mid", 0.33), ("lower", 0.33)),
    "edema": (("hilar", 1.0),),
    "lung opacity": (("upper", 0.34), ("mid", 0.33), ("lower", 0.33)),
    "pleural effusion": (("costophrenic", 0.4), ("lower", 0.4), ("whole", 0.2)),
    "pneumonia": (("upper", 0.3), ("mid", 0.3), ("lower", 0.4)),
    "pneumothorax": (("upper", 0.6), ("whole", 0.4)),
    "nodule": (("upper", 0.34), ("mid", 0.33), ("lower", 0.33)),
}
_SHARE_BILATERAL = {"atelectasis": 0.25, "pleural effusion": 0.25, "pneumonia": 0.12, "edema": 1.0}

# Thirds of a lung that a finding fills, without room for another finding; findings in other zones fill their zone.
_FILLS: dict[str, tuple[str, ...]] = {
    "hilar": ("upper", "mid", "lower"),
    "whole": ("upper", "mid", "lower"),
    "costophrenic": ("lower",),
}
_ZONE_SHARES = {"upper": (0.12, 0.30), "mid": (0.40, 0.60), "lower": (0.68, 0.82)}


@dataclass(frozen=True)
class Plan:
    """A finding before drawing: name, side of the patient, zone, and size in the words of a report."""

    name: str
    side: str
    zone: str
    size: str

    @property
    def sides(self) -> tuple[str, ...]:
        """Sides of the lungs with the finding."""
        return SIDES if self.side == "both" else (self.side,) if self.side else ()

    @property
    def severity(self) -> float:
        """Severity by size: 0, 0.5 or 1."""
        return SIZES.index(self.size) / 2


@dataclass(frozen=True)
class Change:
    """Change of an image by a finding; all fields are `(size, size)`.

    Args:
        cover: Weight of `level` in [0, 1].
        level: Opacity where `cover` is 1.
        added: Opacity that is added afterwards.
        marks: One field per box. The box encloses the pixels above a share of the field's peak.
    """

    cover: Field
    level: float
    added: Field | None
    marks: tuple[Field, ...]


Painter = Callable[[Canvas, Thorax, Plan, np.random.Generator], Change]
SidePaint = Callable[[Canvas, Thorax, Plan, str, np.random.Generator], Field]


def plan_findings(rng: np.random.Generator) -> tuple[Plan, ...]:
    """One to three findings (70, 22, 8 %) that do not hide each other; the first is uniform over the nine names."""
    count = int(rng.choice(3, p=(0.70, 0.22, 0.08))) + 1
    plans = [_sample_plan(str(rng.choice(FINDINGS)), rng)]
    for _ in range(40):
        if len(plans) == count:
            break
        candidate = _sample_plan(str(rng.choice(FINDINGS)), rng)
        if all(_fit_on_one_image(candidate, plan) for plan in plans):
            plans.append(candidate)
    return tuple(plans)


def _sample_plan(name: str, rng: np.random.Generator) -> Plan:
    zones, shares = zip(*_ZONES[name], strict=True)
    zone = str(rng.choice(zones, p=shares))
    side = "both" if rng.random() < _SHARE_BILATERAL.get(name, 0.0) else str(rng.choice(SIDES))
    size = str(rng.choice(SIZES))
    if name == "pleural effusion":
        size = {"costophrenic": "small", "lower": "moderate", "whole": "large"}[zone]
        side = str(rng.choice(SIDES)) if zone == "whole" else side
    if name == "atelectasis" and side == "both":
        zone = "lower"
    return Plan(name, "" if name == "cardiomegaly" else side, zone, size)


def _fit_on_one_image(a: Plan, b: Plan) -> bool:
    if a.name == b.name:
        return False
    names = {a.name, b.name}
    if "cardiomegaly" in names:
        lung = b if a.name == "cardiomegaly" else a
        return not ("left" in lung.sides and lung.zone in ("mid", "lower", "whole"))
    if names == {"edema", "pleural effusion"}:
        return "whole" not in (a.zone, b.zone)
    return not (set(a.sides) & set(b.sides) and _thirds(a) & _thirds(b))


def _thirds(plan: Plan) -> set[str]:
    # A consolidated middle lobe hangs down into the lower third.
    hangs = {"lower"} if (plan.name, plan.zone) == ("consolidation", "mid") else set()
    return hangs | set(_FILLS.get(plan.zone, (plan.zone,)))


def reshape_build(build: Build, plans: Sequence[Plan], rng: np.random.Generator) -> Build:
    """The patient with organs changed by findings: a large heart, a dome raised by volume loss."""
    ratio, height, pull = rng.uniform(0.0, 0.04), rng.uniform(0.02, 0.05), rng.uniform(0.03, 0.045)
    for plan in plans:
        if plan.name == "cardiomegaly":
            build = replace(
                build,
                heart_ratio=0.57 + 0.05 * plan.severity + ratio,
                heart_height=build.heart_height + height + 0.02 * plan.severity,
            )
        if plan.name == "atelectasis":
            dome = {s: y - (pull + 0.02 * plan.severity) * (s in plan.sides) for s, y in build.dome.items()}
            build = replace(build, dome=dome)
    return build


def _per_side(paint: SidePaint, *, level: float = HEART_LEVEL, to_the_rim: bool = False) -> Painter:
    """Painter of a finding that covers air, from the painter of its weight in one lung."""

    def painter(canvas: Canvas, thorax: Thorax, plan: Plan, rng: np.random.Generator) -> Change:
        weights = [paint(canvas, thorax, plan, side, rng) for side in plan.sides]
        marks = tuple(weight * thorax.air[side] for weight, side in zip(weights, plan.sides, strict=True))
        # Dense filling extends through the soft rim of the lung, which would otherwise be a dark line.
        room = [np.minimum(thorax.air[side] * np.float32(8 if to_the_rim else 1), 1) for side in plan.sides]
        cover = np.maximum.reduce([weight * space for weight, space in zip(weights, room, strict=True)])
        return Change(cover, level, None, marks)

    return painter


def _zone_point(build: Build, plan: Plan, side: str, rng: np.random.Generator, depth: tuple[float, float]) -> Points:
    share = rng.uniform(*_ZONE_SHARES[plan.zone])
    return build.lung_point(side, share, rng.uniform(*depth) + _outward_shift(plan, side))


def _outward_shift(plan: Plan, side: str) -> float:
    """Shift of depth past the heart, which covers the inner half of the left lower lung."""
    return 0.13 if side == "left" and plan.zone == "lower" else 0.0


def _cardiomegaly(canvas: Canvas, thorax: Thorax, plan: Plan, rng: np.random.Generator) -> Change:
    # The chest is drawn with the large heart; there is nothing to add.
    return Change(np.zeros_like(thorax.heart), 0.0, None, (thorax.heart,))


def _consolidation(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """A lobe or a wedge of it: dense, even, one straight border on a fissure, dark bronchi inside."""
    build = thorax.build
    outward = canvas.x * np.float32(SIGN[side])
    waves = canvas.clouds(rng, 12)
    share = {"upper": 0.36, "mid": 0.42, "lower": 0.66}[plan.zone] + rng.uniform(-0.03, 0.03)
    slope = rng.uniform(-0.12, 0.12) + (0.45 if plan.zone == "lower" else 0.0)
    fissure = np.float32(build.apex + share * build.height(side)) + (outward - np.float32(0.2)) * np.float32(slope)
    past = (fissure - canvas.y) if plan.zone == "upper" else (canvas.y - fissure)
    reach = (0.11 + 0.06 * plan.severity) if plan.zone != "lower" else 0.3
    fading = np.float32(reach) + waves * np.float32(0.012) - past
    inner = np.float32(rng.uniform(0.02, 0.09) * (1 - plan.severity)) + waves * np.float32(0.01)
    outer = np.float32(build.half_width * rng.uniform(0.82, 1.1)) + waves * np.float32(0.01)
    block = ramp(past, 0.007) * ramp(fading, 0.03) * ramp(outward - inner, 0.025) * ramp(outer - outward, 0.03)
    bronchi = canvas.soften(canvas.fill(_bronchi(build, plan, side, rng)), 0.003)
    even = np.float32(0.82 + 0.1 * plan.severity) + canvas.clouds(rng, 24) * np.float32(0.03)
    return np.clip(block * even - block * bronchi * np.float32(0.45), 0, 1)


def _bronchi(build: Build, plan: Plan, side: str, rng: np.random.Generator) -> Points:
    """Outlines `(4, 14, 2)` of dark branches from the hilum into the zone."""
    t = np.linspace(0, 1, 7)[:, None]
    shares = np.linspace(*_ZONE_SHARES[plan.zone], 4) + rng.normal(0, 0.02, 4)
    tips = np.stack([build.lung_point(side, share, rng.uniform(0.6, 0.8)) for share in shares])
    start = build.hilum_point(side)
    paths = start + (tips - start)[:, None] * t + rng.normal(0, 0.012, (4, 1, 2)) * np.sin(np.pi * t)
    return ribbons(paths, np.broadcast_to(0.011 - 0.006 * t[:, 0], paths.shape[:-1]))


def _lung_opacity(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """One smooth veil through which vessels still show."""
    center = _zone_point(thorax.build, plan, side, rng, (0.42, 0.66))
    wide = 0.072 + 0.024 * plan.severity
    veil = canvas.bump(center, (wide, wide * rng.uniform(0.75, 1.05)), rng.uniform(-0.6, 0.6))
    return np.minimum(veil * np.float32(1.25), 1) * np.float32(rng.uniform(0.54, 0.66))


def _pneumonia(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """Fluffy patches that partly run together within one zone."""
    build = thorax.build
    center = _zone_point(build, plan, side, rng, (0.45, 0.62))
    count = 7 + 2 * SIZES.index(plan.size)
    spots = center + np.clip(rng.normal(0, 1, (count, 2)), -1.6, 1.6) * (0.052, 0.044)
    radii = rng.uniform(0.014, 0.030, count)
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    ragged = radii[:, None] * rng.uniform(0.6, 1.35, (count, 8))
    knots = spots[:, None] + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * ragged[..., None]
    patches = canvas.soften(canvas.fill([closed_curve(k, 3) for k in knots]), 0.010)
    haze = canvas.soften(patches, 0.025)
    mottle = np.float32(0.85) + canvas.clouds(rng, 40) * np.float32(0.16)
    fluff = np.clip(patches * mottle * np.float32(0.85) + haze * np.float32(0.3), 0, 1)
    return fluff * np.float32(0.85 + 0.1 * plan.severity)


def _atelectasis(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """Two or three flat bands."""
    build = thorax.build
    share = rng.uniform(0.66, 0.74) if plan.zone == "lower" else rng.uniform(0.44, 0.56)
    middle = build.lung_point(side, share, rng.uniform(0.56, 0.66) + _outward_shift(plan, side))
    half = 0.068 + 0.025 * plan.severity + rng.uniform(0, 0.02)
    turn = SIGN[side] * rng.uniform(-0.3, 0.4)
    t = np.linspace(-1, 1, 7)[:, None]
    outlines = []
    for row in range(2 + (plan.size == "large")):
        offset = np.array([rng.normal(0, 0.02), (row - 0.6) * rng.uniform(0.035, 0.05)])
        angle = turn + rng.normal(0, 0.06)
        axis = np.array([np.cos(angle), np.sin(angle)]) * half * rng.uniform(0.6, 1.05)
        path = middle + offset + t * axis + (1 - t**2) * (0, rng.normal(0, 0.007))
        outlines.append(ribbons(path, rng.uniform(0.012, 0.019) * (1 - 0.7 * t[:, 0] ** 2)))
    bands = canvas.soften(canvas.fill(outlines), 0.0045)
    return np.minimum(bands * np.float32(0.8 + 0.25 * plan.severity), 0.9)


def _edema(canvas: Canvas, thorax: Thorax, plan: Plan, rng: np.random.Generator) -> Change:
    """Haze around both hila like the wings of a butterfly, and short lines (Kerley's) at the lower chest wall."""
    strength = np.float32(0.58 + 0.14 * plan.severity)
    mottle = np.float32(0.95) + canvas.clouds(rng, 26) * np.float32(0.10)
    marks: list[Field] = []
    lines: list[Points] = []
    for side in SIDES:
        root = thorax.build.hilum_point(side) + np.array([SIGN[side] * 0.055, 0.02 + rng.normal(0, 0.008)])
        wing = canvas.bump(root, (0.062 + 0.012 * plan.severity, 0.10 + 0.02 * plan.severity), -0.3 * SIGN[side])
        marks.append(np.clip(wing * np.float32(1.3), 0, 1) * strength * mottle * thorax.air[side])
        for share in np.linspace(0.70, 0.90, 5) + rng.normal(0, 0.009, 5):
            outer = thorax.build.lung_point(side, share, 0.985)
            inner = outer - (SIGN[side] * rng.uniform(0.025, 0.055), rng.normal(0, 0.005))
            lines.append(ribbon(np.stack([outer, inner]), 0.004))
    kerley = canvas.fill(lines) * np.float32(0.11) * (thorax.lungs["right"] + thorax.lungs["left"])
    return Change(np.clip(marks[0] + marks[1], 0, 1), HEART_LEVEL, kerley, tuple(marks))


def _effusion(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """Fluid that fills the angle, with a surface that climbs along the chest wall."""
    build = thorax.build
    above = {"small": -0.035, "moderate": 0.035, "large": 0.17}[plan.size]
    level = np.float32(build.dome[side] - above - rng.uniform(0, 0.03))
    climb = np.float32(rng.uniform(0.07, 0.10) + 0.02 * plan.severity)
    outward = np.clip(canvas.x * np.float32(SIGN[side] / build.half_width), 0, 1)
    surface = level - climb * outward**4
    fluid = ramp(canvas.y - surface, 0.010)
    # A little fluid stays in the lateral angle.
    return fluid * ramp(outward - 0.5, 0.1) if plan.size == "small" else fluid


def _pneumothorax(canvas: Canvas, thorax: Thorax, plan: Plan, rng: np.random.Generator) -> Change:
    """Black air without vessels outside a thin pleural line."""
    build, side = thorax.build, plan.side
    gap = 0.05 + 0.035 * plan.severity + rng.uniform(0, 0.015)
    shares = np.array([0.0, 0.035, 0.14, 0.32, 0.55, 0.80, 0.97, 1.0])
    profile = 1 - 0.45 * shares if plan.zone == "whole" else np.clip(1 - shares / 0.5, 0, 1)
    outline = lung_outline(build, side, gap * profile)
    lung = canvas.fill([outline])
    away = ramp(canvas.x * np.float32(SIGN[side]) - 0.09, 0.025)
    rim = np.minimum(thorax.lungs[side] * (1 - lung), thorax.air[side]) * away
    # Where lung and wall still touch, their soft edges leave a sliver of a quarter.
    rim = np.clip(rim * np.float32(1.5) - np.float32(0.5), 0, 1)
    # The outline starts at the apex and runs down the wall, six points per knot.
    free = outline[: 6 * (6 if plan.zone == "whole" else 4)]
    edge = canvas.soften(canvas.fill([ribbon(free, 0.006)]), 0.0015) * thorax.air[side]
    squeezed = lung * thorax.air[side] * np.float32(0.05)
    return Change(rim * np.float32(0.95), 0.10, edge * np.float32(0.24) + squeezed, (rim,))


def _nodule(canvas: Canvas, thorax: Thorax, plan: Plan, side: str, rng: np.random.Generator) -> Field:
    """One small round dense spot in clear lung, away from the heart's edge."""
    clear = canvas.soften(thorax.air[side], 0.02)
    candidates = [_zone_point(thorax.build, plan, side, rng, (0.45, 0.76)) for _ in range(6)]
    center = max(candidates, key=lambda point: canvas.value_at(clear, point))
    radius = 0.024 + 0.011 * plan.severity + rng.uniform(0, 0.005)
    angles = np.linspace(0, 2 * np.pi, 13)[:-1]
    ragged = radius * rng.uniform(0.9, 1.1, 12)
    knots = center + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * ragged[:, None]
    return canvas.soften(canvas.fill([closed_curve(knots, 3)]), 0.0055) * np.float32(rng.uniform(0.75, 0.95))


PAINTERS: dict[str, Painter] = {
    "atelectasis": _per_side(_atelectasis),
    "cardiomegaly": _cardiomegaly,
    "consolidation": _per_side(_consolidation, to_the_rim=True),
    "edema": _edema,
    "lung opacity": _per_side(_lung_opacity),
    "pleural effusion": _per_side(_effusion, level=HEART_LEVEL + 0.06, to_the_rim=True),
    "pneumonia": _per_side(_pneumonia),
    "pneumothorax": _pneumothorax,
    "nodule": _per_side(_nodule),
}
"""Painters by finding. A painter draws the change of a chest by a planned finding."""
