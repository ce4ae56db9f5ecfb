"""The spatial prior M of eqs. (3) to (5): 1 outside of the named regions, up to `lambda_s` inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from matex_pl.anatomy.regions import Region
from matex_pl.arguments import check_choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PriorShape = Literal["parabola", "gaussian", "plateau"]
PriorFrame = Literal["image", "chest"]
Laterality = Literal["patient", "paper"]


def prior_map(
    regions: Iterable[Region],
    size: tuple[int, int],
    *,
    content_box: Tensor | Sequence[float] | None = None,
    **settings: Any,
) -> Tensor:
    """M of one phrase, shape `(H, W)`, in `[1, lambda_s]`; settings as in `prior_maps`, with a `content_box` `(4,)`."""
    import torch

    content_boxes = None if content_box is None else torch.as_tensor(content_box)[None]
    return prior_maps([regions], size, content_box=content_boxes, **settings)[0]


def prior_maps(
    regions: Sequence[Iterable[Region]],
    size: tuple[int, int],
    *,
    lambda_s: float = 2.5,
    shape: PriorShape = "parabola",
    laterality: Laterality = "patient",
    content_box: Tensor | None = None,
    checked: bool = False,
    ids: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """M of B phrases, eqs. (3) to (5), shape `(B, H, W)`, in `[1, lambda_s]`; exactly 1 for a phrase without regions.

    The minimum and the maximum of eq. (5) are taken over the whole frame. Equal boxes count once.

    Args:
        regions: Regions that each of the B phrases names.
        size: Height and width of the frame of the map.
        lambda_s: Strength of the prior, at least 1.
        shape: Falloff of M inside a box. `parabola`: eqs. (3) and (4) as printed. `gaussian`: the box edge is at two
            sigma, without clamping or cutting. `plateau`: 1 on the inner half of each axis, linear to 0 at the border.
        laterality: `patient` puts the patient's right on the left of the image; `paper` mirrors the map, as the paper
            prints it.
        content_box: `(B, 4)` rectangles `x0, y0, x1, y1` of the images in the frame, in [0, 1], x to the right, y down;
            they may reach outside. The whole frame by default.
        checked: Whether the boxes are known to have a size, which a check reads from their device.
        ids: Ids of the pairs, for error messages.
        device: Device of the computation; by default the device of `content_box`.
        dtype: Type of the result, float32 by default; the arithmetic is float32 or better.

    Raises:
        ValueError: An argument is out of range, or an image has no size.
    """
    import torch

    from matex_pl.maps import moved

    _check(size, lambda_s, shape, laterality)
    if content_box is not None:
        if not checked:
            check_content_boxes(content_box, len(regions), ids)
        device = device or content_box.device
    dtype = dtype or torch.float32
    work = torch.promote_types(dtype, torch.float32)
    content_box = whole_frame(device).expand(len(regions), 4) if content_box is None else content_box
    boxes, counted = _padded_boxes(regions)
    return _prior(
        moved(torch.tensor(boxes, dtype=work), device),
        moved(torch.tensor(counted), device),
        content_box.to(device=device, dtype=work),
        [torch.arange(pixels, device=device, dtype=work) for pixels in size],
        lambda_s,
        shape,
        laterality,
        torch,
    ).to(dtype)


def prior_array(
    regions: Iterable[Region],
    size: tuple[int, int],
    *,
    lambda_s: float = 2.5,
    shape: PriorShape = "parabola",
    laterality: Laterality = "patient",
) -> NDArray[np.float32]:
    """M of one phrase over the whole frame, shape `(H, W)`: `prior_map` in NumPy, for commands without torch.

    Raises:
        ValueError: An argument is out of range.
    """
    _check(size, lambda_s, shape, laterality)
    boxes, counted = _padded_boxes([regions])
    content_box = np.array([[0, 0, 1, 1]], np.float32)
    pixels = [np.arange(side, dtype=np.float32) for side in size]
    return _prior(boxes.astype(np.float32), counted, content_box, pixels, lambda_s, shape, laterality, np)[0]


def _check(size: tuple[int, int], lambda_s: float, shape: str, laterality: str) -> None:
    check_choice("shape", shape, get_args(PriorShape))
    check_choice("laterality", laterality, get_args(Laterality))
    if min(size) < 1:
        raise ValueError(f"size must be (H, W) of at least one pixel, got {size}.")
    if not lambda_s >= 1:
        raise ValueError(f"lambda_s must be at least 1 (1 switches the prior off), got {lambda_s}.")


def frame_boxes(frame: PriorFrame, content_box: Tensor | None, chest_box: Tensor | None) -> Tensor | None:
    """Rectangles `(B, 4)` of eqs. (3) and (4) in the input frame, for `prior_maps`; None for the whole frame.

    Args:
        frame: `image`: as printed, the rectangle of the image. `chest`: the rectangle around the lungs of the image,
            and that of the image where there is none.
        content_box: `(B, 4)` rectangles of the images; the whole frame by default.
        chest_box: `(B, 4)` rectangles around the lungs, see `chest_boxes`; NaN for images without them.
    """
    if frame == "image" or chest_box is None:
        return content_box
    image = whole_frame(chest_box.device).to(chest_box.dtype) if content_box is None else content_box
    return chest_box.where(~chest_box.isnan().any(1, keepdim=True), image)


def whole_frame(device: torch.device | str | None) -> Tensor:
    """The rectangle `(4,)` 0, 0, 1, 1 of the whole frame, made on the device."""
    import torch

    return (torch.arange(4, device=device) > 1).float()


def have_size(boxes: Tensor) -> Tensor:
    """Mask `(B,)` of the boxes `(B, 4)` that are finite, with x0 < x1 and y0 < y1."""
    return ((boxes[:, :2] < boxes[:, 2:]) & boxes.isfinite().all(1, keepdim=True)).all(1)


def check_content_boxes(
    content_box: Tensor, count: int, ids: Sequence[str] | None = None, name: str = "content_box"
) -> None:
    """Raise ValueError unless the boxes are `(count, 4)`, finite, with x0 < x1 and y0 < y1; `ids` name the pairs."""
    if tuple(content_box.shape) != (count, 4):
        raise ValueError(f"{name} must be ({count}, 4), one x0, y0, x1, y1 per phrase, got {tuple(content_box.shape)}.")
    bad = ~have_size(content_box)
    if bad.any():
        at = int(bad.nonzero()[0])
        pair = f"pair {ids[at]!r}" if ids is not None else f"phrase {at} of the batch"
        raise ValueError(
            f"The {name} of {pair} has no size: {content_box[at].tolist()}. Give x0 < x1 and y0 < y1 as fractions "
            "of the frame."
        )


def _padded_boxes(regions: Sequence[Iterable[Region]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes `(B, R, 4)`, sorted and each once, padded to R, and the mask `(B, R)` without the padding."""
    boxes = [sorted({region.box for region in named}) for named in regions]
    longest = max([1, *map(len, boxes)])
    padded = [row + [(0.0, 0.0, 1.0, 1.0)] * (longest - len(row)) for row in boxes]
    counted = [[k < len(row) for k in range(longest)] for row in boxes]
    return np.array(padded, float).reshape(-1, longest, 4), np.array(counted, bool).reshape(-1, longest)


