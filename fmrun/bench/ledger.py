"""What a step does, operation by operation: passes through each net, FLOPs and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

FORWARD, TO_INPUT, TO_WEIGHT = "forward", "input_gradient", "weight_gradient"
KINDS = (FORWARD, TO_INPUT, TO_WEIGHT)

Layer = tuple[tuple[int, ...], bool]
"""A convolution, known by its weight's shape and whether it is a transposed one."""

Operation = tuple[int, int, torch.dtype]
"""FLOPs, bytes, and the number format."""

NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""Operations that touch no memory."""


def _bytes(tensor: Tensor) -> int:
    """What reading or writing a tensor moves; an expanded one is as small as what lies behind it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Ledger(TorchDispatchMode):
    """Inside, notes every operation that reaches the device, forward and backward.

    `layers` has the FLOPs of convolutions by kind of pass and layer; `flops` is the sum over convolutions and matrix
    products; `bytes` what all operations would read and write if no cache helped; `operations` has both for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, Counter[Layer]] = {kind: Counter() for kind in KINDS}
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        given = _tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
        made, into = _tensors(out), _tensors(kwargs.get("out"))
        behind = {t.untyped_storage().data_ptr() for t in [*given, *into]}
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in behind]
        if packet in NO_KERNEL or (not fresh and not func._schema.is_mutable):
            return out
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        arguments = zip(func._schema.arguments, args, strict=False)
        changed = _tensors([value for a, value in arguments if a.alias_info is not None and a.alias_info.is_write])
        size = sum(map(_bytes, [*given, *changed, *into, *fresh]))
        self.operations.append((flops, size, given[0].dtype if given else torch.float32))
        if packet is aten.convolution:
            self._convolution(args, made[0])
        elif packet is aten.convolution_backward:
            self._convolution_backward(args)
        return out

    @property
    def flops(self) -> int:
        return sum(flops for flops, _, _ in self.operations)

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.operations)

    def _convolution(self, args: Any, out: Tensor) -> None:
        x, weight, transposed = args[0], args[1], args[6]
        self.layers[FORWARD][tuple(weight.shape), transposed] += _flops(x, out, weight, transposed)

    def _convolution_backward(self, args: Any) -> None:
        gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        for kind, asked in ((TO_INPUT, wanted[0]), (TO_WEIGHT, wanted[1])):
            if asked:
                self.layers[kind][tuple(weight.shape), transposed] += _flops(x, gradient, weight, transposed)


def _flops(x: Tensor, out: Tensor, weight: Tensor, transposed: bool) -> int:
    """Of one pass through a convolution: the same forwards, to the input and to the weight."""
    return 2 * (x if transposed else out).numel() * weight[0].numel()


@dataclass(frozen=True)
class Unit:
    """One forward of a net, as a measure for passes: FLOPs of each convolution that does not read the net's own input.

    In an update of the net those have no gradient to give to their input, so that a whole pass back would count as less.
    """

    layers: Mapping[Layer, int]
    flops: int
    """Of the whole forward."""

    def without(self, other: Unit) -> Unit:
        """The same without layers that look like layers of another net."""
        return Unit({k: v for k, v in self.layers.items() if k not in other.layers}, self.flops)

    def passes(self, ledger: Ledger) -> dict[str, float]:
        """How often the net was passed, each way; a truncated pass is a fraction of one."""
        whole = sum(self.layers.values())
        if not whole:
            return {}
        return {kind: sum(ledger.layers[kind][layer] for layer in self.layers) / whole for kind in KINDS}


def unit(forward: Callable[[], Tensor]) -> Unit:
    """The measure of a net whose `forward` gives one tensor from an input without gradient and weights with one."""
    with Ledger() as ledger:
        out = forward()
    flops = ledger.flops
    with ledger:
        out.float().sum().backward()
    inner = {
        layer: count
        for layer, count in ledger.layers[FORWARD].items()
        if ledger.layers[TO_INPUT][layer] == ledger.layers[TO_WEIGHT][layer]
    }
    return Unit(inner, flops)
