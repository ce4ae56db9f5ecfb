"""`Clip`: an open_clip model with its tokenizer and preprocessing."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.record import differences, listed, recorded_config, tower_differences
from matex_pl.clip.towers import Pooling
from matex_pl.clip.weights import PREFIX, key_misfit, plain_state, refuse_nan, short

_KEPT_PHRASES = 65_536
# A sentence that distinguishes tokenizers by case, numbers, hyphens, and words that are cut into pieces.
_PROBE = "No Pleural effusion; left lower-lobe opacity, 3 cm. Cardiomegaly?"
# Marks of a word's first piece in SentencePiece and byte-level BPE. WordPiece marks the later pieces, with `##`.
_WORD_MARKS = ("▁", "Ġ")


class Clip(nn.Module):
    """An open_clip model with its tokenizer and the normalization of its images.

    `resize_mode` is the fit of an image into the input, in the words of `ImageTransform`: that of the training for a
    checkpoint of `matex fit`, else `squash` if the config states it, else `longest`.

    The buffer `mean_image`, `(1, H, W)` in [0, 1], is the position-wise mean of the training images. It replaces
    removed pixels. It is NaN until a data module sets it.

    Args:
        model: An open_clip model with `encode_image`, `encode_text` and `visual`.
        tokenizer: The model's tokenizer.
        config: `{"model_cfg": ..., "preprocess_cfg": ...}` in the form of open_clip's `open_clip_config.json`, in plain
            JSON types. A checkpoint stores the config, and `load_clip` rebuilds the model from it.
    """

    # Towers of five libraries have these members, and no type describes them all.
    model: Any
    mean: Tensor
    std: Tensor
    mean_image: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        # `model_files` of a checkpoint that the model was built from.
        self.files: dict[str, Tensor] = {}
        # open_clip's default, `shortest`, would cut parts of a chest off.
        squashes = config["preprocess_cfg"].get("resize_mode") == "squash"
        self.resize_mode: Literal["longest", "shortest", "squash"] = "squash" if squashes else "longest"
        self._rows: dict[str, Tensor] = {}
        for name in ("mean", "std"):
            values = torch.tensor(config["preprocess_cfg"][name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("mean_image", torch.full((1, *self.image_size), torch.nan))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load weights. A checkpoint of 0.1 names the mean image `mean_film`."""
        if f"{prefix}mean_film" in state_dict:
            state_dict[f"{prefix}mean_image"] = state_dict.pop(f"{prefix}mean_film")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return towers.height_width(self.model.visual.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch raster; see `towers.patch_grid`."""
        return towers.patch_grid(self.model.visual)

    @property
    def context_length(self) -> int:
        """Number of tokens that a phrase is padded or cut to."""
        return int(self.tokenizer.context_length)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosines and logits, a scalar parameter."""
        return self.model.logit_scale

    @property
    def pad_id(self) -> int:
        """Token id that fills a phrase up to the context length."""
        tokenizer = getattr(self.tokenizer, "tokenizer", None)
        return int(getattr(tokenizer, "pad_token_id", None) or 0)

    def normalize(self, images: Tensor) -> Tensor:
        """Images normalized by the model's mean and deviation: `(B, 3, H, W)` uint8, or float in [0, 1], to float.

        Raises:
            ValueError: The size of the images is not the size of the model's input.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}. "
                "Set the data module's image_size to the model's, or leave image_size out."
            )
        if images.dtype == torch.uint8:
            images = images / 255
        return ((images - self.mean) / self.std).to(self.std.dtype)

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Inputs of the model for a batch: normalized images `(B, 3, H, W)` and tokens `(B, T)`."""
        return self.normalize(batch["image"]), self.tokenize(batch["phrase"])

    def tokenize(self, phrases: Sequence[str]) -> Tensor:
        """Token ids of the phrases, padded and cut to the context length: `(B, T)` on the model's device."""
        # Phrases repeat in every epoch.
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._rows]
        if len(self._rows) + len(new) > _KEPT_PHRASES:
            self._rows, new = {}, list(dict.fromkeys(phrases))
        if new:
            self._rows.update(zip(new, self.tokenizer(new), strict=True))
        return torch.stack([self._rows[phrase] for phrase in phrases]).to(self.logit_scale.device)

    def tokenizer_mark(self) -> dict[str, Any]:
        """Mark of the tokenizer for checkpoints, in plain types: its name, and its tokens of a fixed sentence."""
        name = self.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") or "CLIP's"
        return {"name": name, "tokens": self.tokenize([_PROBE])[0].tolist()}

    def refuse_checkpoint(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Raise ValueError if a `ClipModule`'s checkpoint does not fit this model, or would load but be wrong.

        It is refused for another model config, other keys or shapes, NaN weights, and another tokenizer.
        """
        recorded = recorded_config(checkpoint)
        found = differences(self.config, recorded) if recorded else {}
        found |= tower_differences(self, checkpoint.get("model_files") or {})
        if found:
            raise ValueError(
                f"{source} was trained with another model: {listed(found)}. Leave the contradicting setting out, or "
                "give the checkpoint as model.name, with model.pretrained null, to take its model."
            )
        state = plain_state(checkpoint["state_dict"])
        weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        problem = key_misfit(plain_state(self.model.state_dict()), weights)
        if problem:
            raise ValueError(f"{source} does not fit the model: {problem}. Give the model that it was trained with.")
        refuse_nan(weights, source)
        self.refuse_tokenizer(checkpoint, source)

    def refuse_tokenizer(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Raise ValueError if a `ClipModule`'s checkpoint was trained with another tokenizer."""
        mark, own = checkpoint.get("tokenizer"), self.tokenizer_mark()
        if mark is None:
            return
        # The last token depends on the context length, which may differ from that of the training.
        length = min(len(mark["tokens"]), len(own["tokens"])) - 1
        if mark["tokens"][:length] != own["tokens"][:length]:
            raise ValueError(
                f"{short(source)} was trained with the tokenizer {mark['name']}, this model has {own['name']}, which "
                f"gives other tokens ({own['tokens'][:4]}..., not {mark['tokens'][:4]}...). Give the name, or the JSON "
                "config, of the model that the checkpoint was trained from."
            )

    def count_tokens(self, phrase: str) -> int:
        """Number of tokens of the whole phrase with special tokens, before the cut to the context length."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return len(self.tokenizer.encode(phrase)) + 2
        if isinstance(self.tokenizer, HFTokenizer):
            phrase = self.tokenizer.clean_fn(phrase)
        return len(self.tokenizer.tokenizer(phrase, truncation=False, verbose=False).input_ids)

    def content(self, tokens: Tensor) -> Tensor:
        """Mask of the content tokens: `(B, T)` bool.

        For CLIP tokenizers, content tokens are the positions strictly between BOS and EOT, because their pad id is also
        the word piece "!". For other tokenizers, content tokens are all ids that are not special.
        """
        if isinstance(self.tokenizer, SimpleTokenizer):
            position = torch.arange(tokens.shape[1], device=tokens.device)
            return (position > 0) & (position < tokens.argmax(1, keepdim=True))
        special = torch.tensor(self.tokenizer.tokenizer.all_special_ids, device=tokens.device)
        return ~torch.isin(tokens, special)

    def pieces(self, tokens: Tensor) -> list[str]:
        """Word pieces of one row of tokens `(T,)` as text, with a space in front of each piece that begins a word.

        If a character is cut into several pieces, the last of them holds the character.
        """
        ids = [int(token) for token in tokens]
        if isinstance(self.tokenizer, SimpleTokenizer):
            raw = [self.tokenizer.decoder[index] for index in ids]
            begins = [before.endswith("</w>") for before in ["</w>", *raw][: len(raw)]]
            decode = getincrementaldecoder("utf-8")("replace").decode
            to_byte = self.tokenizer.byte_decoder
            texts = [decode(bytes(to_byte[character] for character in piece.removesuffix("</w>"))) for piece in raw]
        else:
            raw = self.tokenizer.tokenizer.convert_ids_to_tokens(ids)
            marks_begin = any(piece.startswith(_WORD_MARKS) for piece in raw)
            begins = [piece.startswith(_WORD_MARKS) if marks_begin else not piece.startswith("##") for piece in raw]
            to_text = self.tokenizer.tokenizer.convert_tokens_to_string
            texts = [to_text([re.sub("^##(?=.)", "", piece)]).strip() for piece in raw]
        return [" " * begin + text for begin, text in zip(begins, texts, strict=True)]

    def image_pooling(self, images: Tensor) -> Pooling:
        """How the image tower pools its tokens for `images`; see `towers.image_pooling`."""
        return towers.image_pooling(self.model.visual, images)

    def text_pooling(self, tokens: Tensor) -> Pooling:
        """How the text tower pools `tokens` `(B, T)`; see `towers.text_pooling`."""
        return towers.text_pooling(self.model, tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalized image embeddings of normalized images: `(B, 3, H, W)` to `(B, D)`."""
        return F.normalize(self.model.encode_image(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """L2-normalized text embeddings of tokens: `(B, T)` to `(B, D)`; see `towers.encode_text`."""
        return F.normalize(towers.encode_text(self.model, tokens), dim=-1)

    def similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine of each pair: `(B, 3, H, W)` and `(B, T)` to `(B,)`."""
        return (self.encode_image(images) * self.encode_text(tokens)).sum(-1)
