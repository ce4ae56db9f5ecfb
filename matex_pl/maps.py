"""The result type of all attribution methods, and the map arithmetic that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Content = Literal["tokens", "words"]
"""Tokens of a phrase that count: all content tokens, or those of words, without punctuation."""


@dataclass(frozen=True)
class Word:
    """A word of a phrase, and its share of the relevance.

    Args:
        text: The word as written in the phrase.
        start: Place of its first character in the phrase.
        end: Place after its last character.
        share: Share of the phrase's relevance, in [0, 1].
        cut: Whether the word lies, in part or whole, behind the tokens that the model reads.
    """

    text: str
    start: int
    end: int
    share: float = 0.0
    cut: bool = False


class PhraseWords(Protocol):
    """A phrase with its tokens; see `clip.words.TokenizedPhrase`."""

    @property
    def token_words(self) -> list[int]:
        """Index of the word of each of the T tokens, -1 for punctuation and special tokens."""

    def words(self, relevance: Sequence[float]) -> list[Word]:
        """Words of the phrase with their shares of T values of relevance."""

    def sum_by_word(self, values: Tensor) -> Tensor:
        """Sums `(W, ...)` over the pieces of each of the W words, from values `(T, ...)` of the tokens."""


@dataclass
class Attribution:
    """Maps of B image-phrase pairs.

    Args:
        image: `(B, H, W)` image maps in [0, 1], in the model's input frame, x to the right, y down.
        grid: `(B, Gh, Gw)` image maps at patch resolution.
        text: `(B, T)` token maps in [0, 1]; 0 on special and pad tokens.
        content: `(B, T)` bool mask of the content tokens.
        score: `(B,)` cosines of the pairs.
        parts: Components of the method by name. Each method's docstring lists its components. Methods with a forward
            for their score have its `embeddings`, unit vectors of images and of phrases, `(B, D)` each.
        phrases: The B phrases with their tokens, for `words`; none in maps that were read from files.
        interactions: `(B, T, N)` signed interactions of tokens and patches, with the N patches row by row; None for
            methods without them. The rows of special tokens count too.
    """

    image: Tensor
    grid: Tensor
    text: Tensor
    content: Tensor
    score: Tensor
    parts: dict[str, Any] = field(default_factory=dict)
    phrases: Sequence[PhraseWords] = ()
    interactions: Tensor | None = None

    @property
    def words(self) -> list[list[Word]]:
        """Words of each phrase as written, with their shares of the token map, which sum to 1.

        The relevance of a word's pieces is summed. Punctuation and special tokens have no share. See
        `clip.words.TokenizedPhrase.words`. Each call computes the words, which waits for the device.

        Raises:
            ValueError: The maps hold no phrases.
        """
        return [phrase.words(row) for phrase, row in zip(self._read_phrases(), self.text.tolist(), strict=True)]

    @property
    def word_maps(self) -> list[Tensor]:
        """Signed map of each word of `words`, `(W, Gh, Gw)` per phrase: the interactions of its pieces, summed.

        Raises:
            ValueError: The maps hold no phrases, or the method has no interactions.
        """
        if self.interactions is None:
            raise ValueError(
                "The maps hold no interactions of words and patches. Use a method that has them: WordRegions."
            )
        rows = self.interactions.unflatten(2, self.grid.shape[1:])
        return [phrase.sum_by_word(row) for phrase, row in zip(self._read_phrases(), rows, strict=True)]

    def content_mask(self, content: Content) -> Tensor:
        """Mask `(B, T)` of the tokens that count: all content tokens, or those of words, without punctuation.

        Raises:
            ValueError: The maps hold no phrases, and `content` is `words`.
        """
        if content == "tokens":
            return self.content
        rows = [phrase.token_words for phrase in self._read_phrases()]
        return moved(torch.tensor(rows), self.content.device).view_as(self.content) >= 0

    def _read_phrases(self) -> Sequence[PhraseWords]:
        if len(self.phrases) != len(self.text):
            raise ValueError(
                f"The maps hold the words of {len(self.phrases)} phrases for {len(self.text)} pairs. Add the phrases "
                "with `clip.words.with_words`."
            )
        return self.phrases


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better, the precision of all map arithmetic."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def moved(values: Tensor, device: torch.device | str | None) -> Tensor:
    """A small tensor of the CPU on a device; the host does not wait for the work of a GPU of CUDA."""
    # On Apple's MPS, the copy would read memory that may be free by then.
    is_cuda = device is not None and torch.device(device).type == "cuda"
    return values if device is None else values.to(device, non_blocking=is_cuda)


def double_precision(tensor: Tensor) -> Tensor:
    """The tensor in float64, for sums over many pixels; in float32 on Apple's MPS, which has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def rounding(dtype: torch.dtype) -> float:
    """Relative tolerance, `max(1e-6, 4 eps)`, within which values that a model computed in `dtype` count as equal."""
    return max(1e-6, 4 * torch.finfo(dtype).eps)


def differ(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask `(B,)` of the samples whose S scores `(S, B)`, products of unit vectors, differ by more than rounding."""
    return scores.amax(0) - scores.amin(0) > rounding(dtype)


def min_max(z: Tensor, *, keep: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Min-max normalization per sample over all but the first axis: (z - min) / (max - min), same shape, in [0, 1].

    If a sample is constant within `max(1e-6, 4 eps)`, with eps of `dtype`, of its own magnitude, the result is 0.

    Args:
        z: `(B, ...)` values.
        keep: `(B, ...)` bool mask of the entries to normalize; the others become 0. All by default.
        dtype: Dtype of the model's computation, which bounds the rounding in `z`.
    """
    flat = full_precision(z.flatten(1))
    low, high = _extremes(flat, keep)
    varies = high - low > rounding(dtype) * torch.maximum(low.abs(), high.abs())
    scaled = (flat - low) / torch.where(varies, high - low, torch.inf)
    return (scaled if keep is None else scaled.masked_fill(~keep.flatten(1), 0)).view_as(z)


def token_map(values: Tensor, content: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Token map `(B, T)`: `min_max` over the content tokens, 0 elsewhere; a single content token gets 1.

    Args:
        values: `(B, T)` relevance on any scale.
        content: `(B, T)` bool mask of the content tokens.
        dtype: Dtype of the model's computation.
    """
    scaled = min_max(values, keep=content, dtype=dtype)
    return torch.where(content.sum(1, keepdim=True) == 1, content.to(scaled), scaled)


def _extremes(flat: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each row, `(B, 1)` each; 0 if no entry is kept."""
    if keep is None:
        low, high = flat.aminmax(dim=1, keepdim=True)
        return low, high
    mask = keep.flatten(1)
    low = flat.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = flat.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    some = mask.any(1, keepdim=True)
    return low.where(some, 0), high.where(some, 0)


def upsample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling with half-pixel centers: `(B, Gh, Gw)` to `(B, H, W)`, or C maps each `(B, C, Gh, Gw)`."""
    maps = grid if grid.ndim == 4 else grid[:, None]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).view(*grid.shape[:-2], *size)


def patch_mean(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of each patch: `(B, H, W)` to `(B, Gh, Gw)`."""
    return F.adaptive_avg_pool2d(image[:, None], grid)[:, 0]


# The name in 0.1.
AttributionMaps = Attribution
