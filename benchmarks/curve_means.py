"""Insertion and deletion as ratios of sums over pairs, the form of this package, and as means of ratios.

    matex benchmark --config phantom.yaml --ckpt_path runs/phantom/checkpoints/last.ckpt --out results
    python benchmarks/curve_means.py results

Prints a Markdown table with a row per curve. The intervals hold 95 % of 1,000 draws of pairs with replacement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from matex_pl.benchmark.evaluate import tensors_below
from matex_pl.evaluation.tensors import read_tensors

CURVES = ("insertion/", "deletion/")
HEADER = (
    "| Curve | Span at most 0 | Smallest positive span / mean span | Ratio of sums | Its widest interval "
    "| Mean of ratios | Its widest interval |\n|---|---:|---:|---|---:|---|---:|"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="Output folder of `matex benchmark`.")
    files = sorted(parser.parse_args().folder.glob("values/*.safetensors"))
    if not files:
        raise SystemExit("The folder has no values/*.safetensors. Give the folder that `matex benchmark --out` wrote.")
    found = [tensors_below(read_tensors(path)[0], "image/sums") for path in files]
    # Scores by a published protocol have files of their own, without curves.
    rows = [
        curves for row in found if (curves := {name: sums for name, sums in row.items() if name.startswith(CURVES)})
    ]
    print(HEADER)
    for curve in sorted(rows[0]):
        print(line(curve, torch.stack([row[curve] for row in rows])))


def line(curve: str, sums: Tensor) -> str:
    """Row of a curve.

    Args:
        curve: Name of the curve.
        sums: `(M, 2, n)`, gain and span of n pairs for M methods.
    """
    gain, span = sums.unbind(1)
    count = gain.shape[1]
    drawn = torch.multinomial(torch.ones(1000, count), count, replacement=True, generator=torch.manual_seed(0))
    positive = span[0][span[0] > 0]
    cells = [
        curve.replace("/", ", ").replace("_", " "),
        f"{int((span[0] <= 0).sum())} of {count}",
        f"{float(positive.min() / span[0].mean()):.3f}",
    ]
    for value, draws in (
        (gain.sum(1) / span.sum(1), gain[:, drawn].sum(2) / span[:, drawn].sum(2)),
        ((gain / span).mean(1), (gain / span)[:, drawn].mean(2)),
    ):
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), 1)
        cells += [f"{value.min():.2f} to {value.max():.2f}", f"{(high - low).max():.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
