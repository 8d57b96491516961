"""What a CUDA graph does, on the CPU: operations are taken down with the very tensors they read and wrote, and done again
on those. Whatever else a step depends on (a number of Python's, a draw of random numbers) stays as it was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

READS_THE_DEVICE = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero")


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Operations, with their inputs and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in READS_THE_DEVICE:
            raise RuntimeError("operation not permitted when stream is capturing\n(and more)")
        for i, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in (
                "running_mean",
                "running_var",
            ):  # which batch norm's schema keeps silent about
                self._keep(args[i] if i < len(args) else kwargs.get(argument.name))
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        there = {place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.made.update(place(t) for t in results if place(t) not in there)
        self.operations.append((func, args, kwargs, results))
        return out

    def _keep(self, value: Any) -> None:
        """Remember what a tensor from before the recording holds: recording does nothing."""
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and place(t) not in self.made and place(t) not in self.before:
                self.before[place(t)] = t, t.untyped_storage().clone()

    def undo(self) -> None:
        for tensor, held in self.before.values():
            tensor.untyped_storage().copy_(held)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.operations:
            out = func(*args, **kwargs)
            for old, new in zip(results, [t for t in tree_leaves(out) if isinstance(t, Tensor)], strict=True):
                if place(old) != place(new):
                    old.copy_(new)


class TapeRecorder:
    """`fmrun.train.cuda_graphs.Recorder`, on the CPU."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        tape = Tape()
        try:
            with tape:
                terms = work()
        finally:
            tape.undo()
        self.tapes.append(tape)
        return terms, tape.replay
