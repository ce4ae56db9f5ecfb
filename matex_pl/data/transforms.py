"""From a stored film to the model's frame: the only file that knows albumentations.

Films are never flipped: the patient's right and left are part of the phrase.
"""

from __future__ import annotations

from collections.abc import Sequence

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

GEOMETRIES = ("pad", "squash")

# A loader's worker is one process of many: OpenCV's own threads would only get in their way.
cv2.setNumThreads(0)


class FilmTransform:
    """A film with its boxes in the model's frame; see `__call__`.

    Args:
        size: Height and width of the model's input.
        geometry: `pad` keeps the film's shape and fills up with black, `squash` stretches it.
        augment: Mild rotation, shift and scale, brightness, contrast and gamma, for training. The draws come from `seed` alone.
    """

    def __init__(self, size: tuple[int, int], geometry: str = "pad", *, augment: bool = False) -> None:
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}.")
        self.size = size
        self.augment = augment
        steps = [*_frame(size, geometry), *(_augmentation() if augment else [])]
        self.pipeline = A.Compose(
            steps,
            bbox_params=A.BboxParams("pascal_voc", min_area=1, clip=True),
            keypoint_params=A.KeypointParams("xy", remove_invisible=False),
        )

    def __call__(
        self, film: np.ndarray, boxes: Sequence[Sequence[float]] = (), *, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image `(3, H, W)` uint8, boxes `(K, 4)` and the film's rectangle `(4,)` in [0, 1] of the model's frame.

        Boxes that augmentation moves out of the frame are dropped; the film's rectangle may reach outside.

        Args:
            film: `(h, w)` uint8.
            boxes: `x0, y0, x1, y1` each, in pixels of `film`.
            seed: Of the augmentation's draws.
        """
        height, width = film.shape
        if self.augment:
            self.pipeline.set_random_seed(seed)
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
        out = self.pipeline(image=film, bboxes=np.array(boxes, dtype=np.float32).reshape(-1, 4), keypoints=corners)
        scale = torch.tensor([self.size[1], self.size[0]] * 2, dtype=torch.float32)
        placed = torch.as_tensor(np.asarray(out["bboxes"], dtype=np.float32)).reshape(-1, 4)
        return _three_channels(out["image"]), placed / scale, _rectangle(out["keypoints"]) / scale


def _three_channels(film: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(film)).expand(3, -1, -1)


def _rectangle(corners: np.ndarray) -> Tensor:
    """The upright rectangle that is nearest to four corners, clockwise from the upper left: `x0, y0, x1, y1`."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = np.asarray(corners, dtype=np.float32)[:, :2]
    return torch.tensor([ax + dx, ay + by, bx + cx, cy + dy]) / 2


def _frame(size: tuple[int, int], geometry: str) -> list[A.BasicTransform]:
    height, width = size
    if geometry == "squash":
        return [A.Resize(height, width, interpolation=cv2.INTER_AREA)]
    return [
        A.LongestMaxSize(max_size_hw=(height, width), interpolation=cv2.INTER_AREA),
        A.PadIfNeeded(height, width, border_mode=cv2.BORDER_CONSTANT, fill=0),
    ]


def _augmentation() -> list[A.BasicTransform]:
    return [
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
