"""Drawing in the body's frame: x = 0 is the midline, x grows towards the patient's left, y grows downwards.

One unit is the side of the image, times `scale`, and all lengths scale with it. The patient's left is on the right of
the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]
Floats = NDArray[np.float64]

_SUBPIXEL_BITS = 4


@lru_cache(maxsize=8)
def _pixel_grid(size: int) -> tuple[Field, Field]:
    centers = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(centers, (size, size)), np.broadcast_to(centers[:, None], (size, size))


def as_field(image: Any) -> Field:
    """The same array, typed as float32: OpenCV keeps the type, but its stubs do not declare it."""
    return cast(Field, image)


class Canvas:
    """A square image and the affine map from the body's frame to its pixels.

    Args:
        size: Side of the image in pixels.
        midline: Position x of the midline on the image, in [0, 1].
        middle: Position y on the image of the body's y = 0.5, in [0, 1].
        tilt: Rotation of the patient on the image in degrees.
        scale: Length of one unit on the image, in sides of the image.
    """

    def __init__(
        self, size: int, *, midline: float = 0.5, middle: float = 0.5, tilt: float = 0.0, scale: float = 1.0
    ) -> None:
        self.size = size
        self.scale = scale
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        self._turn = np.array([[cos, -sin], [sin, cos]])
        self._center = np.array([midline, middle])

    @cached_property
    def _grid(self) -> tuple[Field, Field]:
        u, v = _pixel_grid(self.size)
        cos, sin = self._turn[:, 0].astype(np.float32)
        midline, middle, scale = (np.float32(value) for value in (*self._center, self.scale))
        du, dv = (u - midline) / scale, (v - middle) / scale
        x: Field = cos * du + sin * dv
        y: Field = cos * dv - sin * du + np.float32(0.5)
        return x, y

    @property
    def x(self) -> Field:
        """`(size, size)` x of every pixel center in the body's frame."""
        return self._grid[0]

    @property
    def y(self) -> Field:
        """`(size, size)` y of every pixel center in the body's frame."""
        return self._grid[1]

    @cached_property
    def _half_grid(self) -> tuple[Field, Field]:
        half = (self.size // 2, self.size // 2)
        x, y = (as_field(cv2.resize(field, half, interpolation=cv2.INTER_AREA)) for field in self._grid)
        return x, y

    def to_image(self, points: Points) -> Points:
        """Positions `(..., 2)` of body points `(..., 2)` on the image, in [0, 1] of its side."""
        return (points - (0.0, 0.5)) @ self._turn.T * self.scale + self._center

    def to_pixels(self, points: Points) -> Points:
        """Pixel coordinates `(..., 2)` of body points `(..., 2)`; the center of the first pixel is (0, 0)."""
        return self.to_image(points) * self.size - 0.5

    def value_at(self, field: Field, point: Points) -> float:
        """Value of a field at the pixel nearest to a body point `(2,)`."""
        column, row = np.clip(np.rint(self.to_pixels(point)), 0, self.size - 1).astype(int)
        return float(field[row, column])

    def fill(self, outlines: Sequence[Points] | Points) -> Field:
        """Coverage in [0, 1] of the union of closed outlines, each `(P, 2)`, with smooth edges."""
        return self._levels(outlines).astype(np.float32) / np.float32(255)

    def mask(self, outlines: Sequence[Points] | Points) -> Mask:
        """Pixels `(size, size)` bool at least half covered by the union of closed outlines."""
        return self._levels(outlines) > 127

    def _levels(self, outlines: Sequence[Points] | Points) -> NDArray[np.uint8]:
        plate = np.zeros((self.size, self.size), np.uint8)
        fixed = np.rint(self.to_pixels(np.concatenate(outlines)) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        start = 0
        # One call for all outlines would cut holes into their overlap.
        for outline in outlines:
            end = start + len(outline)
            cv2.fillPoly(plate, [fixed[start:end]], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
            start = end
        return plate

    def soften(self, field: Field, sigma: float) -> Field:
        """Gaussian blur with sigma in body units; wide blurs run on a quarter of the resolution."""
        pixels = sigma * self.size * self.scale
        if pixels < 4:
            return as_field(cv2.GaussianBlur(field, (0, 0), max(pixels, 0.2)))
        quarter = cv2.resize(field, (self.size // 4, self.size // 4), interpolation=cv2.INTER_AREA)
        quarter = cv2.GaussianBlur(quarter, (0, 0), pixels / 4, borderType=cv2.BORDER_REPLICATE)
        return as_field(cv2.resize(quarter, (self.size, self.size), interpolation=cv2.INTER_LINEAR))

    def clouds(self, rng: np.random.Generator, cells: int) -> Field:
        """Smooth unit-variance noise `(size, size)` with about `cells` bumps along a side."""
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        return as_field(cv2.resize(coarse, (self.size, self.size), interpolation=cv2.INTER_CUBIC))

    def bump(self, center: Points, radii: tuple[float, float], turn: float = 0.0) -> Field:
        """Gaussian of height 1 at `center` with sigmas `radii` along axes turned by `turn` radians."""
        # It is smooth, and exp is the most expensive step of an image: every second pixel is enough.
        half_x, half_y = self._half_grid
        dx, dy = half_x - np.float32(center[0]), half_y - np.float32(center[1])
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        along, across = (cos * dx + sin * dy) / np.float32(radii[0]), (cos * dy - sin * dx) / np.float32(radii[1])
        half = np.exp(np.float32(-0.5) * (along * along + across * across))
        return as_field(cv2.resize(half, (self.size, self.size), interpolation=cv2.INTER_LINEAR))


def ramp(field: Field, width: float) -> Field:
    """Smooth step from 0 to 1 while `field` passes from -width to +width."""
    z = np.clip(field / np.float32(2 * width) + np.float32(0.5), 0, 1)
    return z * z * (3 - 2 * z)


@lru_cache(maxsize=8)
def _catmull_rom(steps: int) -> Floats:
    t = np.arange(steps)[:, None] / steps
    powers = t ** np.arange(4)
    basis = 0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
    return powers @ basis


def closed_curve(knots: Points, steps: int = 6) -> Points:
    """Catmull-Rom curve through `(K, 2)` knots and back to the first: `(K * steps, 2)`."""
    count = len(knots)
    around = knots[(np.arange(count)[:, None] + np.arange(-1, 3)) % count]
    return np.einsum("st,ktd->ksd", _catmull_rom(steps), around).reshape(-1, 2)


def open_curve(knots: Points, steps: int = 6) -> Points:
    """Catmull-Rom curve from the first of `(K, 2)` knots to the last: `((K - 1) * steps + 1, 2)`."""
    padded = np.concatenate([knots[:1], knots, knots[-1:]])
    around = padded[np.arange(len(knots) - 1)[:, None] + np.arange(4)]
    curve = np.einsum("st,ktd->ksd", _catmull_rom(steps), around).reshape(-1, 2)
    return np.concatenate([curve, knots[-1:]])


def ribbons(paths: Points, widths: Floats) -> Points:
    """Outlines `(..., 2P, 2)` of bands along `paths (..., P, 2)` whose full widths `(..., P)` may taper."""
    along = np.empty(paths.shape)
    along[..., 1:-1, :] = paths[..., 2:, :] - paths[..., :-2, :]
    along[..., [0, -1], :] = paths[..., [1, -1], :] - paths[..., [0, -2], :]
    half = widths / (2 * np.maximum(np.hypot(along[..., 0], along[..., 1]), 1e-9))
    across = np.stack([-along[..., 1] * half, along[..., 0] * half], axis=-1)
    return np.concatenate([paths + across, (paths - across)[..., ::-1, :]], axis=-2)


def ribbon(path: Points, width: float) -> Points:
    """Outlines `(..., 2P, 2)` of bands of one width along `path (..., P, 2)`."""
    return ribbons(path, np.full(path.shape[:-1], width))
