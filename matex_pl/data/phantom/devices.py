"""Objects on an image other than the patient: support devices, the side marker, and the tag used as a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from matex_pl.data.phantom.canvas import Canvas, Field, Points, closed_curve, open_curve, ribbon
from matex_pl.data.phantom.findings import Plan
from matex_pl.data.phantom.thorax import SIGN, Build

DEVICES = ("central line", "pacemaker", "endotracheal tube", "leads", "sternal wires")
_SHARE_WITH_DEVICE = 0.35


@dataclass(frozen=True)
class Device:
    """A support device; `side` is the patient's side, or empty for devices in the midline."""

    name: str
    side: str


def plan_device(plans: Sequence[Plan], rng: np.random.Generator) -> Device | None:
    """Random device for an image, on about a third of images; no pacemaker over a finding in the upper lung."""
    wanted, name, side = rng.random() < _SHARE_WITH_DEVICE, str(rng.choice(DEVICES)), str(rng.choice(["right", "left"]))
    crowded = any(side in plan.sides and plan.zone in ("upper", "whole") for plan in plans)
    if not wanted or (name == "pacemaker" and crowded):
        return None
    return Device(name, side if name in ("central line", "pacemaker") else "")


def draw_device(canvas: Canvas, build: Build, device: Device | None, rng: np.random.Generator) -> Field:
    """Opacity `(size, size)` that the device adds."""
    if device is None:
        return np.zeros((canvas.size, canvas.size), np.float32)
    outlines = _OUTLINES[device.name](build, SIGN.get(device.side, 1.0), rng)
    return canvas.soften(canvas.fill(outlines), 0.0015) * np.float32(0.30)


def _central_line(build: Build, sign: float, rng: np.random.Generator) -> list[Points]:
    end = np.array([-0.045, build.hilum["right"] + rng.uniform(-0.01, 0.05)])
    arm = [(sign * 0.46, build.apex + 0.16), (sign * 0.25, build.apex + 0.05), (sign * 0.06, build.apex + 0.07)]
    neck = [*build.beyond(sign * 0.07, -0.05), (sign * 0.07, -0.05), (sign * 0.06, build.apex + 0.02)]
    start = arm if rng.random() < 0.5 else neck
    return [ribbon(open_curve(np.array([*start, (-0.04, build.apex + 0.14), tuple(end)])), 0.008)]


def _pacemaker(build: Build, sign: float, rng: np.random.Generator) -> list[Points]:
    center = np.array([sign * (0.27 + rng.uniform(-0.02, 0.02)), build.apex + 0.10])
    can = closed_curve(center + np.array([(-0.04, -0.03), (0.04, -0.03), (0.045, 0.02), (0.0, 0.04), (-0.045, 0.02)]))
    tip = (0.10, build.dome["left"] - 0.01)
    lead = [tuple(center), (sign * 0.12, build.apex + 0.06), (-0.03, build.apex + 0.14), (-0.045, build.hilum["right"])]
    return [can, ribbon(open_curve(np.array([*lead, (0.0, build.dome["left"] - 0.03), tip])), 0.008)]


def _tube(build: Build, sign: float, rng: np.random.Generator) -> list[Points]:
    end = build.apex + rng.uniform(0.10, 0.17)
    mouth = [*build.beyond(0.004, -0.05), (0.004, -0.05)]
    return [ribbon(open_curve(np.array([*mouth, (0.0, build.apex), (-0.004, end)])), 0.014)]


def _leads(build: Build, sign: float, rng: np.random.Generator) -> list[Points]:
    outlines = []
    for side, share in ((-1, 0.16), (1, 0.16), (1, 0.9)):
        pad = np.array([side * (0.78 + 0.12 * share) * build.half_width, build.apex + share * 0.72])
        pad = pad + rng.normal(0, 0.015, 2)
        bend = pad / 2 + np.array([0.0, 0.4]) + rng.normal(0, 0.03, 2)
        end = (rng.normal(0, 0.05), 1.05)
        outlines.append(ribbon(open_curve(np.array([pad, bend, end, *build.beyond(*end)])), 0.005))
        angles = np.linspace(0, 2 * np.pi, 9)[:-1]
        outlines.append(pad + 0.011 * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    return outlines


def _sternal_wires(build: Build, sign: float, rng: np.random.Generator) -> list[Points]:
    outlines = []
    for y in np.linspace(build.apex + 0.12, build.dome["left"] - 0.06, 6) + rng.normal(0, 0.004, 6):
        x = rng.normal(0, 0.004)
        outlines.append(ribbon(np.array([(x - 0.022, y - 0.006), (x, y + 0.006), (x + 0.022, y - 0.006)]), 0.006))
    return outlines


_OUTLINES = {
    "central line": _central_line,
    "pacemaker": _pacemaker,
    "endotracheal tube": _tube,
    "leads": _leads,
    "sternal wires": _sternal_wires,
}


def draw_marker(image: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Write R in the upper left corner of the image or L in the upper right, in place; one image in ten has none."""
    letter, shown = ("R", "L")[int(rng.random() < 0.5)], rng.random() < 0.9
    size = len(image)
    scale = size / 192 * rng.uniform(0.40, 0.55)
    across, down = rng.uniform(0.035, 0.07), rng.uniform(0.10, 0.16)
    x = across * size if letter == "R" else (1 - across) * size - 20 * scale
    if shown:
        cv2.putText(image, letter, (round(x), round(down * size)), cv2.FONT_HERSHEY_SIMPLEX, scale, 245, 1, cv2.LINE_AA)


def draw_token(image: NDArray[np.uint8]) -> None:
    """Draw a bright tag in the lower left corner of the image, in place."""
    size = len(image)
    x0, y0, x1, y1 = (round(share * size) for share in (0.035, 0.905, 0.115, 0.965))
    image[y0:y1, x0:x1] = 255
    middle, inset = (y0 + y1) // 2, max(1, size // 96)
    image[middle - inset // 2 : middle - inset // 2 + inset, x0 + 2 * inset : x1 - 2 * inset] = 20
