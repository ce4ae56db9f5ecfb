"""Transforms from a stored image to the model's frame. No other module imports albumentations.

Images are never flipped: the patient's right and left are part of the phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from matex_pl.arguments import check_choices
from matex_pl.data.images import ResizeMode, Size, resize_image

if TYPE_CHECKING:
    import albumentations as A

# Loaders run several processes, and OpenCV's threads would only compete with them.
cv2.setNumThreads(0)


class Framed(NamedTuple):
    """An image in the model's frame, `(H, W)`.

    Args:
        image: `(3, H, W)` uint8 pixels, before normalization.
        boxes: `(K, 4)` float32 boxes `x0, y0, x1, y1` in [0, 1] of the frame.
        content_box: `(4,)` float32 rectangle of the image in the same frame; beyond [0, 1] if the image is cropped.
        masks: `(H, W)` bool masks by the name of their structure.
    """

    image: Tensor
    boxes: Tensor
    content_box: Tensor
    masks: dict[str, Tensor]


class ImageTransform:
    """Transform of an image, its boxes and its masks into the model's frame; see `__call__`.

    Args:
        size: Height and width of the model's input.
        resize_mode: `longest` fits the longest side and pads with black, `shortest` fits the shortest side and crops to
            the middle, `squash` stretches.
        augment: Whether to apply mild random rotation, shift and scale, brightness, contrast and gamma, as in training.
            The draws depend on `seed` alone.
    """

    def __init__(self, size: tuple[int, int], resize_mode: ResizeMode = "longest", *, augment: bool = False) -> None:
        check_choices(ImageTransform.__init__, locals())
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"The model's input must have a positive height and width, got {tuple(size)}.")
        self.size = (int(size[0]), int(size[1]))
        # Width and height twice, to clip and scale boxes.
        self._ends = np.array([self.size[1], self.size[0]] * 2, dtype=np.float32)
        self.resize_mode = resize_mode
        self.augmentation = _augmentation() if augment else None

    @property
    def settings(self) -> str:
        """The arguments on which `target_size` depends, for the names of cached images."""
        return f"{self.size[0]}x{self.size[1]} {self.resize_mode}"

    def target_size(self, size: Size) -> Size:
        """Height and width to which an image of `size` is resized before padding or cropping."""
        if self.resize_mode == "squash":
            return self.size
        ratios = [frame / side for frame, side in zip(self.size, size, strict=True)]
        scale = min(ratios) if self.resize_mode == "longest" else max(ratios)
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def __call__(
        self,
        pixels: np.ndarray,
        boxes: Sequence[Sequence[float]] = (),
        *,
        size: Size | None = None,
        seed: int = 0,
        masks: Mapping[str, np.ndarray] | None = None,
    ) -> Framed:
        """Image, boxes, the image's rectangle and masks in the model's frame.

        Boxes that a crop or augmentation moves out of the frame are dropped; the image's rectangle may reach outside.

        Args:
            pixels: Pixels `(h, w)` uint8.
            boxes: Boxes `x0, y0, x1, y1` in pixels of the stored image.
            size: Height and width of the stored image, if `pixels` is resized.
            seed: Random seed of the augmentation.
            masks: Masks `(h, w)` bool of the whole image, at any resolution.

        Raises:
            ValueError: `pixels` has another shape or type, or a box covers nothing of the image.
        """
        if pixels.ndim != 2 or pixels.dtype != np.uint8 or not pixels.size:
            raise ValueError(f"pixels must be (h, w) uint8, got {pixels.shape} {pixels.dtype}.")
        stored = size or (pixels.shape[0], pixels.shape[1])
        drawn, place = self._place(_clipped(boxes, stored), stored)
        left, top, width, height = place
        framed, drawn = self._put(pixels, place), np.clip(drawn[self._inside(drawn)], 0, self._ends)
        planes = [self._put(mask.astype(np.uint8) * 255, place) for mask in (masks or {}).values()]
        # The image's corners, clockwise from the upper left.
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) + np.array(
            [left, top], np.float32
        )
        if self.augmentation is not None:
            self.augmentation.set_random_seed(seed)
            further = {"masks": planes} if planes else {}
            out = self.augmentation(image=framed, bboxes=drawn, keypoints=corners, **further)
            framed, drawn, corners = out["image"], np.reshape(out["bboxes"], (-1, 4)), out["keypoints"]
            planes = out.get("masks", [])
        image = torch.from_numpy(np.ascontiguousarray(framed)).expand(3, -1, -1)
        found = {name: torch.from_numpy(plane > 127) for name, plane in zip(masks or {}, planes, strict=True)}
        return Framed(image, _tensor(drawn / self._ends), _tensor(_rectangle(corners) / self._ends), found)

    def map_on_image(self, heat: np.ndarray, size: Size) -> np.ndarray:
        """A map of the model's frame on the pixels of the stored image, `(h, w)` float32; 0 where a crop cut.

        Args:
            heat: Map `(H, W)` in the model's frame.
            size: Height and width of the stored image.
        """
        _, (left, top, width, height) = self._place(np.empty((0, 4), np.float32), size)
        scale = np.array([width / size[1], height / size[0]])
        # Position in the frame of a stored pixel, both with half-pixel centers.
        inverse = np.column_stack([np.diag(scale), 0.5 * scale + (left - 0.5, top - 0.5)])
        placed = cv2.warpAffine(
            np.ascontiguousarray(heat, np.float32),
            inverse,
            (size[1], size[0]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        for axis, (start, ratio) in enumerate(((top, scale[1]), (left, scale[0]))):
            centers = (np.arange(size[axis]) + 0.5) * ratio + start
            outside = (centers < 0) | (centers > self.size[axis])
            placed[(slice(None),) * axis + (outside,)] = 0
        return placed

    def boxes_on_image(self, boxes: np.ndarray, size: Size) -> np.ndarray:
        """Boxes `(K, 4)` in [0, 1] of the model's frame in pixels of the stored image, clipped to the image.

        The inverse of the boxes of `__call__` without augmentation.

        Args:
            boxes: Boxes `x0, y0, x1, y1`.
            size: Height and width of the stored image.
        """
        _, (left, top, width, height) = self._place(np.empty((0, 4), np.float32), size)
        stored = np.array([size[1], size[0]] * 2, dtype=np.float64)
        placed = (np.asarray(boxes, np.float64).reshape(-1, 4) * self._ends - [left, top] * 2) / ([width, height] * 2)
        return np.clip(placed * stored, 0, stored)

    def count_cut(self, boxes: Sequence[Sequence[float]], size: Size) -> tuple[int, int]:
        """Number of boxes that the crop cuts, and number of boxes that it removes, both for an image of `size`."""
        framed, _ = self._place(_clipped(boxes, size), size)
        inside = self._inside(framed)
        # Cuts of less than a pixel of the frame do not count.
        is_cut = (np.abs(framed - np.clip(framed, 0, self._ends)) >= 1).any(1)
        return int((is_cut | ~inside).sum()), int((~inside).sum())

    def _put(self, pixels: np.ndarray, place: tuple[int, int, int, int]) -> np.ndarray:
        """Pixels in the model's frame, `(H, W)` uint8: resized, then padded with black or cropped."""
        left, top, width, height = place
        resized = resize_image(pixels, (height, width))
        framed = np.zeros(self.size, dtype=np.uint8)
        part = resized[max(-top, 0) : self.size[0] - top, max(-left, 0) : self.size[1] - left]
        framed[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]] = part
        return framed

    def _place(self, boxes: np.ndarray, stored: Size) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Boxes in pixels of the model's frame, and left, top, width and height of the image in it."""
        height, width = self.target_size(stored)
        left, top = (self.size[1] - width) // 2, (self.size[0] - height) // 2
        # From the size in whole pixels, to keep boxes and image aligned.
        scale = np.array([width / stored[1], height / stored[0]], dtype=np.float32)
        origin = np.array([left, top], dtype=np.float32)
        return boxes * np.tile(scale, 2) + np.tile(origin, 2), (left, top, width, height)

    def _inside(self, drawn: np.ndarray) -> np.ndarray:
        """Whether boxes `(K, 4)` overlap the model's frame, `(K,)` bool."""
        return np.all(drawn[:, 2:] > 0, axis=1) & np.all(drawn[:, :2] < self._ends[:2], axis=1)


