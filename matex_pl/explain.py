"""From studies to pictures: what the callbacks show and `matex explain` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.clip import Clip
from matex_pl.data.record import Sample, Study, StudyBatch, collate
from matex_pl.data.transforms import FilmTransform
from matex_pl.maps import AttributionMaps
from matex_pl.module import ClipModule
from matex_pl.render import Picture, panel, save_png


def explain_batch(module: Any, method: AttributionMethod, batch: StudyBatch, subtitle: str) -> list[Picture]:
    """One panel per study of the batch, `(h, w, 3)` uint8 each.

    Args:
        module: A `ClipModule`, or any module with `clip` and `inputs`.
        method: What makes the maps.
        batch: Studies, on any device.
        subtitle: Second line of the panels.
    """
    images, tokens = module.inputs({**batch, "image": batch["image"].to(module.device)})
    maps = method.attribute(module.clip, images, tokens, batch["phrase"], batch["film"].to(module.device))
    return [_panel(module.clip, maps, batch, tokens, row, subtitle) for row in range(len(batch["id"]))]


def _panel(
    clip: Clip, maps: AttributionMaps, batch: StudyBatch, tokens: torch.Tensor, row: int, subtitle: str
) -> Picture:
    content = maps.content[row]
    title = " | ".join(part for part in (batch["finding"][row], batch["id"][row]) if part)
    return panel(
        film=np.ascontiguousarray(batch["image"][row, 0].cpu().numpy()),
        heat=maps.image[row].float().cpu().numpy(),
        boxes=batch["boxes"][row].cpu().numpy(),
        phrase=batch["phrase"][row],
        tokens=clip.pieces(tokens[row][content]),
        relevance=maps.text[row][content].float().cpu().tolist(),
        score=float(maps.score[row]),
        title=title,
        subtitle=subtitle,
    )


def explain_film(
    image: str,
    phrase: str,
    ckpt_path: str,
    out: str = "panel.png",
    method: AttributionMethod | None = None,
    geometry: str = "pad",
) -> Path:
    """Write one panel: where the model looks on a film for a phrase, and which words matter.

    Args:
        image: The film, PNG or JPEG.
        phrase: A sentence as a report words it, e.g. "Left lower lobe consolidation."
        ckpt_path: A checkpoint of `matex fit`.
        out: The picture to write.
        method: What makes the map; `Matex.measured()` by default.
        geometry: How the film gets into the model's frame: `pad` or `squash`, as in training.

    Returns:
        The path of the picture.
    """
    if not phrase.strip():
        raise ValueError("The phrase is empty. Give a sentence as a report words it, in quotes.")
    film = _read_film(Path(image))
    module = load_module(ckpt_path)
    study = Study(id=Path(image).name, patient_id="", film_id=Path(image).name, image=image, phrase=phrase)
    sample = Sample(study, *FilmTransform(module.clip.image_size, geometry)(film))
    method = method or Matex.measured()
    picture = explain_batch(module, method, collate([sample]), type(method).__name__)[0]
    return save_png(out, picture)


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
        raise ValueError(f"{ckpt_path} is no checkpoint of `matex fit`: {str(error).splitlines()[0]}") from error


def _read_film(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"No film at {str(path)!r}.")
    film = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if film is None:
        raise ValueError(f"{path} is no readable PNG or JPEG image.")
    return film
