"""Base of all data modules: splits of pairs, reproducible loaders, and the mean image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_deprecation, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from matex_pl.arguments import check_choices
from matex_pl.console import progress
from matex_pl.data.cache import ImageCache
from matex_pl.data.images import GrayImage, read_image
from matex_pl.data.pair import (
    ImageTextBatch,
    ImageTextPair,
    Sample,
    UnreadablePair,
    collate,
    collate_readable,
    from_bits,
    with_bits,
)
from matex_pl.data.transforms import ImageTransform, ResizeMode
from matex_pl.data.validation import RowWarning, log_warnings, pair_warnings, set_warnings

SPLITS = ("train", "val", "test")
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
"""Splits that each stage of a trainer reads."""

_MEAN_IMAGE_FROM = 512
_READ_AT_ONCE = 16
_RESIZE_MODES: dict[str, ResizeMode] = {"pad": "longest", "crop": "shortest", "squash": "squash"}


def _rounds(trainer: Any) -> bool:
    """Whether a running trainer casts the numbers of a batch to half precision, before any hook sees them."""
    if trainer is None or trainer.state.status != TrainerStatus.RUNNING:
        return False
    plugin = trainer.precision_plugin
    return bool(plugin.convert_input(torch.ones(1)).dtype.itemsize < torch.float32.itemsize)


class PairDataset(Dataset[Sample]):
    """Dataset of pairs: `data` reads their pixels, and `transform` fits them into the model's frame.

    Args:
        data: Data module.
        pairs: Pairs.
        transform: Transform into the model's frame.
        masks: Whether to read the masks of the images.
    """

    def __init__(
        self,
        data: ChestXrayDataModule,
        pairs: Sequence[ImageTextPair],
        transform: ImageTransform,
        *,
        masks: bool = True,
    ) -> None:
        self.data = data
        self.pairs = pairs
        self.transform = transform
        self.masks = masks
        if masks:
            data.prepare_masks(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """A sample by index, or by (epoch, index), which then seed augmentation and `draw_pair`."""
        sample = self._read(key)
        if isinstance(sample, UnreadablePair):
            raise sample.error()
        return sample

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample | UnreadablePair]:
        """The samples of a batch of a loader.

        A loader's worker returns an error as a value. torch would put the worker's traceback into the message.
        """
        return [self._read(key) for key in keys]

    def _read(self, key: int | tuple[int, int]) -> Sample | UnreadablePair:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pair = self.pairs[index]
        seed = int(np.random.SeedSequence((self.data.seed, epoch, index)).generate_state(1)[0])
        if isinstance(key, tuple):
            pair = self.data.draw_pair(pair, seed)
        try:
            image = self.data.open_image(pair, self.transform)
            masks = self.data.open_masks(pair, self.transform) if self.masks else {}
            return Sample(pair, *self.transform(image.pixels, pair.boxes, size=image.size, seed=seed, masks=masks))
        except (OSError, ValueError, ImportError) as error:
            kind = ImportError if isinstance(error, ImportError) else ValueError
            return UnreadablePair(pair, str(error), kind)

    def readable(self, keys: Sequence[int]) -> list[Sample]:
        """The samples of these indices, without pairs that the data module leaves out."""
        samples = []
        for sample in self.__getitems__(keys):
            if isinstance(sample, UnreadablePair):
                self.data.leave_out(sample)
            else:
                samples.append(sample)
        return samples

    def batch(self, ids: Sequence[str]) -> ImageTextBatch:
        """The named pairs as one batch, in the order of `ids`, without pairs that the data module leaves out.

        Raises:
            KeyError: There is no pair of this id.
            ValueError: There are no ids, or no image can be read.
        """
        if not ids:
            raise ValueError("A batch needs at least one pair id, got none.")
        place = {pair.id: index for index, pair in enumerate(self.pairs)}
        missing = [name for name in ids if name not in place]
        if missing:
            raise KeyError(f"No pair {missing[0]!r} among {len(place)}, e.g. {next(iter(place), 'none')!r}.")
        samples = self.readable([place[name] for name in ids])
        if not samples:
            raise ValueError(f"None of the images of the pairs {', '.join(ids)} can be read. Run `matex check-data`.")
        return collate(samples)


class EpochSampler(DistributedSampler):
    """Sampler that shuffles by seed and epoch alone and yields (epoch, index).

    A resumed run therefore reads the same samples as an uninterrupted run, with any number of workers. Lightning calls
    `set_epoch`. Each of W processes takes every W-th pair of the same order, without the remainder. A step of all
    processes therefore has the same pairs as a step of one process with a batch W times as large.
    """

    def __init__(self, dataset: PairDataset, seed: int) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        count, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        if len(dataset) < count:
            raise ValueError(f"There are {len(dataset)} training pairs for {count} processes. Use fewer processes.")
        self.num_pairs = len(dataset)
        # Pairs of this process at the start of an epoch that a resumed run has seen already.
        self.seen: dict[int, int] = {}
        super().__init__(dataset, num_replicas=count, rank=rank, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator)[: self.total_size]
        own = order[self.rank :: self.num_replicas][self.seen.pop(self.epoch, 0) :]
        return ((self.epoch, index) for index in own.tolist())


class EpochLoader(DataLoader):
    """Loader that calls its sampler and starts its workers at the first batch, not at `iter`.

    Lightning calls `iter` before it sets the epoch of a resumed run. Workers would then read images of epoch 0.

    Pairs whose images cannot be read raise an error, or the data module leaves them out. A batch of validation or test
    without any other pair is left out. In training such a batch raises an error, because Lightning counts batches. An
    epoch without any image raises an error, too.

    A checkpoint stores the state of the training loader. A run that resumes within an epoch reads the remaining
    batches.
    """

    _pair_hash: str | None = None

    def __iter__(self) -> Iterator[ImageTextBatch]:  # type: ignore[override]
        data = self.dataset.data  # type: ignore[attr-defined]
        is_empty, last = True, len(self)
        if isinstance(self.sampler, EpochSampler):
            # A run that resumes within an epoch reads the remaining batches.
            last -= self.sampler.seen.get(self.sampler.epoch, 0) // (self.batch_size or 1)
        try:
            for place, (batch, unreadable) in enumerate(super().__iter__(), start=1):
                for pair in unreadable:
                    data.leave_out(pair)
                if batch is not None:
                    is_empty = False
                    if place == last:
                        # Lightning may keep the iterator after the last batch.
                        data.list_left_out()
                    yield with_bits(batch) if _rounds(data.trainer) else batch
                elif isinstance(self.sampler, EpochSampler) or (is_empty and place == last):
                    raise ValueError(f"No image of a whole batch can be read. The first error: {unreadable[0].error()}")
        finally:
            data.list_left_out()

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and the facts that decide its batches; Lightning counts the batches. Empty without an epoch."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            return {}
        if self._pair_hash is None:
            data: Any = self.dataset
            names = "\n".join(pair.id for pair in data.pairs)
            self._pair_hash = blake2b(names.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return {
            "epoch": sampler.epoch,
            "seed": sampler.seed,
            "pairs": sampler.num_pairs,
            "ids": self._pair_hash,
            "pairs_per_step": (self.batch_size or 1) * sampler.num_replicas,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches of a checkpoint's epoch that were trained on, `state["batches"]`.

        Raises:
            ValueError: The batches of the epoch were others, by the pairs, the seed or the size of a step.
        """
        if isinstance(self.sampler, EpochSampler) and state.get("batches"):
            changed = [f"{name}: {state.get(name)} then, {now} now" for name, now in self.changes(state).items()]
            if changed:
                raise ValueError(
                    f"The checkpoint is from the middle of an epoch, after {state['batches']} batches, and the data "
                    f"changed since: {', '.join(changed)}. The remaining batches are unknown. Resume with the same "
                    "data, or from a checkpoint at the end of an epoch."
                )
            self.sampler.seen = {state["epoch"]: state["batches"] * (self.batch_size or 1)}

    def changes(self, state: dict[str, Any]) -> dict[str, Any]:
        """Facts that decide the batches of an epoch and differ from those of a `state_dict`, with their value now."""
        return {name: now for name, now in self.state_dict().items() if name != "epoch" and state.get(name) != now}


