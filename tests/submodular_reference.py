"""Less is more, one pair and one subset of regions at a time; to be moved into `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from reference import Side, both_sides, encode_text, filled, patch_groups, run
from torch import Tensor

from matex_pl.attribution.target import REFERENCES
from matex_pl.clip import Clip

Subset = Sequence[int]


def raw_submodular_regions(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    regions: int = 49,
    confidence: float = 0.05,
    effectiveness: float = 0.01,
    consistency: float = 20.0,
    collaboration: float = 5.0,
    pending: int = 8,
    fill: Tensor | None = None,
    explain: str = "cosine",
    references: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Less is more (Chen et al. 2024), with the bidirectional search of its successor unless `pending` is 0.

    Beside `image` (B, N), the parts `order` (B, R), `insertion`, `deletion` (B, R + 1), `gains` (B, R) and `region`
    (B, N). There is no text side.

    Args:
        regions: Groups of patches that an image has at most.
        confidence, effectiveness, consistency, collaboration: Weights.
        pending: Candidates that are tried for the least important place.
        fill: As in `filled`.
    """

    def pixels(side: Side) -> dict[str, Tensor]:
        groups, base = patch_groups(side.tower.grid, regions), filled(side, fill)
        everything = list(range(max(groups) + 1))
        worth = region_scores(side, explain, list(references or REFERENCES))
        embeddings = [kept_regions(side, base, groups, [i]) for i in everything]
        known: dict[frozenset[int], tuple[Tensor, Tensor]] = {}

        def scores(subset: Subset) -> tuple[Tensor, Tensor]:
            if frozenset(subset) not in known:
                known[frozenset(subset)] = worth(kept_regions(side, base, groups, subset))
            return known[frozenset(subset)]

        def value(subset: Subset) -> Tensor:
            rest = [i for i in everything if i not in subset]
            score, certain = scores(subset)
            return confidence * certain + consistency * score + collaboration * (1 - scores(rest)[0])

        def spread(subset: Subset) -> Tensor:
            return effectiveness * least_angles([embeddings[i] for i in subset])

        order = greedy_order(len(everything), pending, value, spread)
        insertion, deletion = ([scores(part)[0] for part in parts] for parts in starts_and_rests(order))
        gains, values = falling_values(insertion, deletion)
        return {
            "map": torch.stack([values[order.index(group)] for group in groups]),
            "order": torch.tensor(order),
            "insertion": torch.stack(insertion),
            "deletion": torch.stack(deletion),
            "gains": torch.stack(gains),
            "region": torch.tensor(groups),
        }

    return both_sides(clip, images, tokens, pixels, None, explain=explain, references=references)


def starts_and_rests(order: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """The first regions of the order, from none to all, and those that are not among them."""
    return [order[:r] for r in range(len(order) + 1)], [order[r:] for r in range(len(order) + 1)]


@torch.no_grad()
def kept_regions(side: Side, base: Tensor, groups: list[int], kept: Subset) -> Tensor:
    """Embedding of the image with the pixels of `base` in all groups that are not kept."""
    x, (rows, columns) = side.x.detach().clone(), side.tower.grid
    height, width = x.shape[1] // rows, x.shape[2] // columns
    for place, group in enumerate(groups):
        if group not in kept:
            y, left = place // columns * height, place % columns * width
            x[:, y : y + height, left : left + width] = base[:, y : y + height, left : left + width]
    return run(side.tower, x).embedding


@torch.no_grad()
def region_scores(side: Side, explain: str, references: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What an embedding is worth: what is explained, and the confidence, of a softmax over phrase and references."""
    rows = [side.tokens]
    for phrase in references:
        row = side.clip.tokenize([phrase])[0]
        if not any(torch.equal(row, other) for other in rows):
            rows.append(row)
    classes = [encode_text(side.clip, row)[0] for row in rows]

    def scores(embedding: Tensor) -> tuple[Tensor, Tensor]:
        logits = [side.clip.logit_scale.exp() * (embedding * word).sum() for word in classes]
        shares = [logit.exp() / sum(other.exp() for other in logits) for logit in logits]
        entropy = -sum(share * share.log() for share in shares)
        score = shares[0] if explain == "probability" else (embedding * side.direction).sum()
        return score, 1 - entropy / math.log(len(shares)) if len(shares) > 1 else torch.ones_like(entropy)

    return scores


def least_angles(embeddings: list[Tensor]) -> Tensor:
    """Sum of the angle / pi of each to the one nearest to it; 0 of one alone."""
    total = torch.tensor(0.0).double()
    for i, one in enumerate(embeddings):
        # The nearest has the greatest product.
        products = [one @ z for j, z in enumerate(embeddings) if j != i]
        total = total + (max(products).clamp(-1, 1).acos() / math.pi if products else 0)
    return total


Score = Callable[[list[int]], Tensor]


def greedy_order(count: int, pending: int, value: Score, spread: Score) -> list[int]:
    """Regions from the most to the least important, for F = value + spread of the regions that are taken."""
    most: list[int] = []
    least: list[int] = []
    left = list(range(count))
    while len(left) > 1:
        best = max(left, key=lambda v: value([*most, v]) + spread([*most, v]))
        if 0 < pending < len(left):
            others = [v for v in left if v != best]
            others.sort(key=lambda v: value([*most, v]) + spread([*least, v]))
            worst = min(others[:pending], key=lambda v: value([*least, v]) + spread([*least, v]))
            least.append(worst)
            left.remove(worst)
        most.append(best)
        left.remove(best)
    return most + left + least[::-1]


def falling_values(insertion: list[Tensor], deletion: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gains by rank, and the values by rank, each less by the size of its gain than the one before."""
    curve = [kept + 1 - without for kept, without in zip(insertion, deletion, strict=True)]
    gains, values, value = [], [], torch.zeros_like(curve[0])
    for before, after in pairwise(curve):
        gains.append(after - before)
        value = value - (after - before).abs()
        values.append(value)
    return gains, values
