"""What all metrics of attribution share: numbers of each pair, repeats left out, and the mean of what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from matex_pl.metrics.functional import box_masks
from matex_pl.training.distributed import fingerprints, first_of_each


class PairMetric(Metric):
    """Keeps C numbers of each pair; a subclass says in `_reduce` what becomes of them.

    Pairs that come twice, as padded shards bring them, count once where `update` gets their ids, also across
    processes; those that come without an id all count. NaN with a warning when nothing counts.
    """

    full_state_update = False
    plot_lower_bound: float | None = None
    plot_upper_bound: float | None = None
    columns = 1
    values: list[Tensor]
    keys: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("keys", default=[], dist_reduce_fx="cat")

    def _add(self, values: Tensor, ids: Sequence[str] | None) -> None:
        """Keep the numbers of B pairs, `(B,)` or `(B, C)`."""
        values = values.detach().float().view(len(values), self.columns)
        if ids is not None and (isinstance(ids, str) or len(ids) != len(values)):
            raise ValueError(f"ids must be a list of one id for each of {len(values)} pairs, got {ids!r}.")
        known = torch.zeros(len(values), 2, dtype=torch.long) if ids is None else _keys(ids)
        self.values.append(values)
        self.keys.append(known.to(values.device))

    def _empty(self) -> dict[str, Tensor]:
        """What each list of states holds where no pair came: a process without one has to join in all the same."""
        return {
            "values": torch.zeros(0, self.columns, device=self.device),
            "keys": torch.zeros(0, 2, dtype=torch.long, device=self.device),
        }

    def _gathered(self, name: str) -> Tensor:
        """All of a list of states, as one tensor."""
        state = getattr(self, name)
        return dim_zero_cat(state) if len(state) else self._empty()[name]

    def _counted(self) -> Tensor:
        """Which rows count, `(n,)` bool: the first of each id, and all that have none."""
        named, prints = self._gathered("keys").T
        counted = named == 0
        rows = named.nonzero()[:, 0]
        counted[rows[first_of_each(prints[rows])]] = True
        return counted

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, also where one of them has seen no pair."""
        for name, empty in self._empty().items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                getattr(self, name).append(empty)
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """The result over all pairs, a float32 scalar."""
        value = self._reduce(self._gathered("values")[self._counted()])
        if value.isnan():
            rank_zero_warn(f"{type(self).__name__} is NaN: none of the {len(self._gathered('keys'))} pairs counts.")
        return value

    def _reduce(self, values: Tensor) -> Tensor:
        """The result of the rows that count, `(n, C)` to a scalar."""
        raise NotImplementedError

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Figure and axes with the result, or with several results `val` as steps."""
        return self._plot(val, ax)


class PairMean(PairMetric):
    """Mean over pairs; NaN values do not count."""

    def _reduce(self, values: Tensor) -> Tensor:
        return values.nanmean()


class BoxMean(PairMean):
    """Mean over pairs with boxes."""

    higher_is_better = True

    def update(self, maps: Tensor, boxes: Sequence[Tensor], ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)` and their boxes, `(K, 4)` each in [0, 1] of the map's frame; and the pairs' ids."""
        self._add(self._score(maps, masks_of(maps, boxes)), ids)

    def _score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """The value of each map `(B, H, W)` with the mask of its boxes, `(B,)`, NaN without boxes."""
        raise NotImplementedError


def masks_of(maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """The boxes of maps as masks, `(B, H, W)` bool.

    Raises:
        ValueError: There are not as many lists of boxes as maps.
    """
    if len(maps) != len(boxes):
        raise ValueError(f"There are {len(maps)} maps, but boxes of {len(boxes)} pairs.")
    return box_masks(boxes, (maps.shape[1], maps.shape[2])).to(maps.device)


def _keys(ids: Sequence[str]) -> Tensor:
    """A one and the fingerprint of each id, `(B, 2)`."""
    return torch.stack([torch.ones(len(ids), dtype=torch.long), fingerprints(ids)], 1)
