"""A synthetic frontal chest radiograph with its findings and their exact boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from matex_pl.arguments import check_choice
from matex_pl.data.phantom.canvas import Canvas, Field, Mask, as_field
from matex_pl.data.phantom.devices import Device, draw_device, draw_marker, draw_token, plan_device
from matex_pl.data.phantom.findings import FINDINGS, PAINTERS, Plan, plan_findings, reshape_build
from matex_pl.data.phantom.framing import Framing, collimate_loosely, draw_surroundings, frame_loosely
from matex_pl.data.phantom.thorax import Build, draw_thorax, sample_build, thorax_masks

Box = tuple[float, float, float, float]

# One stream of random numbers per part: a change of one part, or of the shortcut, does not affect the others.
# New streams come last: the place of a stream is a part of its seed.
_STREAMS: tuple[str, ...] = ("anatomy", "texture", "plan", "reshape", "findings", "device", "exposure", "shortcut")
_STREAMS += ("phrase", "framing", "surroundings")
_BOX_LEVEL = 0.35


@dataclass(frozen=True)
class PlacedFinding:
    """A finding as drawn.

    Args:
        name: One of `FINDINGS`.
        side: Side of the patient: `right`, `left`, `both`, or empty for the heart.
        zone: `upper`, `mid`, `lower`, `whole`, `hilar`, `costophrenic` or `cardiac`.
        boxes: `(x0, y0, x1, y1)` in pixels, x to the right of the image, tight around the drawn mask; two for `both`.
        size: `small`, `moderate` or `large`.
    """

    name: str
    side: str
    zone: str
    boxes: tuple[Box, ...]
    size: str = ""


@dataclass(frozen=True)
class Phantom:
    """A radiograph: `image` uint8 `(size, size)`, one to three findings, and the support device on it, if any."""

    image: NDArray[np.uint8]
    findings: tuple[PlacedFinding, ...]
    device: Device | None = None


def phantom_rng(index: int, seed: int, stream: str) -> np.random.Generator:
    """Random numbers for one part of one image, the same in any process."""
    return np.random.default_rng((seed, index, _STREAMS.index(stream)))


def phantom_build(index: int, seed: int, plans: Sequence[Plan] | None = None, *, framing: Framing = "tight") -> Build:
    """The patient on the image at `index`, with the findings planned for the image, or with `plans` instead."""
    if plans is None:
        plans = plan_findings(phantom_rng(index, seed, "plan"))
    build = sample_build(phantom_rng(index, seed, "anatomy"))
    if framing == "loose":
        build = frame_loosely(build, phantom_rng(index, seed, "framing"))
    return reshape_build(build, plans, phantom_rng(index, seed, "reshape"))


def phantom_masks(index: int, *, seed: int = 0, size: int = 192, framing: Framing = "tight") -> dict[str, Mask]:
    """Exact masks `(size, size)` bool of the image at `index`: `left_lung`, `right_lung`, `heart`.

    Sides are the patient's. A lung is the part of the pleural cavity that heart and mediastinum do not hide, with any
    finding in it. The arguments are those of `draw_phantom`.
    """
    build = phantom_build(index, seed, framing=framing)
    return thorax_masks(build.canvas(size), build)


def draw_phantom(
    index: int,
    *,
    seed: int = 0,
    size: int = 192,
    shortcut: float = 0.0,
    shortcut_finding: str = "pneumothorax",
    framing: Framing = "tight",
    show_findings: bool = True,
) -> Phantom:
    """The image at `index` of an endless series; the same in any process.

    Args:
        index: Index of the image.
        seed: Random seed of the series.
        size: Side in pixels, a multiple of 4, at least 64.
        shortcut: Probability that an image with `shortcut_finding` has a bright tag in the lower left corner. Images
            without the finding never have the tag.
        shortcut_finding: One of `FINDINGS`.
        framing: `tight` fills the image with the chest. `loose` draws the same patient smaller, shifted and turned,
            with arms, neck and abdomen, and black strips along the borders of half of the images.
        show_findings: Whether to draw the findings; if not, the rest of the image is the same.
    """
    check_arguments(size, shortcut, shortcut_finding, framing)
    plans = plan_findings(phantom_rng(index, seed, "plan"))
    shown = plans if show_findings else ()
    build = phantom_build(index, seed, shown, framing=framing)
    canvas = build.canvas(size)
    thorax = draw_thorax(canvas, build, phantom_rng(index, seed, "texture"))
    around = phantom_rng(index, seed, "surroundings")
    if framing == "loose":
        thorax = draw_surroundings(canvas, thorax, around)
    opacity, placed = thorax.opacity, []
    rng = phantom_rng(index, seed, "findings")
    for plan in shown:
        change = PAINTERS[plan.name](canvas, thorax, plan, rng)
        opacity = opacity + (np.float32(change.level) - opacity) * change.cover
        opacity = opacity if change.added is None else opacity + change.added
        placed.append(PlacedFinding(plan.name, plan.side, plan.zone, tuple(map(_tight_box, change.marks)), plan.size))
    rng = phantom_rng(index, seed, "device")
    device = plan_device(plans, rng)
    opacity = opacity + thorax.bones + draw_device(canvas, build, device, rng)
    image = _develop(canvas, opacity, phantom_rng(index, seed, "exposure"))
    if framing == "loose":
        collimate_loosely(image, build, around)
    draw_marker(image, rng)
    tagged = phantom_rng(index, seed, "shortcut").random() < shortcut
    if tagged and any(plan.name == shortcut_finding for plan in plans):
        draw_token(image)
    return Phantom(image, tuple(placed), device)


def check_arguments(size: int, shortcut: float, shortcut_finding: str, framing: str) -> None:
    """Raise ValueError if these arguments of `draw_phantom` are out of range."""
    if size < 64 or size % 4:
        raise ValueError(f"size must be a multiple of 4 and at least 64, got {size}.")
    if not 0 <= shortcut <= 1:
        raise ValueError(f"shortcut must be in [0, 1], got {shortcut}. Give a share, not a percentage.")
    if shortcut_finding not in FINDINGS:
        raise ValueError(f"shortcut_finding must be one of {', '.join(FINDINGS)}, got {shortcut_finding!r}.")
    check_choice("framing", framing, get_args(Framing))


def _tight_box(mark: Field) -> Box:
    """The box around all pixels above 35 % of the mark's peak."""
    inside = mark > _BOX_LEVEL * mark.max()
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _develop(canvas: Canvas, opacity: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Gray values: exposure, contrast, uneven field, blur, grain, and sometimes a collimated border."""
    gain, lift, gamma = rng.uniform(0.95, 1.25), rng.uniform(-0.10, 0.06), rng.uniform(0.8, 1.25)
    bright = as_field(cv2.pow(np.maximum(opacity * np.float32(gain) + np.float32(lift), 0), gamma))
    # A soft shoulder, x / (1 + x^4)^(1/4): bone over abdomen saturates instead of clipping.
    squared = bright * bright
    bright /= np.sqrt(np.sqrt(1 + squared * squared))
    bright *= 1 + canvas.clouds(rng, 3) * np.float32(rng.uniform(0.01, 0.05))
    bright = canvas.soften(bright, rng.uniform(0.0012, 0.0042))
    grain = rng.standard_normal(bright.shape, dtype=np.float32)
    coarse = cv2.GaussianBlur(grain, (0, 0), 0.9)
    fine = np.float32(rng.uniform(0.005, 0.018))
    bright += (grain * np.float32(0.6) + coarse * np.float32(1.2)) * fine * (np.float32(0.4) + bright)
    return np.rint(np.clip(_collimate(bright, rng), 0, 1) * 255).astype(np.uint8)


def _collimate(bright: Field, rng: np.random.Generator) -> Field:
    """The image with black strips of up to 3 % along the borders in a third of cases."""
    size = len(bright)
    top, bottom, left, right = np.rint(rng.uniform(0, 0.03, 4) * size).astype(int) * (rng.random() < 0.35)
    inner = bright[top : size - bottom, left : size - right]
    return np.pad(inner, ((top, bottom), (left, right)))
