"""Panels and contact sheets of pairs, for the callbacks, for `matex explain` and for a single image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.clip.model import Clip
from matex_pl.clip.words import with_words
from matex_pl.console import progress
from matex_pl.data.images import GrayImage, ResizeMode, read_image
from matex_pl.data.pair import ImageTextBatch, ImageTextPair, Sample, collate
from matex_pl.data.transforms import ImageTransform
from matex_pl.maps import Attribution, Word, upsample
from matex_pl.visualization.draw import DESIGN_WIDTH, Picture
from matex_pl.visualization.panel import CARD_WIDTH, panel, panel_unit
from matex_pl.visualization.sheet import Entry, contact_sheet
from matex_pl.visualization.word_maps import word_tiles


def explain_pair(
    clip: Clip,
    image: str | Path | np.ndarray,
    phrase: str,
    method: AttributionMethod | None = None,
    resize_mode: ResizeMode | None = None,
) -> Picture:
    """Panel of one image and one phrase, `(h, w, 3)` uint8: where the model looks, and which words matter.

    The numbers behind the panel are those of `method.attribute(clip, *clip.inputs(batch), batch["phrase"],
    batch["content_box"], batch["chest_box"])`, where `batch` is that of `pair_batch`.

    Args:
        clip: CLIP model.
        image: Image file, see `read_image`, or gray levels `(h, w)` uint8.
        phrase: Sentence as in a report.
        method: Attribution method, `Matex.recommended()` by default.
        resize_mode: How the image is fitted into the model's input: `longest`, `shortest` or `squash`; by default
            `clip.resize_mode`.

    Raises:
        NotImplementedError: The method does not support the model.
        OSError: The file cannot be read.
        ValueError: The phrase is empty, or the pixels have another shape or type.
    """
    method = method or Matex.recommended()
    return explain_batch(clip, method, pair_batch(clip, image, phrase, resize_mode), type(method).__name__)[0]


def pair_batch(
    clip: Clip, image: str | Path | np.ndarray, phrase: str, resize_mode: ResizeMode | None = None
) -> ImageTextBatch:
    """Batch of one pair in the model's frame, `image (1, 3, H, W)` uint8; see `explain_pair`."""
    if not phrase.strip():
        raise ValueError("The phrase is empty. Give a sentence as in a report, in quotes.")
    transform = ImageTransform(clip.image_size, resize_mode or clip.resize_mode)
    if isinstance(image, np.ndarray):
        name, stored = "", GrayImage(image, image.shape[:2])
    else:
        name, stored = Path(image).name, read_image(image, transform.target_size)
    pair = ImageTextPair(id=name, patient_id="", image_id=name, image=name, phrase=phrase)
    return collate([Sample(pair, *transform(stored.pixels, size=stored.size))])


def explain_batch(
    module: Any,
    method: AttributionMethod,
    batch: ImageTextBatch,
    subtitle: str,
    *,
    show_text: bool = True,
    stacked: bool = False,
) -> list[Picture]:
    """One panel per pair of the batch, `(h, w, 3)` uint8 each.

    Args:
        module: `Clip`, or a module that holds one as `clip`, such as `ClipModule`.
        method: Attribution method.
        batch: Pairs, on any device.
        subtitle: Second line of the panels.
        show_text: Whether to write the phrase and the finding; if not, bars stand for the words.
        stacked: Whether the map stands above the image, in the width of TensorBoard's cards.
    """
    maps, tokens = attribute_batch(module, method, batch)
    width = CARD_WIDTH if stacked else DESIGN_WIDTH
    return draw_panels(_clip_of(module), maps, batch, tokens, subtitle, width, show_text=show_text, stacked=stacked)


