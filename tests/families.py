"""Small random models of every family of towers, whose attention is far from uniform."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matex_pl.clip import Clip, load_clip
from matex_pl.clip.words import split_words
from matex_pl.maps import Word

EMBED_DIM = 16
NATIVE = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3}
CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 4}
# timm's test models are made for 160 x 160 pixels.
TRUNK_SIZE = [64, 80]
WORDS = ["left", "right", "lower", "upper", "lobe", "lung", "mass", "nodule", "of", "the", "and", "small", "effusion"]
TOKENS = {"positional_embedding", "pos_embed", "cls_emb", "cls_token", "reg_token", "latent", "query"}


def native() -> dict[str, Any]:
    """open_clip's own towers, a class token and the end of text, on a frame that is not square."""
    return {"vision_cfg": NATIVE | {"image_size": [32, 48], "layers": 4}, "text_cfg": CLIP_TEXT}


def square() -> dict[str, Any]:
    return {"vision_cfg": NATIVE, "text_cfg": CLIP_TEXT}


def bidirectional() -> dict[str, Any]:
    """The same without a causal mask: pad tokens are seen."""
    return {"vision_cfg": NATIVE, "text_cfg": CLIP_TEXT | {"no_causal_mask": True, "layers": 2}}


def biomedclip() -> dict[str, Any]:
    """A trunk of timm with a class token, BERT read at its first token."""
    text = {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp"}
    return {"vision_cfg": trunk("test_vit", timm_pool="", timm_proj="linear"), "text_cfg": bert() | text}


def siglip() -> dict[str, Any]:
    """A trunk of timm without a class token under an attention pool, text read at the last token."""
    frame = [48, 64]
    vision = {"timm_model_name": f"local-dir:{tokenless(frame)}", "timm_model_pretrained": False, "image_size": frame}
    text = {"context_length": 12, "vocab_size": 64, "hf_tokenizer_name": unigram(), "no_causal_mask": True}
    text |= {"width": 24, "heads": 3, "layers": 3, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
    return {
        "custom_text": True,
        "embed_dim": 32,
        "init_logit_bias": -10,
        "vision_cfg": vision | {"timm_pool": "map", "timm_proj": "none"},
        "text_cfg": text | {"tokenizer_kwargs": {"clean": "canonicalize"}},
    }


def average() -> dict[str, Any]:
    """The mean of the patches, beside a class token that nothing reads, and the mean of the words."""
    text = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    return {"vision_cfg": trunk("test_vit", timm_pool="avg", timm_proj="linear"), "text_cfg": bert() | text}


def registers() -> dict[str, Any]:
    """The mean of the patches behind a register token, with layer scale and the norm after the pool."""
    return {"vision_cfg": trunk("test_vit2", timm_pool="avg", timm_proj="linear"), "text_cfg": CLIP_TEXT}


def resnet() -> dict[str, Any]:
    """CLIP's ResNet: one attention, from the mean of the map."""
    vision = {"image_size": 96, "patch_size": None, "width": 8, "head_width": 64, "layers": [1, 2, 1, 1]}
    return {"vision_cfg": vision, "text_cfg": CLIP_TEXT}


def registers_pool() -> dict[str, Any]:
    """An attention pool that reads a register token too."""
    return {"vision_cfg": trunk("test_vit3", timm_pool="map", timm_proj="linear"), "text_cfg": CLIP_TEXT}


def coca() -> dict[str, Any]:
    """An attention pool with several queries, text read at a class token behind the phrase."""
    vision = NATIVE | {"image_size": [32, 48], "attentional_pool": True, "output_tokens": True}
    text = CLIP_TEXT | {"context_length": 15, "layers": 3}
    return {
        "custom_text": True,
        "vision_cfg": vision | {"attn_pooler_queries": 4, "attn_pooler_heads": 4},
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text | {"layers": 1, "attn_pooler_heads": 4},
    }


def avg_native() -> dict[str, Any]:
    """open_clip's own vision transformer, read at the mean of its patches."""
    return {"vision_cfg": NATIVE | {"pool_type": "avg"}, "text_cfg": CLIP_TEXT}


def prefixed() -> dict[str, Any]:
    """An attention pool of timm that does not see the class token of its trunk."""
    return {"embed_dim": 64, "vision_cfg": trunk("test_vit", timm_pool="map", timm_proj="none"), "text_cfg": CLIP_TEXT}


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    make.__name__: make
    for make in (
        native,
        square,
        bidirectional,
        biomedclip,
        siglip,
        average,
        registers,
        registers_pool,
        resnet,
        coca,
        avg_native,
        prefixed,
    )
}
FAMILIES: tuple[str, ...] = tuple(CONFIGS)


@cache
def family(name: str, dtype: torch.dtype = torch.float32) -> Clip:
    """The model of one of `FAMILIES`, with the same weights in every dtype."""
    clip = load_clip(json.dumps({"model_cfg": {"embed_dim": EMBED_DIM} | CONFIGS[name]()}))
    # 7: a draw in which the gradients of every family have both signs.
    redraw(clip.model, torch.Generator().manual_seed(7 + FAMILIES.index(name)))
    clip.mean_image.copy_(torch.linspace(0.2, 0.6, clip.mean_image.numel()).view_as(clip.mean_image))
    return clip.to(dtype)


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a model with numbers of which attention peaks; scalars, the logit scale and bias, stay."""
    for path, module in model.named_modules():
        # BERT norms behind its sums, so that its tokens grow alike and its attention flat.
        gain = 3.0 if path.endswith(("self.query", "self.key")) else 1.5
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim:
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread(module, name, weight, gain))
            if name == "weight" and weight.ndim == 1:
                weight.add_(1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)


def spread(module: nn.Module, name: str, weight: Tensor, gain: float) -> float:
    """Standard deviation of a parameter: of norms, scales and biases, of embeddings, of matrices by their inputs."""
    if weight.ndim == 1:
        return 0.3
    if name in TOKENS or isinstance(module, nn.Embedding):
        # The query of SigLIP's pool is the only one that no norm stands before.
        return 1.5 if name == "latent" else 0.5
    return gain * weight[0].numel() ** -0.5


# --- what is read from files


def trunk(name: str, **settings: str) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": TRUNK_SIZE, **settings}


@cache
def folder(name: str) -> Path:
    """A folder that is there until the tests end: a model may be built from its config again."""
    path = Path(_kept().name) / name
    path.mkdir()
    return path


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="families_")


def tokenless(frame: list[int]) -> str:
    """A folder with timm's test model for a frame, without its class token: timm has none so small."""
    size = {"img_size": frame, "embed_dim": 32, "num_heads": 4, "depth": 4, "mlp_ratio": 2}
    config = {"architecture": "test_vit", "model_args": size | {"class_token": False}, "pretrained_cfg": {}}
    path = folder("tokenless")
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@cache
def bert() -> dict[str, Any]:
    """A text config of a tiny BERT and its tokenizer, letters and a few words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]
    names = [*special.values(), *WORDS, "##ion", ",", ".", *letters]
    words = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = str(folder("bert"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    layers = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    BertConfig(vocab_size=len(names), max_position_embeddings=20, **layers).save_pretrained(path)
    return {"hf_model_name": path, "hf_tokenizer_name": path, "context_length": 16}


@cache
def unigram() -> str:
    """A folder with a tiny tokenizer like SigLIP's: no start of text, and its end is also the pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    pieces += [("\u2581" + word, -4.0) for word in WORDS] + [(letter, -8.0) for letter in string.ascii_lowercase]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path = str(folder("unigram"))
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


def worded(phrase: str, shares: Sequence[float] | None = None) -> list[Word]:
    """Words of a phrase with the shares, or equal ones."""
    words = split_words(phrase)
    return [replace(word, share=share) for word, share in zip(words, shares or [1.0] * len(words), strict=True)]
