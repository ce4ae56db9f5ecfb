"""The contrastive loss and what validation says about it, against slow loops and open_clip."""

from __future__ import annotations

import doctest
import math
import random
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

from matex_pl.training import scores
from matex_pl.training.distributed import fingerprints, first_of_each
from matex_pl.training.loss import contrastive_loss, same_phrase, sigmoid_loss
from matex_pl.training.scores import ImageTextRecall, ZeroShot, auroc


def _unit(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _slow_loss(image: Tensor, text: Tensor, scale: float, phrases: list[str]) -> float:
    """Mean over rows of minus the mean log-probability of the positives, both ways."""
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for row, query in enumerate(queries):
            logits = [scale * float(query @ key) for key in keys]
            norm = math.log(sum(math.exp(logit) for logit in logits))
            right = [column for column, phrase in enumerate(phrases) if phrase == phrases[row]]
            total -= sum(logits[column] - norm for column in right) / len(right)
    return total / (2 * len(phrases))


def test_loss_is_open_clips_where_all_phrases_differ() -> None:
    image, text, scale = _unit(6), _unit(6, seed=1), torch.tensor(14.0)
    ours = contrastive_loss(image, text, scale, same_phrase([f"phrase {n}" for n in range(6)]))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(image, text, scale))


def test_loss_against_a_loop_with_repeats() -> None:
    phrases = ["a", "b", "a", "c", "b", "a"]
    image, text = _unit(6), _unit(6, seed=1)
    ours = contrastive_loss(image, text, torch.tensor(9.0), same_phrase(phrases))
    assert float(ours) == pytest.approx(_slow_loss(image, text, 9.0, phrases), abs=1e-5)


