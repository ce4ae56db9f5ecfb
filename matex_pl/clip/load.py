"""Loading of models and tokenizers by name, config or checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import nn

from matex_pl.clip import towers
from matex_pl.clip.hub import reading_files
from matex_pl.clip.model import Clip
from matex_pl.clip.weights import load_weights, reading_checkpoint, refuse_nan, short
from matex_pl.files import CONFIG_FOLDER, find_config


def load_clip(name: str, pretrained: str | None = None, image_size: int | Sequence[int] | None = None) -> Clip:
    """A CLIP model with its tokenizer and preprocessing, in eval mode on the CPU.

    Args:
        name: An open_clip name (`ViT-B-32`), `hf-hub:org/repo`, `local-dir:folder`, a path to a JSON model config, or
            the text of such a JSON. A path is looked up as a file first, then among the shipped `configs/`.
        pretrained: Tag of open_clip (`openai`) or a checkpoint file: open_clip weights (`.pt`, `.bin`,
            `.safetensors`) or a Lightning checkpoint of `ClipModule`. Files are read without running code. By default
            `hf-hub:` and `local-dir:` models get their own weights, all others random weights.
        image_size: Side of the square input in pixels, or height and width; the config's by default. Position
            embeddings of vision transformers are interpolated to it.

    Raises:
        ValueError: The name is unknown, or the weights do not fit, hold NaN or would run code; the message names the
            way out.
        FileNotFoundError: A named file or folder does not exist.
        ConnectionError: The weights cannot be downloaded.
    """
    config = _json_config(name)
    size = None if image_size is None else list(towers.height_width(image_size))
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    if config is None:
        model, tokenizer, config = _from_open_clip(name, None if file else pretrained, size, has_file=file is not None)
    elif pretrained and not file:
        raise FileNotFoundError(f"No checkpoint file at {pretrained!r} for the model {short(name)}. Check the path.")
    else:
        config |= _resized(config["model_cfg"], size, name)
        model, tokenizer = _from_config(config, name)
    _check_patches(model.visual, name)
    is_ours = file is not None and load_weights(model, file, name)
    refuse_nan(dict(model.named_parameters()), pretrained or name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    described = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}
    # With JSON types only, a checkpoint that holds the config loads without running code.
    clip = Clip(model, tokenizer, json.loads(json.dumps(described, default=asdict))).eval()
    if file and is_ours:
        # Mapped, to avoid reading the weights again.
        clip.refuse_checkpoint(torch.load(file, "cpu", weights_only=True, mmap=True), file)
    return clip


def load_trained(ckpt_path: str) -> Clip:
    """The CLIP model of a checkpoint of `matex fit`, on the CPU in eval mode; no code of the file is run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of `matex fit`, or holds NaN; the message names the file.
    """
    with reading_checkpoint(ckpt_path):
        checkpoint = torch.load(ckpt_path, "cpu", weights_only=True)
        clip = load_clip(checkpoint["hyper_parameters"]["name"])
        clip.refuse_checkpoint(checkpoint, "The checkpoint")
        weights = checkpoint["state_dict"].items()
        clip.load_state_dict({key.removeprefix("clip."): value for key, value in weights if key.startswith("clip.")})
    return clip


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, without loading the model; see `load_clip` for the names and the errors."""
    config = _json_config(name)
    model = _known_config(name, None) if config is None else config["model_cfg"]
    with reading_files(name, None, model.get("text_cfg")):
        return open_clip.get_tokenizer(name) if config is None else _config_tokenizer(model["text_cfg"])


def input_size(name: str) -> tuple[int, int]:
    """Height and width in pixels of a model's input, without loading the model; see `load_clip` for the names."""
    config = _json_config(name)
    described = open_clip.get_model_config(name) if config is None else config["model_cfg"]
    return towers.height_width(described["vision_cfg"].get("image_size", 224))


def cut_text(tokenizer: Any, phrase: str) -> str:
    """The end of a phrase that the tokenizer cuts off at its context length; empty if the whole phrase fits."""
    limit = int(tokenizer.context_length)
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.decode(tokenizer.encode(phrase)[limit - 2 :]).strip()
    words = tokenizer.tokenizer
    if isinstance(tokenizer, HFTokenizer):
        phrase = tokenizer.clean_fn(phrase)
    ids = words(phrase, truncation=False, verbose=False, add_special_tokens=False).input_ids
    # WordPiece marks a piece within a word.
    return words.decode(ids[limit - words.num_special_tokens_to_add() :]).strip().removeprefix("##")


def _json_config(name: str) -> dict[str, Any] | None:
    """The open_clip config behind a JSON text or file; None for any other name."""
    text = name
    if name.endswith(".json"):
        path = find_config(name)
        if path is None:
            raise FileNotFoundError(
                f"No model config at {name!r}, nor among the shipped configs in {CONFIG_FOLDER}. Check the path."
            )
        text = path.read_text(encoding="utf-8")
    elif not name.lstrip().startswith("{"):
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The model config {short(name)} is no JSON: {error}.") from error
    config = config if "model_cfg" in config else {"model_cfg": config}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    if missing:
        raise ValueError(
            f"The model config {short(name)} lacks {sorted(missing)}. Add these keys, as in open_clip's configs."
        )
    return config


