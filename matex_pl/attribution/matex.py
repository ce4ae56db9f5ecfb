"""MATEX: gradients, attention flow, layer consistency and a spatial prior from the phrase, fused (equations 1 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase, prior_maps
from matex_pl.anatomy.prior import LATERALITIES, SHAPES
from matex_pl.attribution.base import AttributionMethod, check_choice, check_pairs, check_scores
from matex_pl.attribution.capture import Block, borrowed, capture_attention, count_blocks
from matex_pl.attribution.target import REFERENCES, TARGETS, reference_mean, score_and_target
from matex_pl.clip import Clip
from matex_pl.maps import AttributionMaps, full_precision, min_max, patch_mean, upsample


def layer_weights(num_layers: int, tau: float) -> Tensor:
    """Softmax weights over layers, eq. (1): deeper layers count more when tau > 0. Shape (L,), sums to 1."""
    return torch.softmax(tau * torch.arange(1, num_layers + 1, dtype=torch.float32), dim=0)


def attention_flow(rows: Tensor, tau: float) -> Tensor:
    """A_flow of eq. (1): `(L, B, n)` head-averaged rows to `(B, n)`, all layers weighted by `layer_weights`."""
    return torch.einsum("l,lbn->bn", layer_weights(len(rows), tau).to(rows), rows)


def attention_rollout(matrices: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Row p of the product over layers of rownorm(mean_heads A + I), `(B, n)` (Abnar and Zuidema 2020).

    Args:
        matrices: L head-averaged attention matrices `(B, n, n)`, first layer first.
        positions: `(B,)` pooled position p.
    """
    identity = torch.eye(matrices[0].shape[-1]).to(matrices[0])
    row = identity[positions]
    for matrix in reversed(matrices):
        mixed = matrix + identity
        row = torch.einsum("bn,bnm->bm", row, mixed / mixed.sum(-1, keepdim=True))
    return row


def consistency(rows: Tensor, kappa: float | Tensor) -> Tensor:
    """C of eq. (2): 1 / (1 + kappa * population std over the L layers), in (0, 1].

    Args:
        rows: `(L, B, n)` head-averaged rows.
        kappa: A number, or one per sample `(B, 1)`.
    """
    return 1 / (1 + kappa * rows.std(0, correction=0))


def spatial_weight(block: Block, keep: Tensor, kind: str) -> Tensor:
    """Weight of each token in a block's gradient term, `(B, h, n)`.

    `softmax`: the attention row per head. `loosened` (Grad-ECLIP): norm over the tokens of `keep` `(B, n)` of
    cos(q_p, k_i) on the concatenated heads; 1 when all are equal.
    """
    if kind == "softmax":
        return block.row
    query, key = block.query.flatten(1), block.key.transpose(1, 2).flatten(2)  # type: ignore[union-attr]
    cosine = torch.cosine_similarity(full_precision(query)[:, None], full_precision(key), dim=-1)
    weight = min_max(cosine, keep=keep, dtype=key.dtype)
    constant = (weight.amax(1, keepdim=True) == 0).to(weight)
    return (weight + constant)[:, None].expand_as(block.row)


def gradient_terms(
    blocks: Sequence[Block], gradients: Sequence[Tensor], positions: Tensor, keep: Tensor, kind: str
) -> Tensor:
    """Signed relevance of each token in each of K blocks: w_i * sum over heads and channels of g_l[p] * v_l(i).

    With the `softmax` weight the sum over all tokens is <g_l[p], o_l[p]>.

    Args:
        blocks: K blocks that were recorded with gradient.
        gradients: K of `(B, h, n, d)`, of what is explained by each block's output.
        positions: `(B,)` pooled position p.
        keep: `(B, n)` bool, the tokens that `loosened` normalises over.
        kind: `softmax` or `loosened`, see `spatial_weight`.

    Returns:
        `(K, B, n)`.
    """
    samples = torch.arange(len(positions), device=positions.device)
    terms = []
    for block, gradient in zip(blocks, gradients, strict=True):
        row, value = full_precision(gradient[samples, :, positions]), full_precision(block.value)  # type: ignore[arg-type]
        per_head = torch.einsum("bhd,bhnd->bhn", row, value)
        terms.append((per_head * spatial_weight(block, keep, kind)).sum(1))
    return torch.stack(terms)


