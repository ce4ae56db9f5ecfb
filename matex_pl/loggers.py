"""Pictures to Lightning's loggers: one adapter per kind, and none of their packages is imported here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from lightning.fabric.loggers import TensorBoardLogger
from lightning.pytorch.loggers import CometLogger, MLFlowLogger
from numpy.typing import NDArray
from PIL import Image


def log_image(logger: Any, tag: str, image: NDArray[np.uint8], step: int) -> bool:
    """Hand one picture to a logger; True if the logger takes pictures.

    Served are TensorBoard (the Trainer's and Fabric's), MLflow (an artifact `tag/000000120.png`), Comet, and every
    logger with Lightning's own `log_image(key, images, step)`, such as Weights & Biases. The loggers themselves see to
    it that only rank 0 writes.

    Args:
        logger: A logger of the Trainer.
        tag: Name of the picture; slashes group it.
        image: `(h, w, 3)` uint8 RGB.
        step: Usually `trainer.global_step`.

    Raises:
        ValueError: The picture has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (h, w, 3) uint8, got {image.shape} {image.dtype}.")
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, image, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, artifact_file=f"{tag}/{step:09d}.png")
    elif isinstance(logger, CometLogger):
        # Comet turns arrays into pictures by matplotlib and, without it, logs an error and drops them.
        logger.experiment.log_image(Image.fromarray(image), name=tag, step=step)
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=tag, images=[image], step=step)
    else:
        return False
    return True


def log_images(loggers: Iterable[Any], tag: str, image: NDArray[np.uint8], step: int) -> int:
    """Hand one picture to each logger, e.g. `trainer.loggers`; how many took it. Arguments as in `log_image`."""
    return sum(log_image(logger, tag, image, step) for logger in loggers)


def stays_here(logger: Any) -> bool:
    """Whether a logger keeps what it is given on this machine's disks: TensorBoard, unless its folder is an address."""
    return isinstance(logger, TensorBoardLogger) and "://" not in str(logger.root_dir)
