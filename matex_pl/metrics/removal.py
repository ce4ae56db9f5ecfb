"""Scores of images and phrases with parts removed; the functions run the model and restore its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from matex_pl.arguments import check_choice, check_positive
from matex_pl.attribution.core.capture import borrowed
from matex_pl.attribution.core.fill import drop_tokens, fill_images
from matex_pl.clip.model import Clip
from matex_pl.maps import full_precision
from matex_pl.metrics.functional import (
    confidence_drop,
    confidence_increase,
    keep_highlighted,
    not_above_median,
    top_share,
)

KINDS = ("insertion", "deletion")
KEPT, REMOVED = 0.5, 0.2
RULES = ("map", "half", "rest")
CONFIDENCE: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "confidence_drop": ("map", confidence_drop),
    "confidence_increase": ("map", confidence_increase),
    "confidence_drop@50": ("half", confidence_drop),
    "confidence_increase@50": ("half", confidence_increase),
    "top20_removal": ("rest", confidence_drop),
}
"""By metric: the removal rule, and the function of the scores before and after."""


def kept_pixels(maps: Tensor, rule: str) -> Tensor:
    """Kept share of each pixel under a rule, `(B, H, W)`, as input of `image_score`.

    Args:
        maps: `(B, H, W)` maps in [0, 1].
        rule: `map` (each pixel by its value), `half` (the higher half of the pixels) or `rest` (all but the highest
            fifth).
    """
    if rule == "map":
        return maps
    flat = maps.flatten(1)
    kept = top_share(flat, KEPT) if rule == "half" else ~top_share(flat, REMOVED)
    return kept.view_as(maps)


def dropped_tokens(text_map: Tensor, content: Tensor, rule: str) -> Tensor:
    """Mask `(B, T)` bool of the tokens that a rule removes, as input of `text_score`.

    Args:
        text_map: `(B, T)` text maps.
        content: `(B, T)` bool mask of the tokens that count, of `Attribution.content_mask`.
        rule: `map` (content tokens not above their median), `half` (all but the higher half of the content tokens) or
            `rest` (the highest fifth, at least one).
    """
    if rule == "map":
        return not_above_median(text_map, content)
    if rule == "half":
        return content & ~top_share(text_map, KEPT, content)
    return top_share(text_map, REMOVED, content, at_least=1)


def confidence_values(score: Tensor, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All metrics of `CONFIDENCE`, `(B,)` each, from the scores of the pairs and, by rule, of their kept parts."""
    return {name: change(score, left[rule]) for name, (rule, change) in CONFIDENCE.items()}


def image_score(clip: Clip, images: Tensor, keep: Tensor, fill: str, text: Tensor) -> Tensor:
    """Cosine of each pair with only `keep` of the image kept and the rest filled, `(B,)`. One forward.

    `keep` is `(B, H, W)` bool, or float in [0, 1] to keep pixels in part. See `patch_curve` for the other arguments.
    """
    with borrowed(clip):
        kept = keep_highlighted(images, keep, fill_images(fill, clip, images))
        return _cosine(clip.encode_image(kept), text)


def text_score(clip: Clip, tokens: Tensor, drop: Tensor, image: Tensor) -> Tensor:
    """Cosine of each pair with the tokens `drop` replaced by pads, `(B,)`. One forward.

    Args:
        clip: CLIP model.
        tokens: `(B, T)` tokens of the phrases.
        drop: `(B, T)` bool mask of the tokens to replace.
        image: `(B, D)` L2-normalized embeddings of the images.
    """
    with borrowed(clip):
        return _cosine(clip.encode_text(drop_tokens(tokens, drop, clip.pad_id)), image)


def text_scores(clip: Clip, tokens: Tensor, drops: Tensor, image: Tensor) -> Tensor:
    """`text_score` under S masks `(S, B, T)`, `(S, B)`; each distinct remainder of a phrase is encoded once."""
    dropped = drop_tokens(tokens, drops, clip.pad_id)
    rows, places = dropped.flatten(0, 1).unique(dim=0, return_inverse=True)
    with borrowed(clip):
        encoded = torch.cat([clip.encode_text(chunk) for chunk in rows.split(len(tokens))])
        return _cosine(encoded[places].unflatten(0, drops.shape[:2]), image)


