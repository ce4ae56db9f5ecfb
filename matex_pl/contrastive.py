"""The task: matching films and phrases. The loss, and what validation says about it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def same_phrase(phrases: Sequence[str]) -> Tensor:
    """Which pairs have the same phrase, but for case and spaces: `(B, B)` bool. They are no negatives of each other."""
    keys = phrase_keys(phrases)
    return keys[:, None] == keys[None]


def phrase_keys(phrases: Sequence[str]) -> Tensor:
    """One int64 per phrase, equal where they differ by case and spaces only: `(B,)`."""
    return fingerprints([_plain(phrase) for phrase in phrases])


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def fingerprints(names: Sequence[str]) -> Tensor:
    """One int64 per name, equal for equal names in any process: `(B,)`."""
    digests = [int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True) for name in names]
    return torch.tensor(digests, dtype=torch.long)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
    """Symmetric cross-entropy of the scaled cosines, a scalar; the target is uniform over the positives of each row.

    With one positive per row it is CLIP's loss (Radford et al. 2021).

    Args:
        image: `(B, D)` L2-normalised.
        text: `(B, D)` L2-normalised.
        logit_scale: Scalar factor, not its logarithm.
        positives: `(B, B)` bool, symmetric, true on the diagonal.
    """
    return _cross_entropy(image, text, (image, text), logit_scale, positives)


def _cross_entropy(
    image: Tensor, text: Tensor, keys: tuple[Tensor, Tensor], logit_scale: Tensor, positives: Tensor
) -> Tensor:
    """Mean over B pairs of the loss against N keys, images and texts `(N, D)`; positives `(B, N)`."""
    target = positives.to(image) / positives.sum(1, keepdim=True)
    images, texts = keys
    to_text = F.cross_entropy(logit_scale * image @ texts.T, target)
    return (to_text + F.cross_entropy(logit_scale * text @ images.T, target)) / 2


def gathered_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    phrases: Sequence[str],
    *,
    local_loss: bool = True,
    gather_with_grad: bool = True,
) -> Tensor:
    """`contrastive_loss` of the pairs of all processes; the own ones alone outside of a process group.

    With `gather_with_grad` the mean of its gradients over the processes, which DDP takes, is the gradient that one
    process has on the whole batch.

    Args:
        image: `(B, D)` L2-normalised, of this process; every process has the same B.
        text: `(B, D)` L2-normalised.
        logit_scale: Scalar factor, not its logarithm.
        phrases: What the B films are said to show: equal ones, in other processes too, are no negatives.
        local_loss: The loss of the own pairs against all, whose mean over the processes is the loss of the batch;
            otherwise every process computes the whole.
        gather_with_grad: Let gradients pass to the process that an embedding came from. Without it, gradients are
            those of the own embeddings alone, smaller by the number of processes, and `local_loss` is not possible.

    Raises:
        ValueError: The processes have batches of different size.
    """
    keys = phrase_keys(phrases).to(image.device)
    if process_count() == 1:
        return contrastive_loss(image, text, logit_scale, keys[:, None] == keys)
    all_keys, rank = gather_rows(keys), dist.get_rank()
    # Without a graph there is nothing to pass back, as in validation.
    with_grad = gather_with_grad and torch.is_grad_enabled()
    images, texts = gather_features(image, text, local_loss, with_grad, rank, process_count())
    if local_loss:
        return _cross_entropy(image, text, (images, texts), logit_scale, keys[:, None] == all_keys)
    return contrastive_loss(images, texts, logit_scale, all_keys[:, None] == all_keys)


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """The rows `(B, ...)` of all W processes, in their order: `(W * B, ...)`, without a graph.

    Raises:
        ValueError: The processes have different numbers of rows.
    """
    if process_count() == 1:
        return rows
    rows = rows.detach().contiguous()
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(process_count())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(rows)))
    counts = torch.cat(sizes).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have batches of {', '.join(map(str, counts))} pairs; a step needs as many in each. Take "
            "the loaders of a matex_pl data module, or a DistributedSampler with drop_last."
        )
    parts = [torch.empty_like(rows) for _ in counts]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def best_positive_rank(scores: Tensor, positives: Tensor) -> Tensor:
    """How many negatives are not below the best positive of each row, `(Q, N)` to `(Q,)`; ties and NaN count."""
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~positives).sum(1)


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of (positive, negative) pairs that `scores (N,)` rank right; ties count half, NaN without either."""
    positive, negative = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below / (2 * len(negative))).mean()


