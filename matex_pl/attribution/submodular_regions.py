"""Greedy search from both ends for the few regions that a score needs."""

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

    The formulas are those of the released code (SMDL-Attribution, LIMA). Regions are square groups of patches, of the
    smallest side that gives at most `regions` groups. `x_S` is the image with the regions of S kept and the others
    filled; V is the set of all regions. Greedy search orders the regions by large F(S), the weighted sum of

    - consistency: `S(x_S)`
    - collaboration: `1 - S(x_{V without S})`
    - confidence: `1 - H(q) / log C`, where q is the softmax over C classes for `x_S` and H its entropy
    - effectiveness: sum over i in S of the smallest `angle / pi` between the embeddings of i alone and of another j in
      S alone

    The classes are the phrase and the references, at the model's logit scale. A reference with the embedding of the
    phrase is left out.

    Each round appends the best candidate to the most important regions P. While more than `pending` are left, the round
    also appends one to the least important regions Q. The `pending` candidates with the smallest F(P + v) are
    preselected, with the effectiveness of Q. The candidate with the smallest F(Q + v) is appended. The order is P, then
    Q from its end.

    `S_r` is the first r regions, and `G_r = S(x_{S_r}) + 1 - S(x_{V without S_r})`. As in the authors' code, the region
    of rank r gets the value `-sum over q <= r of |G_q - G_{q-1}|`. A gain therefore separates a region from those after
    it. If the first region accounts for the whole gain, the map is empty: read `parts` then.

    Differences from the authors' code:

    - There S is the probability of a class of a closed set, which is `target="probability"` here. Other targets use the
      same formulas.
    - There regions are superpixels, removed regions are black, and CLIP gets the channels in reverse. Here regions are
      squares of patches as in Kernel SHAP, removed regions get the fill, and the channels keep their order.
    - There Q has one candidate fewer if the best candidate is among the `pending`. With `pending` 1 and equal scores
      none is left, and the code fails. Here there are always `pending` others.
    - There values are written where a region is not black, over 0, the maximum: a black border lights up. Here values
      are written by region.
    - There single regions are encoded once more, and so are the first candidates for Q and, in the search from one end,
      the last of all. For 49 regions this takes 1659 forwards, or 2500 from one end. Here it takes 1594 and 2450.
    - There the entropy has 1e-7 in its logarithm. Here the entropy is exact.

    Args:
        regions: Maximum number of regions of an image.
        confidence: Weight of the confidence. The four defaults are those of LiMA's ablations. The first paper has 1
            each, and LiMA's script for CLIP 0, 0.05, 1, 1 in the order of these arguments.
        effectiveness: Weight of the effectiveness.
        consistency: Weight of the consistency.
        collaboration: Weight of the collaboration.
        pending: Number of candidates for the least important region of a round; 0 searches from the most important end
            alone.
        fill: Replacement of removed pixels: `mean_image`, `mean_color` or `blur`.
        chunk_size: Maximum number of images in one forward.
        target: S: `cosine`, `margin` (the cosine minus its mean over `references`) or `probability` (the phrase's share
            in the softmax). The softmax of margins equals that of cosines.
        references: Phrases of the margin, and classes next to the phrase; the package's list of findings by side and
            zone by default.

    `parts` holds, with the R regions in the order of the search:

    - `order` `(B, R)`, the regions
    - `insertion` and `deletion` `(B, R + 1)`, `S(x_{S_r})` and `S(x_{V without S_r})` from r = 0
    - `gains` `(B, R)`, `G_r - G_{r-1}`
    - `region` `(B, N)`, the region of each patch
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
            raise ValueError(f"regions must be at least 2, got {regions}: a single region has no order.")
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
        """Number of forwards of the image tower per pair of `attribute`, by number of regions (default: the maximum).

        The first 2 + 2 * regions are the image, the fill, and each region kept alone and removed alone. Phrases on one
        image share these.
        """
        regions = self.regions if regions is None else regions
        later = search_rounds(regions, self.pending)[1:]
        return 2 + 2 * regions + sum(2 * (left + tried) for left, tried in later)

    def trace(self, tower: Tower) -> Trace:
        """Encode the views that no phrase changes: image, fill, and each region kept alone and removed alone."""
        assert isinstance(tower, ImageTower)
        groups = patch_groups(tower.clip.grid, self.regions)
        number = int(groups.max()) + 1
        groups = groups.to(tower.inputs.device)
        views = _Views(tower, groups, fill_images(self.fill, tower.clip, tower.inputs), self.chunk_size)
        every = torch.eye(number, dtype=torch.bool, device=groups.device)
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
        """Function that scores views `(2, B, m, D)` of `_Views.of` for phrase directions `(B, D)`."""
        classes = direction[:0]
        if self.target == "probability" or self.weights.confidence:
            once = [self.references.index(phrase) for phrase in dict.fromkeys(self.references)]
            classes = reference_embeddings(clip, self.references)[once]
            if self.target == "margin":
                # The direction is shifted too. The shift adds the same value to all logits of an image.
                classes = classes - reference_mean(clip, self.references)
        # The pair's own phrase is not a second class.
        apart = (direction[:, None] - classes).norm(dim=2) > torch.finfo(clip.std.dtype).eps ** 0.5
        # The entropy of a single class is 0 and has no maximum to divide by.
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
    """Weights of the four scores in F."""

    confidence: float
    effectiveness: float
    consistency: float
    collaboration: float

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < torch.inf:
                raise ValueError(f"The weight {name} must be a finite number of at least 0, got {weight}.")
        if not any(vars(self).values()):
            raise ValueError(
                f"The weights {', '.join(vars(self))} are all 0, which leaves no score to search for. Set one above 0."
            )


