"""Attention rows and gradient terms that lead from a block's tokens to the embedding. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matex_pl.attribution.core.capture import Block, FollowedBlock, GradBlock, at
from matex_pl.clip.towers import Pooling
from matex_pl.maps import full_precision, min_max


def row_weights(blocks: Sequence[Block], pooling: Pooling) -> list[Tensor | None]:
    """Weight of each query in the embedding, `(B, m)` per block, rows summing to 1; None under token pooling.

    Eqs. (1) and (2) read the row of the pooled token. If the tower does not pool one token, they read the rows of all
    pooled tokens with these weights:

    - Under an average the weights are equal.
    - Under an attention pool (SigLIP, CoCa) the pool is the last layer, where its own query has all the weight. In the
      layers below, the weights are the attention of the pool to the tokens.
    """
    if pooling.kind == "token":
        return [None] * len(blocks)
    sizes = [block.mean.shape[1] for block in blocks]
    if pooling.kind == "mean":
        share = _share(pooling).to(blocks[0].mean)
        return [pooling.from_map(share, size) for size in sizes]
    pool = blocks[-1].mean
    first = torch.eye(sizes[-1], device=pool.device).to(pool.dtype)[:1].expand(len(pool), -1)
    return [*(pooling.from_map(pool[:, 0], size) for size in sizes[:-1]), first]


def attention_rows(blocks: Sequence[Block], pooling: Pooling) -> Tensor:
    """Head-averaged attention from the pooled token or tokens to each token of the map, by layer: `(B, L, length)`."""
    if pooling.position is not None:
        means = [block.mean for block in blocks]
        rows = [mean[:, 0] if mean.shape[1] == 1 else at(mean[:, None], pooling.position)[:, 0] for mean in means]
    else:
        pairs = zip(row_weights(blocks, pooling), blocks, strict=True)
        rows = [torch.einsum("bm,bmn->bn", weight, block.mean) for weight, block in pairs]
    return torch.stack([pooling.to_map(row) for row in rows], 1)


def rollout_rows(matrices: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Row of the embedding in the product over layers of `rownorm(A + I)` (Abnar and Zuidema 2020).

    `matrices` are L head-averaged attention matrices A `(B, m, n)`, first layer first, with that of the pool last.

    Returns:
        The rows `(B, L, length)` of the products of the last layer, of the last two, and so on to all.
    """
    row, below = first_row(matrices, pooling)
    rows = [row] * (len(matrices) - len(below))
    for matrix in reversed(below):
        mixed = matrix + torch.eye(matrix.shape[-1], device=matrix.device).to(matrix.dtype)
        row = torch.einsum("bn,bnm->bm", row, mixed / mixed.sum(-1, keepdim=True))
        rows.append(row)
    return pooling.to_map(torch.stack(rows, 1))


def weighted_attention(block: GradBlock, gradient: Tensor) -> Tensor:
    """Attention weighted by its gradient, mean over heads of `max(0, A * dS/dA)` (Chefer et al. 2021), `(B, m, n)`.

    Args:
        block: Recorded block.
        gradient: `(B, h, m, d)` gradient of the target by the block's output.
    """
    return (block.attention() * gradient_by_attention(block, gradient)).relu().mean(1)


