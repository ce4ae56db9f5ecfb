"""Films that a tiny model learns to tell apart in seconds: one of four patterns in one of sixteen places."""

from __future__ import annotations

import numpy as np

from matex_pl.data import ChestXrayDataModule, Study

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


class PatternFilms(ChestXrayDataModule):
    """Grey noise, 32 x 32, with a pattern of 8 x 8 pixels in one cell of the 4 x 4 raster, which its box says.

    Args:
        number: Films for training; a tenth of it for validation and for test.
        per_patient: Films of each patient.
    """

    def __init__(self, number: int = 160, per_patient: int = 1) -> None:
        super().__init__(image_size=32, batch_size=16, num_workers=0, resize_mode="squash", augment=False)
        self.number = number
        self.per_patient = per_patient
        self.reads = 0

    def list_studies(self) -> list[Study]:
        """One phrase per film."""
        splits = ["train"] * self.number + ["val"] * (self.number // 10) + ["test"] * (self.number // 10)
        return [self._study(index, split) for index, split in enumerate(splits)]

    def _study(self, index: int, split: str) -> Study:
        x, y, name = self._draw(index)
        box = (8.0 * x, 8.0 * y, 8.0 * x + 8, 8.0 * y + 8)
        patient = f"{split}-{index // self.per_patient}"
        return Study(
            f"film-{index}", patient, f"film-{index}", index, f"There is {name}.", (box,), name, (name,), split
        )

    def _draw(self, index: int) -> tuple[int, int, str]:
        rng = np.random.default_rng(index)
        return int(rng.integers(4)), int(rng.integers(4)), list(PATTERNS)[rng.integers(4)]

    def read_film(self, study: Study) -> np.ndarray:
        """Pixels `(32, 32)`."""
        self.reads += 1
        index = int(study.image)
        x, y, name = self._draw(index)
        film = np.random.default_rng((index, 1)).integers(96, 160, (32, 32)).astype(np.uint8)
        film[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = PATTERNS[name]
        return film
