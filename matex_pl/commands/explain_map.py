"""`matex explain --out map.dcm` and `map.npz`: the map of one phrase for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matex_pl.commands.explain_anatomy import ImageMasks
from matex_pl.commands.explain_folders import Run
from matex_pl.data.images import read_size
from matex_pl.viewer.outputs import check_map_files


def explain_map(
    image: str, phrase: str, out: Path, dicom: str | None, anatomy: str | None = None, **settings: Any
) -> Path:
    """Write the map of one phrase as arrays (`.npz`), or as DICOM objects (`.dcm`) of the image's study.

    Args:
        image: Image file.
        phrase: The phrase.
        out: Path in `.npz` or `.dcm`.
        dicom: Kinds of DICOM objects, with commas between them.
        anatomy: Masks of the image, see `ImageMasks`.
        settings: Method, threshold and model; see `matex_pl.commands.explain.explain`.

    Returns:
        `out`.
    """
    # Report a wrong path before loading the model.
    read_size(image)
    files = check_map_files(out, image, dicom)
    masks = ImageMasks(anatomy, [Path(image)], device=settings.get("device", "auto"))
    run = Run.load(**settings)

    from matex_pl.explain.phrases import explain_phrases, frame_image
    from matex_pl.explain.place import place_maps

    phrase = " ".join(phrase.split())
    framed = frame_image(run.clip, image, run.resize_mode, masks(Path(image)))
    explained = explain_phrases(run.clip, run.method, framed, [phrase])
    described = run.settings(image, phrase, all_sentences=True, anatomy=anatomy)
    return files.save(next(place_maps(run.clip, explained, type(run.method).__name__, described)))
