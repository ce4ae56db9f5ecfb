"""Maps of many phrases on one image, and their numbers in pixels of the stored image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matex_pl.anatomy import parse_phrase
from matex_pl.attribution import AttributionMethod
from matex_pl.attribution.core.capture import borrowed
from matex_pl.attribution.core.target import REFERENCES, reference_mean
from matex_pl.clip.model import Clip
from matex_pl.data.images import ResizeMode, Size, read_image
from matex_pl.data.pair import ImageTextBatch, ImageTextPair, Sample, collate
from matex_pl.data.transforms import Framed, ImageTransform
from matex_pl.maps import Attribution, full_precision, upsample

# Longest side of the image on a page, and of the maps over it, in pixels.
_SHOWN, _MAP = 1024, 384


@dataclass(frozen=True, eq=False)
class FramedImage:
    """An image file in the model's frame.

    Args:
        name: File name of the image.
        size: Height and width of the stored image, upright.
        shown: `(h, w)` uint8 gray levels of the image, at most 1024 pixels long.
        transform: Transform of the image into the model's frame.
        framed: The image in the model's frame.
    """

    name: str
    size: Size
    shown: np.ndarray
    transform: ImageTransform
    framed: Framed


def frame_image(
    clip: Clip,
    image: str | Path,
    resize_mode: ResizeMode | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> FramedImage:
    """An image file in the frame of a model.

    Args:
        clip: CLIP model.
        image: Image file, see `read_image`.
        resize_mode: How the image is fitted into the model's input, by default `clip.resize_mode`.
        masks: Masks `(h, w)` bool of the image by structure, at any resolution.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no image.
    """
    transform = ImageTransform(clip.image_size, resize_mode or clip.resize_mode)
    stored = read_image(image, transform.target_size)
    shown = read_image(image, lambda size: _fitted(size, _SHOWN)).pixels
    framed = transform(stored.pixels, size=stored.size, masks=masks)
    return FramedImage(Path(image).name, stored.size, shown, transform, framed)


@dataclass(frozen=True, eq=False)
class ExplainedImage:
    """One image with the maps of P phrases.

    Args:
        image: The image.
        batch: The P pairs in the model's frame.
        tokens: `(P, T)` tokens of the phrases.
        maps: Maps of the P pairs.
        margins: P margins: the cosine minus the mean cosine of the reference phrases.
    """

    image: FramedImage
    batch: ImageTextBatch
    tokens: torch.Tensor
    maps: Attribution
    margins: list[float]

    def shown_maps(self) -> list[np.ndarray]:
        """Maps over the whole image, `(h, w)` float32 in [0, 1] each, at most 384 pixels long."""
        size = _fitted(self.image.size, _MAP)
        return [self.image.transform.map_on_image(heat, size) for heat in self.heats]

    def shown_word_maps(self, row: int) -> np.ndarray | None:
        """Signed maps of the W words of a phrase over the whole image, `(W, h, w)` float32, at most 384 pixels long.

        None for methods without interactions of words and patches.
        """
        if self.maps.interactions is None:
            return None
        size = _fitted(self.image.size, _MAP)
        heats = upsample(self.maps.word_maps[row].float().cpu(), self.image.transform.size).numpy()
        return np.array([self.image.transform.map_on_image(heat, size) for heat in heats]).reshape(-1, *size)

    def numbers(self, threshold: float) -> list[dict[str, Any]]:
        """Numbers of each phrase in plain types; places are in pixels of the stored image, x to the right, y down.

        - `score` and `margin`;
        - `regions`: side and zone of the regions that the phrase names;
        - `peak`: place of the map's maximum inside of the image, None for a map of zeros;
        - `boxes`: a box around each connected component of `map > threshold`, with its maximum, the highest first;
        - `words`: words with their share of the relevance; `cut` words lie behind the model's context length.

        Args:
            threshold: Threshold of the map, in [0, 1).
        """
        rows = zip(
            self.batch["phrase"],
            self.maps.score.tolist(),
            self.margins,
            self.heats,
            self.maps.words,
            self._boxes(threshold),
            strict=True,
        )
        return [
            {
                "score": round(score, 6),
                "margin": round(margin, 6),
                "regions": [{"side": region.side, "zone": region.zone} for region in _regions(phrase)],
                "peak": self._peak(heat),
                "boxes": boxes,
                "words": [
                    {"text": w.text, "start": w.start, "end": w.end, "share": round(w.share, 6), "cut": w.cut}
                    for w in words
                ],
            }
            for phrase, score, margin, heat, words, boxes in rows
        ]

    def shares(self) -> list[list[dict[str, Any]]]:
        """Shares of each phrase's map in the structures of the image, in plain types; empty without masks.

        - `structure`: its name;
        - `mass` and `area`: share of the map's mass and of the image's area inside, and `ratio`, their quotient;
        - `peak_inside`: whether the map's maximum is inside.

        A number of a map of zeros is None.
        """
        # The package of metrics takes seconds to import, and pictures do not need it.
        from matex_pl.metrics.functional import anatomy_shares

        masks, image = self.batch["masks"], self.maps.image.cpu()
        found = {name: part.tolist() for name, part in anatomy_shares(image, masks, self.batch["content_box"]).items()}
        names = {"mass": "mass", "area": "area", "ratio": "mass_ratio", "peak_inside": "peak"}
        rows = [
            [
                {"structure": name} | {key: _plain(found[f"{kind}/{name}"][row]) for key, kind in names.items()}
                for name, mask in masks.items()
                if mask[row].any()
            ]
            for row in range(len(image))
        ]
        for row in (entry for entries in rows for entry in entries):
            row["peak_inside"] = None if row["peak_inside"] is None else bool(row["peak_inside"])
        return rows

    @property
    def heats(self) -> list[np.ndarray]:
        """Maps in the model's frame, `(H, W)` float32 in [0, 1] each."""
        return list(self.maps.image.float().cpu().numpy())

    def _peak(self, heat: np.ndarray) -> dict[str, float] | None:
        """Center of the map's first maximal pixel among the pixels of the image, without its padding."""
        height, width = heat.shape
        x0, y0, x1, y1 = self.batch["content_box"][0].tolist()
        columns, rows = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
        inside = ((rows > y0) & (rows < y1))[:, None] & ((columns > x0) & (columns < x1))
        masked = np.where(inside, heat, 0)
        if masked.max() <= 0:
            return None
        row, column = np.unravel_index(int(masked.argmax()), heat.shape)
        x, y = columns[column], rows[row]
        place = self.image.transform.boxes_on_image(np.array([[x, y, x, y]]), self.image.size)[0]
        return {"x": round(float(place[0]), 1), "y": round(float(place[1]), 1)}

    def _boxes(self, threshold: float) -> list[list[dict[str, float]]]:
        """Boxes of each map's components; boxes in the padding are left out."""
        # The package of metrics takes seconds to import, and pictures do not need it.
        from matex_pl.metrics.functional import components

        found = components(self.maps.image.cpu(), threshold)
        placed = self.image.transform.boxes_on_image(found.boxes.numpy(), self.image.size)
        boxes: list[list[dict[str, float]]] = [[] for _ in self.batch["phrase"]]
        for index in found.peak.argsort(descending=True, stable=True).tolist():
            x0, y0, x1, y1 = (round(float(edge), 1) for edge in placed[index])
            if x0 < x1 and y0 < y1:
                peak = round(float(found.peak[index]), 4)
                boxes[int(found.pair[index])].append({"x0": x0, "y0": y0, "x1": x1, "y1": y1, "peak": peak})
        return boxes


