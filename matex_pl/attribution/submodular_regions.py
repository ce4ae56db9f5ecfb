"""A greedy search for the few regions that a score needs, from either end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import pi
from typing import ClassVar, Literal

import torch
from torch import Tensor

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.core.fill import Fill, fill_images
from matex_pl.attribution.core.target import reference_embeddings, reference_mean
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.attribution.kernel_shap import patch_groups
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.maps import full_precision


class SubmodularRegions(TwoTowerMethod):
    """Less is more (Chen et al. 2024), with the bidirectional search of LiMA (Chen et al. 2025); for offline use.

    The formulas are those of the released code (SMDL-Attribution, LIMA). Regions are the patches, in squares of the
    smallest side that gives at most `regions` of them. x_S is the image with the regions of S kept and the others
    filled, V all regions. They are ordered by greedy search for large F(S), the weighted sum of

        consistency    S(x_S)
        collaboration  1 - S(x_{V without S})
        confidence     1 - H(q) / log C, q the softmax over C classes for x_S, H its entropy
        effectiveness  sum over i in S of the least angle / pi, over j in S, between the embeddings of i and of j alone

    where the classes are the phrase and the references (but one that is the same to the model), at the model's logit
    scale. Each round appends the best candidate to the most important regions P. While more than `pending` are left it
    also appends one to the least important Q: of the `pending` candidates with the smallest F(P + v), with Q's
    effectiveness in place of P's, the one with the smallest F(Q + v). The order is P, then Q from its end.

    With S_r the first r regions and G_r = S(x_{S_r}) + 1 - S(x_{V without S_r}), the region of rank r gets
    - sum over q <= r of |G_q - G_{q-1}|, as in the authors' code. So a gain parts a region from those that follow, and
    where the first brings all there is the map is empty: read `parts` then.

    What the authors' code does otherwise, and what is done here:
        - S is the probability of a class of a closed set: `target="probability"`. Other targets keep the formulas.
        - Regions are superpixels, what is removed is black, and CLIP gets the channels in reverse. Here squares of
          patches as in Kernel SHAP, the image's fill, the channels as they are.
        - Where the best candidate is among the `pending`, Q has one fewer to choose from; with `pending` 1 and equal
          scores none, and the code fails. Here there are always `pending` others.
        - Values are written where a region is not black, over 0, the maximum: a black border lights up. Here they go by
          region.
        - Regions alone are encoded once more, as are the first candidates for Q and the last of all in the search from
          one end: 1659 forwards for 49 regions, 2500 from one end. Here 1594 and 2450.
        - The entropy has 1e-7 in its logarithm. Here it is exact.

    Args:
        regions: Most regions of an image.
        confidence: Weight of the confidence. The four defaults are those of LiMA's ablations; the first paper has 1
            each, and LiMA's script for CLIP 0, 0.05, 1, 1 in the order of these arguments.
        effectiveness: Weight of the effectiveness.
        consistency: Weight of the consistency.
        collaboration: Weight of the collaboration.
        pending: Candidates for the least important region of a round; 0 searches from the most important end alone.
        fill: What stands in for removed pixels: `mean_image`, `mean_color` or `blur`.
        chunk_size: Most images in one forward.
        target: S: `cosine`, `margin`, the cosine less its mean over `references`, or `probability`, the phrase's share
            in the softmax. The softmax of margins is that of cosines.
        references: Phrases of the margin, and classes alongside the phrase; the package's list of findings by side and
            zone by default.

    `parts`, with R regions in the order found: order `(B, R)`, the regions; insertion and deletion `(B, R + 1)`,
    S(x_{S_r}) and S(x_{V without S_r}) from r = 0; gains `(B, R)`, G_r - G_{r-1}; and region `(B, N)`, of each patch.
    """

    supports_text: ClassVar[bool] = False
    perturbs_inputs: ClassVar[bool] = True
    cost: ClassVar[str] = "1594 forwards of the image tower for 49 regions, see `forwards`, and 1 of the text tower"

    def __init__(
        self,
        regions: int = 49,
        confidence: float = 0.05,
        effectiveness: float = 0.01,
        consistency: float = 20.0,
        collaboration: float = 5.0,
        pending: int = 8,
        fill: Fill = "mean_image",
        chunk_size: int = 128,
        target: Literal["cosine", "margin", "probability"] = "cosine",
        references: list[str] | None = None,
    ) -> None:
        check_choices(SubmodularRegions.__init__, locals())
        super().__init__(references=references)
        check_positive(chunk_size=chunk_size)
        if regions < 2:
            raise ValueError(f"regions must be at least 2, got {regions}: one region has no order.")
        if pending < 0:
            raise ValueError(f"pending must be at least 0, got {pending}. 0 searches from one end alone.")
        self.target = target
        self.confidence = confidence
        self.effectiveness = effectiveness
        self.consistency = consistency
        self.collaboration = collaboration
        self.weights = Weights(confidence, effectiveness, consistency, collaboration)
        self.regions = regions
        self.pending = pending
        self.fill = fill
        self.chunk_size = chunk_size

    def forwards(self, regions: int | None = None) -> int:
        """Images through the image tower per pair of `attribute`, for this number of regions; by default the most.

        The image, the fill, and each region alone and away: the first 2 + 2 * regions. Phrases on one image share
        these.
        """
        regions = self.regions if regions is None else regions
        later = search_rounds(regions, self.pending)[1:]
        return 2 + 2 * regions + sum(2 * (left + tried) for left, tried in later)

    def trace(self, tower: Tower) -> Trace:
        """What no phrase changes: the image, the fill, and each region alone and away."""
        assert isinstance(tower, ImageTower)
        groups = patch_groups(tower.clip.grid, self.regions).to(tower.inputs.device)
        views = _Views(tower, groups, fill_images(self.fill, tower.clip, tower.inputs), self.chunk_size)
        every = torch.eye(int(groups.max()) + 1, dtype=torch.bool, device=groups.device)
        whole = tower.encode()
        blank = views.embeddings(every.new_zeros(len(whole), 1, len(every)))
        alone = views.of(every.expand(len(whole), -1, -1))
        ends = torch.stack([blank, full_precision(whole)[:, None]])

        def relevance_for(direction: Tensor) -> Relevance:
            judge = self._judge(tower.clip, direction)
            singles, seen = judge(alone), judge(ends)

            def look_at(members: Tensor, candidates: Tensor) -> Seen:
                if not members.any():
                    return singles.at(candidates)
                return judge(views.of(members[:, None] | every[candidates]))

            angles = angles_between(alone[0]).expand(len(direction), -1, -1)
            order, insertion, deletion = search(look_at, angles, self.weights, self.pending)
            insertion[:, [0, -1]] = torch.cat([seen.kept, seen.removed], 1)
            deletion[:, [0, -1]] = torch.cat([seen.removed, seen.kept], 1)
            gains = (insertion - deletion).diff(dim=1)
            values = torch.zeros_like(gains).scatter(1, order, -gains.abs().cumsum(1))
            region = groups.flatten().expand(len(order), -1)
            parts = {"order": order, "insertion": insertion, "deletion": deletion, "gains": gains, "region": region}
            return Relevance(values.gather(1, region), parts)

        return Trace(whole, relevance_for)

    def _judge(self, clip: Clip, direction: Tensor) -> Callable[[Tensor], Seen]:
        """What makes scores of views `(2, B, m, D)`, as `_Views.of` gives them, for directions `(B, D)` of phrases."""
        classes = direction[:0]
        if self.target == "probability" or self.weights.confidence:
            once = [self.references.index(phrase) for phrase in dict.fromkeys(self.references)]
            classes = reference_embeddings(clip, self.references)[once]
            if self.target == "margin":
                # As the direction is; it adds the same to all logits of an image.
                classes = classes - reference_mean(clip, self.references)
        # A phrase of the pair's own is no other class.
        apart = (direction[:, None] - classes).norm(dim=2) > torch.finfo(clip.std.dtype).eps ** 0.5
        # One class alone has no entropy, and no scale for it.
        most = (1 + apart.sum(1, keepdim=True)).clamp(min=2).to(direction).log()
        scale = full_precision(clip.logit_scale).exp()

        def seen(views: Tensor) -> Seen:
            views = views.expand(-1, len(direction), -1, -1)
            score = torch.einsum("kbmd,bd->kbm", views, direction)
            rest = (views @ classes.T).masked_fill(~apart[:, None], -torch.inf)
            share = (scale * torch.cat([score[..., None], rest], 3)).softmax(3)
            confidence = 1 - torch.special.entr(share[0]).sum(2) / most
            kept, removed = share[..., 0] if self.target == "probability" else score
            return Seen(kept, removed, confidence)

        return seen


@dataclass
class Weights:
    """Weights of the four scores."""

    confidence: float
    effectiveness: float
    consistency: float
    collaboration: float

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < torch.inf:
                raise ValueError(f"{name} is a weight, a number of at least 0, got {weight}.")
        if not any(vars(self).values()):
            raise ValueError(f"{', '.join(vars(self))} are all 0: there is nothing to search for. Give one a weight.")


class _Views:
    """Embeddings of the tower's images, one for all pairs or one each, with some of their regions `(Gh, Gw)`."""

    def __init__(self, tower: ImageTower, groups: Tensor, fill: Tensor, chunk_size: int) -> None:
        enlarged = torch.nn.functional.interpolate(groups[None, None].double(), tower.clip.image_size, mode="nearest")
        self.pixels = enlarged[0, 0].long()
        self.tower = tower
        self.fill = fill.expand_as(tower.inputs)
        self.chunk_size = chunk_size

    def of(self, subsets: Tensor) -> Tensor:
        """With nothing but the regions of each subset `(B, m, R)` bool, and with all but these: `(2, B, m, D)`."""
        both = torch.stack([subsets, ~subsets])
        return self.embeddings(both.transpose(0, 1).flatten(1, 2)).unflatten(1, (2, -1)).transpose(0, 1)

    def embeddings(self, keep: Tensor) -> Tensor:
        """With the regions `keep` `(B, k, R)` bool: `(B, k, D)`."""
        images, subsets = self.tower.inputs, keep.flatten(0, 1).split(self.chunk_size)
        rows = torch.arange(len(keep), device=keep.device).clamp(max=len(images) - 1).repeat_interleave(keep.shape[1])
        encoded = []
        for subset, row in zip(subsets, rows.split(self.chunk_size), strict=True):
            shown = torch.where(subset[:, None, self.pixels], images[row], self.fill[row])
            encoded.append(full_precision(self.tower.encode(shown)))
        return torch.cat(encoded).unflatten(0, keep.shape[:2])


