"""Speed of reading images: a full decode by Pillow, this package's reader and its cache, in one run.

    python benchmarks/decode.py

Prints a Markdown table of images per second of one core, and the ratio to Pillow's full decode with the following
resize. Without `--folder` it draws gray JPEGs of 2,500 x 3,000 pixels at quality 95, whose grain sets the file size:
the images of MIMIC-CXR-JPG have about 1.5 MB. The readers take turns on the same images, and the table has the median
over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from matex_pl.data.cache import ImageCache
from matex_pl.data.images import read_image
from matex_pl.data.phantom.image import draw_phantom
from matex_pl.data.transforms import ImageTransform

WIDTH, HEIGHT = 2500, 3000
GRAINS = (0.5, 1.5, 3.0)
BASE = "Pillow, full decode and resize"


def draw_images(folder: Path, number: int, grain: float) -> list[Path]:
    """Phantom images at the size of a detector, with grain of the given standard deviation, as JPEGs of quality 95."""
    folder.mkdir()
    paths = []
    for index in range(number):
        rng = np.random.default_rng(index)
        image = cv2.resize(draw_phantom(index).image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(np.float32)
        noise = cv2.GaussianBlur(rng.normal(size=image.shape).astype(np.float32), (0, 0), 0.8)
        image += noise * (grain / noise.std())
        paths.append(folder / f"{index}.jpg")
        cv2.imwrite(str(paths[-1]), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return paths


def ways(size: int, cache: ImageCache) -> dict[str, Callable[[Path], object]]:
    """Compared readers by name: functions from a path to pixels."""
    transform = ImageTransform((size, size))
    height, width = transform.fit((HEIGHT, WIDTH))

    def pillow(path: Path, mode: str, resize: bool) -> np.ndarray:
        with Image.open(path) as image:
            decoded = image.convert(mode)
            return np.asarray(decoded.resize((width, height), Image.Resampling.BICUBIC) if resize else decoded)

    return {
        BASE: lambda path: pillow(path, "L", True),
        "Pillow, full decode without the resize": lambda path: pillow(path, "L", False),
        "Pillow, full decode to RGB and resize": lambda path: pillow(path, "RGB", True),
        "read_image, full size": lambda path: read_image(path),
        "read_image, for the model": lambda path: read_image(path, transform.fit),
        "from the cache": lambda path: cache.read(path, transform.fit, transform.settings),
    }


def measure(paths: list[Path], size: int, rounds: int, cache: ImageCache) -> dict[str, float]:
    """Seconds per image of each reader: the median over rounds, without the first round."""
    taken: dict[str, list[float]] = {name: [] for name in ways(size, cache)}
    for _ in range(rounds + 1):
        for name, read in ways(size, cache).items():
            start = time.process_time()
            for path in paths:
                read(path)
            taken[name].append((time.process_time() - start) / len(paths))
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def main(folder: str | None = None, number: int = 8, rounds: int = 5, size: int = 224) -> None:
    """Print the table.

    Args:
        folder: Folder of JPEGs to read; drawn phantoms by default.
        number: Number of images to read in each round.
        rounds: Number of rounds; every reader reads all images in each round.
        size: Side of the model's square input.
    """
    with TemporaryDirectory() as made:
        if folder is not None:
            sets = [sorted(Path(folder).rglob("*.jpg"))[:number]]
        else:
            sets = [draw_images(Path(made) / str(grain), number, grain) for grain in GRAINS]
        columns = [measure(paths, size, rounds, ImageCache(Path(made) / "cache")) for paths in sets]
        megabytes = [sum(path.stat().st_size for path in paths) / len(paths) / 1e6 for paths in sets]
    print(f"| images per second of a core | {' | '.join(f'{length:.2f} MB' for length in megabytes)} |")
    print(f"|---|{'---|' * len(sets)}")
    for name in columns[0]:
        cells = [f"{1 / column[name]:.0f} ({column[BASE] / column[name]:.1f}x)" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
