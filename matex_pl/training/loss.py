"""The contrastive losses: the softmax loss of CLIP, and the sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import Tensor

from matex_pl.maps import moved
from matex_pl.training.distributed import fingerprints, gather_rows, process_count

EqualPhrases = Literal["positive", "masked"]
"""Role of another pair with the same phrase: `positive` shares the target of the row, `masked` leaves the row.

Where equal phrases have equal embeddings, `positive` is plain CLIP's loss in value and gradient: the copies cancel.
`masked` takes them out of the denominator too, and no image is pushed away from its own phrase.
In the sigmoid loss, `positive` is the label 1 of such a pair, and `masked` leaves the pair out of the sum.
"""
Loss = Literal["softmax", "sigmoid"]
"""`softmax` is CLIP's loss, `contrastive_loss`, and `sigmoid` is SigLIP's, `sigmoid_loss`."""


def same_phrase(phrases: Sequence[str]) -> Tensor:
    """Mask `(B, B)` bool of the pairs with the same phrase, which are not negatives of each other."""
    keys = phrase_keys(phrases)
    return keys[:, None] == keys[None]


def phrase_keys(phrases: Sequence[str]) -> Tensor:
    """One int64 per phrase, `(B,)`, equal for phrases that differ only in case and spaces."""
    return fingerprints([" ".join(phrase.lower().split()) for phrase in phrases])


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, positives: Tensor, equal_phrases: EqualPhrases = "positive"
) -> Tensor:
    """Symmetric cross-entropy of the scaled cosines, a scalar.

    With one positive per row it is CLIP's loss (Radford et al. 2021).

    Args:
        image: `(B, D)` image embeddings, L2-normalized.
        text: `(B, D)` text embeddings, L2-normalized.
        logit_scale: Scalar factor, not its logarithm.
        positives: `(B, B)` bool mask of the pairs with the same phrase, symmetric, true on the diagonal.
        equal_phrases: Role of the other positives of a row, see `EqualPhrases`.
    """
    own = torch.arange(len(image), device=image.device)
    return _cross_entropy(image, text, (image, text), logit_scale, positives, own, equal_phrases)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor,
    equal_phrases: EqualPhrases = "positive",
) -> Tensor:
    """Binary cross-entropy of every image with every phrase, summed over phrases, averaged over images; a scalar.

    `-1/B sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b))` with z = 1 for a positive and -1 for a negative pair, the
    factor t and the bias b (Zhai et al., 2023, eq. 2). There, only a pair itself is positive.

    Args:
        image: `(B, D)` image embeddings x, L2-normalized.
        text: `(B, D)` text embeddings y, L2-normalized.
        logit_scale: Scalar factor t, not its logarithm.
        logit_bias: Scalar bias b.
        positives: `(B, B)` bool mask of the pairs with the same phrase, symmetric, true on the diagonal.
        equal_phrases: Role of the other positives of a row, see `EqualPhrases`.
    """
    own = torch.arange(len(image), device=image.device)
    return _log_sigmoid(image, text, logit_scale, logit_bias, positives, own, equal_phrases)


def _cross_entropy(
    image: Tensor,
    text: Tensor,
    keys: tuple[Tensor, Tensor],
    logit_scale: Tensor,
    positives: Tensor,
    own: Tensor,
    equal_phrases: EqualPhrases,
) -> Tensor:
    """Mean over B pairs of the loss against N keys, images and texts `(N, D)`; `own` `(B,)` is the pair among them."""
    images, texts = keys
    to_text, to_image = logit_scale * image @ texts.T, logit_scale * text @ images.T
    if equal_phrases == "masked":
        others = _others(positives, own)
        to_text, to_image = (logits.masked_fill(others, -torch.inf) for logits in (to_text, to_image))
        return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
    target = positives.to(image) / positives.sum(1, keepdim=True)
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def _log_sigmoid(
    image: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor,
    own: Tensor,
    equal_phrases: EqualPhrases,
) -> Tensor:
    """Mean over B images of the sigmoid loss with N texts `(N, D)`; `own` `(B,)` is the image's pair among them."""
    logits = logit_scale * image @ texts.T + logit_bias
    loss = -F.logsigmoid(torch.where(positives, logits, -logits))
    if equal_phrases == "masked":
        loss = loss.masked_fill(_others(positives, own), 0)
    return loss.sum(1).mean()


def _others(positives: Tensor, own: Tensor) -> Tensor:
    """Positives without the pair itself."""
    return positives.scatter(1, own[:, None], False)


def gathered_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    phrases: Sequence[str],
    *,
    local_loss: bool = True,
    gather_with_grad: bool = True,
    equal_phrases: EqualPhrases = "positive",
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Loss of the pairs of all processes, or of the given pairs if there is one process.

    The loss is `contrastive_loss`, or `sigmoid_loss` if there is a bias.

    With `gather_with_grad`, the mean of the gradients over the processes, which DDP computes, is the gradient of one
    process on the whole batch.

    Args:
        image: `(B, D)` image embeddings of this process, L2-normalized; B is the same in every process.
        text: `(B, D)` text embeddings, L2-normalized.
        logit_scale: Scalar factor, not its logarithm.
        phrases: Phrases of the B pairs. Pairs with equal phrases, also in other processes, are not negatives of each
            other.
        local_loss: Whether to compute the loss of the process's own pairs against all pairs. The mean over the
            processes is then the loss of the batch. If not, every process computes the whole loss.
        gather_with_grad: Whether gradients flow to the process that computed an embedding. If not, gradients are
            those of the process's own embeddings, smaller by the number of processes, and `local_loss` is not possible.
        equal_phrases: Role of the other pairs with the same phrase, see `EqualPhrases`.
        logit_bias: Scalar bias of the logits, for the sigmoid loss.

    Raises:
        ValueError: The processes have batches of different size.
    """
    if process_count() == 1:
        positives = moved(same_phrase(phrases), image.device)
        return whole_loss(image, text, logit_scale, positives, equal_phrases, logit_bias)
    keys = moved(phrase_keys(phrases), image.device)
    all_keys, rank = gather_rows(keys), dist.get_rank()
    # Without a graph, as in validation, there are no gradients to gather.
    with_grad = gather_with_grad and torch.is_grad_enabled()
    images, texts = gather_features(image, text, local_loss, with_grad, rank, process_count())
    positives = all_keys[:, None] == all_keys
    if not local_loss:
        return whole_loss(images, texts, logit_scale, positives, equal_phrases, logit_bias)
    own = rank * len(image) + torch.arange(len(image), device=image.device)
    positives = positives[own]
    if logit_bias is not None:
        return _log_sigmoid(image, texts, logit_scale, logit_bias, positives, own, equal_phrases)
    return _cross_entropy(image, text, (images, texts), logit_scale, positives, own, equal_phrases)


def whole_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    equal_phrases: EqualPhrases = "positive",
    logit_bias: Tensor | None = None,
) -> Tensor:
    """`sigmoid_loss` of B pairs if there is a bias, else `contrastive_loss`, with the same arguments."""
    if logit_bias is None:
        return contrastive_loss(image, text, logit_scale, positives, equal_phrases)
    return sigmoid_loss(image, text, logit_scale, logit_bias, positives, equal_phrases)
