"""Check of the package on a GPU: parity with the CPU, throughput, memory, leaks and training; writes one JSON file.

    HF_HUB_OFFLINE=1 python benchmarks/gpu_check.py --out gpu_check.json
    HF_HUB_OFFLINE=1 python benchmarks/gpu_check.py --device cpu --tiny

All models have random weights. A stage that fails is listed under `errors`, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from matex_pl import ClipModule, __version__, attribution, load_clip
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.core.target import REFERENCES
from matex_pl.callbacks import AttributionMaps, AttributionMetrics, MapWriter, PredictionWriter
from matex_pl.clip import Clip
from matex_pl.clip.device import synchronize
from matex_pl.data import PhantomDataModule
from matex_pl.maps import Attribution
from matex_pl.metrics.functional import spearman

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Repeated forwards at one batch size are enough.
MANY_FORWARDS = ("IntegratedGradients", "M2ib", "KernelShap", "Rise", "SubmodularRegions")
# Settings that take the same path as the defaults, with less work.
SMALL: dict[str, dict[str, Any]] = {
    "IntegratedGradients": {"steps": 8},
    "M2ib": {"steps": 3, "copies": 4},
    "KernelShap": {"samples": 32},
    "Rise": {"masks": 32},
    "SubmodularRegions": {"regions": 4},
}
Call = Callable[[], Any]


def all_methods() -> dict[str, AttributionMethod]:
    """The methods of the package, with few forwards, and the kinds of MATEX."""
    found: dict[str, AttributionMethod] = {}
    for name in attribution.__all__:
        kind = getattr(attribution, name)
        if isinstance(kind, type) and issubclass(kind, AttributionMethod) and not kind.__abstractmethods__:
            found[name] = kind(**SMALL.get(name, {}))
    kinds = {"recommended": Matex.recommended(), "paper": Matex.paper(), "rollout": Matex(flow="rollout")}
    return found | {f"Matex {name}": method for name, method in kinds.items()}


class Check:
    """One run of all stages."""

    def __init__(self, device: str, tiny: bool, out: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self.tiny = tiny
        self.path = Path(out) if out else None
        self.methods = all_methods()
        self.result: dict[str, Any] = {
            "torch": torch.__version__,
            "matex_pl": __version__,
            "device": torch.cuda.get_device_name(self.device) if self.is_cuda else self.device.type,
            "tiny": tiny,
            "errors": [],
        }

    def guard(self, where: str, call: Call) -> Any:
        """Result of a call; an error is written down, with its place."""
        try:
            return call()
        except Exception as error:
            places = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
            ]
            text = f"{type(error).__name__}: {error}"[:300]
            self.result["errors"].append({"where": where, "error": text, "at": places[-5:]})
            if self.is_cuda:
                torch.cuda.empty_cache()
            return None

    def save(self) -> None:
        """Write the results of the finished stages."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.result, indent=1), encoding="utf-8")

    def model(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Clip:
        """A model with random weights, the same on every device."""
        torch.manual_seed(0)
        clip = load_clip(json.dumps({"model_cfg": TINY}) if self.tiny else name)
        clip.mean_image.fill_(0.5)
        return clip.to(device, dtype)

    def pairs(self, clip: Clip, size: int) -> tuple[Any, ...]:
        """The arguments of `attribute`; the images are smooth, because noise gives maps without an order."""
        generator, device = torch.Generator().manual_seed(1), clip.std.device
        raster = torch.rand(size, 1, 7, 7, generator=generator)
        pixels = torch.nn.functional.interpolate(raster, clip.image_size, mode="bicubic").clamp(0, 1)
        images = (255 * pixels).to(torch.uint8).expand(-1, 3, -1, -1).contiguous().to(device)
        phrases = [REFERENCES[place % len(REFERENCES)] for place in range(size)]
        boxes = torch.tensor([[0.0, 0.05, 1.0, 0.95]]).repeat(size, 1).to(device)
        return clip.normalize(images), clip.tokenize(phrases), phrases, boxes

    def parity(self) -> None:
        """Maps of the CPU and of the GPU in float32, and of the GPU in float32 and bfloat16, per method."""
        cpu = torch.device("cpu")
        clips = [
            self.model("ViT-B-32", cpu),
            self.model("ViT-B-32", self.device),
            self.model("ViT-B-32", self.device, torch.bfloat16),
        ]
        table = self.result["parity"] = {}

        def compare(method: AttributionMethod) -> dict[str, Any]:
            host, gpu, low = (method.attribute(clip, *self.pairs(clip, 2 if self.tiny else 4)) for clip in clips)
            again = method.attribute(clips[1], *self.pairs(clips[1], len(gpu.score)))
            same = torch.equal(gpu.image, again.image) and torch.equal(gpu.text, again.text)
            return {"cpu_gpu": agreement(host, gpu), "fp32_bf16": agreement(gpu, low), "same_twice": same}

        for name, method in self.methods.items():
            table[name] = self.guard(f"parity {name}", lambda method=method: compare(method))
            self.save()

    def throughput(self) -> None:
        """Pairs per second and peak memory of the methods and of a plain forward."""
        rows = self.result["throughput"] = []
        for name in ("ViT-B-32",) if self.tiny else ("ViT-B-32", "ViT-B-16"):
            for dtype in DTYPES:
                clip = self.guard(name, lambda name=name, dtype=dtype: self.model(name, self.device, DTYPES[dtype]))
                for size in () if clip is None else (1, 4) if self.tiny else (1, 16, 64, 256):
                    for method, call in self._calls(clip, size).items():
                        found = self.guard(f"{name} {dtype} {size} {method}", lambda call=call: self._timed(call))
                        if found is not None:
                            seconds, peak = found
                            about = {"model": name, "dtype": dtype, "batch": size, "method": method}
                            rate = {"pairs_per_s": round(size / seconds, 1), "peak_mib": peak}
                            rows.append(about | {"ms": round(1e3 * seconds, 2)} | rate)
                    self.save()
                del clip
                gc.collect()

    def _calls(self, clip: Clip, size: int) -> dict[str, Call]:
        images, tokens, phrases, boxes = self.pairs(clip, size)

        @torch.no_grad()
        def forward() -> None:
            clip.similarity(images, tokens)

        def explain(method: AttributionMethod) -> Call:
            return lambda: method.attribute(clip, images, tokens, phrases, boxes)

        names = [name for name in self.methods if name not in MANY_FORWARDS or size == 16]
        return {"plain forward": forward} | {name: explain(self.methods[name]) for name in names}

    def _timed(self, call: Call) -> tuple[float, float | None]:
        """Median seconds of a call after two others, and the peak of its memory in MiB."""
        for _ in range(2):
            call()
        synchronize(self.device)
        before = 0
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        times = []
        for _ in range(2 if self.tiny else 7):
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        peak = round((torch.cuda.max_memory_allocated(self.device) - before) / 2**20, 1) if self.is_cuda else None
        return median(times), peak

    def leaks(self) -> None:
        """Bytes that the GPU still holds after three calls of each method."""
        if not self.is_cuda:
            return
        clip = self.model("ViT-B-32", self.device)
        arguments, table = self.pairs(clip, 16), self.result.setdefault("leaks", {})

        def held(method: AttributionMethod) -> int:
            method.attribute(clip, *arguments)
            gc.collect()
            before = torch.cuda.memory_allocated(self.device)
            for _ in range(3):
                method.attribute(clip, *arguments)
            gc.collect()
            return torch.cuda.memory_allocated(self.device) - before

        for name, method in self.methods.items():
            table[name] = self.guard(f"leaks {name}", lambda method=method: held(method))

    def fit(self) -> None:
        """Steps of training with callbacks in each precision, and one prediction with the writers."""
        self.result["fit"] = []
        with tempfile.TemporaryDirectory() as folder:
            for precision in ("32-true", "bf16-mixed", "bf16-true", *(["16-mixed"] if self.is_cuda else [])):
                row = self.guard(f"fit {precision}", lambda precision=precision: self._fit(Path(folder), precision))
                self.result["fit"].append(row)
                self.save()

    def _fit(self, folder: Path, precision: str) -> dict[str, Any]:
        few: dict[str, Any] = {"num_train": 300, "num_val": 48, "num_test": 32, "batch_size": 32, "num_workers": 4}
        if self.tiny:
            few = {"num_train": 8, "num_val": 4, "num_test": 4, "stored_size": 64, "batch_size": 4, "num_workers": 0}
        data = PhantomDataModule(root=str(folder / "images"), **few)
        torch.manual_seed(0)
        name = json.dumps({"model_cfg": TINY}) if self.tiny else "ViT-B-32"
        module, steps = ClipModule(name, lr=1e-5, warmup_steps=1), Steps()
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        where = {"accelerator": self.device.type, "devices": [self.device.index or 0] if self.is_cuda else 1}
        where |= {"default_root_dir": folder}
        callbacks = [steps, AttributionMetrics(sensitivity=True, num_batches=1), AttributionMaps(num_pairs=1)]
        run = Trainer(
            max_steps=2 if self.tiny else 50,
            precision=precision,  # type: ignore[arg-type]
            enable_checkpointing=False,
            callbacks=callbacks,
            # Without a logger, AttributionMaps draws nothing.
            logger=TensorBoardLogger(folder),
            **where,
            **quiet,
        )
        start = time.perf_counter()
        run.fit(module, data)
        row = {"precision": precision, "seconds": round(time.perf_counter() - start, 1), "steps": run.global_step}
        row["step_ms"] = round(1e3 * median(steps.times), 1)
        row["memory_mib"] = steps.memory[:1] + steps.memory[-1:]
        row["scores"] = {key: round(float(value), 4) for key, value in run.callback_metrics.items()}
        if precision == "32-true":
            writers = [MapWriter(root=str(folder / "maps")), PredictionWriter(str(folder / "predictions.csv"))]
            Trainer(callbacks=writers, logger=False, **where, **quiet).predict(module, data, return_predictions=False)
            row["predicted"] = len((folder / "predictions.csv").read_text(encoding="utf-8").splitlines()) - 1
        return row


class Steps(Callback):
    """Seconds and allocated memory of each training step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.memory: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:  # noqa: D102
        synchronize(trainer.strategy.root_device)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:  # noqa: D102
        device = trainer.strategy.root_device
        synchronize(device)
        self.times.append(time.perf_counter() - self.start)
        if device.type == "cuda":
            self.memory.append(round(torch.cuda.memory_allocated(device) / 2**20, 1))


def agreement(one: Attribution, other: Attribution) -> dict[str, float]:
    """Smallest rank correlation of the image rasters, and greatest differences."""
    pairs = {name: [getattr(maps, name).float().cpu() for maps in (one, other)] for name in ("grid", "text", "score")}
    rho = spearman(*(grid.flatten(1) for grid in pairs["grid"]))
    found = {f"{name}_max": float((first - second).abs().max()) for name, (first, second) in pairs.items()}
    return {"image_rho": round(float(rho.nan_to_num(1).min()), 4)} | found


def main() -> None:
    """Run the stages, write the file and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="A tiny model, for a trial of this script.")
    parser.add_argument("--out", default="", help="JSON file of the results.")
    parser.add_argument("--stages", default="parity,throughput,fit,leaks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    # Otherwise the patch convolution of a float32 model rounds to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    check = Check(options.device, options.tiny, options.out)
    for stage in options.stages.split(","):
        check.guard(stage, getattr(check, stage))
    check.save()
    print(json.dumps(check.result))


if __name__ == "__main__":
    main()
