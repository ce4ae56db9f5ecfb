"""Maps on disk, by pair: computed once, and again only where weights, settings, pixels or words are others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from matex_pl import __version__
from matex_pl.attribution.base import AttributionMethod
from matex_pl.clip.model import Clip
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.tensors import _about, fingerprint, read_head, read_tensors, write_tensors
from matex_pl.maps import Attribution, min_max, upsample

_FIELDS = ("grid", "text", "content", "score")


def weight_hash(clip: Clip) -> str:
    """SHA-256, in hex, of what decides the model's numbers: its config, weights and mean image, names and dtypes."""
    digest = sha256(json.dumps(clip.config, sort_keys=True).encode())
    for name, value in sorted(clip.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def describe_method(method: AttributionMethod) -> dict[str, Any]:
    """The method in the form of a YAML: `class_path` and `init_args`, plain types.

    Raises:
        TypeError: The method does not keep its arguments under their names, or one of them is no plain type.
    """
    kind = type(method)
    described = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    try:
        return described | {"init_args": json.loads(json.dumps(method.settings))}
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{kind.__name__} cannot be told from other settings of itself: {error}. Keep each argument of the "
            "constructor as an attribute of its name and of a plain type."
        ) from error


def pair_keys(batch: ImageTextBatch) -> list[str]:
    """A key per pair: its id, and a hash of its pixels, its phrase and the image's place in the frame."""
    pixels = batch["image"].cpu().contiguous()
    keys = []
    for name, image, phrase, content_box in zip(
        batch["id"], pixels, batch["phrase"], batch["content_box"].tolist(), strict=True
    ):
        digest = blake2b(image.numpy().tobytes(), digest_size=10)
        digest.update(json.dumps([phrase, content_box]).encode())
        keys.append(f"{name}:{digest.hexdigest()}")
    return keys


