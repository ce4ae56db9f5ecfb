"""Pictures of the documentation: the panel of one test phantom, or the contact sheet of all methods on it.

python benchmarks/panel.py --ckpt_path runs/phantom/checkpoints/last.ckpt --pair phantom-11004-1 \
        --out docs/pictures/panel.png
python benchmarks/panel.py ... --method all --width 1440 --out docs/pictures/methods.png
"""

from __future__ import annotations

import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from matex_pl.attribution.shipped import load_method, shipped_methods
from matex_pl.data import PhantomDataModule
from matex_pl.explain import compare_methods, explain_batch
from matex_pl.training import load_module
from matex_pl.visualization.draw import save_png


def main(ckpt_path: str, pair: str, out: str, width: int = 704, method: str = "matex") -> None:
    """Write the picture.

    Args:
        ckpt_path: Checkpoint of `matex fit --config phantom.yaml`.
        pair: Id of a test pair.
        out: Path of the PNG file.
        width: Width of the picture in pixels; smaller than a panel, for a small file.
        method: Name of a shipped method, or `all` for a contact sheet.
    """
    module = load_module(ckpt_path)
    data = PhantomDataModule(image_size=module.clip.image_size)
    data.setup("test")
    batch = data.dataset("test").batch([pair])
    if method == "all":
        picture = compare_methods(module, shipped_methods(), batch)
    else:
        single = load_method(method)
        picture = explain_batch(module, single, batch, type(single).__name__)[0]
    height = round(picture.shape[0] * width / picture.shape[1])
    save_png(out, np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
