"""Scores of maps by the procedure of published tables of zero-shot phrase grounding, such as those on MS-CXR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

from matex_pl.arguments import check_choice
from matex_pl.data.pair import ImageTextPair
from matex_pl.maps import min_max
from matex_pl.metrics import functional as F

Size = tuple[int, int]

# The eight types of findings of the published table of PadChest-GR.
_PADCHEST_GR = (
    *("alveolar pattern", "aortic elongation", "atelectasis", "cardiomegaly"),
    *("interstitial pattern", "nodule", "pleural effusion", "pleural thickening"),
)
PROTOCOLS: dict[str, tuple[str, ...]] = {"ms-cxr": (), "padchest-gr": _PADCHEST_GR}
"""Findings of each protocol by its name; empty for all findings of the data."""


@dataclass(frozen=True)
class GroundingProtocol:
    """Published procedure of zero-shot phrase grounding (BioViL, Boecking et al. 2022; AFLoc, Yang et al. 2025).

    A map on the patch raster is smoothed, and enlarged to a square frame around the image. The outer margin does not
    count. Boxes are drawn in the same frame from the coordinates of the stored image, also where the model's input cuts
    them. The page of published figures lists the differences of public code, and the choices here.

    Args:
        name: Name of the protocol, one of `PROTOCOLS`.
        smooth_sigma: Standard deviation of the Gaussian in cells of the patch raster; 0 for no smoothing.
        prune_phrases: Whether to explain the phrases without their words of size and certainty, see `prune_phrase`.
        size: Side of the square frame in pixels; the image's longest side has this size.
        kept: Share of the frame's side that counts: the central square, without the margin.
        tolerance: Pixels of the frame by which the maximum of the tolerant pointing game may miss a box.
    """

    name: str
    smooth_sigma: float = 1.5
    prune_phrases: bool = False
    size: int = 518
    kept: float = 448 / 512
    tolerance: float = 15.0

    def __post_init__(self) -> None:
        check_choice("protocol", self.name, tuple(PROTOCOLS))
        if not 0 <= self.smooth_sigma < inf:
            raise ValueError(f"smooth_sigma must be a number of patches from 0, got {self.smooth_sigma}.")

    @property
    def plain(self) -> dict[str, Any]:
        """Settings in plain types."""
        return asdict(self)

    def check(self, pairs: Sequence[ImageTextPair], data: str) -> None:
        """Refuse pairs that the protocol cannot score.

        Args:
            pairs: Pairs of the benchmark.
            data: Name of the data, for the message.

        Raises:
            ValueError: No pair has a box, no pair with a box has a finding, or none has a finding of the protocol.
        """
        way_out = "Leave out --protocol, or give other data."
        boxed = [pair for pair in pairs if pair.boxes]
        if not boxed:
            raise ValueError(
                f"The protocol {self.name} compares maps with boxes, and none of the {len(pairs)} pairs of {data} has "
                f"a box. {way_out}"
            )
        findings = Counter(pair.finding for pair in boxed if pair.finding)
        if not findings:
            raise ValueError(
                f"The protocol {self.name} averages over findings, and no pair of {data} with a box has a finding. "
                f"{way_out}"
            )
        if not any(self.covers(finding) for finding in findings):
            raise ValueError(
                f"The protocol {self.name} is about {', '.join(PROTOCOLS[self.name])}, and the pairs of {data} are "
                f"about {', '.join(sorted(findings))}. {way_out}"
            )

    def covers(self, finding: str) -> bool:
        """Whether pairs of a finding count."""
        return finding in PROTOCOLS[self.name] or not PROTOCOLS[self.name]

    def values(
        self, grid: Tensor, content_box: Tensor, pairs: Sequence[ImageTextPair], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """Scores `(B,)` of B maps by name; NaN where a pair does not count.

        Args:
            grid: `(B, Gh, Gw)` maps on the patch raster.
            content_box: `(B, 4)` rectangles of the images in [0, 1] of the model's frame.
            pairs: Pairs of the maps, with boxes in pixels of the stored images.
            sizes: Height and width of each stored image.
        """
        heat, counted = self.place(grid, content_box, sizes)
        boxes = [self.boxes(pair, size) for pair, size in zip(pairs, sizes, strict=True)]
        masks = F.box_masks(boxes, (self.size, self.size))
        # Pixels that do not count are 0, the lowest value: none is above a threshold or the maximum.
        heat = min_max(heat, keep=counted)
        values = {
            "miou": F.mean_iou(heat, masks & counted, signed=True),
            "cnr": F.contrast_to_noise(heat, masks, counted, floor=0),
            "pointing_game": F.pointing_game(heat, masks),
            "pointing_game_near": F.pointing_game(heat, masks, self.tolerance),
        }
        left_out = torch.tensor([not self.covers(pair.finding) for pair in pairs])
        return {name: value.masked_fill(left_out, torch.nan) for name, value in values.items()}

    def place(self, grid: Tensor, content_box: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
        """Smoothed maps in the frame, `(B, S, S)` float32, and the pixels that count, bool.

        A pixel counts inside of the margin if the model's input covers it: a crop leaves out the rest of the image.
        """
        smooth = ndimage.gaussian_filter(grid.float().numpy(), (0, self.smooth_sigma, self.smooth_sigma))
        left, top, width, height = self._images(sizes).T
        x0, y0, x1, y1 = content_box.double().T
        # From the frame to the model's input, both in [-1, 1].
        scale = torch.stack([(x1 - x0) / width, (y1 - y0) / height], 1)
        shift = scale + 2 * (torch.stack([x0, y0], 1) - scale * torch.stack([left, top], 1)) - 1
        theta = torch.cat([torch.diag_embed(scale), shift[..., None]], 2).float()
        places = torch.nn.functional.affine_grid(theta, [len(grid), 1, self.size, self.size], align_corners=False)
        heat = torch.nn.functional.grid_sample(
            torch.from_numpy(smooth)[:, None], places, padding_mode="border", align_corners=False
        )[:, 0]
        return heat, (places.abs() <= 1 + 1e-6).all(3) & self._inside()

    def boxes(self, pair: ImageTextPair, size: Size) -> Tensor:
        """Boxes `(K, 4)` of a pair in [0, 1] of the frame."""
        left, top, width, height = self._images([size])[0].tolist()
        ends = torch.tensor([width / size[1], height / size[0]] * 2, dtype=torch.double)
        origin = torch.tensor([left, top] * 2, dtype=torch.double)
        return (torch.tensor(pair.boxes, dtype=torch.double).view(-1, 4) * ends + origin).float()

    def _images(self, sizes: Sequence[Size]) -> Tensor:
        """Left, top, width and height of each image in [0, 1] of the frame, `(B, 4)`, in the middle."""
        share = torch.tensor(sizes, dtype=torch.double).flip(1)
        share = share / share.amax(1, keepdim=True)
        return torch.cat([(1 - share) / 2, share], 1)

    def _inside(self) -> Tensor:
        """Pixels of the central square, `(S, S)` bool; an odd pixel of the margin is on the right and at the bottom."""
        side = int(self.kept * self.size)
        start = (self.size - side) // 2
        inside = torch.zeros(self.size, self.size, dtype=torch.bool)
        inside[start : start + side, start : start + side] = True
        return inside