def end_scores(clip: Clip, images: Tensor, fill: str, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of every `patch_curve`: cosine of the fill alone and of the whole image, `(B,)` each.

    See `patch_curve` for the arguments.
    """
    with borrowed(clip):
        blank = clip.encode_image(fill_images(fill, clip, images))
        return _cosine(blank, text), _cosine(clip.encode_image(images), text)


def patch_curve(
    clip: Clip,
    images: Tensor,
    grid: Tensor,
    fill: str,
    text: Tensor,
    kind: str,
    steps: int = 32,
    chunk_size: int = 32,
    ends: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Score while patches are inserted into the fill (`insertion`) or replaced by it (`deletion`) in map order.

    Patches are the points of the grid, highest first, ties in raster order. S is `steps`, or the number of patches if
    that is smaller. The S + 1 numbers of patches are evenly spaced from none to all.

    Args:
        clip: CLIP model.
        images: `(B, 3, H, W)` normalized images.
        grid: `(B, Gh, Gw)` maps at patch resolution.
        fill: `mean_image`, `mean_color` or `blur`, see `fill_images`.
        text: `(B, D)` L2-normalized embeddings of the phrases.
        kind: `insertion` or `deletion`.
        steps: Maximum number of steps.
        chunk_size: Maximum number of images in one forward; the batch size if that is larger.
        ends: Result of `end_scores` for these pairs, to share it between kinds and maps; computed by default.

    Returns:
        Share of patches inserted or deleted `(S + 1,)`, and the scores `(S + 1, B)`.

    Raises:
        ValueError: If there is no such kind or fill, a number is not positive, or the model has no mean image.
    """
    check_choice("kind", kind, KINDS)
    check_positive(steps=steps, chunk_size=chunk_size)
    blank, full = end_scores(clip, images, fill, text) if ends is None else ends
    patches = grid[0].numel()
    counts = patch_counts(patches, steps, grid.device)
    with borrowed(clip):
        filled = fill_images(fill, clip, images)
        # Rank of each patch in its map, 0 the highest.
        order = grid.flatten(1).argsort(dim=1, descending=True, stable=True)
        rank = enlarge_grid(order.argsort(dim=1).view_as(grid), images)
        scores = [blank if kind == "insertion" else full]
        # Skip empty chunks.
        for some in counts[1:-1].split(max(1, chunk_size // len(images))) if len(counts) > 2 else ():
            moved = rank < some[:, None, None, None]
            keep = moved if kind == "insertion" else ~moved
            shown = torch.where(keep[:, :, None], images, filled)
            scores.extend(_cosine(clip.encode_image(shown.flatten(0, 1)).view(*keep.shape[:2], -1), text))
        scores.append(full if kind == "insertion" else blank)
    return counts / patches, torch.stack(scores)


def patch_counts(patches: int, steps: int, device: torch.device | None = None) -> Tensor:
    """Numbers of patches from none to all, `(S + 1,)` long, evenly spaced, with S = min(steps, patches)."""
    number = min(steps, patches)
    return torch.arange(number + 1, device=device) * patches // number


def enlarge_grid(grid: Tensor, images: Tensor) -> Tensor:
    """Value of the grid at each pixel: `(B, Gh, Gw)` to `(B, H, W)` of the images."""
    for axis in (1, 2):
        pixels, places = images.shape[axis + 1], grid.shape[axis]
        grid = grid.index_select(axis, torch.arange(pixels, device=grid.device) * places // pixels)
    return grid


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Dot product of unit vectors, float32 or better: `(..., D)` and `(B, D)` to `(..., B)`, or broadcast."""
    return (full_precision(one) * full_precision(other)).sum(-1)
