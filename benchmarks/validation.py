"""Time of a validation with the callbacks of `phantom.yaml`, compared with the same validation without callbacks.

    python benchmarks/validation.py --ckpt_path runs/phantom/checkpoints/last.ckpt --rounds 5

Prints a Markdown table of ratios: median, minimum and maximum over the rounds. The variants take turns, which spreads a
slow minute of the machine over all of them. The methods of `phantom.yaml` are logged by one callback, where settings of
MATEX share their forward, and by one callback per method.
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.console import progress, show_messages
from matex_pl.data import PhantomDataModule
from matex_pl.files import CONFIG_FOLDER, read_yaml
from matex_pl.training import load_module


def measure_validation(ckpt_path: str, rounds: int = 5, root: str = "data/phantom") -> str:
    """Measure validations of a phantom model on this machine; returns a Markdown table.

    Args:
        ckpt_path: Checkpoint of `matex fit --config phantom.yaml`.
        rounds: Number of validations of each variant, after one to warm up.
        root: Folder of the phantoms.
    """
    module = load_module(ckpt_path)
    data = PhantomDataModule(root, batch_size=64, augment=False)
    callbacks = read_yaml(CONFIG_FOLDER / "phantom.yaml")["trainer"]["callbacks"]
    (metrics,) = (part for part in callbacks if part["class_path"].endswith("AttributionMetrics"))
    methods = metrics["init_args"]["methods"]
    alone = [AttributionMetrics({"": methods[""], name: choice}) for name, choice in methods.items() if name]
    for metrics in alone:
        metrics.methods.pop("")
    variants: dict[str, list[Any]] = {
        "no callback": [],
        f"`AttributionMetrics` of {len(methods)} methods": [AttributionMetrics(methods)],
        "one `AttributionMetrics` per method": [AttributionMetrics(methods[""]), *alone],
        "`AttributionMaps` of 9 pairs": [AttributionMaps(num_pairs=9)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in progress(range(rounds + 1), "Rounds"):
            for name, chosen in variants.items():
                trainer = Trainer(
                    accelerator="cpu",
                    callbacks=chosen,
                    logger=TensorBoardLogger(folder),
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                start = time.perf_counter()
                trainer.validate(module, data, verbose=False)
                seconds[name].append(time.perf_counter() - start)
    lines = ["| validation with | time / without callbacks |", "|---|---|"]
    base = seconds["no callback"][1:]
    for name, times in seconds.items():
        ratios = [other / own for other, own in zip(times[1:], base, strict=True)]
        lines.append(f"| {name} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    show_messages()
    print(auto_cli(measure_validation, as_positional=False))
