"""The normal chest on a frontal radiograph: its random build, and its layers.

Opacity ranges from 0 (air around the patient, black) to about 1 (bone over abdomen, white). Sides are the patient's: in
the body's frame the right lung has negative x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from matex_pl.data.phantom.canvas import (
    Canvas,
    Field,
    Floats,
    Mask,
    Points,
    closed_curve,
    open_curve,
    ramp,
    ribbon,
    ribbons,
)

SIDES = ("right", "left")
SIGN = {"right": -1.0, "left": 1.0}

# Lateral wall of the pleural cavity: share of its half width at each share of the height from the apex to the angle.
_WALL_T = np.array([0.0, 0.035, 0.14, 0.32, 0.55, 0.80, 0.97, 1.0])
_WALL_X = np.array([0.42, 0.57, 0.74, 0.87, 0.955, 0.995, 0.985, 0.965])

LUNG_LEVEL = 0.2
TISSUE_LEVEL = 0.56
HEART_LEVEL = 0.68


@dataclass(frozen=True)
class Build:
    """One patient in the body's frame, and the place of this frame on the image; see `Canvas`.

    Lengths are fractions of a tight image's side. `margin` is the length of neck and abdomen drawn outside of it.
    `dome` and `angle` hold y of each hemidiaphragm's top and of each costophrenic angle. `heart_ratio` is the width of
    the heart over the inner width of the chest.
    """

    midline: float
    tilt: float
    half_width: float
    apex: float
    dome: dict[str, float]
    angle: dict[str, float]
    heart_ratio: float
    heart_height: float
    heart_lean: float
    hilum: dict[str, float]
    knob: float
    fat: float
    breasts: float
    ribs: float
    rib_drop: float
    vessels: float
    gas: float
    trachea: float
    middle: float = 0.5
    scale: float = 1.0
    margin: float = 0.0

    def canvas(self, size: int) -> Canvas:
        """Canvas of this patient on an image of `size` pixels."""
        return Canvas(size, midline=self.midline, middle=self.middle, tilt=self.tilt, scale=self.scale)

    def beyond(self, x: float, y: float) -> list[tuple[float, float]]:
        """Point farther outside than the end `(x, y)` of a line at the edge of a tight image; none if tight."""
        return [(x, y + np.sign(y - 0.5) * self.margin)] if self.margin else []

    def height(self, side: str) -> float:
        """Height of a lung, from the apex to the costophrenic angle."""
        return self.angle[side] - self.apex

    def wall(self, share: Floats | float) -> Floats:
        """Distance of the lateral chest wall from the midline at shares of the lung's height."""
        return self.half_width * np.interp(share, _WALL_T, _WALL_X)

    def lung_point(self, side: str, share: float, depth: float) -> Points:
        """Point `(2,)` at a share of the lung's height, from the midline (depth 0) to the chest wall (depth 1)."""
        return np.array([SIGN[side] * depth * self.wall(share), self.apex + share * self.height(side)])

    def hilum_point(self, side: str) -> Points:
        """Point `(2,)` where the vessels enter a lung."""
        return np.array([SIGN[side] * 0.085, self.hilum[side]])


@dataclass(frozen=True)
class Thorax:
    """Drawn layers of a chest, each `(size, size)`.

    `opacity` holds soft tissue, lungs, vessels and heart. `bones` is added after the findings. `lungs` are the pleural
    cavities by side in [0, 1]; `air` is their part that heart and mediastinum do not hide.
    """

    build: Build
    opacity: Field
    bones: Field
    lungs: dict[str, Field]
    air: dict[str, Field]
    heart: Field


