"""Base classes of attribution metrics: one value per pair, repeated pairs counted once, mean over counted pairs."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from matex_pl.metrics.functional import masks_of
from matex_pl.training.distributed import GatheredMetric, fingerprints, first_of_each


class PairMetric(GatheredMetric):
    """Mean over pairs of one value each, without NaN; a subclass with C `columns` of values reduces them itself.

    If `update` gets ids, a repeated pair, as in padded shards, counts once, also across processes. Pairs without an id
    all count. If no pair counts, the result is NaN, with a warning.

    Args:
        settings: Arguments of the subclass that its values depend on. In a `MetricCollection`, only metrics of the same
            class and settings share their states.
    """

    plot_lower_bound: float | None = None
    plot_upper_bound: float | None = None
    columns = 1
    values: list[Tensor]
    keys: list[Tensor]

    def __init__(self, *settings: object) -> None:
        super().__init__()
        # A `MetricCollection` shares the states of metrics whose states are equal after the first update.
        identity = blake2b(f"{type(self).__module__}.{type(self).__qualname__}{settings}".encode(), digest_size=8)
        self.add_state("identity", default=torch.tensor(list(identity.digest())), dist_reduce_fx="max")
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("keys", default=[], dist_reduce_fx="cat")

    def _add(self, values: Tensor, ids: Sequence[str] | None) -> None:
        """Store the values of B pairs, `(B,)` or `(B, C)`."""
        values = values.detach().float().view(len(values), self.columns)
        if ids is not None and (isinstance(ids, str) or len(ids) != len(values)):
            raise ValueError(f"ids must be a list of one id for each of {len(values)} pairs, got {ids!r}.")
        # 1 and the fingerprint of the id, or zeros without ids.
        keys = torch.zeros(len(values), 2, dtype=torch.long)
        if ids is not None:
            keys = torch.stack([keys[:, 0] + 1, fingerprints(ids)], 1)
        self.values.append(values)
        self.keys.append(keys.to(values.device))

    def _empty(self) -> dict[str, Tensor]:
        """Empty value of each list state, for a process without pairs."""
        return {
            "values": torch.zeros(0, self.columns, device=self.device),
            "keys": torch.zeros(0, 2, dtype=torch.long, device=self.device),
        }

    def _gathered(self, name: str) -> Tensor:
        """A list state concatenated to one tensor."""
        state = getattr(self, name)
        return dim_zero_cat(state) if len(state) else self._empty()[name]

    def _counted(self) -> Tensor:
        """Mask `(n,)` bool of the rows that count: the first of each id, and all rows without an id."""
        named, prints = self._gathered("keys").T
        counted = named == 0
        rows = named.nonzero()[:, 0]
        counted[rows[first_of_each(prints[rows])]] = True
        return counted

    def compute(self) -> Tensor:
        """Result over all pairs, a float32 scalar."""
        value = self._reduce(self._gathered("values")[self._counted()])
        if value.isnan():
            rank_zero_warn(f"{type(self).__name__} is NaN: none of the {len(self._gathered('keys'))} pairs counts.")
        return value

    def _reduce(self, values: Tensor) -> Tensor:
        """Result of the rows that count, `(n, C)` to a scalar."""
        return values.nanmean()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Figure and axes of the result, or of several results `val` as steps."""
        return self._plot(val, ax)


class BoxMetric(PairMetric):
    """Agreement of maps with the boxes of their pairs: mean over pairs with boxes, in [0, 1]."""

    higher_is_better = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    _score: ClassVar[staticmethod[[Tensor, Tensor], Tensor]]
    """Function from maps and masks of boxes, `(B, H, W)` each, to values `(B,)`, NaN without boxes."""

    def update(self, maps: Tensor, boxes: Sequence[Tensor], ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)`, their boxes, `(K, 4)` each in [0, 1] of the map's frame, and the pairs' ids."""
        check_boxes(maps, boxes)
        self._add(self._values(maps, boxes), ids)

    def _values(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        return self._score(maps, masks_of(maps, boxes))


def check_boxes(maps: Tensor, boxes: Sequence[Tensor]) -> None:
    """Refuse a list of boxes whose length differs from the number of maps."""
    if len(maps) != len(boxes):
        raise ValueError(
            f"There are {len(maps)} maps, but boxes of {len(boxes)} pairs. Give one tensor of boxes for each map."
        )