@dataclass
class _Tower:
    """Components of one side over all n tokens: `grad (K, B, n)` signed, `flow (B, n)`, `rows (L, B, n)`."""

    grad: Tensor
    flow: Tensor
    rows: Tensor


class Matex(AttributionMethod):
    """MATEX maps (Imran et al., sections 3.1 to 3.4), image and text, from one forward and one partial backward.

    The defaults are the paper's numbers where it prints them, with three departures, each an argument: `kappa` (the
    printed 1 leaves C at 0.95 to 0.99), `laterality` (the print mirrors the patient's sides) and `fuse_at` (the prior
    keeps its shape).

    Args:
        grad_layers: K, the last blocks whose gradients count on the image side ("last 2-3" in the paper); more than
            there are means all.
        text_grad_layers: The same on the text side; `grad_layers` unless set.
        spatial_weight: `softmax` (the attention row per head, as printed) or `loosened` (Grad-ECLIP's).
        tau: Temperature of eq. 1; larger favours deeper layers. The paper gives none; 0.2 puts half the mass on the
            last 3 of 12.
        flow: `sum` (eq. 1) or `rollout` (Abnar and Zuidema).
        kappa: Scale of the deviation in eq. 2: a number (1 in the paper), or `tokens`: the number of patches or of
            content tokens.
        alpha: Weight of the gradient map, eq. 6.
        beta: Weight of the attention flow, eq. 6.
        lambda_c: gamma of eqs. 6 and 8, the weight of the consistent gradients; 0.2 to 0.6 in the paper.
        delta: Weight of the gradients under the prior, eq. 6; 0 takes the prior out of the sum.
        lambda_s: Strength of the prior, eq. 5; 1.5 to 3.5 in the paper, 1 takes the prior out.
        prior_shape: `parabola` (eqs. 3 and 4), `gaussian` or `plateau`.
        laterality: `patient` (the patient's right is on the left of the film) or `paper` (as printed, mirrored).
        fuse_at: `pixel` or `grid`, where eq. 6 is evaluated.
        fusion: `sum` (eq. 6) or `product`: norm((alpha G + gamma C G + beta F) * M ** prior_power).
        prior_power: Exponent of M in the product.
        explain: `cosine` (the paper's S) or `margin`, the cosine less its mean over `references`.
        references: Phrases of the margin; the package's list of findings by side and zone by default.

    `parts` holds grad, flow, consistency `(B, Gh, Gw)` raw; prior `(B, H, W)` and
    prior_grid `(B, Gh, Gw)`; text_grad, text_flow, text_consistency `(B, T)`
    raw and 0 off content; regions and spans, a list per pair.
    """

    cost: ClassVar[str] = "1 forward and a backward through the last max(grad_layers, text_grad_layers) blocks"

    def __init__(
        self,
        grad_layers: int = 3,
        text_grad_layers: int | None = None,
        spatial_weight: str = "softmax",
        tau: float = 0.2,
        flow: str = "sum",
        kappa: float | str = "tokens",
        alpha: float = 0.5,
        beta: float = 0.2,
        lambda_c: float = 0.35,
        delta: float = 0.2,
        lambda_s: float = 2.5,
        prior_shape: str = "parabola",
        laterality: str = "patient",
        fuse_at: str = "pixel",
        fusion: str = "sum",
        prior_power: float = 2.0,
        explain: str = "cosine",
        references: list[str] | None = None,
    ) -> None:
        check_choice("spatial_weight", spatial_weight, ("softmax", "loosened"))
        check_choice("flow", flow, ("sum", "rollout"))
        check_choice("prior_shape", prior_shape, SHAPES)
        check_choice("laterality", laterality, LATERALITIES)
        check_choice("fuse_at", fuse_at, ("pixel", "grid"))
        check_choice("fusion", fusion, ("sum", "product"))
        check_choice("explain", explain, TARGETS)
        if isinstance(kappa, str):
            check_choice("kappa", kappa, ("tokens",))
        elif not kappa >= 0:
            raise ValueError(f"kappa must be a number from 0 or 'tokens', got {kappa}.")
        text_grad_layers = grad_layers if text_grad_layers is None else text_grad_layers
        if min(grad_layers, text_grad_layers) < 1:
            raise ValueError(
                f"grad_layers and text_grad_layers must be at least 1, got {grad_layers} and {text_grad_layers}."
            )
        if explain == "margin" and references is not None and not references:
            raise ValueError("references must name at least one phrase; leave it out for the package's own list.")
        if not lambda_s >= 1:
            raise ValueError(f"lambda_s must be at least 1 (1 takes the prior out), got {lambda_s}.")
        self.grad_layers = grad_layers
        self.text_grad_layers = text_grad_layers
        self.spatial_weight = spatial_weight
        self.tau = tau
        self.flow = flow
        self.kappa = kappa
        self.alpha = alpha
        self.beta = beta
        self.lambda_c = lambda_c
        self.delta = delta
        self.lambda_s = lambda_s
        self.prior_shape = prior_shape
        self.laterality = laterality
        self.fuse_at = fuse_at
        self.fusion = fusion
        self.prior_power = prior_power
        self.explain = explain
        self.references = list(REFERENCES if references is None else references)

    @classmethod
    def paper(cls, **changes: Any) -> Matex:
        """The print, to the letter: cosine, kappa 1, mirrored sides, fused on the patch raster by eq. 6."""
        settings: dict[str, Any] = {
            "explain": "cosine",
            "kappa": 1.0,
            "laterality": "paper",
            "fuse_at": "grid",
            "fusion": "sum",
        }
        return cls(**(settings | changes))

    @classmethod
    def measured(cls, **changes: Any) -> Matex:
        """All blocks, the margin, the product with the prior: ahead of the others on phantom validation films."""
        settings: dict[str, Any] = {"grad_layers": 12, "explain": "margin", "fusion": "product"}
        return cls(**(settings | changes))

    def attribute(
        self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], film: Tensor | None = None
    ) -> AttributionMaps:
        """Maps of B pairs; see `AttributionMethod.attribute`."""
        check_pairs(images, tokens, phrases, film)
        with borrowed(clip):
            images, tokens = images.detach().clone(), tokens.clone()
            position, text_position = clip.image_position(images), clip.text_position(tokens)
            content = clip.content(tokens)
            image, text, score = self._towers(clip, images, tokens, position, text_position, content)
            parts = self._image_parts(image, clip.grid) | self._text_parts(text, content)
            check_scores(score, phrases, *parts.values())
            parts |= self._prior(phrases, clip.image_size, clip.grid, film, score.device)
            finished, raster = self.fuse_image(parts, clip.std.dtype)
            finished_text = self.fuse_text(parts, content, clip.std.dtype)
            return AttributionMaps(finished, raster, finished_text, content, score, parts)

    def _towers(
        self, clip: Clip, images: Tensor, tokens: Tensor, position: Tensor, text_position: Tensor, content: Tensor
    ) -> tuple[_Tower, _Tower, Tensor]:
        """One forward of both towers and one backward through their last blocks."""
        layers, text_layers = count_blocks(clip, images, tokens)
        start, text_start = max(layers - self.grad_layers, 0), max(text_layers - self.text_grad_layers, 0)
        full = self.flow == "rollout"
        reference = reference_mean(clip, self.references) if self.explain == "margin" else None
        with capture_attention(position, grad_from=start, full=full) as blocks:
            image_embedding = clip.encode_image(images)
        with capture_attention(text_position, grad_from=text_start, full=full) as text_blocks:
            text_embedding = clip.encode_text(tokens)
        with torch.enable_grad():
            score, target = score_and_target(full_precision(image_embedding), full_precision(text_embedding), reference)
        explained = [block.output for block in [*blocks[start:], *text_blocks[text_start:]]]
        gradients = torch.autograd.grad(target, explained, torch.ones_like(target))  # type: ignore[arg-type]
        split = len(blocks) - start
        patches = torch.ones_like(blocks[0].row[:, 0], dtype=torch.bool)
        patches[:, 0] = False
        image = self._tower(blocks, start, gradients[:split], position, patches)
        return image, self._tower(text_blocks, text_start, gradients[split:], text_position, content), score.detach()

    def _tower(
        self, blocks: list[Block], start: int, gradients: Sequence[Tensor], positions: Tensor, keep: Tensor
    ) -> _Tower:
        rows = torch.stack([block.row.mean(1) for block in blocks])
        grad = gradient_terms(blocks[start:], gradients, positions, keep, self.spatial_weight)
        if self.flow == "sum":
            return _Tower(grad, attention_flow(rows, self.tau), rows)
        return _Tower(grad, attention_rollout([block.mean for block in blocks], positions), rows)  # type: ignore[misc]

    def _image_parts(self, tower: _Tower, grid: tuple[int, int]) -> dict[str, Any]:
        """Raw components on the patch raster: without the class token, each block's gradient term clipped at 0."""
        raster = (len(tower.flow), *grid)
        kappa = float(grid[0] * grid[1]) if self.kappa == "tokens" else float(self.kappa)
        return {
            "grad": tower.grad.relu().mean(0)[:, 1:].reshape(raster),
            "flow": tower.flow[:, 1:].reshape(raster),
            "consistency": consistency(tower.rows, kappa)[:, 1:].reshape(raster),
        }

    def _text_parts(self, tower: _Tower, content: Tensor) -> dict[str, Any]:
        """Raw components over tokens, 0 off content; here the mean over blocks is clipped, not each block."""
        kappa = content.sum(1, keepdim=True) if self.kappa == "tokens" else float(self.kappa)
        return {
            "text_grad": tower.grad.mean(0).relu() * content,
            "text_flow": tower.flow * content,
            "text_consistency": consistency(tower.rows, kappa) * content,
        }

    def _prior(
        self,
        phrases: Sequence[str],
        size: tuple[int, int],
        grid: tuple[int, int],
        film: Tensor | None,
        device: torch.device,
    ) -> dict[str, Any]:
        """M at the pixels and, drawn anew, at the centres of the patches."""
        parsed = [parse_phrase(phrase) for phrase in phrases]
        regions = [phrase.regions for phrase in parsed]
        draw = partial(
            prior_maps,
            lambda_s=self.lambda_s,
            shape=self.prior_shape,
            laterality=self.laterality,
            film=film,
            ids=phrases,
            device=device,
        )
        return {
            "prior": draw(regions, size),
            "prior_grid": draw(regions, grid),
            "regions": regions,
            "spans": [phrase.spans for phrase in parsed],
        }

    def fuse_image(self, parts: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Eq. (6) over raw components: the finished map `(B, H, W)` and its raster `(B, Gh, Gw)`.

        G and F are min-maxed first: their scales are unrelated, and the paper is silent.

        Args:
            parts: The components that `attribute` returned.
            dtype: What the model computed in; a map that is constant within its rounding becomes zeros.
        """
        prior, size, grid = parts["prior"], parts["prior"].shape[-2:], parts["grad"].shape[-2:]
        grad, flow = min_max(parts["grad"], dtype=dtype), min_max(parts["flow"], dtype=dtype)
        if self.fuse_at == "grid":
            raster = self._fuse(grad, flow, parts["consistency"], parts["prior_grid"], dtype)
            return min_max(upsample(raster, size)), raster
        grad, flow, stable = (upsample(part, size) for part in (grad, flow, parts["consistency"]))
        image = self._fuse(grad, flow, stable, prior, dtype)
        return image, patch_mean(image, grid)

    def _fuse(self, grad: Tensor, flow: Tensor, stable: Tensor, prior: Tensor, dtype: torch.dtype) -> Tensor:
        """Eq. (6), or the product option; the same at pixels and on the raster."""
        base = self.alpha * grad + self.beta * flow + self.lambda_c * stable * grad
        if self.fusion == "product":
            return min_max(base * prior**self.prior_power, dtype=dtype)
        return min_max(base + self.delta * prior * grad, dtype=dtype)

    def fuse_text(self, parts: dict[str, Any], content: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Text map `(B, T)`: norm(norm(T_grad) * (alpha + gamma C + delta) + beta norm(T_flow)) over content tokens.

        0 off content; a single content token has the value 1. Words have no place, so that M is 1 in either fusion.
        """
        grad = min_max(parts["text_grad"], keep=content, dtype=dtype)
        flow = min_max(parts["text_flow"], keep=content, dtype=dtype)
        weight = self.alpha + self.lambda_c * parts["text_consistency"] + self.delta
        fused = min_max(grad * weight + self.beta * flow, keep=content, dtype=dtype)
        single = content.sum(1, keepdim=True) == 1
        return torch.where(single, content.to(fused), fused)
