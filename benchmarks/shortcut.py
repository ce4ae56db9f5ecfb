"""Maps of a model that reads a tag in the corner, compared with those of a model that reads the lung.

    matex fit --config phantom.yaml
    matex fit --config phantom_shortcut.yaml
    python benchmarks/shortcut.py --plain runs/phantom/checkpoints/last.ckpt \
        --tagged runs/phantom_shortcut/version_0/checkpoints/last.ckpt --out docs/pictures/shortcut.png

Prints a Markdown table over all test pairs of the finding whose image has the tag, and over the same images drawn
without it. Also writes a picture of the first pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from matex_pl.attribution import AttributionMethod, GradCam, Matex
from matex_pl.data import ImageTextBatch, ImageTextPair, PhantomDataModule, collate
from matex_pl.data.datamodule import PairDataset
from matex_pl.data.phantom.devices import draw_token
from matex_pl.data.transforms import ImageTransform
from matex_pl.metrics.functional import box_masks, outside_mass, pointing_game
from matex_pl.training import ClipModule, load_module
from matex_pl.visualization.draw import Picture, save_png
from matex_pl.visualization.sheet import Entry, contact_sheet

METHODS: dict[str, AttributionMethod] = {
    "MATEX, no prior": Matex.recommended(lambda_s=1.0),
    "MATEX": Matex.recommended(),
    "Grad-CAM": GradCam(),
}


def has_tag(image: NDArray[np.uint8]) -> bool:
    """Whether a phantom `(h, w)` has the tag."""
    drawn = np.array(image)
    draw_token(drawn)
    return bool((drawn == image).all())


def read(data: PhantomDataModule, pairs: list[ImageTextPair]) -> list[ImageTextBatch]:
    """Batches of 64 test pairs, with the images as the data module draws them."""
    images = PairDataset(data, pairs, data.dataset("test").transform)
    return list(DataLoader(images, batch_size=64, collate_fn=collate))


def tag_zone(data: PhantomDataModule, module: ClipModule) -> Tensor:
    """Mask of the tag with half a patch around it, `(H, W)` bool in the model's frame."""
    image = np.zeros((data.stored_size, data.stored_size), np.uint8)
    draw_token(image)
    rows, columns = np.nonzero(image)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    margin = 0.5 / torch.tensor(module.clip.grid).flip(0).repeat(2) * torch.tensor([-1, -1, 1, 1])
    boxes = ImageTransform(module.clip.image_size, data.resize_mode)(image, [box]).boxes
    return box_masks([boxes + margin], module.clip.image_size)[0]


def measure(
    module: ClipModule, method: AttributionMethod, batches: list[ImageTextBatch], thorax: Tensor, tag: Tensor
) -> list[float]:
    """Share of the mass outside the thorax, share of maxima on the tag, and pointing game."""
    values = []
    for batch in batches:
        images, tokens = module.inputs(batch)
        maps = method.attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"]).image
        peak = pointing_game(maps, tag.expand_as(maps))
        hit = pointing_game(maps, box_masks(batch["boxes"], module.clip.image_size))
        values.append(torch.stack([outside_mass(maps, thorax[None]), peak, hit]))
    return torch.cat(values, 1).nanmean(1).tolist()


@torch.no_grad()
def says(module: ClipModule, batches: list[ImageTextBatch], findings: Sequence[str], finding: str) -> float:
    """Share of images whose best prompt is that of this finding."""
    text = module.clip.encode_text(module.clip.tokenize([f"There is {name}." for name in findings]))
    best = [(module.clip.encode_image(module.inputs(batch)[0]) @ text.T).argmax(1) for batch in batches]
    return float((torch.cat(best) == findings.index(finding)).float().mean())


def table(models: dict[str, ClipModule], images: dict[str, list[ImageTextBatch]], data: PhantomDataModule) -> str:
    """Markdown table with a row per model, images and method."""
    head = ["trained", "test images", f"called {data.shortcut_finding}"]
    head += ["method", "mass outside the thorax", "maxima on the tag", "pointing game"]
    rows = [head, ["---"] * len(head)]
    for (trained, module), (shown, batches) in product(models.items(), images.items()):
        called = says(module, batches, data.findings, data.shortcut_finding)
        for name, method in METHODS.items():
            values = measure(module, method, batches, data.thorax(), tag_zone(data, module))
            rows.append([trained, shown, f"{called:.2f}", name, *(f"{value:.2f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sheet(module: ClipModule, batch: ImageTextBatch, subtitle: str) -> Picture:
    """All methods on a batch of one pair, in one row."""
    images, tokens = module.inputs(batch)
    found = [
        method.attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"])
        for method in METHODS.values()
    ]
    return contact_sheet(
        image=np.ascontiguousarray(batch["image"][0, 0].numpy()),
        boxes=batch["boxes"][0].numpy(),
        phrase=batch["phrase"][0],
        entries=[
            Entry(name, maps.image[0].numpy(), maps.words[0] if method.supports_text else None)
            for (name, method), maps in zip(METHODS.items(), found, strict=True)
        ],
        score=float(found[0].score[0]),
        title=f"{batch['finding'][0]} | {batch['id'][0]}",
        subtitle=subtitle,
        columns=len(found) + 1,
    )


def main(
    tagged: str,
    plain: str,
    out: str,
    root: str = "data/phantom",
    shortcut: float = 0.9,
    finding: str = "nodule",
    width: int = 1280,
) -> None:
    """Print the table and write the picture.

    Args:
        tagged: Checkpoint of a model that was trained with the tag.
        plain: Checkpoint of a model that was trained without the tag.
        out: Path of the PNG file.
        root: Folder of the image cache.
        shortcut: Share of images with the tag among those with the finding, as in training.
        finding: Finding that the tag reveals, as in training.
        width: Width of the picture in pixels.
    """
    models = {"without the tag": load_module(plain), "with the tag": load_module(tagged)}
    size = models["with the tag"].clip.image_size
    with_tag = PhantomDataModule(root, shortcut=shortcut, shortcut_finding=finding, image_size=size)
    without = PhantomDataModule(root, image_size=size)
    for data in (with_tag, without):
        data.setup("test")
    pairs = [s for s in with_tag.pairs["test"] if s.finding == finding and has_tag(with_tag.read_image(s))]
    images = {"with the tag": read(with_tag, pairs), "without it": read(without, pairs)}
    print(f"{len(pairs)} pairs")
    print(table(models, images, with_tag))
    first = read(with_tag, pairs[:1])[0]
    picture = np.concatenate([sheet(module, first, f"trained {trained}") for trained, module in models.items()])
    height = round(picture.shape[0] * width / picture.shape[1])
    save_png(out, np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
