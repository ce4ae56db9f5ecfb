"""Images that a tiny model learns to tell apart in seconds: one of four patterns in one of sixteen places."""

from __future__ import annotations

import numpy as np

from matex_pl.data import ChestXrayDataModule, ImageTextPair

PATTERNS = {
    "stripes across": np.tile([[255], [0]], (4, 8)),
    "stripes down": np.tile([255, 0], (8, 4)),
    "a bright square": np.full((8, 8), 255),
    "a dark square": np.zeros((8, 8)),
}
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
}


class PatternImages(ChestXrayDataModule):
    """Gray noise, 32 x 32, with a pattern of 8 x 8 pixels in one cell of the 4 x 4 raster, which its box says.

    Args:
        number: Images for training; a tenth of it for validation and for test.
        per_patient: Images of each patient.
    """

    def __init__(self, number: int = 160, per_patient: int = 1) -> None:
        super().__init__(image_size=32, batch_size=16, num_workers=0, resize_mode="squash", augment=False)
        self.number = number
        self.per_patient = per_patient
        self.reads = 0

    def list_pairs(self) -> list[ImageTextPair]:
        """One phrase per image."""
        splits = ["train"] * self.number + ["val"] * (self.number // 10) + ["test"] * (self.number // 10)
        return [self._pair(index, split) for index, split in enumerate(splits)]

    def _pair(self, index: int, split: str) -> ImageTextPair:
        x, y, name = self._draw(index)
        box = (8.0 * x, 8.0 * y, 8.0 * x + 8, 8.0 * y + 8)
        patient = f"{split}-{index // self.per_patient}"
        return ImageTextPair(
            f"image-{index}", patient, f"image-{index}", index, f"There is {name}.", (box,), name, (name,), split
        )

    def _draw(self, index: int) -> tuple[int, int, str]:
        rng = np.random.default_rng(index)
        return int(rng.integers(4)), int(rng.integers(4)), list(PATTERNS)[rng.integers(4)]

    def read_image(self, pair: ImageTextPair) -> np.ndarray:
        """Pixels `(32, 32)`."""
        self.reads += 1
        index = int(pair.image)
        x, y, name = self._draw(index)
        image = np.random.default_rng((index, 1)).integers(96, 160, (32, 32)).astype(np.uint8)
        image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = PATTERNS[name]
        return image
