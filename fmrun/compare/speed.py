"""How fast runs trained, and whether that says what a step of theirs costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from ..runs import Run
from .curves import Series

MACHINE = ("processor", "gpus", "cores", "threads")
"""What of env.json must be equal for speeds to be compared."""

VERSIONS = ("fmrun", "torch")
"""What else must be, for their ratio to be the cost of a step."""

STEADY = 1.25
"""Where speeds of one setting vary by more than this factor, something else was at work on the machine."""

ENOUGH = 8
"""Read-outs of a run from which its quartiles are taken."""


@dataclass(frozen=True)
class Speed:
    """Of the runs of a group."""

    median: float | None
    """Images per second: the median over read-outs, and over runs."""
    spread: float | None
    """The largest factor between medians of runs, or between quartiles of one run's read-outs."""
    conditions: frozenset[str]
    """JSON of machine, device and versions; one where all runs had the same."""

    @property
    def steady(self) -> bool:
        return self.spread is not None and self.spread <= STEADY


def machine(run: Run) -> str:
    """JSON of the machine that a run trained on."""
    env = run.env()
    return json.dumps([env.get(key) for key in MACHINE])


def speed(runs: Sequence[Run], rows: Sequence[Series], config: Mapping[str, Any]) -> Speed:
    """Of the runs of a group with this config, from their images per second by step."""
    # the first read-out holds compilation and the filling of caches
    values = [list(own.values())[1:] or list(own.values()) for own in rows if own]
    medians = [median(own) for own in values]
    spreads = [max(medians) / min(medians)] if medians and min(medians) > 0 else []
    for own in values:
        if len(own) >= ENOUGH and (quartiles := quantiles(own, n=4))[0] > 0:
            spreads.append(quartiles[2] / quartiles[0])
    found = set()
    for run in runs:
        env = run.env()
        device = config.get("device") if env.get("gpus") else "cpu"
        found.add(json.dumps([machine(run), device, *(env.get(key) for key in VERSIONS)]))
    return Speed(median(medians) if medians else None, max(spreads, default=None), frozenset(found))


def step_cost(own: Speed, batch: int | None, control: Speed, control_batch: int | None) -> float | None:
    """Time per step relative to the control's; None where their conditions differ, or speeds varied too much to tell."""
    if len(own.conditions | control.conditions) > 1 or not (own.steady and control.steady):
        return None
    if not (batch and control_batch and own.median and control.median):
        return None
    return batch / own.median / (control_batch / control.median)
