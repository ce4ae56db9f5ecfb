"""Cost of maps: time of each method relative to a plain forward of both towers, and its memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from inspect import isabstract
from itertools import product
from platform import processor
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matex_pl import attribution
from matex_pl.attribution import AttributionMethod, Chefer, DenseSimilarity, Matex, WordRegions
from matex_pl.attribution.core.target import REFERENCES
from matex_pl.clip import Clip, load_clip
from matex_pl.clip.device import find_device, synchronize
from matex_pl.console import progress, show_messages

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Number of phrases on one image, for `attribute_phrases`.
_PHRASES = 16
_FEWEST = 7
# Fewer repeated forwards than by default, which would take minutes per round. The time is proportional to them.
FEWER: dict[str, dict[str, int]] = {
    "IntegratedGradients": {"steps": 2},
    "KernelShap": {"samples": 12},
    "Rise": {"masks": 12},
    "SubmodularRegions": {"regions": 4},
    "WordRegions": {"steps": 2},
}
Call = Callable[..., Any]


def measure_cost(
    model: str = "ViT-B-32",
    batch_size: list[int] | int = 16,
    repeats: int = 9,
    device: str = "auto",
    precision: str = "fp32",
) -> str:
    """Measure the cost of every method on this machine; returns a Markdown table.

    Times are ratios to a plain forward of both towers without gradient, as open_clip runs them, on the same pairs in
    the same round. The methods take turns, which spreads a slow minute of the machine over all of them. Images are
    noise, and phrases are the package's list of findings by side and zone. The weights are random, which does not
    change the time.

    Args:
        model: Name of an open_clip model, or path of a JSON model config.
        batch_size: Number of pairs per call; several, as `[1,16]`, give a table each.
        repeats: Number of rounds after one to warm up, at least 7.
        device: `cpu`, `cuda`, `mps`, or `auto`, which uses a GPU of CUDA if there is one.
        precision: `fp32` or `bf16`, the dtype of the weights.

    Returns:
        A table per batch size with a row per method: median, minimum and maximum of the ratio, for methods that repeat
            forwards the ratio to these forwards alone, pairs per second, and peak memory beyond the model's weights.
            Then the time of 16 phrases on one image, in single pairs, and that of `WordRegions` relative to its
            Jacobians.

    Raises:
        ValueError: If an argument is out of range.
        NotImplementedError: If the maps of one of the towers are not supported.
    """
    sizes = [batch_size] if isinstance(batch_size, int) else batch_size
    if repeats < _FEWEST or not sizes or min(sizes) < 1:
        raise ValueError(f"repeats must be at least {_FEWEST} and batch_size at least 1, got {repeats} and {sizes}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of fp32, bf16, got {precision!r}.")
    place = find_device(device)
    clip = load_clip(model).to(place, PRECISIONS[precision])
    # The mean image does not change the time, but methods that fill with it need one.
    clip.mean_image.fill_(0.5)
    phrases = clip.tokenize(REFERENCES[:_PHRASES])
    lines = [
        f"{model}, {precision}, {_machine(place)}, torch {torch.__version__}; phrases of "
        f"{float(clip.content(phrases).sum(1).float().mean()):.0f} words or pieces, median of {repeats} rounds "
        "(minimum to maximum). Counting the blocks and encoding the references, once per model, is not included."
    ]
    for size in sizes:
        lines += ["", *_table(clip, size, repeats)]
    return "\n".join([*lines, "", _phrases_line(clip, repeats), "", jacobians_line(clip)])


def methods_present() -> dict[str, AttributionMethod]:
    """All methods of the package by their call, with the defaults or with fewer repeated forwards."""
    named: dict[str, AttributionMethod] = {
        "Matex()": Matex(),
        "Matex(grad_layers='all')": Matex(grad_layers="all"),
        "Matex(flow='rollout')": Matex(flow="rollout"),
        "Matex(flow='relevance')": Matex(flow="relevance"),
        "Matex.recommended()": Matex.recommended(),
        "Chefer(start_layer=0), all": Chefer(start_layer=0),
        "DenseSimilarity('sclip')": DenseSimilarity("sclip"),
    }
    for name in attribution.__all__:
        kind = getattr(attribution, name)
        if issubclass(kind, AttributionMethod) and not isabstract(kind) and kind is not Matex:
            settings = FEWER.get(name, {})
            named[f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"] = kind(**settings)
    return named


def _table(clip: Clip, size: int, repeats: int) -> list[str]:
    images, tokens, phrases = explained_pairs(clip, size)
    calls: dict[str, Call] = {
        "plain forward": partial(_plain_forward, clip, images, tokens),
        "the same, phrases without padding": partial(short_forward, clip, images, tokens),
    }
    methods = methods_present()
    calls |= {name: partial(method.attribute, clip, images, tokens, phrases) for name, method in methods.items()}
    own = {
        name: partial(_replay, _recorded(clip, calls[name]))
        for name, method in methods.items()
        if method.perturbs_inputs
    }
    times = interleaved(calls | {f"forwards of {name}": call for name, call in own.items()}, repeats, clip, size)
    lines = [
        f"| batch {size} | time / plain forward | time / its own forwards | pairs per second | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, call in calls.items():
        ratio = ratio_of(times[name], times["plain forward"])
        alone = ratio_of(times[name], times[f"forwards of {name}"]) if name in own else ""
        rate, memory = size / median(times[name]), _peak_memory(call, clip.std.device) / 2**20
        lines.append(f"| {name} | {ratio} | {alone} | {rate:.1f} | {memory:.0f} |")
    return lines


def _recorded(clip: Clip, call: Call) -> list[tuple[Call, Tensor]]:
    """Inputs that a call passes to either tower, with the called functions."""
    seen: list[tuple[Call, Tensor]] = []
    encoders = {name: getattr(clip, name) for name in ("encode_image", "encode_text")}

    def record(encode: Call, inputs: Tensor) -> Tensor:
        seen.append((encode, inputs))
        return encode(inputs)

    for name, encode in encoders.items():
        setattr(clip, name, partial(record, encode))
    try:
        call()
    finally:
        for name in encoders:
            delattr(clip, name)
    return seen


@torch.no_grad()
def _replay(forwards: Sequence[tuple[Call, Tensor]]) -> None:
    for encode, inputs in forwards:
        encode(inputs)


def _phrases_line(clip: Clip, repeats: int) -> str:
    images, tokens, phrases = explained_pairs(clip, _PHRASES)
    method = Matex()
    calls: dict[str, Call] = {
        "many": lambda: method.attribute_phrases(clip, images[0], phrases),
        "single": lambda: method.attribute(clip, images[:1], tokens[:1], phrases[:1]),
    }
    times = interleaved(calls, repeats, clip, _PHRASES)
    ratio = ratio_of(times["many"], times["single"])
    return f"{_PHRASES} phrases on one image (`Matex().attribute_phrases`) cost {ratio} single pairs."


class FullJacobians(WordRegions):
    """The same interactions from both Jacobians, by one backward per number of an embedding, as released."""

    def _interactions(self, image: Any, text: Any) -> Tensor:
        seen, said = (self._pull(line, _basis(line.last)) for line in (image, text))
        return torch.einsum("dbt,dbn->btn", said, seen)


def _basis(embedding: Tensor) -> Tensor:
    """Unit vectors `(D, B, D)` for embeddings `(B, D)`."""
    size = embedding.shape[1]
    return torch.eye(size).to(embedding)[:, None].expand(-1, len(embedding), -1)


def jacobians_line(clip: Clip, repeats: int = 2) -> str:
    """Time of `WordRegions` on a pair, relative to that of its two Jacobians, in a sentence."""
    images, tokens, phrases = explained_pairs(clip, 1)
    methods = {"directions": WordRegions(steps=1), "jacobians": FullJacobians(steps=1)}
    calls: dict[str, Call] = {
        name: partial(method.attribute, clip, images, tokens, phrases) for name, method in methods.items()
    }
    times = interleaved(calls, repeats, clip, 1)
    ratio = ratio_of(times["directions"], times["jacobians"])
    return f"`WordRegions(steps=1)` on one pair costs {ratio} of the backwards for both of its Jacobians."


def explained_pairs(clip: Clip, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images of noise, tokens, and phrases from the list of references."""
    phrases = [REFERENCES[k % len(REFERENCES)] for k in range(size)]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, *clip.image_size, generator=generator).to(clip.std), clip.tokenize(phrases), phrases


