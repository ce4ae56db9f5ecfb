"""Retrieval and zero-shot scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from matex_pl.maps import moved
from matex_pl.training.distributed import GatheredMetric, fingerprints, first_of_each, largest
from matex_pl.training.loss import phrase_keys


def best_positive_rank(scores: Tensor, positives: Tensor) -> Tensor:
    """Number of negatives not below the best positive of each row, `(Q, N)` to `(Q,)`; ties and NaN count."""
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~positives).sum(1)


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve of `scores` `(N,)`; ties count half. NaN without a positive or without a negative."""
    positive, negative = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below / (2 * len(negative))).mean()


class ImageTextRecall(GatheredMetric):
    """Recall at k over all pairs in both directions: a dict `image_to_text_recall@k`, `text_to_image_recall@k`.

    Pairs with the same phrase or the same image also count as correct. Pairs that repeat, as in padded shards, count
    once. Without pairs the value is NaN.

    Examples:
        >>> metric = ImageTextRecall(ks=(1,))
        >>> metric.update(torch.eye(3), torch.eye(3), ["a", "b", "c"], ["a", "b", "c"], ["x", "y", "z"])
        >>> metric.compute()["image_to_text_recall@1"]
        tensor(1.)
    """

    higher_is_better = True
    image: list[Tensor]
    text: list[Tensor]
    keys: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        for name in ("image", "text", "keys"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _empty(self) -> dict[str, Tensor]:
        width = largest(self.image[0].shape[1] if len(self.image) else 0, self.device)
        nothing = torch.zeros(0, width, device=self.device)
        return {"image": nothing, "text": nothing, "keys": torch.zeros(0, 3, dtype=torch.long, device=self.device)}

    def update(
        self, image: Tensor, text: Tensor, ids: Sequence[str], image_ids: Sequence[str], phrases: Sequence[str]
    ) -> None:
        """Add B pairs: embeddings `(B, D)`, and the ids and phrases that identify repeats, images and phrases."""
        self.image.append(image.detach().float())
        self.text.append(text.detach().float())
        keys = [fingerprints(ids), fingerprints(image_ids), phrase_keys(phrases)]
        self.keys.append(torch.stack(keys, 1).to(image.device))

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1] of the queries whose best positive is among the first k."""
        ranks: dict[str, list[Tensor]] = {"image_to_text": [], "text_to_image": []}
        if not len(self.keys) or not len(keys := dim_zero_cat(self.keys)):
            return {f"{way}_recall@{k}": torch.tensor(torch.nan) for way in ranks for k in self.ks}
        first = first_of_each(keys[:, 0])
        image, text = dim_zero_cat(self.image)[first], dim_zero_cat(self.text)[first]
        image_key, phrase_key = keys[first, 1:].T
        for rows in torch.arange(len(image_key), device=image_key.device).split(1024):
            positives = (image_key[rows, None] == image_key) | (phrase_key[rows, None] == phrase_key)
            ranks["image_to_text"].append(best_positive_rank(image[rows] @ text.T, positives))
            ranks["text_to_image"].append(best_positive_rank(text[rows] @ image.T, positives))
        return {
            f"{way}_recall@{k}": (torch.cat(parts) < k).float().mean() for way, parts in ranks.items() for k in self.ks
        }


# Name before 0.2.
RetrievalRecall = ImageTextRecall


class ZeroShot(GatheredMetric):
    """Zero-shot classification of images by one prompt per finding: a dict `zero_shot_top1`, `zero_shot_auroc`.

    Top-1 is the share of images whose best prompt names a finding of the image; images without a finding do not count.
    The AUROC is the mean over findings that some images have and others lack. Each image counts once. The value is NaN
    if nothing counts, or if a cosine is NaN.

    Examples:
        >>> metric = ZeroShot(["edema", "nodule"])
        >>> metric.update(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), [["edema"], ["nodule"]], ["image 1", "image 2"])
        >>> metric.compute()
        {'zero_shot_top1': tensor(1.), 'zero_shot_auroc': tensor(1.)}
    """

    higher_is_better = True
    scores: list[Tensor]
    labels: list[Tensor]
    images: list[Tensor]

    def __init__(self, findings: Sequence[str]) -> None:
        super().__init__()
        self.findings = tuple(findings)
        for name in ("scores", "labels", "images"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _empty(self) -> dict[str, Tensor]:
        nothing = torch.zeros(0, len(self.findings), device=self.device)
        images = torch.zeros(0, dtype=torch.long, device=self.device)
        return {"scores": nothing, "labels": nothing.bool(), "images": images}

    def update(self, scores: Tensor, image_findings: Sequence[Sequence[str]], image_ids: Sequence[str]) -> None:
        """Add B images: cosines with the F prompts `(B, F)`, findings and id of each image."""
        labels = [[finding in present for finding in self.findings] for present in image_findings]
        self.scores.append(scores.detach().float())
        self.labels.append(moved(torch.tensor(labels), scores.device).view(scores.shape))
        self.images.append(fingerprints(image_ids).to(scores.device))

    def compute(self) -> dict[str, Tensor]:
        """Both scores in [0, 1]."""
        if not len(self.images) or not len(images := dim_zero_cat(self.images)):
            return {"zero_shot_top1": torch.tensor(torch.nan), "zero_shot_auroc": torch.tensor(torch.nan)}
        first = first_of_each(images)
        scores, labels = dim_zero_cat(self.scores)[first], dim_zero_cat(self.labels)[first].bool()
        # With NaN there is no order of findings.
        spoilt = 0 * scores.sum()
        best = labels.gather(1, scores.argmax(1, keepdim=True))[:, 0].float()
        areas = torch.stack([auroc(*column) for column in zip(scores.T, labels.T, strict=True)])
        return {"zero_shot_top1": best[labels.any(1)].mean() + spoilt, "zero_shot_auroc": areas.nanmean() + spoilt}
