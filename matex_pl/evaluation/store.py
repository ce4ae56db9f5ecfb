"""Maps on disk by pair, computed again only if weights, settings, pixels or words change."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from math import isnan
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from matex_pl import __version__
from matex_pl.attribution.base import AttributionMethod
from matex_pl.clip.model import Clip
from matex_pl.data.pair import ImageTextBatch
from matex_pl.evaluation.tensors import _about, fingerprint, read_head, read_tensors, write_tensors
from matex_pl.maps import Attribution, min_max, upsample

# Counts up with each change of a method's maps, so that stored ones are made again.
_MAPS = 2
_FIELDS = ("grid", "text", "content", "score")


def weight_hash(clip: Clip) -> str:
    """SHA-256 in hex of the model's config, weights and mean image, including names and dtypes."""
    digest = sha256(json.dumps(clip.config, sort_keys=True).encode())
    for name, value in sorted(clip.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_method(method: AttributionMethod) -> dict[str, Any]:
    """Description of the method as in a YAML: `class_path` and `init_args`, in plain types.

    Raises:
        TypeError: If the method does not keep its arguments under their names, or an argument is not a plain type.
    """
    kind = type(method)
    described = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    try:
        return described | {"init_args": json.loads(json.dumps(method.settings))}
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"The settings of {kind.__name__} cannot be read: {error}. Keep each argument of the constructor as an "
            "attribute of the same name and of a plain type."
        ) from error


def pair_keys(batch: ImageTextBatch) -> list[str]:
    """Key of each pair: its id, and a hash of its pixels, its phrase, and the place of image and lungs in the frame."""
    pixels = batch["image"].cpu().contiguous()
    keys = []
    for name, image, phrase, content_box, chest_box in zip(
        batch["id"],
        pixels,
        batch["phrase"],
        batch["content_box"].tolist(),
        batch["chest_box"].tolist(),
        strict=True,
    ):
        digest = blake2b(image.numpy().tobytes(), digest_size=10)
        lungs = [] if isnan(chest_box[0]) else [chest_box]
        digest.update(json.dumps([phrase, content_box, *lungs]).encode())
        keys.append(f"{name}:{digest.hexdigest()}")
    return keys


class MapStore:
    """Maps of one method and one set of weights, as safetensors files of several pairs each.

    A map is stored on the patch raster. If the image map cannot be restored from the raster (a prior, pixels, shifted
    masks), the pixels are stored too, and so are interactions. Therefore maps are read exactly as written.

    Args:
        root: Folder of all stores; the folder of this store is `root/<class>-<key>`.
        weights: `weight_hash` of the model.
        method: Attribution method of the maps.

    Attributes:
        key: Hash of the method's class and settings, the weights and the version of this package.
    """

    def __init__(self, root: Path, weights: str, method: AttributionMethod) -> None:
        self._head = {"method": describe_method(method), "weights": weights, "version": __version__, "maps": _MAPS}
        self.key = fingerprint(self._head)
        self.folder = root / f"{type(method).__name__}-{self.key}"
        self._files: dict[str, Path] = {}
        self.refresh()

    def __len__(self) -> int:
        """Number of pairs with a map."""
        return len(self._files)

    def refresh(self) -> None:
        """Read the list of files on disk, from all processes."""
        self._files = {key: path for path, pairs in self._shards() for key in pairs}

    def _shards(self) -> Iterator[tuple[Path, list[str]]]:
        """Path and pairs of each complete file."""
        for path in sorted(self.folder.glob("*.safetensors")):
            head = read_head(path)
            if head is not None:
                yield path, head["pairs"]

    def drop_repeats(self) -> int:
        """Keep each pair in one file only; returns the number of repeats.

        Processes that work on shards of a split, padded to the same length, write some pairs twice. Call this in one
        process after all are done.
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
        """Replace a file by some of its rows."""
        tensors, about = read_tensors(path)
        pairs = [about["pairs"][row] for row in rows]
        if rows:
            write_tensors(self._path(pairs), {name: t[rows] for name, t in tensors.items()}, {**about, "pairs": pairs})
        path.unlink()

    def _path(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{fingerprint(list(keys))}.safetensors"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys without a map in this store."""
        return [key for key in keys if key not in self._files]

    def write(self, keys: Sequence[str], maps: Attribution) -> None:
        """Store the maps of B pairs under their keys."""
        tensors = {name: getattr(maps, name) for name in _FIELDS}
        if not torch.equal(_enlarged(maps.grid, maps.image.shape[-2:]), maps.image):
            tensors["image"] = maps.image
        if maps.interactions is not None:
            tensors["interactions"] = maps.interactions
        path = self._path(keys)
        write_tensors(path, tensors, {**self._head, "pairs": list(keys), "size": list(maps.image.shape[-2:])})
        self._files.update(dict.fromkeys(keys, path))

    def read(self, keys: Sequence[str]) -> Attribution:
        """Maps of the keys, in their order, on the CPU; without parts.

        Raises:
            KeyError: If a pair has no map in this store.
        """
        return Attribution(**cast(dict[str, Any], self._read(keys, ("image", *_FIELDS, "interactions"))))

    def read_units(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """`grid`, `text`, `content` and `score` of the maps of the keys, as in `read`, without reading pixels.

        Raises:
            KeyError: If a pair has no map in this store.
        """
        return self._read(keys, _FIELDS)

    def _read(self, keys: Sequence[str], fields: Sequence[str]) -> dict[str, Tensor]:
        gone = self.missing(keys)
        if gone:
            raise KeyError(
                f"{len(gone)} of {len(keys)} pairs have no map in {self.folder}, e.g. {gone[0]!r}. Compute the maps "
                "with `fill_store` first."
            )
        maps: dict[str, dict[str, Tensor]] = {}
        for path in dict.fromkeys(self._files[key] for key in keys):
            maps.update(_read_shard(path, fields))
        # Only some methods have interactions.
        there = [name for name in fields if all(name in maps[key] for key in keys)]
        return {name: torch.stack([maps[key][name] for key in keys]) for name in there}


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
    """Compute and write the maps that the store lacks.

    Args:
        clip: CLIP model.
        method: Attribution method of the maps.
        store: Store of the maps.
        batch: Pairs of the maps; a pair may be repeated.
        keys: Key of each pair, from `pair_keys`.
        size: Maximum number of pairs per call. A method that perturbs inputs gets all pairs of an image per call
            instead.
    """
    lacking = set(store.missing(keys))
    rows = list({key: row for row, key in enumerate(keys) if key in lacking}.values())
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    if method.perturbs_inputs:
        by_image: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_image[batch["image_id"][row]].append(row)
        groups = list(by_image.values())
    for group in groups:
        images = clip.normalize(batch["image"][group].to(clip.std.device))
        phrases = [batch["phrase"][row] for row in group]
        boxes = [batch[name][group].to(images.device) for name in ("content_box", "chest_box")]
        if method.perturbs_inputs:
            maps = method.attribute_phrases(clip, images[0], phrases, *(box[0] for box in boxes))
        else:
            maps = method.attribute(clip, images, clip.tokenize(phrases), phrases, *boxes)
        store.write([keys[row] for row in group], maps)
