"""Fine-tuning of a CLIP model on images and phrases, as a LightningModule."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from matex_pl.arguments import check_choices
from matex_pl.clip.device import random_state, set_random_state
from matex_pl.clip.load import load_clip
from matex_pl.clip.low_rank import merge_adapters
from matex_pl.clip.model import Clip
from matex_pl.clip.record import listed, model_files, recorded_lora
from matex_pl.clip.weights import plain_name, plain_state, read_checkpoint, reading_checkpoint, short
from matex_pl.data.datamodule import STAGES, ChestXrayDataModule, EpochLoader
from matex_pl.data.pair import ImageTextBatch, ImageTextPair
from matex_pl.files import check_folder
from matex_pl.training.checkpoints import WholeCheckpointIO, place_in_epoch, without_functions
from matex_pl.training.description import describe_training
from matex_pl.training.distributed import check_strategy, fingerprints, gather_rows, process_count
from matex_pl.training.freeze import Freeze, freeze_parameters
from matex_pl.training.grad_checkpointing import checkpoint_gradients
from matex_pl.training.guidance import COMPILED, Guidance, Guide, check_targets, guidance_of
from matex_pl.training.lora import SIDES, Lora, add_lora
from matex_pl.training.loss import EqualPhrases, Loss, gathered_loss, phrase_keys, whole_loss
from matex_pl.training.scores import ImageTextRecall, ZeroShot

log = logging.getLogger(__name__)

# Settings in the optimizer's state, which a checkpoint restores.
_RESTORED = ("betas", "freeze", "lora", "loss", "lr", "weight_decay")
# Settings that older checkpoints do not record.
EARLIER_SETTINGS = {"loss": "softmax"}
# CoCa's decoder gets no gradient, nor does SigLIP's bias from the softmax loss, and DDP would wait for it.
_UNREACHED = {"softmax": ("logit_bias", "text_decoder."), "sigmoid": ("text_decoder.",)}


class ClipModule(LightningModule):
    """Fine-tuning of CLIP by a contrastive loss, with retrieval and zero-shot scores on held-out pairs.

    Training logs `train/loss`, `train/logit_scale`, and `train/logit_bias` if the loss has a bias. Validation (`val/`)
    and test (`test/`) log `loss`, `image_to_text_recall@{1,5,10}` and `text_to_image_recall@{1,5,10}`. If the data
    module names findings, they also log `zero_shot_top1` and `zero_shot_auroc`.

    Args:
        name: An open_clip name, `hf-hub:org/repo`, `local-dir:folder`, a path to a JSON model config, or a checkpoint
            of `matex fit`, whose model and weights are taken.
        pretrained: Tag of open_clip (`openai`) or a checkpoint file, also of this module. By default `hf-hub:` and
            `local-dir:` models get their own weights, all others random weights.
        lr: Peak learning rate of AdamW.
        weight_decay: Decay of the weight matrices; biases, norms and the logit scale have none.
        betas: The two momentum coefficients of AdamW.
        warmup_steps: Steps of linear warm-up, followed by a cosine to zero at the end of training.
        freeze: Frozen parts: `none`, `text`, `image` (towers), `all-but-projections`, or `all-but-head`
            (projections and final norms). The logit scale is always trained.
        max_logit_scale: Upper bound of the factor between cosines and logits. By default 100 with the softmax loss, as
            in CLIP, and none with the sigmoid loss, as in SigLIP.
        findings: Findings for the zero-shot scores; those of the data module by default.
        prompt: Prompt per finding; `{finding}` stands for its name.
        image_size: Side of the square input in pixels, or height and width; the model's own by default. Position
            embeddings are interpolated to it.
        local_loss: With several processes, whether each computes only the loss of its own pairs against all pairs; if
            not, each computes the whole loss.
        gather_with_grad: With several processes, whether gradients flow to the process that computed an embedding, as
            in one process on the whole batch. See `gathered_loss`.
        equal_phrases: Role of other pairs of the batch with the same phrase: `positive`, or `masked`, which leaves them
            out of the loss of the row. Neither makes them negatives.
        loss: `softmax`, the loss of CLIP, or `sigmoid`, the loss of SigLIP, which trains the model's bias too. By
            default `sigmoid` for models with a bias (`logit_bias`), `softmax` for others.
        lora: Low-rank adapters, which are trained instead of the weights; it needs the extra `lora`. Towers in `freeze`
            get none. With `all-but-projections` and `all-but-head`, both towers get adapters, and these parts are
            trained as well.
        grad_checkpointing: Whether the trained towers recompute the activations of their blocks in the backward pass.
            Training takes less memory and more time.
        guidance: A loss on the image map of each pair, by boxes, by named regions or by the anatomy of the image; see
            `Guidance`. Training then logs `train/guidance_loss`, `train/energy_in_box`, the share of the map inside
            the boxes, and `train/guided_share`, the share of pairs with a target. By default there is none.
    """

    clip: Clip
    # Module dicts, whose items have no type.
    retrieval: Any
    zero_shot: Any
    _prompts: Tensor

    def __init__(
        self,
        name: str = "ViT-B-32",
        pretrained: str | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 200,
        freeze: Freeze = "none",
        max_logit_scale: float | None = None,
        findings: list[str] | None = None,
        prompt: str = "{finding}",
        image_size: int | tuple[int, int] | None = None,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        equal_phrases: EqualPhrases = "positive",
        loss: Loss | None = None,
        lora: Lora | None = None,
        grad_checkpointing: bool = False,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__()
        check_choices(ClipModule.__init__, locals())
        if lr <= 0 or warmup_steps < 0:
            raise ValueError(f"lr must be positive and warmup_steps not negative, got {lr} and {warmup_steps}.")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}.")
        if max_logit_scale is not None and max_logit_scale < 1:
            raise ValueError(
                f"max_logit_scale must be at least 1, got {max_logit_scale}. Give the factor, not its log."
            )
        if "{finding}" not in prompt:
            raise ValueError(f"prompt must contain {{finding}}, got {prompt!r}.")
        if local_loss and not gather_with_grad:
            raise ValueError(
                "local_loss=True with gather_with_grad=False would give wrong gradients, because the gradients from "
                "the pairs of other processes are missing. Set local_loss=False as well."
            )
        # A checkpoint holds the settings of the adapters in plain types.
        adapters = Lora(**lora) if isinstance(lora, Mapping) else lora
        lora = cast(Any, adapters and asdict(adapters))
        guidance = cast(Any, guidance and asdict(cast(Guidance, guidance_of(guidance))))
        self.save_hyperparameters()
        self.clip = load_clip(name, pretrained, image_size)
        loss = self._checked_loss(loss, name)
        if max_logit_scale is None and loss == "softmax":
            max_logit_scale = 100.0
        # A checkpoint rebuilds the model from these values, without the files of this run.
        self.hparams.update(name=json.dumps(self.clip.config), pretrained=None, image_size=None)
        self.hparams.update(loss=loss, max_logit_scale=max_logit_scale, lora=None)
        # LightningCLI adds the path of a function here, which Lightning calls when a checkpoint is loaded.
        self.hparams.pop("_instantiator", None)
        self.retrieval = nn.ModuleDict({"val": ImageTextRecall(), "test": ImageTextRecall()})
        self.zero_shot = None
        self.findings: tuple[str, ...] = ()
        self._rng_state: Tensor | None = None
        self._gpu_rng_state: Tensor | None = None
        self._scored: set[int] = set()
        # Ids, rows with finite embeddings, and losses of the batches of one step.
        self._step_ids: list[str] = []
        self._step_rows: list[Tensor] = []
        self._step_losses: list[Tensor] = []
        self._grad_norm: Tensor | None = None
        self._model_files: dict[str, Tensor] | None = None
        self._rate = lr
        self._place: dict[str, Any] | None = None
        self._adapted: set[str] | None = None
        freeze_parameters(self.clip.model, freeze)
        for part, parameter in self.clip.model.named_parameters():
            if part.startswith(_UNREACHED[loss]):
                parameter.requires_grad_(False)
        if adapters is not None:
            self.add_adapters(adapters)
        if grad_checkpointing:
            checkpoint_gradients(self.clip.model, [side for side in SIDES if side not in self._frozen])
        self.guide: Guide | None = None
        # Lightning keeps the current mode, and `load_clip` returns a model in eval mode.
        self.train()

    def _checked_loss(self, loss: Loss | None, name: str) -> Loss:
        """The given loss, or the default of the model; ValueError for the sigmoid loss of a model without bias."""
        has_bias = getattr(self.clip.model, "logit_bias", None) is not None
        if loss == "sigmoid" and not has_bias:
            # A start value would be a guess: it belongs to the scale and the cosines of the weights.
            raise ValueError(
                f"loss: sigmoid needs a model with a bias of its logits, and {short(name)} has none. Set loss: "
                "softmax, give a SigLIP model, or add init_logit_bias (-10 in SigLIP) to the JSON model config."
            )
        return loss or ("sigmoid" if has_bias else "softmax")

    @property
    def _bias(self) -> Tensor | None:
        return self.clip.model.logit_bias if self.hparams["loss"] == "sigmoid" else None

    def add_adapters(self, lora: Lora) -> None:
        """Add low-rank adapters to the model and train them instead of its weights; see `lora` and `add_lora`.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: A target matches no layer, or the model has adapters.
        """
        if self.hparams["lora"]:
            raise ValueError("The module has low-rank adapters. Give a module without, or the path of its checkpoint.")
        freeze: Freeze = self.hparams["freeze"]
        parts = [part for part, parameter in self.clip.model.named_parameters() if parameter.requires_grad]
        whole = {part for part in parts if part.startswith("logit_") or freeze.startswith("all-but")}
        self._adapted = add_lora(self.clip, lora, [side for side in SIDES if side != freeze], whole)
        self.hparams["lora"] = asdict(lora)

    @property
    def _frozen(self) -> set[str]:
        """Towers in eval mode."""
        freeze = self.hparams["freeze"]
        if self._adapted is not None:
            return set(SIDES) - self._adapted
        return set(SIDES) if freeze.startswith("all-but") else {freeze}

    @property
    def needs_masks(self) -> bool:
        """Whether a training step reads masks of the anatomy."""
        settings = guidance_of(self.hparams["guidance"])
        return settings is not None and settings.anatomy > 0

    def inputs(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Inputs of the model for a batch: normalized images `(B, 3, H, W)` and tokens `(B, T)`."""
        return self.clip.inputs(batch)

    def setup(self, stage: str) -> None:
        """Read findings and mean image from the data module, and check settings that would fail later."""
        strategy, data = self.trainer.strategy, cast(Any, getattr(self.trainer, "datamodule", None))
        check_strategy(strategy)
        # Keep a user's own choice.
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO()
        if stage == "fit" and self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            # The callbacks have their folders by now.
            for callback in self.trainer.checkpoint_callbacks:
                folder = getattr(callback, "dirpath", None)
                if folder and "://" not in str(folder):
                    check_folder(Path(folder))
        size = getattr(data, "image_size", None)
        if size not in (None, self.clip.image_size):
            raise ValueError(
                f"The data module's image_size is {size}, the model takes {self.clip.image_size}. Leave image_size out "
                "of the data module; the model's own is the default."
            )
        self.findings = tuple(self.hparams["findings"] or getattr(data, "findings", ()))
        if self.findings:
            scores = {split: ZeroShot(self.findings) for split in ("val", "test")}
            self.zero_shot = nn.ModuleDict(scores).to(self.device)
        if self.clip.mean_image.isnan().any() and hasattr(data, "mean_image"):
            # Read once, not by every process.
            image: Any = data.mean_image() if self.trainer.is_global_zero else None
            self.clip.mean_image.copy_(strategy.broadcast(image))
        # Callbacks that average weights have copied the module by now, and swap all buffers.
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            for copied in vars(callback).values():
                if isinstance(copied, AveragedModel):
                    _refuse_averaged_masks(copied, type(callback).__name__)
                for part in copied.modules() if isinstance(copied, nn.Module) else ():
                    if isinstance(part, Clip) and part is not self.clip:
                        part.mean_image.copy_(self.clip.mean_image)
        if stage == "fit":
            self._model_files = model_files(self.clip)
            settings = guidance_of(self.hparams["guidance"])
            # Lightning's mark of a compiled module.
            if settings is not None and getattr(self, "_compiler_ctx", None):
                raise NotImplementedError(COMPILED)
            self.guide = Guide(settings, self.clip) if settings is not None else None
            if settings is not None and isinstance(data, ChestXrayDataModule):
                check_targets(settings, data)
        for split in STAGES[stage] if hasattr(data, "pairs") and self.trainer.is_global_zero else ():
            self._report_cut_phrases(split, data.pairs[split])

    def _report_cut_phrases(self, split: str, pairs: Sequence[ImageTextPair]) -> None:
        limit = self.clip.context_length
        cut = [pair.id for pair in pairs if self.clip.count_tokens(pair.phrase) > limit]
        if cut:
            rank_zero_warn(
                f"{len(cut)} of {len(pairs)} {split} phrases are longer than the model's {limit} tokens and are cut "
                f"(the spatial prior still reads them whole): {', '.join(cut[:5])}{', ...' if len(cut) > 5 else ''}"
            )

    def train(self, mode: bool = True) -> ClipModule:
        """Set training mode, except for frozen towers, which stay in eval mode."""
        super().train(mode)
        frozen = self._frozen
        for name, part in self.clip.model.named_children():
            # open_clip's plain CLIP has no module for its text tower.
            if ("image" if name == "visual" else "text") in frozen:
                part.eval()
        return self

    def forward(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """L2-normalized embeddings of a batch's images and phrases, `(B, D)` each."""
        images, tokens = self.inputs(batch)
        return self.clip.encode_image(images), self.clip.encode_text(tokens)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Contrastive loss of a batch."""
        with self.guide.following() if self.guide else nullcontext() as followed:
            image, text = self(batch)
        loss = gathered_loss(
            image,
            text,
            self.clip.logit_scale.exp(),
            batch["phrase"],
            local_loss=self.hparams["local_loss"],
            gather_with_grad=self.hparams["gather_with_grad"],
            equal_phrases=self.hparams["equal_phrases"],
            logit_bias=self._bias,
        )
        if self.guide is not None:
            added, scalars = self.guide(batch, cast(Any, followed), image, text, self.global_step)
            loss = loss + added
            for name, value in scalars.items():
                self.log(f"train/{name}", value, batch_size=len(batch["id"]))
        self._step_ids += batch["id"]
        # Read before the step of the optimizer: each look at a value waits for the device.
        self._step_rows.append((image.isfinite().all(1) & text.isfinite().all(1)).detach())
        self._step_losses.append(loss.detach())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["id"]), sync_dist=True)
        self.log("train/logit_scale", self.clip.logit_scale.exp().mean(), batch_size=len(batch["id"]))
        if self._bias is not None:
            self.log("train/logit_bias", self._bias.mean(), batch_size=len(batch["id"]))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop the training if a loss of the step or the norm of the gradient is not finite."""
        values = [loss.float() for loss in self._step_losses]
        self._grad_norm = None
        # A gradient scaler checks for overflow itself and lowers the scale.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            grads = [parameter.grad for parameter in _trained(optimizer) if parameter.grad is not None]
            self._grad_norm = nn.utils.get_total_norm(grads)
            values.append(self._grad_norm.to(self.device, torch.float32))
        # The only wait of a step.
        if values and not (found := torch.stack(values)).isfinite().all():
            losses = found[: len(self._step_losses)].tolist()
            bad = [loss for loss in losses if not math.isfinite(loss)]
            finite = torch.cat(self._step_rows).tolist() if bad else []
            spoilt = [name for name, is_finite in zip(self._step_ids, finite, strict=False) if not is_finite]
            self._stop(f"The loss is {bad[0]}" if bad else f"The norm of the gradient is {float(found[-1])}", spoilt)
        self._step_ids, self._step_rows, self._step_losses = [], [], []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, by the norm that is known already."""
        norm, self._grad_norm = self._grad_norm, None
        if norm is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grads_with_norm_(_trained(optimizer), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _stop(self, what: str, spoilt: list[str]) -> NoReturn:
        """Stop the training before a step with values that are not finite, and save the weights if they are finite.

        Args:
            what: Start of the message, with the value that is not finite.
            spoilt: Ids of this process's pairs whose embeddings are not finite.

        Raises:
            FloatingPointError: Always.
        """
        parts: list[Any] = [(self._step_ids, spoilt)] * process_count()
        if process_count() > 1:
            dist.all_gather_object(parts, parts[0])
        ids = [name for part in parts for name in part[0]]
        spoilt = [name for part in parts for name in part[1]]
        message = f"{what} in epoch {self.current_epoch} at step {self.global_step}, with the pairs {', '.join(ids)}."
        if spoilt:
            message += f" The embeddings of {', '.join(spoilt)} are not finite."
        if all(parameter.isfinite().all() for parameter in self.parameters()):
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
            path = folder / f"before_nan-epoch={self.current_epoch}-step={self.global_step}.ckpt"
            self.trainer.save_checkpoint(path)
            message += f" The weights before this step are in {path}."
        else:
            message += " The weights are not finite either: resume from an earlier checkpoint."
        raise FloatingPointError(f"{message} Check these images and phrases, or lower the learning rate.")

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        """Clamp the logit scale to `[1, max_logit_scale]`, as CLIP does."""
        largest = self.hparams["max_logit_scale"]
        self.clip.logit_scale.clamp_(0, None if largest is None else math.log(largest))

    def on_validation_epoch_start(self) -> None:
        """Encode the prompts with the current weights."""
        self._scored = set()
        if self.zero_shot is not None:
            prompts = [self.hparams["prompt"].format(finding=finding) for finding in self.findings]
            self._prompts = self.clip.encode_text(self.clip.tokenize(prompts))

    on_test_epoch_start = on_validation_epoch_start
    on_predict_epoch_start = on_validation_epoch_start

    @property
    def _split(self) -> str:
        return "test" if self.trainer.testing else "val"

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the scores of its split; return its embeddings for the callbacks."""
        image, text = self(batch)
        self._log_loss(image, text, batch)
        self.retrieval[self._split].update(image, text, batch["id"], batch["image_id"], batch["phrase"])
        if self.zero_shot is not None:
            self.zero_shot[self._split].update(image @ self._prompts.T, batch["image_findings"], batch["image_id"])
        return {"image": image, "text": text}

    def _log_loss(self, image: Tensor, text: Tensor, batch: ImageTextBatch) -> None:
        """Log the loss over the batches of all processes, without pairs that samplers repeat."""
        keys = torch.stack([fingerprints(batch["id"]), phrase_keys(batch["phrase"])], 1).to(image.device)
        images, texts, keys = gather_rows(image), gather_rows(text), gather_rows(keys)
        rows = {key: row for row, key in reversed(list(enumerate(keys[:, 0].tolist())))}
        new = sorted(row for key, row in rows.items() if key not in self._scored)
        self._scored.update(rows)
        if new:
            phrases = keys[new, 1]
            scale, positives = self.clip.logit_scale.exp(), phrases[:, None] == phrases
            equal_phrases = self.hparams["equal_phrases"]
            loss = whole_loss(images[new], texts[new], scale, positives, equal_phrases, self._bias)
            self.log(f"{self._split}/loss", loss, prog_bar=True, batch_size=len(new), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        split = self._split
        for metric in (self.retrieval[split], *([self.zero_shot[split]] if self.zero_shot is not None else [])):
            for name, value in metric.compute().items():
                # The value is the same in every process.
                self.log(f"{split}/{name}", value.to(self.device), prog_bar=name == "zero_shot_top1", sync_dist=True)
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: ImageTextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row per pair: id, phrase, cosine, and the image's cosine with the prompt of each finding."""
        image, text = self(batch)
        rows = [
            {"id": pair, "phrase": phrase, "cosine": cosine}
            for pair, phrase, cosine in zip(batch["id"], batch["phrase"], (image * text).sum(-1).tolist(), strict=True)
        ]
        if self.zero_shot is not None:
            for row, cosines in zip(rows, (image @ self._prompts.T).tolist(), strict=True):
                row.update(zip(self.findings, cosines, strict=True))
        return rows

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and a cosine schedule to zero; the training needs a fixed length."""
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams["warmup_steps"]
        if math.isinf(steps):
            raise ValueError(
                "The cosine schedule needs a fixed training length. Set trainer.max_epochs or trainer.max_steps."
            )
        if steps <= warmup:
            rank_zero_warn(
                f"The training ends after {steps} steps, within its warm-up of {warmup}. Lower warmup_steps."
            )
        optimizer = AdamW(
            decay_groups(self.clip.model, self.hparams["weight_decay"]),
            lr=self.hparams["lr"],
            betas=self.hparams["betas"],
            # In mixed precision Lightning refuses to clip the gradients of a fused optimizer.
            fused=not str(self.trainer.precision).endswith("mixed"),
        )
        self._rate = self.hparams["lr"]
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _resize_mode(self) -> str | None:
        return getattr(getattr(self._trainer, "datamodule", None), "resize_mode", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random state of each process, and everything that the weights need to be read elsewhere.

        Weights have their plain names, without the prefixes of `torch.compile`.
        """
        # Patch dropout draws random numbers on the CPU, on any device.
        states = [torch.get_rng_state()] * process_count()
        if len(states) > 1:
            dist.all_gather_object(states, states[0])
        checkpoint["rng_state"] = torch.stack(states)
        # Dropout of a text tower draws on the GPU, where the module is no more after a training.
        place = self.device if self._trainer is None else self.trainer.strategy.root_device
        on_gpu = [random_state(place)] * process_count()
        if len(on_gpu) > 1:
            dist.all_gather_object(on_gpu, on_gpu[0])
        checkpoint["gpu_rng_state"] = None if on_gpu[0] is None else torch.stack(cast(list[Tensor], on_gpu))
        checkpoint["tokenizer"] = self.clip.tokenizer_mark()
        if self._model_files is None:
            self._model_files = model_files(self.clip)
        checkpoint["model_files"] = self._model_files
        checkpoint["resize_mode"] = self._resize_mode
        checkpoint["training"] = describe_training(self._trainer)
        # `WeightAveraging` saves its averages as the weights, and those of the training under the second name.
        for name in ("state_dict", "current_model_state"):
            if name in checkpoint:
                checkpoint[name] = plain_state(checkpoint[name])
        for name in ("callbacks", "lr_schedulers"):
            if name in checkpoint:
                checkpoint[name] = without_functions(checkpoint[name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and read the random states and the place in the epoch for a resumed training.

        Raises:
            ValueError: The model, its settings or the optimizer's contradict the checkpoint, the weights hold NaN or
                Inf, or the remaining batches of the epoch are unknown.
        """
        trainer = self._trainer
        source = str((trainer.ckpt_path if trainer is not None else None) or "The checkpoint")
        self._fit_adapters(checkpoint, source)
        self.clip.refuse_checkpoint(checkpoint, source)
        own = {plain_name(key): key for key in self.state_dict()}
        for name in ("state_dict", "current_model_state"):
            if name in checkpoint:
                state = plain_state(checkpoint[name])
                checkpoint[name] = {own.get(key, key): value for key, value in state.items()}
        self._rng_state = checkpoint.get("rng_state")
        self._gpu_rng_state = checkpoint.get("gpu_rng_state")
        if trainer is None:
            return
        self._compare_settings(checkpoint.get("hyper_parameters", {}), source)
        mode = checkpoint.get("resize_mode")
        if mode is not None and self._resize_mode not in (None, mode):
            rank_zero_warn(
                f"{source} was trained with resize_mode: {mode}, and the data module has {self._resize_mode}. "
                "The model has not seen images of this form."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            if "optimizer_states" not in checkpoint:
                raise ValueError(
                    f"{source} holds weights only, and no training resumes from it. Start a new training from the "
                    "weights: give the checkpoint as model.name, without ckpt_path."
                )
            data = getattr(trainer, "datamodule", None)
            loader: Any = data.train_dataloader() if isinstance(data, ChestXrayDataModule) else None
            self._place = place_in_epoch(checkpoint, loader, trainer.accumulate_grad_batches, source)

    def _fit_adapters(self, checkpoint: dict[str, Any], source: str) -> None:
        """Merge the adapters of a checkpoint if the module has none and does not resume.

        Raises:
            ValueError: The checkpoint has other adapters than the module, or none, or the training resumes without.
        """
        lora, own = recorded_lora(checkpoint), self.hparams["lora"]
        if _as_json(lora) == _as_json(own):
            return
        fits = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if own is None and not fits:
            for name in ("state_dict", "current_model_state"):
                if name in checkpoint:
                    checkpoint[name] = merge_adapters(checkpoint[name], lora or {})
            return
        raise ValueError(
            f"{source} contradicts the settings: {listed({'lora': (lora, own)})}. Give the checkpoint's value, or "
            "start a new training from its weights, with the adapters merged: give the checkpoint as model.name."
        )

    def _compare_settings(self, recorded: dict[str, Any], source: str) -> None:
        """Refuse settings that a resumed training cannot follow, and log others that differ from a checkpoint's.

        Raises:
            ValueError: A setting of the optimizer differs, whose state the checkpoint restores.
        """
        trainer = self.trainer
        fits = trainer.state.fn == TrainerFn.FITTING
        recorded = EARLIER_SETTINGS | recorded
        names = signature(ClipModule).parameters.keys() - {"name", "pretrained", "image_size"}
        pairs = {name: (recorded[name], self.hparams[name]) for name in sorted(names & recorded.keys())}
        pairs = {name: pair for name, pair in pairs.items() if _as_json(pair[0]) != _as_json(pair[1])}
        restored = {name: pair for name, pair in pairs.items() if name in _RESTORED}
        if fits and restored:
            raise ValueError(
                f"{source} contradicts the settings: {listed(restored)}. A resumed training keeps its optimizer. Give "
                "the checkpoint's value, or start a new training from its weights with model.name."
            )
        is_search = Path(source).name.startswith(".lr_find_")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if fits and not is_search and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            raise ValueError(
                f"LearningRateFinder cannot work in a training that resumes from {source}, because the optimizer's "
                "rate is restored. Leave the callback out."
            )
        others = {name: pair for name, pair in pairs.items() if fits or name in ("findings", "prompt")}
        if others:
            log.info(f"Settings that differ from those of {source}: {listed(others)}. The ones given here are used.")

    def on_train_epoch_start(self) -> None:
        """Let the schedule follow a learning rate and parameter groups that callbacks have changed."""
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            if isinstance(schedule, LambdaLR):
                self._follow_callbacks(schedule)

    def _follow_callbacks(self, schedule: Any) -> None:
        groups = schedule.optimizer.param_groups
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        # `LearningRateFinder` sets the rate of the groups, which the next step of the schedule would undo.
        if self.hparams["lr"] != self._rate:
            self._rate = self.hparams["lr"]
            schedule.base_lrs = [self._rate] * len(schedule.base_lrs)
            for group in groups[: len(schedule.base_lrs)]:
                group["initial_lr"], group["lr"] = self._rate, self._rate * factor
        # `BaseFinetuning` adds groups of parameters.
        for group in groups[len(schedule.base_lrs) :]:
            group["initial_lr"] = group["lr"] / factor if factor else group["lr"]
            schedule.base_lrs.append(group["initial_lr"])
        schedule.lr_lambdas += [schedule.lr_lambdas[0]] * (len(schedule.base_lrs) - len(schedule.lr_lambdas))

    def on_train_start(self) -> None:
        """Restore the random state of a resumed checkpoint; without one, each process gets its own seed."""
        # A training that stopped may have left some.
        self._step_ids, self._step_rows, self._step_losses, self._grad_norm = [], [], [], None
        rank = self.trainer.global_rank
        states = self._rng_state if self.trainer.ckpt_path is not None else None
        on_gpu = self._gpu_rng_state if self.trainer.ckpt_path is not None else None
        self._rng_state = self._gpu_rng_state = None
        if states is not None and rank < len(states := states.cpu().view(-1, states.shape[-1])):
            # torch reads the state from the start of the storage, even for a view that begins later.
            torch.set_rng_state(states[rank].clone())
            # A training that goes on with another kind of GPU draws new numbers.
            current = random_state(self.device)
            if on_gpu is not None and current is not None and rank < len(on_gpu) and len(on_gpu[0]) == len(current):
                set_random_state(self.device, on_gpu[rank].cpu().clone())
        elif rank:
            # Lightning seeds all processes equally, and each would drop the same patches.
            torch.manual_seed(torch.initial_seed() + rank)
        # Lightning restores loaders before the schedule asks for their length, and so not this one.
        loader, place, self._place = self.trainer.train_dataloader, self._place, None
        if place is not None and isinstance(loader, EpochLoader):
            loader.load_state_dict(place)
        # A checkpoint within an epoch is written before the clamp of its step.
        self.on_train_batch_end()
        self.on_train_epoch_start()


def _refuse_averaged_masks(average: AveragedModel, name: str) -> None:
    """Raise ValueError if an average of buffers would turn the infinite entries of a causal mask into NaN."""
    infinite = torch.tensor([-torch.inf])
    mean = average.avg_fn or get_swa_avg_fn()
    has_mask = any(value.isinf().any() for value in average.module.buffers())
    if average.use_buffers and has_mask and torch.as_tensor(mean(infinite, infinite, torch.tensor(1))).isnan().any():
        raise ValueError(
            f"{name} averages buffers, and the mask of the text tower holds -inf, whose average is NaN. Set its "
            "use_buffers to false."
        )


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 0 to 1 over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW without frozen parameters: matrices with decay; biases, norms, logit scale without."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim >= 2 and not name.startswith("logit_")]
    plain = [parameter for name, parameter in trained if parameter.ndim < 2 or name.startswith("logit_")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def load_module(ckpt_path: str) -> ClipModule:
    """The module of a checkpoint, on the CPU in eval mode; no code of the file is run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of `matex fit`.
    """
    checkpoint = read_checkpoint(ckpt_path).checkpoint
    with reading_checkpoint(ckpt_path):
        # Only arguments: Lightning's own loading calls a function that a checkpoint may name among them.
        known = signature(ClipModule).parameters
        recorded = EARLIER_SETTINGS | checkpoint["hyper_parameters"]
        settings = {name: value for name, value in recorded.items() if name in known}
        module = ClipModule(**settings | {"name": ckpt_path})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval()
