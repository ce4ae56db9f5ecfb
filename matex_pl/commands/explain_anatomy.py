"""Masks of lungs, heart and other structures of the images that `matex explain` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from matex_pl.clip.device import find_device
from matex_pl.data.cache import ImageCache
from matex_pl.data.chexmask import ChexmaskTable
from matex_pl.data.images import read_size
from matex_pl.data.masks import ListedMasks, MaskSource
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.segmenter import SEGMENTER, SegmentedMasks
from matex_pl.data.validation import log_warnings


class ImageMasks:
    """Masks of images, from the columns of a table, from CheXmask, or by a segmentation.

    Args:
        anatomy: CSV file of CheXmask, `torchxrayvision`, or None.
        images: The images.
        listed: Masks that a table names, which come first.
        device: Device of a segmentation, see `find_device`.

    Raises:
        ImportError: torchxrayvision is not installed.
        OSError: The CSV file is missing, or the weights of the segmentation cannot be loaded.
        ValueError: The CSV file has none of the images, or a wrong row of an image.
    """

    def __init__(
        self,
        anatomy: str | None,
        images: Sequence[Path],
        listed: ListedMasks | None = None,
        device: str = "auto",
    ) -> None:
        self._sources: list[MaskSource] = [listed] if listed is not None else []
        if anatomy is None:
            return
        # The folder lives as long as the masks are read.
        self._folder = TemporaryDirectory(prefix="matex-masks-")
        if anatomy == SEGMENTER:
            segmented = SegmentedMasks(ImageCache(Path(self._folder.name)))
            missing = [str(image) for image in images if listed is None or str(image) not in listed]
            segmented.segment(missing, find_device(device), num_workers=0)
            self._sources.append(segmented)
            return
        table = ChexmaskTable(Path(anatomy), Path(self._folder.name))
        pairs = [ImageTextPair(str(image), "", image.name, str(image), "", size=read_size(image)) for image in images]
        bad, warnings = table.join(pairs)
        if bad:
            raise ValueError(f"{bad[0]}. Correct the row, or leave out --anatomy.")
        log_warnings(warnings)
        self._sources.append(table)

    def __call__(self, image: Path) -> Mapping[str, np.ndarray]:
        """Masks `(h, w)` bool of an image by structure; none if no source has masks of the image.

        Raises:
            ValueError: A mask cannot be read, or has another shape than the image.
        """
        source = next((source for source in self._sources if str(image) in source), None)
        return {} if source is None else source.read(str(image), read_size(image))
