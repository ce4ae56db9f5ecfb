"""One procedure for both towers: a method treats the patches of an image and the tokens of a phrase alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from matex_pl.arguments import check_choices
from matex_pl.attribution.base import AttributionMethod, check_pairs, check_phrases, check_scores
from matex_pl.attribution.core.capture import borrowed, check_embeddings, count_blocks, sample
from matex_pl.attribution.core.fill import drop_tokens
from matex_pl.attribution.core.stream import Stream
from matex_pl.attribution.core.target import REFERENCES, Target, directions, reference_mean
from matex_pl.clip import towers
from matex_pl.clip.encoders import DualEncoder, Reads
from matex_pl.clip.model import Clip
from matex_pl.clip.towers import Pooling
from matex_pl.clip.words import tokenized
from matex_pl.maps import Attribution, full_precision, min_max, patch_mean, token_map, upsample

# Maximum number of token ids that are compared at once: 128 MiB.
_MOST_TOKENS = 2**24


@dataclass
class Relevance:
    """Relevance of one tower's inputs, before scaling to [0, 1].

    Args:
        values: `(B, length)` per token of the map, or `(B, H, W)` per pixel; `(1, ...)` if one image serves all pairs.
        parts: Components by name, for `Attribution.parts`.
    """

    values: Tensor
    parts: dict[str, Any] = field(default_factory=dict)


class Explained(NamedTuple):
    """Relevance of B pairs.

    Attributes:
        patches: Relevance of the images.
        words: Relevance of the tokens; None for methods without maps of words.
        content: `(B, T)` mask of the content tokens.
        score: `(B,)` cosines.
        embeddings: Unit embeddings of images, `(B, D)` or `(1, D)` of one image, and of phrases, `(B, D)`.
    """

    patches: Relevance
    words: Relevance | None
    content: Tensor
    score: Tensor
    embeddings: tuple[Tensor, Tensor]


class Trace(NamedTuple):
    """One forward of a tower, and its relevance function.

    Attributes:
        embedding: `(B, D)` embeddings, or `(1, D)` of one image.
        relevance_for: Function from directions `(B, D)` in the embedding space to the `Relevance` of the tower's
            inputs.
    """

    embedding: Tensor
    relevance_for: Callable[[Tensor], Relevance]


class Tower(ABC):
    """One tower of the model with its input, inside `borrowed`.

    Args:
        clip: CLIP model.
        inputs: `(B, 3, H, W)` images, or one image for all pairs, or `(B, T)` tokens.
        depth: Function that returns the number of attention blocks; called on first use, because counting takes a
            forward.
    """

    def __init__(self, clip: Clip, inputs: Tensor, depth: Callable[[], int]) -> None:
        self.clip = clip
        self.inputs = inputs
        self._depth = depth

    @cached_property
    def depth(self) -> int:
        """Number of attention blocks; counting them refuses towers with unsupported attention."""
        return self._depth()

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """Pooling of the tokens into the embedding."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, first block first; none in a ResNet."""

    @property
    @abstractmethod
    def layer(self) -> nn.Module | None:
        """Named layer of an encoder that is a function; None for towers with blocks."""

    @property
    @abstractmethod
    def keep(self) -> Tensor:
        """Mask `(B, length)` bool of the map's tokens that count: all patches, or the content tokens."""

    @property
    @abstractmethod
    def signal(self) -> Tensor:
        """Differentiable input of the tower: pixels `(B, 3, H, W)`, or token embeddings `(B, T, C)`."""

    @abstractmethod
    def encode(self, inputs: Tensor | None = None) -> Tensor:
        """Unit embeddings `(b, D)` of inputs of this tower's kind; of its own inputs by default."""

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Unit embeddings `(k * B, D)` of k signals per sample, samples running fastest."""
        return self.encode(signal)

    @abstractmethod
    def encode_stream(self, copies: int) -> Tensor:
        """Unit embeddings of `copies` per sample, samples running fastest, inside `Stream.resumed`."""

    def stream(self) -> Stream:
        """Residual stream of the tower's tokens.

        Raises:
            NotImplementedError: If the tower has no token stream: a ResNet.
        """
        if not self.blocks:
            tower = towers.original(self.clip.model.visual)
            raise NotImplementedError(towers.not_explained("image", tower, "it has no stream of tokens"))
        return Stream(self.blocks)

    def rows(self, rows: Tensor) -> Tower:
        """Tower restricted to some of the pairs `(k,)`; a shared image stays shared."""
        inputs = self.inputs[rows] if len(self.inputs) > 1 else self.inputs
        return type(self)(self.clip, inputs, self._depth)

    def tokens_of(self, stream: Tensor) -> Tensor:
        """Tokens `(b, length, C)` of the map among the tokens `(b, n, C)` of a block; 0 where the block has none.

        Patches are the last tokens of a block, after class and register tokens. Words are the first.
        """
        missing = self.keep.shape[1] - stream.shape[1]
        return nn.functional.pad(stream, (0, 0, missing, 0) if isinstance(self, ImageTower) else (0, 0, 0, missing))


class ImageTower(Tower):
    """Image tower and its images."""

    @property
    def pooling(self) -> Pooling:  # noqa: D102
        return self.clip.image_pooling(self.inputs)

    @property
    def blocks(self) -> list[nn.Module]:  # noqa: D102
        return towers.image_blocks(self.clip.model.visual)

    @property
    def layer(self) -> nn.Module | None:  # noqa: D102
        model = towers.original(self.clip.model)
        return model.image_layer if isinstance(model, DualEncoder) else None

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
        # No resumed block reads the pixels: those of one image suffice.
        return self.encode(self.inputs[:1])

    def score_kept(self, keep: Tensor, fill: Tensor, direction: Tensor) -> Tensor:
        """Score of each pair with pixels faded into the fill, `(S, B)`, from one forward of all.

        Args:
            keep: `(S, H, W)` kept share of each pixel.
            fill: Pixels from `fill_images`.
            direction: `(B, D)` directions.
        """
        kept = torch.lerp(fill, self.inputs, keep[:, None, None].to(self.inputs))
        embedding = self.encode(kept.flatten(0, 1)).unflatten(0, (len(keep), -1))
        return (full_precision(embedding) * direction).sum(-1)


class TextTower(Tower):
    """Text tower and its phrases."""

    @property
    def pooling(self) -> Pooling:  # noqa: D102
        return self.clip.text_pooling(self.inputs)

    @property
    def blocks(self) -> list[nn.Module]:  # noqa: D102
        return towers.text_blocks(self.clip.model)

    @property
    def layer(self) -> nn.Module | None:  # noqa: D102
        model = towers.original(self.clip.model)
        return model.text_layer if isinstance(model, DualEncoder) else None

    @property
    def keep(self) -> Tensor:
        """The content tokens."""
        return self.clip.content(self.inputs)

    @property
    def _table(self) -> nn.Module:
        return towers.token_embedding(self.clip.model)

    @property
    def signal(self) -> Tensor:
        """Embeddings of the tokens, before positions are added."""
        return self._table(self.inputs)

    @property
    def blank(self) -> Tensor:
        """Signal of the phrase with its content replaced by pad tokens."""
        return self._table(drop_tokens(self.inputs, self.keep, self.clip.pad_id))

    def encode(self, inputs: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.clip.encode_text(self.inputs if inputs is None else inputs)

    def encode_signal(self, signal: Tensor) -> Tensor:
        """Unit embeddings of token embeddings; pad positions and the pooled position stay those of the phrase."""
        with self._table.register_forward_hook(lambda _, __, found: signal[:, : found.shape[1]].to(found)):
            return self.encode_stream(len(signal) // len(self.inputs))

    def encode_stream(self, copies: int) -> Tensor:  # noqa: D102
        return self.encode(self.inputs.repeat(copies, 1))

    def score_kept(self, keep: Tensor, direction: Tensor, chunk_size: int) -> Tensor:
        """Score of each pair with dropped content replaced by pad tokens, `(S, B)`.

        A phrase has few words, so many remainders are equal: each distinct remainder is encoded once.

        Args:
            keep: `(S, B, T)` bool, or `(S, 1, T)` for all pairs.
            direction: `(B, D)` directions.
            chunk_size: Number of phrases per forward.
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
    """Base class of methods that explain the cosine or margin of pairs by one procedure for both towers.

    Args:
        target: `cosine`, or `margin`, the cosine minus its mean over `references`.
        references: Phrases of the margin; the package's list of findings by side and zone by default.

    Attributes:
        reads: Parts of the towers that the method reads. A model of two functions (`Clip.from_encoders`) refuses
            parts that it does not have.
    """

    reads: ClassVar[Reads] = "inputs"
    target: str

    def __init__(self, target: Target = "cosine", references: list[str] | None = None) -> None:
        check_choices(TwoTowerMethod.__init__, locals())
        if references is not None and not references:
            raise ValueError(
                "references must name at least one phrase, got []. Leave references out to use the package's list."
            )
        self.target = target
        self.references = list(REFERENCES if references is None else references)

    @abstractmethod
    def trace(self, tower: Tower) -> Trace:
        """Embeddings of a tower from one forward, and a function from directions to the relevance of its inputs."""

    def check_model(self, clip: Clip) -> None:
        """Check the towers as `trace` reads them; methods that run many forwards read only inputs and embeddings."""
        super().check_model(clip)
        if not self.perturbs_inputs:
            with borrowed(clip):
                for tower in self._towers(clip, *sample(clip))[: 1 + self.supports_text]:
                    self.trace(tower)

    def attribute(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of B pairs; see `AttributionMethod.attribute`."""
        self._refuse_functions(clip)
        check_pairs(clip, images, tokens, phrases, content_box, chest_box)
        return self._explain(clip, images, tokens, phrases, content_box, chest_box)

    def attribute_phrases(
        self,
        clip: Clip,
        image: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        chest_box: Tensor | None = None,
    ) -> Attribution:
        """Maps of one image and P phrases; the work on the image is done once."""
        self._refuse_functions(clip)
        tokens, *boxes = check_phrases(clip, image, phrases, content_box, chest_box)
        return self._explain(clip, image[None], tokens, phrases, *boxes)

    def _refuse_functions(self, clip: Clip) -> None:
        """Raise NotImplementedError if the model is two functions, and lacks a part that the method reads."""
        model = towers.original(clip.model)
        missing = model.lacks(self.reads) if isinstance(model, DualEncoder) else ""
        if missing:
            raise NotImplementedError(
                f"{type(self).__name__} reads {missing}. Of a model from `Clip.from_encoders`, Saliency, "
                "IntegratedGradients, Rise, KernelShap, SubmodularRegions, GradCam and the controls can give maps."
            )

    def _explain(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None,
        chest_box: Tensor | None,
    ) -> Attribution:
        """Maps of B pairs, or of one image and B phrases."""
        dtype = clip.std.dtype
        with borrowed(clip):
            check_embeddings(clip, images, tokens)
            patches, words, content, score, embeddings = self._relevance(clip, images, tokens, phrases)
            found = [side.values for side in (patches, words) if side is not None]
            check_scores(score, phrases, *(values.expand(len(score), *values.shape[1:]) for values in found))
            if patches.values.ndim == 2:
                grid = min_max(patches.values.unflatten(1, clip.grid), dtype=dtype)
                image = min_max(upsample(grid, clip.image_size))
            else:
                image = min_max(patches.values, dtype=dtype)
                grid = patch_mean(image, clip.grid)
            image, grid = (part.expand(len(score), -1, -1) for part in (image, grid))
            parts = patches.parts | {"embeddings": embeddings}
            text = torch.zeros_like(content, dtype=grid.dtype)
            if words is not None:
                parts |= {f"text_{name}": part for name, part in words.parts.items()}
                text = token_map(words.values, content, dtype=dtype)
            worded = tokenized(clip.tokenizer, tokens, content, phrases)
            return Attribution(image, grid, text, content, score, parts, worded)

    def _towers(self, clip: Clip, images: Tensor, tokens: Tensor) -> tuple[ImageTower, TextTower]:
        return (
            ImageTower(clip, images, lambda: count_blocks(clip, images, tokens)[0]),
            TextTower(clip, tokens, lambda: count_blocks(clip, images, tokens)[1]),
        )

    def _relevance(self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str]) -> Explained:
        """Relevance of the images and of the tokens, inside `borrowed`."""
        image_tower, text_tower = self._towers(clip, images.detach().clone(), towers.copied(tokens))
        reference = reference_mean(clip, self.references) if self.target == "margin" else None
        image, relevance_for = self.trace(image_tower)
        text, text_relevance_for = self.trace(text_tower) if self.supports_text else (text_tower.encode(), None)
        image, text = full_precision(image.detach()), full_precision(text.detach())
        score, by_image, by_text = directions(image, text, reference)
        if self.perturbs_inputs:
            # Before the many forwards.
            check_scores(score, phrases)
        patches = relevance_for(by_image)
        words = text_relevance_for(by_text) if text_relevance_for else None
        return Explained(patches, words, text_tower.keep, score, (image, text))
