"""Activations computed again in the backward pass: the same numbers, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import WORLD, Calls, differing, everything, flops
from pair_states import advance, draws_of, make_state

from fmrun.bench.count import StepCounter
from fmrun.config import Config
from fmrun.models.munet import MUNet
from fmrun.state import State

FULL = {"layers": ["all"], "match": "moments", "criterion": None, "balance": "gradient"}


def both(**sections: Any) -> tuple[State, State]:
    """A state that keeps its activations, and one that computes them again."""
    net = sections.pop("discriminator", {})
    kept, again = (make_state(discriminator={**net, "recompute": r}, **sections) for r in (False, True))
    return kept, again


@pytest.mark.parametrize(
    "sections",
    [
        {"feature_matching": FULL, "discriminator": {"gradient_branch": True}},
        {"feature_matching": FULL, "train": {"update": "simultaneous"}},
        {"losses": {"l1": {}, "gan": {"type": "r3gan", "r1": 1.0, "r2": 0.5}}, "train": {"augment": ["color"]}},
        {"losses": {"l1": {}, "gan": {"r1": 2.0}}, "train": {"update": "simultaneous"}},
        {"train": {"accumulate": 2}, "feature_matching": FULL},
        {"precision": "bf16"},
    ],
    ids=["all layers", "simultaneous", "r3gan", "r1", "accumulate", "bf16"],
)
def test_steps_are_the_same_to_the_bit(sections: dict[str, Any]) -> None:
    """Gradients, penalties differentiated twice, spectral norms and all that follows."""
    kept, again = both(**sections)
    assert again.task.discriminators[0].net.recompute
    for state in (kept, again):
        advance(state)
    assert differing(everything(kept), everything(again)) == []
    assert kept.window.read(WORLD) == again.window.read(WORLD)


def test_a_step_holds_less_memory_and_computes_more() -> None:
    kept, again = (
        make_state(discriminator={"width": 8, "recompute": r}, data={"patch_size": 64}, precision="fp32")
        for r in (False, True)
    )
    counters = []
    for state in (kept, again):
        advance(state)
        state.step = 50
        with StepCounter() as counter:
            state.advance(draws_of(state))
        counters.append(counter)
    assert counters[1].peak < 0.7 * counters[0].peak
    assert counters[0].flops < counters[1].flops < 1.5 * counters[0].flops


def test_only_what_goes_in_and_out_of_the_parts_is_kept() -> None:
    def kept(recompute: bool) -> int:
        rng = torch.Generator().manual_seed(0)
        net, storages = MUNet(3, 4, rng, gradient=True, recompute=recompute).requires_grad_(False), {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        image = torch.rand(2, 3, 64, 64, generator=rng).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(image)
        del out
        return sum(storage.nbytes() for storage in storages.values())

    assert kept(True) < 0.4 * kept(False)


def test_passes_without_a_graph_are_run_once() -> None:
    _, again = both(feature_matching={"layers": ["enc1"]})
    advance(again)
    net, image = again.task.discriminators[0].net, draws_of(again)[0][0].real
    calls = Calls(net)
    with torch.no_grad():
        once = flops(lambda: net(image))
        net.recompute = False
        assert flops(lambda: net(image)) == once > 0
    assert len(calls) == 2


def test_compile_excludes_it() -> None:
    sections = {"discriminator": {"type": "munet", "norm": "spectral", "recompute": True}, "compile": True}
    with pytest.raises(ValueError, match="leave one out"):
        Config.model_validate({"task": "upscale", "generator": {"type": "compact"}, **sections})
