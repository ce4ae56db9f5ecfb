"""MATEX: gradients, attention flow, layer consistency and a spatial prior of the phrase, fused (eqs. 1 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase, prior_maps
from matex_pl.anatomy.prior import Laterality, PriorFrame, PriorShape, frame_boxes
from matex_pl.arguments import check_choices
from matex_pl.attribution.base import check_scores
from matex_pl.attribution.core.capture import Block, borrowed, capture_attention, grad_blocks
from matex_pl.attribution.core.relevance import (
    attention_rows,
    gradients_of,
    loosened_term,
    relevance_rows,
    rollout_rows,
    row_shares,
    row_weights,
    softmax_term,
    weighted_attention,
)
from matex_pl.attribution.core.two_tower import ImageTower, Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.clip.model import Clip
from matex_pl.clip.words import tokenized
from matex_pl.maps import Attribution, min_max, moved, patch_mean, token_map, upsample


def layer_weights(num_layers: int, tau: float) -> Tensor:
    """Softmax weights over layers, eq. (1), shape `(L,)`, summing to 1; with tau > 0 deeper layers weigh more."""
    return torch.softmax(tau * torch.arange(1, num_layers + 1, dtype=torch.float32), dim=0)


BlockCount = int | Literal["all"]
"""Number of last blocks, or `"all"`."""


def attention_flow(layers: Tensor, tau: float) -> Tensor:
    """A_flow of eq. (1): attention rows `(B, L, ...)` averaged over layers with `layer_weights`, `(B, ...)`."""
    weights = moved(layer_weights(layers.shape[1], tau).to(layers.dtype), layers.device)
    return torch.einsum("l,bl...->b...", weights, layers)


def consistency(layers: Tensor, kappa: float | Tensor) -> Tensor:
    """C of eq. (2), `1 / (1 + kappa * std)` in (0, 1], with the population standard deviation over the L layers.

    Args:
        layers: `(B, L, ...)` attention rows of the layers.
        kappa: A number, or one per sample `(B, 1)`.
    """
    return 1 / (1 + kappa * layers.std(1, correction=0))


class Matex(TwoTowerMethod):
    """MATEX maps of image and text (Imran et al., sections 3.1 to 3.4), from one forward and one partial backward.

    The defaults are the paper's numbers where the paper gives them, with three departures, each an argument:

    - `kappa`: with the printed 1, attention of about 1/N leaves C near 1.
    - `laterality`: the print mirrors the patient's sides.
    - `fuse_at`: the prior keeps its shape when fused at the pixels.

    For towers that do not pool one token see `row_weights`.

    Args:
        grad_layers: K, the number of last image blocks whose gradients count ("last 2-3" in the paper), or `all`.
        text_grad_layers: Number of last text blocks whose gradients count, or `all`; `grad_layers` by default.
        skip_layers: Number of first image blocks whose gradients never count, whatever `grad_layers` is; one block
            always counts.
        spatial_weight: `softmax` (the attention row per head, as printed) or `loosened` (the weight of Grad-ECLIP).
        tau: Temperature of eq. 1; larger favors deeper layers. The paper gives none; 0.2 puts half the mass on the last
            3 of 12.
        flow: `sum` (eq. 1), `rollout` (Abnar and Zuidema), or `relevance`: attention weighted by its gradient and
            propagated from block to block (Chefer et al.).
        flow_layers: Number of last blocks over which the attention flows, in both towers, or `all`.
        kappa: Scale of the deviation in eq. 2: a number (1 in the paper), or `tokens`, the number of patches or of
            content tokens.
        consistency_of: Rows that eq. 2 compares: `attention` (of all blocks, as printed), or `relevance`, the attention
            weighted by its gradient, of the blocks of `flow_layers`, with the sum 1 in each block.
        alpha: Weight of the gradient map, eq. 6; 0.5 in the paper.
        beta: Weight of the attention flow, eq. 6; 0.2 in the paper.
        text_beta: Weight of the attention flow in the text map; `beta` by default.
        lambda_c: gamma of eqs. 6 and 8, the weight of the consistent gradients; 0.35 in the paper, tuned in 0.2 to 0.6.
        delta: Weight of the gradients under the prior, eq. 6; 0.2 in the paper. 0 switches the prior off in either
            fusion.
        lambda_s: Strength of the prior, eq. 5; 2.5 in the paper, tuned in 1.5 to 3.5. 1 switches the prior off.
        prior_shape: `parabola` (eqs. 3 and 4), `gaussian` or `plateau`.
        laterality: `patient` (the patient's right is on the left of the image) or `paper` (as printed, mirrored).
        fuse_at: `pixel` or `grid`, the resolution at which eq. 6 is evaluated.
        fusion: `sum` (eq. 6) or `product`: `norm((alpha G + gamma C G + beta F) * M ** prior_power)`. In the product
            delta has no weight, but 0 still switches the prior off.
        prior_power: Exponent of M in the product.
        knowledge_prior: Whether a finding without a named place gets its usual one ("edema": both hila). This leaks
            knowledge by design: score it as a row of its own.
        prior_frame: Rectangle of the regions in eqs. 3 to 5: `image` (as printed) or `chest`, the rectangle around the
            lungs of the image, for images with masks of both. The others keep the rectangle of the image.
        kwargs: `target` and `references` of `TwoTowerMethod`; the paper's S is the cosine.

    `parts` holds the inputs of `fuse`:

    - `grad_blocks` `(B, K, Gh, Gw)`, signed, and `attention_layers` `(B, L, Gh, Gw)`.
    - `grad`, `flow` and `consistency` `(B, Gh, Gw)`, raw, derived from the two above.
    - `prior` `(B, H, W)`, and for `fuse_at="grid"` `prior_grid` `(B, Gh, Gw)`.
    - `text_grad_blocks` `(B, K, T)` and `text_attention_layers` `(B, L, T)`.
    - `text_grad`, `text_flow` and `text_consistency` `(B, T)`, raw, 0 off content.
    - `rollout` `(B, L, Gh, Gw)` and `text_rollout` `(B, L, T)`, if `flow` is `rollout`: over the last block, over the
      last two, and so on.
    - `relevance` `(B, Kf, Gh, Gw)` and `text_relevance` `(B, Kf, T)`, if `flow` or `consistency_of` is `relevance`, in
      the same order for the Kf blocks of `flow_layers`; `relevance_layers` and `text_relevance_layers` are the rows of
      these blocks, first block first.
    - `regions` and `spans`, a list per pair.
    - `content_box` and `chest_box` `(B, 4)`, or None.
    - `phrases`, `tokenized` phrases, image size, `content`, `score` and the settings.
    """

    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = (
        "1 forward and a backward through the last grad_layers and text_grad_layers blocks, and for the relevance "
        "through the last flow_layers; once per model a forward of one pair, and for the margin once per weights the "
        "references"
    )

    def __init__(
        self,
        grad_layers: BlockCount = 3,
        text_grad_layers: BlockCount | None = None,
        skip_layers: int = 0,
        spatial_weight: Literal["softmax", "loosened"] = "softmax",
        tau: float = 0.2,
        flow: Literal["sum", "rollout", "relevance"] = "sum",
        flow_layers: BlockCount = "all",
        kappa: float | Literal["tokens"] = "tokens",
        consistency_of: Literal["attention", "relevance"] = "attention",
        alpha: float = 0.5,
        beta: float = 0.2,
        text_beta: float | None = None,
        lambda_c: float = 0.35,
        delta: float = 0.2,
        lambda_s: float = 2.5,
        prior_shape: PriorShape = "parabola",
        laterality: Laterality = "patient",
        fuse_at: Literal["pixel", "grid"] = "pixel",
        fusion: Literal["sum", "product"] = "sum",
        prior_power: float = 2.0,
        knowledge_prior: bool = False,
        prior_frame: PriorFrame = "image",
        **kwargs: Any,
    ) -> None:
        check_choices(Matex.__init__, locals())
        super().__init__(**kwargs)
        for name, count in (("grad_layers", grad_layers), ("text_grad_layers", text_grad_layers)):
            if isinstance(count, int) and count < 1:
                raise ValueError(
                    f"{name} must be at least 1, or 'all', got {count!r}. To leave out the first image block only, "
                    "set grad_layers='all' and skip_layers=1."
                )
        if flow_layers != "all" and flow_layers < 1:
            raise ValueError(f"flow_layers must be at least 1, or 'all', got {flow_layers}.")
        if skip_layers < 0:
            raise ValueError(f"skip_layers must be at least 0, got {skip_layers}.")
        if kappa != "tokens" and not 0 <= kappa < inf:
            raise ValueError(f"kappa must be a finite number of at least 0, or 'tokens', got {kappa}.")
        if not lambda_s >= 1:
            raise ValueError(f"lambda_s must be at least 1 (1 switches the prior off), got {lambda_s}.")
        weights = {"alpha": alpha, "beta": beta, "lambda_c": lambda_c, "delta": delta}
        weights |= {} if text_beta is None else {"text_beta": text_beta}
        for name, number in (weights | {"tau": tau, "prior_power": prior_power, "lambda_s": lambda_s}).items():
            if not isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}.")
        if not any((alpha, beta, lambda_c, delta if fusion == "sum" else 0)):
            raise ValueError(
                "alpha, beta, lambda_c and delta are all 0, which gives an empty map. Set one of them above 0; "
                "delta does not count with fusion='product'."
            )
        self.grad_layers = grad_layers
        self.text_grad_layers = text_grad_layers
        self.skip_layers = skip_layers
        self.spatial_weight = spatial_weight
        self.tau = tau
        self.flow = flow
        self.flow_layers = flow_layers
        self.kappa = kappa
        self.consistency_of = consistency_of
        self.alpha = alpha
        self.beta = beta
        self.text_beta = text_beta
        self.lambda_c = lambda_c
        self.delta = delta
        self.lambda_s = lambda_s
        self.prior_shape = prior_shape
        self.laterality = laterality
        self.fuse_at = fuse_at
        self.fusion = fusion
        self.prior_power = prior_power
        self.knowledge_prior = knowledge_prior
        self.prior_frame = prior_frame

    @classmethod
    def paper(cls, **changes: Any) -> Matex:
        """MATEX as printed in the paper: cosine, kappa 1, mirrored sides, eq. 6 on the patch raster.

        Settings that the paper leaves open are the defaults of this package: tau, one K of "2-3", the scales of G and
        F, and the fusion of the words.
        """
        printed: dict[str, Any] = {"target": "cosine", "kappa": 1.0, "laterality": "paper"}
        return cls(**(printed | {"fuse_at": "grid", "fusion": "sum"} | changes))

    @classmethod
    def recommended(cls, **changes: Any) -> Matex:
        """MATEX with the settings selected on phantom validation images: the margin, the product, most blocks.

        All blocks of the text tower count, and all but the first of the image tower. In the text map the attention flow
        has ten times the paper's weight. The regions of the prior are in the rectangle around the lungs, for images
        with masks of both.
        """
        blocks: dict[str, Any] = {"grad_layers": "all", "skip_layers": 1, "text_grad_layers": "all"}
        kinds: dict[str, Any] = {"target": "margin", "fusion": "product", "prior_frame": "chest"}
        return cls(**(blocks | kinds | {"text_beta": 2.0} | changes))

    # Alias from 0.1.
    measured = recommended

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording all attention, and q, k and v of the last blocks."""
        image, text = self.depths(tower.depth, tower.depth)
        depth = image if isinstance(tower, ImageTower) else text
        flowing = self.flow_depth(tower.depth) if "relevance" in (self.flow, self.consistency_of) else 0
        pooling = tower.pooling
        start = tower.depth - max(depth, flowing)
        with capture_attention(pooling, grad_from=start, full=self.flow == "rollout") as blocks:
            embedding = tower.encode()

        def relevance_for(direction: Tensor) -> Relevance:
            recorded = grad_blocks(blocks)
            counted, flowed = recorded[-depth:], recorded[len(recorded) - flowing :]
            softmax = self.spatial_weight == "softmax"
            # See `softmax_term`.
            by_value = pooling.position is None and softmax
            handles = [block.value if by_value else block.output for block in counted]
            found = gradients_of(embedding, [*handles, *(block.output for block in flowed)], direction)
            gradients, by_output = found[:depth], found[depth:]
            if softmax:
                pairs = zip(counted, gradients, strict=True)
                terms = [pooling.to_map(softmax_term(*pair, pooling)) for pair in pairs]
            else:
                triples = zip(counted, gradients, row_weights(blocks, pooling)[-depth:], strict=True)
                terms = [loosened_term(*triple, pooling, tower.keep) for triple in triples]
            parts = {"attention_layers": attention_rows(blocks, pooling)}
            if self.flow == "rollout":
                parts["rollout"] = rollout_rows([block.mean for block in blocks], pooling)
            if flowed:
                passed = [weighted_attention(*pair) for pair in zip(flowed, by_output, strict=True)]
                parts["relevance"] = relevance_rows(passed, pooling)
                parts["relevance_layers"] = attention_rows([Block(row_shares(rows)) for rows in passed], pooling)
            return Relevance(torch.stack(terms, 1), parts)

        return Trace(embedding, relevance_for)

    def _explain(
        self,
        clip: Clip,
        images: Tensor,
        tokens: Tensor,
        phrases: Sequence[str],
        content_box: Tensor | None,
        chest_box: Tensor | None,
    ) -> Attribution:
        with borrowed(clip):
            patches, words, content, score, embeddings = self._relevance(clip, images, tokens, phrases)
            assert words is not None
            parts: dict[str, Any] = {"content": content, "score": score}
            for name, part in {"grad_blocks": patches.values, **patches.parts}.items():
                raster = part.unflatten(-1, clip.grid)
                parts[name] = raster.expand(len(score), *raster.shape[1:])
            for name, part in {"grad_blocks": words.values, **words.parts}.items():
                parts[f"text_{name}"] = part
            check_scores(score, phrases, *parts.values())
            parts |= self._read(phrases) | {
                "embeddings": embeddings,
                "content_box": None if content_box is None else content_box.clone(),
                "chest_box": None if chest_box is None else chest_box.clone(),
                "phrases": list(phrases),
                "tokenized": tokenized(clip.tokenizer, tokens, content, phrases),
                "size": clip.image_size,
                "dtype": clip.std.dtype,
            }
            return self._fuse(parts)

    @classmethod
    def fuse(cls, parts: dict[str, Any], **changes: Any) -> Attribution:
        """Maps fused again from `parts` with changed settings, without another forward.

        Settings that are not named keep the values of the parts; `Matex.fuse(parts,
        **Matex.paper(grad_layers=1).settings)` changes all of them. Some changes need another `attribute`:

        - another `spatial_weight`, `target` or `references`
        - more blocks than were computed
        - `flow="rollout"`, if the parts hold no rollout
        - `flow="relevance"` or `consistency_of="relevance"`, if the parts hold no relevance

        Args:
            parts: `parts` of an `Attribution` from `Matex.attribute`.
            changes: Constructor arguments to change.

        Raises:
            ValueError: If a setting is out of range, or the parts lack its components.
        """
        if not {"settings", "grad_blocks"} <= parts.keys():
            raise ValueError(
                f"The parts hold {', '.join(parts) or 'nothing'}, not the components of MATEX. Give the `parts` of "
                "`Matex.attribute`."
            )
        lengths = {name: len(parts[name]) for name in ("score", "grad_blocks", "content", "phrases", "regions")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The parts have different numbers of pairs: {lengths}. Slice all of them alike.")
        method = cls(**(parts["settings"] | changes))
        problem = method.lacks(parts)
        if problem:
            raise ValueError(problem)
        if method.knowledge_prior != parts["settings"]["knowledge_prior"]:
            parts = parts | method._read(parts["phrases"])
        return method._fuse(parts)

    def lacks(self, parts: dict[str, Any]) -> str:
        """Reason why `fuse` cannot give the maps of these settings from `parts`; empty if it can."""
        made, wanted = parts["settings"], self.settings
        for name in ("spatial_weight", "target", "references"):
            if wanted[name] != made[name]:
                return (
                    f"The parts were made with {name}={made[name]!r} and cannot be fused with {wanted[name]!r}. Call "
                    "`attribute` with the new value."
                )
        if self.flow == "rollout" and "rollout" not in parts:
            return (
                "The parts hold no rollout. Call `attribute` with flow='rollout'; its parts can also be fused as 'sum'."
            )
        held = parts["grad_blocks"].shape[1], parts["text_grad_blocks"].shape[1]
        layers = parts["attention_layers"].shape[1], parts["text_attention_layers"].shape[1]
        needed = self.depths(*layers)
        if needed[0] > held[0] or needed[1] > held[1]:
            return (
                f"The parts hold the gradients of {held[0]} image and {held[1]} text blocks, but {needed[0]} and "
                f"{needed[1]} are needed. Call `attribute` with grad_layers={self.grad_layers!r} and "
                f"text_grad_layers={self.text_grad_layers!r}."
            )
        wants_relevance = "relevance" in (self.flow, self.consistency_of)
        if wants_relevance and "relevance" not in parts:
            return (
                "The parts hold no relevance. Call `attribute` with flow='relevance'; its parts can also be fused as "
                "'sum'."
            )
        if wants_relevance:
            held = parts["relevance"].shape[1], parts["text_relevance"].shape[1]
            needed = self.flow_depth(layers[0]), self.flow_depth(layers[1])
            if needed[0] > held[0] or needed[1] > held[1]:
                return (
                    f"The parts hold the relevance over {held[0]} image and {held[1]} text blocks, but {needed[0]} and "
                    f"{needed[1]} are needed. Call `attribute` with flow_layers={self.flow_layers!r}."
                )
        return ""

    def depths(self, layers: int, text_layers: int) -> tuple[int, int]:
        """K of the image tower and of the text tower, at least 1, for the given numbers of layers."""
        image, text = self.grad_layers, self.grad_layers if self.text_grad_layers is None else self.text_grad_layers
        most = max(layers - self.skip_layers, 1)
        return most if image == "all" else min(image, most), text_layers if text == "all" else min(text, text_layers)

    def flow_depth(self, layers: int) -> int:
        """Number of blocks over which the attention of a tower with `layers` blocks flows."""
        return layers if self.flow_layers == "all" else min(self.flow_layers, layers)

    def _read(self, phrases: Sequence[str]) -> dict[str, Any]:
        """Named regions of each phrase, and the spans of their words."""
        parsed = [parse_phrase(phrase, knowledge_prior=self.knowledge_prior) for phrase in phrases]
        return {"regions": [phrase.regions for phrase in parsed], "spans": [phrase.spans for phrase in parsed]}

    def _fuse(self, parts: dict[str, Any]) -> Attribution:
        """Maps fused from parts, whose components are computed with the settings of this method."""
        parts = parts | self._derive(parts) | self._prior(parts) | {"settings": self.settings}
        image, raster = self._fuse_image(parts)
        text, content, score = self._fuse_text(parts), parts["content"], parts["score"]
        return Attribution(image, raster, text, content, score, parts, parts.get("tokenized", ()))

    def _derive(self, parts: dict[str, Any]) -> dict[str, Tensor]:
        """Raw A_grad, A_flow and C of both towers, from their blocks and layers.

        For the image the gradient term of each block is clipped at 0; for the text their mean is.
        """
        content, layers, text_layers = parts["content"], parts["attention_layers"], parts["text_attention_layers"]
        last, text_last = self.depths(layers.shape[1], text_layers.shape[1])
        patches, words = layers[0, 0].numel(), content.sum(1, keepdim=True)
        tokens = self.kappa == "tokens"
        compared, text_compared = (self._compared(parts, prefix) for prefix in ("", "text_"))
        return {
            "grad": parts["grad_blocks"][:, -last:].relu().mean(1),
            "flow": self._flow(parts, ""),
            "consistency": consistency(compared, float(patches if tokens else self.kappa)),
            "text_grad": parts["text_grad_blocks"][:, -text_last:].mean(1).relu() * content,
            "text_flow": self._flow(parts, "text_") * content,
            "text_consistency": consistency(text_compared, words if tokens else float(self.kappa)) * content,
        }

    def _flow(self, parts: dict[str, Any], prefix: str) -> Tensor:
        """A_flow of one tower, `(B, ...)`; the prefix of the text tower's parts is `text_`."""
        layers = parts[f"{prefix}attention_layers"]
        depth = self.flow_depth(layers.shape[1])
        if self.flow == "sum":
            return attention_flow(layers[:, -depth:], self.tau)
        return parts[f"{prefix}{self.flow}"][:, depth - 1]

    def _compared(self, parts: dict[str, Any], prefix: str) -> Tensor:
        """Rows that eq. 2 compares in one tower, `(B, layers, ...)`."""
        layers = parts[f"{prefix}attention_layers"]
        if self.consistency_of == "attention":
            return layers
        return parts[f"{prefix}relevance_layers"][:, -self.flow_depth(layers.shape[1]) :]

    def _prior(self, parts: dict[str, Any]) -> dict[str, Tensor]:
        """M at the pixels, and for `fuse_at="grid"` evaluated at the patch centers too."""
        draw = partial(
            prior_maps,
            parts["regions"],
            lambda_s=self.lambda_s,
            shape=self.prior_shape,
            laterality=self.laterality,
            content_box=frame_boxes(self.prior_frame, parts["content_box"], parts.get("chest_box")),
            checked=True,
            ids=parts["phrases"],
            device=parts["score"].device,
        )
        grid = {"prior_grid": draw(tuple(parts["grad_blocks"].shape[-2:]))} if self.fuse_at == "grid" else {}
        return {"prior": draw(parts["size"]), **grid}

    def _fuse_image(self, parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Final map `(B, H, W)` of eq. (6) over raw components, and its raster `(B, Gh, Gw)`.

        G and F are min-maxed first, because their scales are unrelated. The paper does not specify this.
        """
        prior, dtype = parts["prior"], parts["dtype"]
        size, grid = prior.shape[-2:], parts["grad"].shape[-2:]
        grad, flow = min_max(parts["grad"], dtype=dtype), min_max(parts["flow"], dtype=dtype)
        if self.fuse_at == "grid":
            raster = self._equation_6(grad, flow, parts["consistency"], parts["prior_grid"], dtype)
            return min_max(upsample(raster, size)), raster
        grad, flow, stable = upsample(torch.stack([grad, flow, parts["consistency"]], 1), size).unbind(1)
        image = self._equation_6(grad, flow, stable, prior, dtype)
        return image, patch_mean(image, grid)

    def _equation_6(self, grad: Tensor, flow: Tensor, stable: Tensor, prior: Tensor, dtype: torch.dtype) -> Tensor:
        """Weighted sum of eq. (6), or the product option; the same at pixels and on the raster."""
        base = self.alpha * grad + self.beta * flow + self.lambda_c * stable * grad
        if self.fusion == "product":
            return min_max(base * prior**self.prior_power if self.delta else base, dtype=dtype)
        return min_max(base + self.delta * prior * grad, dtype=dtype)

    def _fuse_text(self, parts: dict[str, Any]) -> Tensor:
        """Text map `(B, T)`: `norm(norm(T_grad) * (alpha + gamma C + delta) + beta norm(T_flow))` over content tokens.

        `text_beta` replaces beta. The map is 0 off content, and 1 at a single content token. M is 1 in either fusion,
        because words have no place.
        """
        content, dtype = parts["content"], parts["dtype"]
        grad = min_max(parts["text_grad"], keep=content, dtype=dtype)
        flow = min_max(parts["text_flow"], keep=content, dtype=dtype)
        weight = self.alpha + self.lambda_c * parts["text_consistency"] + self.delta
        beta = self.beta if self.text_beta is None else self.text_beta
        return token_map(grad * weight + beta * flow, content, dtype=dtype)
