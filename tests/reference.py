"""Slow, literal versions of the equations, one study at a time: what the tests hold the library against.

Nothing here is shared with the library but the phrase parser and the content mask. Studies, heads, layers, patches and
pixels are loops, attention is the full softmax matrix, and the gradients are plain autograd over the whole towers,
written out here: open_clip's own, CoCa's, CLIP's ResNet, vision transformers of timm and BERT of Hugging Face.
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
    """One block of one study, lists over heads: q (m, d), k and v (n, d), `attention` (m, n), o (m, d).

    A block of a tower asks with its own tokens, m = n; an attention pool asks with m queries of its own.
    """

    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)

    def mean(self) -> Tensor:
        """Attention, mean over heads, (m, n)."""
        return sum(self.attention) / len(self.attention)


@dataclass
class Reading:
    """How an embedding is read from the tokens of its tower.

    `kind` is "token" (one token, `pooled`), "mean" (of the tokens `pooled`) or "query" (the last block is an attention
    pool, whose first query is read). `grid` is the raster of the patches, the last tokens of every block of images.
    """

    kind: str
    pooled: list[int] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)

    @property
    def patches(self) -> range:
        """Positions of the patches, counted from the end."""
        return range(-self.grid[0] * self.grid[1], 0)


# --- what all towers are made of


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, hidden: Tensor | None = None) -> Layer:
    """Softmax attention of queries (m, width) on n tokens (n, width), save where `hidden` (m, n), head by head."""
    layer, d = Layer(), query.shape[1] // heads
    for h in range(heads):
        qh, kh, vh = (z[:, h * d : (h + 1) * d] for z in (query, key, value))
        logits = qh @ kh.T / math.sqrt(d)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        attention = logits.softmax(1)
        layer.query.append(qh)
        layer.key.append(kh)
        layer.value.append(vh)
        layer.attention.append(attention)
        layer.output.append(attention @ vh)
    return layer


def linear(x: Tensor, module: nn.Module) -> Tensor:
    """Rows of x through a linear layer with or without a bias."""
    result = x @ module.weight.T
    return result if module.bias is None else result + module.bias


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Rows of x through a layer norm, or unchanged where the model has none."""
    if isinstance(norm, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def patch_embeddings(image: Tensor, convolution: nn.Module) -> tuple[list[Tensor], tuple[int, int]]:
    """The patches of an image (3, H, W), row by row, each times the kernel, and their raster."""
    height, width = convolution.kernel_size
    patches = []
    for y in range(0, image.shape[1], height):
        for x in range(0, image.shape[2], width):
            patch = (convolution.weight * image[:, y : y + height, x : x + width]).sum((1, 2, 3))
            patches.append(patch if convolution.bias is None else patch + convolution.bias)
    return patches, (image.shape[1] // height, image.shape[2] // width)


# --- open_clip's own towers


def transformer(x: Tensor, blocks: Iterable[nn.Module], hidden: Tensor | None = None) -> tuple[Tensor, list[Layer]]:
    """Tokens (n, width) through the residual attention blocks of open_clip."""
    layers = []
    for block in blocks:
        normed = layer_norm(x, block.ln_1)
        q, k, v = (normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=1)
        layer = attend(q, k, v, block.attn.num_heads, hidden)
        x = x + linear(torch.cat(layer.output, 1), block.attn.out_proj)
        x = x + linear(F.gelu(linear(layer_norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        layers.append(layer)
    return x, layers


def native_image(visual: nn.Module, image: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """open_clip's vision transformer, which reads its class token, the mean of its patches or an attention pool."""
    patches, grid = patch_embeddings(image, visual.conv1)
    tokens = torch.stack([visual.class_embedding, *patches]) + visual.positional_embedding
    tokens, layers = transformer(layer_norm(tokens, visual.ln_pre), visual.transformer.resblocks)
    if visual.attn_pool is not None:
        tokens, layer = coca_pool(visual.attn_pool, tokens)
        return layer_norm(tokens[0], visual.ln_post) @ visual.proj, [*layers, layer], Reading("query", grid=grid)
    tokens = layer_norm(tokens, visual.ln_post)
    if visual.pool_type == "avg":
        reading = Reading("mean", list(range(1, len(tokens))), grid)
        return tokens[1:].mean(0) @ visual.proj, layers, reading
    return tokens[0] @ visual.proj, layers, Reading("token", [0], grid)


def coca_pool(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Layer]:
    """CoCa's attention pool, whose queries are wider or narrower than the tokens that they ask."""
    asked, tokens = layer_norm(pool.query, pool.ln_q), layer_norm(tokens, pool.ln_k)
    weights = (pool.attn.q_proj_weight, pool.attn.k_proj_weight, pool.attn.v_proj_weight)
    biases = pool.attn.in_proj_bias.chunk(3)
    q, k, v = (z @ w.T + b for z, w, b in zip((asked, tokens, tokens), weights, biases, strict=True))
    layer = attend(q, k, v, pool.attn.num_heads)
    return linear(torch.cat(layer.output, 1), pool.attn.out_proj), layer


def native_text(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """open_clip's text transformer, which reads the largest id, the last token or an appended class token."""
    tower = getattr(model, "text", model)
    # `detach().requires_grad_()`: the graph must start somewhere when all weights are frozen.
    x = tower.token_embedding.weight[tokens].detach().requires_grad_()
    appended = getattr(tower, "cls_emb", None) is not None
    if appended:
        x = torch.cat([x, tower.cls_emb[None]])
    hidden = hidden_from_text(tower, tokens, appended)
    x, layers = transformer(x + tower.positional_embedding, tower.transformer.resblocks, hidden)
    rule = "last" if appended else getattr(model, "text_pool_type", None) or tower.pool_type
    position = {"argmax": int(tokens.argmax()), "last": len(x) - 1}[rule]
    read, projection = layer_norm(x[position], tower.ln_final), tower.text_projection
    embedding = linear(read, projection) if isinstance(projection, nn.Linear) else read @ projection
    return embedding, layers, Reading("token", [position])


def hidden_from_text(tower: nn.Module, tokens: Tensor, appended: bool) -> Tensor | None:
    """Which tokens each token does not see, (n, n): those behind it, and with a class token the pad tokens."""
    if tower.attn_mask is None:
        return None
    hidden = torch.ones(len(tokens) + appended, len(tokens) + appended, dtype=torch.bool).triu(1)
    if appended:
        # One position late, as in the weights of CoCa: the first pad token is seen, and the class token sees itself
        # only behind a phrase without pad tokens.
        late = torch.cat([torch.tensor([False]), tokens == tower.pad_id])
        hidden = hidden | late[None]
    return hidden


# --- towers of timm, Hugging Face and CLIP's ResNet


def timm_image(visual: nn.Module, image: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """A vision transformer of timm, which reads its class token, the mean of its patches or an attention pool."""
    trunk = visual.trunk
    patches, grid = patch_embeddings(image, trunk.patch_embed.proj)
    prefix = [token for name in ("cls_token", "reg_token") if (token := getattr(trunk, name)) is not None]
    tokens = torch.cat([*(token[0] for token in prefix), torch.stack(patches)]) + trunk.pos_embed[0]
    tokens, layers = timm_blocks(tokens, trunk.blocks)
    tokens = layer_norm(tokens, trunk.norm)
    first = 0 if trunk.pool_include_prefix else len(tokens) - len(patches)
    if trunk.attn_pool is not None:
        pooled, layer = timm_pool(trunk.attn_pool, tokens[first:])
        layers, reading = [*layers, layer], Reading("query", grid=grid)
    elif trunk.global_pool == "avg":
        pooled, reading = tokens[first:].mean(0), Reading("mean", list(range(first, len(tokens))), grid)
    else:
        pooled, reading = tokens[0], Reading("token", [0], grid)
    pooled = layer_norm(pooled, trunk.fc_norm)
    return linear(pooled, visual.head.proj) if len(visual.head) else pooled, layers, reading


def timm_blocks(x: Tensor, blocks: Iterable[nn.Module]) -> tuple[Tensor, list[Layer]]:
    """Tokens (n, width) through the blocks of timm, with or without a scale on what each adds."""
    layers = []
    for block in blocks:
        q, k, v = linear(layer_norm(x, block.norm1), block.attn.qkv).chunk(3, dim=1)
        layer = attend(q, k, v, block.attn.num_heads)
        x = x + linear(torch.cat(layer.output, 1), block.attn.proj) * getattr(block.ls1, "gamma", 1)
        hidden = F.gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1))
        x = x + linear(hidden, block.mlp.fc2) * getattr(block.ls2, "gamma", 1)
        layers.append(layer)
    return x, layers


def timm_pool(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Layer]:
    """SigLIP's attention pool: one learnt query, and a perceptron behind its answer."""
    k, v = linear(tokens, pool.kv).chunk(2, dim=1)
    layer = attend(linear(pool.latent[0], pool.q), k, v, pool.num_heads)
    x = linear(torch.cat(layer.output, 1), pool.proj)
    x = x + linear(F.gelu(linear(layer_norm(x, pool.norm), pool.mlp.fc1)), pool.mlp.fc2)
    return x[0], layer


def resnet_image(visual: nn.Module, image: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """CLIP's ResNet: the mean of its last map asks that map, each cell with its position."""
    x = image[None]
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        convolution = getattr(visual, f"conv{number}")
        x = batch_norm(F.conv2d(x, convolution.weight, stride=stride, padding=1), getattr(visual, f"bn{number}")).relu()
    x = F.avg_pool2d(x, 2)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        for block in stage:
            x = bottleneck(x, block)
    cells, pool = x[0].flatten(1).T, visual.attnpool
    tokens = torch.cat([cells.mean(0, keepdim=True), cells]) + pool.positional_embedding
    q, k, v = (linear(tokens, z) for z in (pool.q_proj, pool.k_proj, pool.v_proj))
    layer = attend(q, k, v, pool.num_heads)
    embedding = linear(torch.cat(layer.output, 1), pool.c_proj)[0]
    return embedding, [layer], Reading("token", [0], tuple(x.shape[2:]))


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def bottleneck(x: Tensor, block: nn.Module) -> Tensor:
    """One residual block of CLIP's ResNet, which halves a map by averaging."""
    out = batch_norm(F.conv2d(x, block.conv1.weight), block.bn1).relu()
    out = batch_norm(F.conv2d(out, block.conv2.weight, padding=1), block.bn2).relu()
    out = batch_norm(F.conv2d(F.avg_pool2d(out, block.stride), block.conv3.weight), block.bn3)
    if block.downsample is not None:
        convolution, norm = block.downsample[1], block.downsample[2]
        x = batch_norm(F.conv2d(F.avg_pool2d(x, block.stride), convolution.weight), norm)
    return (out + x).relu()


def bert_text(tower: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """BERT, which reads its first token or the mean of all that are no pad tokens; no token sees a pad token."""
    pad, embed = tokens == tower.config.pad_token_id, tower.transformer.embeddings
    x = embed.word_embeddings.weight[tokens].detach().requires_grad_() + embed.token_type_embeddings.weight[0]
    x = layer_norm(x + embed.position_embeddings.weight[: len(tokens)], embed.LayerNorm)
    x, layers = bert_blocks(x, tower.transformer.encoder.layer, pad[None].expand(len(tokens), -1))
    if type(tower.pooler).__name__ == "MeanPooler":
        reading = Reading("mean", [j for j in range(len(tokens)) if not pad[j]])
    else:
        reading = Reading("token", [0])
    embedding = sum(x[j] for j in reading.pooled) / len(reading.pooled)
    if isinstance(tower.proj, nn.Linear):
        return linear(embedding, tower.proj), layers, reading
    return linear(F.gelu(linear(embedding, tower.proj[0])), tower.proj[2]), layers, reading


def bert_blocks(x: Tensor, blocks: Iterable[nn.Module], hidden: Tensor) -> tuple[Tensor, list[Layer]]:
    """Tokens (n, width) through the blocks of BERT, which norms behind each sum."""
    layers = []
    for block in blocks:
        own, out = block.attention.self, block.attention.output
        layer = attend(*(linear(x, z) for z in (own.query, own.key, own.value)), own.num_attention_heads, hidden)
        x = layer_norm(x + linear(torch.cat(layer.output, 1), out.dense), out.LayerNorm)
        inner = F.gelu(linear(x, block.intermediate.dense))
        x = layer_norm(x + linear(inner, block.output.dense), block.output.LayerNorm)
        layers.append(layer)
    return x, layers


def encode_image(clip: Clip, image: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """Unit embedding of one image (3, H, W), its layers with the attention pool last, and how it is read."""
    visual = clip.model.visual
    tower = timm_image if hasattr(visual, "trunk") else resnet_image if hasattr(visual, "attnpool") else native_image
    embedding, layers, reading = tower(visual, image)
    return embedding / embedding.norm(), layers, reading


def encode_text(clip: Clip, tokens: Tensor) -> tuple[Tensor, list[Layer], Reading]:
    """Unit embedding of one phrase (T,), its layers and how it is read; a block may have a token more than T."""
    text = getattr(clip.model, "text", None)
    embedding, layers, reading = bert_text(text, tokens) if hasattr(text, "pooler") else native_text(clip.model, tokens)
    return embedding / embedding.norm(), layers, reading


# --- how an embedding is read, block by block


def row_weights(layers: list[Layer], reading: Reading) -> list[Tensor]:
    """Per block, the weight of each of its query tokens, (m,), which sums to 1."""
    result = []
    for layer in layers:
        weights = torch.zeros_like(layer.mean()[:, 0])
        if reading.kind != "query":
            for j in reading.pooled:
                weights[j] += 1 / len(reading.pooled)
        elif layer is layers[-1]:
            weights[0] = 1
        else:
            # The pool may not see the first tokens; it asks all the others.
            asked = layers[-1].mean()[0]
            weights = torch.cat([weights[: len(weights) - len(asked)], asked])
        result.append(weights)
    return result


def rows(layers: list[Layer], reading: Reading) -> list[Tensor]:
    """Per block, the attention that the embedding pays to each token, (n,): the weighted rows, mean over heads."""
    result = []
    for layer, weights in zip(layers, row_weights(layers, reading), strict=True):
        attention = layer.mean()
        result.append(sum(weights[j] * attention[j] for j in range(len(weights))))
    return result


def counted(layers: list[Layer], reading: Reading) -> list[list[int]]:
    """Per block, the query tokens whose gradients count: the one that is read, or all where several are."""
    result = []
    for layer in layers:
        if reading.kind == "token":
            result.append(reading.pooled)
        elif reading.kind == "query" and layer is layers[-1]:
            result.append([0])
        else:
            result.append(list(range(len(layer.query[0]))))
    return result


# --- section 3.1, eqs. (1) and (2)


def gradient_term(layer: Layer, gradient: list[Tensor], among_rows: Sequence[int], i: int) -> Tensor:
    """Sum over heads, rows j and channels of g[j] * A[j, i] * v(i): what token i adds to the sum of <g[j], o[j]>."""
    total = torch.zeros_like(layer.value[0][0, 0])
    for g, a, v in zip(gradient, layer.attention, layer.value, strict=True):
        # One product for all rows: as a loop it would be most of the time of a test.
        total = total + (a[among_rows, i] * (g[among_rows] @ v[i])).sum()
    return total


def loosened_weights(layer: Layer, weights: Tensor, among: Sequence[int]) -> dict[int, Tensor]:
    """Grad-ECLIP's weights: min-max over the tokens of cos(q, k_i), all heads side by side; q in the mean of rows."""
    query = torch.cat([sum(weights[j] * q[j] for j in range(len(weights))) for q in layer.query])
    cosines = {}
    for i in among:
        key = torch.cat([k[i] for k in layer.key])
        cosines[i] = query @ key / (query.norm() * key.norm())
    low, high = min(cosines.values()), max(cosines.values())
    return {i: (z - low) / (high - low) if high > low else torch.ones_like(z) for i, z in cosines.items()}


def loosened_term(layer: Layer, gradient: list[Tensor], among_rows: Sequence[int], i: int) -> Tensor:
    """Sum over heads, rows j and channels of g[j] * v(i)."""
    return sum((g[among_rows].sum(0) * v[i]).sum() for g, v in zip(gradient, layer.value, strict=True))


def gradient_maps(
    layers: list[Layer], score: Tensor, reading: Reading, among: Sequence[int], last: int, kind: str
) -> list[list[Tensor]]:
    """Before the ReLU, for each of the last blocks, a value for each of the tokens `among`."""
    blocks = list(zip(layers, row_weights(layers, reading), counted(layers, reading), strict=True))
    result = []
    first = -min(last, len(layers)) if last > 0 else min(-last, len(layers) - 1)
    for layer, weights, among_rows in blocks[first:]:
        gradient = list(torch.autograd.grad(score, layer.output, retain_graph=True))
        if kind == "softmax":
            result.append([gradient_term(layer, gradient, among_rows, i) for i in among])
        else:
            loosened = loosened_weights(layer, weights, among)
            result.append([loosened[i] * loosened_term(layer, gradient, among_rows, i) for i in among])
    return result


def rollout(layers: list[Layer], reading: Reading) -> Tensor:
    """The product of all self-attention blocks, each with the residual path, read as the embedding is: (n,)."""
    blocks = layers[:-1] if reading.kind == "query" else layers
    # Under a pool, the weights of the tokens are its attention, and it has no residual path: its query is no token.
    weights = row_weights(layers, reading)[len(blocks) - 1]
    product = torch.eye(len(weights), dtype=weights.dtype)
    for layer in blocks:
        mixed = layer.mean() + torch.eye(len(product), dtype=product.dtype)
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    return sum(weights[j] * product[j] for j in range(len(weights)))


def flow(layers: list[Layer], reading: Reading, among: Sequence[int], tau: float, kind: str) -> Tensor:
    """Eq. (1), or the rollout of all layers, to the tokens `among`."""
    if kind == "rollout":
        rolled = rollout(layers, reading)
        return torch.stack([rolled[i] for i in among])
    total = sum(math.exp(tau * number) for number in range(1, len(layers) + 1))
    seen, values = rows(layers, reading), []
    for i in among:
        values.append(sum(math.exp(tau * number) / total * row[i] for number, row in enumerate(seen, 1)))
    return torch.stack(values)


def consistency(layers: list[Layer], reading: Reading, among: Sequence[int], kappa: float) -> Tensor:
    """Eq. (2), with the population standard deviation over the layers."""
    seen, values = rows(layers, reading), []
    for i in among:
        attention = [row[i] for row in seen]
        mean = sum(attention) / len(attention)
        variance = sum((a - mean) ** 2 for a in attention) / len(attention)
        values.append(1 / (1 + kappa * variance.sqrt()))
    return torch.stack(values)


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
    m = m if s["delta"] else torch.ones_like(m)
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
    """Maps, raster, raw parts and score of one pair."""
    with torch.enable_grad():
        image_embedding, image_layers, image_reading = encode_image(clip, image.clone().requires_grad_())
        text_embedding, text_layers, text_reading = encode_text(clip, tokens)
        cosine = (image_embedding * text_embedding).sum()
        score = cosine
        if s["explain"] == "margin":
            phrases = s["references"] or REFERENCES
            others = [encode_text(clip, clip.tokenize([other])[0])[0].detach() for other in phrases]
            score = (image_embedding * (text_embedding - sum(others) / len(others))).sum()
        visual = image_side(image_layers, image_reading, score, phrase, film, tuple(image.shape[1:]), s)
        content = clip.content(tokens[None])[0].nonzero()[:, 0].tolist()
        textual = text_side(text_layers, text_reading, score, content, len(tokens), s)
    return {name: z.detach() for name, z in {**visual, **textual, "score": cosine}.items()}


def image_side(
    layers: list[Layer],
    reading: Reading,
    score: Tensor,
    phrase: str,
    film: Sequence[float],
    size: Any,
    s: dict[str, Any],
) -> dict[str, Tensor]:
    """Map in pixels and on the raster, and what they are made of."""
    grid, patches = reading.grid, reading.patches
    blocks = gradient_maps(layers, score, reading, patches, s["grad_layers"], s["spatial_weight"])
    grad = sum(torch.stack(values).relu() for values in blocks) / len(blocks)
    grad = grad.reshape(grid)
    flowed = flow(layers, reading, patches, s["tau"], s["flow"]).reshape(grid)
    kappa = len(patches) if s["kappa"] == "tokens" else s["kappa"]
    stable = consistency(layers, reading, patches, kappa).reshape(grid)
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


def text_side(
    layers: list[Layer], reading: Reading, score: Tensor, content: list[int], length: int, s: dict[str, Any]
) -> dict[str, Tensor]:
    """Map of the phrase's tokens (T,) and what it is made of, 0 where `content` has none."""
    last = s["text_grad_layers"] or s["grad_layers"]
    finished, grad, flowed, stable = (score.new_zeros(length) for _ in range(4))
    parts = {"text": finished, "text_grad": grad, "text_flow": flowed, "text_consistency": stable}
    if not content:
        return parts
    blocks = gradient_maps(layers, score, reading, content, last, s["spatial_weight"])
    grad[content] = (sum(torch.stack(values) for values in blocks) / len(blocks)).relu()
    flowed[content] = flow(layers, reading, content, s["tau"], s["flow"])
    kappa = len(content) if s["kappa"] == "tokens" else s["kappa"]
    stable[content] = consistency(layers, reading, content, kappa)
    weight = s["alpha"] + s["lambda_c"] * stable[content] + s["delta"]
    finished[content] = norm(norm(grad[content]) * weight + s["beta"] * norm(flowed[content]))
    if len(content) == 1:
        finished[content] = 1
    return parts
