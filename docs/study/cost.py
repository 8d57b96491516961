"""What each condition of the study costs: time of a training step over that of a plain one, in interleaved rounds.

    python docs/study/cost.py > docs/study/cost.json

Rounds take turns, so that what else runs on the machine slows all conditions alike.
"""

from __future__ import annotations

import json
import os
import time
from statistics import median
from typing import Any

import torch

from fmrun.config.presets import Override, resolve
from fmrun.runtime.dist import World
from fmrun.runtime.environment import cpu_model
from fmrun.train.state import State

MATCHES = ("sample", "mean", "moments", "mmd", "sliced")
ROUNDS, STEPS = 15, 8


def state_of(preset: str, *settings: str) -> State:
    overrides = [Override("-s", *setting.split("=", 1)) for setting in (*settings, "data.channels=1", "log.every=1000")]
    return State(resolve(preset, None, overrides), torch.device("cpu"), World())


def seconds(state: State, raw: torch.Tensor) -> float:
    """Of a step, mean over STEPS."""
    start = time.perf_counter()
    for _ in range(STEPS):
        state.advance([state.task.prepare(raw, state.step)])
    return (time.perf_counter() - start) / STEPS


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    states = {"plain": state_of("dcgan")}
    states |= {match: state_of("dcgan-fm", f"feature_matching.match={match}") for match in MATCHES}
    raw = torch.randint(256, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for state in states.values():
        for _ in range(20):  # the balance is measured at each of the first steps, and seldom after
            state.advance([state.task.prepare(raw, state.step)])
    times: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(ROUNDS):
        for name, state in states.items():
            times[name].append(seconds(state, raw))
    ratios = {name: [t / plain for t, plain in zip(own, times["plain"], strict=True)] for name, own in times.items()}
    return {
        "processor": cpu_model(),
        "threads": 1,
        "load": os.getloadavg()[0],
        "rounds": ROUNDS,
        "over_plain": {name: round(median(values), 3) for name, values in ratios.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
