"""`benchmarks/cost.py`: a table per batch size with a row per method, and memory that is counted right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family
from test_matex import pairs

from matex_pl.attribution import Matex, WordRegions
from matex_pl.clip import load_clip

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from cost import FullJacobians, TensorMemory, measure_cost, methods_present

MIB = 2**20


@pytest.fixture
def deep_json(tmp_path: Path) -> str:
    """Eight image blocks and a short text tower."""
    vision = {"image_size": 64, "patch_size": 8, "width": 64, "head_width": 16, "layers": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path = tmp_path / "deep.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), encoding="utf-8")
    return str(path)


def test_the_table(deep_json: str) -> None:
    text = measure_cost(deep_json, [1, 3], repeats=7, device="cpu")
    assert re.search(r"fp32, \d+ threads of a CPU", text)
    for size in (1, 3):
        assert f"| batch {size} | time / plain forward |" in text
    spread = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    rows = re.findall(rf"^\| (\S.*?) \| {spread} \| [^|]*\| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    names = [row[0] for row in rows]
    assert names == ["plain forward", "the same, phrases without padding", *methods_present()] * 2
    for name, mid, low, high, rate, _ in rows:
        assert float(low) <= float(mid) <= float(high)
        assert float(rate) > 0
        assert name != "plain forward" or mid == "1.00"
    for name in ("KernelShap", "Rise", "SubmodularRegions"):
        assert re.search(rf"^\| {name}\(.*?\) \| {spread} \| {spread} \|", text, re.MULTILINE)
    assert not re.search(rf"^\| M2ib\(.*?\) \| {spread} \| {spread} \|", text, re.MULTILINE)
    assert re.search(
        r"^16 phrases on one image .* cost [\d.]+ \([\d.]+ to [\d.]+\) single pairs\.$", text, re.MULTILINE
    )
    assert re.search(
        r"^`WordRegions\(steps=1\)` on one pair costs [\d.]+ .* both of its Jacobians\.$", text, re.MULTILINE
    )


def test_both_jacobians_give_the_same_interactions() -> None:
    clip = family("native", torch.float64)
    inputs = pairs(clip)
    one, other = (kind(steps=2).attribute(clip, *inputs) for kind in (WordRegions, FullJacobians))
    torch.testing.assert_close(one.interactions, other.interactions, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 3}, "repeats must be at least 7"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
        ({"model": "ViT-B/32"}, "Unknown model"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_cost(**settings)


def test_every_method_has_a_row() -> None:
    kinds = {type(method).__name__ for method in methods_present().values()}
    assert {"Matex", "CenterMap", "PriorOnly"} <= kinds


def test_memory_counts_what_is_alive() -> None:
    with TensorMemory() as memory:
        first = torch.zeros(MIB)
        second = first + 1
        assert memory.alive == 8 * MIB
        del first
        assert memory.alive == 4 * MIB
        second.view(-1)[:10].add_(1)
        assert (memory.alive, memory.peak) == (4 * MIB, 8 * MIB)
        weight = torch.ones(MIB, requires_grad=True)
        torch.autograd.grad((weight * second).exp().sum(), weight)
        assert memory.alive == 8 * MIB
        assert memory.peak > 16 * MIB


def test_the_prefix_is_not_kept(deep_json: str) -> None:
    """What a map holds at its peak grows with the blocks that have gradients, not with those before."""
    clip = load_clip(deep_json)
    images, phrases = torch.randn(16, 3, 64, 64), ["left base"] * 16
    tokens = clip.tokenize(phrases)

    def peak(layers: int) -> int:
        with TensorMemory() as memory:
            Matex(grad_layers=layers).attribute(clip, images, tokens, phrases)
        return memory.peak

    one, two, three, every = (peak(layers) for layers in (1, 2, 3, 8))
    assert three - two == pytest.approx(two - one, rel=0.2)
    assert every - three > 4 * (two - one)


def test_memory_is_linear_in_the_batch() -> None:
    clip = family("square")
    clip.encode_text(clip.tokenize(["mass"]))

    def peak(size: int) -> int:
        phrases = ["left base"] * size
        with TensorMemory() as memory:
            Matex().attribute(clip, torch.zeros(size, 3, 32, 32), clip.tokenize(phrases), phrases)
        return memory.peak

    assert peak(32) < 2.1 * peak(16)