# The functions below take tensors or NumPy arrays; `xp` is the library, torch or numpy.


def _prior(
    boxes: Any,
    counted: Any,
    content_box: Any,
    pixels: Sequence[Any],
    lambda_s: float,
    shape: str,
    laterality: str,
    xp: ModuleType,
) -> Any:
    """M `(B, H, W)` from boxes `(B, R, 4)`, their mask `(B, R)`, content boxes `(B, 4)`, and pixel indices."""
    y = _on_content(pixels[0], content_box[:, 1], content_box[:, 3])
    x = _on_content(pixels[1], content_box[:, 0], content_box[:, 2])
    if laterality == "paper":
        x = 1 - x
    across = _profile(_within(x, boxes[..., 0], boxes[..., 2]), shape, xp)
    down = _profile(_within(y, boxes[..., 1], boxes[..., 3]), shape, xp)
    inside = (content_box[:, 0] < 1) & (content_box[:, 2] > 0) & (content_box[:, 1] < 1) & (content_box[:, 3] > 0)
    total = xp.einsum("brh,brw->bhw", down * (counted & inside[:, None])[..., None], across)
    low, high = xp.amin(total, (1, 2))[:, None, None], xp.amax(total, (1, 2))[:, None, None]
    # As in `maps.min_max`: 0 if a map is constant up to rounding.
    return 1 + (lambda_s - 1) * ((total - low) / xp.where(high - low > 1e-6 * high, high - low, xp.inf))


def _on_content(pixels: Any, low: Any, high: Any) -> Any:
    """Pixel centers in coordinates of the image, `(B, pixels)`: 0 at its edge `low`, 1 at `high`."""
    centers = (pixels + 0.5) / len(pixels)
    return (centers - low[:, None]) / (high - low)[:, None]


def _within(position: Any, low: Any, high: Any) -> Any:
    """Positions `(B, P)` in coordinates of each box `(B, R)`: `(B, R, P)`, 0 at its edge `low`, 1 at `high`."""
    return (position[:, None] - low[..., None]) / (high - low)[..., None]


def _profile(u: Any, shape: str, xp: ModuleType) -> Any:
    """Weight along one axis of a box, from coordinates that run from 0 to 1 over it."""
    if shape == "gaussian":
        return xp.exp(-0.5 * ((u - 0.5) / 0.25) ** 2)
    u = u.clip(0, 1)
    return u * (1 - u) if shape == "parabola" else (4 * xp.minimum(u, 1 - u)).clip(0, 1)
