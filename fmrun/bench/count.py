"""What a step does, operation by operation: passes through each net, FLOPs, and the memory it takes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten

FORWARD, TO_INPUT, TO_WEIGHT = "forward", "input_gradient", "weight_gradient"
DIRECTIONS = (FORWARD, TO_INPUT, TO_WEIGHT)

Layer = tuple[tuple[int, ...], bool]
"""A convolution, identified by the shape of its weight and whether it is transposed."""


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [tensor.untyped_storage() for tensor in tree_leaves(tree) if isinstance(tensor, Tensor)]
    return {storage._cdata: storage for storage in storages}


class StepCounter(TorchDispatchMode):
    """Counts the operations inside, forward and backward. (`FlopCounterMode` does not see into `autograd.grad`.)

    - `flops`: of convolutions and matrix products, by torch's `flop_registry`
    - `layers`: those of convolutions, by direction and layer
    - `peak`: the most bytes that tensors made inside take at once
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = self._held = 0
        self.layers: dict[str, Counter[Layer]] = {direction: Counter() for direction in DIRECTIONS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        out = func(*args, **kwargs)
        for key, storage in _storages(out).items():
            if key not in given:
                self._hold(storage.nbytes())
                weakref.finalize(storage, self._hold, -storage.nbytes())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        if packet is aten.convolution:
            self._convolution(FORWARD, args[0], args[1], out, transposed=args[6])
        elif packet is aten.convolution_backward:
            for direction, wanted in zip((TO_INPUT, TO_WEIGHT), args[10], strict=False):
                if wanted:  # as many FLOPs as the forward
                    self._convolution(direction, args[1], args[2], args[0], transposed=args[7])
        return out

    def _hold(self, size: int) -> None:
        self._held += size
        self.peak = max(self.peak, self._held)

    def _convolution(self, direction: str, x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> None:
        flops = conv_flop_count(list(x.shape), list(weight.shape), list(out.shape), transposed)
        self.layers[direction][tuple(weight.shape), transposed] += flops


def units(forwards: Mapping[str, Callable[[], Tensor]]) -> dict[str, Counter[Layer]]:
    """What passes are counted in: FLOPs of the convolutions of one forward of each net, from an input without gradient.

    Left out are those that read the net's own input, which compute no gradient to it when the net is updated, and those
    that look alike in two nets.
    """
    counters = {name: StepCounter() for name in forwards}
    for name, forward in forwards.items():
        with counters[name]:
            forward().float().sum().backward()
    by_net = {}
    for name, counter in counters.items():
        forth, to_input, to_weight = (counter.layers[direction] for direction in DIRECTIONS)
        elsewhere = {layer for other in counters.values() if other is not counter for layer in other.layers[FORWARD]}
        inner = {
            layer: n for layer, n in forth.items() if to_input[layer] == to_weight[layer] and layer not in elsewhere
        }
        by_net[name] = Counter(inner)
    return by_net


def passes(counter: StepCounter, unit: Counter[Layer]) -> dict[str, float]:
    """How many passes a step makes through a net, by direction; a truncated pass is a fraction of one."""
    return {d: sum(counter.layers[d][layer] for layer in unit) / unit.total() for d in DIRECTIONS}
