"""Timing in turns: on a shared machine seconds move by tens of per cent, and ratios within a round by far less."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

import torch

LEAST = 0.05
"""Seconds of work in one measurement, so that starting it on a GPU does not count."""


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - start) / repeats


def in_turns(work: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, one measurement a round, every other round in reverse order."""
    repeats = {name: max(1, round(LEAST / seconds(call, device))) for name, call in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for r in range(rounds):
        for name in list(work)[:: 1 if r % 2 == 0 else -1]:
            times[name].append(seconds(work[name], device, repeats[name]))
    return times


def quotients(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of square matrices, of side 1024 on a CPU and 8192 on a GPU, and its FLOPs."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3
