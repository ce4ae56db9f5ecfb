"""Masks of lungs, heart and other structures of stored images: their sources, and masks that a table lists."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from matex_pl.data.chest import LUNGS
from matex_pl.data.images import Size, is_jpeg, read_image, read_levels, read_size, resize_image
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.rle import decode_coco, decode_pairs
from matex_pl.data.validation import BadRow, RowWarning, RuleError, aspect_differs, find_image, place_of, shorten

LUNGS_AND_HEART = (*LUNGS, "heart")
"""Names of the structures that measures of anatomy expect; sides are the patient's."""

MASK_COLUMN = re.compile(r"mask_(\w+)")
"""Columns with a mask of the named structure."""

# Two numbers or more, and not the name of a file.
_RUNS = re.compile(r"\s*[+-]?\d+\s[^./\\]*")


class MaskSource(ABC):
    """Masks of images by the path of an image. A source is pickled for the workers of a loader."""

    @abstractmethod
    def join(self, pairs: Sequence[ImageTextPair]) -> tuple[list[BadRow], list[RowWarning]]:
        """Find the masks of the images of all pairs, and return bad rows and warnings, without decoding masks.

        Raises:
            OSError: The source is missing.
            ValueError: The source cannot be read, or belongs to other images.
        """

    @abstractmethod
    def __contains__(self, image: object) -> bool:
        """Whether the source has masks of an image."""

    @abstractmethod
    def state(self, image: str) -> str:
        """Text that changes with the masks of an image, for names of cached masks; empty if no cache is needed."""

    @abstractmethod
    def read(self, image: str, size: Size) -> dict[str, np.ndarray]:
        """Masks `(h, w)` bool of an image by structure, at the resolution of the source.

        Args:
            image: Path of the image.
            size: Height and width of the stored image.

        Raises:
            OSError: A file is missing.
            ValueError: A mask cannot be read, or has another shape than the image.
        """


