"""`matex export`: a checkpoint or model as a folder for open_clip or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from matex_pl.commands.options import RefusingParser, call_parsed, check_one_model
from matex_pl.files import check_folder, whole_folder

Format = Literal["open_clip", "transformers"]


def main(words: Sequence[str]) -> None:
    """`matex export CKPT --format FORMAT --out FOLDER`: write a folder and print its path."""
    parser = RefusingParser(
        prog="matex export",
        description="Write a model as a folder that open_clip or transformers read without this package.",
    )
    parser.add_argument("ckpt_path", nargs="?", help="Checkpoint of `matex fit`. For any other model, give --model.")
    parser.add_function_arguments(export_model, skip={"ckpt_path"})
    print(call_parsed(parser, export_model, words))


def export_model(
    format: Format,
    out: str,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
) -> Path:
    """Write a model as a folder that open_clip or transformers read without this package.

    The folder holds weights, config, tokenizer, preprocessing and a model card. The card lists the data, the settings
    and the last scores of the training, if the checkpoint records them. Both libraries compute the same
    embeddings as this package.

    Args:
        format: `open_clip` for `open_clip.create_model_and_transforms("local-dir:FOLDER")`, or `transformers` for
            `CLIPModel.from_pretrained(FOLDER)` and `SiglipModel.from_pretrained(FOLDER)`.
        out: Path of the folder. An earlier export there is replaced.
        ckpt_path: Checkpoint of `matex fit`. For any other CLIP model, give `model` instead.
        model: CLIP model: an open_clip name (`ViT-B-32`), `hf-hub:org/repo`, a folder or a JSON config.
        pretrained: Weights of `model`: a tag of open_clip (`openai`) or a file. A folder or repository brings its own.

    Returns:
        Path of the folder.

    Raises:
        ImportError: The package transformers is missing.
        NotImplementedError: The format cannot express the model; the message names the part.
        OSError: A file cannot be read, or the folder cannot be written.
        ValueError: Not exactly one of `ckpt_path` and `model` is given, or `model` has no weights, or `out` would
            replace something else than an earlier export.
    """
    trained = check_one_model("CKPT", ckpt_path, model, pretrained)
    if format == "transformers" and find_spec("transformers") is None:
        raise ImportError("--format transformers needs one more package: pip install 'matex_pl[hf]'.")
    path = Path(out)
    _check_export(path, [name.removeprefix("local-dir:") for name in (ckpt_path, model, pretrained) if name])

    from safetensors import SafetensorError

    from matex_pl.clip import load_clip, load_trained
    from matex_pl.clip.card import CARD, model_card
    from matex_pl.clip.export import write_open_clip, write_transformers
    from matex_pl.clip.weights import read_content

    clip = load_trained(trained) if trained else load_clip(str(model), pretrained)
    # As written: `load_trained` reads adapters as merged, and the card names them.
    checkpoint: dict[str, Any] = read_content(trained) if trained else {}
    if checkpoint.get("resize_mode"):
        # The images of the training.
        clip.config["preprocess_cfg"]["resize_mode"] = checkpoint["resize_mode"]
    clip.float().requires_grad_(False)
    try:
        with whole_folder(path) as folder:
            is_siglip = hasattr(clip.model.visual, "trunk")
            kind = "open_clip" if format == "open_clip" else "SiglipModel" if is_siglip else "CLIPModel"
            notes = write_open_clip(clip, folder, path) if format == "open_clip" else write_transformers(clip, folder)
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            card = model_card(clip, kind, path.resolve().name, checkpoint, notes, files)
            (folder / CARD).write_text(card, encoding="utf-8")
    except SafetensorError as error:
        # safetensors has an error of its own for a full disk.
        raise OSError(f"The folder {out} cannot be written. Make room on the disk, or give another path.") from error
    return path


def _check_export(path: Path, inputs: Sequence[str]) -> None:
    """Check the output before the work: it can be written, and replaces at most an earlier export.

    Raises:
        OSError: Nothing can be written in the folder above.
        ValueError: The path is a file or a link, or a folder with other files than those of an earlier export, or an
            input of the command lies there.
    """
    check_folder(path.parent)
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not path.is_dir():
        kind = "a link" if path.is_symlink() else "a file"
        raise ValueError(f"The output {str(path)!r} is {kind}. Give the path of a folder.")
    if any(path.resolve() in (Path(name).resolve(), *Path(name).resolve().parents) for name in inputs):
        raise ValueError(f"The output {str(path)!r} is an input of this command. Give another path.")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    if not found:
        return

    from matex_pl.clip.card import earlier_files

    others = sorted(found - earlier_files(path))
    if others:
        raise ValueError(
            f"The folder {str(path)!r} is not replaced, because it holds files that are of no earlier export: "
            f"{', '.join(others[:3])}{', ...' * (len(others) > 3)}. Give another path, or remove the folder."
        )
