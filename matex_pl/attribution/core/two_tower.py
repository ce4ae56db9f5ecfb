"""One procedure for both towers: a method treats the patches of an image and the tokens of a phrase alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import AttributionMethod, check_pairs, check_phrases, check_scores
from matex_pl.attribution.core.capture import borrowed, count_blocks
from matex_pl.attribution.core.fill import drop_tokens
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.target import REFERENCES, Target, directions, reference_mean
from matex_pl.clip import towers
from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling
from matex_pl.maps import Attribution, full_precision, min_max, patch_mean, token_map, upsample

# Of remainders that are compared at once, 128 MiB of ids.
_MOST_TOKENS = 2**24


@dataclass
class Relevance:
    """What a method finds on one tower, before it is scaled to [0, 1].

    Args:
        values: `(B, length)` per token of the map, or `(B, H, W)` per pixel; of one image `(1, ...)` will do.
        parts: Components by name, for `Attribution.parts`.
    """

    values: Tensor
    parts: dict[str, Any] = field(default_factory=dict)


class Trace(NamedTuple):
    """A forward of one tower.

    Args:
        embedding: `(B, D)`, or `(1, D)` of one image.
        relevance_for: The `Relevance` of the tower's inputs to a direction `(B, D)` in the space of the embedding.
    """

    embedding: Tensor
    relevance_for: Callable[[Tensor], Relevance]


class Tower(ABC):
    """One tower of the model with its input, inside `borrowed`.

    Args:
        clip: The model.
        inputs: `(B, 3, H, W)` images, or one image for all pairs, or `(B, T)` tokens.
        depth: Number of attention blocks of the tower; called when it is needed, since counting takes a forward.
    """

    def __init__(self, clip: Clip, inputs: Tensor, depth: Callable[[], int]) -> None:
        self.clip = clip
        self.inputs = inputs
        self._depth = depth

    @cached_property
    def depth(self) -> int:
        """Number of attention blocks; counting them refuses towers whose attention is not understood."""
        return self._depth()

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """How the embedding is read from the tokens."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first block first; none in a ResNet."""

    @property
    @abstractmethod
    def keep(self) -> Tensor:
        """Which tokens of the map count, `(B, length)` bool: all patches, or the content tokens."""

    @property
    @abstractmethod
    def signal(self) -> Tensor:
        """What the tower is continuous in: pixels `(B, 3, H, W)`, or the embeddings of the tokens `(B, T, C)`."""

    @abstractmethod
    def encode(self, inputs: Tensor | None = None) -> Tensor:
        """Unit embeddings `(b, D)` of inputs of the tower's kind; of its own by default."""

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Unit embeddings `(k * B, D)` of k signals per sample, the samples running fastest."""
        return self.encode(signal)

    @abstractmethod
    def encode_stream(self, copies: int) -> Tensor:
        """Unit embeddings of `copies` per sample, the samples running fastest, inside `Stream.resumed`."""

    def stream(self) -> Stream:
        """The residual stream of the tower's tokens.

        Raises:
            NotImplementedError: It has none: a ResNet.
        """
        if not self.blocks:
            tower = towers.original(self.clip.model.visual)
            raise NotImplementedError(towers.not_explained("image", tower, "it has no stream of tokens"))
        return Stream(self.blocks)

    def rows(self, rows: Tensor) -> Tower:
        """The tower with some of the pairs `(k,)`; one image stays one image."""
        inputs = self.inputs[rows] if len(self.inputs) > 1 else self.inputs
        return type(self)(self.clip, inputs, self._depth)

    def tokens_of(self, stream: Tensor) -> Tensor:
        """The tokens `(b, length, C)` of the map among those of a block, `(b, n, C)`; 0 where it has none."""
        return self.pooling.to_map(stream.transpose(1, 2)).transpose(1, 2)


class ImageTower(Tower):
    """The image tower and its images."""

    @property
    def pooling(self) -> Pooling:  # noqa: D102
        return self.clip.image_pooling(self.inputs)

    @property
    def blocks(self) -> list[nn.Module]:  # noqa: D102
        return towers.image_blocks(self.clip.model.visual)

    @property
    def keep(self) -> Tensor:
        """All patches."""
        rows, columns = self.clip.grid
        return torch.ones(len(self.inputs), rows * columns, dtype=torch.bool, device=self.inputs.device)

    @property
    def signal(self) -> Tensor:
        """The pixels."""
        return self.inputs

    def encode(self, inputs: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.clip.encode_image(self.inputs if inputs is None else inputs)

    def encode_stream(self, copies: int) -> Tensor:  # noqa: D102
        # The pixels pass through no block that is resumed: those of one image will do.
        return self.encode(self.inputs[:1])

    def score_kept(self, keep: Tensor, fill: Tensor, direction: Tensor) -> Tensor:
        """Score of each pair when pixels are faded into the fill, `(S, B)`, from one forward of all of them.

        Args:
            keep: `(S, H, W)` share of each pixel that is kept.
            fill: Pixels from `fill_images`.
            direction: `(B, D)`.
        """
        kept = torch.lerp(fill, self.inputs, keep[:, None, None].to(self.inputs))
        embedding = self.encode(kept.flatten(0, 1)).unflatten(0, (len(keep), -1))
        return (full_precision(embedding) * direction).sum(-1)


class TextTower(Tower):
    """The text tower and its phrases."""

    @property
    def pooling(self) -> Pooling:  # noqa: D102
        return self.clip.text_pooling(self.inputs)

    @property
    def blocks(self) -> list[nn.Module]:  # noqa: D102
        return towers.text_blocks(self.clip.model)

    @property
    def keep(self) -> Tensor:
        """The content tokens."""
        return self.clip.content(self.inputs)

    @property
    def _table(self) -> nn.Module:
        return towers.token_embedding(self.clip.model)

    @property
    def signal(self) -> Tensor:
        """The embeddings of the tokens, before positions are added."""
        return self._table(self.inputs)

    @property
    def blank(self) -> Tensor:
        """The signal of the phrase without its content, which pad tokens stand in for."""
        return self._table(drop_tokens(self.inputs, self.keep, self.clip.pad_id))

    def encode(self, inputs: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.clip.encode_text(self.inputs if inputs is None else inputs)

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Unit embeddings of token embeddings; which tokens are pads and which one is pooled stays."""
        with self._table.register_forward_hook(lambda _, __, found: signal[:, : found.shape[1]].to(found)):
            return self.encode_stream(len(signal) // len(self.inputs))

    def encode_stream(self, copies: int) -> Tensor:  # noqa: D102
        return self.encode(self.inputs.repeat(copies, 1))

    def score_kept(self, keep: Tensor, direction: Tensor, chunk_size: int) -> Tensor:
        """Score of each pair when pad tokens stand in for content that is not kept, `(S, B)`.

        A phrase has few words, so that what is left of it comes again: each remainder is encoded once.

        Args:
            keep: `(S, B, T)` bool, or `(S, 1, T)` for all.
            direction: `(B, D)`.
            chunk_size: Phrases per forward.
        """
        keep = keep.expand(-1, len(self.inputs), -1)
        scores = []
        most = max(1, _MOST_TOKENS // keep[:, 0].numel())
        for pairs in torch.arange(len(self.inputs), device=keep.device).split(most):
            dropped = drop_tokens(self.inputs[pairs], self.keep[pairs] & ~keep[:, pairs], self.clip.pad_id)
            rows, places = dropped.flatten(0, 1).unique(dim=0, return_inverse=True)
            towards = direction[pairs].T
            score = torch.cat([full_precision(self.encode(chunk)) @ towards for chunk in rows.split(chunk_size)])
            scores.append(score.gather(0, places.view(dropped.shape[:2])))
        return torch.cat(scores, 1)


class TwoTowerMethod(AttributionMethod):
    """A method that explains the cosine or the margin of pairs, by one procedure for either tower.

    Args:
        target: `cosine` or `margin`, the cosine less its mean over `references`.
        references: Phrases of the margin; the package's list of findings by side and zone by default.
    """

    target: str

    def __init__(self, target: Target = "cosine", references: list[str] | None = None) -> None:
        check_choices(TwoTowerMethod.__init__, locals())
        if references is not None and not references:
            raise ValueError("references must name at least one phrase; leave it out for the package's own list.")
        self.target = target
        self.references = list(REFERENCES if references is None else references)

    @abstractmethod
    def trace(self, tower: Tower) -> Trace:
        """Run a tower: its embeddings, and a function that finds where a direction in their space comes from."""

    def attribute(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], content_box: Tensor | None = None
    ) -> Attribution:
        """Maps of B pairs; see `AttributionMethod.attribute`."""
        check_pairs(clip, images, tokens, phrases, content_box)
        return self._explain(clip, images, tokens, phrases, content_box)

    def attribute_phrases(
        self, clip: Clip, image: Tensor, phrases: Sequence[str], content_box: Tensor | None = None
    ) -> Attribution:
        """Maps of one image and P phrases; what does not depend on the phrase is done once."""
        tokens, content_box = check_phrases(clip, image, phrases, content_box)
        return self._explain(clip, image[None], tokens, phrases, content_box)

    def _explain(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], content_box: Tensor | None
    ) -> Attribution:
        """Maps of B pairs, or of one image and B phrases."""
        dtype = clip.std.dtype
        with borrowed(clip):
            patches, words, content, score = self._relevance(clip, images, tokens, phrases)
            if patches.values.ndim == 2:
                grid = min_max(patches.values.unflatten(1, clip.grid), dtype=dtype)
                image = min_max(upsample(grid, clip.image_size))
            else:
                image = min_max(patches.values, dtype=dtype)
                grid = patch_mean(image, clip.grid)
            image, grid = (part.expand(len(score), -1, -1) for part in (image, grid))
            if words is None:
                return Attribution(
                    image, grid, torch.zeros_like(content, dtype=grid.dtype), content, score, patches.parts
                )
            parts = patches.parts | {f"text_{name}": part for name, part in words.parts.items()}
            return Attribution(image, grid, token_map(words.values, content, dtype=dtype), content, score, parts)

    def _relevance(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str]
    ) -> tuple[Relevance, Relevance | None, Tensor, Tensor]:
        """Relevance of the images and of the tokens, content `(B, T)` and score `(B,)`, inside `borrowed`."""
        images, tokens = images.detach().clone(), tokens.clone()
        image_tower = ImageTower(clip, images, lambda: count_blocks(clip, images, tokens)[0])
        text_tower = TextTower(clip, tokens, lambda: count_blocks(clip, images, tokens)[1])
        reference = reference_mean(clip, self.references) if self.target == "margin" else None
        image, relevance_for = self.trace(image_tower)
        text, text_relevance_for = self.trace(text_tower) if self.supports_text else (text_tower.encode(), None)
        image, text = full_precision(image.detach()), full_precision(text.detach())
        score, by_image, by_text = directions(image, text, reference)
        check_scores(score, phrases)
        patches = relevance_for(by_image)
        words = text_relevance_for(by_text) if text_relevance_for else None
        for side in (patches, words) if words else (patches,):
            check_scores(score, phrases, side.values.expand(len(score), *side.values.shape[1:]))
        return patches, words, text_tower.keep, score
