"""The units of a method's maps, patches and words, in the order in which they are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.evaluation.store import MapStore, fill_store
from matex_pl.maps import patch_mean
from matex_pl.metrics.functional import box_masks, top_share
from matex_pl.roar.films import PlanFilms
from matex_pl.roar.plan import Cell, Plan, PlanRow

_AT_ONCE = 32


def map_store(plan: Plan, row: PlanRow) -> MapStore:
    """The maps of a method, by the weights that are explained."""
    return MapStore(plan.folder / "maps", plan.about["model"]["explained"], build_method(row))


def build_method(row: PlanRow) -> AttributionMethod:
    """The method of a row."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AttributionMethod, "method", required=True)
    return parser.instantiate(parser.parse_object({"method": row.method})).method


def make_maps(plan: Plan, films: PlanFilms, row: PlanRow, clip: Clip) -> None:
    """Make the maps of a method that are not there yet, of all pairs that some cell drops from.

    Raises:
        NotImplementedError: The method refuses the model.
    """
    method, store, rows = build_method(row), map_store(plan, row), dropped_rows(plan, films)
    chunks = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
    for chunk in progress(chunks, row.name):
        keys = [films.keys[pair] for pair in chunk]
        if store.missing(keys):
            fill_store(clip, method, store, films.batch(chunk), keys, _AT_ONCE)


def dropped_rows(plan: Plan, films: PlanFilms) -> list[int]:
    """Pairs that some cell drops from: those that are trained on in any repeat, or all."""
    protocol = plan.protocol
    if protocol.corrupt_val:
        return list(range(len(films.studies)))
    trained = [films.split(protocol.train_share, protocol.seed + repeat)[0] for repeat in range(protocol.repeats)]
    return sorted(set().union(*trained))


@dataclass(frozen=True)
class Drop:
    """What a cell drops of each of n pairs.

    Args:
        patches: `(n, Gh, Gw)` bool.
        tokens: `(n, T)` bool.
    """

    patches: Tensor | None = None
    tokens: Tensor | None = None

    def of(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What is dropped of these pairs, as `RoarModule` takes it in a batch."""
        parts = {"drop_patches": self.patches, "drop_tokens": self.tokens}
        return {name: part[list(rows)] for name, part in parts.items() if part is not None}

    def units(self, rows: Sequence[int]) -> float:
        """Mean number of units dropped of these pairs."""
        return sum(float(part.flatten(1).sum(1).double().mean()) for part in self.of(rows).values())


def drop_of(plan: Plan, films: PlanFilms, cell: Cell) -> Drop:
    """The top fraction of a method's units, floor(fraction * units) of each pair; ties in an order of the repeat."""
    if not cell.row:
        return Drop()
    values, among = _units(plan, films, plan.row(cell.row), cell.modality)
    drop = top_units(values, among, cell.fraction, plan.protocol.seed + cell.repeat)
    if cell.modality == "text":
        return Drop(tokens=drop)
    return Drop(patches=drop.view(len(drop), *plan.about["model"]["grid"]))


def top_units(values: Tensor, among: Tensor, fraction: float, seed: int) -> Tensor:
    """The floor(fraction * n) highest of the n units that take part in each row, `(B, U)` bool; ties in a seeded order.

    Args:
        values: `(B, U)`.
        among: `(B, U)` bool, the units that take part.
        fraction: In [0, 1].
        seed: Of the order among equal values.
    """
    order = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    dropped = top_share(values.gather(1, order), fraction, among.gather(1, order))
    return torch.zeros_like(dropped).scatter(1, order, dropped)


def _units(plan: Plan, films: PlanFilms, row: PlanRow, modality: str) -> tuple[Tensor, Tensor]:
    """Values of the units of all n pairs `(n, U)`, and which take part; none of a pair that no cell drops from."""
    rows = dropped_rows(plan, films)
    values, among = (
        _boxed_patches(plan, films, rows) if row.method is None else _mapped(plan, films, row, modality, rows)
    )
    whole = (
        torch.zeros(len(films.studies), values.shape[1]),
        torch.zeros(len(films.studies), values.shape[1], dtype=torch.bool),
    )
    whole[0][rows], whole[1][rows] = values, among
    return whole


def _mapped(plan: Plan, films: PlanFilms, row: PlanRow, modality: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    units = map_store(plan, row).read_units([films.keys[pair] for pair in rows])
    if modality == "text":
        return units["text"], units["content"]
    grid = units["grid"].flatten(1)
    return grid, torch.ones_like(grid, dtype=torch.bool)


def _boxed_patches(plan: Plan, films: PlanFilms, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The share of each patch that lies in a box: the best that a map of the film could be."""
    boxes, model = films.boxes(), plan.about["model"]
    masks = box_masks([boxes[pair] for pair in rows], tuple(model["image_size"])).float()
    grid = patch_mean(masks, tuple(model["grid"])).flatten(1)
    return grid, torch.ones_like(grid, dtype=torch.bool)
