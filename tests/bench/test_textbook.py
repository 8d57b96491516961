"""The fast step gives what the simple one gives: passes of their own for everything, NCHW, and one graph for each loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import pair_states
from support.helpers import WORLD, draws_of, tiny_state
from support.pair_states import make_state
from torch import Tensor, nn

from fmrun.feature_matching.statistics import STATISTICS, random_directions
from fmrun.models.norm import advance_spectral
from fmrun.runtime.rng import torch_generator
from fmrun.train.state import State

MATCHES = ("sample", "mean", "moments", "coral", "mmd", "sliced")
WEIGHT = 30.0
"""Strong enough that the matching gradient is no rounding error beside the adversarial one."""


def dcgan(match: str, precision: str, update: str) -> State:
    return tiny_state(
        precision=precision,
        feature_matching__weight=WEIGHT,
        feature_matching__match=match,
        feature_matching__layers="all",
        feature_matching__measure_every=1000,
        train__update=update,
        train__batch_size=16,
    )


def munet(match: str, precision: str, update: str) -> State:
    fm = {"weight": WEIGHT, "match": match, "criterion": None, "layers": ["all"], "measure_every": 1000}
    losses = {"gan": {"weight": 1.0}}
    return make_state(precision=precision, feature_matching=fm, losses=losses, train={"update": update})


PAIRS = {"dcgan": (dcgan, draws_of), "munet": (munet, pair_states.draws_of)}


def contiguous(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.contiguous_format)


def distance(state: State, match: str, real: dict[str, Tensor], fake: dict[str, Tensor]) -> Tensor:
    """Mean over layers of the statistic of each."""
    total: Any = 0.0
    for i, name in enumerate(real):
        drawn = None
        if match == "sliced":
            rng = torch_generator(state.config.seed, "directions", 0, i)
            drawn = random_directions(
                64, real[name][0].numel(), rng, torch.promote_types(real[name].dtype, torch.float32)
            )
        total = total + STATISTICS[match](real[name].detach(), fake[name], ranks=WORLD, directions=drawn) / len(real)
    return total


def textbook(twin: State, state: State, batch: Any, match: str, update: str) -> list[list[Tensor]]:
    """Gradients of both nets, from a step whose optimiser is the fast one's."""
    d, generator = contiguous(twin.task.discriminators[0].net), contiguous(twin.task.generator)
    half = twin.task.precision == torch.bfloat16
    advance_spectral(d)
    real = batch.real.contiguous()

    def judge(image: Tensor, taps: tuple[str, ...] = ()) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return d(image, taps)

    def logits(image: Tensor) -> Tensor:
        found = judge(image).logits
        return found.float() if half else found

    def generate() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            image = generator(batch.noise if batch.noise is not None else (batch.condition.contiguous() + 1) / 2)
        image = image.float() if half else image
        return image if batch.noise is not None else image * 2 - 1

    d_loss = F.softplus(-logits(real)).mean() + F.softplus(logits(generate().detach())).mean()
    d_gradients = torch.autograd.grad(d_loss, list(d.parameters()))
    if update == "alternating":
        d.load_state_dict(state.task.discriminators[0].net.state_dict())
    adversarial = F.softplus(-logits(generate())).mean()
    layers = d.feature_names
    matched = distance(state, match, judge(real, layers).features, judge(generate(), layers).features)
    g_gradients = torch.autograd.grad(adversarial + WEIGHT * matched, list(generator.parameters()))
    return [list(d_gradients), list(g_gradients)]


def gradients(pair: str, match: str, precision: str, update: str, *others: str) -> list[list[Tensor]]:
    """Of the discriminator and of the generator, flat: the fast step's in this precision, the textbook's in others."""
    make, draws = PAIRS[pair]
    state = make(match, precision, update)
    batch = draws(state)[0][0]
    state.advance([[batch]])
    nets = (state.task.discriminators[0].net, state.task.generator)
    flat = [[torch.cat([p.grad.double().flatten() for p in net.parameters()])] for net in nets]
    for other in others:
        twin = make(match, other, update)
        cast = {name: None if v is None else v.to(twin.task.dtype) for name, v in vars(batch).items()}
        for parts, slow in zip(flat, textbook(twin, state, type(batch)(**cast), match, update), strict=True):
            parts.append(torch.cat([g.double().contiguous().flatten() for g in slow]))
    return flat


@pytest.mark.parametrize(
    ("pair", "match", "update"),
    [
        *((pair, match, "alternating") for pair in PAIRS for match in MATCHES),
        *(("munet", match, "simultaneous") for match in ("sample", "mean")),
    ],
)
def test_gradients_in_float64(pair: str, match: str, update: str) -> None:
    for fast, slow in gradients(pair, match, "fp64", update, "fp64"):
        assert (fast - slow).norm() <= 1e-9 * slow.norm()


@pytest.mark.parametrize("match", ["sample", "mean", "mmd"])
@pytest.mark.parametrize("pair", PAIRS)
def test_bfloat16_gradients_are_as_accurate_as_the_textbooks(pair: str, match: str) -> None:
    for fast, slow, truth in gradients(pair, match, "bf16", "alternating", "bf16", "fp64"):
        error = (slow - truth).norm()
        assert 0 < error < truth.norm()
        assert (fast - truth).norm() <= 1.5 * error
