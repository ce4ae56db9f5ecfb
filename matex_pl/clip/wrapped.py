"""Models in memory in the form of open_clip's, without a copy of their weights."""

from __future__ import annotations

from typing import Any

import open_clip
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_OPEN_CLIP = (open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)
_ENCODERS = ("get_image_features", "get_text_features")


class TransformersClip(nn.Module):
    """A `CLIPModel` or `SiglipModel` of transformers with the members of open_clip's models.

    The towers look up the parts of the model at each use. Parts that are replaced later, as by PEFT, are seen.

    Args:
        model: The model, whose parameters stay its own.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.visual = TransformersImageTower(model)
        self.text = TransformersTextTower(model)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosines and logits."""
        return self.model.logit_scale

    @property
    def context_length(self) -> int:
        """Number of tokens that the text tower has positions for."""
        return int(self.model.config.text_config.max_position_embeddings)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image embeddings `(B, D)` of normalized images `(B, 3, H, W)`."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings `(B, D)` of tokens `(B, T)`."""
        return self.text(tokens)


class TransformersImageTower:
    """The image tower of a model of transformers, with its projection.

    Args:
        model: `CLIPModel` or `SiglipModel`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def image_size(self) -> Any:
        """Side of the input in pixels, or height and width."""
        return self._model.config.vision_config.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self._model.config.vision_config.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        side = int(self.image_size) // self.patch_size
        return side, side

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, first block first."""
        return list(self._model.vision_model.encoder.layers)

    @property
    def attn_pool(self) -> Any:
        """Attention pool (SigLIP); None if the class token is pooled."""
        return getattr(self._model.vision_model, "head", None)

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings `(B, D)` of images `(B, 3, H, W)`."""
        pool = self.attn_pool
        if pool is None:
            return self._model.visual_projection(self._model.vision_model(images).pooler_output)
        # Weights are returned by default, which the fused attention cannot.
        with pool.attention.register_forward_pre_hook(_without_weights, with_kwargs=True):
            return self._model.vision_model(images).pooler_output


class TransformersTextTower:
    """The text tower of a model of transformers, with its projection.

    Args:
        model: `CLIPModel` or `SiglipModel`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to the tokens before it."""
        return not self._is_siglip

    @property
    def _is_siglip(self) -> bool:
        return not hasattr(self._model, "text_projection")

    @property
    def eos_id(self) -> int:
        """Id of the end of text."""
        return int(self._model.config.text_config.eos_token_id)

    @property
    def pool_type(self) -> str:
        """Pooled token by open_clip's name: `last`, `eos`, or `argmax`."""
        if self._is_siglip:
            return "last"
        # Configs before transformers 4.31 record 2, which is no end of text; the model then takes the largest id.
        return "argmax" if self.eos_id == 2 else "eos"

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, first block first."""
        return list(self._model.text_model.encoder.layers)

    @property
    def token_embedding(self) -> nn.Module:
        """Token embedding table."""
        return self._model.text_model.embeddings.token_embedding

    def __call__(self, tokens: Tensor) -> Tensor:
        """Embeddings `(B, D)` of tokens `(B, T)`."""
        pooled = self._model.text_model(input_ids=tokens).pooler_output
        return pooled if self._is_siglip else self._model.text_projection(pooled)


def _without_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"need_weights": False}


def adapted(model: nn.Module) -> nn.Module:
    """A model in the form of open_clip's: an open_clip model itself, or an adapter around a model of transformers.

    Wrappers of PEFT and of DDP are left out. The adapters of PEFT lie within the model and stay in effect.

    Raises:
        NotImplementedError: The model is of another class, or computes its embeddings in a way of its own.
    """
    bare = _bare(model)
    # A compiled model is called with the one shape it was compiled for.
    inner = getattr(bare, "_orig_mod", bare)
    if isinstance(inner, _OPEN_CLIP):
        return bare
    inner = _bare(inner)
    name = type(inner).__name__
    if any(base.__module__.startswith("transformers.") for base in type(inner).__mro__):
        import transformers

        for kind in (transformers.CLIPModel, transformers.SiglipModel):
            if not isinstance(inner, kind):
                continue
            changed = [part for part in _ENCODERS if getattr(type(inner), part) is not getattr(kind, part)]
            if changed:
                raise NotImplementedError(
                    f"{name} computes its embeddings in a way of its own ({changed[0]}), which `Clip.wrap` would leave "
                    "out. Give its functions to `Clip.from_encoders`."
                )
            if kind is transformers.SiglipModel and getattr(inner.vision_model, "head", None) is None:
                raise NotImplementedError(
                    f"{name} has no attention pool (vision_use_head is false), and gives no embedding of an image."
                )
            return TransformersClip(inner)
    raise NotImplementedError(
        f"`Clip.wrap` takes models of open_clip, and CLIPModel and SiglipModel of transformers, got {name}. Give the "
        "functions of any other model to `Clip.from_encoders`."
    )


def _bare(model: Any) -> Any:
    """The model within wrappers of DDP and PEFT.

    Raises:
        NotImplementedError: The adapters of PEFT are a prompt, which lies outside of the model.
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif type(model).__module__.startswith("peft."):
            settings: Any = getattr(model, "active_peft_config", None)
            if getattr(settings, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{settings.peft_type} of PEFT puts its prompt outside of the model, which `Clip.wrap` would leave "
                    "out. Use adapters within the layers, such as LoRA."
                )
            # A mixed model and a bare tuner keep the model as `model`.
            model = model.get_base_model() if hasattr(model, "get_base_model") else model.model
        else:
            return model
