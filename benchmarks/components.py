"""The pictures of the documentation page on MATEX: one per equation, and one of the settings, on one phantom pair.

python benchmarks/components.py --ckpt_path runs/phantom/checkpoints/last.ckpt --pair phantom-11004-1 \
        --out docs/pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image, ImageDraw
from torch import Tensor

from matex_pl.attribution import Matex
from matex_pl.data import PhantomDataModule
from matex_pl.maps import Attribution, min_max, upsample
from matex_pl.training import load_module
from matex_pl.visualization.draw import (
    INK,
    Page,
    Picture,
    blank_picture,
    draw_boxes,
    overlay,
    paste,
    picture_grid,
    resize,
    save_png,
    write,
)
from matex_pl.visualization.words import phrase_lines, phrase_pieces, write_phrase

SETTINGS: dict[str, dict[str, Any]] = {
    "lambda_s=1": {"lambda_s": 1.0},
    "prior_power=4": {"prior_power": 4.0},
    "fusion='sum'": {"fusion": "sum"},
    "fuse_at='grid'": {"fuse_at": "grid"},
    "grad_layers=1": {"grad_layers": 1},
    "laterality='paper'": {"laterality": "paper"},
}
# Narrow grids stay readable on a phone.
COLUMNS, COLUMNS_OF_ALL = 2, 3
TYPE = 22
WORDS = Page(640, 1.2)

Cells = dict[str, Picture]


def main(ckpt_path: str, pair: str, out: str, side: int = 224) -> None:
    """Write `components.png` and a `matex_<part>.png` per equation, and print the phrase and the range of C.

    Args:
        ckpt_path: Checkpoint of `matex fit --config phantom.yaml`.
        pair: Id of a test pair.
        out: The folder to write to.
        side: Width and height of each cell in pixels.
    """
    if Path(out).suffix:
        raise ValueError(f"out must be a folder, got {out!r}. The names of the pictures are fixed.")
    module = load_module(ckpt_path)
    data = PhantomDataModule(image_size=module.clip.image_size)
    data.setup("test")
    batch = data.dataset("test").batch([pair])
    images, tokens = module.inputs(batch)
    maps = Matex.recommended().attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"])
    image = resize(np.repeat(batch["image"][0, 0].numpy()[..., None], 3, 2), (side, side))
    boxed = image.copy()
    draw_boxes(boxed, batch["boxes"][0].numpy(), 3)
    grids = {
        "components": components(image, maps),
        "matex_gradients": {"image and box": boxed} | gradients(image, maps.parts),
        "matex_flow": flow(image, maps.parts),
        "matex_consistency": stability(image, maps.parts),
        "matex_prior": prior(image, maps.parts),
        "matex_terms": terms(image, maps.parts),
        "matex_fusion": fusion(image, maps.parts),
    }
    for name, cells in grids.items():
        pictures = [captioned(caption, picture) for caption, picture in cells.items()]
        columns = COLUMNS_OF_ALL if name == "components" else COLUMNS
        print(save_png(Path(out) / f"{name}.png", picture_grid(pictures, columns=columns)))
    print(save_png(Path(out) / "matex_words.png", words(maps)))
    print(batch["phrase"][0])
    for kappa in (1.0, "tokens"):
        stable = Matex.fuse(maps.parts, kappa=kappa).parts["consistency"]
        print(f"C with kappa={kappa}: {stable.min():.2f} to {stable.max():.2f}, mean {stable.mean():.2f}")


def components(image: Picture, maps: Attribution) -> Cells:
    """The image, the four components, the map, and the map under other settings."""
    parts, size = maps.parts, maps.parts["size"]
    shown = {
        "G, gradients": min_max(upsample(parts["grad"], size)),
        "F, flow": min_max(upsample(parts["flow"], size)),
        "C, consistency": min_max(upsample(parts["consistency"], size)),
        "M, prior": min_max(parts["prior"]),
        "MATEX": maps.image,
    }
    shown |= {name: Matex.fuse(parts, **changes).image for name, changes in SETTINGS.items()}
    return {"image": image} | {name: over(image, heat[0]) for name, heat in shown.items()}


def gradients(image: Picture, parts: dict[str, Any]) -> Cells:
    """The clipped gradient term of each block, and their mean G; each on its own scale."""
    terms, depth = parts["grad_blocks"][0].relu(), parts["attention_layers"].shape[1]
    names = [f"block {depth - len(terms) + place + 1}" for place in range(len(terms))]
    cells = {name: over_patches(image, term) for name, term in zip(names, terms, strict=True)}
    return cells | {"G, their mean": over_patches(image, parts["grad"][0])}


def flow(image: Picture, parts: dict[str, Any]) -> Cells:
    """The attention row of each layer, and their weighted sum F; each on its own scale."""
    layers = parts["attention_layers"][0]
    cells = {f"layer {place + 1}": over_patches(image, layer) for place, layer in enumerate(layers)}
    return cells | {"F, weighted": over_patches(image, parts["flow"][0])}


def stability(image: Picture, parts: dict[str, Any]) -> Cells:
    """The deviation over layers and C times G, each on its own scale, and C for two values of kappa from 0 to 1."""
    layers = parts["attention_layers"][0]
    printed, relative = (Matex.fuse(parts, kappa=kappa).parts["consistency"][0] for kappa in (1.0, "tokens"))
    return {
        "deviation": over_patches(image, layers.std(0, correction=0)),
        "C, kappa=1": over(image, enlarged(printed, image)),
        "C, kappa='tokens'": over(image, enlarged(relative, image)),
        "C times G": over_patches(image, relative * parts["grad"][0]),
    }


def prior(image: Picture, parts: dict[str, Any]) -> Cells:
    """The regions that the phrase names, and M in its three shapes, 1 dark and lambda_s bright."""
    named = image.copy()
    draw_boxes(named, np.array([region.box for region in sorted(parts["regions"][0])]), 3)
    shapes = ("parabola", "gaussian", "plateau")
    drawn = {shape: Matex.fuse(parts, prior_shape=shape).parts["prior"] for shape in shapes}
    return {"region": named} | {shape: over(image, min_max(heat)[0]) for shape, heat in drawn.items()}


def terms(image: Picture, parts: dict[str, Any]) -> Cells:
    """The four terms of eq. 6 on one scale; its end is the highest of them."""
    settings, size = parts["settings"], parts["size"]
    grad, attention = min_max(parts["grad"]), min_max(parts["flow"])
    grad, attention, stable = upsample(torch.stack([grad, attention, parts["consistency"]], 1), size)[0]
    shown = {
        "alpha G": settings["alpha"] * grad,
        "beta F": settings["beta"] * attention,
        "gamma C G": settings["lambda_c"] * stable * grad,
        "delta M G": settings["delta"] * parts["prior"][0] * grad,
    }
    highest = max(float(term.max()) for term in shown.values())
    return {name: over(image, term / highest) for name, term in shown.items()}


def fusion(image: Picture, parts: dict[str, Any]) -> Cells:
    """The map without its prior, which both fusions share, and under ever more of the prior."""
    variants: dict[str, dict[str, Any]] = {
        "delta=0": {"delta": 0.0},
        "sum, eq. 6": {"fusion": "sum"},
        "product": {"fusion": "product"},
        "prior_power=4": {"fusion": "product", "prior_power": 4.0},
    }
    return {name: over(image, Matex.fuse(parts, **changes).image[0]) for name, changes in variants.items()}


def words(maps: Attribution) -> Picture:
    """The phrase four times, shaded by the components of the text side and by the finished map."""
    parts, content, phrase = maps.parts, maps.content, maps.phrases[0]
    shown = {
        "gradients": min_max(parts["text_grad"], keep=content),
        "flow": min_max(parts["text_flow"], keep=content),
        "consistency": parts["text_consistency"],
        "map of the words": maps.text,
    }
    rows = []
    for caption, values in shown.items():
        shaded = phrase_pieces(phrase.phrase, phrase.words(values[0].tolist()))
        lines = phrase_lines(WORDS, shaded, WORDS.width, 3)
        row = Image.fromarray(blank_picture(TYPE + 16 + len(lines) * WORDS.line_height, WORDS.width))
        draw = ImageDraw.Draw(row)
        write(draw, (WORDS.px(3), TYPE), caption, INK, TYPE, WORDS.width)
        write_phrase(draw, WORDS, lines, (0, TYPE + 12))
        rows.append(np.array(row))
    return picture_grid(rows, columns=1)


def over(image: Picture, heat: Tensor) -> Picture:
    """Map over the image, both at the image's size."""
    return overlay(image, resize(heat.numpy(), (image.shape[1], image.shape[0])).clip(0, 1))


def over_patches(image: Picture, values: Tensor) -> Picture:
    """Values of patches `(Gh, Gw)` over the image, from their least to their greatest."""
    return over(image, min_max(enlarged(values, image)[None])[0])


def enlarged(values: Tensor, image: Picture) -> Tensor:
    """Values of patches `(Gh, Gw)` at the pixels of the picture."""
    return upsample(values[None], (image.shape[0], image.shape[1]))[0]


def captioned(caption: str, picture: Picture) -> Picture:
    """Picture with a caption below it."""
    height, width = picture.shape[:2]
    canvas = blank_picture(height + TYPE + 10, width)
    paste(canvas, picture, 0, 0)
    image = Image.fromarray(canvas)
    write(ImageDraw.Draw(image), (0, height + TYPE + 2), caption, INK, TYPE, width)
    return np.array(image)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