def sample_build(rng: np.random.Generator) -> Build:
    """Random patient with a normal heart and normal variation."""
    apex, base = rng.uniform(0.09, 0.15), rng.uniform(0.80, 0.89)
    dome = base - rng.uniform(0.085, 0.125)
    hilum = apex + rng.uniform(0.40, 0.45) * (base - apex)
    return Build(
        midline=0.5 + rng.uniform(-0.025, 0.025),
        tilt=float(np.clip(rng.normal(0, 1.8), -4, 4)),
        half_width=rng.uniform(0.355, 0.425),
        apex=apex,
        dome={"right": dome, "left": dome + rng.uniform(0.012, 0.04)},
        angle={"right": base, "left": base + rng.uniform(-0.005, 0.02)},
        heart_ratio=rng.uniform(0.39, 0.47),
        heart_height=rng.uniform(0.25, 0.31),
        heart_lean=rng.uniform(0.60, 0.72),
        hilum={"right": hilum, "left": hilum - rng.uniform(0.005, 0.025)},
        knob=rng.uniform(0.026, 0.042),
        fat=rng.uniform(0, 1),
        breasts=max(0.0, rng.uniform(-0.12, 0.12)),
        ribs=rng.uniform(0.045, 0.10),
        rib_drop=rng.uniform(0.03, 0.07),
        vessels=rng.uniform(0.14, 0.24),
        gas=max(0.0, rng.uniform(-0.25, 0.25)),
        trachea=rng.uniform(-0.012, 0.008),
    )


def draw_thorax(canvas: Canvas, build: Build, rng: np.random.Generator) -> Thorax:
    """All layers of a chest without findings; the draws from `rng` do not depend on the build."""
    heart = canvas.fill([heart_outline(build)])
    solid = np.maximum(canvas.soften(heart, 0.004), canvas.soften(canvas.fill(mediastinum_outlines(build)), 0.006))
    above_dome = ramp(np.float32(build.dome["left"] + 0.02) - canvas.y, 0.03)
    inside = above_dome * ramp(canvas.y - np.float32(build.apex), 0.06)
    lungs = {side: canvas.soften(canvas.fill([lung_outline(build, side)]), 0.004) for side in SIDES}
    air = {side: lungs[side] * (1 - solid) for side in SIDES}
    both = air["right"] + air["left"]
    opacity = _tissue(canvas, build, rng)
    depth = canvas.soften(both, 0.035)
    opacity += (LUNG_LEVEL + np.float32(0.10) * (1 - depth) - opacity) * both
    opacity += canvas.clouds(rng, 44) * both * np.float32(0.012)
    opacity += np.float32(HEART_LEVEL - TISSUE_LEVEL) * canvas.soften(solid, 0.01) * inside
    opacity += _vessels(canvas, build, rng) * both * (np.float32(0.3) + np.float32(0.7) * depth)
    airways = canvas.soften(canvas.fill(airway_outlines(build)), 0.007) * np.float32(-0.13)
    opacity += _breasts(canvas, build) * both + airways + _spine(canvas, solid)
    bones = _bones(canvas, build, rng) * (np.float32(0.45) + np.float32(0.55) * both)
    return Thorax(build, opacity, bones, lungs, air, heart)


def thorax_masks(canvas: Canvas, build: Build) -> dict[str, Mask]:
    """Masks `(size, size)` bool of `left_lung`, `right_lung` and `heart`; sides are the patient's.

    A lung is the part of the pleural cavity that heart and mediastinum do not hide, with any finding in it. Masks of
    CheXmask are drawn in the same way.
    """
    heart = canvas.mask([heart_outline(build)])
    hidden = heart | canvas.mask(mediastinum_outlines(build))
    lungs = {f"{side}_lung": canvas.mask([lung_outline(build, side)]) & ~hidden for side in reversed(SIDES)}
    return {**lungs, "heart": heart}


