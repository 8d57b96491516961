"""CUDA graphs: a step is recorded once for each plan, and from then on its kernels are launched all together.

What a recorded step reads has to stay where it was: batches are copied to one place, the step's numbers are `StepScalars`
scalars, learning rates and loss scales are tensors, and random directions are drawn outside, into memory that stays.
What decides which kernels run is the plan; steps of another plan are another recording. All else that a step changes
(weights, moments, averages, the balance, what the guard saw) it changes in place, so recorded steps and others can follow
each other in any order, and give the same numbers.

Steps of a new plan run as ever for a while, which warms up what may not be done for the first time in a recording: choice
of algorithms, moments of Adam, compilation. Rare plans are never recorded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..runtime.errors import UserError
from ..tasks import Batch, StepPlan
from .step import StepLog

T = TypeVar("T")
Batches = list[list[Batch]]

WARM_UP = 3
"""Steps of a plan that run unrecorded first, as torch's notes on whole-network capture advise."""


class Recorder(Protocol):
    """What runs work, and records it."""

    def run(self, work: Callable[[], T]) -> T:
        """`work()`, where recordings are made too."""
        ...

    def record(self, work: Callable[[], StepLog]) -> tuple[StepLog, Callable[[], None]]:
        """Record `work` without doing it: the tensors that its results will be in, and what does it."""
        ...


class CudaRecorder:
    """Records on a stream of its own; all recordings share their memory, as no two are ever under way together."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], T]) -> T:
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = work()
        outside.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], StepLog]) -> tuple[StepLog, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # threads that pin decoded images go on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            terms = work()
        return terms, graph.replay


class StepGraphs:
    """Steps, each recorded once its plan has come often enough, and replayed from then on."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.replays = 0
        self._seen: Counter[StepPlan] = Counter()
        self._recorded: dict[StepPlan, tuple[StepLog, Callable[[], None]]] = {}
        self._inputs: Batches | None = None

    def run(self, plan: StepPlan, batches: Batches, work: Callable[[Batches], StepLog]) -> StepLog:
        """`work(batches)`, a step of this plan. The next step writes over the tensors returned."""
        inputs = self._take(batches)
        if plan not in self._recorded:
            self._seen[plan] += 1
            if self._seen[plan] <= WARM_UP:
                return self.recorder.run(lambda: work(inputs))
            try:
                self._recorded[plan] = self.recorder.record(lambda: work(inputs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(
                    f"cuda_graphs: a step of this run cannot be recorded ({str(error).splitlines()[0]}); leave cuda_graphs "
                    "out"
                ) from error
        terms, replay = self._recorded[plan]
        replay()
        self.replays += 1
        return StepLog(terms)

    def _take(self, batches: Batches) -> Batches:
        """The batches, in the place where recorded steps look for them."""
        if self._inputs is None:
            self._inputs = copy.deepcopy(batches)
        for kept, value in zip(_tensors(self._inputs), _tensors(batches), strict=True):
            assert kept.shape == value.shape
            kept.copy_(value)
        return self._inputs


def _tensors(batches: Batches) -> list[Tensor]:
    values = [(b.real, b.noise, b.condition, b.augment) for micro_batches in batches for b in micro_batches]
    return [tensor for tensors in values for tensor in tensors if tensor is not None]
