"""`matex explain`: one image, one phrase, one panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matex_pl import attribution
from matex_pl.arguments import import_all
from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.shipped import load_method, method_names, shipped_methods
from matex_pl.commands.options import NAMED_METHODS, RefusingParser, call_parsed, check_one_model
from matex_pl.data.images import ResizeMode
from matex_pl.files import check_output


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
) -> Path:
    """Draw one panel: where the model looks in an image for a phrase, and which words matter.

    Args:
        image: Image file: PNG, JPEG, DICOM and more; see `read_image`.
        phrase: Sentence as in a report, e.g. "Left lower lobe consolidation."
        ckpt_path: Checkpoint of `matex fit`. For any other CLIP model, give `model` instead.
        out: Path of the picture.
        method: Attribution method, `Matex.recommended()` by default: the name of a shipped setting (`m2ib`), a class
            (`M2ib`), or a YAML file with `class_path` and `init_args`. With `all`, the picture is a contact sheet of
            all shipped settings.
        resize_mode: How the image is fitted into the model's input: `longest`, `shortest` or `squash`. By default as in
            the training of the checkpoint; for another model `squash` if it states that (SigLIP), else `longest`.
        model: CLIP model: an open_clip name (`ViT-B-32`), `hf-hub:org/repo`, a folder or a JSON config, such as the
            shipped `models/chexzero.json`.
        pretrained: Weights of `model`: a tag of open_clip (`openai`) or a file, also a training checkpoint of other
            code or the index of a sharded model. An `hf-hub:` model and a folder bring their own.

    Returns:
        Path of the picture.

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
    if path.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {out!r}.")
    check_output(path, inputs=(image,))

    from matex_pl.attribution import Matex
    from matex_pl.clip import load_clip, load_trained
    from matex_pl.data.images import read_size
    from matex_pl.explain import compare_methods, explain_batch, pair_batch
    from matex_pl.visualization.draw import save_png

    single = None if method == "all" else load_method(method or Matex.recommended())
    # Report a wrong path before loading the model.
    read_size(image)
    clip = load_trained(trained) if trained else load_clip(str(model), pretrained)
    batch = pair_batch(clip, image, phrase, resize_mode)
    if single is None:
        return save_png(path, compare_methods(clip, shipped_methods(), batch))
    return save_png(path, explain_batch(clip, single, batch, type(single).__name__)[0])