def relevance_rows(matrices: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Row of the embedding in the relevance R, with `R <- R + A R` from block to block (Chefer et al. 2021).

    Under token and mean pooling the row is that of R - I: under mean pooling, the identity would add the same large
    value to every token.

    Args:
        matrices: K matrices A of `weighted_attention` `(B, m, n)`, first block first, with that of the pool last.
        pooling: Pooling of the tower.

    Returns:
        The rows `(B, K, length)` of R over the last block, over the last two, and so on to all.
    """
    start, below = first_row(matrices, pooling)
    row = start if pooling.kind == "query" else torch.zeros_like(start)
    rows = [row] * (len(matrices) - len(below))
    for matrix in reversed(below):
        step = torch.einsum("bn,bnm->bm", start, matrix)
        start, row = start + step, row + step
        rows.append(row)
    return pooling.to_map(torch.stack(rows, 1))


def row_shares(matrix: Tensor) -> Tensor:
    """Matrix with nonnegative rows `(..., n)` scaled to the sum 1, as rows of attention; rows of zeros stay."""
    return matrix / matrix.sum(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def first_row(matrices: Sequence[Tensor], pooling: Pooling) -> tuple[Tensor, Sequence[Tensor]]:
    """Initial row `(B, n)` of a product of attention matrices, and the remaining matrices.

    The row is one-hot at the pooled token, or has equal shares under mean pooling. Under an attention pool it is the
    pool's row of the last matrix, because the pool's query is not a token and has no share of its own.
    """
    tokens, last = matrices[0].shape[-1], matrices[-1]
    if pooling.kind == "query":
        return pooling.from_map(last[:, 0], tokens), matrices[:-1]
    if pooling.kind == "mean":
        return pooling.from_map(_share(pooling), tokens).to(last), matrices
    return torch.eye(tokens, device=last.device).to(last.dtype)[pooling.position], matrices


def softmax_term(block: GradBlock | FollowedBlock, gradient: Tensor, pooling: Pooling) -> Tensor:
    """Signed relevance of each token of a block, weighted by the softmax attention: `(B, n)`.

    The relevance is the sum over heads, channels and the pooled rows of `g_l * A_l * v_l`. Over all tokens it sums to
    `<g_l, o_l>` of these rows.

    Args:
        block: Recorded block.
        gradient: Gradient of the target. Under token pooling it is that by the block's output, `(B, h, m, d)`.
            Otherwise it is that by the block's value, `(B, h, n, d)`, which equals the sum over rows of `A_l * g_l`.
        pooling: Pooling of the tower.
    """
    value = full_precision(block.value)
    if pooling.position is None:
        return (full_precision(gradient) * value).sum((1, 3))
    read = full_precision(at(gradient, pooling.position))
    return (torch.einsum("bhd,bhnd->bhn", read, value) * block.attention(pooling.position)).sum(1)


def loosened_term(block: GradBlock, gradient: Tensor, weight: Tensor | None, pooling: Pooling, keep: Tensor) -> Tensor:
    """Signed relevance of each token of the map with Grad-ECLIP's weight: `(B, length)`.

    The weight is `cos(q, k_i)` on the concatenated heads, min-maxed over the tokens of `keep`; 1 if all are equal. q is
    the pooled query, or the weighted mean of several.

    Args:
        block: Recorded block.
        gradient: `(B, h, m, d)` gradient of the target by the block's output.
        weight: `(B, m)` weights of `row_weights`, used if several rows are pooled.
        pooling: Pooling of the tower.
        keep: `(B, length)` bool mask of the tokens that count.
    """
    query, key, value = (full_precision(part.detach()) for part in (block.query, block.key, block.value))
    gradient = full_precision(gradient)
    if pooling.position is not None:
        query, gradient = at(query, pooling.position), at(gradient, pooling.position)
    else:
        query, gradient = torch.einsum("bm,bhmd->bhd", weight, query), gradient.sum(2)
    cosine = torch.cosine_similarity(query.flatten(1)[:, None], key.transpose(1, 2).flatten(2), dim=-1)
    loosened = min_max(pooling.to_map(cosine), keep=keep, dtype=block.key.dtype)
    loosened = loosened + (loosened.amax(1, keepdim=True) == 0).to(loosened)
    return loosened * pooling.to_map(torch.einsum("bhd,bhnd->bn", gradient, value))


def _share(pooling: Pooling) -> Tensor:
    """Equal shares of the averaged tokens, `(B, length)`."""
    assert pooling.pooled is not None
    return pooling.pooled / pooling.pooled.sum(1, keepdim=True)


def gradient_by_attention(block: GradBlock, gradient: Tensor) -> Tensor:
    """Gradient by each attention weight, `(B, h, m, n)`: `<g_o, v>`, with g_o that by the output `(B, h, m, d)`."""
    return full_precision(gradient) @ full_precision(block.value.detach()).transpose(-1, -2)


def gradients_of(
    embedding: Tensor, handles: Sequence[Tensor], direction: Tensor, *, copies: int = 1
) -> Sequence[Tensor]:
    """Gradient of `<direction, embedding>` by each handle.

    Args:
        embedding: `(copies * B, D)` embeddings on the graph, samples running fastest, or one sample's for B directions.
        handles: Tensors on its graph, `(B, ...)` or `(1, ...)`.
        direction: `(B, D)` directions.
        copies: Number of embeddings per sample, over which the score is summed.

    Returns:
        Gradients `(B, ...)`, one per handle.
    """
    direction = direction.to(embedding.dtype)
    if len(embedding) == copies * len(direction):
        return torch.autograd.grad(embedding, handles, direction.repeat(copies, 1))
    spread = direction[:, None].expand(-1, copies, -1)
    batched = torch.autograd.grad(embedding, handles, spread, is_grads_batched=True)
    return [gradient[:, 0] for gradient in batched]