class ListedMasks(MaskSource):
    """Masks that the cells of a table name.

    A cell holds the path of an image file, pairs of `decode_pairs` at the size of the image, or JSON of COCO,
    `{"size": [height, width], "counts": ...}`.

    Args:
        root: Folder of the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cells: dict[str, dict[str, Any]] = {}
        self._sources: dict[tuple[str, str], tuple[str, int]] = {}

    def clear(self) -> None:
        """Remove all masks, before a table is read again."""
        self._cells, self._sources = {}, {}

    def join(self, pairs: Sequence[ImageTextPair]) -> tuple[list[BadRow], list[RowWarning]]:
        """Nothing, because `add` checks each mask."""
        return [], []

    def __contains__(self, image: object) -> bool:
        return image in self._cells

    def add(self, image: str, structure: str, cell: Any, size: Size, source: tuple[str, int]) -> list[RowWarning]:
        """Add the mask of a structure from a cell, and return warnings.

        Args:
            image: Path of the image.
            structure: Name of the structure.
            cell: Value of the cell.
            size: Height and width of the image.
            source: File and line of the row.

        Raises:
            OSError: A file cannot be read.
            ValueError: A mask has another shape than the image, is coded wrongly, or contradicts another row.
        """
        try:
            mask = _parsed(cell, self.root)
            known = self._cells.get(image, {}).get(structure)
            if known is not None and known != mask:
                place = place_of(self._sources[image, structure])
                raise RuleError(cell, f"the image has another mask of this structure in {place}")
            if isinstance(mask, Path):
                check_shape(read_size(mask), size)
                is_empty = False
            else:
                is_empty = known is None and not _decoded(mask, size).any()
        except RuleError as error:
            raise RuleError(error.value, f"mask_{structure}: {error.rule}") from None
        self._cells.setdefault(image, {})[structure] = mask
        self._sources.setdefault((image, structure), source)
        return [RowWarning(*source, structure, "mask empty")] if is_empty else []

    def state(self, image: str) -> str:
        """Sizes and times of the files, and digests of the codes."""
        return " ".join(f"{structure}: {_state(mask)}" for structure, mask in sorted(self._cells[image].items()))

    def read(self, image: str, size: Size) -> dict[str, np.ndarray]:
        """Masks of an image, see `MaskSource.read`."""
        found = {}
        for structure, mask in self._cells[image].items():
            try:
                found[structure] = _decoded(mask, size)
            except ValueError as error:
                text = str(error).rstrip(".")
                raise ValueError(f"mask_{structure} of {image}: {text}. Correct the mask.") from error
        return found


def add_masks(
    masks: ListedMasks, row: Any, path: Path, size: Size | None = None
) -> tuple[list[RowWarning], Size | None]:
    """Add the masks of a row's columns `mask_<structure>` to those of its image.

    Args:
        masks: Masks of the table.
        row: Row of the table, with `cells` and `source`.
        path: Path of the image.
        size: Height and width of the image, if known.

    Returns:
        Warnings, and the size of the image, if it is known or there are masks.
    """
    warnings: list[RowWarning] = []
    for name, cell in row.cells.items():
        structure = MASK_COLUMN.fullmatch(str(name))
        if structure and cell is not None and str(cell).strip():
            size = size or read_size(path)
            warnings += masks.add(str(path), structure[1].lower(), cell, size, row.source)
    return warnings, size


def check_shape(mask: Size, image: Size) -> None:
    """Raise RuleError if a mask has another ratio of height and width than its image.

    A copy of the mask or of the image at another resolution keeps the ratio, up to rounding.
    """
    if mask != image and (min(mask) < 1 or aspect_differs(mask, image)):
        rule = f"the mask has another shape than its image of {image[1]} x {image[0]}"
        raise RuleError(f"{mask[1]} x {mask[0]}", rule)


def read_mask_file(path: Path) -> np.ndarray:
    """Mask `(h, w)` bool of an image file: the pixels that are not black, or in a JPEG above 127.

    Raises:
        OSError: The file is missing.
        ValueError: The file is no readable image, or a dark JPEG.
    """
    noisy = is_jpeg(path)
    levels = read_image(path).pixels if noisy else read_levels(path)
    marked = levels > (127 if noisy else 0)
    if noisy and levels.any() and not marked.any():
        raise RuleError(path.name, "the mask is a JPEG without a pixel above 127: save it as PNG")
    return marked


def fit_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """Mask `(h, w)` bool resized to `size`: a pixel is inside if half of it is."""
    # Four rows and columns per pixel are enough. An average over all pixels of a radiograph takes 30 ms.
    step = max(1, min(mask.shape[0] // (4 * size[0]), mask.shape[1] // (4 * size[1])))
    thinned = np.ascontiguousarray(mask[step // 2 :: step, step // 2 :: step], dtype=np.uint8)
    return resize_image(thinned * 255, size) > 127


def _parsed(cell: Any, root: Path) -> Path | Mapping[str, Any] | Sequence[Any]:
    """The mask of a cell: the path of a file, JSON of COCO, or runs."""
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise RuleError(shorten(cell), "the mask is no JSON of COCO") from None
    if isinstance(cell, Mapping):
        size = cell.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise RuleError(shorten(str(size)), "the size of the mask is not [height, width]")
        if not isinstance(cell.get("counts"), str | list):
            raise RuleError(shorten(str(cell.get("counts"))), "the counts of the mask are neither text nor a list")
        return cell
    if isinstance(cell, list) or (isinstance(cell, str) and _RUNS.fullmatch(cell)):
        return cell
    if not isinstance(cell, str):
        raise RuleError(cell, "the mask is neither a file nor a run-length code")
    return find_image(root, cell.strip())


def _decoded(mask: Path | Mapping[str, Any] | Sequence[Any], size: Size) -> np.ndarray:
    if isinstance(mask, Path):
        check_shape(read_size(mask), size)
        return read_mask_file(mask)
    if isinstance(mask, Mapping):
        height, width = mask["size"]
        check_shape((height, width), size)
        return decode_coco(mask["counts"], (height, width))
    return decode_pairs(mask, size)


def _state(mask: Any) -> str:
    if isinstance(mask, Path):
        state = mask.stat()
        return f"{mask.resolve()} {state.st_size} {state.st_mtime_ns}"
    return blake2b(str(mask).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
