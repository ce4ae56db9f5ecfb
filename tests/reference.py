"""Slow, literal versions of the equations, one study at a time: what the tests hold the library against.

Nothing here is shared with the library but the phrase parser and the content mask. Studies, heads, layers, patches and
pixels are loops, attention is the full softmax matrix, and the gradients are plain autograd over the whole towers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matex_pl.anatomy import Region, parse_phrase
from matex_pl.attribution.target import REFERENCES
from matex_pl.clip import Clip

DEFAULTS: dict[str, Any] = {
    "grad_layers": 3,
    "text_grad_layers": None,
    "spatial_weight": "softmax",
    "tau": 0.2,
    "flow": "sum",
    "kappa": "tokens",
    "alpha": 0.5,
    "beta": 0.2,
    "lambda_c": 0.35,
    "delta": 0.2,
    "lambda_s": 2.5,
    "prior_shape": "parabola",
    "laterality": "patient",
    "fuse_at": "pixel",
    "fusion": "sum",
    "prior_power": 2.0,
    "explain": "cosine",
    "references": None,
}


@dataclass
class Layer:
    """One block of one study: q, k, v, o are lists over heads of (n, d), `attention` of (n, n)."""

    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)

    def row(self, p: int) -> Tensor:
        """Attention from position p, mean over heads, (n,)."""
        return sum(a[p] for a in self.attention) / len(self.attention)


# --- the two towers, written out


def transformer(x: Tensor, blocks: Iterable[nn.Module], causal: bool) -> tuple[Tensor, list[Layer]]:
    """Tokens (n, width) through the residual attention blocks of open_clip."""
    layers = []
    for block in blocks:
        layer, heads = Layer(), block.attn.num_heads
        normed = layer_norm(x, block.ln_1)
        q, k, v = (normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=1)
        d = q.shape[1] // heads
        for h in range(heads):
            qh, kh, vh = (z[:, h * d : (h + 1) * d] for z in (q, k, v))
            logits = qh @ kh.T / math.sqrt(d)
            if causal:
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
            attention = logits.softmax(1)
            for name, z in (
                ("query", qh),
                ("key", kh),
                ("value", vh),
                ("attention", attention),
                ("output", attention @ vh),
            ):
                getattr(layer, name).append(z)
        x = x + torch.cat(layer.output, 1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        hidden = F.gelu(layer_norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
        x = x + hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
        layers.append(layer)
    return x, layers


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def encode_image(clip: Clip, image: Tensor) -> tuple[Tensor, list[Layer]]:
    """Unit embedding of one image (3, H, W) and its layers; the class token is position 0."""
    visual = clip.model.visual
    height, width = visual.patch_size
    patches = []
    for y in range(0, image.shape[1], height):
        for x in range(0, image.shape[2], width):
            patch = image[:, y : y + height, x : x + width]
            patches.append((visual.conv1.weight * patch).sum((1, 2, 3)))
    tokens = torch.stack([visual.class_embedding, *patches]) + visual.positional_embedding
    tokens, layers = transformer(layer_norm(tokens, visual.ln_pre), visual.transformer.resblocks, causal=False)
    embedding = layer_norm(tokens[0], visual.ln_post) @ visual.proj
    return embedding / embedding.norm(), layers


def encode_text(clip: Clip, tokens: Tensor) -> tuple[Tensor, list[Layer]]:
    """Unit embedding of one phrase (T,) and its layers; the end of text is the largest id."""
    model = clip.model
    # `detach().requires_grad_()`: the graph must start somewhere when all weights are frozen.
    x = model.token_embedding.weight[tokens].detach().requires_grad_() + model.positional_embedding
    x, layers = transformer(x, model.transformer.resblocks, causal=model.attn_mask is not None)
    embedding = layer_norm(x[int(tokens.argmax())], model.ln_final) @ model.text_projection
    return embedding / embedding.norm(), layers


# --- section 3.1, eqs. (1) and (2)


def gradient_term(layer: Layer, gradient: list[Tensor], p: int, i: int) -> Tensor:
    """Sum over heads and channels of g[p] * A[p, i] * v(i): what token i adds to <g[p], o[p]>."""
    return sum((g[p] * a[p, i] * v[i]).sum() for g, a, v in zip(gradient, layer.attention, layer.value, strict=True))


def loosened_term(layer: Layer, gradient: list[Tensor], p: int, i: int, among: Sequence[int]) -> Tensor:
    """The same with Grad-ECLIP's weight: min-max over the tokens of cos(q_p, k_i), all heads side by side."""
    query = torch.cat([q[p] for q in layer.query])
    keys = [torch.cat([k[j] for k in layer.key]) for j in range(len(layer.key[0]))]
    cosines = {j: query @ keys[j] / (query.norm() * keys[j].norm()) for j in among}
    low, high = min(cosines.values()), max(cosines.values())
    weight = (cosines[i] - low) / (high - low) if high > low else torch.ones_like(low)
    return weight * sum((g[p] * v[i]).sum() for g, v in zip(gradient, layer.value, strict=True))


