"""Interactions between words and patches, from the Jacobians of both towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from matex_pl.arguments import check_choices, check_positive
from matex_pl.attribution.base import block_index, check_scores
from matex_pl.attribution.core.fill import Fill, fill_images
from matex_pl.attribution.core.two_tower import (
    Explained,
    ImageTower,
    Relevance,
    TextTower,
    Tower,
    Trace,
    TwoTowerMethod,
)
from matex_pl.attribution.integrated_gradients import gauss_legendre
from matex_pl.clip.encoders import Reads
from matex_pl.clip.model import Clip
from matex_pl.clip.towers import copied
from matex_pl.console import progress
from matex_pl.maps import Attribution, full_precision, patch_mean


class WordRegions(TwoTowerMethod):
    """Second-order attributions between words and patches (exCLIP, Moeller et al. 2025).

    `A[t, n] = J_t . J_n`, where J_t `(D,)` is the change of the phrase's embedding along token t, and J_n that of the
    image's embedding along patch n. Either is the mean Jacobian on the line from a reference to the input, times the
    input minus the reference. A is positive where word and patch raise the cosine together. `Attribution.interactions`
    holds A, and `Attribution.word_maps` its sum over the pieces of each word.

    The sum of A over all tokens of both towers is `(f(x) - f(x0)) . (g(y) - g(y0))`, for the unit embeddings f of the
    image and g of the phrase. Sums over one tower alone are the integrated gradients of the other. The margin over
    reference phrases has the same interactions as the cosine, so the method has no target. x0 is the fill, and y0 is
    the phrase with its content replaced by pad tokens, as in `IntegratedGradients`.

    The image map is the positive part of the sum of A over the content tokens. The text map is that of the sum over the
    patches.

    The Jacobians are never built. Forward-mode derivatives, one per token, give J_t. A backward of the image tower in
    the direction of each J_t gives a row of A. If P phrases on one image have more tokens than the embedding has
    numbers, D backwards give J_n for all phrases.

    Released code:

    - It takes the Jacobian of embeddings before their L2 norm, and divides A by both norms at the end. Here the unit
      embeddings are differentiated, and A adds up to differences of the cosine.
    - It sums over 10 equal steps; here the integral is a Gauss-Legendre sum.
    - It builds both Jacobians by D backwards each, pair by pair.
    - The reference of a phrase is an empty phrase with its end at a fixed place; here the end keeps its place.

    Args:
        image_block: Index of the block of the image tower whose input tokens are the patches, from 0 or from the end;
            the last block as in the released code. None takes the pixels, summed over each patch.
        text_block: The same for the text tower. None takes the token embeddings.
        steps: Number of nodes of the sum.
        fill: Reference image: `mean_color` (as published), `mean_image` or `blur`.
        chunk_size: Maximum number of samples in one forward; the batch size if that is larger.

    `parts` holds

    - `signed` `(B, N)` and `text_signed` `(B, T)`, the sums of A over all tokens of the other tower, which include
      class, start and end tokens
    - `completeness_error` `(B,)`, the sum of A over all tokens minus its exact value; more steps make it smaller
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = (
        "2 forwards, and `steps` times, for each token, a forward-mode derivative from `text_block` and a backward to "
        "`image_block`"
    )

    def __init__(
        self,
        image_block: int | None = -1,
        text_block: int | None = -1,
        steps: int = 8,
        fill: Fill = "mean_color",
        chunk_size: int = 64,
    ) -> None:
        check_choices(WordRegions.__init__, locals())
        super().__init__()
        check_positive(steps=steps, chunk_size=chunk_size)
        self.image_block = image_block
        self.text_block = text_block
        self.steps = steps
        self.fill = fill
        self.chunk_size = chunk_size

    def trace(self, tower: Tower) -> Trace:
        """Run one forward of the input and one of its reference; the relevance is that of integrated gradients."""
        line = self._line(tower)

        def relevance_for(direction: Tensor) -> Relevance:
            signed = self._pull(line, direction[None])[0]
            return Relevance(tower.tokens_of(signed[..., None])[..., 0].relu())

        return Trace(line.last, relevance_for)

    def _explain(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None,
        chest_box: Tensor | None,
    ) -> Attribution:
        maps = super()._explain(clip, images, tokens, phrases, content_box, chest_box)
        return replace(maps, interactions=maps.parts.pop("interactions"))

    def _relevance(self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str]) -> Explained:
        """Sums of the interactions over the other tower, inside `borrowed`."""
        image_tower, text_tower = self._towers(clip, images.detach().clone(), copied(tokens))
        image, text = self._line(image_tower), self._line(text_tower)
        ends = full_precision(image.last), full_precision(text.last)
        score = (ends[0] * ends[1]).sum(-1)
        check_scores(score, phrases)
        whole = self._interactions(image, text)
        gain = ((ends[0] - full_precision(image.first)) * (ends[1] - full_precision(text.first))).sum(-1)
        error = whole.flatten(1).sum(1) - gain
        check_scores(score, phrases, error)
        by_token = text_tower.tokens_of(whole)
        found = image_tower.tokens_of(by_token.transpose(1, 2)).transpose(1, 2)
        content = text_tower.keep
        signed = image_tower.tokens_of(whole.sum(1)[..., None])[..., 0]
        patches = Relevance(
            (found * content[..., None]).sum(1).relu(),
            {"interactions": found, "signed": signed, "completeness_error": error},
        )
        words = Relevance(found.sum(-1).relu(), {"signed": by_token.sum(-1)})
        return Explained(patches, words, content, score, ends)

    def _line(self, tower: Tower) -> _Line:
        """Reference and input of a tower, from a forward of each."""
        is_image = isinstance(tower, ImageTower)
        block = self.image_block if is_image else self.text_block
        reference = tower.blank if isinstance(tower, TextTower) else fill_images(self.fill, tower.clip, tower.signal)
        if block is None:
            first, last = tower.encode_signal(reference), tower.encode()
            return _Line(
                reference, tower.signal, first, last, tower.encode_signal, tower.clip.grid if is_image else None
            )
        stream = tower.stream()
        # Refuses a tower of unknown pooling before its forward.
        _ = tower.pooling
        place = block_index(block, len(tower.blocks))
        with stream.capture():
            first = tower.encode_signal(reference)
        start = stream.before[place]
        with stream.capture():
            last = tower.encode()

        def encode(points: Tensor) -> Tensor:
            with stream.resumed(place - 1, points):
                return tower.encode_stream(len(points) // len(last))

        return _Line(start, stream.before[place], first, last, encode)

    def _interactions(self, image: _Line, text: _Line) -> Tensor:
        """A `(B, n, m)` of the n tokens of the phrases and the m tokens of the images."""
        count, tokens = text.end.shape[:2]
        size, images = text.last.shape[1], len(image.end)
        whole = full_precision(text.last).new_zeros(count, tokens, image.sums(image.end).shape[1])
        # Tokens that equal those of the reference have no interactions.
        moving = (text.end - text.start).flatten(2).any(2).any(0).nonzero()[:, 0]
        if not len(moving):
            return whole
        rows = self._push(text, moving)
        is_shared = images < count
        if len(moving) * (count if is_shared else 1) > size:
            basis = torch.eye(size, device=rows.device)[:, None].to(rows.dtype).expand(-1, images, -1)
            found = torch.einsum("btd,dbn->btn", rows, self._pull(image, basis).expand(-1, count, -1))
        elif is_shared:
            found = self._pull(image, rows.flatten(0, 1)[:, None])[:, 0].unflatten(0, rows.shape[:2])
        else:
            found = self._pull(image, rows.transpose(0, 1)).transpose(0, 1)
        return whole.index_copy(1, moving, found)

    def _push(self, line: _Line, moving: Tensor) -> Tensor:
        """Change of the embedding along each of m tokens `(m,)`, `(B, m, D)`, by forward-mode derivatives."""
        difference = line.end - line.start
        last = full_precision(line.last)
        places, weights = gauss_legendre(self.steps, last)
        masks = difference.new_zeros(len(moving), difference.shape[1], 1)
        masks = masks.scatter(1, moving[:, None, None], 1)
        total = last.new_zeros(len(moving), *last.shape)
        counted = (torch.arange(number, device=moving.device) for number in (self.steps, len(moving)))
        jobs = torch.cartesian_prod(*counted)
        for step, row in progress([part.unbind(1) for part in jobs.split(self._chunk(line))], "tokens"):
            points = torch.lerp(line.start, line.end, places[step].view(-1, 1, 1, 1).to(difference))
            along = difference * masks[row][:, None]
            # Fused kernels of attention have no forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH):
                change = forward_derivative(line.encode, points.flatten(0, 1), along.flatten(0, 1))
            change = full_precision(change).unflatten(0, (len(step), -1))
            total.index_add_(0, row, weights[step].view(-1, 1, 1) * change)
        return total.transpose(0, 1)

    def _chunk(self, line: _Line) -> int:
        """Number of points per sample in one forward."""
        return max(1, self.chunk_size // len(line.end))

    def _pull(self, line: _Line, directions: Tensor) -> Tensor:
        """Change of the embedding in M directions `(M, b, D)` along each token or patch, `(M, b, n)`, by backwards."""
        end, start = line.end, line.start.expand_as(line.end)
        difference = full_precision(end - start)
        places, weights = gauss_legendre(self.steps, directions)
        total = directions.new_zeros(*directions.shape[:2], line.sums(difference).shape[1])
        parts = zip(*(part.split(self._chunk(line)) for part in (places, weights)), strict=True)
        for place, weight in progress(list(parts), "steps"):
            with torch.enable_grad():
                points = torch.lerp(start, end, place.view(-1, *[1] * end.ndim).to(end)).requires_grad_()
                embedding = line.encode(points.flatten(0, 1))
            for row, direction in enumerate(directions):
                towards = direction.repeat(len(place), 1).to(embedding.dtype)
                gradient = torch.autograd.grad(embedding, points, towards, retain_graph=row + 1 < len(directions))[0]
                total[row] += line.sums(difference * torch.einsum("k,k...->...", weight, full_precision(gradient)))
        return total


def forward_derivative(function: Callable[[Tensor], Tensor], point: Tensor, along: Tensor) -> Tensor:
    """Change of a function at a point along a tangent, in one forward."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(point, along))).tangent


class _Line(NamedTuple):
    """Line from a reference to the input of one tower.

    Attributes:
        start: Reference: pixels `(1, 3, H, W)` or tokens `(b, n, C)`.
        end: Input, `(b, ...)`.
        first: Unit embeddings of the reference.
        last: Unit embeddings of the input, `(b, D)`.
        encode: Function from k points per sample `(k * b, ...)`, samples running fastest, to unit embeddings.
        grid: Raster of the patches, over which pixels are summed; None for tokens.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    encode: Callable[[Tensor], Tensor]
    grid: tuple[int, int] | None = None

    def sums(self, values: Tensor) -> Tensor:
        """Sums `(b, n)` of values `(b, ...)` over the channels of each token, or over the pixels of each patch."""
        if self.grid is None:
            return values.sum(-1)
        pixels = values[0, 0].numel() / (self.grid[0] * self.grid[1])
        return patch_mean(values.sum(1), self.grid).flatten(1) * pixels