def lung_outline(build: Build, side: str, retreat: Floats | None = None) -> Points:
    """Closed outline `(P, 2)` of a pleural cavity, or of a lung in it.

    `retreat` holds `(8,)` distances of the lung from the lateral wall, from the apex to the angle. The first distance
    also lowers the apex.
    """
    gone = np.zeros(8) if retreat is None else retreat
    wall_y = build.apex + _WALL_T * build.height(side) + gone[0] * np.clip(1 - _WALL_T / 0.14, 0, 1)
    wall = np.stack([np.maximum(build.wall(_WALL_T) - gone, 0.06), wall_y], axis=1)
    rise = build.angle[side] - build.dome[side]
    floor = np.array([(0.87, 0.50), (0.66, 0.13), (0.44, 0.0), (0.22, 0.12), (0.02, 0.2)])
    floor = floor * (build.half_width - gone[-1], rise) + (0, build.dome[side])
    apex_y = build.apex + gone[0]
    medial = np.array([(0.03, build.hilum[side]), (0.05, apex_y + 0.10), (0.08, apex_y + 0.035)])
    knots = np.concatenate([wall, floor, medial])
    return closed_curve(knots * (SIGN[side], 1.0))


def heart_outline(build: Build) -> Points:
    """Closed outline `(P, 2)` of the heart; its width over the chest's inner width is `heart_ratio`."""
    width = 2 * build.half_width * build.heart_ratio
    right, left = -width * (1 - build.heart_lean), width * build.heart_lean
    bottom = build.dome["left"] + 0.035
    top = bottom - build.heart_height
    atrium = [(0.45, 0.0), (0.84, 0.28), (1.0, 0.58), (0.9, 0.84), (0.4, 1.0)]
    ventricle = [(-0.4, 1.0), (-0.84, 0.97), (-1.0, 0.82), (-0.94, 0.6), (-0.74, 0.32), (-0.5, 0.12), (-0.36, -0.04)]
    shape = np.array([*atrium, *ventricle])
    x = np.where(shape[:, 0] > 0, shape[:, 0] * right, -shape[:, 0] * left)
    return closed_curve(np.stack([x, top + shape[:, 1] * build.heart_height], axis=1))


def mediastinum_outlines(build: Build) -> list[Points]:
    """Closed outlines, `(P, 2)` each, of the vessels and the spine between the lungs, and of the aortic knob."""
    top, bottom = build.apex, build.dome["left"] + 0.03
    knob_y = build.apex + 0.24 * (bottom - top)
    right = [*build.beyond(-0.045, top - 0.1), (-0.045, top - 0.1), (-0.042, top), (-0.05, knob_y - 0.02)]
    right += [(-0.062, build.hilum["right"]), (-0.05, bottom)]
    left = [(0.05, bottom), (0.072, build.hilum["left"] + 0.02), (0.07, build.hilum["left"] - 0.02)]
    upper = [(0.04, knob_y + 0.03), (0.046, knob_y - 0.05), (0.04, top), (0.045, top - 0.1)]
    upper += build.beyond(0.045, top - 0.1)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    knob = np.stack([0.045 + build.knob * np.cos(angles), knob_y + 1.25 * build.knob * np.sin(angles)], axis=1)
    return [closed_curve(np.array(right + left + upper)), knob]


def body_outline(build: Build, shoulder: float) -> Points:
    """Closed outline `(P, 2)` of neck, shoulders and flanks; `shoulder` is y of the base of the neck."""
    flank, neck = build.half_width + 0.03 + 0.09 * build.fat, 0.10 + 0.03 * build.fat
    half = [*build.beyond(neck, -0.1), (neck, -0.1), (neck, 0.0), (0.19, shoulder), (0.36, shoulder + 0.05)]
    half += [(0.50, shoulder + 0.14), (0.55, 0.30), (flank + 0.02, 0.45), (flank, 0.62)]
    half += [(flank + 0.01, 0.85), (flank + 0.02, 1.2)]
    half += build.beyond(flank + 0.02, 1.2)
    return closed_curve(np.concatenate([np.array(half), np.array(half)[::-1] * (-1, 1)]))