class RetrievalRecall(Metric):
    """Recall at k over all pairs seen, both ways: a dict `image_to_text_recall@k`, `text_to_image_recall@k`.

    A pair with the same phrase or the same film counts as right too. Pairs that come twice, as padded shards bring
    them, count once. NaN when there are none.

    Example:
        >>> metric = RetrievalRecall(ks=(1,))
        >>> metric.update(torch.eye(3), torch.eye(3), ["a", "b", "c"], ["a", "b", "c"], ["x", "y", "z"])
        >>> metric.compute()["image_to_text_recall@1"]
        tensor(1.)
    """

    higher_is_better = True
    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    keys: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        for name in ("image", "text", "keys"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, image: Tensor, text: Tensor, ids: Sequence[str], film_ids: Sequence[str], phrases: Sequence[str]
    ) -> None:
        """Add B pairs: embeddings `(B, D)`, and the names that tell repeats, films and phrases apart."""
        phrases = [_plain(phrase) for phrase in phrases]
        self.image.append(image.detach().float())
        self.text.append(text.detach().float())
        self.keys.append(torch.stack([fingerprints(names) for names in (ids, film_ids, phrases)], 1).to(image.device))

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1] of the queries whose best positive is among the first k."""
        ranks: dict[str, list[Tensor]] = {"image_to_text": [], "text_to_image": []}
        if not len(self.keys):
            return {f"{way}_recall@{k}": torch.tensor(torch.nan) for way in ranks for k in self.ks}
        keys = dim_zero_cat(self.keys)
        first = first_of_each(keys[:, 0])
        image, text, film, phrase = dim_zero_cat(self.image)[first], dim_zero_cat(self.text)[first], *keys[first, 1:].T
        for rows in torch.arange(len(film), device=film.device).split(1024):
            positives = (film[rows, None] == film) | (phrase[rows, None] == phrase)
            ranks["image_to_text"].append(best_positive_rank(image[rows] @ text.T, positives))
            ranks["text_to_image"].append(best_positive_rank(text[rows] @ image.T, positives))
        return {
            f"{way}_recall@{k}": (torch.cat(found) < k).float().mean() for way, found in ranks.items() for k in self.ks
        }


class ZeroShot(Metric):
    """Zero-shot classification of films by one prompt per finding: a dict `zero_shot_top1`, `zero_shot_auroc`.

    Top-1 is right when the best prompt names a finding that the film has; films without a finding do not count there.
    The AUROC is the mean over findings that some films have and others lack. Each film counts once. NaN where nothing
    counts, and where a cosine is NaN.

    Example:
        >>> metric = ZeroShot(["edema", "nodule"])
        >>> metric.update(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), [["edema"], ["nodule"]], ["film 1", "film 2"])
        >>> metric.compute()
        {'zero_shot_top1': tensor(1.), 'zero_shot_auroc': tensor(1.)}
    """

    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    films: list[Tensor]

    def __init__(self, findings: Sequence[str]) -> None:
        super().__init__()
        self.findings = tuple(findings)
        for name in ("scores", "labels", "films"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, film_findings: Sequence[Sequence[str]], film_ids: Sequence[str]) -> None:
        """Add B films: cosines with the F prompts `(B, F)`, the findings each has, and its name."""
        labels = [[finding in found for finding in self.findings] for found in film_findings]
        self.scores.append(scores.detach().float())
        self.labels.append(torch.tensor(labels, device=scores.device).view(scores.shape))
        self.films.append(fingerprints(film_ids).to(scores.device))

    def compute(self) -> dict[str, Tensor]:
        """Both scores in [0, 1]."""
        if not len(self.films):
            return {"zero_shot_top1": torch.tensor(torch.nan), "zero_shot_auroc": torch.tensor(torch.nan)}
        first = first_of_each(dim_zero_cat(self.films))
        scores, labels = dim_zero_cat(self.scores)[first], dim_zero_cat(self.labels)[first].bool()
        # A model that gives NaN has no order of findings.
        spoilt = 0 * scores.sum()
        best = labels.gather(1, scores.argmax(1, keepdim=True))[:, 0].float()
        areas = torch.stack([auroc(*column) for column in zip(scores.T, labels.T, strict=True)])
        return {"zero_shot_top1": best[labels.any(1)].mean() + spoilt, "zero_shot_auroc": areas.nanmean() + spoilt}


def first_of_each(keys: Tensor) -> Tensor:
    """Indices of the first occurrence of each key of `(n,)`, in order."""
    unique, inverse = keys.unique(return_inverse=True)
    order = torch.arange(len(keys), device=keys.device)
    return torch.full_like(unique, len(keys)).scatter_reduce(0, inverse, order, "amin").sort().values
