"""Slow, literal versions of the equations, one pair at a time: what the tests hold the library against.

Nothing here is shared with the library but the phrase parser and the content mask. Pairs, heads, layers, patches and
pixels are loops, attention is the full softmax matrix, and the gradients are plain autograd over the whole towers,
written out here: open_clip's own, CoCa's, CLIP's ResNet, vision transformers of timm and BERT of Hugging Face.

`matex` is MATEX; `raw_<method>` and `finish` are the other methods. What is random comes in as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matex_pl.anatomy import Region, parse_phrase
from matex_pl.attribution.core.target import REFERENCES
from matex_pl.clip import Clip

DEFAULTS: dict[str, Any] = {
    "grad_layers": 3,
    "text_grad_layers": None,
    "skip_layers": 0,
    "spatial_weight": "softmax",
    "tau": 0.2,
    "flow": "sum",
    "flow_layers": "all",
    "consistency_of": "attention",
    "kappa": "tokens",
    "alpha": 0.5,
    "beta": 0.2,
    "text_beta": None,
    "lambda_c": 0.35,
    "delta": 0.2,
    "lambda_s": 2.5,
    "prior_shape": "parabola",
    "laterality": "patient",
    "fuse_at": "pixel",
    "fusion": "sum",
    "prior_power": 2.0,
    "target": "cosine",
    "references": None,
}


@dataclass
class Layer:
    """One block of one pair, lists over heads: q (m, d), k and v (n, d), `attention` (m, n), o (m, d).

    A block of a tower asks with its own tokens, m = n; an attention pool asks with m queries of its own. `normed` are
    these tokens (n, width) behind the norm that stands before them, where one does.
    """

    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    normed: Tensor | None = None

    def mean(self) -> Tensor:
        """Attention, mean over heads, (m, n)."""
        return sum(self.attention) / len(self.attention)


@dataclass
class Pooling:
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


@dataclass
class Tower:
    """A tower in three, for the image or the phrase that it was made for.

    `start` makes the tokens (n, width) of pixels (3, H, W) or of token embeddings (T, width); each of `blocks` goes
    from tokens to tokens; `head` reads the embedding, not of unit length, and gives the layers of its attention pool.
    CLIP's ResNet has no blocks: its tokens are the cells of its last map.
    """

    start: Callable[[Tensor], Tensor]
    blocks: list[Callable[[Tensor], tuple[Tensor, Layer]]]
    head: Callable[[Tensor], tuple[Tensor, list[Layer], Pooling]]
    grid: tuple[int, int] = (0, 0)


@dataclass
class Run:
    """What came of one run: the unit embedding, its layers with the pool last, and how it is read.

    `stream` holds the tokens before the first block that ran and behind each, one more than blocks.
    """

    embedding: Tensor
    layers: list[Layer]
    pooling: Pooling
    stream: list[Tensor]


def run(tower: Tower, x: Tensor) -> Run:
    """The whole tower, from pixels (3, H, W) or token embeddings (T, width)."""
    return tail(tower, tower.start(x), 0)


def tail(tower: Tower, tokens: Tensor, first: int) -> Run:
    """The tower from the tokens (n, width) that enter the block `first`; behind the last block, its head alone."""
    layers, stream = [], [tokens]
    for block in tower.blocks[first:]:
        tokens, layer = block(tokens)
        layers.append(layer)
        stream.append(tokens)
    embedding, pool, pooling = tower.head(tokens)
    return Run(embedding / embedding.norm(), [*layers, *pool], pooling, stream)


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
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def raster(convolution: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of an image of this size."""
    return size[0] // convolution.kernel_size[0], size[1] // convolution.kernel_size[1]


def patch_embeddings(image: Tensor, convolution: nn.Module) -> list[Tensor]:
    """The patches of an image (3, H, W), row by row, each times the kernel."""
    height, width = convolution.kernel_size
    patches = []
    for y in range(0, image.shape[1], height):
        for x in range(0, image.shape[2], width):
            patch = (convolution.weight * image[:, y : y + height, x : x + width]).sum((1, 2, 3))
            patches.append(patch if convolution.bias is None else patch + convolution.bias)
    return patches


# --- open_clip's own towers


