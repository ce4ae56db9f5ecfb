"""A `Clip` as a folder that open_clip or transformers read without this package."""

from __future__ import annotations

import json
import logging
import string
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from matex_pl.clip import towers
from matex_pl.clip.hf_config import CLEAN, processor_settings, transformers_settings
from matex_pl.clip.hf_folder import OPEN_CLIP_CONFIG
from matex_pl.clip.hf_names import to_transformers, without_row
from matex_pl.clip.model import Clip
from matex_pl.clip.record import model_files
from matex_pl.clip.tokenizer import TransformersTokenizer

log = logging.getLogger(__name__)

# Largest difference of embeddings of unit length between the exported model and the original.
_TOLERANCE = 1e-5
# Sentences whose tokens the exported tokenizer must repeat.
_SENTENCES = ("No Pleural effusion; left lower-lobe opacity, 3 cm. Cardiomegaly?", "PNEUMOTHORAX  (right)", "")
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def write_open_clip(clip: Clip, folder: Path, final: Path) -> list[str]:
    """Write a model as a folder for `open_clip.create_model_and_transforms("local-dir:...")`.

    Args:
        clip: Model in eval mode.
        folder: Folder to write to.
        final: Path that the folder will have.

    Returns:
        Notes for the reader of the folder, one sentence each.

    Raises:
        NotImplementedError: open_clip reads another model from the folder; the message gives the difference.
    """
    config, notes = deepcopy(clip.config), []
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    files = {name: data.cpu().numpy().tobytes() for name, data in model_files(clip).items()}
    trunk = _trunk_config(clip, files.pop("timm/config.json", None))
    places = {}
    if trunk is not None:
        files["timm/config.json"] = json.dumps(trunk, indent=2).encode()
        places["vision_cfg.timm_model_name"] = (vision, "timm_model_name", f"{LOCAL_DIR_PREFIX}{{}}/timm")
    named = text.get("hf_model_name")
    if named and (Path(named).is_absolute() or Path(named).exists()):
        places["text_cfg.hf_model_name"] = (text, "hf_model_name", "{}")
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if getattr(clip.tokenizer, "tokenizer", None) is not None:
        # open_clip reads the tokenizer of a folder from the folder, whatever its name.
        text["hf_tokenizer_name"] = final.name
    settings = text.get("tokenizer_kwargs") or {}
    if settings.get("clean") == CLEAN:
        text["tokenizer_kwargs"] = {name: value for name, value in settings.items() if name != "clean"}
        notes.append("open_clip removes HTML entities and repeated spaces from sentences; the training kept them.")
    state = {name: value.detach().cpu().clone().contiguous() for name, value in clip.model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    # First with the path that the folder has now, to read it, then with its final one.
    for path in (folder, final):
        for part, key, pattern in places.values():
            part[key] = pattern.format(path.resolve())
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if path == folder:
            try:
                model = open_clip.create_model(f"{LOCAL_DIR_PREFIX}{folder}", pretrained_text=False)
            except (AssertionError, RuntimeError, TypeError) as error:
                raise NotImplementedError(
                    f"The format open_clip cannot express this model: {str(error).splitlines()[0]}."
                ) from error
            # open_clip builds in the mode of training.
            model.eval()
            _check_embeddings(clip, model.encode_image, model.encode_text, "open_clip")
    if places:
        names = " and ".join(places)
        notes.append(f"The config names this folder by its path, in {names}. After a move, write the new path there.")
    return notes


def write_transformers(clip: Clip, folder: Path) -> list[str]:
    """Write a model as a folder for `CLIPModel.from_pretrained` or `SiglipModel.from_pretrained`.

    Args:
        clip: Model in eval mode.
        folder: Folder to write to.

    Returns:
        Notes for the reader of the folder, one sentence each.

    Raises:
        NotImplementedError: transformers has no such model or tokenizer; the message names the part.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

    notes: list[str] = []
    is_siglip = hasattr(towers.original(clip.model.visual), "trunk")
    # The parts of the model are named before those of its tokenizer.
    transformers_settings(clip.model, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), 0)
    tokenizer = _transformers_tokenizer(clip, folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = transformers_settings(clip.model, ids, len(tokenizer) - 1)
    extra = without_row(clip.model)
    if extra:
        raise NotImplementedError(
            f"The format transformers cannot express this model: it has no place for {', '.join(extra[:3])} "
            f"({len(extra)} weights). Export with --format open_clip."
        )
    model = SiglipModel(SiglipConfig(**settings)) if is_siglip else CLIPModel(CLIPConfig(**settings))
    model.load_state_dict({name: value.detach().clone() for name, value in to_transformers(clip.model).items()})
    model.eval()
    _check_embeddings(clip, _features(model.get_image_features), _features(model.get_text_features), "transformers")
    _check_tokens(clip, tokenizer, exactly=is_siglip)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocess = clip.config["preprocess_cfg"]
    image = processor_settings(preprocess, clip.image_size[0])
    if preprocess.get("resize_mode") == "longest":
        notes.append("Images were padded to squares in the training. The processor crops instead: pad them first.")
    if is_siglip and not image["do_center_crop"]:
        del image["do_center_crop"], image["crop_size"]
        SiglipImageProcessor(**image).save_pretrained(folder)
    else:
        CLIPImageProcessor(**image).save_pretrained(folder)
    if isinstance(clip.tokenizer, SimpleTokenizer):
        notes.append("open_clip's tokenizer also repairs Unicode and HTML entities in sentences; this one does not.")
    return notes


def _features(method: Any) -> Any:
    """A method of transformers that gives embeddings, in older versions directly, in newer ones in an output."""

    def call(batch: Tensor) -> Tensor:
        output = method(batch)
        return output if isinstance(output, Tensor) else output.pooler_output

    return call


@torch.no_grad()
def _check_embeddings(clip: Clip, encode_image: Any, encode_text: Any, library: str) -> None:
    """Raise NotImplementedError if another library's model embeds an image and sentences in another way."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *clip.image_size, generator=generator)
    tokens = clip.tokenize(_SENTENCES).cpu()
    pairs = [(clip.model.encode_image(images), encode_image(images))]
    pairs.append((clip.model.encode_text(tokens), encode_text(tokens)))
    for own, other in pairs:
        difference = float((torch.nn.functional.normalize(own) - torch.nn.functional.normalize(other)).abs().max())
        if not difference <= _TOLERANCE:
            raise NotImplementedError(
                f"The format {library} cannot express this model: with the same weights, {library} computes embeddings "
                f"that differ by {difference:.2g}."
            )


def _check_tokens(clip: Clip, tokenizer: Any, *, exactly: bool) -> None:
    """Raise NotImplementedError if an exported tokenizer gives other tokens, up to the end of text or in all."""
    length = clip.context_length
    other = tokenizer(
        list(_SENTENCES), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    own = clip.tokenize(_SENTENCES).cpu()
    # CLIP reads no token behind the first end of text, and libraries pad differently there.
    is_read = torch.ones_like(own, dtype=torch.bool)
    if not exactly:
        is_end = own == tokenizer.eos_token_id
        is_read = is_end.cumsum(1) - is_end.int() == 0
    if not torch.equal(own[is_read], other[is_read]):
        raise NotImplementedError(
            "The format transformers cannot express the tokenizer of this model: its tokens differ. Export with "
            "--format open_clip."
        )


def _trunk_config(clip: Clip, recorded: bytes | None) -> dict[str, Any] | None:
    """Config of a timm trunk whose name alone does not describe it; None for all other towers."""
    vision, visual = clip.config["model_cfg"]["vision_cfg"], towers.original(clip.model.visual)
    if not vision.get("timm_model_name"):
        return None
    stated = getattr(visual.trunk, "pretrained_cfg", {}).get("input_size")
    has_size = getattr(getattr(visual.trunk, "patch_embed", None), "img_size", None) is not None
    config: dict[str, Any] = {"architecture": vision["timm_model_name"], "model_args": {}, "pretrained_cfg": {}}
    if recorded is not None:
        config = json.loads(recorded)
    elif not has_size or (stated and tuple(stated[1:]) == clip.image_size):
        return None
    if has_size:
        config["model_args"] = {**config.get("model_args", {}), "img_size": list(clip.image_size)}
    return config


def _transformers_tokenizer(clip: Clip, folder: Path) -> Any:
    """The model's tokenizer as one of transformers, with the cleaning of sentences that open_clip adds.

    Raises:
        NotImplementedError: The tokenizer has settings that transformers lacks.
    """
    settings = clip.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    clean, length = settings.get("clean"), clip.context_length
    unknown = sorted(settings.keys() - {"clean"})
    mode = clip.config["model_cfg"]["text_cfg"].get("tokenizer_mode")
    if unknown or mode:
        raise NotImplementedError(
            "The format transformers cannot express the tokenizer of this model: it has the settings "
            f"{', '.join(unknown) or f'tokenizer_mode {mode}'}. Export with --format open_clip."
        )
    if isinstance(clip.tokenizer, SimpleTokenizer):
        return _clip_tokenizer(clip.tokenizer, folder, length)
    # A copy in memory of a SentencePiece tokenizer would read its file again, which may be gone.
    with tempfile.TemporaryDirectory() as copy:
        clip.tokenizer.tokenizer.save_pretrained(copy)
        tokenizer = TransformersTokenizer.from_folder(copy, length).tokenizer
    tokenizer.model_max_length = length
    if isinstance(clip.tokenizer, TransformersTokenizer) or clean in (None, "whitespace"):
        return tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise NotImplementedError(
            "The format transformers cannot express the tokenizer of this model: open_clip cleans sentences "
            f"({clean}) before a SentencePiece tokenizer. Export with --format open_clip."
        )
    from tokenizers import Regex, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if clean == "canonicalize":
        marks = "".join(f"\\{mark}" for mark in string.punctuation if mark != "_")
        steps = [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{marks}]"), ""), *steps]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    # The class of the tokenizer would build its own normalizer when it is read.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, padding_side=tokenizer.padding_side, **_special(tokenizer)
    )


def _special(tokenizer: Any) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    return {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None) is not None}


def _clip_tokenizer(own: SimpleTokenizer, folder: Path, length: int) -> Any:
    """CLIP's tokenizer of transformers with the vocabulary of open_clip's."""
    from transformers import AutoTokenizer

    ends = {"<start_of_text>": _BOS, "<end_of_text>": _EOS}
    vocabulary = {ends.get(piece, piece): number for piece, number in own.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in own.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": _EOS, "unk_token": _EOS}
    settings |= {"bos_token": _BOS, "eos_token": _EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    return tokenizer
