"""The built-in data module: synthetic chest radiographs with exact boxes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.phantom.cache import phantom_cache
from matex_pl.data.phantom.canvas import Field, Mask
from matex_pl.data.phantom.findings import FINDINGS
from matex_pl.data.phantom.framing import Framing
from matex_pl.data.phantom.image import check_arguments, phantom_build, phantom_masks
from matex_pl.data.phantom.thorax import SIDES, heart_outline, lung_outline
from matex_pl.data.transforms import ImageTransform

# With this share of patients, 98 % of the area of all boxes is inside of the thorax, and the tag of `shortcut` is not.
_THORAX_SHARE = 0.02


class PhantomDataModule(ChestXrayDataModule):
    """Phantoms: synthetic images with MS-CXR's eight findings and nodules, exact boxes, and phrases as in reports.

    The images are drawn on first use and stored below `root`.

    Args:
        root: Folder of the image cache.
        num_train: Number of training images, with a pair for each of their one to three findings.
        num_val: Number of validation images.
        num_test: Number of test images.
        stored_size: Side of the stored images in pixels.
        shortcut: Probability in [0, 1] that an image with `shortcut_finding` gets a tag in a corner. The tag tests
            whether maps reveal a model that reads it.
        shortcut_finding: Finding that the tag marks.
        framing: `tight` fills the image with the chest. `loose` draws the same patients smaller (scale 0.7 to 1),
            shifted and turned, with arms, neck and abdomen.
        kwargs: Arguments of `ChestXrayDataModule`. The images depend on `seed` too.
    """

    def __init__(
        self,
        root: str = "data/phantom",
        num_train: int = 10_000,
        num_val: int = 1_000,
        num_test: int = 1_000,
        stored_size: int = 192,
        shortcut: float = 0.0,
        shortcut_finding: str = "pneumothorax",
        framing: Framing = "tight",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(stored_size, shortcut, shortcut_finding, framing)
        if min(num_train, num_val, num_test) < 0:
            raise ValueError(
                f"num_train, num_val and num_test must not be negative, got {num_train}, {num_val} and {num_test}."
            )
        self.root = Path(root)
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.stored_size = stored_size
        self.shortcut = shortcut
        self.shortcut_finding = shortcut_finding
        self.framing: Framing = framing
        self._images: NDArray[np.uint8] | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """The nine findings."""
        return FINDINGS

    def prepare_data(self) -> None:
        """Draw the images, unless they are cached."""
        self.list_pairs()

    def list_pairs(self) -> list[ImageTextPair]:
        """One pair per image and finding."""
        self._images, pairs = phantom_cache(
            self.root,
            splits={"train": self.num_train, "val": self.num_val, "test": self.num_test},
            seed=self.seed,
            size=self.stored_size,
            shortcut=self.shortcut,
            shortcut_finding=self.shortcut_finding,
            framing=self.framing,
        )
        return pairs

    def read_image(self, pair: ImageTextPair) -> NDArray[np.uint8]:
        """Pixels of an image, `(stored_size, stored_size)`."""
        if self._images is None:
            self.list_pairs()
        assert self._images is not None
        return self._images[int(pair.image)]

    def read_masks(self, pair: ImageTextPair) -> Mapping[str, Mask]:
        """Exact masks `(stored_size, stored_size)` bool of `left_lung`, `right_lung` and `heart`.

        A lung is the part of the pleural cavity that heart and mediastinum do not hide, with any finding in it.
        """
        return phantom_masks(int(pair.image), seed=self.seed, size=self.stored_size, framing=self.framing)

    def thorax(self) -> Tensor:
        """Mask of pleural cavities or heart in at least 2 % of the images, `(H, W)` bool in the model's frame."""
        zone = thorax_share(self.stored_size, seed=self.seed, framing=self.framing) >= _THORAX_SHARE
        framed = ImageTransform(self._frame(), self.resize_mode)(zone.astype(np.uint8) * 255)
        return framed.image[0] > 127

    def __getstate__(self) -> dict[str, Any]:
        """The state without the images: pickling would copy the memory map, which each worker opens instead."""
        return {**super().__getstate__(), "_images": None}


@lru_cache(maxsize=4)
def thorax_share(size: int = 192, *, seed: int = 0, num_images: int = 400, framing: Framing = "tight") -> Field:
    """Share of a series' first images whose pleural cavities or heart cover a pixel, `(size, size)`, read-only."""
    covered = np.zeros((size, size), np.int32)
    for index in range(num_images):
        build = phantom_build(index, seed, framing=framing)
        canvas = build.canvas(size)
        organs = [heart_outline(build), *(lung_outline(build, side) for side in SIDES)]
        covered += canvas.mask(organs)
    share = (covered / num_images).astype(np.float32)
    share.setflags(write=False)
    return share
