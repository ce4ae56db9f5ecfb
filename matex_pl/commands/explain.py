"""`matex explain`: panels, folders of reports, and comparisons of phrases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from matex_pl import attribution
from matex_pl.arguments import import_all
from matex_pl.attribution.base import AttributionMethod
from matex_pl.attribution.shipped import load_method, method_names, shipped_methods
from matex_pl.commands.options import NAMED_METHODS, RefusingParser, call_parsed, check_one_model
from matex_pl.data.images import ResizeMode
from matex_pl.files import check_output
from matex_pl.viewer.objects import dicom_kinds
from matex_pl.viewer.outputs import MAP_SUFFIXES

_FLAGS = ("--all_sentences",)
_FILES = (".bmp", ".csv", ".gif", ".html", ".jpeg", ".jpg", ".json", ".pdf", ".svg", ".tif", ".tiff", ".txt", ".webp")


def main(words: Sequence[str]) -> None:
    """`matex explain IMAGE PHRASE --ckpt_path FILE` or `--model NAME`: write the picture or folder, print its path."""
    # All methods import torch, which help and error messages do not need.
    if any(word.startswith("--method") for word in words):
        import_all(attribution)
    parser = RefusingParser(
        prog="matex explain",
        description="Draw where the model looks in an image for a phrase or for the sentences of a report.",
        epilog=f"Shipped settings of methods: {', '.join(method_names())}.",
        parser_mode=NAMED_METHODS,
    )
    parser.add_argument("image", nargs="?", help="Image file: PNG, JPEG, DICOM.")
    parser.add_argument("phrases", nargs="*", help='Sentences as in a report, e.g. "Left lower lobe consolidation."')
    parser.add_argument("--all_sentences", action="store_true", help="Map sentences without a finding, too.")
    parser.add_function_arguments(explain, skip={"image", "phrases", "all_sentences"}, sub_configs=True)
    print(call_parsed(parser, explain, list(_options_first(words))))


def _options_first(words: Sequence[str]) -> Iterator[str]:
    """The words with options in front: argparse takes a list of phrases only without options within."""
    values = {
        place + 1
        for place, (option, value) in enumerate(pairwise(words))
        if option.startswith("--") and "=" not in option and option not in _FLAGS and not value.startswith("--")
    }
    chosen = [place in values or bool(re.match(r"--?\w\S*$", word)) for place, word in enumerate(words)]
    yield from (word for word, is_option in zip(words, chosen, strict=True) if is_option)
    yield from (word for word, is_option in zip(words, chosen, strict=True) if not is_option)


def explain(
    image: str | None = None,
    phrases: Sequence[str] = (),
    ckpt_path: str | None = None,
    out: str | None = None,
    report: str | None = None,
    manifest: str | None = None,
    all_sentences: bool = False,
    compare: str | None = None,
    method: AttributionMethod | str | None = None,
    threshold: float | str = 0.5,
    resize_mode: ResizeMode | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    dicom: str | None = None,
    anatomy: str | None = None,
    device: str = "auto",
) -> Path:
    """Draw where the model looks in an image for a phrase or for the sentences of a report.

    Args:
        image: Image file: PNG, JPEG, DICOM and more; see `read_image`.
        phrases: Sentences as in a report.
        ckpt_path: Checkpoint of `matex fit`. For any other CLIP model, give `model` instead.
        out: Output. A name that ends in .png gives a picture. For one phrase, .npz gives the map in pixels of the
            image as arrays, and .dcm the map as a DICOM object in the study of a DICOM image. Any other name gives a
            folder with a page. By default `panel.png` for one phrase, `compare.png` for a comparison, and the folder
            `explained` otherwise.
        report: Report, instead of phrases: a text file, the text itself, or `-` for standard input. Sentences with a
            finding that is not denied get a map.
        manifest: Table with the columns `image` and `report`, instead of an image: one folder per image in `out`. A
            run that was interrupted continues.
        all_sentences: Whether sentences that name no finding get a map, too.
        compare: Draw the maps of the phrase and of another one, and their difference: `OLD/NEW` replaces words of the
            phrase, `mirrored` exchanges right and left, any other text is the other phrase.
        method: Attribution method, `Matex.recommended()` by default: the name of a shipped setting (`m2ib`), a class
            (`M2ib`), or a YAML file with `class_path` and `init_args`. With `all`, the picture is a contact sheet of
            all shipped settings.
        threshold: Threshold of the boxes around parts of the map, in [0, 1): a number, or the folder of a `matex
            benchmark` of this model, whose threshold for the method is used.
        resize_mode: How the image is fitted into the model's input: `longest`, `shortest` or `squash`. By default as in
            the training of the checkpoint; for another model `squash` if it states that (SigLIP), else `longest`.
        model: CLIP model: an open_clip name (`ViT-B-32`), `hf-hub:org/repo`, a folder or a JSON config, such as the
            shipped `models/chexzero.json`.
        pretrained: Weights of `model`: a tag of open_clip (`openai`) or a file, also a training checkpoint of other
            code or the index of a sharded model. An `hf-hub:` model and a folder bring their own.
        dicom: DICOM objects for an output in .dcm, or for each sentence of a folder, with commas between them: `sc`, a
            color image with the map burned in, is always written; `gsps` adds outlines and boxes, `seg` a
            segmentation, `pm` a parametric map.
        anatomy: Masks of lungs and heart: a CSV file of CheXmask, or `torchxrayvision` (extra `anatomy`), which
            segments the image. The folder then has the share of each map in each structure, and the spatial prior has
            the frame of the chest.
        device: `cpu`, `cuda`, `mps`, or `auto`, which uses a GPU of CUDA if there is one.

    Returns:
        Path of the picture, file or folder.

    Raises:
        NotImplementedError: The method does not support the model; with `all`, no method does.
        OSError: A file cannot be read, or `out` cannot be written.
        ValueError: The options contradict each other, no sentence of the report gets a map, or `out` would replace
            something else than an earlier output.
    """
    _check_inputs(image, phrases, report, manifest, compare)
    path = _output(out, "explained" if manifest or report or len(phrases) > 1 else "panel.png", compare)
    is_picture = path.suffix.lower() == ".png"
    check_one_model("--ckpt_path", ckpt_path, model, pretrained)
    models = {"ckpt_path": ckpt_path, "model": model, "pretrained": pretrained}
    if method == "all" and not (is_picture and len(phrases) == 1 and compare is None):
        raise ValueError("--method all compares methods on one phrase. Give one phrase, and --out with a .png file.")
    is_map = path.suffix.lower() in MAP_SUFFIXES
    if is_map and (len(phrases) != 1 or path.is_dir()):
        raise ValueError(
            f"A file in {path.suffix} takes the map of one phrase. Give a folder as --out, not {str(path)!r}."
        )
    if dicom is not None and (is_picture or path.suffix.lower() == ".npz"):
        raise ValueError(f"--dicom {dicom} needs an output in .dcm or a folder, got {str(path)!r}. Give --out map.dcm.")
    kinds = dicom_kinds(dicom) if dicom is not None else ()
    if anatomy is not None and (compare is not None or (is_picture and len(phrases) == 1)):
        raise ValueError(f"--anatomy {anatomy} needs a folder, .npz or .dcm as --out. Give --out with a folder.")
    if compare is not None:
        from matex_pl.commands.explain_compared import explain_compared

        return explain_compared(str(image), phrases[0], compare, path, method, resize_mode, device=device, **models)
    if is_picture and len(phrases) == 1:
        return explain_image(
            str(image), phrases[0], ckpt_path, str(path), method, resize_mode, model, pretrained, device
        )
    if is_picture and manifest is not None:
        raise ValueError(f"A manifest gives a folder per image. Give a folder as --out, not {str(path)!r}.")

    from matex_pl.commands.explain_folders import explain_manifest, explain_report
    from matex_pl.commands.report_input import check_threshold_option, given_sentences, report_sentences

    check_threshold_option(threshold)
    settings = {"method": method, "threshold": threshold, "resize_mode": resize_mode, "device": device, **models}
    if is_map:
        from matex_pl.commands.explain_map import explain_map

        return explain_map(str(image), phrases[0], path, dicom, anatomy, **settings)
    if manifest is not None:
        return explain_manifest(manifest, path, all_sentences=all_sentences, anatomy=anatomy, kinds=kinds, **settings)
    if report is None:
        text, sentences = given_sentences(phrases)
    else:
        text, sentences = report_sentences(report, all_sentences=all_sentences)
    return explain_report(
        str(image), text, sentences, path, all_sentences=all_sentences, anatomy=anatomy, kinds=kinds, **settings
    )


def explain_image(
    image: str,
    phrase: str,
    ckpt_path: str | None = None,
    out: str = "panel.png",
    method: AttributionMethod | str | None = None,
    resize_mode: ResizeMode | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
) -> Path:
    """Draw one panel: where the model looks in an image for a phrase, and which words matter.

    See `explain` for the arguments. With the method `all`, the picture is a contact sheet of all shipped settings.

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
    from matex_pl.clip.device import find_device
    from matex_pl.data.images import read_size
    from matex_pl.explain import compare_methods, explain_batch, pair_batch
    from matex_pl.visualization.draw import save_png

    single = None if method == "all" else load_method(method or Matex.recommended())
    # Report a wrong path before loading the model.
    read_size(image)
    place = find_device(device)
    clip = (load_trained(trained) if trained else load_clip(str(model), pretrained)).to(place)
    batch = pair_batch(clip, image, phrase, resize_mode)
    if single is None:
        return save_png(path, compare_methods(clip, shipped_methods(), batch))
    return save_png(path, explain_batch(clip, single, batch, type(single).__name__)[0])


