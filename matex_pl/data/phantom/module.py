"""The embedded default: synthetic chest films with exact boxes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.phantom.cache import film_cache
from matex_pl.data.phantom.canvas import Canvas, Field
from matex_pl.data.phantom.film import film_build
from matex_pl.data.phantom.findings import FINDINGS
from matex_pl.data.phantom.thorax import SIDES, heart_outline, lung_outline
from matex_pl.data.study import Study
from matex_pl.data.transforms import FilmTransform

# Below what one patient in fifty has there, a place is outside of the thorax: 98 % of the area of all boxes is inside,
# and no patient's lung reaches the token of `shortcut`.
_THORAX_SHARE = 0.02


class PhantomDataModule(ChestXrayDataModule):
    """Phantoms: films drawn by a program, with MS-CXR's eight findings and nodules, their boxes and phrases of reports.

    They are drawn once, in about a minute on two cores, and kept below `root`; no film depends on anything but seed
    and index.

    Args:
        root: Folder of the film cache.
        num_train: Films for training; each has one to three findings, which make as many pairs.
        num_val: Films for validation.
        num_test: Films for test.
        film_size: Side of the stored films in pixels.
        shortcut: Probability in [0, 1] that a film with `shortcut_finding` gets a token in a corner, to see whether a
            map catches a model that reads the token.
        shortcut_finding: The finding that the token gives away.
        kwargs: Arguments of `ChestXrayDataModule`. The images depend on `seed` too.
    """

    def __init__(
        self,
        root: str = "data/phantom",
        num_train: int = 10_000,
        num_val: int = 1_000,
        num_test: int = 1_000,
        film_size: int = 192,
        shortcut: float = 0.0,
        shortcut_finding: str = "pneumothorax",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= shortcut <= 1:
            raise ValueError(f"shortcut must be a probability in [0, 1], got {shortcut}.")
        if shortcut_finding not in FINDINGS:
            raise ValueError(f"shortcut_finding must be one of {', '.join(FINDINGS)}; got {shortcut_finding!r}.")
        self.root = Path(root)
        self.splits = {"train": num_train, "val": num_val, "test": num_test}
        self.film_size = film_size
        self.shortcut = shortcut
        self.shortcut_finding = shortcut_finding
        self._films: NDArray[np.uint8] | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """The nine findings."""
        return FINDINGS

    def prepare_data(self) -> None:
        """Draw the films, unless they are there."""
        self._open()

    def _open(self) -> tuple[NDArray[np.uint8], list[Study]]:
        return film_cache(
            self.root,
            splits=self.splits,
            seed=self.seed,
            size=self.film_size,
            shortcut=self.shortcut,
            shortcut_finding=self.shortcut_finding,
        )

    def list_studies(self) -> list[Study]:
        """One study per film and finding."""
        self._films, studies = self._open()
        return studies

    def read_film(self, study: Study) -> NDArray[np.uint8]:
        """Pixels of a film, `(film_size, film_size)`."""
        if self._films is None:
            self._films, _ = self._open()
        return self._films[int(study.image)]

    def thorax(self) -> Tensor:
        """Where pleural cavities or heart lie in at least 2 % of the series' films, `(H, W)` bool in the model's frame.

        Raises:
            ValueError: There is neither an `image_size` nor a model to take it from.
        """
        zone = thorax_share(self.film_size, seed=self.seed) >= _THORAX_SHARE
        framed, _, _ = FilmTransform(self._frame(), self.resize_mode)(zone.astype(np.uint8) * 255)
        return framed[0] > 127

    def __getstate__(self) -> dict[str, Any]:
        """Without the films: pickling a memory map would copy them; a worker opens its own."""
        return {**super().__getstate__(), "_films": None}


@lru_cache(maxsize=4)
def thorax_share(size: int = 192, *, seed: int = 0, num_films: int = 400) -> Field:
    """Share of the first films of a series on which pleural cavities or heart cover a place, `(size, size)` in [0, 1].

    Only outlines are drawn, no films: some hundred take a fraction of a second. The array is kept, and read-only.

    Args:
        size: Side of the films in pixels.
        seed: Which series.
        num_films: How many films are counted.
    """
    covered = np.zeros((size, size), np.int32)
    for index in range(num_films):
        build = film_build(index, seed)
        canvas = Canvas(size, midline=build.midline, tilt=build.tilt)
        organs = [heart_outline(build), *(lung_outline(build, side) for side in SIDES)]
        covered += canvas.fill(organs) > 0.5
    share = (covered / num_films).astype(np.float32)
    share.setflags(write=False)
    return share
