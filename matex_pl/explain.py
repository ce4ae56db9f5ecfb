"""Panels and contact sheets of pairs, for the callbacks and for `matex explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.data.pair import ImageTextBatch
from matex_pl.maps import Attribution
from matex_pl.visualization.draw import DESIGN_WIDTH, Picture
from matex_pl.visualization.panel import CARD_WIDTH, panel
from matex_pl.visualization.sheet import Entry, contact_sheet


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
        module: `ClipModule`, or any module with `clip` and `inputs`.
        method: Attribution method.
        batch: Pairs, on any device.
        subtitle: Second line of the panels.
        show_text: Whether to write the phrase and the finding; if not, bars stand for the words.
        stacked: Whether the map stands above the image, in the width of TensorBoard's cards.
    """
    maps, tokens = _attribute(module, method, batch)
    width = CARD_WIDTH if stacked else DESIGN_WIDTH
    return draw_panels(module.clip, maps, batch, tokens, subtitle, width, show_text=show_text, stacked=stacked)


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
    """One panel per pair of the batch, `(h, width, 3)` uint8 each, from computed maps; see `explain_batch`."""
    return [
        panel(
            heat=maps.image[row].float().cpu().numpy(),
            relevance=maps.text[row][maps.content[row]].tolist(),
            score=float(maps.score[row]),
            subtitle=subtitle,
            width=width,
            show_text=show_text,
            stacked=stacked,
            **_pair(clip, batch, tokens[row], maps.content[row], row, show_finding=show_text),
        )
        for row in range(len(batch["id"]))
    ]


def compare_methods(module: Any, methods: Mapping[str, AttributionMethod], batch: ImageTextBatch) -> Picture:
    """Contact sheet of one pair, `(h, w, 3)` uint8: its image, and the map and the words of each method.

    Args:
        module: `ClipModule`, or any module with `clip` and `inputs`.
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
            maps, tokens = _attribute(module, method, batch)
        except (NotImplementedError, ValueError) as error:
            entries.append(Entry(name, None, None, str(error)))
            errors.append(error)
            continue
        words = maps.text[0][maps.content[0]].tolist() if method.supports_text else None
        entries.append(Entry(name, maps.image[0].float().cpu().numpy(), words, getattr(method, "target", "")))
    if len(errors) == len(entries):
        raise errors[0]
    pair = _pair(module.clip, batch, tokens[0], maps.content[0], 0)
    return contact_sheet(entries=entries, score=float(maps.score[0]), **pair)


def _attribute(module: Any, method: AttributionMethod, batch: ImageTextBatch) -> tuple[Attribution, Tensor]:
    images, tokens = module.inputs({**batch, "image": batch["image"].to(module.device)})
    content_box = batch["content_box"].to(module.device)
    return method.attribute(module.clip, images, tokens, batch["phrase"], content_box), tokens


def _pair(
    clip: Clip, batch: ImageTextBatch, tokens: Tensor, content: Tensor, row: int, *, show_finding: bool = True
) -> dict[str, Any]:
    """Arguments of a pair's picture that are the same for all methods."""
    finding = batch["finding"][row] if show_finding else ""
    return {
        "image": np.ascontiguousarray(batch["image"][row, 0].cpu().numpy()),
        "boxes": batch["boxes"][row].cpu().numpy(),
        "phrase": batch["phrase"][row],
        "tokens": clip.pieces(tokens[content]),
        "title": " | ".join(part for part in (finding, batch["id"][row]) if part),
    }
