"""Pairs and model of a training without this package, in the form that a plan needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from matex_pl.attribution.core.capture import borrowed, sample
from matex_pl.clip.encoders import DualEncoder
from matex_pl.clip.hf_config import processor_settings
from matex_pl.clip.model import Clip
from matex_pl.clip.record import model_files, unpacked
from matex_pl.clip.tokenizer import TransformersTokenizer
from matex_pl.clip.weights import key_misfit
from matex_pl.clip.wrapped import TransformersClip
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextBatch, ImageTextPair
from matex_pl.training.module import ClipModule


class GatheredPairs(ChestXrayDataModule):
    """Data module of pairs in memory, whose images are in the model's frame.

    Args:
        batches: Splits and batches, with `patient_id`.
    """

    def __init__(self, batches: Sequence[tuple[str, ImageTextBatch]]) -> None:
        super().__init__(num_workers=0, augment=False)
        self.images: list[np.ndarray] = []
        self.masks: list[dict[str, np.ndarray]] = []
        self._all: list[ImageTextPair] = []
        for split, batch in batches:
            height, width = batch["image"].shape[-2:]
            images, boxes = gray_images(batch["image"]), batch["boxes"]
            masks = {name: mask.cpu().numpy() for name, mask in batch["masks"].items()}
            for row, name in enumerate(batch["id"]):
                pixels = boxes[row].cpu().double().numpy() * [width, height, width, height]
                finding = batch["finding"][row]
                self._all.append(
                    ImageTextPair(
                        id=name,
                        patient_id=batch["patient_id"][row],
                        image_id=name,
                        image=len(self.images),
                        phrase=batch["phrase"][row],
                        boxes=tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in pixels.tolist()),
                        finding=finding,
                        image_findings=(finding,) if finding else (),
                        split=split,
                        size=(height, width),
                    )
                )
                self.images.append(images[row])
                self.masks.append({name: mask[row] for name, mask in masks.items()})

    def list_pairs(self) -> list[ImageTextPair]:
        """The pairs of all batches."""
        return self._all

    def check_splits(self, stage: str, pairs: Mapping[str, Sequence[ImageTextPair]], *, training: bool) -> None:
        """Only the splits that ROAR+ needs are gathered."""

    def read_image(self, pair: ImageTextPair) -> np.ndarray:
        """Pixels of a pair, `(H, W)` uint8."""
        return self.images[int(pair.image)]

    def read_masks(self, pair: ImageTextPair) -> Mapping[str, np.ndarray]:
        """Masks of a pair, `(H, W)` bool by structure."""
        return self.masks[int(pair.image)]


def gray_images(images: Tensor) -> np.ndarray:
    """Gray levels `(B, H, W)` uint8, the mean of the channels of images `(B, 3, H, W)`, uint8 or float in [0, 1]."""
    levels = images.float().mean(1) * (255 if images.is_floating_point() else 1)
    return levels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def module_of(clip: Clip, architecture: str | None = None) -> ClipModule:
    """A `ClipModule` with a copy of a model's weights.

    Args:
        clip: The model, from `load_clip` or `Clip.wrap`.
        architecture: Name or config of a model of open_clip in memory, which does not know its own; see `load_clip`.

    Raises:
        NotImplementedError: No `ClipModule` has such a model: any two encoders, or adapters of PEFT.
        ValueError: The architecture of a model of open_clip is missing, or is another one.
    """
    inner: nn.Module = clip.model
    if isinstance(inner, DualEncoder):
        raise NotImplementedError(
            "ROAR+ trains a model of open_clip or transformers again, and Clip.from_encoders has functions only. Leave "
            "RoarPlus out, or give a model that Clip.wrap takes."
        )
    if any(".lora_" in name for name, _ in inner.named_parameters()):
        raise NotImplementedError(
            "ROAR+ trains whole weights again, and the model has adapters of PEFT. Leave RoarPlus out, or train with "
            "ClipModule(lora=...)."
        )
    if isinstance(inner, TransformersClip):
        with tempfile.TemporaryDirectory() as folder:
            _write_folder(clip, inner, Path(folder))
            module = ClipModule(folder)
    elif "wrapped" not in clip.config["model_cfg"]:
        with unpacked(clip.config, model_files(clip)) as local:
            module = _filled(ClipModule(json.dumps(local)), clip, "its own config")
        module.hparams["name"] = json.dumps(clip.config)
    elif architecture is None:
        raise ValueError(
            f"{clip.config['model_cfg']['wrapped']} does not know its own architecture, which ROAR+ builds again. Name "
            "it: RoarPlus(architecture='ViT-B-32')."
        )
    else:
        module = _filled(ClipModule(architecture), clip, architecture)
    module.clip.mean_image.copy_(clip.mean_image)
    return module.eval()


def _filled(module: ClipModule, clip: Clip, name: str) -> ClipModule:
    """The module with the weights of a model of the same architecture and normalization."""
    weights = clip.model.state_dict()
    problem = key_misfit(module.clip.model.state_dict(), weights)
    for part in ("mean", "std"):
        own, given = (getattr(other, part).flatten().tolist() for other in (module.clip, clip))
        if not np.allclose(own, given, atol=1e-6):
            problem = problem or f"the {part} of its images is {own} and not {given}"
    if not problem:
        module.clip.model.load_state_dict(weights)
        problem = "it computes other embeddings, as with another activation" * (not _agree(module.clip, clip))
    if problem:
        raise ValueError(f"The model is not of the architecture {name!r}: {problem}. Give the model's own.")
    return module


def _agree(own: Clip, other: Clip) -> bool:
    """Whether two models give the same embeddings of a sample."""
    found = []
    for clip in (own, other):
        with borrowed(clip):
            images, tokens = sample(clip)
            gray = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device).view_as(images)
            found.append(torch.cat([clip.encode_image(gray), clip.encode_text(tokens)]).float().cpu())
    return torch.allclose(found[0], found[1], atol=1e-4)


def _write_folder(clip: Clip, inner: TransformersClip, folder: Path) -> None:
    """Write a model of transformers with its tokenizer and normalization, for `load_clip`."""
    inner.model.save_pretrained(folder)
    if not isinstance(clip.tokenizer, TransformersTokenizer):
        raise ValueError(
            "ROAR+ builds a model of transformers again with its tokenizer, and the Reader has one of open_clip. Give "
            "the model's own tokenizer or processor: Reader(tokenizer=...)."
        )
    clip.tokenizer.tokenizer.save_pretrained(folder)
    settings = processor_settings(clip.config["preprocess_cfg"] | {"resize_mode": "squash"}, clip.image_size[0])
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
