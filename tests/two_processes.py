"""What test_ddp.py looks at, computed by one process and by two: `python two_processes.py FOLDER`.

A program of its own: forking is cheaper than starting processes, and not possible once torch has run a backward, as
other tests do.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from safetensors.torch import save_file
from test_foreign_modules import Films, TheirModule, their_reader
from torch import Tensor
from torch.utils.data import DataLoader

from matex_pl import ClipModule
from matex_pl.attribution import CenterMap, Matex
from matex_pl.callbacks import AttributionMaps as LoggedMaps
from matex_pl.callbacks import AttributionMetrics, MapWriter, PredictionWriter, RoarPlus
from matex_pl.clip import Clip
from matex_pl.data import ManifestDataModule, PhantomDataModule
from matex_pl.evaluation import tensors as tensor_files
from matex_pl.maps import Attribution
from matex_pl.roar.plan import Protocol, Training
from matex_pl.training.distributed import gather_rows
from matex_pl.training.guidance import Guidance
from matex_pl.training.lora import Lora
from matex_pl.training.loss import contrastive_loss, gathered_loss, same_phrase, sigmoid_loss

TINY = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
LOSSES = tuple(product(("softmax", "sigmoid"), ("positive", "masked")))
# Local loss, and gradients of gathered embeddings.
WAYS = ((True, True), (False, True), (False, False))
PHRASES = ["Left effusion.", "Edema.", "left  effusion.", "Nodule."], ["LEFT EFFUSION.", "Mass.", "Edema.", "Normal."]


def model(patch_dropout: float = 0.0) -> ClipModule:
    torch.manual_seed(0)
    vision = {**TINY["vision_cfg"], "patch_dropout": patch_dropout}
    return ClipModule(json.dumps({**TINY, "vision_cfg": vision}), lr=1e-3, warmup_steps=1)


def biased_model() -> ClipModule:
    """The sigmoid loss with adapters, gradient checkpointing and guidance."""
    torch.manual_seed(0)
    vision = {**TINY["vision_cfg"], "patch_dropout": 0.0}
    config = {**TINY, "vision_cfg": vision, "init_logit_bias": -10.0, "init_logit_scale": 2.3}
    guidance = Guidance(regions=0.5, warmup_steps=3)
    options: dict[str, Any] = {"lora": Lora(r=2), "grad_checkpointing": True, "guidance": guidance}
    return ClipModule(json.dumps(config), lr=1e-2, warmup_steps=1, **options)


def images(folder: Path, batch_size: int) -> PhantomDataModule:
    """Images for validation and for test make 7 pairs each."""
    return PhantomDataModule(
        str(folder / "images"), 14, 6, 4, 64, image_size=32, batch_size=batch_size, num_workers=0, augment=True
    )


def trainer(folder: Path, processes: int, *callbacks: Callback, logger: Any = False, **settings: Any) -> Trainer:
    strategy = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        # In double precision Adam does not make a step of what is only rounding.
        **({"precision": "64-true"} | strategy | settings),
    )


class TrainLosses(Callback):
    """Keeps the loss of each step, as it is logged, in a file of the first process."""

    def __init__(self, path: Path) -> None:
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.losses), encoding="utf-8")


class Draws(Callback):
    """Writes, for each process, a number drawn at each step of the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            with (self.folder / f"draws_{trainer.global_rank}.txt").open("a", encoding="utf-8") as file:
                file.write(f"{float(torch.rand(1, dtype=torch.float64))!r}\n")


