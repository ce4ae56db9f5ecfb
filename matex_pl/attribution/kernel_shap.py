"""Shapley values of patches and words, by regression over coalitions."""

from __future__ import annotations

from itertools import count
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.core.fill import Fill, fill_images
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, TextTower, Tower, Trace, TwoTowerMethod
from matex_pl.console import progress
from matex_pl.maps import differ

MAX_FEATURES = 64


class KernelShap(TwoTowerMethod):
    """Kernel SHAP (Lundberg and Lee 2017): feature values whose sums over coalitions best fit the scores of these.

    Features of an image are its patches, or square groups of patches if there are more than 64. Features of a phrase
    are its content tokens. Features outside a coalition are filled, or replaced by pad tokens. The values add up to
    S(all) - S(nothing) exactly. If `samples` covers all coalitions, the values are the Shapley values. Otherwise
    coalitions are drawn in pairs with their complements, one bank for all pairs of a call. The map is the positive
    part.

    Released code:

    - `shap` also enumerates the smallest and largest coalitions if there are too many for all. By default it drops
      features by LASSO, which would break the sum.
    - captum keeps the sum by a large weight, draws no complements, and gives every pixel the whole value of its group.

    Args:
        samples: Maximum number of coalitions.
        fill: Replacement of removed pixels: `mean_image`, `mean_color` (as published) or `blur`.
        seed: Random seed of the coalitions.
        chunk_size: Maximum number of samples in one forward; the batch size if that is larger.
        kwargs: `target` and `references` of `TwoTowerMethod`.

    `parts` holds the signed values: `values` `(B, N)` per patch, where a group's value is divided equally over its
    patches, and `text_values` `(B, T)`.
    """

    perturbs_inputs: ClassVar[bool] = True
    cost: ClassVar[str] = "2 forwards, and `samples` forwards of either tower, fewer where a phrase has few words"

    def __init__(
        self,
        samples: int = 512,
        fill: Fill = "mean_image",
        seed: int = 0,
        chunk_size: int = 128,
        **kwargs: Any,
    ) -> None:
        check_choices(KernelShap.__init__, locals())
        super().__init__(**kwargs)
        check_positive(samples=samples, chunk_size=chunk_size)
        self.samples = samples
        self.fill = fill
        self.seed = seed
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward; the coalitions need the direction and follow later."""
        if tower.inputs.device.type == "mps":
            raise NotImplementedError(
                "KernelShap solves its regression in float64, which Apple's MPS lacks. Move the model to the CPU."
            )
        embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            whole = (embedding * direction).sum(-1)
            if isinstance(tower, ImageTower):
                values = self._image(tower, direction, whole)
            else:
                assert isinstance(tower, TextTower)
                values = self._words(tower, direction, whole)
            return Relevance(values.relu(), {"values": values})

        return Trace(embedding, relevance_for)

    def _image(self, tower: ImageTower, direction: Tensor, whole: Tensor) -> Tensor:
        groups = patch_groups(tower.clip.grid)
        present = torch.ones(1, int(groups.max()) + 1, dtype=torch.bool, device=direction.device)
        groups = groups.to(direction.device)
        keep, weight = coalitions(present, self.samples, self.seed)
        fill = fill_images(self.fill, tower.clip, tower.inputs)
        shown = torch.cat([keep.new_zeros(1, *keep.shape[1:]), keep])[:, 0, groups]
        scores = []
        for part in progress(shown.split(max(1, self.chunk_size // len(tower.inputs))), "coalitions"):
            pixels = interpolate(part[:, None].to(direction), tower.clip.image_size, mode="nearest")[:, 0]
            scores.append(tower.score_kept(pixels, fill, direction))
        score = torch.cat(scores)
        values = shapley_regression(keep, weight, present, score[1:], score[0], whole, tower.clip.std.dtype)
        return (values / groups.flatten().bincount())[:, groups.flatten()]

    def _words(self, tower: TextTower, direction: Tensor, whole: Tensor) -> Tensor:
        keep, weight = coalitions(tower.keep, self.samples, self.seed)
        shown = torch.cat([keep.new_zeros(1, *keep.shape[1:]), keep])
        scores = tower.score_kept(shown, direction, self.chunk_size)
        return shapley_regression(keep, weight, tower.keep, scores[1:], scores[0], whole, tower.clip.std.dtype)


def patch_groups(grid: tuple[int, int], most: int = MAX_FEATURES) -> Tensor:
    """Group index of each patch, `(Gh, Gw)`: squares of the smallest side that gives at most `most` groups."""
    side = next(k for k in count(1) if ceil(grid[0] / k) * ceil(grid[1] / k) <= most)
    rows, columns = torch.arange(grid[0]) // side, torch.arange(grid[1]) // side
    return rows[:, None] * ceil(grid[1] / side) + columns


def coalitions(present: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions of the features of B samples, and their weights in the regression.

    If a sample has at most `samples` proper coalitions, each of them appears once, with the weight of Shapley's kernel.
    Otherwise sizes are drawn by that kernel and members at random, and every complement is added. The coalitions of a
    sample depend only on the seed and on its own features.

    Args:
        present: `(B, F)` bool, features of each sample.
        samples: S, the maximum number of coalitions.
        seed: Random seed of the draw.

    Returns:
        keep `(S, B, F)` bool and weight `(S, B)` float64, 0 where a sample has fewer coalitions than S.
    """
    sizes = present.sum(1)
    drawn, ones = _drawn(present, max(1, samples // 2), seed)
    every, kernel = _enumerated(present, max(len(drawn), 2))
    few = 2.0**sizes - 2 <= samples
    keep = torch.where(few[None, :, None], every, drawn)
    weight = torch.where(few, kernel, ones)
    used = weight.any(1)
    return keep[used], weight[used]


def _enumerated(present: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """First proper coalitions in the order of binary numbers, and their weights in Shapley's kernel."""
    size = present.sum(1)
    code = torch.arange(1, rows + 1, device=present.device)[:, None, None]
    place = (present.cumsum(1) - 1).clamp(0, 62)
    keep = ((code >> place) & 1).bool() & present
    members = keep.sum(2).double()
    there = code[:, :, 0] < 2.0 ** size.clamp(max=60) - 1
    ways = torch.lgamma(size + 1.0) - torch.lgamma(members + 1) - torch.lgamma(size - members + 1)
    kernel = (size - 1) / (ways.exp() * members * (size - members))
    return keep, torch.where(there, kernel, 0)


def _drawn(present: Tensor, half: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions drawn by Shapley's kernel and their complements, `(2 * half, B, F)`, with weight 1."""
    generator = torch.Generator().manual_seed(seed)
    quantile = torch.rand(half, 1, generator=generator).to(present.device)
    order = torch.rand(half, 1, present.shape[1], generator=generator).to(present.device)
    size, members = present.sum(1)[:, None], torch.arange(1, present.shape[1], device=present.device)
    share = torch.where(members < size, 1 / (members * (size - members)).clamp(min=1), 0).double().cumsum(1)
    share = share / share[:, -1:].clamp(min=1e-300)
    number = 1 + (quantile[..., None] > share).sum(2, keepdim=True)
    # The first `number` of the present features in the random order.
    rank = order.masked_fill(~present, torch.inf).argsort(2).argsort(2)
    keep = (rank < number) & present
    both = torch.stack([keep, present & ~keep], 1).flatten(0, 1)
    return both, torch.ones(both.shape[:2], dtype=torch.float64, device=present.device)


def shapley_regression(
    keep: Tensor,
    weight: Tensor,
    present: Tensor,
    scores: Tensor,
    empty: Tensor,
    whole: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Least-squares fit of S(z) - S(nothing) by the sum of the values in z, under the total S(all) - S(nothing).

    If all scores are equal up to rounding, the values are 0.

    Args:
        keep: `(S, B, F)` bool, or `(S, 1, F)` for all samples.
        weight: `(S, B)` or `(S, 1)` weights of the coalitions.
        present: `(B, F)` or `(1, F)` bool, features of each sample.
        scores: `(S, B)` scores of the coalitions.
        empty: `(B,)` scores without any feature.
        whole: `(B,)` scores with all features.
        dtype: Dtype of the computation of the scores, which bounds their rounding.

    Returns:
        `(B, F)` values, 0 for features that are not present.
    """
    members, ones = keep.double(), present.double()
    normal = torch.einsum("sbf,sb,sbg->bfg", members, weight, members)
    inverse = torch.linalg.pinv(normal, hermitian=True)
    gain = (whole - empty).double()
    moment = torch.einsum("sbf,sb->bf", members.expand(-1, len(gain), -1), weight * (scores - empty).double())
    free, shift = (torch.einsum("bfg,bg->bf", inverse, vector) for vector in (moment, ones))
    scale = (shift * ones).sum(1)
    missing = torch.where(scale > 0, (gain - free.sum(1)) / scale.where(scale > 0, 1), 0)
    values = free + missing[:, None] * shift
    # A single feature has no proper coalition.
    single = ones.sum(1, keepdim=True) == 1
    varies = differ(torch.cat([scores, empty[None], whole[None]]), dtype)[:, None]
    return (torch.where(single, gain[:, None] * ones, values) * varies).to(scores)
