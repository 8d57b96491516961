"""What the machine itself can do: matrix products and copies, measured here and now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..environment import environment

WIDE = (torch.float32, torch.bfloat16)
"""Number formats whose matrix products are measured; float16 is taken to be as fast as bfloat16."""

TRIES = 8


@dataclass(frozen=True)
class Rates:
    """Best of several tries: the machine at its least disturbed."""

    products: dict[torch.dtype, float]
    """FLOP/s of square matrix products."""
    memory: float
    """Bytes/s read and written by a copy that no cache holds."""

    def best(self, other: Rates) -> Rates:
        """Of two measurements, the faster: a rate is what the machine can do, not what it did while others worked."""
        products = {dtype: max(rate, other.products[dtype]) for dtype, rate in self.products.items()}
        return Rates(products, max(self.memory, other.memory))

    def seconds(self, flops: float, size: float, dtype: torch.dtype) -> float:
        """The least time for an operation of so many FLOPs on so many bytes: the longer of computing and moving."""
        if dtype == torch.float16:
            dtype = torch.bfloat16
        product = self.products.get(dtype, self.products[torch.float32])
        return max(flops / product, size / self.memory)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], object], device: torch.device, repeats: int = 1) -> tuple[float, float]:
    """Wall time of one call, the device's work included; and what the device itself spent on it: a GPU by its events, a
    CPU as processor time of all threads of this process, which does not grow while other programs have their turn."""
    wait(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    start, spent = time.perf_counter(), time.process_time()
    for event in events[:1]:
        event.record()
    for _ in range(repeats):
        work()
    for event in events[1:]:
        event.record()
    wait(device)
    wall = time.perf_counter() - start
    own = events[0].elapsed_time(events[1]) / 1000 if events else time.process_time() - spent
    return wall / repeats, own / repeats


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call."""
    return timed(work, device, repeats)[0]


def rates(device: torch.device, tries: int = TRIES) -> Rates:
    """Measure the device, by matrices of side 1024 on a CPU and 8192 on a GPU."""
    on_gpu = device.type != "cpu"
    side = 8192 if on_gpu else 1024
    repeats = 4 if on_gpu else 1
    products = {}
    for dtype in WIDE:
        if device.type == "mps" and dtype != torch.float32:
            continue
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: a @ b, device, repeats) for _ in range(tries)]  # type: ignore[misc]
        products[dtype] = 2 * side**3 / min(times)
    count = side * side * 16
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device, repeats) for _ in range(tries)]
    return Rates(products, 2 * source.nbytes / min(times))


def load_average() -> float | None:
    """Of the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def describe(device: torch.device, rates: Rates) -> dict[str, Any]:
    """The machine, for a reader of the figures."""
    found = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else found["processor"]
    keys = ("fmrun", "git", "python", "torch", "cuda", "cudnn", "platform", "processor", "cores", "threads", "gpus")
    return {
        "name": name,
        "device": str(device),
        **{key: found[key] for key in keys},
        "product_flops": {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.products.items()},
        "memory_bytes_per_second": rates.memory,
    }
