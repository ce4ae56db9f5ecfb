"""The task: matching films and phrases. The loss, and what validation says about it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def same_phrase(phrases: Sequence[str]) -> Tensor:
    """Which pairs have the same phrase, but for case and spaces: `(B, B)` bool. They are no negatives of each other."""
    keys = fingerprints([_plain(phrase) for phrase in phrases])
    return keys[:, None] == keys[None]


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
    logits = logit_scale * image @ text.T
    target = positives.to(logits) / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


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
        if not self.keys:
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
        if not self.films:
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