def _tissue(canvas: Canvas, build: Build, rng: np.random.Generator) -> Field:
    """Body wall and abdomen, with neck and shoulders above and black air around."""
    body = canvas.fill([body_outline(build, 0.055 + 0.05 * rng.random())])
    thick = canvas.soften(body, 0.025)
    dome = build.dome["right"] + ramp(canvas.x, 0.05) * np.float32(build.dome["left"] - build.dome["right"])
    belly = np.maximum(canvas.y - dome + np.float32(0.03), 0)
    opacity = body * thick * np.float32(TISSUE_LEVEL) + body * np.minimum(belly * np.float32(1.6), np.float32(0.22))
    opacity += canvas.clouds(rng, 7) * body * np.float32(0.014)
    # Gas in the stomach.
    place = np.array([rng.uniform(0.11, 0.19), build.dome["left"] + rng.uniform(0.055, 0.075)])
    radii = (rng.uniform(0.03, 0.06), rng.uniform(0.015, 0.026))
    return opacity - np.float32(1.3 * build.gas) * canvas.bump(place, radii) if build.gas > 0 else opacity


def _vessels(canvas: Canvas, build: Build, rng: np.random.Generator) -> Field:
    """Trees that leave each hilum and taper outwards, and the hila themselves."""
    trees = canvas.soften(canvas.fill(np.concatenate([_vessel_tree(build, side, rng) for side in SIDES])), 0.0035)
    hila = sum(canvas.bump(build.hilum_point(side), (0.024, 0.05), -0.25 * SIGN[side]) for side in SIDES)
    return trees * np.float32(build.vessels) * (np.float32(0.42) + np.float32(0.9) * hila) + hila * np.float32(0.13)


def _vessel_tree(build: Build, side: str, rng: np.random.Generator) -> Points:
    """Outlines of one lung's vessels, `(mains * (1 + twigs), 12, 2)`."""
    t, mains, twigs = np.linspace(0, 1, 6), 9, 3
    angles = np.deg2rad(np.linspace(-78, 84, mains) + rng.normal(0, 7, mains))
    root = build.hilum_point(side) * (SIGN[side], 1) + rng.normal(0, (0.008, 0.022), (mains, 2))
    main = _branches(root, angles, rng.uniform(0.16, 0.33, mains), rng.normal(0, 0.07, mains), t)
    start = rng.integers(1, 5, (mains, twigs))
    forks = main[np.arange(mains)[:, None], start].reshape(-1, 2)
    turns = rng.choice([-1, 1], (mains, twigs)) * rng.uniform(0.4, 0.9, (mains, twigs))
    fork_angles, count = (angles[:, None] + turns).ravel(), mains * twigs
    twig = _branches(forks, fork_angles, rng.uniform(0.06, 0.14, count), rng.normal(0, 0.03, count), t)
    widths = rng.uniform(0.010, 0.017, mains)[:, None] * (1 - 0.8 * t)
    twig_widths = rng.uniform(0.003, 0.007, count)[:, None] * (1 - 0.7 * t)
    both = ribbons(np.concatenate([main, twig]), np.concatenate([widths, twig_widths]))
    return both * (SIGN[side], 1)


def _branches(start: Points, angles: Floats, lengths: Floats, bends: Floats, t: Floats) -> Points:
    """Bent paths `(M, P, 2)` from `start (M, 2)` at `angles` below the horizontal."""
    along = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None]
    across = np.stack([-np.sin(angles), np.cos(angles)], axis=-1)[:, None]
    return start[:, None] + along * (lengths[:, None] * t)[..., None] + across * (bends[:, None] * t**2)[..., None]


def _breasts(canvas: Canvas, build: Build) -> Field:
    """Soft shadows over the lower lungs with a lower edge that fades upwards."""
    dx = np.abs(canvas.x) - np.float32(0.6 * build.half_width)
    edge = np.float32(build.dome["right"] + 0.015) - dx * dx * np.float32(3.5)
    above = edge - canvas.y
    return np.float32(build.breasts) * np.clip(above * 60, 0, 1) * np.clip(1 - above * np.float32(5.5), 0, 1)


def airway_outlines(build: Build) -> list[Points]:
    """Closed outlines, `(P, 2)` each, of the trachea and its two main bronchi."""
    carina = build.apex + 0.34 * (build.dome["right"] - build.apex)
    shift = build.trachea
    trunk = open_curve(np.array([*build.beyond(0.0, -0.05), (0.0, -0.05), (shift / 2, build.apex), (shift, carina)]))
    main = [np.array([(shift, carina), (sign * 0.055, carina + 0.045)]) for sign in (-1, 1)]
    return [ribbon(trunk, 0.032), ribbon(main[0], 0.02), ribbon(main[1], 0.017)]


