"""Batch statistics over several processes, by torch.distributed, differentiable."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes that share a global batch, each with an equal slice of it."""

    size: int

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over processes, differentiable."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """`x` (b, …) of all processes, concatenated to (b * size, …), differentiable."""
        ...


class SingleProcess:
    """One process, which holds the whole batch."""

    size = 1

    def mean(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


class ProcessGroup:
    """All processes of torch.distributed, once it is initialised.

    Every process computes a batch statistic whole. Where gradients are averaged over processes afterwards, as
    DistributedDataParallel does, the average is the gradient of the global loss.
    """

    def __init__(self) -> None:
        self.size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()

    def mean(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        summed: Tensor = all_reduce(x)
        return summed / self.size

    def gather(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        blank = torch.zeros_like(x)
        gathered: Tensor = all_reduce(torch.cat([x if rank == self.rank else blank for rank in range(self.size)]))
        return gathered


def current_ranks() -> Ranks:
    """The processes of torch.distributed where it is initialised, else this one alone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return ProcessGroup() if distributed and torch.distributed.get_world_size() > 1 else SingleProcess()
