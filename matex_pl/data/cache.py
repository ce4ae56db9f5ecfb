"""A folder of decoded, resized images and masks, so each file is decoded only once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from matex_pl.data.images import GrayImage, TargetSize, read_image
from matex_pl.files import check_folder, remove_abandoned_parts, whole_file

# Part of the names of cached images: raise it when the same file gives other pixels than before.
_CACHE_VERSION = 3


@dataclass(frozen=True)
class ImageCache:
    """A folder of decoded, resized images and of their masks, one file each.

    The name of a file is a digest of the image's path, size, modification time, and the settings. A changed image or
    setting therefore creates a new file. Processes may share a folder.
    """

    folder: Path

    def prepare(self) -> None:
        """Check the folder, and remove the temporary files of killed processes from it.

        Raises:
            OSError: The folder is not writable and holds no images.
        """
        try:
            check_folder(self.folder)
        except OSError as error:
            # A folder with images from before is still read.
            if not any(self.folder.glob("??/*.npz")):
                raise
            _warn_uncached(self.folder, error.strerror or str(error))
        else:
            remove_abandoned_parts(self.folder)

    def read(
        self, path: str | Path, target_size: TargetSize, settings: str, *, apply_exif_orientation: bool = True
    ) -> GrayImage:
        """An image from the cache, or else from its file, with a warning if it cannot be stored; see `read_image`.

        Args:
            path: Image file.
            target_size: Function from the size of the file to the size after resizing.
            settings: Text of all arguments on which `target_size` depends.
            apply_exif_orientation: Whether to turn the image by its EXIF orientation.
        """
        kept = self._place(path, f"{settings} apply_exif_orientation={apply_exif_orientation}")
        image = _kept_image(kept)
        if image is None:
            image = read_image(path, target_size, apply_exif_orientation=apply_exif_orientation)
            try:
                # Temporary files lie in the top folder, where those of killed processes are found without a long list.
                with whole_file(kept, self.folder) as part, part.open("wb") as file:
                    np.savez(file, pixels=image.pixels, size=np.array(image.size))
            except OSError as error:
                _warn_uncached(self.folder, error.strerror or str(error))
        return image

    def read_masks(
        self, path: str | Path, settings: str, read: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Masks `(h, w)` bool of an image from the cache, or else from `read`, stored as an image is.

        Args:
            path: Image file.
            settings: Text of all arguments on which the masks depend.
            read: Function to the masks by structure, all of one shape.
        """
        masks = self.stored_masks(path, settings)
        if masks is None:
            masks = dict(read())
            try:
                self.store_masks(path, settings, masks)
            except OSError as error:
                _warn_uncached(self.folder, error.strerror or str(error))
        return masks

    def has_masks(self, path: str | Path, settings: str) -> bool:
        """Whether there are stored masks of an image."""
        return self._place(path, f"masks {settings}").is_file()

    def stored_masks(self, path: str | Path, settings: str) -> dict[str, np.ndarray] | None:
        """Stored masks `(h, w)` bool of an image by structure; None if they are missing or broken."""
        try:
            with np.load(self._place(path, f"masks {settings}"), allow_pickle=False) as kept:
                return dict(zip(kept["names"].tolist(), kept["masks"], strict=True))
        # A missing file, or broken bytes, which raise all kinds of errors.
        except Exception:
            return None

    def store_masks(self, path: str | Path, settings: str, masks: Mapping[str, np.ndarray]) -> None:
        """Store masks `(h, w)` bool of an image by structure, all of one shape.

        Raises:
            OSError: The folder is full or read-only.
        """
        planes = np.stack(list(masks.values())) if masks else np.empty((0, 1, 1), dtype=bool)
        with whole_file(self._place(path, f"masks {settings}"), self.folder) as part, part.open("wb") as file:
            np.savez_compressed(file, names=np.array(list(masks), dtype=str), masks=planes)

    def _place(self, path: str | Path, settings: str) -> Path:
        try:
            path = Path(path).resolve()
            state = path.stat()
        except OSError as error:
            raise FileNotFoundError(f"There is no image at {str(path)!r}. Check the path.") from error
        text = f"{_CACHE_VERSION} {path} {state.st_size} {state.st_mtime_ns} {settings}"
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.npz"


def _kept_image(path: Path) -> GrayImage | None:
    """An image of the cache; None if it is missing or broken."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            height, width = (int(side) for side in kept["size"])
            return GrayImage(kept["pixels"], (height, width))
    # Broken bytes raise all kinds of errors here too.
    except Exception:
        return None


@lru_cache  # One warning per process.
def _warn_uncached(folder: Path, reason: str) -> None:
    warnings.warn(
        f"cache_dir {folder} is full or read-only ({reason}). Images that are not cached are decoded each time.",
        stacklevel=2,
    )