class _Views:
    """Embeddings of the tower's images (one for all pairs or one each) with subsets of their regions `(Gh, Gw)`."""

    def __init__(self, tower: ImageTower, groups: Tensor, fill: Tensor, chunk_size: int) -> None:
        enlarged = torch.nn.functional.interpolate(groups[None, None].float(), tower.clip.image_size, mode="nearest")
        self.pixels = enlarged[0, 0].long()
        self.tower = tower
        self.fill = fill.expand_as(tower.inputs)
        self.chunk_size = chunk_size

    def of(self, subsets: Tensor) -> Tensor:
        """Embeddings with only the regions of each subset `(B, m, R)` bool, and with all but these: `(2, B, m, D)`."""
        both = torch.stack([subsets, ~subsets])
        return self.embeddings(both.transpose(0, 1).flatten(1, 2)).unflatten(1, (2, -1)).transpose(0, 1)

    def embeddings(self, keep: Tensor) -> Tensor:
        """Embeddings `(B, k, D)` of images with the regions `keep` `(B, k, R)` bool."""
        images, subsets = self.tower.inputs, keep.flatten(0, 1).split(self.chunk_size)
        rows = torch.arange(len(keep), device=keep.device).clamp(max=len(images) - 1).repeat_interleave(keep.shape[1])
        encoded = []
        for subset, row in zip(subsets, rows.split(self.chunk_size), strict=True):
            shown = torch.where(subset[:, None, self.pixels], images[row], self.fill[row])
            encoded.append(full_precision(self.tower.encode(shown)))
        return torch.cat(encoded).unflatten(0, keep.shape[:2])


@dataclass
class Seen:
    """Scores of m subsets per pair, `(B, m)` each: S with the subset kept alone and removed, and the confidence."""

    kept: Tensor
    removed: Tensor
    confidence: Tensor

    def at(self, places: Tensor) -> Seen:
        """Scores of the subsets at `places` `(B, k)`."""
        return Seen(*(part.gather(1, places) for part in (self.kept, self.removed, self.confidence)))

    def worth(self, weights: Weights) -> Tensor:
        """F without the effectiveness, which alone depends on the search history."""
        agreement = weights.consistency * self.kept + weights.collaboration * (1 - self.removed)
        return agreement + weights.confidence * self.confidence


def angles_between(embeddings: Tensor) -> Tensor:
    """Angle / pi between unit embeddings `(B, R, D)`, as `(B, R, R)`; inf on the diagonal.

    The angle is computed from the chord: arccos of the dot product would turn rounding into an angle of 1e-4 between
    two similar regions.
    """
    chord = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    angles = 2 / pi * (chord / 2).clamp(max=1).asin()
    return angles.masked_fill(torch.eye(angles.shape[1], dtype=torch.bool, device=angles.device), torch.inf)


def effectiveness(angles: Tensor, members: Tensor, candidates: Tensor) -> Tensor:
    """Sum of the smallest angles within members `(B, R)` bool plus each candidate `(B, m)`, as `(B, m)`.

    The sum is 0 for a single region.
    """
    nearest = angles.masked_fill(~members[:, None], torch.inf).amin(2)
    towards = angles.gather(1, candidates[..., None].expand(-1, -1, angles.shape[2]))
    total = torch.minimum(nearest[:, None], towards).masked_fill(~members[:, None], 0).sum(2)
    return (total + nearest.gather(1, candidates)).nan_to_num(posinf=0)


def search_rounds(regions: int, pending: int) -> list[tuple[int, int]]:
    """Number of candidates per round for the most important region, and for the least important one."""
    rounds, left = [], regions
    while left > 1:
        rounds.append((left, pending if 0 < pending < left else 0))
        left -= 2 if rounds[-1][1] else 1
    return rounds


def search(
    look_at: Callable[[Tensor, Tensor], Seen], angles: Tensor, weights: Weights, pending: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the regions by bidirectional greedy search, for all pairs at once.

    The first of equal candidates wins.

    Args:
        look_at: Function that scores the members `(B, R)` bool plus each of the candidates `(B, m)`.
        angles: `(B, R, R)` angles of `angles_between`.
        weights: Weights of the scores in F.
        pending: Number of candidates for the least important region of a round; 0 for none.

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
            # Removing the least important regions keeps the first regions of the order.
            rank = count - len(bottom.regions)
            insertion[:, rank] = seen.removed.gather(1, place)[:, 0]
            deletion[:, rank] = seen.kept.gather(1, place)[:, 0]
    return torch.cat([*top.regions, left, *reversed(bottom.regions)], 1), insertion, deletion


@dataclass
class _End:
    """One end of the order: its regions as a mask `(B, R)` bool, and as a list from the outermost, `(B, 1)` each."""

    members: Tensor
    regions: list[Tensor] = field(default_factory=list)

    def take(self, left: Tensor, region: Tensor) -> Tensor:
        """Append a region `(B, 1)` of the remaining ones `(B, m)`, and return the new remaining ones."""
        self.regions.append(region)
        self.members = self.members.scatter(1, region, True)
        return left[left != region].view(len(left), -1)
