"""Recorded steps: the numbers of steps that are not, whatever changes from step to step; on the CPU by a tape."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from support import pair_states
from support.helpers import WORLD, advance, checkpoint_of, differing, draws_of, everything, tiny_config, tiny_state
from support.pair_states import make_state
from support.tape import TapeRecorder

from fmrun.runtime.errors import UserError
from fmrun.tasks import kind
from fmrun.train.cuda_graphs import WARM_UP, StepGraphs
from fmrun.train.state import State

STEPS = 14


def settings(**more: Any) -> dict[str, Any]:
    """A DCGAN in which everything changes from step to step that can."""
    return {
        "feature_matching__weight": 0.3,
        "feature_matching__ramp": 9,
        "losses__gan__ramp": 11,
        "optim__schedule": {"warmup_steps": 7},
        "log__every": 2,
        **more,
    }


CASES = {
    "balance and lazy r1": settings(
        feature_matching__balance="gradient",
        feature_matching__estimator="running",
        losses__gan__r1=1.0,
        losses__gan__penalty_every=3,
        optim__clip_grad_norm=0.5,
    ),
    "sliced": settings(feature_matching__match="sliced", train__augment=("color", "translation", "cutout")),
    "mmd and spectral": settings(feature_matching__match="mmd", discriminator__norm="spectral"),
    "simultaneous": settings(train__update="simultaneous", feature_matching__match="moments", losses__gan__r2=0.5),
    "updates in parts": settings(train__d_updates=2, train__g_updates=2, train__accumulate=2),
    "begins later": settings(losses__gan__start_step=5, feature_matching__ramp=0, losses__gan__type="hinge"),
}


def taped(state: State) -> State:
    state.record_with(TapeRecorder())
    return state


def pairs() -> tuple[State, State]:
    """The super-resolution pair with several losses, each with a start and a ramp of its own."""
    states = []
    for _ in range(2):
        state = make_state(
            losses={
                "charbonnier": {"ramp": 5},
                "hfen": {"start_step": 1, "ramp": 20, "weight": 0.2},
                "frequency": {"weight": 0.1, "ramp": 3},
                "gan": {"weight": 0.1, "ramp": 8},
            },
            feature_matching={"layers": ["all"], "balance": "gradient"},
            log={"every": 100},
        )
        states.append(state)
    return states[0], states[1]


def expected_replays(state: State, steps: int) -> int:
    return sum(max(0, n - WARM_UP) for n in Counter(state.task.plan(s) for s in range(steps)).values())


def same(a: State, b: State) -> None:
    assert differing(everything(a), everything(b)) == []
    assert a.window.read(WORLD) == b.window.read(WORLD)


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_steps_to_the_bit(name: str) -> None:
    plain, recorded = tiny_state(**CASES[name]), taped(tiny_state(**CASES[name]))
    for state in (plain, recorded):
        advance(state, STEPS)
    same(plain, recorded)
    assert recorded.graphs is not None
    assert recorded.graphs.replays == expected_replays(plain, STEPS) > 0


def test_recorded_steps_of_the_munet_pair_are_steps_to_the_bit() -> None:
    plain, recorded = pairs()
    taped(recorded)
    for state in (plain, recorded):
        pair_states.advance(state, 9)
    same(plain, recorded)
    assert recorded.graphs is not None
    assert recorded.graphs.replays == expected_replays(plain, 9) > 1


def test_a_resumed_run_warms_up_again_and_is_the_same_to_the_bit() -> None:
    case = CASES["balance and lazy r1"]
    whole, first, second = (taped(tiny_state(**case)) for _ in range(3))
    advance(whole, STEPS)
    advance(first, 8)
    second.restore(checkpoint_of(first))
    advance(second, STEPS - 8)
    whole.task.fit_average()
    second.task.fit_average()
    same(whole, second)


def test_each_plan_is_recorded_once_and_rare_ones_never() -> None:
    state = tiny_state(**settings(losses__gan__r1=1.0, losses__gan__penalty_every=5, log__every=1000))
    recorder = TapeRecorder()
    state.record_with(recorder)
    plans = [state.task.plan(s) for s in range(STEPS)]
    advance(state, STEPS)
    counts = Counter(plans)
    assert min(counts.values()) <= WARM_UP < max(counts.values())
    assert len(recorder.tapes) == sum(n > WARM_UP for n in counts.values())


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_the_guard_notes_the_step_of_an_update_that_was_replayed(update: str) -> None:
    state = taped(tiny_state(train__update=update, log__every=1000))
    advance(state, 6)
    assert state.graphs is not None
    assert state.graphs.replays > 0
    before = {n: p.clone() for n, p in state.task.generator.named_parameters()}
    draws = draws_of(state)
    draws[0][0].noise.view(-1)[0] = math.nan
    state.advance(draws)
    advance(state)
    bad = state.guard.read()
    assert bad is not None
    assert bad[0] == 6
    assert all(torch.equal(p, before[n]) for n, p in state.task.generator.named_parameters())


def test_what_a_step_gives_is_not_taken_for_the_next_ones() -> None:
    """Recorded results are written over; the log keeps sums of its own."""
    plain, recorded = (tiny_state(log__every=1000) for _ in range(2))
    taped(recorded)
    for state in (plain, recorded):
        advance(state, 8)
        state.window.read(WORLD)
        advance(state, 3)
    assert plain.window.read(WORLD) == recorded.window.read(WORLD)


def test_a_step_that_waits_for_the_device_cannot_be_recorded() -> None:
    state = taped(tiny_state(log__every=1000))
    forward = state.task.discriminators[0].net.forward

    def waits(image: torch.Tensor, *rest: Any) -> Any:
        float(image.detach().mean())
        return forward(image, *rest)

    state.task.discriminators[0].net.forward = waits
    advance(state, WARM_UP)
    with pytest.raises(
        UserError, match=r"cannot be recorded \(operation not permitted .* capturing\); leave cuda_graphs out"
    ):
        advance(state)


def test_batches_of_another_shape_are_no_input() -> None:
    state = taped(tiny_state())
    advance(state)
    other = draws_of(tiny_state(train__batch_size=6))
    with pytest.raises(AssertionError):
        state.advance(other)


def test_without_a_gpu_nothing_is_recorded_by_itself() -> None:
    assert State(tiny_config(cuda_graphs=True), torch.device("cpu"), WORLD).graphs is None
    assert StepGraphs(TapeRecorder()).replays == 0


def test_without_a_gpu_it_is_refused(workplace: Any) -> None:
    from support.commands import TINY, fmrun

    done = fmrun("train", *TINY, "-s", "cuda_graphs=true", "--device", "cpu")
    assert done.code == 2
    (error,) = done.errors
    assert error.endswith("is for one process on an NVIDIA GPU, and this run is on cpu; leave cuda_graphs out")


# On a GPU


def on_gpu(graphs: bool, **more: Any) -> State:
    config = tiny_config(**settings(device="cuda", cuda_graphs=graphs, **{"precision": "fp32", **more}))
    return State(config, torch.device("cuda", 0), WORLD)


GPU = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "sliced": {"feature_matching__match": "sliced"},
    "r1": {"losses__gan__r1": 1.0, "losses__gan__penalty_every": 2},
    "simultaneous": {"train__update": "simultaneous", "feature_matching__balance": "gradient"},
}


@pytest.fixture
def deterministic() -> Any:
    from fmrun.runtime.precision import set_determinism

    set_determinism(True, torch.device("cuda", 0))
    yield
    torch.use_deterministic_algorithms(False)


def gpu_advance(state: State, steps: int) -> None:
    for _ in range(steps):
        draws = [
            state.task.prepare(raw.to(state.device), state.step * state.batches_per_step + i)
            for i, raw in enumerate(raws_of(state))
        ]
        state.advance(draws)


def raws_of(state: State) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(state.step)
    blank = kind(state.config.task).blank(state.config, state.world, state.device)
    return [
        torch.randint(0, 256, tuple(blank.shape), generator=rng, dtype=torch.uint8)
        for _ in range(state.batches_per_step)
    ]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", GPU)
def test_graphs_are_the_eager_step_to_the_bit_over_20_steps_and_on_resume(name: str, deterministic: Any) -> None:
    plain, graphs = (on_gpu(g, **GPU[name]) for g in (False, True))
    for state in (plain, graphs):
        gpu_advance(state, 20)
    same(plain, graphs)
    assert graphs.graphs is not None
    assert graphs.graphs.replays == expected_replays(plain, 20)

    halves = on_gpu(True, **GPU[name])
    gpu_advance(halves, 11)
    resumed = on_gpu(True, **GPU[name])
    resumed.restore(checkpoint_of(halves))
    gpu_advance(resumed, 9)
    for state in (graphs, resumed):
        state.task.fit_average()
    assert differing(everything(graphs), everything(resumed)) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_step_waits_for_the_device(deterministic: Any) -> None:
    state = on_gpu(False, losses__gan__r1=1.0, losses__gan__penalty_every=2)
    gpu_advance(state, 2)
    raws = [[state.task.prepare(raw.to(state.device), 0)] for raw in raws_of(state)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.advance(raws[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_compiled_nets_are_recorded() -> None:
    state = on_gpu(True, compile=True)
    gpu_advance(state, 12)
    assert state.graphs is not None
    assert state.graphs.replays > 0
    assert all(math.isfinite(v) for v in state.window.read(WORLD).values())