def _resized(config: dict[str, Any], size: list[int] | None, name: str) -> dict[str, Any]:
    """`{"model_cfg": ...}` with another size of the input; ValueError for a ResNet, whose size is fixed."""
    vision = config["vision_cfg"]
    if size is None or towers.height_width(vision.get("image_size", 224)) == tuple(size):
        return {"model_cfg": config}
    if isinstance(vision.get("layers"), list):
        raise ValueError(
            f"image_size={size} does not fit {short(name)}: its ResNet pools a raster of fixed size. Leave image_size "
            "out."
        )
    return {"model_cfg": {**config, "vision_cfg": {**vision, "image_size": size}}}


def _check_patches(visual: Any, name: str) -> None:
    """Raise ValueError if the input is not a whole number of patches."""
    trunk = getattr(visual, "trunk", None)
    patch = towers.height_width(getattr(getattr(trunk, "patch_embed", visual), "patch_size", None) or 1)
    size = towers.height_width(visual.image_size)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f"The input of {short(name)}, {size} pixels, is not a whole number of its {patch} patches. Set image_size "
            "to a multiple of the patch size."
        )


def _from_config(config: dict[str, Any], name: str) -> tuple[nn.Module, Any]:
    """Model, with random weights, and tokenizer of a config."""
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    # `local-dir:` is open_clip's public way to build from a custom config without adding to its global registry.
    with tempfile.TemporaryDirectory() as folder, _silent_open_clip(), reading_files(name, None, text):
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = _config_tokenizer(text)
        try:
            # A timm tower keeps its own size unless another is forced.
            size = vision.get("image_size") if "timm_model_name" in vision else None
            model = open_clip.create_model(LOCAL_DIR_PREFIX + folder, pretrained_text=False, force_image_size=size)
            if hasattr(model, "text_decoder"):
                # CoCa: open_clip leaves the projection of its decoder uninitialized.
                nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width**-0.5)
        except TypeError as error:
            raise ValueError(f"open_clip cannot build the model config {short(name)}: {error}.") from error
    if isinstance(tokenizer, SimpleTokenizer) and text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ValueError(
            f"text_cfg.vocab_size of {short(name)} is {text['vocab_size']}, but CLIP's tokenizer gives "
            f"{tokenizer.vocab_size} ids. Set vocab_size to at least {tokenizer.vocab_size}."
        )
    return model, tokenizer


def _config_tokenizer(text_cfg: dict[str, Any]) -> Any:
    length, settings = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs") or {}
    if text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **settings)
    return SimpleTokenizer(context_length=length, **settings)


def _from_open_clip(
    name: str, tag: str | None, size: list[int] | None, *, has_file: bool
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model, tokenizer and `{"model_cfg": ...}` of a name of open_clip, without the weights of a checkpoint file."""
    named = _known_config(name, tag)
    if not named and tag:
        raise ValueError(
            f"{name} brings its own weights; pretrained={tag!r} is no checkpoint file. Leave pretrained out."
        )
    if named:
        _resized(named, size, name)
    quick_gelu = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    # open_clip warns that a model is random, whose weights this package loads from a file afterwards.
    quiet = _silent_open_clip() if has_file else nullcontext()
    with quiet, reading_files(name, tag, named.get("text_cfg")):
        model = open_clip.create_model(
            name,
            tag,
            # If weights were trained with QuickGELU and the config has none, open_clip only warns.
            force_quick_gelu=quick_gelu,
            force_image_size=size,
            load_weights=not has_file,
            pretrained_text=False,
            require_pretrained=not named and not has_file,
        )
        tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_config(name)
    return model, tokenizer, _resized({**config, "quick_gelu": True} if quick_gelu else config, size, name)


def _known_config(name: str, tag: str | None) -> dict[str, Any]:
    """Config that open_clip has for a name; empty for `hf-hub:` and `local-dir:` models, which bring their own."""
    if name.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        return {}
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), n=3) or ["ViT-B-32"]
        raise ValueError(
            f"Unknown model {name!r}. Give an open_clip name (e.g. {', '.join(near)}; `open_clip.list_models()` lists "
            "them), hf-hub:org/repo, local-dir:folder, or a path to a JSON model config."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise ValueError(
            f"pretrained={tag!r} is neither a file nor a tag of {name}. Its tags: {', '.join(tags) or 'none'}. Give a "
            "tag or the path of a checkpoint file."
        )
    return config


@contextmanager
def _silent_open_clip() -> Iterator[None]:
    """Drop open_clip's messages to the root logger; other messages pass."""
    root, folder, stand_in = logging.getLogger(), str(Path(open_clip.__file__).parent), logging.NullHandler()

    def is_others(record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(folder)

    root.addFilter(is_others)
    # If the root logger has no handler, `logging.warning` would install one for good.
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeFilter(is_others)
        root.removeHandler(stand_in)
