"""Framing of the patient on the image, and the parts of the body that a loose framing shows around the chest."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from matex_pl.data.phantom.canvas import Canvas, closed_curve, open_curve, ramp, ribbons
from matex_pl.data.phantom.thorax import SIDES, SIGN, TISSUE_LEVEL, Build, Thorax, body_outline, lung_outline

Framing = Literal["tight", "loose"]

_SCALES = (0.7, 1.0)
# Degrees, in addition to the patient's own tilt.
_TURN, _LARGEST_TURN = 4.0, 9.0
# The lungs stay within these positions on the image.
_EDGES = np.array([0.02, 0.98])
_SHARE_COLLIMATED = 0.5


def frame_loosely(build: Build, rng: np.random.Generator) -> Build:
    """The patient smaller, turned and shifted on the image, with both lungs on it."""
    scale, turn = rng.uniform(*_SCALES), np.clip(rng.normal(0, _TURN), -_LARGEST_TURN, _LARGEST_TURN)
    turned = replace(build, scale=scale, tilt=build.tilt + float(turn), margin=0.6)
    low, high = lung_extent(turned)
    # Positions of the body's center with both lungs on the image.
    center = np.array([build.midline, build.middle])
    first, last = _EDGES[0] - low + center, _EDGES[1] - high + center
    midline, middle = first + rng.uniform(0.1, 0.9, 2) * (last - first)
    return replace(turned, midline=midline, middle=middle)


def lung_extent(build: Build) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest x and y of both pleural cavities on the image, `(2,)` each, in [0, 1] of its side."""
    outline = np.concatenate([lung_outline(build, side) for side in SIDES])
    places = build.canvas(64).to_image(outline)
    return places.min(0), places.max(0)


def draw_surroundings(canvas: Canvas, thorax: Thorax, rng: np.random.Generator) -> Thorax:
    """The chest with arms, head and bowel gas around it; lungs and heart stay as they are."""
    build, opacity = thorax.build, thorax.opacity
    hang, chin, level = rng.uniform(0.0, 0.14), rng.uniform(-0.20, -0.12), rng.uniform(0.0, 0.05)
    places = np.stack([rng.uniform(-0.26, 0.26, 5), rng.uniform(1.06, 1.4, 5)], axis=1)
    radii, dark = rng.uniform(0.02, 0.055, (5, 2)), np.maximum(rng.uniform(-0.16, 0.2, 5), 0)
    for place, (across, down), depth in zip(places, radii, dark, strict=True):
        opacity = opacity - canvas.bump(place, (across, down)) * np.float32(depth)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    arms, bones = [], []
    for side in SIDES:
        path = open_curve(np.array([(0.43, 0.27), (0.53, 0.42), (0.58 + hang, 0.75), (0.60 + 1.6 * hang, 1.5)]))
        path = path * (SIGN[side], 1)
        arms.append(ribbons(path, np.linspace(0.17, 0.13, len(path))))
        bones += [ribbons(path, np.linspace(0.05, 0.035, len(path))), closed_curve(path[0] + 0.036 * circle)]
    limbs = canvas.fill(arms)
    # Not over the lungs, and without a gap to the shoulder.
    outside = ramp(np.abs(canvas.x) - np.float32(build.half_width + 0.02), 0.02)
    body = np.maximum(limbs, canvas.fill([body_outline(build, 0.08)]))
    thick = canvas.soften(body, 0.025)
    bone = canvas.soften(canvas.fill(bones), 0.005) * outside * np.float32(0.11)
    opacity = np.maximum(opacity, limbs * thick * outside * np.float32(TISSUE_LEVEL)) + bone
    skull = canvas.fill([closed_curve(np.array([0.0, chin - 0.3]) + circle * (0.17, 0.3))])
    opacity = np.maximum(opacity, canvas.soften(skull, 0.012) * np.float32(TISSUE_LEVEL + 0.12 + level))
    # Shoulder blades reach beyond the skin where a tight image ends.
    return replace(thorax, opacity=opacity, bones=thorax.bones * body)


def collimate_loosely(image: NDArray[np.uint8], build: Build, rng: np.random.Generator) -> None:
    """Blacken strips along the borders in half of the images, in place; lungs are never cut."""
    low, high = lung_extent(build)
    room = np.concatenate([low, 1 - high]) * len(image)
    strips = (rng.uniform(0, 0.7, 4) * room).astype(int) * (rng.random() < _SHARE_COLLIMATED)
    left, top, right, bottom = (int(strip) for strip in strips)
    kept = image[top : len(image) - bottom, left : len(image) - right].copy()
    image[:] = 0
    image[top : len(image) - bottom, left : len(image) - right] = kept