def explain_phrases(
    clip: Clip, method: AttributionMethod, image: FramedImage, phrases: Sequence[str]
) -> ExplainedImage:
    """Maps of P phrases on one image; methods that read the image by one forward run it once.

    Args:
        clip: CLIP model.
        method: Attribution method.
        image: The image, from `frame_image`.
        phrases: Phrases, at least one.

    Raises:
        NotImplementedError: The method does not support the model.
        ValueError: There is no phrase.
    """
    name = image.name
    pairs = [ImageTextPair(id=name, patient_id="", image_id=name, image=name, phrase=phrase) for phrase in phrases]
    batch = collate([Sample(pair, *image.framed) for pair in pairs])
    boxes = (batch[name][0].to(clip.std.device) for name in ("content_box", "chest_box"))
    maps = method.attribute_phrases(clip, clip.normalize(batch["image"][:1])[0], phrases, *boxes)
    return ExplainedImage(image, batch, clip.tokenize(phrases), maps, _margins(clip, method, batch, maps))


def _margins(clip: Clip, method: AttributionMethod, batch: ImageTextBatch, maps: Attribution) -> list[float]:
    """The cosine of each pair minus the mean cosine of the image with the method's reference phrases."""
    references = getattr(method, "references", REFERENCES)
    with borrowed(clip), torch.no_grad():
        # A method of other code may not keep its embeddings.
        known = maps.parts.get("embeddings")
        embedding = known[0] if known else clip.encode_image(clip.normalize(batch["image"][:1]))
        common = full_precision(embedding) @ reference_mean(clip, references)
    return (maps.score - common).tolist()


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _regions(phrase: str) -> list[Any]:
    return sorted(parse_phrase(phrase).regions)


def _fitted(size: Size, longest: int) -> Size:
    """The size, shrunk to `longest` pixels on its longest side."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
