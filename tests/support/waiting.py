"""What a training step may not do on a GPU, found on a CPU: wait for the device, or make a tensor that is not on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FACTORIES = frozenset(
    [
        "arange",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "zeros",
    ]
)
READS = frozenset(["__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist", "cpu"])
"""Methods of tensors that give the host what the device holds."""

WAITS = frozenset(["_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "bincount"])
"""Operations whose result, or its size, the host has to know."""


class Refused(AssertionError):
    """An operation that would wait for a GPU, or meet a tensor of the CPU there."""


class _Calls(TorchFunctionMode):
    def __init__(self, own: list[Any]) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READS:
            raise Refused(f"Tensor.{name}() waits for the device")
        if name in FACTORIES and func is getattr(torch, name, None) and kwargs.get("device") is None:
            raise Refused(f"torch.{name} without a device makes a tensor of the CPU")
        generator = kwargs.get("generator")
        if generator is not None and not any(generator is known for known in self.own):
            raise Refused(f"{name} draws from a generator that was made without a device")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITS:
            raise Refused(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, Refused is raised by whatever a step on a GPU may not do. Generators of `rng.torch_generator` that were asked
    for with a device are the device's."""
    from fmrun.runtime import rng

    own: list[Any] = []
    plain = rng.torch_generator

    def noted(*args: Any, **kwargs: Any) -> torch.Generator:
        generator = plain(*args, **kwargs)
        if "device" in kwargs:
            own.append(generator)
        return generator

    users = [
        m for n, m in sys.modules.items() if n.startswith("fmrun") and getattr(m, "torch_generator", None) is plain
    ]
    for module in users:
        module.torch_generator = noted  # type: ignore[attr-defined]
    try:
        with _Calls(own), _Operations():
            yield
    finally:
        for module in users:
            module.torch_generator = plain  # type: ignore[attr-defined]