class MapStore:
    """The maps of one method with one set of weights, as safetensors of some pairs each.

    A map is kept on the patch raster. Where that does not give the image map back (a prior, pixels, masks that were
    moved), the pixels are kept too, so that what is read is what was written.

    Args:
        root: Folder of all stores; this one's is `root/<class>-<key>`.
        weights: `weight_hash` of the model.
        method: Attribution method of the maps.

    Attributes:
        key: Hash of the method's class and settings, the weights and the version of this package.
    """

    def __init__(self, root: Path, weights: str, method: AttributionMethod) -> None:
        about = {"method": describe_method(method), "weights": weights, "version": __version__}
        self.key = fingerprint(about)
        self.folder = root / f"{type(method).__name__}-{self.key}"
        self._about = about
        self._files: dict[str, Path] = {}
        self.refresh()

    def __len__(self) -> int:
        """Number of pairs with a map."""
        return len(self._files)

    def refresh(self) -> None:
        """Find what is on disk, that of other processes included."""
        self._files = {key: path for path, pairs in self._shards() for key in pairs}

    def _shards(self) -> Iterator[tuple[Path, list[str]]]:
        """Each file that is whole, and its pairs."""
        for path in sorted(self.folder.glob("*.safetensors")):
            head = read_head(path)
            if head is not None:
                yield path, head["pairs"]

    def drop_repeats(self) -> int:
        """Leave each pair in one file only, and say how many were in more.

        Processes that work on shards of a split, filled up to the same length, write some pairs twice. For one process,
        when the others are done.
        """
        seen: set[str] = set()
        repeats = 0
        for path, pairs in list(self._shards()):
            new = [row for row, key in enumerate(pairs) if key not in seen]
            if len(new) < len(pairs):
                self._keep_rows(path, new)
            seen.update(pairs)
            repeats += len(pairs) - len(new)
        self.refresh()
        return repeats

    def _keep_rows(self, path: Path, rows: list[int]) -> None:
        """Put some rows of a file in its place."""
        tensors, about = read_tensors(path)
        pairs = [about["pairs"][row] for row in rows]
        if rows:
            write_tensors(self._path(pairs), {name: t[rows] for name, t in tensors.items()}, {**about, "pairs": pairs})
        path.unlink()

    def _path(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{fingerprint(list(keys))}.safetensors"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that have no map yet."""
        return [key for key in keys if key not in self._files]

    def write(self, keys: Sequence[str], maps: Attribution) -> None:
        """Keep the maps of B pairs under their keys."""
        tensors = {name: getattr(maps, name) for name in _FIELDS}
        if not torch.equal(_enlarged(maps.grid, maps.image.shape[-2:]), maps.image):
            tensors["image"] = maps.image
        path = self._path(keys)
        size = list(maps.image.shape[-2:])
        write_tensors(path, tensors, {**self._about, "pairs": list(keys), "size": size})
        self._files.update(dict.fromkeys(keys, path))

    def read(self, keys: Sequence[str]) -> Attribution:
        """The maps of the keys, in their order, on the CPU; without parts.

        Raises:
            KeyError: A pair has no map here.
        """
        fields: dict[str, Any] = self._read(keys, ("image", *_FIELDS))
        return Attribution(**fields)

    def read_units(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """`grid`, `text`, `content` and `score` of the maps of the keys, as `read` gives them; the pixels stay on disk.

        Raises:
            KeyError: A pair has no map here.
        """
        return self._read(keys, _FIELDS)

    def _read(self, keys: Sequence[str], fields: Sequence[str]) -> dict[str, Tensor]:
        gone = self.missing(keys)
        if gone:
            raise KeyError(f"{len(gone)} of {len(keys)} pairs have no map in {self.folder}, e.g. {gone[0]!r}.")
        found: dict[str, dict[str, Tensor]] = {}
        for path in dict.fromkeys(self._files[key] for key in keys):
            found.update(_read_shard(path, fields))
        return {name: torch.stack([found[key][name] for key in keys]) for name in fields}


def _read_shard(path: Path, fields: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Fields of each pair of a file."""
    with safe_open(path, "pt") as file:
        about, there = _about(file.metadata()), set(file.keys())
        tensors = {name: file.get_tensor(name) for name in fields if name in there}
    if "image" in fields:
        tensors.setdefault("image", _enlarged(tensors["grid"], about["size"]))
    return {key: {name: value[row] for name, value in tensors.items()} for row, key in enumerate(about["pairs"])}


def _enlarged(grid: Tensor, size: Sequence[int]) -> Tensor:
    return min_max(upsample(grid, (size[0], size[1])))


def fill_store(
    clip: Clip, method: AttributionMethod, store: MapStore, batch: ImageTextBatch, keys: Sequence[str], size: int
) -> None:
    """Make the maps of the pairs that the store does not have, and keep them as they come.

    Args:
        clip: The model.
        method: Attribution method of the maps.
        store: Store of the maps.
        batch: The pairs; the same pair may come twice.
        keys: Key of each pair, from `pair_keys`.
        size: Most pairs of one call; where the method's work is on the image, a call has all pairs of one image
            instead.
    """
    lacking = set(store.missing(keys))
    rows = list({key: row for row, key in enumerate(keys) if key in lacking}.values())
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    for group in _images(batch, rows) if method.perturbs_inputs else chunks:
        store.write([keys[row] for row in group], _attribute(clip, method, batch, group))


def _images(batch: ImageTextBatch, rows: Sequence[int]) -> list[list[int]]:
    images: dict[str, list[int]] = {}
    for row in rows:
        images.setdefault(batch["image_id"][row], []).append(row)
    return list(images.values())


def _attribute(clip: Clip, method: AttributionMethod, batch: ImageTextBatch, rows: Sequence[int]) -> Attribution:
    device = clip.std.device
    images = clip.normalize(batch["image"][rows].to(device))
    phrases, boxes = [batch["phrase"][row] for row in rows], batch["content_box"][rows].to(device)
    if method.perturbs_inputs:
        return method.attribute_phrases(clip, images[0], phrases, boxes[0])
    return method.attribute(clip, images, clip.tokenize(phrases), phrases, boxes)
