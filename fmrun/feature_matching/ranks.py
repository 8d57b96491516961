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


class _Sum(torch.autograd.Function):
    """Over processes, differentiable any number of times."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return summed(grad)


def summed(x: Tensor) -> Tensor:
    """Sum of `x` over processes."""
    total: Tensor = _Sum.apply(x)
    return total


class Processes:
    """All processes of torch.distributed where it is initialised, else this one alone, which holds the whole batch.

    Every process computes a batch statistic whole. Where gradients are averaged over processes afterwards, as
    DistributedDataParallel does, the average is the gradient of the global loss.
    """

    def __init__(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.size = torch.distributed.get_world_size() if distributed else 1
        self.rank = torch.distributed.get_rank() if distributed else 0

    def mean(self, x: Tensor) -> Tensor:
        return summed(x) / self.size if self.size > 1 else x

    def gather(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        blank = torch.zeros_like(x)
        return summed(torch.cat([x if rank == self.rank else blank for rank in range(self.size)]))
