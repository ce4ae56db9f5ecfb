"""`matex explain --compare`: the maps of a phrase and of another phrase, and their difference."""

from __future__ import annotations

import re
from pathlib import Path

from matex_pl.anatomy.laterality import swap_sides
from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.shipped import load_method
from matex_pl.commands.options import check_one_model
from matex_pl.data.images import ResizeMode, read_size
from matex_pl.files import check_output


def other_phrase(phrase: str, compare: str) -> str:
    """The phrase to compare with.

    Args:
        phrase: The phrase.
        compare: `mirrored` exchanges right and left, `OLD/NEW` replaces the words OLD of the phrase by NEW, any other
            text is the other phrase.

    Raises:
        ValueError: The phrase names no side that can be exchanged, or does not have the words OLD, or nothing changes.
    """
    if compare.strip().lower() == "mirrored":
        other = swap_sides(phrase)
        reason = f"the phrase {phrase!r} names no side that can be exchanged"
    elif compare.count("/") == 1:
        old, new = (part.strip() for part in compare.split("/"))
        words = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)", re.IGNORECASE)
        if not old or not words.search(phrase):
            raise ValueError(
                f"--compare {compare!r} replaces {old!r} by {new!r}, but the phrase {phrase!r} does not have the words "
                f"{old!r}. Give words of the phrase, or another phrase without a slash."
            )
        # A word at the begin of the phrase keeps its capital.
        capital = new[:1].upper() + new[1:]
        other = words.sub(lambda match: capital if match.group()[0].isupper() else new, phrase)
        other = " ".join(other.split())
        reason = "the words are the same"
    else:
        other, reason = compare, "the two phrases are the same"
    if not other.strip():
        raise ValueError(f"--compare {compare!r} leaves an empty phrase. Give another phrase.")
    if other.split() == phrase.split():
        raise ValueError(f"--compare {compare!r} changes nothing: {reason}. Give OLD/NEW or another phrase.")
    return other


def explain_compared(
    image: str,
    phrase: str,
    compare: str,
    out: Path,
    method: AttributionMethod | str | None = None,
    resize_mode: ResizeMode | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
) -> Path:
    """Draw the maps of a phrase and of another phrase, and their difference.

    See `matex_pl.commands.explain.explain` for the arguments, and `other_phrase` for `compare`.

    Returns:
        Path of the picture.

    Raises:
        NotImplementedError: The method does not support the model.
        OSError: A file cannot be read, or `out` cannot be written.
        ValueError: There is no other phrase, or `out` would replace something else than an earlier picture.
    """
    other = other_phrase(phrase, compare)
    trained = check_one_model("--ckpt_path", ckpt_path, model, pretrained)
    check_output(out, inputs=(image,))
    # Report a wrong path before loading the model.
    read_size(image)

    from matex_pl.attribution import Matex
    from matex_pl.clip import load_clip, load_trained
    from matex_pl.clip.device import find_device
    from matex_pl.explain.phrases import explain_phrases, frame_image
    from matex_pl.visualization.difference import Compared, difference_panel
    from matex_pl.visualization.draw import save_png

    single = load_method(method or Matex.recommended())
    place = find_device(device)
    clip = (load_trained(trained) if trained else load_clip(str(model), pretrained)).to(place)
    explained = explain_phrases(clip, single, frame_image(clip, image, resize_mode), [phrase, other])
    rows = zip([phrase, other], explained.heats, explained.maps.words, explained.maps.score.tolist(), strict=True)
    picture = difference_panel(
        image=explained.batch["image"][0, 0].numpy(),
        pair=[Compared(text, heat, words if single.supports_text else [], score) for text, heat, words, score in rows],
        title=explained.image.name,
        subtitle=type(single).__name__,
    )
    return save_png(out, picture)
