"""fmrun's own steps: bare ones, on random images in memory, and those of its training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..config.schema import Config
from ..runs import folder as runs
from ..runtime.dist import World
from ..runtime.report import Reporter
from ..tasks import Batch, Data, kind
from ..train.loop import Session, Stop
from ..train.state import State
from .timing import quotients, wait


def ordinary_step(state: State) -> int:
    """A step at which every loss acts, and neither the gradient share is measured nor anything logged."""
    step = state.config.full_step
    while (plan := state.task.plan(step)).log_diversity or plan.discriminators[0].measure:
        step += 1
    return step


class OwnStep:
    """fmrun's step of a config, made again and again at the same step of a run, on random images."""

    def __init__(self, config: Config, device: torch.device):
        self.precision = config.precision
        self.state = State(config, device, World())
        self.at = ordinary_step(self.state)
        self.layers = self.state.task.plan(self.at).discriminators[0].layers
        blank = kind(config.task).blank(config, self.state.world, device)
        images = tree_map(lambda like: torch.randint_like(like, 256), blank)
        (self.batch,) = self.state.task.prepare(images, 0)

    def __call__(self) -> None:
        self.state.step = self.at
        self.state.advance([[self.batch]])

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, nothing is compiled or replayed, so that every operation is seen."""
        graphs, self.state.graphs = self.state.graphs, None
        with self.state.task.eager():
            yield
        self.state.graphs = graphs

    def forwards(self) -> dict[str, Callable[[], Tensor]]:
        """A forward of each net."""
        task, batch = self.state.task, self.batch
        image = task.generate(batch).detach()

        def logits() -> Tensor:
            output = task.discriminators[0](image, None).logits
            assert isinstance(output, Tensor)
            return output

        return {"discriminator": logits, "generator": lambda: task.generate(batch)}


class TimedState(State):
    """The state of a run that notes when each of its steps begins and ends."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device, World())
        self.begun: list[float] = []
        self.ended: list[float] = []

    def advance(self, batches: list[list[Batch]]) -> None:
        wait(self.device)
        self.begun.append(time.perf_counter())
        super().advance(batches)
        wait(self.device)
        self.ended.append(time.perf_counter())


def training_cost(config: Config, data: Data, device: torch.device, folder: Path, steps: int) -> dict[str, Any]:
    """Train `config` for some steps in a run in `folder`. Gives

    - `loop_over_step`: time from the beginning of one step to the next over that of the step itself, median
    - `pause_seconds`: one read-out, measurement on held-out images, grid and checkpoint together
    - `pause_every`: steps between them, if all come as often as the most frequent of the last three
    - `over_step`: training, with these pauses and without KID, over its steps alone
    """
    last = config.full_step + steps
    often = (config.log.sample_every, config.checkpoint.every, config.eval.every)
    sections = {"train": {"steps": last}, "log": {"every": last, "sample_every": 0}, "checkpoint": {"every": last}}
    sections["eval"] = {"every": last if config.eval.every else 0, "kid_every": 0}
    changed = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    config = config.model_copy(update=changed)
    state = TimedState(config, device)
    state.step = config.full_step
    run = runs.create(folder, None, "bench", config.model_dump(mode="json"), ["fmrun", "bench"])
    monitor = kind(config.task).monitor(state.task, data)
    session = Session(run, state, data, monitor, Reporter(quiet_rank=True), Stop(), resumed=False)
    try:
        session.loop()
        pause = time.perf_counter() - state.ended[-1]
    finally:
        session.close()
    step = [end - begin for begin, end in zip(state.begun, state.ended, strict=True)]
    loop = [later - begin for begin, later in pairwise(state.begun)]
    ratio, every = median(quotients(loop, step[:-1])), min(n for n in often if n)
    return {
        "loop_over_step": ratio,
        "pause_seconds": pause,
        "pause_every": every,
        "over_step": ratio + pause / (every * median(step)),
    }
