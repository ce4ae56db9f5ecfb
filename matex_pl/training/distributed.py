"""Work of several processes: supported strategies, gathered rows, and hashes that identify repeats."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torchmetrics import Metric


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that keep a part of each weight in each process.

    Raises:
        NotImplementedError: The strategy is one of them.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise NotImplementedError(
            f"{type(strategy).__name__} keeps a part of each weight in each process, but maps swap the attention of "
            "whole towers and differentiate through it outside of the strategy. Set trainer.strategy=ddp."
        )


def fingerprints(names: Sequence[str]) -> Tensor:
    """One int64 per name, equal for equal names in any process: `(B,)`."""
    digests = [int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True) for name in names]
    return torch.tensor(digests, dtype=torch.long)


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Rows `(B, ...)` of all W processes in the order of the processes: `(W * B, ...)`, without a graph.

    Raises:
        ValueError: The processes have different numbers of rows.
    """
    if process_count() == 1:
        return rows
    rows = rows.detach().contiguous()
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(process_count())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(rows)))
    counts = torch.cat(sizes).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have batches of {', '.join(map(str, counts))} pairs, but a step needs equal batches. Use "
            "the loaders of a matex_pl data module, or a DistributedSampler with drop_last."
        )
    parts = [torch.empty_like(rows) for _ in counts]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def largest(number: int, device: torch.device) -> int:
    """Largest of a number over all processes; every process must call this."""
    if process_count() == 1:
        return number
    result = torch.tensor(number, device=device)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return int(result)


class GatheredMetric(Metric):
    """Metric with list states that a process without data can synchronize too."""

    full_state_update = False

    def _empty(self) -> dict[str, Tensor]:
        """Empty value of each list state; every process calls this before a synchronization."""
        raise NotImplementedError

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, including processes without data."""
        for name, empty in self._empty().items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                getattr(self, name).append(empty)
        super().sync(*args, **kwargs)


def first_of_each(keys: Tensor) -> Tensor:
    """Indices of the first occurrence of each key of `(n,)`, in order."""
    unique, inverse = keys.unique(return_inverse=True)
    order = torch.arange(len(keys), device=keys.device)
    return torch.full_like(unique, len(keys)).scatter_reduce(0, inverse, order, "amin").sort().values