def gradient_maps(
    layers: list[Layer], score: Tensor, p: int, among: Sequence[int], last: int, kind: str
) -> list[list[Tensor]]:
    """Before the ReLU, for each of the last blocks, a value for each of the tokens `among`."""
    chosen = layers[-min(last, len(layers)) :]
    result = []
    for layer in chosen:
        gradient = list(torch.autograd.grad(score, layer.output, retain_graph=True))
        if kind == "softmax":
            result.append([gradient_term(layer, gradient, p, i) for i in among])
        else:
            result.append([loosened_term(layer, gradient, p, i, among) for i in among])
    return result


def flow(layers: list[Layer], p: int, among: Sequence[int], tau: float, kind: str) -> Tensor:
    """Eq. (1), or the rollout of all layers, from p to the tokens `among`."""
    if kind == "rollout":
        product = torch.eye(len(layers[0].attention[0]), dtype=layers[0].attention[0].dtype)
        for layer in layers:
            mixed = sum(layer.attention) / len(layer.attention) + torch.eye(len(product), dtype=product.dtype)
            product = (mixed / mixed.sum(1, keepdim=True)) @ product
        return torch.stack([product[p, i] for i in among]) if among else product.new_zeros(0)
    total = sum(math.exp(tau * number) for number in range(1, len(layers) + 1))
    values = []
    for i in among:
        values.append(sum(math.exp(tau * number) / total * layer.row(p)[i] for number, layer in enumerate(layers, 1)))
    return torch.stack(values) if values else layers[0].attention[0].new_zeros(0)


def consistency(layers: list[Layer], p: int, among: Sequence[int], kappa: float) -> Tensor:
    """Eq. (2), with the population standard deviation over the layers."""
    values = []
    for i in among:
        attention = [layer.row(p)[i] for layer in layers]
        mean = sum(attention) / len(attention)
        variance = sum((a - mean) ** 2 for a in attention) / len(attention)
        values.append(1 / (1 + kappa * variance.sqrt()))
    return torch.stack(values) if values else layers[0].attention[0].new_zeros(0)


# --- eqs. (3) to (5)


def prior(
    regions: Iterable[Region],
    size: tuple[int, int],
    *,
    lambda_s: float,
    shape: str,
    laterality: str,
    film: Sequence[float] = (0, 0, 1, 1),
) -> Tensor:
    """M, pixel by pixel, in float64."""
    x0, y0, x1, y1 = (float(edge) for edge in film)
    total = torch.zeros(size, dtype=torch.float64)
    seen = x0 < 1 and x1 > 0 and y0 < 1 and y1 > 0
    for row in range(size[0]):
        for column in range(size[1]):
            x = ((column + 0.5) / size[1] - x0) / (x1 - x0)
            y = ((row + 0.5) / size[0] - y0) / (y1 - y0)
            # The boxes count from the patient's right, which the print takes for the right of the image.
            x = 1 - x if laterality == "paper" else x
            for u0, v0, u1, v1 in {region.box for region in regions} if seen else ():
                total[row, column] += falloff(x, u0, u1, shape) * falloff(y, v0, v1, shape)
    spread = total.max() - total.min()
    if spread <= 1e-6 * total.max():
        return torch.ones_like(total)
    return 1 + (lambda_s - 1) * (total - total.min()) / spread


def falloff(x: float, low: float, high: float, shape: str) -> float:
    """Weight of one axis of one region, eqs. (3) and (4) for `parabola`."""
    if shape == "gaussian":
        sigma = (high - low) / 4
        return math.exp(-(((x - (low + high) / 2) / sigma) ** 2) / 2)
    up, down = (min(max(z / (high - low), 0), 1) for z in (x - low, high - x))
    if shape == "parabola":
        return up * down
    return min(1, 4 * up, 4 * down)


# --- eqs. (6) to (8)


def norm(z: Tensor) -> Tensor:
    """Min-max over all entries; zeros for what is constant within 1e-6 of its magnitude."""
    if z.numel() == 0 or z.max() - z.min() <= 1e-6 * z.abs().max():
        return torch.zeros_like(z)
    return (z - z.min()) / (z.max() - z.min())


def bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation between cell centres, pixel by pixel; outside the outermost centres the edge repeats."""
    rows, columns = grid.shape
    value = grid.tolist()
    result = []
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * rows / size[0] - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / size[1] - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            b, a = y - top, x - left
            upper = (1 - a) * value[top][left] + a * value[top][right]
            lower = (1 - a) * value[bottom][left] + a * value[bottom][right]
            result.append((1 - b) * upper + b * lower)
    return torch.tensor(result, dtype=grid.dtype).view(size)


def fuse(g: Tensor, f: Tensor, c: Tensor, m: Tensor, s: dict[str, Any]) -> Tensor:
    """Eq. (6) and its norm, or the product, from maps of one size."""
    if s["fusion"] == "sum":
        return norm(s["alpha"] * g + s["beta"] * f + s["lambda_c"] * (c * g) + s["delta"] * (m * g))
    return norm((s["alpha"] * g + s["lambda_c"] * c * g + s["beta"] * f) * m ** s["prior_power"])


def cell_means(image: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    result = image.new_zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            result[i, j] = image[i * height : (i + 1) * height, j * width : (j + 1) * width].mean()
    return result


# --- the whole


def matex(
    clip: Clip, images: Tensor, tokens: Tensor, phrases: Sequence[str], film: Tensor | None = None, **changes: Any
) -> dict[str, Tensor]:
    """Maps of B pairs, one after the other: image, grid, text, score and the raw parts, stacked."""
    settings = DEFAULTS | changes
    studies = []
    for b, phrase in enumerate(phrases):
        rectangle = (0, 0, 1, 1) if film is None else film[b].tolist()
        studies.append(one_study(clip, images[b], tokens[b], phrase, rectangle, settings))
    return {name: torch.stack([study[name] for study in studies]) for name in studies[0]}


def one_study(
    clip: Clip, image: Tensor, tokens: Tensor, phrase: str, film: Sequence[float], s: dict[str, Any]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        image_embedding, image_layers = encode_image(clip, image.clone().requires_grad_())
        text_embedding, text_layers = encode_text(clip, tokens)
        cosine = (image_embedding * text_embedding).sum()
        score = cosine
        if s["explain"] == "margin":
            phrases = s["references"] or REFERENCES
            others = [encode_text(clip, clip.tokenize([other])[0])[0].detach() for other in phrases]
            score = (image_embedding * (text_embedding - sum(others) / len(others))).sum()
        visual = image_side(clip, image_layers, score, phrase, film, tuple(image.shape[1:]), s)
        textual = text_side(clip, text_layers, score, tokens, s)
    return {name: z.detach() for name, z in {**visual, **textual, "score": cosine}.items()}


def image_side(
    clip: Clip, layers: list[Layer], score: Tensor, phrase: str, film: Sequence[float], size: Any, s: dict[str, Any]
) -> dict[str, Tensor]:
    grid = clip.grid
    patches = range(1, 1 + grid[0] * grid[1])
    blocks = gradient_maps(layers, score, 0, patches, s["grad_layers"], s["spatial_weight"])
    grad = sum(torch.stack(values).relu() for values in blocks) / len(blocks)
    grad = grad.reshape(grid)
    flowed = flow(layers, 0, patches, s["tau"], s["flow"]).reshape(grid)
    kappa = len(patches) if s["kappa"] == "tokens" else s["kappa"]
    stable = consistency(layers, 0, patches, kappa).reshape(grid)
    regions = parse_phrase(phrase).regions
    drawn = {k: s[k] for k in ("lambda_s", "laterality")} | {"shape": s["prior_shape"], "film": film}
    at_pixels = prior(regions, size, **drawn).to(grad.dtype)
    if s["fuse_at"] == "pixel":
        g, f, c = (bilinear(z, size) for z in (norm(grad), norm(flowed), stable))
        finished = fuse(g, f, c, at_pixels, s)
        raster = cell_means(finished, grid)
    else:
        raster = fuse(norm(grad), norm(flowed), stable, prior(regions, grid, **drawn).to(grad.dtype), s)
        finished = norm(bilinear(raster, size))
    return {"image": finished, "grid": raster, "grad": grad, "flow": flowed, "consistency": stable, "prior": at_pixels}


def text_side(clip: Clip, layers: list[Layer], score: Tensor, tokens: Tensor, s: dict[str, Any]) -> dict[str, Tensor]:
    end = int(tokens.argmax())
    content = list(range(1, end))
    last = s["text_grad_layers"] or s["grad_layers"]
    finished, grad, flowed, stable = (score.new_zeros(len(tokens)) for _ in range(4))
    parts = {"text": finished, "text_grad": grad, "text_flow": flowed, "text_consistency": stable}
    if not content:
        return parts
    blocks = gradient_maps(layers, score, end, content, last, s["spatial_weight"])
    grad[content] = (sum(torch.stack(values) for values in blocks) / len(blocks)).relu()
    flowed[content] = flow(layers, end, content, s["tau"], s["flow"])
    kappa = len(content) if s["kappa"] == "tokens" else s["kappa"]
    stable[content] = consistency(layers, end, content, kappa)
    weight = s["alpha"] + s["lambda_c"] * stable[content] + s["delta"]
    finished[content] = norm(norm(grad[content]) * weight + s["beta"] * norm(flowed[content]))
    if len(content) == 1:
        finished[content] = 1
    return parts