class SaveFirstEpoch(Callback):
    """Keeps the state after the first epoch, and within the second."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            trainer.save_checkpoint(self.path.with_name("middle.ckpt"))

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fit(rank: int, folder: Path, processes: int) -> None:
    """Two epochs with maps and their metrics; the first is kept."""
    out = folder / f"fit{processes}"
    callbacks = [
        LoggedMaps(Matex(), num_pairs=3),
        AttributionMetrics(Matex(), num_batches=-1, per_finding=True),
        TrainLosses(folder / f"fit{processes}.losses"),
        SaveFirstEpoch(out / "first.ckpt"),
    ]
    run = trainer(out, processes, *callbacks, logger=TensorBoardLogger(out, name="tb", version="0"), max_epochs=2)
    module = model()
    run.fit(module, images(folder, 8 // processes))
    keep(folder / f"fit{processes}.pt", module, run)
    trainer(out, processes, PredictionWriter(str(out / "predictions.csv"))).predict(
        module, images(folder, 4), return_predictions=False
    )


def options(rank: int, folder: Path, processes: int) -> None:
    """One epoch of the sigmoid loss with adapters, gradient checkpointing and guidance."""
    module = biased_model()
    losses = TrainLosses(folder / f"options{processes}.losses")
    run = trainer(folder, processes, losses, max_epochs=1, limit_val_batches=1)
    run.fit(module, images(folder, 8 // processes))
    keep(folder / f"options{processes}.pt", module, run)


def resume(rank: int, folder: Path, start: int, processes: int) -> None:
    """The second epoch after a first one with another number of processes."""
    run = trainer(folder, processes, max_epochs=2)
    module = model()
    first = folder / f"fit{start}" / "first.ckpt"
    run.fit(module, images(folder, 8 // processes), ckpt_path=first, weights_only=True)
    keep(folder / f"resume{start}{processes}.pt", module, run)


def resume_within(folder: Path) -> None:
    """The rest of the second epoch, from its middle: by two processes after two, and after one."""
    for start in (2, 1):
        losses = TrainLosses(folder / f"within{start}.losses")
        run = trainer(folder, 2, losses, max_epochs=2, limit_val_batches=0, enable_checkpointing=False)
        module = model()
        run.fit(module, images(folder, 4), ckpt_path=folder / f"fit{start}" / "middle.ckpt", weights_only=True)
        keep(folder / f"within{start}.pt", module, run)


def skip(folder: Path) -> None:
    """An image that turns out unreadable within an epoch, under `on_bad_row: skip`."""
    out = folder / "skip"
    out.mkdir()
    rows = ["image,phrase,patient_id,split"]
    for place in range(12):
        Image.fromarray(np.random.default_rng(place).integers(0, 255, (32, 32), dtype=np.uint8)).save(
            out / f"{place}.png"
        )
        rows.append(f"{place}.png,Image {place}.,{place},{'val' if place > 7 else 'train'}")
    (out / "5.png").write_bytes(b"broken")
    (out / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    data = ManifestDataModule(str(out / "table.csv"), on_bad_row="skip", image_size=32, batch_size=4, num_workers=0)
    try:
        trainer(out, 2, max_epochs=1, limit_val_batches=0, enable_checkpointing=False).fit(model(), data)
    except Exception as error:
        (out / "error").write_text(str(error), encoding="utf-8")


def dropout(folder: Path) -> None:
    """Two processes with patch dropout: at once, and stopped after the first epoch."""
    for name, start in (("whole", None), ("resumed", folder / "whole" / "first.ckpt")):
        out = folder / name
        out.mkdir()
        callbacks = [Draws(out), *([] if start else [SaveFirstEpoch(out / "first.ckpt")])]
        module, run = model(0.5), trainer(out, 2, *callbacks, max_epochs=2, precision="32-true")
        run.fit(module, images(folder, 4), ckpt_path=start, weights_only=True)
        keep(folder / f"{name}.pt", module, run)


class BadImage(ClipModule):
    """Sees no numbers in the second image of the second process, at the second step."""

    def inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, tokens = super().inputs(batch)
        if self.trainer.training and self.trainer.global_rank == 1 and self.global_step == 1:
            images[1] = torch.nan
            (Path(self.trainer.default_root_dir) / "bad").write_text(batch["id"][1], encoding="utf-8")
        return images, tokens


def nan(folder: Path) -> None:
    """An image that stops both processes."""
    out = folder / "nan"
    out.mkdir()
    try:
        module = BadImage(json.dumps(TINY), warmup_steps=0)
        trainer(out, 2, max_epochs=1, limit_val_batches=0, precision="32-true").fit(module, images(folder, 4))
    except Exception as error:
        (out / "error").write_text(str(error), encoding="utf-8")


class ForeignFindings(PhantomDataModule):
    """Does not say which findings it has, so that processes learn of them from their batches."""

    findings = ()


def metrics_of_some(rank: int, folder: Path, processes: int) -> None:
    """Findings that only one of the processes sees, of maps that are the same for all."""
    data = ForeignFindings(
        str(folder / "images"), 14, 6, 4, 64, image_size=32, batch_size=4 // processes, num_workers=0
    )
    metrics = AttributionMetrics(CenterMap(), num_batches=-1, per_finding=True)
    run = trainer(folder, processes, metrics)
    run.validate(model(), data, verbose=False)
    keep(folder / f"some{processes}.pt", model(), run)


class Counted(CenterMap):
    """Notes every pair that it explains."""

    def __init__(self, log: str = "") -> None:
        self.log = log

    def attribute(self, clip: Clip, images: Tensor, tokens: Tensor, phrases: Any, *boxes: Any) -> Attribution:
        with Path(self.log).open("a", encoding="utf-8") as file:
            file.writelines(f"{phrase}\n" for phrase in phrases)
        return super().attribute(clip, images, tokens, phrases, *boxes)


def maps(rank: int, folder: Path, processes: int) -> None:
    """The maps of the validation images, as far as the process or the disk lets it."""
    run = trainer(folder, processes, MapWriter(Counted(str(folder / "log")), str(folder / "maps")), precision="32-true")
    run.validate(model(), images(folder.parent, 4 // processes), verbose=False)


def maps_killed(rank: int, folder: Path) -> None:
    """Ends without warning in the middle of the second file."""
    written = []

    def half(tensors: Any, path: Path, head: Any) -> None:
        written.append(path)
        save_file(tensors, path, head)
        if len(written) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.save_file = half
    maps(rank, folder, 1)


def maps_on_a_full_disk(rank: int, folder: Path) -> None:
    """The disk fills up before the first file."""

    def full(tensors: Any, path: Path, head: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        save_file(tensors, path, head)

    tensor_files.save_file = full
    maps(rank, folder, 1)


class TheirPairs(TheirModule):
    """A loss per pair: two processes together compute that of the whole batch."""

    def loss(self, batch: Any) -> Tensor:
        clip = self.net["clip"]
        images = clip.encode_image(batch["pixel_values"], normalize=True)
        texts = clip.encode_text(self.tokenizer(batch["caption"]).to(self.device), normalize=True)
        return clip.logit_scale * (1 - (images * texts).sum(-1)).mean()


def foreign(rank: int, folder: Path, processes: int) -> None:
    """A training that knows nothing of this package, with seven films for validation."""
    module = TheirPairs()
    reader = their_reader(module)
    callbacks = LoggedMaps(num_pairs=3, reader=reader), AttributionMetrics(num_batches=-1, reader=reader)
    out = folder / f"foreign{processes}"
    run = trainer(
        out,
        processes,
        *callbacks,
        logger=TensorBoardLogger(out, name="tb", version="0"),
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )
    loaders = [DataLoader(Films(number), batch_size=4 // processes) for number in (4, 7)]
    run.fit(module, *loaders)
    keep(folder / f"foreign{processes}.pt", module, run)


def keep_maps(folder: Path) -> None:
    """By one process and by two; killed, and on a full disk, and then again."""
    for name in ("maps1", "maps2", "killed", "full"):
        (folder / name).mkdir()
    maps(0, folder / "maps1", 1)
    maps(0, folder / "maps2", 2)
    for name, function in (("killed", maps_killed), ("full", maps_on_a_full_disk)):
        try:
            fork(function, folder / name)
        except Exception as error:
            (folder / name / "error").write_text(str(error), encoding="utf-8")
        first = [str(path) for path in (folder / name / "maps").rglob("*.safetensors")]
        (folder / name / "first").write_text(json.dumps(first), encoding="utf-8")
        (folder / name / "log").rename(folder / name / "first_log")
        maps(0, folder / name, 2 if name == "killed" else 1)


def roar(folder: Path) -> None:
    """A training of two processes with ROAR+ at its end."""
    callback = RoarPlus(
        ["chefer"], Protocol(fractions=[0.5], repeats=1), Training(epochs=1, batch_size=4), out=str(folder / "roar")
    )
    run = trainer(folder, 2, callback, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False)
    run.fit(model(), datamodule=images(folder, 4))


def keep(path: Path, module: LightningModule, run: Trainer) -> None:
    scores = {name: float(value) for name, value in run.callback_metrics.items()}
    torch.save({"scores": scores, "weights": module.state_dict()}, path)


def embeddings(rank: int | None) -> tuple[torch.Tensor, ...]:
    """A linear map, and the unit embeddings that it gives of one process's pairs, or of all."""
    generator = torch.Generator().manual_seed(0)
    image, text, weight = (
        torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((8, 5), (8, 5), (5, 3))
    )
    weight.requires_grad_()
    rows = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return weight, F.normalize(image[rows] @ weight, dim=-1), F.normalize(text[rows] @ weight, dim=-1)


