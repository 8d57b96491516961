"""Values over the steps of training: of one run, and over the seeds of a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..intervals import mean_interval

Series = dict[int, float]
"""Step to value, steps rising, values finite."""


@dataclass(frozen=True)
class Point:
    """The mean over the seeds of a group at one step, and its 95 % interval where there are two or more."""

    step: int
    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Curve:
    """One measure of every group over training."""

    key: str
    groups: tuple[tuple[Point, ...], ...]
    """One a group, empty where it was not measured."""


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The series of each key of metrics.jsonl."""
    found: dict[str, Series] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and is_finite(value):
                found.setdefault(key, {})[row["step"]] = float(value)
    return found


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean_curve(runs: Sequence[Series]) -> tuple[Point, ...]:
    """The mean over runs at each step that at least half of them have, so that it does not leap where most have ended."""
    there = [run for run in runs if run]
    found = []
    for step in sorted({step for run in there for step in run}):
        values = [run[step] for run in there if step in run]
        if 2 * len(values) >= len(there):
            interval = mean_interval(values)
            found.append(Point(step, interval.mean, interval.low, interval.high, interval.count))
    return tuple(found)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None without any."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def tail_mean(values: Series, part: float = 0.25) -> float | None:
    """The mean over the last part of the read-outs, which vary too much one by one; None without any."""
    last = list(values.values())
    return fmean(last[-max(1, round(part * len(last))) :]) if last else None


def thinned(points: Sequence[Point], most: int) -> tuple[Point, ...]:
    """At most `most` points: neighbours averaged where there are more, intervals with them."""
    if len(points) <= most:
        return tuple(points)
    size = math.ceil(len(points) / most)
    return tuple(_average(points[i : i + size]) for i in range(0, len(points), size))


def _average(points: Sequence[Point]) -> Point:
    lows, highs = ([v for p in points if (v := getattr(p, side)) is not None] for side in ("low", "high"))
    return Point(
        points[-1].step,
        fmean(p.mean for p in points),
        fmean(lows) if lows else None,
        fmean(highs) if highs else None,
        min(p.count for p in points),
    )
