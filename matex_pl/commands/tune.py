"""`matex tune`: search for MATEX's weights on a model."""

from __future__ import annotations

from collections.abc import Sequence

from matex_pl import attribution
from matex_pl.arguments import import_all
from matex_pl.commands.options import run_on_data
from matex_pl.tune import tune_matex


def main(words: Sequence[str]) -> None:
    """`matex tune --config FILE --ckpt_path FILE --out FOLDER`: search MATEX's weights on the validation split."""
    import_all(attribution)
    print(run_on_data("tune", tune_matex, words))
