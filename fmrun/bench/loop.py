"""The real training loop against the bare step: what data, logging, the moving average and all else between steps cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import runs
from ..config import Config
from ..dist import World
from ..loop import Session, Stop
from ..metrics.quick import QuickKid, extractor_name, why_not
from ..report import Reporter
from ..state import TASKS, State
from ..tasks import Batch
from .machine import wait
from .variants import bare_step, ordinary_step

CADENCES = {
    "read_out": "log.every",
    "grid": "log.sample_every",
    "checkpoint": "checkpoint.every",
    "held_out": "eval.every",
    "kid": "eval.kid_every",
}
"""What happens now and then between steps, and the setting that says how often."""


class Clock:
    """Seconds spent on each thing, as they came."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, list[float]] = {name: [] for name in CADENCES}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        wait(self.device)
        start = time.perf_counter()
        yield
        wait(self.device)
        self.times[name].append(time.perf_counter() - start)

    def spent(self) -> float:
        """On everything so far."""
        return sum(map(sum, self.times.values()))


class Paced(State):
    """A state whose steps are timed from one to the next, in turns with the same steps of a twin made bare.

    The loop's time runs from after a bare step to before the next one; what `clock` counted is taken out of it.
    """

    def __init__(self, config: Config, device: torch.device, clock: Clock, chunk: int):
        super().__init__(config, device, World())
        self.twin = State(config, device, World())
        self.clock, self.chunk = clock, chunk
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._open: tuple[float, float] | None = None
        self._first = self.step

    def advance(self, draws: list[list[Batch]]) -> None:
        if (self.step - self._first) % self.chunk == 0:
            self.close_interval()
            start = time.perf_counter()
            for k in range(self.chunk):
                bare_step(self.twin, draws, self.step + k)
            wait(self.device)
            now = time.perf_counter()
            self.bare.append((now - start) / self.chunk)
            self._open = (now, self.clock.spent())
        super().advance(draws)

    def begin(self, step: int) -> None:
        self.step = self._first = step

    def close_interval(self) -> None:
        wait(self.device)
        if self._open is not None:
            start, spent = self._open
            self.loop.append((time.perf_counter() - start - (self.clock.spent() - spent)) / self.chunk)
            self._open = None


class Watched(Session):
    """A session that knows how long its interruptions take."""

    clock: Clock

    def _row(self, log: bool, evaluate: bool, quick: bool) -> dict[str, Any] | None:
        if not log:
            return super()._row(log, evaluate, quick)
        with self.clock.timing("read_out"):
            return super()._row(log, evaluate, quick)

    def _preview(self) -> None:
        with self.clock.timing("grid"):
            super()._preview()

    def save(self) -> None:
        with self.clock.timing("checkpoint"):
            super().save()


def loop_cost(config: Config, device: torch.device, folder: Path, chunk: int, chunks: int) -> dict[str, Any]:
    """Train `config` for `chunks` times `chunk` steps beside a twin that makes its steps bare.

    Seconds per step of both (medians), `step_ratio` of a step of the loop in which nothing happens besides over a bare
    one, seconds of each interruption, and each one's share of the training time at the config's own cadence. `ratio` counts
    all of it.
    """
    probe = State(config, device, World())
    first = ordinary_step(probe)
    del probe
    often = 4 * chunk
    short = config.model_copy(
        update={
            "train": config.train.model_copy(update={"steps": first + chunk * chunks}),
            "log": config.log.model_copy(update={"every": often, "sample_every": often}),
            "checkpoint": config.checkpoint.model_copy(update={"every": often}),
            # held-out images and KID are measured by themselves below, for they take long
            "eval": config.eval.model_copy(update={"every": 0, "kid_every": 0}),
        }
    )
    _, train, valid = TASKS[config.task].open(config)
    clock = Clock(device)
    state = Paced(short, device, clock, chunk)
    state.begin(first)
    run = runs.create(folder, None, "bench", short.model_dump(mode="json"), ["fmrun", "bench"])
    session = Watched(run, state, train, valid, Reporter(quiet_rank=True), Stop(), resumed=False)
    session.clock = clock
    try:
        session.loop()
        state.close_interval()
        if valid is not None and config.eval.every:
            with clock.timing("held_out"), state.task.eager():
                state.task.held_out(train, valid, config.eval.num)
        extractor = extractor_name(config, device)
        if extractor is not None and why_not(config, train, extractor) is None:
            quick = QuickKid(config, extractor, train, state.task.generated, device, session.report.warn)
            quick()  # the first time does not count
            with clock.timing("kid"):
                state.fit_average()
                quick()
    finally:
        session.close()
    bare = median(state.bare)
    step_ratio = median(loop / alone for loop, alone in zip(state.loop, state.bare, strict=True))
    cadences = {"read_out": config.log.every, "grid": config.log.sample_every}
    cadences |= {"checkpoint": config.checkpoint.every, "held_out": config.eval.every, "kid": config.eval.kid_every}
    stalls: dict[str, dict[str, Any]] = {}
    for name, times in clock.times.items():
        if times and cadences[name]:
            each = median(times)
            stalls[name] = {
                "seconds": each,
                "steps": each / bare,
                "every": cadences[name],
                "setting": CADENCES[name],
                "share": each / (cadences[name] * bare * step_ratio),
            }
    share: float = sum(stall["share"] for stall in stalls.values())
    return {
        "bare_seconds": bare,
        "loop_seconds": median(state.loop),
        "step_ratio": step_ratio,
        "stalls": stalls,
        "stall_share": share,
        "ratio": step_ratio * (1 + share),
    }
