"""Masks of lungs and heart from the segmentation model of torchxrayvision, computed once per image."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from matex_pl.console import progress
from matex_pl.data.cache import ImageCache
from matex_pl.data.images import Size, read_image
from matex_pl.data.masks import LUNGS_AND_HEART, MaskSource
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.transforms import ImageTransform
from matex_pl.data.validation import BadRow, RowWarning

SEGMENTER = "torchxrayvision"
"""Value of `anatomy` that segments images."""

_SIDE, _BATCH = 512, 8
# Part of the names of stored masks: raise it when the same image gives other masks than before.
_SETTINGS = f"{SEGMENTER} PSPNet 1"


class SegmentedMasks(MaskSource):
    """Masks of lungs and heart from `torchxrayvision.baseline_models.chestx_det.PSPNet` (Lian et al., 2021).

    The model reads images of 512 x 512 pixels, in [-1024, 1024], and gives logits of 14 structures. An image is fitted
    into this frame and padded with black. A pixel belongs to a structure if its probability is above 0.5. The masks are
    stored in the cache at this resolution, without the padding.

    Args:
        cache: Cache of the data module.
        apply_exif_orientation: Whether to turn images by their EXIF orientation.
    """

    def __init__(self, cache: ImageCache, *, apply_exif_orientation: bool = True) -> None:
        self.cache = cache
        self.apply_exif_orientation = apply_exif_orientation
        self._unreadable: set[str] = set()

    def join(self, pairs: Sequence[ImageTextPair]) -> tuple[list[BadRow], list[RowWarning]]:
        """Nothing, because masks of all images can be computed."""
        return [], []

    def __contains__(self, image: object) -> bool:
        try:
            return self.cache.has_masks(str(image), self._settings)
        except FileNotFoundError:
            return False

    def state(self, image: str) -> str:
        """Nothing, because the masks are in the cache already."""
        return ""

    def read(self, image: str, size: Size) -> dict[str, np.ndarray]:
        """Masks of an image at up to 512 x 512 pixels; see `MaskSource.read`."""
        masks = self.cache.stored_masks(image, self._settings)
        if masks is None:
            raise ValueError(f"The stored masks of {image} in {self.cache.folder} are damaged. Remove this folder.")
        return masks

    @property
    def _settings(self) -> str:
        return f"{_SETTINGS} apply_exif_orientation={self.apply_exif_orientation}"

    def segment(self, images: Sequence[str], device: str | torch.device, num_workers: int) -> None:
        """Compute and store the masks of images. After an interruption, a further call continues.

        Args:
            images: Paths of images without stored masks.
            device: Device of the model.
            num_workers: Number of processes that read images.

        Raises:
            ImportError: torchxrayvision is not installed.
            OSError: The weights cannot be loaded, or the cache cannot be written.
        """
        images = [image for image in images if image not in self._unreadable]
        if not images:
            return
        model: Any = None
        loader = DataLoader(
            _Frames(images, apply_exif_orientation=self.apply_exif_orientation),
            batch_size=_BATCH,
            num_workers=num_workers,
            collate_fn=list,
        )
        missing = dict.fromkeys(LUNGS_AND_HEART, 0)
        for batch in progress(loader, f"segmentation, by {_BATCH}"):
            read = [frame for frame in batch if frame[1] is not None]
            self._unreadable |= {path for path, pixels, _ in batch if pixels is None}
            if not read:
                continue
            model = model or _load_model().to(device)
            places = [model.targets.index(name.replace("_", " ").title()) for name in LUNGS_AND_HEART]
            with torch.inference_mode():
                pixels = torch.stack([pixels for _, pixels, _ in read]).to(device)
                inside = model(pixels.float() / 255 * 2048 - 1024)[:, places] > 0
            for (path, _, box), planes in zip(read, inside.cpu(), strict=True):
                left, top, right, bottom = (box * _SIDE).round().int().tolist()
                masks = dict(zip(LUNGS_AND_HEART, planes[:, top:bottom, left:right].numpy(), strict=True))
                self.cache.store_masks(path, self._settings, masks)
                for name, mask in masks.items():
                    missing[name] += not mask.any()
        if any(missing.values()):
            counts = ", ".join(f"{count} of the {name.replace('_', ' ')}" for name, count in missing.items() if count)
            rank_zero_warn(f"The segmentation of {len(images)} images gave empty masks: {counts}.")


class _Frames(Dataset[Any]):
    """Path, pixels `(1, 512, 512)` uint8 and rectangle of each image; the pixels are None if it is unreadable."""

    def __init__(self, images: Sequence[str], *, apply_exif_orientation: bool) -> None:
        self.images = images
        self.apply_exif_orientation = apply_exif_orientation
        self.transform = ImageTransform((_SIDE, _SIDE), "longest")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, Tensor | None]:
        path = self.images[index]
        try:
            image = read_image(path, self.transform.target_size, apply_exif_orientation=self.apply_exif_orientation)
        except (OSError, ValueError, ImportError):
            # The loader of the pairs reports the image.
            return path, None, None
        framed = self.transform(image.pixels, size=image.size)
        return path, framed.image[:1].contiguous(), framed.content_box


def _load_model() -> Any:
    """The model, in evaluation mode."""
    try:
        models = importlib.import_module("torchxrayvision.baseline_models.chestx_det")
    except ImportError as error:
        raise ImportError(
            f"anatomy: {SEGMENTER} needs a package that is not installed ({error}). Install it: pip install "
            "'matex_pl[anatomy]'"
        ) from error
    try:
        return models.PSPNet().eval()
    # The package raises errors of its download, of its files and of torch.
    except Exception as error:
        raise OSError(
            f"The weights of PSPNet cannot be loaded ({error}). On a machine without a connection, copy "
            "pspnet_chestxray_best_model_4.pth into ~/.torchxrayvision/models_data."
        ) from error
