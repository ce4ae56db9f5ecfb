"""Pictures, texts and scores for Lightning's loggers, without importing their packages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from lightning.fabric.loggers import TensorBoardLogger
from lightning.pytorch.loggers import CometLogger, MLFlowLogger
from numpy.typing import NDArray
from PIL import Image


def log_image(logger: Any, tag: str, image: NDArray[np.uint8], step: int) -> bool:
    """Log one picture to a logger; returns whether the logger accepts pictures.

    Supported are TensorBoard (the Trainer's and Fabric's), MLflow (an artifact `tag/000000120.png`), Comet, and every
    logger with Lightning's own `log_image(key, images, step)`, such as Weights & Biases. The loggers themselves write
    on rank 0 only.

    Args:
        logger: Logger of the Trainer.
        tag: Name of the picture; slashes group it.
        image: `(h, w, 3)` uint8 RGB.
        step: Step of the picture, usually `trainer.global_step`.

    Raises:
        ValueError: If the picture has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (h, w, 3) uint8, got {image.shape} {image.dtype}.")
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, image, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, artifact_file=f"{tag}/{step:09d}.png")
    elif isinstance(logger, CometLogger):
        # Comet converts arrays with matplotlib. Without matplotlib it logs an error and drops them.
        logger.experiment.log_image(Image.fromarray(image), name=tag, step=step)
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=tag, images=[image], step=step)
    else:
        return False
    return True


def log_images(loggers: Iterable[Any], tag: str, image: NDArray[np.uint8], step: int) -> int:
    """Log one picture to each logger, e.g. `trainer.loggers`; returns the number of loggers that accept it.

    The arguments are those of `log_image`.
    """
    return sum(log_image(logger, tag, image, step) for logger in loggers)


def log_text(logger: Any, tag: str, text: str, step: int) -> bool:
    """Log a Markdown text to a logger; returns whether the logger accepts texts. Arguments as in `log_image`.

    Supported are TensorBoard, MLflow (an artifact `tag.md`), Comet, and every logger with Lightning's own
    `log_text(key, columns, data, step)`, such as Weights & Biases.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, text, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, artifact_file=f"{tag}.md")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_text(text, step=step, metadata={"name": tag})
    elif callable(getattr(logger, "log_text", None)):
        logger.log_text(key=tag, columns=["text"], data=[[text]], step=step)
    else:
        return False
    return True


def log_session(logger: Any, name: str, params: dict[str, Any], metrics: dict[str, float]) -> bool:
    """Log hyper-parameters with scores to TensorBoard; returns whether the logger is one.

    They become a run `name` below the logger's own, because TensorBoard shows only the first hyper-parameters of a run.
    Those of the run itself are repeated in the new one, if the logger still has them. The columns of TensorBoard's page
    are those of the first run that has any. To include the scores, the Trainer's logger needs
    `default_hp_metric=False`.
    """
    if not isinstance(logger, TensorBoardLogger):
        return False
    session = TensorBoardLogger(logger.log_dir, name="", version=name, default_hp_metric=False)
    session.log_hyperparams({**getattr(logger, "hparams", {}), **params}, metrics)
    session.finalize("success")
    return True


def is_local(logger: Any) -> bool:
    """Whether a logger writes to local disks only: TensorBoard, unless its folder is an address."""
    return isinstance(logger, TensorBoardLogger) and "://" not in str(logger.root_dir)
