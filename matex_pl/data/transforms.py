"""Transforms from a stored image to the model's frame. No other module imports albumentations.

Images are never flipped: the patient's right and left are part of the phrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


class ImageTransform:
    """Transform of an image and its boxes into the model's frame; see `__call__`.

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
        self, pixels: np.ndarray, boxes: Sequence[Sequence[float]] = (), *, size: Size | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image `(3, H, W)` uint8, boxes `(K, 4)` and the image's rectangle `(4,)` in [0, 1] of the model's frame.

        Boxes that a crop or augmentation moves out of the frame are dropped; the image's rectangle may reach outside.

        Args:
            pixels: Pixels `(h, w)` uint8.
            boxes: Boxes `x0, y0, x1, y1` in pixels of the stored image.
            size: Height and width of the stored image, if `pixels` is resized.
            seed: Random seed of the augmentation.

        Raises:
            ValueError: `pixels` has another shape or type, or a box covers nothing of the image.
        """
        if pixels.ndim != 2 or pixels.dtype != np.uint8 or not pixels.size:
            raise ValueError(f"pixels must be (h, w) uint8, got {pixels.shape} {pixels.dtype}.")
        stored = size or (pixels.shape[0], pixels.shape[1])
        framed, drawn, corners = self._frame(pixels, _clipped(boxes, stored), stored)
        if self.augmentation is not None:
            self.augmentation.set_random_seed(seed)
            out = self.augmentation(image=framed, bboxes=drawn, keypoints=corners)
            framed, drawn, corners = out["image"], np.reshape(out["bboxes"], (-1, 4)), out["keypoints"]
        image = torch.from_numpy(np.ascontiguousarray(framed)).expand(3, -1, -1)
        return image, _tensor(drawn / self._ends), _tensor(_rectangle(corners) / self._ends)

    def count_cut(self, boxes: Sequence[Sequence[float]], size: Size) -> tuple[int, int]:
        """Number of boxes that the crop cuts, and number of boxes that it removes, both for an image of `size`."""
        framed, _ = self._place(_clipped(boxes, size), size)
        inside = self._inside(framed)
        # Cuts of less than a pixel of the frame do not count.
        is_cut = (np.abs(framed - np.clip(framed, 0, self._ends)) >= 1).any(1)
        return int((is_cut | ~inside).sum()), int((~inside).sum())

    def _frame(self, image: np.ndarray, boxes: np.ndarray, stored: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, boxes and the image's corners, clockwise from the upper left, in pixels of the model's frame."""
        drawn, (left, top, width, height) = self._place(boxes, stored)
        pixels = resize_image(image, (height, width))
        framed = np.zeros(self.size, dtype=np.uint8)
        part = pixels[max(-top, 0) : self.size[0] - top, max(-left, 0) : self.size[1] - left]
        framed[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]] = part
        origin = np.array([left, top], dtype=np.float32)
        corners = origin + np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
        return framed, np.clip(drawn[self._inside(drawn)], 0, self._ends), corners

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