def test_equal_phrases_of_equal_embeddings_are_plain_clip() -> None:
    """Copies in the denominator cancel those in the target."""
    phrases = ["a", "b", "a", "c", "b", "a"]
    image, apart = _unit(6).requires_grad_(), _unit(3, seed=1).requires_grad_()
    found = []
    for positives in (same_phrase(phrases), torch.eye(6, dtype=torch.bool)):
        text = apart[[0, 1, 0, 2, 1, 0]]
        loss = contrastive_loss(image, text, torch.tensor(9.0), positives)
        found.append([loss, *torch.autograd.grad(loss, (image, apart))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_masked_equal_phrases_are_no_part_of_the_loss() -> None:
    phrases = ["a", "b", "a", "c", "b", "a"]
    image, text, scale, total = _unit(6), _unit(6, seed=1), 9.0, 0.0
    for queries, keys in ((image, text), (text, image)):
        for row, query in enumerate(queries):
            kept = [key for column, key in enumerate(keys) if column == row or phrases[column] != phrases[row]]
            norm = math.log(sum(math.exp(scale * float(query @ key)) for key in kept))
            total -= scale * float(query @ keys[row]) - norm
    ours = contrastive_loss(image, text, torch.tensor(scale), same_phrase(phrases), "masked")
    assert float(ours) == pytest.approx(total / 12, abs=1e-5)
    different = [f"phrase {n}" for n in range(6)]
    plain = open_clip.ClipLoss()(image, text, torch.tensor(scale))
    masked = contrastive_loss(image, text, torch.tensor(scale), same_phrase(different), "masked")
    torch.testing.assert_close(masked, plain)


def test_sigmoid_loss_is_open_clips_where_all_phrases_differ() -> None:
    positives = same_phrase([f"phrase {n}" for n in range(6)])
    parts = [_unit(6), _unit(6, seed=1), torch.tensor(14.0), torch.tensor(-3.0)]
    parts = [part.double().requires_grad_() for part in parts]
    expected = SigLipLoss()(*parts)
    gradients = torch.autograd.grad(expected, parts)
    for equal_phrases in ("positive", "masked"):
        ours = sigmoid_loss(*parts, positives, equal_phrases)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
        for grad, other in zip(torch.autograd.grad(ours, parts), gradients, strict=True):
            torch.testing.assert_close(grad, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("equal_phrases", ["positive", "masked"])
def test_sigmoid_loss_against_a_loop_with_repeats(equal_phrases: str) -> None:
    phrases, scale, bias, total = ["a", "b", "a", "c", "b", "a"], 9.0, -2.0, 0.0
    image, text = _unit(6), _unit(6, seed=1)
    for row, query in enumerate(image):
        for column, key in enumerate(text):
            is_equal = phrases[row] == phrases[column]
            if is_equal and row != column and equal_phrases == "masked":
                continue
            logit = scale * float(query @ key) + bias
            total += math.log(1 + math.exp(-logit if is_equal else logit))
    settings = torch.tensor(scale), torch.tensor(bias), same_phrase(phrases), equal_phrases
    assert float(sigmoid_loss(image, text, *settings)) == pytest.approx(total / 6, abs=1e-5)


def test_repeats_of_one_phrase_cost_nothing_when_they_look_the_same() -> None:
    image = text = torch.eye(2)[[0, 0, 1, 1]]
    loss = contrastive_loss(image, text, torch.tensor(100.0), same_phrase(["x", "x", "y", "y"]))
    # Two equal positives share the probability: log 2, and no more.
    assert float(loss) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_takes_any_dtype(dtype: torch.dtype) -> None:
    image, text = _unit(4).to(dtype).requires_grad_(), _unit(4, seed=1).to(dtype)
    contrastive_loss(image, text, torch.tensor(5.0, dtype=dtype), same_phrase(["a", "b", "a", "c"])).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_same_phrase_ignores_case_and_spaces() -> None:
    same = same_phrase(["Left  effusion. ", "left effusion.", "Left\neffusion.", "Left effusion", "right effusion."])
    expected = torch.eye(5, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(same, expected)


def test_fingerprints_are_the_same_everywhere() -> None:
    assert fingerprints(["a", "b"]).tolist() == [4681665781835383343, -8902839231844102283]
    assert fingerprints([]).shape == (0,)


def _slow_recall(image: Tensor, text: Tensor, images: list[str], phrases: list[str], k: int) -> tuple[float, float]:
    """Recall at k, both ways; a tie with a wrong one counts as lost."""
    rates = []
    for queries, keys in ((image, text), (text, image)):
        hits = 0
        for row, query in enumerate(queries):
            scores = [float(query @ key) for key in keys]
            right = [n for n in range(len(keys)) if images[n] == images[row] or phrases[n] == phrases[row]]
            best = max(scores[n] for n in right)
            hits += sum(scores[n] >= best for n in range(len(keys)) if n not in right) < k
        rates.append(hits / len(queries))
    return rates[0], rates[1]


def _pairs(count: int = 40) -> tuple[Tensor, Tensor, list[str], list[str], list[str]]:
    """Embeddings with exact ties, images with several phrases, phrases on several images."""
    draw = random.Random(0)
    image, text = torch.randint(-1, 2, (2, count, 4), generator=torch.Generator().manual_seed(0)).float()
    ids = [f"pair {n}" for n in range(count)]
    images = [f"image {draw.randrange(count // 2)}" for _ in ids]
    phrases = [f"phrase {draw.randrange(count // 2)}" for _ in ids]
    return image, text, ids, images, phrases


def test_retrieval_against_a_loop() -> None:
    image, text, ids, images, phrases = _pairs()
    metric = ImageTextRecall(ks=(1, 3, 10))
    metric.update(image, text, ids, images, phrases)
    found = metric.compute()
    for k in (1, 3, 10):
        to_text, to_image = _slow_recall(image, text, images, phrases, k)
        assert float(found[f"image_to_text_recall@{k}"]) == pytest.approx(to_text)
        assert float(found[f"text_to_image_recall@{k}"]) == pytest.approx(to_image)


def test_retrieval_in_chunks_equals_the_whole() -> None:
    count = 2100
    image, text = _unit(count, 3), _unit(count, 3, seed=1)
    names = [str(n) for n in range(count)]
    metric = ImageTextRecall(ks=(5,))
    metric.update(image, text, names, names, names)
    scores = image @ text.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    torch.testing.assert_close(metric.compute()["image_to_text_recall@5"], (ranks < 5).float().mean())


def test_pairs_that_come_twice_count_once() -> None:
    image, text, ids, images, phrases = _pairs()
    once, twice = ImageTextRecall(), ImageTextRecall()
    once.update(image, text, ids, images, phrases)
    # As shards of several devices bring them, the end filled up from the start.
    for half in (slice(0, 25), slice(20, 40), slice(0, 3)):
        twice.update(image[half], text[half], ids[half], images[half], phrases[half])
    assert twice.compute() == once.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_halves_merge_to_the_whole() -> None:
    image, text, ids, images, phrases = _pairs()
    whole, first, second = ImageTextRecall(), ImageTextRecall(), ImageTextRecall()
    whole.update(image, text, ids, images, phrases)
    for metric, half in ((first, slice(0, 17)), (second, slice(17, 40))):
        metric.update(image[half], text[half], ids[half], images[half], phrases[half])
    first.merge_state(second)
    assert first.compute() == whole.compute()
    first.reset()
    assert all(value.isnan() for value in first.compute().values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen_is_nan() -> None:
    assert set(ImageTextRecall(ks=(1,)).compute()) == {"image_to_text_recall@1", "text_to_image_recall@1"}
    assert all(value.isnan() for value in [*ImageTextRecall().compute().values(), *ZeroShot(["a"]).compute().values()])


def test_a_model_that_gives_nan_finds_nothing() -> None:
    broken = torch.full((3, 4), torch.nan)
    retrieval = ImageTextRecall(ks=(1,))
    retrieval.update(broken, broken, ["a", "b", "c"], ["a", "b", "c"], ["x", "y", "z"])
    assert all(value == 0 for value in retrieval.compute().values())
    zero_shot = ZeroShot(["edema", "nodule"])
    zero_shot.update(torch.tensor([[0.1, torch.nan], [0.2, 0.3]]), [["edema"], ["nodule"]], ["a", "b"])
    assert all(value.isnan() for value in zero_shot.compute().values())


def _slow_auroc(scores: Tensor, labels: Tensor) -> float:
    pairs = [(p, n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def _graded(count: int = 30) -> tuple[Tensor, list[tuple[str, ...]], list[str]]:
    """Cosines with ties, images with none, one or two of the findings; `c` is on all, `d` on none."""
    scores = torch.randint(-3, 4, (count, 4), generator=torch.Generator().manual_seed(0)) / 10
    draw = random.Random(1)
    names = [(*[name for name in "ab" if draw.random() < 0.4], "c") for _ in range(count)]
    return scores, names, [f"image {n}" for n in range(count)]


def test_zero_shot_against_a_loop() -> None:
    scores, names, images = _graded()
    metric = ZeroShot("abcd")
    metric.update(scores, names, images)
    found = metric.compute()
    best = ["abcd"[int(row.argmax())] for row in scores]
    assert float(found["zero_shot_top1"]) == pytest.approx(sum(b in n for b, n in zip(best, names, strict=True)) / 30)
    told = [_slow_auroc(scores[:, n], torch.tensor(["abcd"[n] in found for found in names])) for n in (0, 1)]
    assert float(found["zero_shot_auroc"]) == pytest.approx(sum(told) / 2)


def test_images_without_a_finding_count_only_as_negatives() -> None:
    metric = ZeroShot(["edema", "nodule"])
    metric.update(
        torch.tensor([[0.3, 0.1], [0.4, 0.2], [0.1, 0.5]]), [["edema"], [], ["nodule", "else"]], ["a", "b", "c"]
    )
    found = metric.compute()
    assert found["zero_shot_top1"] == 1
    # Edema: image a is above c but below b.
    torch.testing.assert_close(found["zero_shot_auroc"], torch.tensor((0.5 + 1.0) / 2))


def test_images_that_come_twice_count_once_and_halves_merge() -> None:
    scores, names, images = _graded()
    whole, first, second = ZeroShot("abcd"), ZeroShot("abcd"), ZeroShot("abcd")
    whole.update(scores, names, images)
    first.update(scores[:20], names[:20], images[:20])
    second.update(scores[10:], names[10:], images[10:])
    first.merge_state(second)
    assert first.compute() == whole.compute()


def test_one_class_findings_give_no_auroc() -> None:
    metric = ZeroShot(["edema", "nodule"])
    metric.update(torch.rand(3, 2), [["edema"]] * 3, ["a", "b", "c"])
    assert metric.compute()["zero_shot_auroc"].isnan()
    metric = ZeroShot(["edema"])
    metric.update(torch.rand(2, 1), [[], []], ["a", "b"])
    assert all(value.isnan() for value in metric.compute().values())


def test_one_finding_alone() -> None:
    metric = ZeroShot(["edema"])
    metric.update(torch.tensor([[0.3], [0.1]]), [["edema"], []], ["a", "b"])
    assert metric.compute() == {"zero_shot_top1": torch.tensor(1.0), "zero_shot_auroc": torch.tensor(1.0)}


def test_auroc_with_ties_and_without_a_class() -> None:
    scores, labels = torch.tensor([0.1, 0.1, 0.2, 0.0]), torch.tensor([True, False, True, False])
    torch.testing.assert_close(auroc(scores, labels), torch.tensor(3.5 / 4))
    assert auroc(scores, torch.ones(4, dtype=torch.bool)).isnan()
    assert auroc(scores, torch.zeros(4, dtype=torch.bool)).isnan()


def test_examples() -> None:
    assert doctest.testmod(scores) == (0, 6)


def test_first_of_each_is_in_order() -> None:
    assert first_of_each(torch.tensor([7, -2, 7, 5, -2, 9])).tolist() == [0, 1, 3, 5]


def _lopsided(rank: int, folder: str) -> None:
    """Scores in two processes of which the first has seen nothing."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    retrieval, zero_shot = ImageTextRecall(ks=(1,)), ZeroShot(["edema", "nodule"])
    if rank:
        retrieval.update(*_pairs())
        zero_shot.update(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), [["edema"], ["nodule"]], ["image 1", "image 2"])
    torch.save({**retrieval.compute(), **zero_shot.compute()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_data_takes_the_scores_of_the_others(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_lopsided, (str(tmp_path),), nprocs=2)
    alone = ImageTextRecall(ks=(1,))
    alone.update(*_pairs())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["zero_shot_top1"] == 1
        assert all(found[name] == value for name, value in alone.compute().items())