def scalars(with_bias: bool) -> list[Tensor]:
    """The factor of the logits, and the bias of the sigmoid loss."""
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (7.0, -2.0)[: 1 + with_bias]]


def whole_loss(rank: int, folder: Path) -> None:
    """Losses, their gradients of the map, of the scale and of the bias, by one process on all pairs."""
    found = {}
    for name, equal_phrases in LOSSES:
        weight, image, text = embeddings(None)
        scale, *bias = scalars(name == "sigmoid")
        function = sigmoid_loss if bias else contrastive_loss
        loss = function(image, text, scale, *bias, same_phrase([*PHRASES[0], *PHRASES[1]]), equal_phrases)
        loss.backward()
        values = (loss, weight.grad, *(value.grad for value in (scale, *bias)))
        found[f"{name}-{equal_phrases}"] = [value.tolist() for value in values]
    (folder / "loss.json").write_text(json.dumps(found), encoding="utf-8")


def shared_loss(rank: int, folder: str) -> None:
    """The same by one of two processes, averaged as DDP does, for the ways to gather."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {}
    for (name, equal_phrases), (local_loss, gather_with_grad) in product(LOSSES, WAYS):
        weight, image, text = embeddings(rank)
        scale, *bias = scalars(name == "sigmoid")
        settings = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "equal_phrases": equal_phrases}
        loss = gathered_loss(image, text, scale, PHRASES[rank], **settings, logit_bias=bias[0] if bias else None)
        loss.backward()
        values = [loss.detach(), weight.grad, *(value.grad for value in (scale, *bias))]
        for value in values:
            dist.all_reduce(value)
        found[f"{name}-{equal_phrases}-{local_loss}-{gather_with_grad}"] = [(value / 2).tolist() for value in values]
    try:
        gather_rows(torch.zeros(3 + rank))
    except ValueError as error:
        found["uneven"] = str(error)
    Path(folder, f"loss_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    images(folder, 4).prepare_data()
    fork(shared_loss, str(folder), processes=2)
    for processes in (1, 2):
        for function in (fit, metrics_of_some, foreign, options):
            # Two are forked by Lightning.
            fork(function, folder, 1) if processes == 1 else function(0, folder, 2)
    keep_maps(folder)
    nan(folder)
    fork(resume, folder, 2, 1)
    resume(0, folder, 1, 2)
    resume_within(folder)
    skip(folder)
    dropout(folder)
    roar(folder)
    fork(whole_loss, folder)


def fork(function: Callable[..., None], *arguments: Any, processes: int = 1) -> None:
    """Run a function in processes of its own, so that this one computes no gradient."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=processes, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