@dataclass
class Seen:
    """What the model makes of m subsets per pair, `(B, m)` each: S without the others, S without them, confidence."""

    kept: Tensor
    removed: Tensor
    confidence: Tensor

    def at(self, places: Tensor) -> Seen:
        """Those at `places` `(B, k)`."""
        return Seen(*(part.gather(1, places) for part in (self.kept, self.removed, self.confidence)))

    def worth(self, weights: Weights) -> Tensor:
        """F without the effectiveness, which alone depends on how the subset came about."""
        agreement = weights.consistency * self.kept + weights.collaboration * (1 - self.removed)
        return agreement + weights.confidence * self.confidence


def angles_between(embeddings: Tensor) -> Tensor:
    """Angle / pi of unit embeddings `(B, R, D)` to each other, `(B, R, R)`; inf to themselves.

    By the chord: arccos of a product makes an angle of 1e-4 of the rounding between two regions that look alike.
    """
    chord = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    angles = 2 / pi * (chord / 2).clamp(max=1).asin()
    return angles.masked_fill(torch.eye(angles.shape[1], dtype=torch.bool, device=angles.device), torch.inf)


def effectiveness(angles: Tensor, members: Tensor, candidates: Tensor) -> Tensor:
    """Of members `(B, R)` bool joined by each candidate `(B, m)`: the sum of their least angles, `(B, m)`; 0 of one."""
    nearest = angles.masked_fill(~members[:, None], torch.inf).amin(2)
    towards = angles.gather(1, candidates[..., None].expand(-1, -1, angles.shape[2]))
    total = torch.minimum(nearest[:, None], towards).masked_fill(~members[:, None], 0).sum(2)
    return (total + nearest.gather(1, candidates)).nan_to_num(posinf=0)


