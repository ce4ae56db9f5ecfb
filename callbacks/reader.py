"""Where callbacks find the CLIP model in a LightningModule, and images and phrases in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from operator import attrgetter
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from matex_pl.anatomy.prior import whole_frame
from matex_pl.clip.model import Clip
from matex_pl.data.chest import chest_boxes
from matex_pl.data.datamodule import PairDataset
from matex_pl.data.pair import ImageTextBatch, rows_of
from matex_pl.training.distributed import check_strategy

_FIELDS = ("image", "phrase", "id", "boxes", "finding", "content_box", "patient_id", "masks")


class Reader:
    """Where the callbacks find the CLIP model in a LightningModule, and images and phrases in its batches.

    By default, the module holds a `Clip` as `clip`, and batches are those of this package's data modules.

    Args:
        clip: Attributes that lead from the LightningModule to its model (`model.clip`), or a function from the module
            to the model. The model is a `Clip`, or is wrapped by `Clip.wrap`.
        tokenizer: Tokenizer or processor of a model that is no `Clip`; see `Clip.wrap`.
        preprocess: Transform or image processor of a model that is no `Clip`; see `Clip.wrap`.
        mean: Mean of the images of a model that is no `Clip`; see `Clip.wrap`.
        std: Deviation of the images of a model that is no `Clip`; see `Clip.wrap`.
        image: Key or position of the images in a batch, `(B, 3, H, W)`: uint8, or float; see `normalized`.
        phrase: Key or position of the phrases: B texts, or token ids `(B, T)` of the tokenizer.
        id: Key or position of the B ids of the pairs, each of its own. Without it in a batch, the ids are split and
            running index.
        boxes: Key or position of the boxes: B tensors `(K, 4)` of `x0, y0, x1, y1` in [0, 1] of the input frame.
        finding: Key or position of the B findings; empty texts for none.
        content_box: Key or position of the rectangles of the images, `(B, 4)` in the input frame; the whole frame
            without it in a batch.
        patient_id: Key or position of the B patients, by whom `RoarPlus` splits; each pair by itself without it.
        masks: Key or position of the masks of structures: `(B, H, W)` by `left_lung`, `right_lung`, `heart`, and
            others, in the input frame; False everywhere for an image without the structure.
        normalized: Whether float images are normalized by the model's mean and deviation; if not, they are in [0, 1].
        batch: Function from a batch to a mapping with the keys above, for batches of another form.
    """

    def __init__(
        self,
        clip: str | Callable[[LightningModule], Any] = "clip",
        tokenizer: Any = None,
        preprocess: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        image: str | int = "image",
        phrase: str | int = "phrase",
        id: str | int = "id",
        boxes: str | int = "boxes",
        finding: str | int = "finding",
        content_box: str | int = "content_box",
        patient_id: str | int = "patient_id",
        masks: str | int = "masks",
        normalized: bool | None = None,
        batch: Callable[[Any], Mapping[str, Any]] | None = None,
    ) -> None:
        self.clip = clip
        self.wrapping = {"tokenizer": tokenizer, "preprocess": preprocess, "mean": mean, "std": std}
        places = (image, phrase, id, boxes, finding, content_box, patient_id, masks)
        self.keys = dict(zip(_FIELDS, places, strict=True))
        self.normalized = normalized
        self.batch = batch
        self._found: tuple[Any, Clip] | None = None
        # Place of the last batch of each loader: its index, its first running index and its number of pairs.
        self._places: dict[tuple[str, int], tuple[int, int, int]] = {}

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the strategy and the model before the training.

        Raises:
            NotImplementedError: The strategy shards the model, or the model is not supported.
            ValueError: The module has no CLIP model where it should be, or tokenizer or preprocessing do not fit.
        """
        check_strategy(trainer.strategy)
        self._places.clear()
        self.clip_of(pl_module)

    def check_loader(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the first batch of the first validation loader, if it is foreign and no batch was read yet.

        Raises:
            ValueError: The batch has no images or phrases where they should be.
        """
        loaders = _flat(trainer.val_dataloaders)
        is_own = loaders and isinstance(getattr(loaders[0], "dataset", None), PairDataset)
        # Batches of a mapping of loaders have a form that Lightning decides.
        if self._places or not loaders or is_own or isinstance(trainer.val_dataloaders, Mapping):
            return
        with isolate_rng():
            batch = next(iter(loaders[0]), None)
        if batch is not None:
            self.read(trainer, pl_module, trainer.strategy.batch_to_device(batch))
            self._places.clear()

    def clip_of(self, pl_module: LightningModule) -> Clip:
        """The module's model as a `Clip`; a model of another class is wrapped once, without a copy.

        Raises:
            ValueError: There is no model.
        """
        name = type(pl_module).__name__
        if callable(self.clip):
            model = self.clip(pl_module)
        else:
            try:
                model = attrgetter(self.clip)(pl_module)
            except AttributeError as error:
                raise ValueError(
                    f"{name} has no {self.clip!r}, where the callbacks look for the CLIP model.{_models(pl_module)}"
                ) from error
        if isinstance(model, Clip):
            return model
        if self._found is None or self._found[0] is not model:
            if self.wrapping["tokenizer"] is None:
                raise ValueError(
                    f"The model {type(model).__name__} in {name} is no Clip, and needs a tokenizer. Give the model's "
                    "tokenizer or processor: Reader(clip=..., tokenizer=...)."
                )
            self._found = model, Clip.wrap(model, **self.wrapping)
        return self._found[1]

    def read(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int = 0,
        dataloader_idx: int = 0,
        split: str | None = None,
    ) -> ImageTextBatch:
        """A batch in the form of this package's, on the device of the given one.

        Fields that the batch lacks are left empty: boxes, findings. Running ids count the samples of all processes.
        The split is that of the trainer's stage by default.

        Raises:
            ValueError: The batch has no images or phrases where they should be, or one of another shape or type.
        """
        found: Any = batch if self.batch is None else self.batch(batch)
        if isinstance(found, Mapping) and found.keys() >= ImageTextBatch.__annotations__.keys():
            # A batch of this package's data modules.
            return cast(ImageTextBatch, found)
        clip = self.clip_of(pl_module)
        images, phrases = (self._field(found, name) for name in ("image", "phrase"))
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"The images of the batch, {self.keys['image']!r}, must be (B, 3, H, W), got {shape}.")
        pixels, texts, count = self._pixels(clip, images), self._texts(clip, phrases), len(images)
        if len(texts) != count:
            raise ValueError(f"The batch has {count} images and {len(texts)} phrases. Give one phrase per image.")
        boxes = self._optional(found, "boxes")
        content_box, patients = self._optional(found, "content_box"), self._optional(found, "patient_id")
        whole = whole_frame(images.device).expand(count, 4)
        ids = self._optional(found, "id")
        stage = trainer.state.stage
        split = split or (stage.dataloader_prefix if stage else None)
        start = self._start(str(split), dataloader_idx, batch_idx, count)
        loaders = _loaders(trainer, str(split))
        # The same id may stand in several loaders.
        prefix = f"{split}{dataloader_idx}" if len(loaders) > 1 else str(split)
        if ids is None:
            names = _running_ids(trainer, loaders, dataloader_idx, start, count, prefix)
        else:
            names = [f"{prefix}-{name}" if len(loaders) > 1 else name for name in _strings(ids)]
            _check_ids(names, texts)
        finding = self._optional(found, "finding")
        masks = _checked_masks(self._optional(found, "masks"), pixels)
        return cast(
            ImageTextBatch,
            {
                "id": names,
                "image": pixels,
                "phrase": texts,
                "boxes": [whole.new_zeros(0, 4)] * count if boxes is None else _checked_boxes(boxes, whole),
                "finding": [""] * count if finding is None else _strings(finding),
                "content_box": whole if content_box is None else content_box,
                "patient_id": names if patients is None else _strings(patients),
                "masks": masks,
                "chest_box": chest_boxes(masks, count).to(images.device),
            },
        )

    def gather(
        self, trainer: Trainer, pl_module: LightningModule, splits: Sequence[str], number: int
    ) -> list[tuple[str, ImageTextBatch]]:
        """Split and batch of the first pairs of this process's loaders, on the CPU, at most `number` pairs per split.

        Given ids get the split in front, because two splits may have the same.

        Args:
            trainer: The trainer, within a training.
            pl_module: The module.
            splits: `train` and `val`.
            number: Number of pairs per split; -1 for all.

        Raises:
            ValueError: A split has no loader in a training, or a batch is of another form.
        """
        found: list[tuple[str, ImageTextBatch]] = []
        for split in splits:
            loaders = _loaders(trainer, split) if split in ("train", "val") else []
            if not loaders:
                raise ValueError(
                    f"The training has no loader of the split {split!r}. Give protocol.splits of train and val."
                )
            count = 0
            for place, loader in enumerate(loaders):
                if count == number:
                    break
                with isolate_rng():
                    for index, batch in enumerate(loader):
                        # After a training the module is on the CPU.
                        placed = trainer.strategy.batch_to_device(batch, pl_module.device)
                        pairs = self.read(trainer, pl_module, placed, index, place, split)
                        rows = range(len(pairs["id"]))
                        kept = rows_of(pairs, rows if number < 0 else rows[: number - count])
                        kept["id"] = [f"{split}-{name.removeprefix(f'{split}-')}" for name in kept["id"]]
                        found.append((split, kept))
                        count += len(kept["id"])
                        # Before the loader reads another batch.
                        if count == number:
                            break
        return found

    def count(self, batch: Any) -> int:
        """Number of pairs in a batch."""
        return len(self._field(batch if self.batch is None else self.batch(batch), "image"))

    def has_boxes(self, batch: Any) -> bool:
        """Whether a batch holds boxes."""
        return self._optional(batch if self.batch is None else self.batch(batch), "boxes") is not None

    def _field(self, batch: Any, name: str) -> Any:
        key = self.keys[name]
        try:
            return batch[key]
        except (IndexError, KeyError, TypeError) as error:
            held = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            if isinstance(batch, (list, tuple)):
                held += f" of {len(batch)} parts"
            what = {"image": "images", "phrase": "phrases"}[name]
            raise ValueError(
                f"The batch has no {what} at {key!r}: it holds {held}. Say where they are: Reader({name}=...)."
            ) from error

    def _optional(self, batch: Any, name: str) -> Any:
        try:
            return batch[self.keys[name]]
        except (IndexError, KeyError, TypeError):
            return None

    def _pixels(self, clip: Clip, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` uint8, or float in [0, 1]."""
        if images.dtype == torch.uint8:
            return images
        if self.normalized is None:
            raise ValueError(
                f"The images of the batch are {images.dtype}. Say whether they are normalized by the model's mean and "
                "deviation, or in [0, 1]: Reader(normalized=True) or Reader(normalized=False)."
            )
        return images * clip.std + clip.mean if self.normalized else images

    def _texts(self, clip: Clip, phrases: Any) -> list[str]:
        if isinstance(phrases, Tensor) and phrases.ndim == 2 and not phrases.is_floating_point():
            return [_decoded(clip, row) for row in phrases.cpu()]
        if not isinstance(phrases, (list, tuple)) or not all(isinstance(phrase, str) for phrase in phrases):
            raise ValueError(
                f"The phrases of the batch, {self.keys['phrase']!r}, must be texts or token ids (B, T), got a "
                f"{type(phrases).__name__}."
            )
        return list(phrases)

    def _start(self, split: str, loader: int, batch_idx: int, count: int) -> int:
        """Number of samples of this process's loader before a batch."""
        last, start, size = self._places.get((split, loader), (-1, 0, 0))
        if batch_idx != last:
            start = start + size if batch_idx == last + 1 and batch_idx else batch_idx * count
            self._places[split, loader] = batch_idx, start, count
        return start


def _check_ids(names: Sequence[str], texts: Sequence[str]) -> None:
    """Raise ValueError if two pairs of a batch have one id: scores count an id once."""
    phrases: dict[str, str] = {}
    for name, text in zip(names, texts, strict=True):
        if phrases.setdefault(name, text) != text:
            raise ValueError(
                f"Two pairs of a batch have the id {name!r}, with the phrases {phrases[name]!r} and {text!r}. An id "
                "counts once in the scores. Name another key of ids: Reader(id=...)."
            )


def _loaders(trainer: Trainer, split: str) -> list[Any]:
    """Loaders of a split, as Lightning calls them."""
    return _flat(getattr(trainer, "train_dataloader" if split == "train" else f"{split}_dataloaders", None))


def _running_ids(
    trainer: Trainer, loaders: Sequence[Any], place: int, start: int, count: int, prefix: str
) -> list[str]:
    """Ids by the index in the data set, as Lightning's sampler deals it out to the processes, over and over."""
    data = getattr(loaders[place], "dataset", None) if place < len(loaders) else None
    number = len(data) if isinstance(data, Sized) else None
    indices = [(start + row) * trainer.world_size + trainer.global_rank for row in range(count)]
    return [f"{prefix}-{index % number if number else index}" for index in indices]


def _strings(values: Any) -> list[str]:
    """Values of a batch as texts, from texts, numbers or a tensor."""
    return [str(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]


def _flat(loaders: Any) -> list[Any]:
    """Loaders of any nesting as a list."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [part for loader in loaders for part in _flat(loader)]
    return [] if loaders is None else [loaders]


def _models(module: nn.Module) -> str:
    """Sentence that names the CLIP models in a module; empty without one."""
    found: list[str] = []
    for name, part in module.named_modules():
        if name and not any(name.startswith(f"{other}.") for other in found):
            kind = type(part).__name__
            if isinstance(part, Clip) or "CLIP" in kind or kind == "SiglipModel" or hasattr(part, "encode_image"):
                found.append(name)
    listed = " or ".join(f"Reader(clip={name!r})" for name in found[:3])
    return f" Say where it is: {listed}." if found else " Say where it is: Reader(clip=...)."


def _decoded(clip: Clip, row: Tensor) -> str:
    """Text of one row of token ids `(T,)`, without special tokens."""
    tokenizer = clip.tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.decode(row[clip.content(row[None])[0]].tolist()).strip()
    return str(tokenizer.tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip()


def _checked_boxes(boxes: Sequence[Any], like: Tensor) -> list[Tensor]:
    """Boxes as tensors `(K, 4)` of the device and dtype of another; an empty box list has none."""
    found = [torch.as_tensor(box, dtype=like.dtype, device=like.device) for box in boxes]
    found = [box if box.numel() else box.new_zeros(0, 4) for box in found]
    shapes = sorted({tuple(box.shape) for box in found if box.ndim != 2 or box.shape[1] != 4})
    largest = float(torch.cat([box.abs().flatten() for box in found]).max()) if any(map(len, found)) else 0.0
    # Boxes of a cropped image reach beyond its frame.
    if shapes or not largest <= 4:
        raise ValueError(
            "Boxes must be (K, 4) in [0, 1] of the input frame, got "
            + (f"the shape {shapes[0]}." if shapes else f"values up to {largest:g}.")
            + " Divide pixels by the size of the frame."
        )
    return found


def _checked_masks(masks: Any, images: Tensor) -> dict[str, Tensor]:
    """Masks `(B, H, W)` bool by structure, in the size and on the device of images `(B, 3, H, W)`."""
    wanted = (len(images), *images.shape[2:])
    for name, mask in (masks or {}).items():
        if tuple(mask.shape) != wanted:
            raise ValueError(
                f"The masks {name!r} must be {wanted}, one in the size of each image, got {tuple(mask.shape)}."
            )
    return {name: mask.to(images.device) > 0 for name, mask in (masks or {}).items()}
