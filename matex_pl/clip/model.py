"""`Clip`: a model with its tokenizer and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.encoders import DualEncoder
from matex_pl.clip.preprocess import normalization
from matex_pl.clip.record import differences, listed, recorded_config, tower_differences
from matex_pl.clip.tokenizer import adapted_tokenizer, count_tokens, has_clip_pieces, word_pieces
from matex_pl.clip.towers import Pooling
from matex_pl.clip.weights import PREFIX, key_misfit, plain_state, refuse_nan, short
from matex_pl.clip.wrapped import adapted
from matex_pl.maps import moved

_KEPT_PHRASES = 65_536
# A sentence that distinguishes tokenizers by case, numbers, hyphens, and words that are cut into pieces.
_PROBE = "No Pleural effusion; left lower-lobe opacity, 3 cm. Cardiomegaly?"


class Clip(nn.Module):
    """A model with its tokenizer and the normalization of its images.

    `load_clip` builds one by name or from a file, `Clip.wrap` from a model in memory, and `Clip.from_encoders` from two
    functions.

    `resize_mode` is the fit of an image into the input, in the words of `ImageTransform`: that of the training for a
    checkpoint of `matex fit`, else `squash` if the config states it, else `longest`.

    The buffer `mean_image`, `(1, H, W)` in [0, 1], is the position-wise mean of the training images. It replaces
    removed pixels. It is NaN until a data module sets it.

    Args:
        model: A model of open_clip, or an adapter with `encode_image`, `encode_text`, `visual` and `logit_scale`.
        tokenizer: The model's tokenizer.
        config: `{"model_cfg": ..., "preprocess_cfg": ...}` in the form of open_clip's `open_clip_config.json`, in plain
            JSON types. A checkpoint stores the config, and `load_clip` rebuilds the model from it.
    """

    # Towers of five libraries have these members, and no type describes them all.
    model: Any
    mean_image: Tensor
    _mean: Tensor
    _std: Tensor

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
            self.register_buffer(f"_{name}", values, persistent=False)
        self.register_buffer("mean_image", torch.full((1, *self.image_size), torch.nan))

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        tokenizer: Any,
        preprocess: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> Clip:
        """A `Clip` around a model in memory, which keeps its own weights: no tensor is copied.

        Maps follow each training step of the model, and gradients reach its parameters. The model's mode, device and
        dtype stay as they are. Models of open_clip, and `CLIPModel` and `SiglipModel` of transformers are taken, also
        with adapters of PEFT, such as LoRA.

        Args:
            model: The model.
            tokenizer: Its tokenizer of open_clip or transformers, or its processor of transformers.
            preprocess: The model's transform of torchvision, as open_clip returns it, or its image processor of
                transformers. Only mean, deviation and size are read from it.
            mean: Mean of the model's images in [0, 1], per channel or of all; by default that of `preprocess`, of the
                processor, or of a model of open_clip.
            std: Deviation of the model's images, as `mean`.

        Raises:
            NotImplementedError: The model is of another class.
            ValueError: Mean or deviation is missing, sources contradict each other, or the tokenizer or the
                preprocessing is not the model's.
        """
        name = type(model).__name__
        inner = adapted(model)
        described: Any = towers.original(inner)
        text = towers.text_tower(inner)
        length = getattr(described, "context_length", None) or text.context_length
        towers.check_patches(described.visual, name)
        size = towers.height_width(described.visual.image_size)
        own = open_clip.get_model_preprocess_cfg(described)
        processor = getattr(tokenizer, "image_processor", None)
        words = adapted_tokenizer(tokenizer, length, takes_fewer=isinstance(text, HFTextEncoder))
        config = _config(name, words.context_length, normalization(own, (preprocess, processor), mean, std, size))
        clip = cls(inner, words, config)
        table: Any = towers.token_embedding(inner)
        rows, most = int(table.num_embeddings), int(clip.tokenize([_PROBE]).max())
        if most >= rows:
            raise ValueError(
                f"The tokenizer gives the id {most}, but {name} has embeddings of {rows} tokens. Give the tokenizer of "
                "the model."
            )
        return clip

    @classmethod
    def from_encoders(
        cls,
        model: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        tokenizer: Any,
        image_size: int | Sequence[int],
        mean: float | Sequence[float],
        std: float | Sequence[float],
        layer: str | None = None,
        text_layer: str | None = None,
        grid: tuple[int, int] | None = None,
        context_length: int | None = None,
    ) -> Clip:
        """A `Clip` around any two encoders in memory, which keep their weights.

        Methods that need inputs, scores and gradients work: `Saliency`, `IntegratedGradients`, `Rise`, `KernelShap`,
        `SubmodularRegions`, the controls, and with `layer` `GradCam`. The others read attention or tokens of every
        block, and raise NotImplementedError.

        Args:
            model: Module that holds the weights of both encoders. Explanations set it to eval mode and restore it.
                Its `logit_scale`, if there is one, is the logarithm of the factor between cosines and logits.
            encode_image: Function from normalized images `(B, 3, H, W)` to embeddings `(B, D)` in the common space.
            encode_text: Function from token ids `(B, T)` to embeddings `(B, D)`. It masks the padding itself.
            tokenizer: Tokenizer of open_clip or transformers, or a processor of transformers.
            image_size: Side of the square input in pixels, or height and width.
            mean: Mean of the model's images in [0, 1], per channel or of all.
            std: Deviation of the model's images, as `mean`.
            layer: Name in `model` of the layer of the image encoder that `GradCam` reads (`image_encoder.layer4`). Its
                output is `(B, C, h, w)`, or `(B, n, C)` with the patches last.
            text_layer: Name in `model` of a layer of the text encoder with output `(B, T, C)`, for the words of
                `GradCam`; the word embeddings by default.
            grid: Rows and columns of the raster of maps; that of `layer` by default.
            context_length: Number of tokens that phrases are padded or cut to; that of the tokenizer by default.

        Raises:
            ValueError: A function gives no embeddings, a layer is missing, or the raster is unknown.
        """
        size = towers.height_width(image_size)
        words = adapted_tokenizer(tokenizer, context_length)
        shape = None if grid is None else towers.height_width(grid)
        encoders = DualEncoder(model, encode_image, encode_text, size, words([_PROBE]), layer, text_layer, shape)
        stated = normalization({}, (getattr(tokenizer, "image_processor", None),), mean, std, size)
        return cls(encoders, words, _config(type(model).__name__, words.context_length, stated))

    @property
    def mean(self) -> Tensor:
        """Mean of the images per channel, `(3, 1, 1)`, with the device and dtype of the weights."""
        return self._as_weights("_mean")

    @property
    def std(self) -> Tensor:
        """Deviation of the images per channel, `(3, 1, 1)`, with the device and dtype of the weights."""
        return self._as_weights("_std")

    def _as_weights(self, name: str) -> Tensor:
        weight = towers.image_weight(self.model)
        if getattr(self, name).device != weight.device:
            # A wrapped model moves without its `Clip`. A copy at each call would wait for the device.
            with torch.inference_mode(False):
                setattr(self, name, getattr(self, name).to(weight.device))
        return getattr(self, name).to(weight.dtype)

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
        """Token id that fills a phrase up to the context length, and stands for removed words.

        It is 0 for CLIP's tokenizer, also where a tokenizer of transformers pads with the end of text. The tower pools
        the first end of text, and a removed word would become that.
        """
        words = getattr(self.tokenizer, "tokenizer", None)
        if words is None or has_clip_pieces(words):
            return 0
        return int(words.pad_token_id or 0)

    def normalize(self, images: Tensor) -> Tensor:
        """Images normalized by the model's mean and deviation: `(B, 3, H, W)` uint8, or float in [0, 1], to float.

        The result has the device and dtype of the weights.

        Raises:
            ValueError: The size of the images is not the size of the model's input.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}. "
                "Set the data module's image_size to the model's, or leave image_size out."
            )
        mean, std = self.mean, self.std
        images = images.to(mean.device)
        if images.dtype == torch.uint8:
            images = images / 255
        return ((images - mean) / std).to(std.dtype)

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
        # A tensor of the inference mode has no version, which `keep_on_host` needs.
        with torch.inference_mode(False):
            rows = torch.stack([self._rows[phrase] for phrase in phrases])
            tokens = moved(rows, self.logit_scale.device)
        if tokens is not rows:
            towers.keep_on_host(tokens, rows)
        return tokens

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
        return count_tokens(self.tokenizer, phrase)

    def content(self, tokens: Tensor) -> Tensor:
        """Mask of the content tokens: `(B, T)` bool.

        For CLIP tokenizers, content tokens are the positions strictly between BOS and EOT, because their pad id is also
        the word piece "!". For other tokenizers, content tokens are all ids that are not special.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device)
        if isinstance(self.tokenizer, SimpleTokenizer):
            return (position > 0) & (position < tokens.argmax(1, keepdim=True))
        words = self.tokenizer.tokenizer
        if has_clip_pieces(words):
            return (position > 0) & (position < tokens.eq(words.eos_token_id).int().argmax(1, keepdim=True))
        special = moved(torch.tensor(words.all_special_ids), tokens.device)
        return ~torch.isin(tokens, special)

    def pieces(self, tokens: Tensor) -> list[str]:
        """Word pieces of one row of tokens `(T,)` as text, with a space in front of each piece that begins a word.

        If a character is cut into several pieces, the last of them holds the character.
        """
        return word_pieces(self.tokenizer, tokens)

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


def _config(name: str, context_length: int, preprocess: dict[str, Any]) -> dict[str, Any]:
    """Config of a model in memory, in the form of open_clip's; no model can be built from it."""
    size = {"image_size": preprocess["size"]}
    model = {"wrapped": name, "vision_cfg": size, "text_cfg": {"context_length": context_length}}
    return {"model_cfg": model, "preprocess_cfg": preprocess}