def open_clip_block(block: nn.Module, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Layer]:
    """Tokens (n, width) through one residual attention block of open_clip."""
    normed = layer_norm(x, block.ln_1)
    q, k, v = (normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=1)
    layer = attend(q, k, v, block.attn.num_heads, hidden)
    layer.normed = normed
    x = x + linear(torch.cat(layer.output, 1), block.attn.out_proj)
    return x + linear(F.gelu(linear(layer_norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj), layer


def native_image(visual: nn.Module, size: tuple[int, int]) -> Tower:
    """open_clip's vision transformer, which reads its class token, the mean of its patches or an attention pool."""
    grid = raster(visual.conv1, size)

    def start(image: Tensor) -> Tensor:
        tokens = torch.stack([visual.class_embedding, *patch_embeddings(image, visual.conv1)])
        return layer_norm(tokens + visual.positional_embedding, visual.ln_pre)

    def head(tokens: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
        if visual.attn_pool is not None:
            tokens, layer = coca_pool(visual.attn_pool, tokens)
            return layer_norm(tokens[0], visual.ln_post) @ visual.proj, [layer], Pooling("query", grid=grid)
        tokens = layer_norm(tokens, visual.ln_post)
        if visual.pool_type == "avg":
            return tokens[1:].mean(0) @ visual.proj, [], Pooling("mean", list(range(1, len(tokens))), grid)
        return tokens[0] @ visual.proj, [], Pooling("token", [0], grid)

    return Tower(start, [partial(open_clip_block, block) for block in visual.transformer.resblocks], head, grid)


def coca_pool(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Layer]:
    """CoCa's attention pool, whose queries are wider or narrower than the tokens that they ask."""
    asked, tokens = layer_norm(pool.query, pool.ln_q), layer_norm(tokens, pool.ln_k)
    weights = (pool.attn.q_proj_weight, pool.attn.k_proj_weight, pool.attn.v_proj_weight)
    biases = pool.attn.in_proj_bias.chunk(3)
    q, k, v = (z @ w.T + b for z, w, b in zip((asked, tokens, tokens), weights, biases, strict=True))
    layer = attend(q, k, v, pool.attn.num_heads)
    return linear(torch.cat(layer.output, 1), pool.attn.out_proj), layer


def native_text(model: nn.Module, tokens: Tensor) -> Tower:
    """open_clip's text transformer, which reads the largest id, the last token or an appended class token."""
    tower = getattr(model, "text", model)
    appended = getattr(tower, "cls_emb", None) is not None
    hidden = hidden_from_text(tower, tokens, appended)
    rule = "last" if appended else getattr(model, "text_pool_type", None) or tower.pool_type
    position = {"argmax": int(tokens.argmax()), "last": len(tokens) + appended - 1}[rule]

    def start(x: Tensor) -> Tensor:
        return (torch.cat([x, tower.cls_emb[None]]) if appended else x) + tower.positional_embedding

    def head(x: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
        read, projection = layer_norm(x[position], tower.ln_final), tower.text_projection
        embedding = linear(read, projection) if isinstance(projection, nn.Linear) else read @ projection
        return embedding, [], Pooling("token", [position])

    blocks = [partial(open_clip_block, block, hidden=hidden) for block in tower.transformer.resblocks]
    return Tower(start, blocks, head)


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


def timm_image(visual: nn.Module, size: tuple[int, int]) -> Tower:
    """A vision transformer of timm, which reads its class token, the mean of its patches or an attention pool."""
    trunk = visual.trunk
    grid = raster(trunk.patch_embed.proj, size)

    def start(image: Tensor) -> Tensor:
        prefix = [token for name in ("cls_token", "reg_token") if (token := getattr(trunk, name)) is not None]
        patches = torch.stack(patch_embeddings(image, trunk.patch_embed.proj))
        return torch.cat([*(token[0] for token in prefix), patches]) + trunk.pos_embed[0]

    def head(tokens: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
        tokens, layers = layer_norm(tokens, trunk.norm), []
        first = 0 if trunk.pool_include_prefix else len(tokens) - grid[0] * grid[1]
        if trunk.attn_pool is not None:
            pooled, layer = timm_pool(trunk.attn_pool, tokens[first:])
            layers, pooling = [layer], Pooling("query", grid=grid)
        elif trunk.global_pool == "avg":
            pooled, pooling = tokens[first:].mean(0), Pooling("mean", list(range(first, len(tokens))), grid)
        else:
            pooled, pooling = tokens[0], Pooling("token", [0], grid)
        pooled = layer_norm(pooled, trunk.fc_norm)
        return linear(pooled, visual.head.proj) if len(visual.head) else pooled, layers, pooling

    return Tower(start, [partial(timm_block, block) for block in trunk.blocks], head, grid)


def timm_block(block: nn.Module, x: Tensor) -> tuple[Tensor, Layer]:
    """Tokens (n, width) through one block of timm, with or without a scale on what it adds."""
    normed = layer_norm(x, block.norm1)
    q, k, v = linear(normed, block.attn.qkv).chunk(3, dim=1)
    layer = attend(q, k, v, block.attn.num_heads)
    layer.normed = normed
    x = x + linear(torch.cat(layer.output, 1), block.attn.proj) * getattr(block.ls1, "gamma", 1)
    hidden = F.gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1))
    return x + linear(hidden, block.mlp.fc2) * getattr(block.ls2, "gamma", 1), layer


def timm_pool(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Layer]:
    """SigLIP's attention pool: one learnt query, and a perceptron behind its answer."""
    k, v = linear(tokens, pool.kv).chunk(2, dim=1)
    layer = attend(linear(pool.latent[0], pool.q), k, v, pool.num_heads)
    x = linear(torch.cat(layer.output, 1), pool.proj)
    x = x + linear(F.gelu(linear(layer_norm(x, pool.norm), pool.mlp.fc1)), pool.mlp.fc2)
    return x[0], layer


def resnet_image(visual: nn.Module, size: tuple[int, int]) -> Tower:
    """CLIP's ResNet: the mean of its last map asks that map, each cell with its position."""
    grid, pool = (size[0] // 32, size[1] // 32), visual.attnpool

    def start(image: Tensor) -> Tensor:
        x = image[None]
        for number, stride in ((1, 2), (2, 1), (3, 1)):
            convolution, norm = getattr(visual, f"conv{number}"), getattr(visual, f"bn{number}")
            x = batch_norm(F.conv2d(x, convolution.weight, stride=stride, padding=1), norm).relu()
        x = F.avg_pool2d(x, 2)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            for block in stage:
                x = bottleneck(x, block)
        return x[0].flatten(1).T

    def head(cells: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
        tokens = torch.cat([cells.mean(0, keepdim=True), cells]) + pool.positional_embedding
        q, k, v = (linear(tokens, z) for z in (pool.q_proj, pool.k_proj, pool.v_proj))
        layer = attend(q, k, v, pool.num_heads)
        return linear(torch.cat(layer.output, 1), pool.c_proj)[0], [layer], Pooling("token", [0], grid)

    return Tower(start, [], head, grid)


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


def bert_text(tower: nn.Module, tokens: Tensor) -> Tower:
    """BERT, which reads its first token or the mean of all that are no pad tokens; no token sees a pad token."""
    pad, embed = tokens == tower.config.pad_token_id, tower.transformer.embeddings
    pooling = Pooling("token", [0])
    if type(tower.pooler).__name__ == "MeanPooler":
        pooling = Pooling("mean", [j for j in range(len(tokens)) if not pad[j]])

    def start(x: Tensor) -> Tensor:
        x = x + embed.token_type_embeddings.weight[0] + embed.position_embeddings.weight[: len(tokens)]
        return layer_norm(x, embed.LayerNorm)

    def head(x: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
        embedding = sum(x[j] for j in pooling.pooled) / len(pooling.pooled)
        if isinstance(tower.proj, nn.Linear):
            return linear(embedding, tower.proj), [], pooling
        return linear(F.gelu(linear(embedding, tower.proj[0])), tower.proj[2]), [], pooling

    hidden = pad[None].expand(len(tokens), -1)
    return Tower(start, [partial(bert_block, block, hidden=hidden) for block in tower.transformer.encoder.layer], head)


def bert_block(block: nn.Module, x: Tensor, hidden: Tensor) -> tuple[Tensor, Layer]:
    """Tokens (n, width) through one block of BERT, which norms behind each sum."""
    own, out = block.attention.self, block.attention.output
    layer = attend(*(linear(x, z) for z in (own.query, own.key, own.value)), own.num_attention_heads, hidden)
    x = layer_norm(x + linear(torch.cat(layer.output, 1), out.dense), out.LayerNorm)
    inner = F.gelu(linear(x, block.intermediate.dense))
    return layer_norm(x + linear(inner, block.output.dense), block.output.LayerNorm), layer


# --- the towers of a model


def image_tower(clip: Clip, size: tuple[int, int]) -> Tower:
    """The image tower for images of this height and width."""
    visual = clip.model.visual
    tower = timm_image if hasattr(visual, "trunk") else resnet_image if hasattr(visual, "attnpool") else native_image
    return tower(visual, size)


def text_tower(clip: Clip, tokens: Tensor) -> Tower:
    """The text tower with the masks and the pooled position of one phrase (T,)."""
    text = getattr(clip.model, "text", None)
    return bert_text(text, tokens) if hasattr(text, "pooler") else native_text(clip.model, tokens)


def word_embeddings(clip: Clip, tokens: Tensor) -> Tensor:
    """Rows (T, width) of the text tower's embedding, before positions."""
    text = getattr(clip.model, "text", clip.model)
    table = text.transformer.embeddings.word_embeddings if hasattr(text, "pooler") else text.token_embedding
    return table.weight[tokens].detach()


def encode_image(clip: Clip, image: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
    """Unit embedding of one image (3, H, W), its layers with the attention pool last, and how it is read."""
    found = run(image_tower(clip, tuple(image.shape[1:])), image)
    return found.embedding, found.layers, found.pooling


def encode_text(clip: Clip, tokens: Tensor) -> tuple[Tensor, list[Layer], Pooling]:
    """Unit embedding of one phrase (T,), its layers and how it is read; a block may have a token more than T."""
    # `requires_grad_()`: the graph must start somewhere when all weights are frozen.
    found = run(text_tower(clip, tokens), word_embeddings(clip, tokens).requires_grad_())
    return found.embedding, found.layers, found.pooling


# --- how an embedding is read, block by block


def row_weights(layers: list[Layer], pooling: Pooling) -> list[Tensor]:
    """Per block, the weight of each of its query tokens, (m,), which sums to 1."""
    result = []
    for layer in layers:
        weights = torch.zeros_like(layer.mean()[:, 0])
        if pooling.kind != "query":
            for j in pooling.pooled:
                weights[j] += 1 / len(pooling.pooled)
        elif layer is layers[-1]:
            weights[0] = 1
        else:
            # The pool may not see the first tokens; it asks all the others.
            asked = layers[-1].mean()[0]
            weights = torch.cat([weights[: len(weights) - len(asked)], asked])
        result.append(weights)
    return result


def rows(layers: list[Layer], pooling: Pooling) -> list[Tensor]:
    """Per block, the attention that the embedding pays to each token, (n,): the weighted rows, mean over heads."""
    result = []
    for layer, weights in zip(layers, row_weights(layers, pooling), strict=True):
        attention = layer.mean()
        result.append(sum(weights[j] * attention[j] for j in range(len(weights))))
    return result


def counted(layers: list[Layer], pooling: Pooling) -> list[list[int]]:
    """Per block, the query tokens whose gradients count: the one that is read, or all where several are."""
    result = []
    for layer in layers:
        if pooling.kind == "token":
            result.append(pooling.pooled)
        elif pooling.kind == "query" and layer is layers[-1]:
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
    layers: list[Layer], score: Tensor, pooling: Pooling, among: Sequence[int], last: Any, kind: str, skipped: int = 0
) -> list[list[Tensor]]:
    """Before the ReLU, for each of the last blocks that is not skipped, a value for each of the tokens `among`."""
    blocks = list(zip(layers, row_weights(layers, pooling), counted(layers, pooling), strict=True))
    result = []
    first = min(skipped if last == "all" else max(skipped, len(layers) - last), len(layers) - 1)
    for layer, weights, among_rows in blocks[first:]:
        gradient = list(torch.autograd.grad(score, layer.output, retain_graph=True))
        if kind == "softmax":
            result.append([gradient_term(layer, gradient, among_rows, i) for i in among])
        else:
            loosened = loosened_weights(layer, weights, among)
            result.append([loosened[i] * loosened_term(layer, gradient, among_rows, i) for i in among])
    return result


def rollout(layers: list[Layer], pooling: Pooling, number: int) -> Tensor:
    """The product of the last self-attention blocks, each with the residual path, read as the embedding is: (n,)."""
    blocks = layers[:-1] if pooling.kind == "query" else layers
    # Under a pool, the weights of the tokens are its attention, and it has no residual path: its query is no token.
    weights = row_weights(layers, pooling)[len(blocks) - 1]
    product = torch.eye(len(weights), dtype=weights.dtype)
    for layer in blocks[len(layers) - number :]:
        mixed = layer.mean() + torch.eye(len(product), dtype=product.dtype)
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    return sum(weights[j] * product[j] for j in range(len(weights)))


def flow(
    layers: list[Layer], pooling: Pooling, among: Sequence[int], tau: float, kind: str, last: Any, score: Tensor
) -> Tensor:
    """Eq. (1), the rollout or the relevance of Chefer et al., over the last layers, to the tokens `among`."""
    number = flow_depth(layers, last)
    if kind == "rollout":
        rolled = rollout(layers, pooling, number)
        return torch.stack([rolled[i] for i in among])
    if kind == "relevance":
        found = relevance(layers, pooling, score, len(layers) - number)
        return torch.stack([found[i] for i in among])
    seen, values = rows(layers, pooling)[len(layers) - number :], []
    total = sum(math.exp(tau * number) for number in range(1, len(seen) + 1))
    for i in among:
        values.append(sum(math.exp(tau * number) / total * row[i] for number, row in enumerate(seen, 1)))
    return torch.stack(values)


def flow_depth(layers: list[Layer], last: Any) -> int:
    return len(layers) if last == "all" else min(last, len(layers))


def weighted_rows(layers: list[Layer], pooling: Pooling, score: Tensor, last: Any) -> list[Tensor]:
    """As `rows`, for the last layers with the shares of `head_mean` in the place of attention."""
    kept = layers[len(layers) - flow_depth(layers, last) :]
    shared = [[shares(row) for row in head_mean(layer, score)] for layer in kept]
    result = []
    for layer, matrix in zip(kept, shared, strict=True):
        if pooling.kind == "token":
            result.append(matrix[pooling.pooled[0]])
        elif pooling.kind == "mean":
            result.append(sum(matrix[j] for j in pooling.pooled) / len(pooling.pooled))
        elif layer is layers[-1]:
            result.append(matrix[0])
        else:
            asked = shared[-1][0]
            result.append(sum(w * row for w, row in zip(asked, matrix[len(matrix) - len(asked) :], strict=True)))
    return result


def shares(row: Tensor) -> Tensor:
    return row / row.sum() if row.sum() > 0 else row


def consistency(seen: list[Tensor], among: Sequence[int], kappa: float) -> Tensor:
    """Eq. (2) over rows of layers, with the population standard deviation over the layers."""
    values = []
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
    content_box: Sequence[float] = (0, 0, 1, 1),
) -> Tensor:
    """M, pixel by pixel, in float64."""
    x0, y0, x1, y1 = (float(edge) for edge in content_box)
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
    """Bilinear interpolation between cell centers, pixel by pixel; outside the outermost centers the edge repeats."""
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
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    phrases: Sequence[str],
    content_box: Tensor | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Maps of B pairs, one after the other: image, grid, text, score and the raw parts, stacked."""
    settings = DEFAULTS | changes
    pairs = []
    for b, phrase in enumerate(phrases):
        rectangle = (0, 0, 1, 1) if content_box is None else content_box[b].tolist()
        pairs.append(one_pair(clip, images[b], tokens[b], phrase, rectangle, settings))
    return {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]}


def one_pair(
    clip: Clip, image: Tensor, tokens: Tensor, phrase: str, content_box: Sequence[float], s: dict[str, Any]
) -> dict[str, Tensor]:
    """Maps, raster, raw parts and score of one pair."""
    with torch.enable_grad():
        image_embedding, image_layers, image_pooling = encode_image(clip, image.clone().requires_grad_())
        text_embedding, text_layers, text_pooling = encode_text(clip, tokens)
        cosine = (image_embedding * text_embedding).sum()
        score = cosine
        if s["target"] == "margin":
            phrases = s["references"] or REFERENCES
            others = [encode_text(clip, clip.tokenize([other])[0])[0].detach() for other in phrases]
            score = (image_embedding * (text_embedding - sum(others) / len(others))).sum()
        visual = image_side(image_layers, image_pooling, score, phrase, content_box, tuple(image.shape[1:]), s)
        content = clip.content(tokens[None])[0].nonzero()[:, 0].tolist()
        textual = text_side(text_layers, text_pooling, score, content, len(tokens), s)
    return {name: z.detach() for name, z in {**visual, **textual, "score": cosine}.items()}


def image_side(
    layers: list[Layer],
    pooling: Pooling,
    score: Tensor,
    phrase: str,
    content_box: Sequence[float],
    size: Any,
    s: dict[str, Any],
) -> dict[str, Tensor]:
    """Map in pixels and on the raster, and what they are made of."""
    grid, patches = pooling.grid, pooling.patches
    blocks = gradient_maps(layers, score, pooling, patches, s["grad_layers"], s["spatial_weight"], s["skip_layers"])
    grad = sum(torch.stack(values).relu() for values in blocks) / len(blocks)
    grad = grad.reshape(grid)
    flowed = flow(layers, pooling, patches, s["tau"], s["flow"], s["flow_layers"], score).reshape(grid)
    kappa = len(patches) if s["kappa"] == "tokens" else s["kappa"]
    stable = consistency(compared_rows(layers, pooling, score, s), patches, kappa).reshape(grid)
    regions = parse_phrase(phrase).regions
    drawn = {k: s[k] for k in ("lambda_s", "laterality")} | {"shape": s["prior_shape"], "content_box": content_box}
    at_pixels = prior(regions, size, **drawn).to(grad.dtype)
    if s["fuse_at"] == "pixel":
        g, f, c = (bilinear(z, size) for z in (norm(grad), norm(flowed), stable))
        finished = fuse(g, f, c, at_pixels, s)
        raster = cell_means(finished, grid)
    else:
        raster = fuse(norm(grad), norm(flowed), stable, prior(regions, grid, **drawn).to(grad.dtype), s)
        finished = norm(bilinear(raster, size))
    return {"image": finished, "grid": raster, "grad": grad, "flow": flowed, "consistency": stable, "prior": at_pixels}


def compared_rows(layers: list[Layer], pooling: Pooling, score: Tensor, s: dict[str, Any]) -> list[Tensor]:
    if s["consistency_of"] == "attention":
        return rows(layers, pooling)
    return weighted_rows(layers, pooling, score, s["flow_layers"])


def text_side(
    layers: list[Layer], pooling: Pooling, score: Tensor, content: list[int], length: int, s: dict[str, Any]
) -> dict[str, Tensor]:
    """Map of the phrase's tokens (T,) and what it is made of, 0 where `content` has none."""
    last = s["text_grad_layers"] or s["grad_layers"]
    finished, grad, flowed, stable = (score.new_zeros(length) for _ in range(4))
    parts = {"text": finished, "text_grad": grad, "text_flow": flowed, "text_consistency": stable}
    if not content:
        return parts
    blocks = gradient_maps(layers, score, pooling, content, last, s["spatial_weight"])
    grad[content] = (sum(torch.stack(values) for values in blocks) / len(blocks)).relu()
    flowed[content] = flow(layers, pooling, content, s["tau"], s["flow"], s["flow_layers"], score)
    kappa = len(content) if s["kappa"] == "tokens" else s["kappa"]
    stable[content] = consistency(compared_rows(layers, pooling, score, s), content, kappa)
    weight = s["alpha"] + s["lambda_c"] * stable[content] + s["delta"]
    beta = s["beta"] if s["text_beta"] is None else s["text_beta"]
    finished[content] = norm(norm(grad[content]) * weight + beta * norm(flowed[content]))
    if len(content) == 1:
        finished[content] = 1
    return parts


# --- the other methods: one side of one pair


@dataclass
class Side:
    """One side of a pair, whose S = <unit embedding, direction> is a function of that side alone.

    `x` is the image (3, H, W) or the token embeddings (T, width), from which `run` came; `among` are the positions of
    the patches (counted from the end) or of the content tokens, `number` is the pair's place in its batch.
    """

    clip: Clip
    number: int
    tower: Tower
    x: Tensor
    direction: Tensor
    among: list[int]
    run: Run
    tokens: Tensor

    def score(self, found: Run) -> Tensor:
        """S of any run of this side's tower."""
        return (found.embedding * self.direction).sum()


def sides(
    clip: Clip, number: int, image: Tensor, tokens: Tensor, target: str, references: Sequence[str] | None
) -> tuple[Side, Side, Tensor]:
    """Image side and text side of one pair, and its cosine."""
    x, words = image.detach().clone().requires_grad_(), word_embeddings(clip, tokens).requires_grad_()
    towers = image_tower(clip, tuple(image.shape[1:])), text_tower(clip, tokens)
    seen, said = run(towers[0], x), run(towers[1], words)
    image_embedding, text_embedding = seen.embedding.detach(), said.embedding.detach()
    direction = text_embedding
    if target == "margin":
        others = [encode_text(clip, clip.tokenize([other])[0])[0].detach() for other in references or REFERENCES]
        direction = text_embedding - sum(others) / len(others)
    scale = clip.logit_scale.detach().exp() if target == "logit" else 1
    patches, content = list(seen.pooling.patches), clip.content(tokens[None])[0].nonzero()[:, 0].tolist()
    visual = Side(clip, number, towers[0], x, direction * scale, patches, seen, tokens)
    textual = Side(clip, number, towers[1], words, image_embedding * scale, content, said, tokens)
    return visual, textual, (image_embedding * text_embedding).sum()


Values = Callable[[Side], "Tensor | dict[str, Tensor]"]


def both_sides(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    image_values: Values,
    text_values: Values | None,
    target: str = "cosine",
    references: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Raw values of B pairs, one after the other, as all `raw_...` give them.

    `image` (B, N) or, where a method speaks of pixels, (B, H, W); `text` (B, T), 0 off content, not there where a
    method has none; `score` (B,), the cosine; and the parts of the method, those of the text as `text_...`.

    Args:
        image_values: A value per patch or per pixel, alone or as `map` beside parts.
        text_values: A value per content token, alone or as `map` beside parts.
    """
    found = []
    with torch.enable_grad():
        for b in range(len(images)):
            visual, textual, cosine = sides(clip, b, images[b], tokens[b], target, references)
            pair = {"score": cosine, **named(image_values(visual), "image", "")}
            if text_values is not None:
                parts = named(text_values(textual), "text", "text_")
                pair |= {name: placed(z, textual.among, len(tokens[b])) for name, z in parts.items()}
            found.append(pair)
    return {name: torch.stack([pair[name].detach() for pair in found]) for name in found[0]}


def named(values: Tensor | dict[str, Tensor], whole: str, prefix: str) -> dict[str, Tensor]:
    """Map and parts of one side under the names of the two sides."""
    parts = values if isinstance(values, dict) else {"map": values}
    return {whole if name == "map" else prefix + name: z for name, z in parts.items()}


def placed(values: Tensor, content: list[int], length: int) -> Tensor:
    """A value per content token as one per token (T,), 0 elsewhere; what is one number stays so."""
    if values.ndim == 0:
        return values
    result = values.new_zeros(length)
    for value, j in zip(values, content, strict=True):
        result[j] = value
    return result


def finish(clip: Clip, raw: dict[str, Tensor], images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Finished `image` (B, H, W), `grid` (B, Gh, Gw) and `text` (B, T) in place of the raw ones; the rest stays."""
    size, content = tuple(images.shape[2:]), clip.content(tokens)
    finished, grids, text = [], [], []
    for b, values in enumerate(raw["image"]):
        image, grid = finished_image(values, image_tower(clip, size).grid, size)
        finished.append(image)
        grids.append(grid)
        row = raw["text"][b] if "text" in raw else None
        text.append(finished_text(row, content[b].nonzero()[:, 0].tolist(), tokens.shape[1]).to(values))
    return {**raw, "image": torch.stack(finished), "grid": torch.stack(grids), "text": torch.stack(text)}


def finished_image(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Map in pixels and on the raster, of a value per pixel (H, W) or per patch (N,)."""
    if values.ndim == 2:
        image = norm(values)
        return image, cell_means(image, grid)
    cells = norm(values).reshape(grid)
    return norm(bilinear(cells, size)), cells


def finished_text(values: Tensor | None, content: list[int], length: int) -> Tensor:
    """Map of the tokens (T,): the norm over the content tokens, 1 for a single one, zeros for a method without text."""
    result = torch.zeros(length, dtype=torch.float64)
    if values is not None:
        result[content] = norm(values[content]).to(result) if len(content) != 1 else 1.0
    return result


def block_number(named_as: int, count: int) -> int:
    """A block from the front; counted from the end when negative, and the first one where there are not so many."""
    return named_as if named_as >= 0 else max(0, count + named_as)


# --- gradients


def raw_grad_cam(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    layers: Sequence[int] = (-1,),
    variant: str = "gradcam",
    at: str = "norm",
    **explained: Any,
) -> dict[str, Tensor]:
    values = partial(grad_cam, layers=layers, variant=variant, at=at)
    return both_sides(clip, images, tokens, values, values, **explained)


def grad_cam(side: Side, layers: Sequence[int], variant: str, at: str) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) or HiResCAM (Draelos and Carin 2020) of the tokens at the blocks' first norms.

    The mean is over the tokens of the map after the norm, and over all tokens before it.
    """
    maps = [camera(side, block_number(layer, len(side.tower.blocks)), variant, at) for layer in layers]
    return maps[0] if len(maps) == 1 else sum(norm(values) for values in maps) / len(maps)


def camera(side: Side, block: int, variant: str, at: str) -> Tensor:
    """The map of one block, a value for each of the tokens `among`."""
    tokens, normed = side.run.stream[block], side.run.layers[block].normed
    if at == "norm" and normed is not None:
        tokens = normed
    gradient = torch.autograd.grad(side.score(side.run), tokens, retain_graph=True)[0]
    counted = side.among if at == "norm" else range(len(gradient))
    mean = sum((gradient[i] for i in counted), torch.zeros_like(gradient[0])) / max(1, len(counted))
    values = tokens.new_zeros(len(side.among))
    for place, j in enumerate(side.among):
        values[place] = ((mean if variant == "gradcam" else gradient[j]) * tokens[j]).sum().relu()
    return values


def raw_saliency(clip: Clip, images: Tensor, tokens: Tensor, **explained: Any) -> dict[str, Tensor]:
    def gradient(side: Side) -> Tensor:
        return torch.autograd.grad(side.score(side.run), side.x)[0]

    def pixels(side: Side) -> Tensor:
        return gradient(side).abs().amax(0)

    def words(side: Side) -> Tensor:
        return gradient(side).pow(2).sum(1).sqrt()[side.among]

    return both_sides(clip, images, tokens, pixels, words, **explained)


def raw_integrated_gradients(
    clip: Clip, images: Tensor, tokens: Tensor, steps: int = 32, fill: Tensor | None = None, **explained: Any
) -> dict[str, Tensor]:
    """With `completeness_error` (B,) and `text_completeness_error` (B,), signed; `fill` as in `filled`."""

    def pixels(side: Side) -> dict[str, Tensor]:
        found, error = integrated(side, filled(side, fill), steps)
        return {"map": found.sum(0).relu(), "completeness_error": error}

    def words(side: Side) -> dict[str, Tensor]:
        base, pad = side.x.detach().clone(), torch.full_like(side.tokens, clip.pad_id)
        base[side.among] = word_embeddings(clip, pad)[side.among]
        found, error = integrated(side, base, steps)
        return {"map": found.sum(1).relu()[side.among], "completeness_error": error}

    return both_sides(clip, images, tokens, pixels, words, **explained)


def filled(side: Side, fill: Tensor | None) -> Tensor:
    """What stands for pixels that are not there, (3, H, W): the mean color, one fill for all, or one for each pair."""
    if fill is None:
        return torch.zeros_like(side.x)
    return (fill[side.number] if fill.ndim == 4 else fill).to(side.x).expand_as(side.x)


def integrated(side: Side, base: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Sundararajan et al. 2017, eq. (1), by Gauss-Legendre on the line from `base`: per entry of x; what is missing."""
    x = side.x.detach()
    total = torch.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        point = (base + (node + 1) / 2 * (x - base)).requires_grad_()
        total = total + weight / 2 * torch.autograd.grad(side.score(run(side.tower, point)), point)[0]
    found = (x - base) * total
    return found, found.sum() - (side.score(run(side.tower, x)) - side.score(run(side.tower, base)))


# --- what is taken away


def raw_kernel_shap(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    coalitions: Tensor | None = None,
    weights: Tensor | None = None,
    text_coalitions: Sequence[Tensor | None] | None = None,
    text_weights: Sequence[Tensor | None] | None = None,
    fill: Tensor | None = None,
    most: int = 64,
    **explained: Any,
) -> dict[str, Tensor]:
    """Kernel SHAP, with `values` (B, N) and `text_values` (B, T), signed.

    Args:
        coalitions: (S, F) bool, which groups of patches each keeps, the same for all pairs; None: all there are.
        weights: (S,) of the coalitions; 1 each when left out.
        text_coalitions: The same for the content tokens, of each pair.
        text_weights: Of these, of each pair.
        fill: As in `filled`.
        most: Groups of patches that an image has at most.
    """

    def pixels(side: Side) -> dict[str, Tensor]:
        groups = patch_groups(side.tower.grid, most)
        base = filled(side, fill)
        values = kernel_shap(lambda kept: kept_patches(side, base, groups, kept), max(groups) + 1, coalitions, weights)
        shares = [values[group] / groups.count(group) for group in groups]
        return signed(torch.stack(shares).to(side.x))

    def words(side: Side) -> dict[str, Tensor]:
        mine, heavy = (None if z is None else z[side.number] for z in (text_coalitions, text_weights))
        return signed(kernel_shap(lambda kept: kept_words(side, kept), len(side.among), mine, heavy).to(side.x))

    return both_sides(clip, images, tokens, pixels, words, **explained)


def signed(values: Tensor) -> dict[str, Tensor]:
    return {"map": values.relu(), "values": values}


def patch_groups(grid: tuple[int, int], most: int) -> list[int]:
    """The group of each patch, row by row: squares of patches, as small as makes at most `most` of them."""
    side = 1
    while math.ceil(grid[0] / side) * math.ceil(grid[1] / side) > most:
        side += 1
    columns = math.ceil(grid[1] / side)
    return [row // side * columns + column // side for row in range(grid[0]) for column in range(grid[1])]


@torch.no_grad()
def kept_patches(side: Side, base: Tensor, groups: list[int], kept: Tensor) -> Tensor:
    """S of the image with the pixels of `base` in all groups that are not kept."""
    x, (rows, columns) = side.x.detach().clone(), side.tower.grid
    height, width = x.shape[1] // rows, x.shape[2] // columns
    for place, group in enumerate(groups):
        if not kept[group]:
            y, left = place // columns * height, place % columns * width
            x[:, y : y + height, left : left + width] = base[:, y : y + height, left : left + width]
    return side.score(run(side.tower, x))


@torch.no_grad()
def kept_words(side: Side, kept: Tensor) -> Tensor:
    """S of the phrase with pad tokens in place of the content tokens that are not kept, read anew."""
    tokens = side.tokens.clone()
    for j, stays in zip(side.among, kept, strict=True):
        if not stays:
            tokens[j] = side.clip.pad_id
    return (encode_text(side.clip, tokens)[0] * side.direction).sum()


def kernel_shap(
    value: Callable[[Tensor], Tensor], features: int, coalitions: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Values (F,) in float64 of the kernel regression over coalitions, all proper ones when None are given.

    Args:
        value: Score of a coalition (F,) bool.
        features: F.
        coalitions: (S, F) bool.
        weights: (S,); 1 each when left out.
    """
    if features == 0:
        return torch.zeros(0, dtype=torch.float64)
    empty, full = value(torch.zeros(features, dtype=torch.bool)), value(torch.ones(features, dtype=torch.bool))
    if features == 1:
        return (full - empty)[None].double()
    if coalitions is None:
        coalitions, weights = proper_coalitions(features)
    elif weights is None:
        weights = torch.ones(len(coalitions))
    scores = torch.stack([value(kept) for kept in coalitions])
    return kernel_regression(coalitions, weights, scores, empty, full)


def proper_coalitions(features: int) -> tuple[Tensor, Tensor]:
    """All subsets but the empty and the full one, (2^F - 2, F) bool, and their weights (Lundberg and Lee 2017)."""
    coalitions, weights = [], []
    for size in range(1, features):
        for chosen in combinations(range(features), size):
            coalitions.append([f in chosen for f in range(features)])
            weights.append((features - 1) / (math.comb(features, size) * size * (features - size)))
    return torch.tensor(coalitions), torch.tensor(weights, dtype=torch.float64)


def kernel_regression(coalitions: Tensor, weights: Tensor, scores: Tensor, empty: Tensor, full: Tensor) -> Tensor:
    """The values (F,) that sum to full - empty and fit best: the saddle point of the Lagrangian, in float64."""
    features = coalitions.shape[1]
    z, w, y = coalitions.double(), weights.double(), scores.double() - empty.double()
    matrix, right = torch.zeros(features + 1, features + 1).double(), torch.zeros(features + 1).double()
    for row, weight, target in zip(z, w, y, strict=True):
        matrix[:features, :features] += weight * row[:, None] * row
        right[:features] += weight * target * row
    matrix[:features, features] = matrix[features, :features] = 1
    right[features] = full.double() - empty.double()
    # Of the values that fit alike, where the coalitions are too few: the smallest.
    return (torch.linalg.pinv(matrix) @ right)[:features]


def exact_shapley(value: Callable[[Tensor], Tensor], features: int) -> Tensor:
    """Shapley values (F,) by their definition, in float64: what each feature adds to each subset of the others."""
    result = torch.zeros(features, dtype=torch.float64)
    for f in range(features):
        others = [other for other in range(features) if other != f]
        for size in range(features):
            weight = math.factorial(size) * math.factorial(features - size - 1) / math.factorial(features)
            for chosen in combinations(others, size):
                without = torch.tensor([other in chosen for other in range(features)])
                joined = torch.tensor([other in chosen or other == f for other in range(features)])
                result[f] += weight * (value(joined) - value(without)).double()
    return result


def raw_rise(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    grids: Tensor,
    offsets: Tensor,
    keep: Tensor,
    keep_probability: float = 0.5,
    centered: bool = False,
    fill: Tensor | None = None,
    **explained: Any,
) -> dict[str, Tensor]:
    """RISE (Petsiuk et al. 2018, eq. 6), per pixel, from masks that are given.

    Args:
        grids: (M, cells, cells) bool.
        offsets: (M, 2), down and to the right, in pixels.
        keep: (M, T) bool or (B, M, T), which tokens stay; what it says off content is not asked.
        fill: As in `filled`.
    """

    def pixels(side: Side) -> Tensor:
        masks = [rise_mask(g, o, tuple(side.x.shape[1:])) for g, o in zip(grids.to(side.x), offsets, strict=True)]
        scores = [masked_score(side, filled(side, fill), mask) for mask in masks]
        return rise(scores, masks, keep_probability, centered)

    def words(side: Side) -> Tensor:
        stays = [row[side.among] for row in (keep[side.number] if keep.ndim == 3 else keep)]
        return rise(
            [kept_words(side, row) for row in stays], [row.to(side.x) for row in stays], keep_probability, centered
        )

    return both_sides(clip, images, tokens, pixels, words, **explained)


@torch.no_grad()
def masked_score(side: Side, base: Tensor, mask: Tensor) -> Tensor:
    """S of the image seen through a mask (H, W), with `base` behind it."""
    return side.score(run(side.tower, side.x * mask + base * (1 - mask)))


def rise_mask(grid: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
    """A small grid (cells, cells), one cell larger than the image (H, W) when drawn at its size, cut at an offset."""
    height, width = (math.ceil(pixels / len(grid)) for pixels in size)
    drawn = bilinear(grid, ((len(grid) + 1) * height, (len(grid) + 1) * width))
    top, left = (int(z) for z in offset)
    return drawn[top : top + size[0], left : left + size[1]]


def rise(scores: list[Tensor], masks: list[Tensor], keep_probability: float, centered: bool) -> Tensor:
    """Mean of the masks, each times its score, over the share that is kept."""
    mean = sum(scores) / len(scores) if centered else 0
    return sum((s - mean) * m for s, m in zip(scores, masks, strict=True)) / (len(masks) * keep_probability)


# --- attention


def raw_chefer(
    clip: Clip, images: Tensor, tokens: Tensor, start_layer: int = -1, **explained: Any
) -> dict[str, Tensor]:
    values = partial(chefer, start_layer=start_layer)
    return both_sides(clip, images, tokens, values, values, **explained)


def chefer(side: Side, start_layer: int) -> Tensor:
    """Chefer, Gur and Wolf 2021, eqs. (5) and (6), from one layer on; a pool asks, but no token asks its query."""
    layers = side.run.layers
    score = side.score(side.run)
    return relevance(layers, side.run.pooling, score, block_number(start_layer, len(layers)))[side.among]


def relevance(layers: list[Layer], pooling: Pooling, score: Tensor, first: int) -> Tensor:
    """The row of R that the embedding reads, (n,), from one layer on; without the identity at the tokens it reads."""
    weighted = [head_mean(layer, score) for layer in layers[first:]]
    product = torch.eye(layers[0].attention[0].shape[1]).to(score)
    for mixed in weighted[:-1] if pooling.kind == "query" else weighted:
        product = product + mixed @ product
    weights = torch.zeros_like(product[0])
    if pooling.kind == "query":
        # The pool may not see the first tokens; it asks all the others.
        asked = weighted[-1][0]
        weights[len(weights) - len(asked) :] = asked
    else:
        for j in pooling.pooled:
            weights[j] += 1 / len(pooling.pooled)
    row = sum(weights[j] * product[j] for j in range(len(weights)))
    return row if pooling.kind == "query" else row - weights


def head_mean(layer: Layer, score: Tensor) -> Tensor:
    """Mean over heads of max(0, A * dS/dA), (m, n)."""
    gradients = torch.autograd.grad(score, layer.attention, retain_graph=True)
    return sum((a * g).relu() for a, g in zip(layer.attention, gradients, strict=True)) / len(gradients)


def raw_grad_eclip(
    clip: Clip, images: Tensor, tokens: Tensor, image_blocks: int = 1, text_blocks: int = 8, **explained: Any
) -> dict[str, Tensor]:
    image_values = partial(grad_eclip, blocks=image_blocks, clipped="each")
    text_values = partial(grad_eclip, blocks=text_blocks, clipped="sum")
    return both_sides(clip, images, tokens, image_values, text_values, **explained)


def grad_eclip(side: Side, blocks: int, clipped: str) -> Tensor:
    """Grad-ECLIP (Zhao et al. 2024): the loosened terms of the last blocks, each clipped, or their sum."""
    if not side.among:
        return side.x.new_zeros(0)
    found = side.run
    maps = gradient_maps(found.layers, side.score(found), found.pooling, side.among, blocks, "loosened")
    if clipped == "each":
        return sum(torch.stack(values).relu() for values in maps)
    return sum(torch.stack(values) for values in maps).relu()


def raw_rollout(clip: Clip, images: Tensor, tokens: Tensor, **explained: Any) -> dict[str, Tensor]:
    def rolled(side: Side) -> Tensor:
        return rollout(side.run.layers, side.run.pooling, len(side.run.layers))[side.among]

    return both_sides(clip, images, tokens, rolled, rolled, **explained)


def raw_legrad(
    clip: Clip, images: Tensor, tokens: Tensor, num_blocks: int | None = None, **explained: Any
) -> dict[str, Tensor]:
    values = partial(legrad, blocks=num_blocks)
    return both_sides(clip, images, tokens, values, values, **explained)


def legrad(side: Side, blocks: int | None) -> Tensor:
    """LeGrad (Bousselham et al. 2024): the mean over the last attention blocks, the pool being one."""
    count = len(side.run.layers)
    last = range(count)[-blocks if blocks else None :]
    return sum(legrad_layer(side, number) for number in last) / len(last)


def legrad_layer(side: Side, number: int) -> Tensor:
    """Mean over heads and queries of max(0, ds_l/dA_l), to the tokens `among`."""
    layer = side.run.layers[number]
    gradients = torch.autograd.grad(layer_score(side, number), layer.attention, retain_graph=True)
    total = sum(row.relu() for gradient in gradients for row in gradient)
    total = total / (len(gradients) * len(gradients[0]))
    missing = len(side.run.layers[0].key[0]) - len(total)
    # A pool that does not see the first tokens.
    return torch.cat([total.new_zeros(missing), total])[side.among]


def layer_score(side: Side, number: int) -> Tensor:
    """s_l: what the tower's head reads from the tokens behind the block; of the pool, S."""
    tower, found = side.tower, side.run
    if number < len(tower.blocks):
        found = tail(tower, found.stream[number + 1], len(tower.blocks))
    return side.score(found)


def raw_dense_similarity(
    clip: Clip, images: Tensor, tokens: Tensor, variant: str = "clearclip", **explained: Any
) -> dict[str, Tensor]:
    """Signed; there is no text side."""
    if variant == "patch":
        refuse_resnet(clip)
    return both_sides(clip, images, tokens, lambda side: dense_similarity(side, variant), None, **explained)


def dense_similarity(side: Side, variant: str) -> Tensor:
    """Each patch's own embedding with the phrase, (N,)."""
    if side.tower.blocks:
        return alone_in_the_head(side, dense_tokens(side, variant))
    # CLIP's ResNet: what the pool's projection makes of each cell is an embedding already.
    embeddings = linear(mixed_values(side.run.layers[-1], variant), side.clip.model.visual.attnpool.c_proj)
    return torch.stack([embeddings[i] / embeddings[i].norm() @ side.direction for i in side.among])


def alone_in_the_head(side: Side, tokens: Tensor) -> Tensor:
    """Each patch of the tokens (n, width) behind the last block through the tower's head alone, (N,)."""
    values = []
    for i in side.among:
        # One token in every place: it is the class token, the mean of all, and all that a pool can ask for.
        alone = tokens[i].expand_as(tokens)
        values.append(side.score(tail(side.tower, alone, len(side.tower.blocks))))
    return torch.stack(values)


def dense_tokens(side: Side, variant: str) -> Tensor:
    """What the last block gives with the attention of the variant, (n, width)."""
    if variant == "patch":
        return side.run.stream[-1]
    block, entering = side.tower.blocks[-1].args[0], side.run.stream[-2]
    mixed = mixed_values(side.run.layers[len(side.tower.blocks) - 1], variant)
    if hasattr(block, "ln_1"):
        added = linear(mixed, block.attn.out_proj)
    else:
        added = linear(mixed, block.attn.proj) * getattr(block.ls1, "gamma", 1)
    if variant in ("maskclip", "clearclip"):
        return added
    x = entering + added
    if hasattr(block, "ln_1"):
        return x + linear(F.gelu(linear(layer_norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
    hidden = F.gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1))
    return x + linear(hidden, block.mlp.fc2) * getattr(block.ls2, "gamma", 1)


def mixed_values(layer: Layer, variant: str) -> Tensor:
    """Values of each token (n, width), mixed by what the variant compares, heads side by side."""
    heads = []
    for query, key, value in zip(layer.query, layer.key, layer.value, strict=True):
        compared = {"maskclip": [], "sclip": [query, key], "clearclip": [query]}[variant]
        rows = []
        for i in range(len(value)):
            # Without any comparison, each token keeps its own value.
            row = value[i] if not compared else torch.zeros_like(value[i])
            for z in compared:
                logits = torch.stack([z[i] @ z[j] for j in range(len(z))]) / math.sqrt(z.shape[1])
                row = row + logits.softmax(0) @ value
            rows.append(row)
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1)


def refuse_resnet(clip: Clip) -> None:
    if hasattr(clip.model.visual, "attnpool"):
        raise ValueError("CLIP's ResNet has no tokens between its blocks.")


# --- M2IB


def raw_m2ib(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    noise: Tensor,
    text_noise: Tensor,
    block: int = -3,
    beta: float = 0.1,
    lr: float = 1.0,
    after_last_update: bool = False,
    **explained: Any,
) -> dict[str, Tensor]:
    """M2IB (Wang et al. 2023) from noise that is given, the same for all pairs.

    Args:
        noise: (steps, copies, n, width) of the image tokens; a tower with fewer takes the first.
        text_noise: The same of the phrase's tokens.
    """
    refuse_resnet(clip)

    def pixels(side: Side) -> Tensor:
        everything = list(range(len(side.run.stream[0])))
        return m2ib(side, noise, everything, block, beta, lr, after_last_update)[side.among]

    def words(side: Side) -> Tensor:
        if not side.among:
            return side.x.new_zeros(0)
        return m2ib(side, text_noise, phrase_positions(side), block, beta, lr, after_last_update)[side.among]

    return both_sides(clip, images, tokens, pixels, words, **explained)


def phrase_positions(side: Side) -> list[int]:
    """Tokens up to the one that is read, or those of BERT that are no pad tokens."""
    last = side.run.pooling.pooled[-1]
    if hasattr(getattr(side.clip.model, "text", None), "pooler"):
        pad = side.clip.model.text.config.pad_token_id
        return [j for j, token in enumerate(side.tokens.tolist()) if token != pad]
    return list(range(last + 1))


def m2ib(
    side: Side, noise: Tensor, counted: list[int], block: int, beta: float, lr: float, after_last_update: bool
) -> Tensor:
    """Capacity of each token, (n,), summed over channels, of the bottleneck that Adam finds."""
    number = block_number(block, len(side.tower.blocks))
    hidden = side.run.stream[number + 1].detach()
    alpha = torch.full_like(hidden, 5).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=lr)
    seen = hidden
    for copies in noise.to(hidden):
        open_share = alpha.sigmoid()
        capacity = information(hidden, open_share)
        seen = capacity.detach()
        scores = [bottled_score(side, number, hidden, open_share, counted, drawn) for drawn in copies]
        loss = beta * capacity[counted].mean() - sum(scores) / len(scores)
        alpha.grad = torch.autograd.grad(loss, alpha)[0]
        optimizer.step()
    return (information(hidden, alpha.detach().sigmoid()) if after_last_update else seen).sum(1)


def information(hidden: Tensor, open_share: Tensor) -> Tensor:
    """KL divergence of what passes from noise, in each channel, (n, width)."""
    variance = (1 - open_share) ** 2
    return -0.5 * (1 + variance.log() - (open_share * hidden) ** 2 - variance)


def bottled_score(
    side: Side, number: int, hidden: Tensor, open_share: Tensor, counted: list[int], drawn: Tensor
) -> Tensor:
    """S with noise in the counted tokens behind a block, and the others as they are."""
    bottled = list(hidden)
    for j in counted:
        bottled[j] = open_share[j] * hidden[j] + (1 - open_share[j]) * drawn[j]
    return side.score(tail(side.tower, torch.stack(bottled), number + 1))


# --- NIB


def raw_nib(
    clip: Clip, images: Tensor, tokens: Tensor, block: int = -4, steps: int = 10, **explained: Any
) -> dict[str, Tensor]:
    """With `signed` (B, N) and `text_signed` (B, T), and with `completeness_error` (B,) of all narrowed tokens."""
    refuse_resnet(clip)

    def pixels(side: Side) -> dict[str, Tensor]:
        return nib(side, list(range(len(side.run.stream[0]))), block, steps)

    def words(side: Side) -> dict[str, Tensor]:
        return nib(side, phrase_positions(side), block, steps)

    return both_sides(clip, images, tokens, pixels, words, **explained)


def nib(side: Side, counted: list[int], block: int, steps: int) -> dict[str, Tensor]:
    """NIB (Zhu et al. 2025) as released: h times the mean of dS/dz over z = lambda h, lambda = 1/n, 2/n, ..., 1."""
    number = block_number(block, len(side.tower.blocks))
    hidden = side.run.stream[number + 1].detach()
    values = hidden.new_zeros(len(hidden))
    for step in range(1, steps + 1):
        narrow = narrowed(hidden, counted, step / steps).requires_grad_()
        gradient = torch.autograd.grad(side.score(tail(side.tower, narrow, number + 1)), narrow)[0]
        for j in counted:
            values[j] += (hidden[j] * gradient[j] / steps).sum()
    closed = side.score(tail(side.tower, narrowed(hidden, counted, 0.0), number + 1))
    error = values.sum() - (side.score(side.run) - closed)
    return {"map": values[side.among], "signed": values[side.among], "completeness_error": error}


def narrowed(hidden: Tensor, counted: list[int], share: float) -> Tensor:
    """Tokens (n, width) with a share of each counted one, and the others as they are."""
    return torch.stack([row * share if j in counted else row for j, row in enumerate(hidden)])


# --- less is more

Subset = Sequence[int]


def raw_submodular_regions(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    regions: int = 49,
    confidence: float = 0.05,
    effectiveness: float = 0.01,
    consistency: float = 20.0,
    collaboration: float = 5.0,
    pending: int = 8,
    fill: Tensor | None = None,
    target: str = "cosine",
    references: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Less is more (Chen et al. 2024), with the bidirectional search of its successor unless `pending` is 0.

    Beside `image` (B, N), the parts `order` (B, R), `insertion`, `deletion` (B, R + 1), `gains` (B, R) and `region`
    (B, N). There is no text side.

    Args:
        regions: Groups of patches that an image has at most.
        confidence, effectiveness, consistency, collaboration: Weights.
        pending: Candidates that are tried for the least important place.
        fill: As in `filled`.
    """

    def pixels(side: Side) -> dict[str, Tensor]:
        groups, base = patch_groups(side.tower.grid, regions), filled(side, fill)
        everything = list(range(max(groups) + 1))
        worth = region_scores(side, target, list(references or REFERENCES))
        embeddings = [kept_regions(side, base, groups, [i]) for i in everything]
        known: dict[frozenset[int], tuple[Tensor, Tensor]] = {}

        def scores(subset: Subset) -> tuple[Tensor, Tensor]:
            if frozenset(subset) not in known:
                known[frozenset(subset)] = worth(kept_regions(side, base, groups, subset))
            return known[frozenset(subset)]

        def value(subset: Subset) -> Tensor:
            rest = [i for i in everything if i not in subset]
            score, certain = scores(subset)
            return confidence * certain + consistency * score + collaboration * (1 - scores(rest)[0])

        def spread(subset: Subset) -> Tensor:
            return effectiveness * least_angles([embeddings[i] for i in subset])

        order = greedy_order(len(everything), pending, value, spread)
        insertion, deletion = ([scores(part)[0] for part in parts] for parts in starts_and_rests(order))
        gains, values = falling_values(insertion, deletion)
        return {
            "map": torch.stack([values[order.index(group)] for group in groups]),
            "order": torch.tensor(order),
            "insertion": torch.stack(insertion),
            "deletion": torch.stack(deletion),
            "gains": torch.stack(gains),
            "region": torch.tensor(groups),
        }

    return both_sides(clip, images, tokens, pixels, None, target=target, references=references)


def starts_and_rests(order: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """The first regions of the order, from none to all, and those that are not among them."""
    return [order[:r] for r in range(len(order) + 1)], [order[r:] for r in range(len(order) + 1)]


@torch.no_grad()
def kept_regions(side: Side, base: Tensor, groups: list[int], kept: Subset) -> Tensor:
    """Embedding of the image with the pixels of `base` in all groups that are not kept."""
    x, (rows, columns) = side.x.detach().clone(), side.tower.grid
    height, width = x.shape[1] // rows, x.shape[2] // columns
    for place, group in enumerate(groups):
        if group not in kept:
            y, left = place // columns * height, place % columns * width
            x[:, y : y + height, left : left + width] = base[:, y : y + height, left : left + width]
    return run(side.tower, x).embedding


@torch.no_grad()
def region_scores(side: Side, target: str, references: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What an embedding is worth: what is explained, and the confidence, of a softmax over phrase and references."""
    rows = [side.tokens]
    for phrase in references:
        row = side.clip.tokenize([phrase])[0]
        if not any(torch.equal(row, other) for other in rows):
            rows.append(row)
    classes = [encode_text(side.clip, row)[0] for row in rows]

    def scores(embedding: Tensor) -> tuple[Tensor, Tensor]:
        logits = [side.clip.logit_scale.exp() * (embedding * word).sum() for word in classes]
        shares = [logit.exp() / sum(other.exp() for other in logits) for logit in logits]
        entropy = -sum(share * share.log() for share in shares)
        score = shares[0] if target == "probability" else (embedding * side.direction).sum()
        return score, 1 - entropy / math.log(len(shares)) if len(shares) > 1 else torch.ones_like(entropy)

    return scores


def least_angles(embeddings: list[Tensor]) -> Tensor:
    """Sum of the angle / pi of each to the one nearest to it; 0 of one alone."""
    total = torch.tensor(0.0).double()
    for i, one in enumerate(embeddings):
        # The nearest has the greatest product.
        products = [one @ z for j, z in enumerate(embeddings) if j != i]
        total = total + (max(products).clamp(-1, 1).acos() / math.pi if products else 0)
    return total


Score = Callable[[list[int]], Tensor]


def greedy_order(count: int, pending: int, value: Score, spread: Score) -> list[int]:
    """Regions from the most to the least important, for F = value + spread of the regions that are taken."""
    most: list[int] = []
    least: list[int] = []
    left = list(range(count))
    while len(left) > 1:
        best = max(left, key=lambda v: value([*most, v]) + spread([*most, v]))
        if 0 < pending < len(left):
            others = [v for v in left if v != best]
            others.sort(key=lambda v: value([*most, v]) + spread([*least, v]))
            worst = min(others[:pending], key=lambda v: value([*least, v]) + spread([*least, v]))
            least.append(worst)
            left.remove(worst)
        most.append(best)
        left.remove(best)
    return most + left + least[::-1]


def falling_values(insertion: list[Tensor], deletion: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gains by rank, and the values by rank, each less by the size of its gain than the one before."""
    curve = [kept + 1 - without for kept, without in zip(insertion, deletion, strict=True)]
    gains, values, value = [], [], torch.zeros_like(curve[0])
    for before, after in pairwise(curve):
        gains.append(after - before)
        value = value - (after - before).abs()
        values.append(value)
    return gains, values


# --- words and regions


def raw_word_regions(
    clip: Clip,
    images: Tensor,
    tokens: Tensor,
    image_block: int | None = -1,
    text_block: int | None = -1,
    steps: int = 8,
    fill: Tensor | None = None,
) -> dict[str, Tensor]:
    """Moeller et al. 2025 by full Jacobians, with `interactions` (B, T, N), signed sums, and what is missing."""
    if image_block is not None:
        refuse_resnet(clip)
    found = []
    for b in range(len(images)):
        visual, textual, cosine = sides(clip, b, images[b], tokens[b], "cosine", None)
        base, pad = textual.x.detach().clone(), torch.full_like(textual.tokens, clip.pad_id)
        base[textual.among] = word_embeddings(clip, pad)[textual.among].detach()
        seen, seen_gain = changes(visual, filled(visual, fill), image_block, steps)
        said, said_gain = changes(textual, base, text_block, steps)
        whole = said.T @ seen
        length = tokens.shape[1]
        interactions = whole[:length][:, visual.among]
        found.append(
            {
                "score": cosine.detach(),
                "image": interactions[textual.among].sum(0).relu(),
                "text": interactions.sum(1).relu(),
                "interactions": interactions,
                "signed": whole.sum(0)[visual.among],
                "text_signed": whole.sum(1)[:length],
                "completeness_error": whole.sum() - seen_gain @ said_gain,
            }
        )
    return {name: torch.stack([pair[name] for pair in found]) for name in found[0]}


def changes(side: Side, base: Tensor, block: int | None, steps: int) -> tuple[Tensor, Tensor]:
    """Mean Jacobian times input minus reference, by embedding and token (D, n) or patch (D, N); change of f (D,)."""
    if block is None:
        first, last, forward = base.detach(), side.x.detach(), lambda x: run(side.tower, x).embedding
    else:
        number = block_number(block, len(side.tower.blocks))
        first, last = (run(side.tower, x).stream[number].detach() for x in (base, side.x))
        forward = lambda x: tail(side.tower, x, number).embedding  # noqa: E731
    total = 0
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        point = first + (node + 1) / 2 * (last - first)
        total = total + weight / 2 * torch.autograd.functional.jacobian(forward, point)
    product = total * (last - first)
    if product.ndim == 4:
        rows, columns = side.tower.grid
        area = (product.shape[2] // rows) * (product.shape[3] // columns)
        product = torch.stack([cell_means(one.sum(0), side.tower.grid).flatten() * area for one in product])
    else:
        product = product.sum(2)
    with torch.no_grad():
        gain = forward(last) - forward(first)
    return product, gain
