"""`matex explain`: one image, one phrase, one panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matex_pl import attribution
from matex_pl.arguments import import_all
from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.shipped import load_method, method_names, shipped_methods
from matex_pl.commands.options import NAMED_METHODS, RefusingParser, call_parsed, check_one_model
from matex_pl.data.images import ResizeMode, read_size
from matex_pl.files import check_output
from matex_pl.viewer.outputs import check_map_files

if TYPE_CHECKING:
    from matex_pl.clip.model import Clip
    from matex_pl.data.pair import ImageTextBatch
    from matex_pl.viewer.placed import PlacedMap


def main(words: Sequence[str]) -> None:
    """`matex explain IMAGE PHRASE --ckpt_path FILE` or `--model NAME`: draw one panel and print its path."""
    # All methods import torch, which help and error messages do not need.
    if any(word.startswith("--method") for word in words):
        import_all(attribution)
    parser = RefusingParser(
        prog="matex explain",
        description="Draw one panel: where the model looks in an image, and which words matter.",
        epilog=f"Shipped settings of methods: {', '.join(method_names())}.",
        parser_mode=NAMED_METHODS,
    )
    parser.add_argument("image", help="Image file: PNG, JPEG, DICOM.")
    parser.add_argument("phrase", help='Sentence as in a report, e.g. "Left lower lobe consolidation."')
    parser.add_function_arguments(explain_image, skip={"image", "phrase"}, sub_configs=True)
    print(call_parsed(parser, explain_image, words))


def explain_image(
    image: str,
    phrase: str,
    ckpt_path: str | None = None,
    out: str = "panel.png",
    method: AttributionMethod | str | None = None,
    resize_mode: ResizeMode | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    dicom: str | None = None,
) -> Path:
    """Draw one panel: where the model looks in an image for a phrase, and which words matter.

    Args:
        image: Image file: PNG, JPEG, DICOM and more; see `read_image`.
        phrase: Sentence as in a report, e.g. "Left lower lobe consolidation."
        ckpt_path: Checkpoint of `matex fit`. For any other CLIP model, give `model` instead.
        out: Path of the picture, `.png`. A path in `.npz` gets the map in pixels of the image, as arrays. A path in
            `.dcm` gets the map as a DICOM object in the study of a DICOM image.
        method: Attribution method, `Matex.recommended()` by default: the name of a shipped setting (`m2ib`), a class
            (`M2ib`), or a YAML file with `class_path` and `init_args`. With `all`, the picture is a contact sheet of
            all shipped settings.
        resize_mode: How the image is fitted into the model's input: `longest`, `shortest` or `squash`. By default as in
            the training of the checkpoint; for another model `squash` if it states that (SigLIP), else `longest`.
        model: CLIP model: an open_clip name (`ViT-B-32`), `hf-hub:org/repo`, a folder or a JSON config, such as the
            shipped `models/chexzero.json`.
        pretrained: Weights of `model`: a tag of open_clip (`openai`) or a file, also a training checkpoint of other
            code or the index of a sharded model. An `hf-hub:` model and a folder bring their own.
        dicom: DICOM objects for an output in `.dcm`, with commas between them: `sc`, a color image with the map burned
            in, is always written; `gsps` adds outlines and boxes, `seg` a segmentation, `pm` a parametric map.

    Returns:
        Path of the picture, of the arrays or of the color image.

    Raises:
        NotImplementedError: The method does not support the model; with `all`, no method does.
        OSError: A file cannot be read, or `out` cannot be written.
        ValueError: The phrase is empty, or not exactly one of `ckpt_path` and `model` is given, or `model` has no
            weights, or `out` would replace something else than an earlier picture.
    """
    if not phrase.strip():
        raise ValueError("The phrase is empty. Give a sentence as in a report, in quotes.")
    trained = check_one_model("--ckpt_path", ckpt_path, model, pretrained)
    path = Path(out)
    files = None
    if path.suffix.lower() in (".dcm", ".npz"):
        if method == "all":
            raise ValueError(f"With --method all, out must end in .png, got {out!r}.")
        # Report a wrong path before anything is read from the image.
        read_size(image)
        files = check_map_files(out, image, dicom)
    elif path.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, .dcm or .npz, got {out!r}.")
    elif dicom is not None:
        raise ValueError(f"--dicom {dicom} needs an output that ends in .dcm, got {out!r}. Give --out map.dcm.")
    check_output(path, inputs=(image,))

    from matex_pl.attribution import Matex
    from matex_pl.clip import load_clip, load_trained
    from matex_pl.explain import compare_methods, explain_batch, pair_batch
    from matex_pl.visualization.draw import save_png

    single = None if method == "all" else load_method(method or Matex.recommended())
    # Report a wrong path before loading the model.
    read_size(image)
    clip = load_trained(trained) if trained else load_clip(str(model), pretrained)
    batch = pair_batch(clip, image, phrase, resize_mode)
    if single is None:
        return save_png(path, compare_methods(clip, shipped_methods(), batch))
    if files is None:
        return save_png(path, explain_batch(clip, single, batch, type(single).__name__)[0])
    return files.save(_placed(clip, single, batch, image, resize_mode, trained or str(model)))


def _placed(
    clip: Clip, method: AttributionMethod, batch: ImageTextBatch, image: str, resize_mode: ResizeMode | None, model: str
) -> PlacedMap:
    """Map of a batch of one pair on the pixels of its stored image."""
    from matex_pl.data.transforms import ImageTransform
    from matex_pl.evaluation.store import describe_method, weight_hash
    from matex_pl.explain import attribute_batch
    from matex_pl.explain.place import place_maps

    maps, tokens = attribute_batch(clip, method, batch)
    transform = ImageTransform(clip.image_size, resize_mode or clip.resize_mode)
    settings = {
        "method": describe_method(method),
        "model": model,
        "weights": weight_hash(clip),
        "resize_mode": transform.resize_mode,
        "input_size": transform.size,
    }
    name = type(method).__name__
    return place_maps(maps, transform, read_size(image), clip, tokens, batch["phrase"], name, settings)[0]