@torch.no_grad()
def _plain_forward(clip: Clip, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both towers as open_clip runs them, over the whole context length."""
    return clip.model.encode_image(images), clip.model.encode_text(tokens)


@torch.no_grad()
def short_forward(clip: Clip, images: Tensor, tokens: Tensor) -> Tensor:
    """Both towers as this package runs them; see `towers.encode_text`."""
    return clip.similarity(images, tokens)


def interleaved(calls: dict[str, Call], repeats: int, clip: Clip, size: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, with the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = list(product(range(repeats + 1), calls.items()))
    for turn, (name, call) in progress(turns, f"batch {size}"):
        seconds = _seconds(call, clip.std.device)
        if turn:
            times[name].append(seconds)
    return times


def _seconds(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def ratio_of(times: Sequence[float], base: Sequence[float]) -> str:
    """Median, minimum and maximum of the ratios, round by round."""
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a CPU {processor()}".strip()


def _peak_memory(call: Call, device: torch.device) -> int:
    """Peak bytes of tensors that a call allocates, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as memory:
        call()
    return memory.peak


class TensorMemory(TorchDispatchMode):
    """Context that counts the bytes of tensors created inside it and still alive, and their peak.

    The allocator of the CPU has no such count, and the memory of a process includes freed memory that was not returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count the storages that it created."""
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given | self._seen:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


if __name__ == "__main__":
    show_messages()
    print(auto_cli(measure_cost, as_positional=False))