def _clipped(boxes: Sequence[Sequence[float]], stored_size: Size) -> np.ndarray:
    """The boxes `(K, 4)` clipped to the image."""
    height, width = stored_size
    drawn = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    clipped = np.clip(drawn, 0, np.array([width, height] * 2, dtype=np.float32))
    # In this form NaN fails, too.
    empty = ~((clipped[:, 2:] > clipped[:, :2]).all(1))
    if empty.any():
        raise ValueError(
            f"The box {drawn[empty][0].tolist()} (x0, y0, x1, y1) covers nothing of the {width} x {height} image. Give "
            "boxes in pixels of the stored image."
        )
    return clipped


def _rectangle(corners: np.ndarray) -> np.ndarray:
    """The upright rectangle `x0, y0, x1, y1` nearest to four corners, which are clockwise from the upper left."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = np.asarray(corners)[:, :2]
    return np.array([ax + dx, ay + by, bx + cx, cy + dy]) / 2


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _augmentation() -> A.Compose:
    # This import takes a second, and only training needs it.
    import albumentations as A

    steps = [
        A.Affine(
            scale=(0.92, 1.08),
            translate_percent=(-0.04, 0.04),
            rotate=(-6, 6),
            balanced_scale=True,
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            p=0.8,
        ),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.8),
        A.RandomGamma(gamma_limit=(80, 125), p=0.5),
    ]
    return A.Compose(
        steps,
        bbox_params=A.BboxParams("pascal_voc", min_area=1, clip=True),
        keypoint_params=A.KeypointParams("xy", remove_invisible=False),
    )