def _check_inputs(
    image: str | None, phrases: Sequence[str], report: str | None, manifest: str | None, compare: str | None
) -> None:
    """Refuse inputs that are missing or contradict each other."""
    if manifest is not None:
        given = [
            name
            for name, value in (("an image", image), ("--report", report), ("--compare", compare))
            if value is not None
        ]
        if given:
            raise ValueError(
                f"--manifest brings its own images and reports, and does not go with {given[0]}. Leave out one of them."
            )
        return
    if image is None:
        raise ValueError("No image given. Give an image file and a phrase, or --manifest with a table.")
    if report is None and not phrases:
        raise ValueError("No phrase given. Give a phrase in quotes, or --report with a text file.")
    if report is not None and phrases:
        raise ValueError(
            f"--report does not go with phrases, got the phrase {phrases[0]!r}. Leave out the phrases or the report."
        )
    if any(not phrase.strip() for phrase in phrases):
        raise ValueError("The phrase is empty. Give a sentence as in a report, in quotes.")
    if compare is not None and len(phrases) != 1:
        raise ValueError("--compare takes one phrase, and compares its map with that of another. Give one phrase.")


def _output(out: str | None, default: str, compare: str | None) -> Path:
    """Path of the output; a picture or a folder, depending on its name."""
    path = Path(out or ("compare.png" if compare is not None else default))
    is_file = path.exists() and not path.is_dir()
    suffix = path.suffix.lower()
    is_known = suffix == ".png" or (suffix in MAP_SUFFIXES and compare is None)
    if not is_known and (is_file or suffix in _FILES or compare is not None):
        others = "" if compare is not None else ", .npz or .dcm, or name a folder"
        raise ValueError(f"out must end in .png{others}, got {str(path)!r}.")
    return path
