"""Picture of the documentation: the components of one phantom's map, and the effect of the settings.

python benchmarks/components.py --ckpt_path runs/phantom/checkpoints/last.ckpt --pair phantom-11004-1 \
        --out docs/pictures/components.png
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jsonargparse import auto_cli
from PIL import Image, ImageDraw
from torch import Tensor

from matex_pl.attribution import Matex
from matex_pl.data import PhantomDataModule
from matex_pl.maps import min_max, upsample
from matex_pl.training import load_module
from matex_pl.visualization.draw import (
    INK,
    Picture,
    blank_picture,
    overlay,
    paste,
    picture_grid,
    resize,
    save_png,
    write,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "lambda_s=1, no prior": {"lambda_s": 1.0},
    "prior_power=4": {"prior_power": 4.0},
    "fusion='sum', eq. 6": {"fusion": "sum"},
    "fuse_at='grid'": {"fuse_at": "grid"},
    "grad_layers=1": {"grad_layers": 1},
    "laterality='paper'": {"laterality": "paper"},
}


def main(ckpt_path: str, pair: str, out: str, side: int = 168) -> None:
    """Write the picture.

    Args:
        ckpt_path: Checkpoint of `matex fit --config phantom.yaml`.
        pair: Id of a test pair.
        out: Path of the PNG file.
        side: Side of each picture in pixels.
    """
    module = load_module(ckpt_path)
    data = PhantomDataModule(image_size=module.clip.image_size)
    data.setup("test")
    batch = data.dataset("test").batch([pair])
    images, tokens = module.inputs(batch)
    maps = Matex.recommended().attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"])
    size, parts = module.clip.image_size, maps.parts
    shown: dict[str, Tensor | None] = {
        "image": None,
        "G, gradients": min_max(upsample(parts["grad"], size)),
        "F, attention flow": min_max(upsample(parts["flow"], size)),
        "C, consistency": min_max(upsample(parts["consistency"], size)),
        "M, prior of the phrase": min_max(parts["prior"]),
        "MATEX": maps.image,
    }
    shown |= {name: Matex.fuse(parts, **changes).image for name, changes in SETTINGS.items()}
    image = resize(np.repeat(batch["image"][0, 0].numpy()[..., None], 3, 2), (side, side))
    pictures = {name: image if heat is None else over(image, heat[0]) for name, heat in shown.items()}
    print(save_png(out, picture_grid([captioned(name, picture) for name, picture in pictures.items()], columns=6)))
    print(batch["phrase"][0])


def over(image: Picture, heat: Tensor) -> Picture:
    """Map over the image, both at the image's size."""
    return overlay(image, resize(heat.numpy(), (image.shape[1], image.shape[0])).clip(0, 1))


def captioned(caption: str, picture: Picture) -> Picture:
    """Picture with a caption below it."""
    height, width = picture.shape[:2]
    canvas = blank_picture(height + 20, width)
    paste(canvas, picture, 0, 0)
    image = Image.fromarray(canvas)
    write(ImageDraw.Draw(image), (0, height + 17), caption, INK, 14, width)
    return np.array(image)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
