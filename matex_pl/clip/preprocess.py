"""Mean, deviation and size of images, as preprocessing of several libraries states them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from typing import Any


def normalization(
    model: Mapping[str, Any],
    preprocess: Sequence[Any],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Preprocessing of a model's images in the form of open_clip's config: `mean`, `std`, `size` and, if known, more.

    Args:
        model: Preprocessing that the model states itself; it counts if nothing else is given.
        preprocess: Transforms of torchvision and image processors of transformers; None among them is skipped.
        mean: Mean per channel, or of all channels.
        std: Deviation per channel, or of all channels.
        size: Height and width of the model's input.

    Raises:
        ValueError: Mean or deviation is missing, two sources contradict each other, or the size is not the model's.
    """
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    sources = [(type(part).__name__, stated(part)) for part in preprocess if part is not None]
    result: dict[str, Any] = {}
    fit: dict[str, Any] = {name: value for name, value in model.items() if name not in ("mean", "std")}
    for source, values in [("the arguments", given), *sources]:
        for name, value in values.items():
            if name == "size" and value != size:
                raise ValueError(
                    f"{source} makes images of {value} pixels, the model takes {size}. Give the preprocessing of this "
                    "model."
                )
            if name in ("size", "resize_mode"):
                fit[name] = value
                continue
            channels = _channels(name, value)
            known = result.setdefault(name, (channels, source))
            if not all(isclose(*pair, abs_tol=1e-6) for pair in zip(known[0], channels, strict=True)):
                raise ValueError(
                    f"The {name} is {known[0]} in {known[1]} and {channels} in {source}. Give once the {name} of the "
                    "model's training."
                )
    found = {name: _channels(name, value) for name, value in model.items() if name in ("mean", "std")}
    found |= {name: channels for name, (channels, _) in result.items()}
    missing = [name for name in ("mean", "std") if name not in found]
    if missing:
        raise ValueError(
            f"The {' and '.join(missing)} of the images is missing. Give `preprocess`, the model's transform or image "
            "processor, or `mean` and `std`."
        )
    if min(found["std"]) <= 0:
        raise ValueError(f"std must be positive, got {found['std']}.")
    return fit | found | {"size": list(size)}


def stated(preprocess: Any) -> dict[str, Any]:
    """The `mean`, `std`, `size` and `resize_mode` that a transform or an image processor states.

    Raises:
        ValueError: It is neither, or does not scale images to [0, 1] first.
    """
    if hasattr(preprocess, "image_mean"):
        return _of_processor(preprocess)
    steps = list(_steps(preprocess))
    found: dict[str, Any] = {}
    for step in steps:
        if hasattr(step, "mean") and hasattr(step, "std"):
            found |= {"mean": step.mean, "std": step.std}
        # A single number is the shortest side, and fixes no frame before a crop.
        size = getattr(step, "size", None)
        if isinstance(size, int) and "Crop" in type(step).__name__:
            size = (size, size)
        if isinstance(size, (list, tuple)) and len(size) == 2:
            found |= {"size": (int(size[0]), int(size[1])), "resize_mode": "shortest"}
            if type(step).__name__ == "Resize":
                found["resize_mode"] = "squash"
            elif "Pad" in type(step).__name__:
                found["resize_mode"] = "longest"
    if "mean" not in found:
        raise ValueError(
            f"preprocess is {type(preprocess).__name__} without a Normalize. Give a Compose of torchvision with "
            "Normalize, an image processor of transformers, or `mean` and `std`."
        )
    return found


def _of_processor(processor: Any) -> dict[str, Any]:
    factor = getattr(processor, "rescale_factor", None)
    if not getattr(processor, "do_rescale", True) or (factor is not None and not isclose(factor, 1 / 255)):
        raise ValueError(
            f"{type(processor).__name__} does not scale images by 1/255 (do_rescale, rescale_factor {factor}). Give "
            "`mean` and `std` of images in [0, 1]."
        )
    found: dict[str, Any] = {"mean": 0.0, "std": 1.0}
    if getattr(processor, "do_normalize", True):
        found = {"mean": processor.image_mean, "std": processor.image_std}
    is_cropped = getattr(processor, "do_center_crop", False)
    size = processor.crop_size if is_cropped else getattr(processor, "size", None)
    # A dict, or a class like one; without both sides it fixes no frame.
    sides = [size, size] if isinstance(size, int) else [_side(size, name) for name in ("height", "width")]
    if all(sides):
        found |= {"size": (sides[0], sides[1]), "resize_mode": "shortest" if is_cropped else "squash"}
    return found


def _side(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _steps(preprocess: Any) -> Iterator[Any]:
    """Steps of a transform, with those of nested ones."""
    parts = getattr(preprocess, "transforms", None)
    if parts is None:
        yield preprocess
        return
    for part in parts:
        yield from _steps(part)


def _channels(name: str, value: Any) -> list[float]:
    channels = [float(value)] * 3 if isinstance(value, (int, float)) else [float(part) for part in value]
    if len(channels) == 1:
        channels = channels * 3
    if len(channels) != 3:
        raise ValueError(f"{name} must be one number or three, got {value}.")
    return channels
