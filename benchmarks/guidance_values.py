"""Values of the test pairs that `benchmarks/guidance.py` compares between models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from anatomy import column, masses
from shortcut import has_tag, tag_zone
from torch import Tensor

from matex_pl.anatomy import named_side
from matex_pl.attribution import AttributionMethod, Chefer, Matex, Rise
from matex_pl.attribution.several import attribute_methods
from matex_pl.data import ChestXrayDataModule, ImageTextBatch, PhantomDataModule
from matex_pl.evaluation.intervals import Detections, Sums
from matex_pl.evaluation.pairs import (
    choose_pairs,
    embed_pairs,
    other_phrases_of,
    prepare_data,
    read_pairs,
    swapped_phrases,
    with_phrases,
)
from matex_pl.evaluation.values import IN_BOXES
from matex_pl.maps import Attribution
from matex_pl.metrics import functional as F
from matex_pl.training import ClipModule
from matex_pl.training.loss import phrase_keys
from matex_pl.training.scores import best_positive_rank

# MATEX holds the guided map; the other two read the model in another way.
METHODS: dict[str, AttributionMethod] = {
    "Chefer, all blocks": Chefer(start_layer=0),
    "MATEX without its prior": Matex.recommended(lambda_s=1.0),
}
RISE: dict[str, AttributionMethod] = {"RISE": Rise(masks=100, centered=True)}
IN_BOX = ("pointing_game", "miou", "energy_pointing_game")
TAG = {"shortcut": 0.9, "shortcut_finding": "nodule"}
# Threshold of the components of AP50, and number of pairs at once.
_THRESHOLD, _AT_ONCE = 0.5, 50


@dataclass(frozen=True)
class Ranking:
    """AUROC of n images.

    Args:
        scores: `(n,)` scores.
        labels: `(n,)` bool.
    """

    scores: Tensor
    labels: Tensor

    def score(self, drawn: Tensor | None = None) -> Tensor:
        """AUROC `(1,)`, or `(R,)` if each image is drawn `(R, n)` times; ties count half."""
        drawn = torch.ones(1, len(self.labels), dtype=torch.float64) if drawn is None else drawn
        gap = self.scores[self.labels, None] - self.scores[~self.labels]
        wins = (gap.sign().double() + 1) / 2
        positive, negative = drawn[:, self.labels], drawn[:, ~self.labels]
        return ((positive @ wins) * negative).sum(1) / (positive.sum(1) * negative.sum(1))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels)


KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Sums, Detections, Ranking)}
# By metric: the patients of the pairs, the kind of the score and its fields, which a file can hold.
Measured = dict[str, dict[str, Any]]


def entry(values: Tensor | Detections | Ranking, patients: Sequence[str]) -> dict[str, Any]:
    """A score of pairs as plain types; of a tensor `(n,)`, its mean."""
    score = Sums.of(values) if isinstance(values, Tensor) else values
    return {"patients": list(patients), "kind": type(score).__name__, "fields": vars(score)}


def nodule_values(module: ClipModule, root: str) -> Measured:
    """Zero-shot scores for nodules with the tag and on the same images without it, and the maps of the former."""
    size, finding = module.clip.image_size, TAG["shortcut_finding"]
    with_tag, without = PhantomDataModule(root, num_workers=0, **TAG), PhantomDataModule(root, num_workers=0)
    for data in (with_tag, without):
        prepare_data(data, size, "test")
    tagged = [pair for pair in with_tag.pairs["test"] if pair.finding == finding and has_tag(with_tag.read_image(pair))]
    ids = {pair.id for pair in tagged}
    same = [pair for pair in without.pairs["test"] if pair.id in ids]
    others = {pair.image_id: pair for pair in without.pairs["test"] if finding not in pair.image_findings}
    shown = read_pairs(with_tag, "test", tagged, _AT_ONCE)
    patients, rest = [pair.patient_id for pair in same], [pair.patient_id for pair in others.values()]
    scores = {
        "with": prompt_scores(module, shown, with_tag.findings),
        "without": prompt_scores(module, read_pairs(without, "test", same, _AT_ONCE), without.findings),
        "others": prompt_scores(module, read_pairs(without, "test", list(others.values()), _AT_ONCE), without.findings),
    }
    place = without.findings.index(finding)
    called = {name: (found.argmax(1) == place).double() for name, found in scores.items()}
    all_scores = torch.cat([scores["without"], scores["others"]])
    labels = torch.arange(len(all_scores)) < len(same)
    measured = {
        "called, without the tag": entry(called["without"], patients),
        "called, with the tag": entry(called["with"], patients),
        "others called": entry(called["others"], rest),
        "auroc": entry(Ranking(all_scores[:, place] - all_scores.mean(1), labels), patients + rest),
    }
    for name, shares in masses(module, METHODS, shown, tag_zone(with_tag, module), with_tag.thorax()).items():
        measured[f"{name}, peak on the tag"] = entry(shares["peak/tag"], patients)
        measured[f"{name}, mass outside"] = entry(shares["mass/rest"], patients)
    return measured


@torch.no_grad()
def prompt_scores(module: ClipModule, batches: Sequence[ImageTextBatch], findings: Sequence[str]) -> Tensor:
    """Cosines of each image with the prompt of each finding, `(n, F)`."""
    prompts = [module.hparams["prompt"].format(finding=name) for name in findings]
    text = module.clip.encode_text(module.clip.tokenize(prompts))
    return torch.cat([module.clip.encode_image(module.inputs(batch)[0]) @ text.T for batch in batches])


def pair_values(
    module: ClipModule, data: ChestXrayDataModule, splits: Sequence[str], num_pairs: int, num_rise: int
) -> Measured:
    """Retrieval and zero-shot scores of the pairs of some splits, and scores of the maps of those with boxes.

    Args:
        module: Model.
        data: Data module.
        splits: Splits, taken together.
        num_pairs: Number of pairs with boxes, drawn at random; -1 for all.
        num_rise: Number of pairs that RISE explains, the first of them.
    """
    prepare_data(data, module.clip.image_size, *splits)
    data.pairs["held"] = [pair for split in splits for pair in data.pairs[split]]
    boxed = choose_pairs(data, "held", num_pairs, 0)
    return match_values(module, data) | map_values(module, read_pairs(data, "held", boxed, _AT_ONCE), num_rise)


@torch.no_grad()
def match_values(module: ClipModule, data: ChestXrayDataModule) -> Measured:
    """Recall at 10 in both directions, and zero-shot top-1 of each image with a finding."""
    batches = read_pairs(data, "held", data.pairs["held"], _AT_ONCE)
    found = [embed_pairs(module.clip, *module.inputs(batch)) for batch in batches]
    image, text = (torch.cat(parts) for parts in zip(*found, strict=True))
    phrases, images = phrase_keys(column(batches, "phrase")), column(batches, "image_id")
    own = phrase_keys(images)
    positives = (phrases[:, None] == phrases) | (own[:, None] == own)
    patients = column(batches, "patient_id")
    measured = {
        f"{way}, recall at 10": entry((best_positive_rank(scores, positives) < 10).double(), patients)
        for way, scores in {"image to text": image @ text.T, "text to image": text @ image.T}.items()
    }
    first = [images.index(name) for name in dict.fromkeys(images)]
    prompts = prompt_scores(module, batches, data.findings)[first]
    present = [column(batches, "image_findings")[row] for row in first]
    labels = torch.tensor([[name in names for name in data.findings] for names in present])
    right = labels.gather(1, prompts.argmax(1, keepdim=True))[:, 0].double()
    # Images without a finding have no right answer.
    right[~labels.any(1)] = torch.nan
    return measured | {"zero-shot top-1": entry(right, [patients[row] for row in first])}


def map_values(module: ClipModule, batches: Sequence[ImageTextBatch], num_rise: int) -> Measured:
    """Scores of maps in boxes, and of their change under other phrases and under exchanged sides."""
    others, values, found = other_phrases_of(batches), defaultdict(list), defaultdict(list)
    for number, (batch, other) in enumerate(zip(batches, others, strict=True)):
        rise = number * _AT_ONCE < num_rise
        maps = attributions(module, METHODS | RISE if rise else METHODS, batch)
        swapped = swapped_phrases(batch["phrase"])
        sides = [named_side(phrase) for phrase in batch["phrase"]]
        changed = attributions(module, METHODS, with_phrases(batch, other))
        mirrored = attributions(module, METHODS, with_phrases(batch, swapped))
        for name, shown in maps.items():
            masks = F.masks_of(shown.image, batch["boxes"])
            for metric in IN_BOX:
                values[f"{name}, {metric}"].append(IN_BOXES[metric](shown.image, masks))
            components = F.components(shown.image, _THRESHOLD)
            found[f"{name}, ap50"].append(Detections.of(components, batch["boxes"], shown.score))
            if name in changed:
                alike = F.spearman(shown.grid.flatten(1), changed[name].grid.flatten(1))
                moved = F.side_sensitivity(shown.image, mirrored[name].image, sides, batch["content_box"])
                values[f"{name}, prompt_sensitivity"].append(alike)
                values[f"{name}, side_sensitivity"].append(moved)
    scores = {name: torch.cat(parts) for name, parts in values.items()}
    patients = column(batches, "patient_id")
    measured = {name: entry(score, patients[: len(score)]) for name, score in scores.items()}
    joined = {name: Detections.joined(parts) for name, parts in found.items()}
    return measured | {name: entry(score, patients[: len(score.num_boxes)]) for name, score in joined.items()}


def attributions(
    module: ClipModule, methods: dict[str, AttributionMethod], batch: ImageTextBatch
) -> dict[str, Attribution]:
    """Maps of a batch by method."""
    images, tokens = module.inputs(batch)
    return attribute_methods(
        methods, module.clip, images, tokens, batch["phrase"], batch["content_box"], batch["chest_box"]
    )
