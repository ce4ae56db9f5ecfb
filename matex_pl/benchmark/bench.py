"""Benchmark run: a checkpoint, its pairs, and the metric values of each method, cached on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from matex_pl import __version__
from matex_pl.anatomy import prune_phrase
from matex_pl.arguments import check_choice
from matex_pl.attribution import AttributionMethod
from matex_pl.benchmark.evaluate import (
    CONTENTS,
    Values,
    chosen_threshold,
    image_values,
    sanity_check,
    tensors_below,
    text_values,
)
from matex_pl.benchmark.prepare import PreparedBatch, prepare_pairs
from matex_pl.benchmark.protocol import GroundingProtocol, Size
from matex_pl.clip.device import synchronize
from matex_pl.clip.model import Clip
from matex_pl.data import ChestXrayDataModule, ImageTextBatch, ImageTextPair
from matex_pl.evaluation.compared import BUDGETS, MethodEntry, mean_box_row
from matex_pl.evaluation.intervals import Sums
from matex_pl.evaluation.pairs import choose_pairs, model_inputs, prepare_data, read_pairs, with_phrases
from matex_pl.evaluation.store import MapStore, fill_store, pair_keys, weight_hash
from matex_pl.evaluation.tensors import fingerprint, read_head, read_tensors, write_tensors

# Number of training pairs for the mean boxes.
_MEAN_OF = 512
_TIMED_PAIRS = 4


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark; see `run_benchmark`."""

    split: str
    num_pairs: int
    validation_pairs: int
    sanity_pairs: int
    batch_size: int
    budget: str
    steps: int
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        check_choice("split", self.split, ("test", "val"))
        check_choice("budget", self.budget, BUDGETS)
        for name, least in (
            ("validation_pairs", 1),
            ("sanity_pairs", 1),
            ("batch_size", 1),
            ("resamples", 100),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.num_pairs != -1 and self.num_pairs < 2:
            raise ValueError(f"num_pairs must be at least 2, or -1 for all pairs, got {self.num_pairs}.")
        if not 1 <= self.steps <= 32:
            raise ValueError(f"steps must be from 1 to 32, got {self.steps}.")


@dataclass
class MethodResult:
    """A method with the metric values of its maps.

    Args:
        row: Entry of the method.
        store: Store of the method's maps.
        values: Values by modality: `image` and, if the method has text maps, `text`; empty if it does not support the
            model.
        seconds: Seconds per map.
        forward_seconds: Seconds of a plain forward of both towers for one pair, measured in the same run.
        error: Reason for not supporting the model, or an empty string.
    """

    row: MethodEntry
    store: MapStore
    values: dict[str, Values] = field(default_factory=dict)
    seconds: float = 0.0
    forward_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class BenchmarkRun:
    """A checkpoint and the pairs on which methods are compared.

    Args:
        clip: CLIP model, on its device.
        weights: `weight_hash` of the model.
        data: Data module.
        pairs: The n pairs.
        batches: The same pairs in batches.
        validation: Pairs on which thresholds are chosen.
        thorax: `(H, W)` bool, usual place of lungs and heart; None if the data module has none.
        folder: Folder of maps and values.
        settings: Settings of the run.
        protocol: Published protocol that scores the maps in addition; None without one.
        sizes: Height and width of the stored image of each pair; empty without a protocol.
    """

    clip: Clip
    weights: str
    data: ChestXrayDataModule
    pairs: list[ImageTextPair]
    batches: list[PreparedBatch]
    validation: list[PreparedBatch]
    thorax: Tensor | None
    folder: Path
    settings: Settings
    protocol: GroundingProtocol | None = None
    sizes: list[Size] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        clip: Clip,
        data: ChestXrayDataModule,
        folder: Path,
        settings: Settings,
        protocol: GroundingProtocol | None = None,
    ) -> BenchmarkRun:
        """Select, read and embed the pairs.

        Raises:
            ValueError: The split has too few pairs, or `protocol` cannot score them.
        """
        prepare_data(data, clip.image_size, settings.split, "val")
        if clip.mean_image.isnan().any():
            prepare_data(data, clip.image_size, "train")
            clip.mean_image.copy_(data.mean_image())
        pairs = choose_pairs(data, settings.split, settings.num_pairs, settings.seed)
        if protocol is not None:
            protocol.check(pairs, type(data).__name__)
        held_out = choose_pairs(data, "val", settings.validation_pairs, settings.seed)
        size = settings.batch_size
        return cls(
            clip=clip,
            weights=weight_hash(clip),
            data=data,
            pairs=pairs,
            batches=prepare_pairs(clip, read_pairs(data, settings.split, pairs, size), settings.seed),
            validation=prepare_pairs(clip, read_pairs(data, "val", held_out, size), settings.seed),
            thorax=data.thorax(),
            folder=folder,
            settings=settings,
            protocol=protocol,
            sizes=_stored_sizes(data, settings.split, pairs) if protocol is not None else [],
        )

    @property
    def boxes(self) -> list[list[list[float]]]:
        """Boxes of the n pairs and of the validation pairs."""
        return [box.tolist() for batch in [*self.batches, *self.validation] for box in batch.batch["boxes"]]

    def mean_box_row(self) -> list[MethodEntry]:
        """Entry of the mean box of each finding over training images; empty without training boxes."""
        if not self.data.pairs["train"]:
            return []
        pairs = [pair for pair in choose_pairs(self.data, "train", _MEAN_OF, self.settings.seed) if pair.boxes]
        train = read_pairs(self.data, "train", pairs, self.settings.batch_size)
        compared = [batch.batch for batch in [*self.batches, *self.validation]]
        if self.protocol is not None and self.protocol.prune_phrases:
            compared += self._explained[0]
        return mean_box_row(train, compared, self.clip.image_size)

    def score(self, row: MethodEntry) -> MethodResult:
        """Metric values of a method's maps, computed once and cached on disk."""
        result = MethodResult(row, MapStore(self.folder / "maps", self.weights, row.method))
        path = self.folder / "values" / f"{self._key(result.store)}.safetensors"
        stages, size = path.with_suffix(".stages.safetensors"), self.settings.batch_size
        try:
            for batch in self.batches:
                fill_store(self.clip, row.method, result.store, *batch.variants(), size)
            for batch in self.validation:
                fill_store(self.clip, row.method, result.store, batch.batch, batch.keys, size)
            if read_head(path) is None:
                write_tensors(path, *self._computed(row.method, result.store, stages))
            by_protocol = self._protocol_values(row.method, result.store)
        except NotImplementedError as error:
            result.error = str(error)
            return result
        stages.unlink(missing_ok=True)
        tensors, head = read_tensors(path)
        result.seconds, result.forward_seconds = head.pop("seconds")
        for modality, rest in head.items():
            result.values[modality] = Values(tensors_below(tensors, modality), **rest)
        result.values["image"].add_sums({f"protocol/{name}": Sums.of(value) for name, value in by_protocol.items()})
        return result

    @cached_property
    def _explained(self) -> tuple[list[ImageTextBatch], list[list[str]]]:
        """Batches with the phrases of the protocol, and the keys of their maps."""
        if self.protocol is None or not self.protocol.prune_phrases:
            return [batch.batch for batch in self.batches], [batch.keys for batch in self.batches]
        pruned = [with_phrases(batch.batch, list(map(prune_phrase, batch.batch["phrase"]))) for batch in self.batches]
        return pruned, [pair_keys(batch) for batch in pruned]

    def _protocol_values(self, method: AttributionMethod, store: MapStore) -> dict[str, Tensor]:
        """Scores `(n,)` by the protocol, in a file of their own; empty without a protocol.

        Only pruned phrases need maps that the other scores do not need.
        """
        if self.protocol is None:
            return {}
        batches, keys = self._explained
        about = {"protocol": self.protocol.plain, "maps": store.key, "pairs": keys, "sizes": self.sizes}
        about |= {"boxes": [[pair.finding, pair.boxes] for pair in self.pairs], "version": __version__}
        path = self.folder / "values" / f"{fingerprint(about)}.safetensors"
        if read_head(path) is None:
            parts, start = [], 0
            for batch, names in zip(batches, keys, strict=True):
                fill_store(self.clip, method, store, batch, names, self.settings.batch_size)
                rows = slice(start, start := start + len(names))
                grid = store.read_units(names)["grid"]
                parts.append(self.protocol.values(grid, batch["content_box"], self.pairs[rows], self.sizes[rows]))
            write_tensors(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, {})
        return read_tensors(path)[0]

    def _key(self, store: MapStore) -> str:
        """Hash of everything that determines the values."""
        return fingerprint(
            {
                "format": 5,
                "maps": store.key,
                "pairs": [batch.keys for batch in [*self.batches, *self.validation]],
                "phrases": [[batch.other, batch.swapped] for batch in self.batches],
                "boxes": self.boxes,
                "masks": self._masks_hash(),
                "thorax": None if self.thorax is None else self.thorax.int().flatten().tolist(),
                "settings": [self.settings.steps, self.settings.sanity_pairs, self.settings.seed],
                "version": __version__,
            }
        )

    def _masks_hash(self) -> list[str]:
        """Hash of the masks of each batch, with the phrases of their control."""
        found = []
        for batch in self.batches:
            digest = blake2b(json.dumps(batch.shuffled).encode(), digest_size=10)
            for name, mask in sorted(batch.batch["masks"].items()):
                digest.update(name.encode() + mask.numpy().tobytes())
            found.append(digest.hexdigest())
        return found

    def _computed(
        self, method: AttributionMethod, store: MapStore, path: Path
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Values of both modalities and the cost. The sanity check caches its stages in `path`."""
        threshold = chosen_threshold(store, self.validation, self.clip.image_size)
        values = {"image": image_values(self.clip, store, self.batches, threshold, self.thorax, self.settings.steps)}
        if method.supports_text:
            values["text"] = text_values(self.clip, store, self.batches)
        number = self.settings.sanity_pairs
        starts = range(0, number, self.settings.batch_size)
        few = [batch.part(0, number - start) for start, batch in zip(starts, self.batches, strict=False)]
        stages = sanity_check(self.clip, method, store, few, self.settings.seed, path)
        tensors: dict[str, Tensor] = {}
        head: dict[str, Any] = {"seconds": self._time(method)}
        for modality, part in values.items():
            for suffix in CONTENTS if modality == "text" else [""]:
                part.add_sanity(stages[modality + suffix], len(self.pairs), suffix)
            tensors |= {f"{modality}/{name}": tensor for name, tensor in part.tensors.items()}
            head[modality] = {"threshold": part.threshold, "stages": part.stages}
        return tensors, head

    def _time(self, method: AttributionMethod) -> list[float]:
        """Seconds per pair of the method, and of a plain forward of both towers, measured in alternation."""
        batch = self.batches[0].part(0, _TIMED_PAIRS).batch
        images, tokens = model_inputs(self.clip, batch)
        phrases, boxes = batch["phrase"], [batch[name].to(images.device) for name in ("content_box", "chest_box")]

        def explain() -> None:
            method.attribute(self.clip, images, tokens, phrases, *boxes)

        @torch.no_grad()
        def forward() -> None:
            self.clip.similarity(images, tokens)

        device = images.device
        # The first calls on a GPU choose kernels and reserve memory.
        forward()
        if not method.perturbs_inputs or device.type == "cuda":
            explain()
        number = 1 if method.perturbs_inputs else 3
        rounds = [(_seconds(explain, device), _seconds(forward, device)) for _ in range(number)]
        return [median(column) / len(phrases) for column in zip(*rounds, strict=True)]


def _stored_sizes(data: ChestXrayDataModule, split: str, pairs: list[ImageTextPair]) -> list[Size]:
    """Height and width of the stored image of each pair; an image of unknown size is opened."""
    transform = data.dataset(split).transform
    return [pair.size or data.open_image(pair, transform).size for pair in pairs]


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
