"""From studies to pictures: what the callbacks show and `matex explain` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.base import progress
from matex_pl.attribution.shipped import load_method, shipped_methods
from matex_pl.checkpoints import no_checkpoint
from matex_pl.clip import Clip
from matex_pl.data.pixels import film_size, read_film
from matex_pl.data.record import Sample, Study, StudyBatch, collate
from matex_pl.data.transforms import FilmTransform
from matex_pl.maps import AttributionMaps
from matex_pl.module import ClipModule
from matex_pl.render import DESIGN_WIDTH, Picture, panel, save_png
from matex_pl.render_sheet import Entry, contact_sheet


def explain_batch(
    module: Any, method: AttributionMethod, batch: StudyBatch, subtitle: str, *, show_words: bool = True
) -> list[Picture]:
    """One panel per study of the batch, `(h, w, 3)` uint8 each.

    Args:
        module: A `ClipModule`, or any module with `clip` and `inputs`.
        method: What makes the maps.
        batch: Studies, on any device.
        subtitle: Second line of the panels.
        show_words: Write what the report says; otherwise a panel has bars for the words and no finding.
    """
    maps, tokens = _attribute(module, method, batch)
    return draw_panels(module.clip, maps, batch, tokens, subtitle, show_words=show_words)


def draw_panels(
    clip: Clip,
    maps: AttributionMaps,
    batch: StudyBatch,
    tokens: Tensor,
    subtitle: str,
    width: int = DESIGN_WIDTH,
    *,
    show_words: bool = True,
) -> list[Picture]:
    """One panel per study of the batch, `(h, width, 3)` uint8 each, of maps that are there; see `explain_batch`."""
    return [
        panel(
            heat=maps.image[row].float().cpu().numpy(),
            relevance=maps.text[row][maps.content[row]].tolist(),
            score=float(maps.score[row]),
            subtitle=subtitle,
            width=width,
            show_words=show_words,
            **_study(clip, batch, tokens[row], maps.content[row], row, show_finding=show_words),
        )
        for row in range(len(batch["id"]))
    ]


def compare_methods(module: Any, methods: Mapping[str, AttributionMethod], batch: StudyBatch) -> Picture:
    """A contact sheet of one study, `(h, w, 3)` uint8: its film, and the map and the words of each method.

    Args:
        module: A `ClipModule`, or any module with `clip` and `inputs`.
        methods: By the name to write under the map. One that refuses the model is shown with its reason.
        batch: One study.
    """
    entries = []
    for name, method in progress(methods.items(), "methods"):
        try:
            maps, tokens = _attribute(module, method, batch)
        except NotImplementedError as error:
            entries.append(Entry(name, None, None, str(error)))
            continue
        words = maps.text[0][maps.content[0]].tolist() if method.serves_text else None
        entries.append(Entry(name, maps.image[0].float().cpu().numpy(), words, getattr(method, "explain", "")))
    if all(entry.heat is None for entry in entries):
        raise NotImplementedError(entries[0].note)
    study = _study(module.clip, batch, tokens[0], maps.content[0], 0)
    return contact_sheet(entries=entries, score=float(maps.score[0]), **study)


def _attribute(module: Any, method: AttributionMethod, batch: StudyBatch) -> tuple[AttributionMaps, Tensor]:
    images, tokens = module.inputs({**batch, "image": batch["image"].to(module.device)})
    return method.attribute(module.clip, images, tokens, batch["phrase"], batch["film"].to(module.device)), tokens


def _study(
    clip: Clip, batch: StudyBatch, tokens: Tensor, content: Tensor, row: int, *, show_finding: bool = True
) -> dict[str, Any]:
    """What every picture of a study shows, whatever the method."""
    finding = batch["finding"][row] if show_finding else ""
    return {
        "film": np.ascontiguousarray(batch["image"][row, 0].cpu().numpy()),
        "boxes": batch["boxes"][row].cpu().numpy(),
        "phrase": batch["phrase"][row],
        "tokens": clip.pieces(tokens[content]),
        "title": " | ".join(part for part in (finding, batch["id"][row]) if part),
    }


def explain_film(
    image: str,
    phrase: str,
    ckpt_path: str,
    out: str = "panel.png",
    method: AttributionMethod | str | None = None,
    geometry: str = "pad",
) -> Path:
    """Write one panel: where the model looks on a film for a phrase, and which words matter.

    Args:
        image: The film: PNG, JPEG, DICOM and more; see `read_film`.
        phrase: A sentence as a report words it, e.g. "Left lower lobe consolidation."
        ckpt_path: A checkpoint of `matex fit`.
        out: The picture to write.
        method: What makes the map, `Matex.measured()` by default: the name of a shipped setting (`m2ib`), a YAML file
            with `class_path` and `init_args`, a class (`M2ib`), or `all` for a contact sheet of every shipped one.
        geometry: How the film gets into the model's frame: `pad`, `crop` or `squash`, as in training.

    Returns:
        The path of the picture.
    """
    if not phrase.strip():
        raise ValueError("The phrase is empty. Give a sentence as a report words it, in quotes.")
    single = None if method == "all" else load_method(method or Matex.measured())
    # A wrong path should be said before a model is loaded.
    film_size(image)
    module = load_module(ckpt_path)
    transform = FilmTransform(module.clip.image_size, geometry)
    film = read_film(image, transform.fit)
    study = Study(id=Path(image).name, patient_id="", film_id=Path(image).name, image=image, phrase=phrase)
    batch = collate([Sample(study, *transform(film.pixels, size=film.size))])
    if single is None:
        return save_png(out, compare_methods(module, shipped_methods(), batch))
    return save_png(out, explain_batch(module, single, batch, type(single).__name__)[0])


def load_module(ckpt_path: str) -> ClipModule:
    """The module of a checkpoint, on the CPU in eval mode; no code of the file is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of `matex fit`.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"No checkpoint at {ckpt_path!r}. `matex fit` writes them below its log folder.")
    try:
        return ClipModule.load_from_checkpoint(ckpt_path, map_location="cpu", weights_only=True).eval()
    except Exception as error:
        raise no_checkpoint(ckpt_path, error) from error
