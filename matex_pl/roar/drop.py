"""Units of a method's maps (patches or words) that a run drops."""

from __future__ import annotations

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.clip.model import Clip
from matex_pl.console import progress
from matex_pl.evaluation.store import MapStore, fill_store
from matex_pl.maps import patch_mean
from matex_pl.metrics.functional import box_masks, top_share
from matex_pl.roar.images import PlanImages, split_rows
from matex_pl.roar.plan import Plan, PlanMethod, Run

_AT_ONCE = 32


def map_store(plan: Plan, method: PlanMethod) -> MapStore:
    """Store of a method's maps under the explained weights."""
    return MapStore(plan.folder / "maps", plan.about["model"]["explained"], build_method(method))


def build_method(method: PlanMethod) -> AttributionMethod:
    """Attribution method from its description in the plan."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AttributionMethod, "method", required=True)
    return parser.instantiate(parser.parse_object({"method": method.method})).method


def make_maps(plan: Plan, images: PlanImages, method: PlanMethod, clip: Clip) -> None:
    """Compute the missing maps of a method, for all pairs from which a run drops units."""
    built, store, rows = build_method(method), map_store(plan, method), dropped_rows(plan, images)
    chunks = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
    for chunk in progress(chunks, method.name):
        keys = [images.keys[row] for row in chunk]
        if store.missing(keys):
            fill_store(clip, built, store, images.batch(chunk), keys, _AT_ONCE)


def dropped_rows(plan: Plan, images: PlanImages) -> list[int]:
    """Rows of the pairs from which a run drops units: the training split of any repeat, or all pairs."""
    protocol = plan.protocol
    if protocol.corrupt_val:
        return list(range(len(images.pairs)))
    seeds = range(protocol.seed, protocol.seed + protocol.repeats)
    return sorted(set().union(*(split_rows(images.pairs, protocol.train_share, seed)[0] for seed in seeds)))


def drop_of(plan: Plan, images: PlanImages, run: Run) -> dict[str, Tensor]:
    """Units that a run drops from each of n pairs, as batch entries for `RoarModule`.

    The dropped units are the floor(fraction * units) highest units of a pair in the maps of the run's method, and at
    least one; ties in an order of the repeat.

    Returns:
        `drop_patches` `(n, Gh, Gw)` or `drop_tokens` `(n, T)` bool; empty for a clean run.
    """
    if not run.method:
        return {}
    method = next(method for method in plan.methods if method.name == run.method)
    rows, model = dropped_rows(plan, images), plan.about["model"]
    if method.method is None:
        # The share of each patch inside the boxes is the best possible map of the image.
        masks = box_masks([images.boxes(row) for row in rows], tuple(model["image_size"])).float()
        units = {"grid": patch_mean(masks, tuple(model["grid"]))}
    else:
        units = map_store(plan, method).read_units([images.keys[row] for row in rows])
    read = units["text"] if run.modality == "text" else units["grid"].flatten(1)
    # Pairs outside these rows have no map and drop nothing.
    values = torch.zeros(len(images.pairs), read.shape[1])
    among = torch.zeros(values.shape, dtype=torch.bool)
    values[rows], among[rows] = read, units["content"] if run.modality == "text" else torch.tensor(True)
    drop = top_units(values, among, run.fraction, plan.protocol.seed + run.repeat)
    return {"drop_tokens": drop} if run.modality == "text" else {"drop_patches": drop.view(-1, *model["grid"])}


def top_units(values: Tensor, among: Tensor, fraction: float, seed: int) -> Tensor:
    """Mask of the floor(fraction * n) highest of the n units of each row, and at least one above a fraction of 0.

    Ties are in a seeded order.

    `values` `(B, U)` and `among` `(B, U)` bool, the units of each row, give `(B, U)` bool. The fraction is in [0, 1].
    """
    order = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    dropped = top_share(values.gather(1, order), fraction, among.gather(1, order), at_least=int(fraction > 0))
    return torch.zeros_like(dropped).scatter(1, order, dropped)