def draw_panels(
    clip: Clip,
    maps: Attribution,
    batch: ImageTextBatch,
    tokens: Tensor,
    subtitle: str,
    width: int = DESIGN_WIDTH,
    *,
    show_text: bool = True,
    stacked: bool = False,
) -> list[Picture]:
    """One panel per pair of the batch, `(h, width, 3)` uint8 each, from computed maps; see `explain_batch`.

    Below the panel of a method with interactions is a small map per word.
    """
    worded = with_words(maps, clip, tokens, batch["phrase"])
    words, heats, scores = worded.words, maps.image.float().cpu().numpy(), maps.score.tolist()
    panels = [
        panel(
            heat=heats[row],
            words=words[row],
            score=scores[row],
            subtitle=subtitle,
            width=width,
            show_text=show_text,
            stacked=stacked,
            **_pair(batch, row, show_finding=show_text),
        )
        for row in range(len(batch["id"]))
    ]
    if maps.interactions is None:
        return panels
    tiles = [upsample(part.float(), clip.image_size).cpu().numpy() for part in worded.word_maps]
    unit = panel_unit(width, stacked=stacked)
    return [
        np.concatenate([above, _word_tiles(batch, row, tiles[row], words[row], width, unit, show_text)])
        for row, above in enumerate(panels)
    ]


def _word_tiles(
    batch: ImageTextBatch,
    row: int,
    heats: np.ndarray,
    words: Sequence[Word],
    width: int,
    unit: float,
    show_text: bool,
) -> Picture:
    """Small maps of the words of a pair."""
    pair = _pair(batch, row)
    return word_tiles(
        image=pair["image"], heats=heats, words=words, boxes=pair["boxes"], width=width, unit=unit, show_text=show_text
    )


def compare_methods(module: Any, methods: Mapping[str, AttributionMethod], batch: ImageTextBatch) -> Picture:
    """Contact sheet of one pair, `(h, w, 3)` uint8: its image, and the map and the words of each method.

    Args:
        module: `Clip`, or a module that holds one as `clip`, such as `ClipModule`.
        methods: Methods by the name to write under their map. If a method does not support the model, or needs a mean
            image that the model does not have, the sheet shows the reason instead of a map.
        batch: One pair.

    Raises:
        NotImplementedError: No method supports the model.
        ValueError: The pair or the weights of the model hold NaN or Inf.
    """
    entries, errors = [], []
    for name, method in progress(methods.items(), "methods"):
        try:
            maps, tokens = attribute_batch(module, method, batch)
        except (NotImplementedError, ValueError) as error:
            entries.append(Entry(name, None, None, str(error)))
            errors.append(error)
            continue
        worded = with_words(maps, _clip_of(module), tokens, batch["phrase"])
        words = worded.words[0] if method.supports_text else None
        entries.append(Entry(name, maps.image[0].float().cpu().numpy(), words, getattr(method, "target", "")))
    if len(errors) == len(entries):
        raise errors[0]
    return contact_sheet(entries=entries, score=float(maps.score[0]), **_pair(batch, 0))


def attribute_batch(module: Any, method: AttributionMethod, batch: ImageTextBatch) -> tuple[Attribution, Tensor]:
    """Maps of a batch on any device, and its tokens `(B, T)`; see `explain_batch` for the arguments."""
    clip = _clip_of(module)
    images, tokens = getattr(module, "inputs", clip.inputs)({**batch, "image": batch["image"].to(clip.std.device)})
    boxes = (batch[name].to(clip.std.device) for name in ("content_box", "chest_box"))
    return method.attribute(clip, images, tokens, batch["phrase"], *boxes), tokens


def _clip_of(module: Any) -> Clip:
    return getattr(module, "clip", module)


def _pair(batch: ImageTextBatch, row: int, *, show_finding: bool = True) -> dict[str, Any]:
    """Arguments of a pair's picture that are the same for all methods."""
    finding = batch["finding"][row] if show_finding else ""
    return {
        "image": _gray(batch["image"][row, 0]),
        "boxes": batch["boxes"][row].cpu().numpy(),
        "phrase": batch["phrase"][row],
        "title": " | ".join(part for part in (finding, batch["id"][row]) if part),
    }


def _gray(image: Tensor) -> Picture:
    """Pixels `(H, W)` as uint8, from uint8 or from float in [0, 1]."""
    if image.is_floating_point():
        image = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(image.cpu().numpy())