class ChestXrayDataModule(LightningDataModule, ABC):
    """Base of the data modules: a subclass lists its pairs and reads an image.

    Without a trainer, give `image_size`, call `setup("fit")`, and use `dataset("val")` or the loaders.

    Args:
        image_size: Side of the model's square input in pixels, or height and width; the model's own by default.
        batch_size: Number of pairs per batch and process.
        num_workers: Number of processes that read and augment images.
        resize_mode: How an image is fitted into the model's frame: `longest` fits its longest side and pads with black,
            `shortest` fits its shortest side and crops to the middle, `squash` stretches it.
        augment: Whether to apply mild geometric and intensity changes in training, never a horizontal flip.
        seed: Random seed of shuffling, augmentation, splits, and all other draws of the data module.
        geometry: Deprecated name of `resize_mode`, with `pad` for `longest` and `crop` for `shortest`.
    """

    pairs: dict[str, list[ImageTextPair]]

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 64,
        num_workers: int = 1,
        resize_mode: ResizeMode = "longest",
        augment: bool = True,
        seed: int = 0,
        geometry: Literal["pad", "crop", "squash"] | None = None,
    ) -> None:
        super().__init__()
        check_choices(ChestXrayDataModule.__init__, locals())
        if geometry is not None:
            resize_mode = _RESIZE_MODES[geometry]
            rank_zero_deprecation(f"geometry: {geometry} is deprecated. Write resize_mode: {resize_mode}.")
        if batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, because contrastive training needs negatives, got {batch_size}."
            )
        if seed < 0 or num_workers < 0:
            raise ValueError(f"seed and num_workers must not be negative, got {seed} and {num_workers}.")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        ImageTransform(self.image_size or (8, 8))
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.resize_mode = resize_mode
        self.augment = augment
        self.seed = seed
        self.pairs = {}

    @abstractmethod
    def list_pairs(self) -> list[ImageTextPair]:
        """All pairs of all splits, without reading pixels."""

    @abstractmethod
    def read_image(self, pair: ImageTextPair) -> np.ndarray:
        """Pixels of a pair's image, `(h, w)` uint8."""

    def read_masks(self, pair: ImageTextPair) -> Mapping[str, np.ndarray]:
        """Masks `(h, w)` bool of a pair's image by structure: `left_lung`, `right_lung`, `heart`, and others.

        Sides are the patient's. None by default.
        """
        return {}

    def has_masks(self, pair: ImageTextPair) -> bool:
        """Whether `read_masks` finds masks of a pair's image."""
        return type(self).read_masks is not ChestXrayDataModule.read_masks

    @property
    def masks_in_training(self) -> bool:
        """Whether the module of the trainer needs masks of the training images, for its guidance."""
        return bool(getattr(getattr(self.trainer, "lightning_module", None), "needs_masks", False))

    def open_masks(self, pair: ImageTextPair, transform: ImageTransform) -> Mapping[str, np.ndarray]:
        """Masks of a pair for a transform, possibly already resized for the transform."""
        return self.read_masks(pair)

    def prepare_masks(self, pairs: Sequence[ImageTextPair]) -> None:
        """Compute the masks that `read_masks` reads, once; does nothing by default."""

    def draw_pair(self, pair: ImageTextPair, seed: int) -> ImageTextPair:
        """The pair for one epoch of training, e.g. with another sentence; `seed` depends on epoch and pair."""
        return pair

    def phrases_of(self, pair: ImageTextPair) -> list[str]:
        """All phrases that `draw_pair` may give a pair."""
        return [pair.phrase]

    def open_image(self, pair: ImageTextPair, transform: ImageTransform) -> GrayImage:
        """Image of a pair for a transform, possibly already resized for the transform."""
        pixels = self.read_image(pair)
        return GrayImage(pixels, (pixels.shape[0], pixels.shape[1]))

    def leave_out(self, unreadable: UnreadablePair) -> None:
        """Raise the error of a pair whose image cannot be read; a subclass may leave the pair out."""
        raise unreadable.error()

    def list_left_out(self) -> None:
        """List the pairs that `leave_out` collected, at the end of an epoch; does nothing by default."""

    def list_warnings(self, pairs: Sequence[ImageTextPair]) -> list[RowWarning]:
        """Warnings about the pairs of `list_pairs`, without reading pixels."""
        return [*pair_warnings(pairs), *set_warnings(pairs)]

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the findings that the images are labeled with, sorted."""
        return tuple(sorted({name for split in self.pairs.values() for pair in split for name in pair.image_findings}))

    def setup(self, stage: str) -> None:
        """List the pairs and log warnings about them, on the first call only.

        Raises:
            ValueError: A split that this stage needs is empty, a training split has one pair, an id is not unique, or a
                pair is in no known split.
        """
        if not self.pairs:
            pairs = self.list_pairs()
            self.pairs = by_split(pairs)
            log_warnings(self.list_warnings(pairs))
        self.check_splits(stage, self.pairs, training=self.trainer is not None)

    def check_splits(self, stage: str, pairs: Mapping[str, Sequence[ImageTextPair]], *, training: bool) -> None:
        """Raise ValueError if a stage cannot start with these pairs per split.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            pairs: Pairs by split.
            training: Whether `fit` trains, and does not only read the pairs.
        """
        counts = {name: len(members) for name, members in pairs.items()}
        # Lightning passes a member of its enumeration.
        command = TrainerFn(stage).value
        for split in STAGES[command]:
            if not pairs[split]:
                raise ValueError(
                    f"{type(self).__name__} has no {split} pairs, which {command!r} needs. Pairs: {counts}."
                )
        if training and command == "fit" and counts["train"] == 1:
            raise ValueError(
                f"{type(self).__name__} has one train pair, and contrastive training needs at least two: the loss of "
                f"one pair is always 0. Pairs per split: {counts}."
            )

    def dataset(self, split: str, *, augment: bool = False, masks: bool | None = None) -> PairDataset:
        """The pairs of a split with their pixels.

        Args:
            split: `train`, `val` or `test`.
            augment: Whether to augment images, boxes and masks.
            masks: Whether to read masks; by default in `val` and `test`, and in `train` for a guidance by anatomy.
        """
        pairs = self._listed()[split]
        transform = ImageTransform(self._frame(), self.resize_mode, augment=augment)
        if masks is None:
            masks = split != "train" or self.masks_in_training
        return PairDataset(self, pairs, transform, masks=masks)

    def _listed(self) -> dict[str, list[ImageTextPair]]:
        if not self.pairs:
            name = type(self).__name__
            raise RuntimeError(f"{name} has listed no pairs yet. Call setup('fit') or setup('test') first.")
        return self.pairs

    def _frame(self) -> tuple[int, int]:
        if self.image_size is not None:
            return self.image_size
        if self.trainer is None or self.trainer.lightning_module is None:
            raise ValueError("image_size is not set and there is no model to take it from. Pass image_size, e.g. 224.")
        clip: Any = self.trainer.lightning_module.clip
        return clip.image_size

    def mean_image(self) -> Tensor:
        """Position-wise mean of up to 512 training images in the model's frame, `(1, H, W)` in [0, 1]."""
        data = self.dataset(next(name for name in SPLITS if self._listed()[name]), masks=False)
        images = {pair.image_id: index for index, pair in enumerate(data.pairs)}
        chosen = sorted(images.values())[:: math.ceil(len(images) / _MEAN_IMAGE_FROM)]
        parts = [chosen[start : start + _READ_AT_ONCE] for start in range(0, len(chosen), _READ_AT_ONCE)]
        title = f"images for the mean image, by {_READ_AT_ONCE}"
        samples = [sample for part in progress(parts, title) for sample in data.readable(part)]
        if not samples:
            raise ValueError(
                f"None of {len(chosen)} images for the mean training image can be read. Run `matex check-data`."
            )
        return torch.stack([sample.image[:1] for sample in samples]).float().mean(0) / 255

    def thorax(self) -> Tensor | None:
        """Mask `(H, W)` bool of lungs and heart in the model's frame, for `attribution/outside_thorax_mass`.

        None by default. A data module that has masks of the body or the lungs overrides this method.
        """
        return None

    def train_dataloader(self) -> DataLoader:
        """Training pairs, shuffled by seed and epoch; an incomplete last batch is dropped if there are others."""
        data = self.dataset("train", augment=self.augment)
        sampler = EpochSampler(data, self.seed)
        return self._loader(data, sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Validation pairs, in order."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader:
        """Test pairs, in order."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader:
        """Test pairs, in order."""
        return self.test_dataloader()

    def _loader(self, data: PairDataset, sampler: EpochSampler | None = None, *, drop_last: bool = False) -> DataLoader:
        return EpochLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Without a trainer, or with one on the CPU, pinned memory would only cost a copy.
            pin_memory=isinstance(getattr(self.trainer, "accelerator", None), CUDAAccelerator),
            collate_fn=collate_readable,
            # A separate generator: iterating draws nothing from the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Restore boxes that the trainer's precision rounded, then call the module's own hook."""
        batch = from_bits(batch) if isinstance(batch, Mapping) else batch
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the trainer, which cannot be pickled for a spawned worker."""
        return {**self.__dict__, "trainer": None}


class ImageFilesDataModule(ChestXrayDataModule):
    """Base of the data modules whose images are files: `ImageTextPair.image` is a path. A subclass lists its pairs.

    Args:
        cache_dir: Folder for decoded, resized images, so each file is decoded only once; none by default. If the folder
            becomes full or read-only, training continues with a warning.
        kwargs: Arguments of `ChestXrayDataModule`.
    """

    apply_exif_orientation = True
    """Whether images are turned by the EXIF orientation of their files. Boxes refer to the turned image."""

    def __init__(self, cache_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache = ImageCache(Path(cache_dir)) if cache_dir else None

    def setup(self, stage: str) -> None:
        """List the pairs, on the first call only, and warn of boxes that a crop cuts.

        Raises:
            OSError: `cache_dir` is not writable and holds no images.
            ValueError: As in `ChestXrayDataModule.setup`; or a box covers nothing of its image.
        """
        if self.cache is not None:
            self.cache.prepare()
        super().setup(stage)
        # Without a model and a size there is no frame yet.
        if self.resize_mode == "shortest" and (self.image_size is not None or self.trainer is not None):
            boxed = [pair for split in STAGES[stage] for pair in self.pairs[split] if pair.boxes and pair.size]
            cut, lost = count_cut_boxes(ImageTransform(self._frame(), self.resize_mode), boxed)
            if cut:
                total = sum(len(pair.boxes) for pair in boxed)
                rank_zero_warn(
                    f"resize_mode: shortest cuts {cut} of {total} boxes, {lost} of them wholly. Set resize_mode: "
                    "longest to keep all boxes."
                )

    def read_image(self, pair: ImageTextPair) -> np.ndarray:
        """Pixels of an image, `(h, w)` uint8, at the size of its file."""
        return read_image(str(pair.image), apply_exif_orientation=self.apply_exif_orientation).pixels

    def open_image(self, pair: ImageTextPair, transform: ImageTransform) -> GrayImage:
        """Image of a pair at the size that the transform needs, from the cache if there is one."""
        path, target_size, turn = str(pair.image), transform.target_size, self.apply_exif_orientation
        if self.cache is None:
            return read_image(path, target_size, apply_exif_orientation=turn)
        return self.cache.read(path, target_size, transform.settings, apply_exif_orientation=turn)


def count_cut_boxes(transform: ImageTransform, pairs: Iterable[ImageTextPair]) -> tuple[int, int]:
    """Number of boxes that a crop cuts, and number of boxes that it removes wholly, in the pairs of known size."""
    counts = [transform.count_cut(pair.boxes, pair.size) for pair in pairs if pair.size]
    return sum(cut for cut, _ in counts), sum(lost for _, lost in counts)


def by_split(pairs: Sequence[ImageTextPair]) -> dict[str, list[ImageTextPair]]:
    """The pairs by split; raise ValueError if an id is not unique or a split is unknown."""
    repeated = [name for name, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} pair ids are not unique, e.g. {', '.join(repeated[:3])}. Give unique ids.")
    for pair in pairs:
        if pair.split not in SPLITS:
            raise ValueError(f"Pair {pair.id!r} is in the split {pair.split!r}, expected one of {', '.join(SPLITS)}.")
    return {split: [pair for pair in pairs if pair.split == split] for split in SPLITS}


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError unless the fractions are three shares of a whole."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three shares that sum to 1, got {list(fractions)}.")


def split_patients(patients: Iterable[str], fractions: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Split of each patient: a seeded shuffle of the names, cut at the fractions."""
    names = sorted(set(patients))
    order = np.random.default_rng(seed).permutation(len(names))
    bounds = np.round(np.cumsum(fractions) * len(names))
    return {names[index]: SPLITS[int(np.searchsorted(bounds, rank, side="right"))] for rank, index in enumerate(order)}
