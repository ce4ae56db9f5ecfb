"""Random masks, weighted by the score of the masked input (RISE)."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.core.fill import Fill, fill_images
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, TextTower, Tower, Trace, TwoTowerMethod
from matex_pl.console import progress
from matex_pl.maps import differ


class Rise(TwoTowerMethod):
    """RISE (Petsiuk, Das and Saenko 2018): sum over masks m of `S(x m + fill (1 - m)) m / (masks * keep_probability)`.

    A mask is a coarse grid of zeros and ones, enlarged bilinearly to one grid step more than the image and cropped at a
    random place. In phrases each content token is kept or replaced by a pad token. All pairs of a call share the masks,
    which are made on the device in chunks.

    Released code explains a class probability and fills with the mean color. Its scripts use 6000 masks with a grid of
    8 and probability 0.1. Its enlargement mirrors at the border of the grid, while this one repeats the edge.

    Args:
        masks: Number of masks (4000 for the smaller network of the paper).
        grid_size: Side of the coarse grid.
        keep_probability: Probability in (0, 1) that a grid point or a token is kept.
        centered: Whether to subtract the mean score over the masks first. A cosine has a large constant part, and with
            few masks this constant times their unevenness dominates the map.
        fill: Replacement of removed pixels: `mean_image`, `mean_color` (as published) or `blur`.
        seed: Random seed of the masks.
        chunk_size: Maximum number of samples in one forward; the batch size if that is larger.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    perturbs_inputs: ClassVar[bool] = True
    cost: ClassVar[str] = "1 forward, and `masks` forwards of either tower, fewer where a phrase has few words"

    def __init__(
        self,
        masks: int = 4000,
        grid_size: int = 7,
        keep_probability: float = 0.5,
        centered: bool = False,
        fill: Fill = "mean_image",
        seed: int = 0,
        chunk_size: int = 128,
        **kwargs: Any,
    ) -> None:
        check_choices(Rise.__init__, locals())
        super().__init__(**kwargs)
        check_positive(masks=masks, grid_size=grid_size, chunk_size=chunk_size)
        if not 0 < keep_probability < 1:
            raise ValueError(f"keep_probability must be between 0 and 1, both excluded, got {keep_probability}.")
        self.masks = masks
        self.grid_size = grid_size
        self.keep_probability = keep_probability
        self.centered = centered
        self.fill = fill
        self.seed = seed
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward; the masked forwards need the direction and follow later."""
        if isinstance(tower, ImageTower):
            return Trace(tower.encode(), partial(self._image, tower))
        assert isinstance(tower, TextTower)
        return Trace(tower.encode(), partial(self._words, tower))

    def _image(self, tower: ImageTower, direction: Tensor) -> Relevance:
        fill = fill_images(self.fill, tower.clip, tower.inputs)
        grids, shifts = (part.to(direction.device) for part in self.bank(tower.clip.image_size))
        size = max(1, self.chunk_size // len(tower.inputs))
        weighted = direction.new_zeros(len(direction), *tower.clip.image_size)
        scores, kept = [], weighted.new_zeros(weighted.shape[1:])
        for rows in progress(list(zip(grids.split(size), shifts.split(size), strict=True)), "masks"):
            masks = draw_masks(*rows, tower.clip.image_size).to(direction)
            scores.append(tower.score_kept(masks, fill, direction))
            weighted += torch.einsum("sb,shw->bhw", scores[-1], masks)
            kept += masks.sum(0)
        if self.centered:
            score = torch.cat(scores)
            weighted -= score.mean(0)[:, None, None] * kept
            # If all scores are the same, the remainder is rounding error.
            weighted *= differ(score, tower.clip.std.dtype)[:, None, None]
        return Relevance(weighted / (self.masks * self.keep_probability))

    def _words(self, tower: TextTower, direction: Tensor) -> Relevance:
        generator = torch.Generator().manual_seed(self.seed)
        keep = torch.rand(self.masks, tower.inputs.shape[1], generator=generator) < self.keep_probability
        keep = keep.to(direction.device)
        score = tower.score_kept(keep[:, None], direction, self.chunk_size)
        score = (score - score.mean(0)) * differ(score, tower.clip.std.dtype) if self.centered else score
        values = torch.einsum("sb,st->bt", score, keep.to(score))
        return Relevance(values / (self.masks * self.keep_probability) * tower.keep)

    def bank(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Coarse grids `(masks, grid_size, grid_size)` bool and the offsets `(masks, 2)` of their crops, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        grids = torch.rand(self.masks, self.grid_size, self.grid_size, generator=generator) < self.keep_probability
        cell = torch.tensor([ceil(side / self.grid_size) for side in size])
        shifts = (torch.rand(self.masks, 2, generator=generator) * cell).long()
        return grids, shifts


def draw_masks(grids: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `(S, H, W)` in [0, 1]: grids `(S, n, n)` enlarged to n + 1 steps a side, cropped at `shifts` `(S, 2)`."""
    rows, columns = (_interpolation(shifts[:, axis], side, grids.shape[1]) for axis, side in enumerate(size))
    return torch.einsum("sin,snm,sjm->sij", rows, grids.to(rows), columns)


def _interpolation(shift: Tensor, side: int, cells: int) -> Tensor:
    """Share of each grid point in each pixel along one axis, `(S, side, cells)`: bilinear, with half-pixel centers."""
    enlarged = (cells + 1) * ceil(side / cells)
    place = (torch.arange(side, device=shift.device) + shift[:, None] + 0.5) * cells / enlarged - 0.5
    distance = place.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=shift.device)
    return (1 - distance.abs()).clamp(min=0)
