"""The README's picture: the panel of one phantom of the test split.

python benchmarks/panel.py --ckpt_path runs/phantom/checkpoints/last.ckpt --study phantom-11003-1 --out docs/panel.png
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli
from PIL import Image

from matex_pl.attribution import Matex
from matex_pl.data import PhantomDataModule
from matex_pl.explain import explain_batch, load_module


def main(ckpt_path: str, study: str, out: str, colours: int = 96) -> None:
    """Write the panel.

    Args:
        ckpt_path: A checkpoint of `matex fit --config phantom.yaml`.
        study: Id of a test study.
        out: The PNG to write.
        colours: Size of its palette, for a small file.
    """
    module = load_module(ckpt_path)
    data = PhantomDataModule(image_size=module.clip.image_size)
    data.setup("test")
    picture = explain_batch(module, Matex.measured(), data.dataset("test").batch([study]), "MATEX")[0]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).quantize(colours).save(out, optimize=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