def search_rounds(regions: int, pending: int) -> list[tuple[int, int]]:
    """Per round, how many candidates are tried for the most important region, and how many for the least."""
    rounds, left = [], regions
    while left > 1:
        rounds.append((left, pending if 0 < pending < left else 0))
        left -= 2 if rounds[-1][1] else 1
    return rounds


def search(
    look_at: Callable[[Tensor, Tensor], Seen], angles: Tensor, weights: Weights, pending: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bidirectional greedy search, of all pairs at once.

    The first of equal candidates wins.

    Args:
        look_at: What is seen of the members `(B, R)` bool joined by each of the candidates `(B, m)`.
        angles: `(B, R, R)` of `angles_between`.
        weights: Weights of the scores in F.
        pending: Candidates for the least important region of a round; 0: there is none.

    Returns:
        The order `(B, R)`, and S with the first r regions kept and with them removed, `(B, R + 1)` each; 0 where r is 0
        or R.
    """
    pairs, count = angles.shape[:2]
    top, bottom = (_End(empty) for empty in angles.new_zeros(2, pairs, count, dtype=torch.bool))
    insertion, deletion = angles.new_zeros(2, pairs, count + 1)

    def spread(end: _End, candidates: Tensor) -> Tensor:
        return weights.effectiveness * effectiveness(angles, end.members, candidates)

    left = torch.arange(count, device=angles.device).expand(pairs, -1)
    for _, tried in progress(search_rounds(count, pending), "regions"):
        seen = look_at(top.members, left)
        worth = seen.worth(weights)
        place = (worth + spread(top, left)).argmax(1, keepdim=True)
        proxy = (worth + spread(bottom, left)).scatter(1, place, torch.inf)
        few = left.gather(1, proxy.argsort(dim=1, stable=True)[:, :tried])
        left = top.take(left, left.gather(1, place))
        rank = len(top.regions)
        insertion[:, rank], deletion[:, rank] = seen.kept.gather(1, place)[:, 0], seen.removed.gather(1, place)[:, 0]
        if tried:
            seen = look_at(bottom.members, few)
            place = (seen.worth(weights) + spread(bottom, few)).argmin(1, keepdim=True)
            left = bottom.take(left, few.gather(1, place))
            # Without the least important regions, the others are the first of the order.
            rank = count - len(bottom.regions)
            insertion[:, rank] = seen.removed.gather(1, place)[:, 0]
            deletion[:, rank] = seen.kept.gather(1, place)[:, 0]
    return torch.cat([*top.regions, left, *reversed(bottom.regions)], 1), insertion, deletion


@dataclass
class _End:
    """One end of the order: which regions are in it `(B, R)` bool, and these from the outermost, `(B, 1)` each."""

    members: Tensor
    regions: list[Tensor] = field(default_factory=list)

    def take(self, left: Tensor, region: Tensor) -> Tensor:
        """Append a region `(B, 1)` of those that are left, `(B, m)`; what is left then."""
        self.regions.append(region)
        self.members = self.members.scatter(1, region, True)
        return left[left != region].view(len(left), -1)