def _spine(canvas: Canvas, solid: Field) -> Field:
    """Vertebral bodies seen faintly through the mediastinum."""
    column = ramp(np.float32(0.036) - np.abs(canvas.x), 0.006)
    period = np.float32(2 * np.pi / 0.058)
    discs = np.cos(canvas.y * period) * np.float32(0.5) + np.float32(0.5)
    return column * solid * (np.float32(0.02) + np.float32(0.035) * discs)


def _bones(canvas: Canvas, build: Build, rng: np.random.Generator) -> Field:
    """Ribs, clavicles and the edges of the shoulder blades."""
    posterior, anterior = zip(*(_rib_paths(build, side) for side in SIDES), strict=True)
    back, front = np.concatenate(posterior), np.concatenate(anterior)
    widths = rng.uniform(0.021, 0.027)
    outer, inner = canvas.fill(ribbon(back, widths)), canvas.fill(ribbon(back, 0.55 * widths))
    faint = canvas.fill(ribbon(front, 1.1 * widths))
    ribs = outer - np.float32(0.4) * inner + np.float32(0.5) * faint
    girdle = canvas.fill(_clavicles(build, rng)) * np.float32(0.13)
    blades = canvas.fill(_shoulder_blades(build, rng)) * np.float32(0.055)
    return canvas.soften(ribs * np.float32(build.ribs) + girdle + blades, 0.0035)


def _rib_paths(build: Build, side: str, count: int = 10) -> tuple[Points, Points]:
    """Paths of the posterior `(count, 9, 2)` and the anterior `(count - 3, 9, 2)` parts."""
    t = np.linspace(0, 1, 9)
    height = build.height(side)
    heads = build.apex - 0.015 + np.arange(count)[:, None] * height / (count - 0.4)
    back_y = heads - 0.014 * np.sin(np.pi * t) + build.rib_drop * (0.6 + 0.08 * np.arange(count)[:, None]) * t**2
    out = np.sin(np.pi / 2 * t)
    wall = build.wall((back_y[:, -1:] - build.apex) / height) + 0.008
    back = np.stack([0.03 + (wall - 0.03) * out, back_y], axis=-1)
    ends = back[: count - 3, -1]
    front_x = ends[:, :1] - (ends[:, :1] - 0.13) * (1 - np.cos(np.pi / 2 * t))
    front_y = ends[:, 1:] + (0.07 + 0.07 * t) * t
    flip = np.array((SIGN[side], 1.0))
    return back * flip, np.stack([front_x, front_y], axis=-1) * flip


def _clavicles(build: Build, rng: np.random.Generator) -> list[Points]:
    level = build.apex + rng.uniform(0.045, 0.09)
    outlines = []
    for side in SIDES:
        lift, sway = rng.uniform(0.02, 0.075), rng.normal(0, 0.006)
        inner = [(0.03 + sway, level), (0.12, level - 0.3 * lift + 0.012)]
        outer = [(0.26, level - lift), (0.42, level - 0.9 * lift)]
        path = open_curve(np.array(inner + outer) * (SIGN[side], 1))
        widths = np.interp(np.linspace(0, 1, len(path)), [0, 0.12, 0.5, 1], [0.034, 0.026, 0.021, 0.026])
        outlines.append(ribbons(path, widths))
    return outlines


def _shoulder_blades(build: Build, rng: np.random.Generator) -> list[Points]:
    knots = np.array([(0.86, 0.0), (0.83, 0.12), (0.92, 0.26), (1.02, 0.31), (1.2, 0.15), (1.2, -0.02)])
    knots = knots * (build.half_width, 1) + (-rng.uniform(-0.02, 0.045), build.apex + 0.07)
    return [closed_curve(knots * (SIGN[side], 1)) for side in SIDES]
