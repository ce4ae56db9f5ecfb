"""Which settings are tried, and their maps on a raster: each component once, an addition per setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from matex_pl.anatomy import parse_phrase, prior_maps
from matex_pl.anatomy.prior import PriorShape
from matex_pl.attribution import Matex
from matex_pl.attribution.matex import BlockCount, attention_flow
from matex_pl.console import progress
from matex_pl.maps import min_max, patch_mean, token_map, upsample
from matex_pl.tune.objective import Objective, Pairs

AXES = ("grad_layers", "prior_shape", "lambda_s", "lambda_c", "tau")
# Numbers in one block of fused maps, so that it stays in a core's cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Grid:
    """The values that are tried of each setting, every combination; the order of the fields is that of score tensors.

    Args:
        grad_layers: K of the image side, as the user writes it.
        prior_shape: Shapes of the prior.
        lambda_s: Strengths of the prior.
        lambda_c: Weights of the consistent gradients.
        tau: Temperatures of the flow.
    """

    grad_layers: list[BlockCount]
    prior_shape: list[PriorShape]
    lambda_s: list[float]
    lambda_c: list[float]
    tau: list[float]

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The values by the setting's name."""
        return dict(vars(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are of each."""
        return tuple(len(values) for values in self.axes.values())

    @property
    def varied(self) -> list[str]:
        """Names of the settings of which more than one value is tried; all where there is none."""
        return [name for name, values in self.axes.items() if len(values) > 1] or list(self.axes)

    def holds(self, method: Matex) -> bool:
        """The method's setting is one of the combinations."""
        return all(getattr(method, name) in values for name, values in self.axes.items())

    def place(self, method: Matex) -> tuple[int, ...]:
        """Where the method's setting stands in a score tensor."""
        return tuple(values.index(getattr(method, name)) for name, values in self.axes.items())

    def settings(self) -> list[dict[str, Any]]:
        """All combinations, in the order of a flattened score tensor."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def distances(self, method: Matex, depth: tuple[int, int]) -> Tensor:
        """How far each combination is from the method's own, `(settings,)`.

        The sum over the settings of the difference as a share of the range of what is tried; of K in blocks, and
        another shape counts 1.

        Args:
            method: The method as it is.
            depth: Blocks of the image and the text tower.
        """
        steps = []
        for name, values in self.axes.items():
            own = getattr(method, name)
            if name == "prior_shape":
                steps.append([float(value != own) for value in values])
                continue
            if name == "grad_layers":
                own, values = sum(depths(own, method, depth)), [sum(depths(value, method, depth)) for value in values]
            span = max([*values, own]) - min([*values, own]) or 1
            steps.append([abs(value - own) / span for value in values])
        return torch.tensor([sum(row) for row in product(*steps)], dtype=torch.float64)


def make_grid(
    method: Matex,
    objective: Objective,
    depth: tuple[int, int],
    tried: Mapping[str, Sequence[Any] | None],
    phrases: Sequence[str],
) -> Grid:
    """What is tried, each value once and in order; of a setting that has no part in the objective the method's own.

    Args:
        method: Its settings stand in for what is not tried.
        objective: What the settings are chosen by.
        depth: Blocks of the image and the text tower; of numbers of blocks that mean the same one is tried, the
            method's own if it is one of them.
        tried: Values by the setting's name, None for the method's own.
        phrases: Of the pairs.
    """
    idle = idle_settings(method, objective, phrases)
    axes = {
        name: [getattr(method, name)] if values is None or name in idle else values for name, values in tried.items()
    }
    same = {depths(value, method, depth): value for value in reversed(axes["grad_layers"])}
    own = depths(method.grad_layers, method, depth)
    same |= {own: method.grad_layers} if own in same else {}
    return Grid(
        grad_layers=[value for _, value in sorted(same.items())],
        prior_shape=list(dict.fromkeys(axes["prior_shape"])),
        **{name: sorted(set(axes[name])) for name in ("lambda_s", "lambda_c", "tau")},
    )


def idle_settings(method: Matex, objective: Objective, phrases: Sequence[str]) -> dict[str, str]:
    """Settings that change nothing about what is scored on pairs with these phrases, and why."""
    idle = {}
    if objective.side == "text":
        idle = dict.fromkeys(("lambda_s", "prior_shape"), "words have no place")
        if method.text_grad_layers is not None:
            idle["grad_layers"] = "the text side has its own number of blocks"
    elif not any(parse_phrase(phrase, knowledge_prior=method.knowledge_prior).regions for phrase in phrases):
        idle = dict.fromkeys(("lambda_s", "prior_shape"), "no phrase of the validation pairs names a place")
    if method.flow == "rollout":
        idle["tau"] = "a rollout has no temperature"
    elif method.beta == 0:
        idle["tau"] = "beta is 0, so that the flow has no weight"
    return idle


def depths(grad_layers: BlockCount, method: Matex, depth: tuple[int, int]) -> tuple[int, int]:
    """Blocks with gradients on the image and the text side, of towers with so many blocks."""
    return type(method)(**method.settings | {"grad_layers": grad_layers}).depths(*depth)


def search(pairs: Sequence[Pairs], method: Matex, grid: Grid, objective: Objective, raster: tuple[int, int]) -> Tensor:
    """Score of every setting of the grid, on a raster or over words, in its shape; NaN where no study counts."""
    assert objective.coarse is not None
    sums: dict[tuple[int, int, int], Tensor] = {}
    for batch in progress(pairs, "settings"):
        score = objective.coarse(batch, raster)
        steps = [_fused(parts, method, grid, objective, raster) for parts in (batch.parts, *batch.others)]
        for step in zip(*steps, strict=True):
            place, rows, _ = step[0]
            scored = score(rows, *(fused.flatten(1, 2) for *_, fused in step))
            # Not every device has the doubles of a tally.
            sums[place] = sums.get(place, 0) + objective.tally(scored.cpu())
    # The places come in the order of the grid.
    return objective.settle(torch.stack(list(sums.values()))).view(grid.shape)


Fused = Iterator[tuple[tuple[int, int, int], slice, Tensor]]


def _fused(parts: Mapping[str, Any], method: Matex, grid: Grid, objective: Objective, raster: tuple[int, int]) -> Fused:
    """The maps that the objective is a metric of, under every setting."""
    if objective.side == "text":
        return fused_words(parts, method, grid)
    return fused_maps(parts, method, grid, raster, patches=objective.patches)


def fused_maps(
    parts: Mapping[str, Any], method: Matex, grid: Grid, raster: tuple[int, int], *, patches: bool = False
) -> Fused:
    """Eq. (6), or the product, before its norm, for every setting of a grid and every cell of a raster.

    Either fusion is a map of K, the prior and lambda_c, and one of the prior and tau, added: each is made once per
    value, and a setting costs one addition per cell. Up to the norm they are the maps of `Matex.fuse` at this size.

    Args:
        parts: Of `Matex.attribute` for B pairs, of as many blocks as the grid's deepest K.
        method: Says all that the grid does not.
        grid: The C values of lambda_c and T of tau, for each of the others.
        raster: Height and width; the maps are sampled at its centres, the prior is drawn there.
        patches: Up to the norm they are `maps.grid` instead, the means of patches over the raster, P = N; of maps that
            are fused on the patches those, without a raster.

    Yields:
        Places on the grid of K, shape and lambda_s, rows of the B pairs, and their maps `(b, C, T, P)`.
    """
    dtype, own = parts["dtype"], tuple(parts["grad_blocks"].shape[-2:])
    pixelwise = method.fuse_at == "pixel"
    # Means and enlarging are sums: they may come before the addition.
    enlarge, shrink = partial(upsample, size=raster), partial(patch_mean, grid=own)
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]
    if pixelwise:
        before, after = enlarge, shrink if patches else _as_it_is
    else:
        before, after = _as_it_is, _as_it_is if patches else enlarge
    flow, stable = before(method.beta * _flows(parts, method, grid.tau)), before(parts["consistency"])
    rises = [_rise(parts, method, shape, raster if pixelwise else own) for shape in grid.prior_shape]
    lambda_c = torch.tensor(grid.lambda_c, device=flow.device)[:, None, None]
    rows = max(1, _BLOCK // (len(grid.lambda_c) * len(grid.tau) * prod(own if patches else raster)))
    blocks = [slice(start, start + rows) for start in range(0, len(flow), rows)]
    for k, grad_layers in enumerate(grid.grad_layers):
        last, _ = depths(grad_layers, method, (parts["attention_layers"].shape[1],) * 2)
        grad = before(min_max(parts["grad_blocks"][:, -last:].relu().mean(1), dtype=dtype))
        for (shape, rise), (place, lambda_s) in product(enumerate(rises), enumerate(grid.lambda_s)):
            prior = 1 + (lambda_s - 1) * rise
            if method.fusion == "product":
                lift = prior**method.prior_power
                plain, steady, added = method.alpha * grad * lift, stable * grad * lift, flow * lift[:, None]
            else:
                plain, steady, added = (method.alpha + method.delta * prior) * grad, stable * grad, flow
            plain, steady, added = after(plain), after(steady), after(added)
            for block in blocks:
                by_gradient = plain[block, None] + lambda_c * steady[block, None]
                yield (k, shape, place), block, (by_gradient[:, :, None] + added[block, None]).flatten(3)


def fused_words(parts: Mapping[str, Any], method: Matex, grid: Grid) -> Fused:
    """Finished text maps for every setting of a grid, `(B, C, T, tokens)`, as `fused_maps` yields those of cells.

    Words have no place: the grid has one shape and one lambda_s.
    """
    content, dtype, stable = parts["content"], parts["dtype"], parts["text_consistency"]
    flow = torch.stack([_scaled(flow, parts) for flow in _raw_flows(parts, method, grid.tau, "text_")], 1)
    lambda_c = torch.tensor(grid.lambda_c, device=flow.device)[:, None]
    weight = method.alpha + lambda_c * stable[:, None] + method.delta
    keep = content[:, None, None].expand(-1, len(grid.lambda_c), len(grid.tau), -1)
    depth = (parts["attention_layers"].shape[1], parts["text_attention_layers"].shape[1])
    for k, grad_layers in enumerate(grid.grad_layers):
        _, last = depths(grad_layers, method, depth)
        grad = _scaled(parts["text_grad_blocks"][:, -last:].mean(1).relu() * content, parts)
        fused = (grad[:, None] * weight)[:, :, None] + method.beta * flow[:, None]
        whole = token_map(fused.flatten(0, 2), keep.flatten(0, 2), dtype=dtype)
        yield (k, 0, 0), slice(None), whole.view_as(fused)


def _scaled(values: Tensor, parts: Mapping[str, Any]) -> Tensor:
    """Raw relevance of the tokens, min-maxed over content."""
    return min_max(values, keep=parts["content"], dtype=parts["dtype"])


def _raw_flows(parts: Mapping[str, Any], method: Matex, tau: Sequence[float], side: str = "") -> list[Tensor]:
    """The flow of each temperature, raw, to patches, or to words where the side is `text_`."""
    if method.flow == "rollout":
        return [parts[f"{side}rollout"]]
    return [attention_flow(parts[f"{side}attention_layers"], value) for value in tau]


def _as_it_is(maps: Tensor) -> Tensor:
    return maps


def _flows(parts: Mapping[str, Any], method: Matex, tau: Sequence[float]) -> Tensor:
    """The flow of each temperature, min-maxed, `(B, T, Gh, Gw)`."""
    return torch.stack([min_max(flow, dtype=parts["dtype"]) for flow in _raw_flows(parts, method, tau)], 1)


def _rise(parts: Mapping[str, Any], method: Matex, shape: PriorShape, size: tuple[int, ...]) -> Tensor:
    """The prior from 0 to 1, of which M = 1 + (lambda_s - 1) * this."""
    prior = prior_maps(
        parts["regions"],
        (size[0], size[1]),
        lambda_s=2.0,
        shape=shape,
        laterality=method.laterality,
        film=parts["film"],
        ids=parts["phrases"],
        device=parts["score"].device,
    )
    return prior - 1
