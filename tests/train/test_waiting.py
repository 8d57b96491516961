"""Every kind of training step runs without waiting for the device, and without a tensor that is not on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import advance, draws_of, tiny_state
from support.pair_states import draws_of as pair_draws
from support.pair_states import make_state
from support.waiting import Refused, nothing_waits

from fmrun.runtime.rng import torch_generator

STEPS = 4

GENERATE: dict[str, dict[str, Any]] = {
    "plain": {"feature_matching__weight": 0.0},
    **{match: {"feature_matching__match": match} for match in ("sample", "mean", "moments", "coral", "mmd", "sliced")},
    "mmd rbf": {"feature_matching__match": "mmd", "feature_matching__kernel": "rbf"},
    "unbiased": {"feature_matching__estimator": "unbiased"},
    "running": {"feature_matching__estimator": "running"},
    "charbonnier": {"feature_matching__criterion": "charbonnier", "feature_matching__elements": "sum"},
    "balance": {"feature_matching__balance": "gradient", "feature_matching__ramp": 3},
    **{loss: {"losses__gan__type": loss} for loss in ("lsgan", "hinge", "wgan")},
    "r3gan": {
        "losses__gan__type": "r3gan",
        "losses__gan__r1": 1.0,
        "losses__gan__r2": 1.0,
        "losses__gan__penalty_every": 2,
    },
    **{norm: {"discriminator__norm": norm, "losses__gan__r1": 1.0} for norm in ("spectral", "group", "none")},
    "augment": {"train__augment": ("color", "translation", "cutout")},
    "accumulate": {"train__accumulate": 2, "train__d_updates": 2, "train__g_updates": 2},
    "accumulate sample": {"train__accumulate": 2, "feature_matching__match": "sample"},
    "simultaneous": {"train__update": "simultaneous", "feature_matching__balance": "gradient", "losses__gan__r1": 1.0},
    "clip, schedule": {"optim__clip_grad_norm": 0.1, "optim__schedule": {"warmup_steps": 3}},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16", "feature_matching__balance": "gradient", "losses__gan__r1": 1.0},
}

LOSSES = {
    **{
        "charbonnier": {},
        "l1": {"weight": 0.1},
        "l2": {"weight": 0.1, "reduction": "sum"},
        "frequency": {"weight": 0.1},
    },
    **{"hfen": {"weight": 0.2}, "gan": {"weight": 0.1}},
}

UPSCALE: dict[str, dict[str, Any]] = {
    "munet": {},
    "every loss": {"losses": LOSSES},
    "gradient branch, penalties": {
        "discriminator": {"gradient_branch": True},
        "losses": {"charbonnier": {}, "gan": {"weight": 0.1, "r1": 1.0, "r2": 1.0}},
    },
    "simultaneous": {"train": {"update": "simultaneous"}, "feature_matching": {"balance": "gradient"}},
    "accumulate": {"train": {"accumulate": 2}},
    "bf16": {"precision": "bf16", "losses": LOSSES},
    "unet": {"discriminator": {"type": "unet"}},
    "patchgan": {"discriminator": {"type": "patchgan", "norm": "instance", "blocks": 2}},
}


def settings(own: dict[str, Any]) -> dict[str, Any]:
    return {"feature_matching__weight": 0.3, "feature_matching__layers": ["all"], "log__every": 1000, **own}


@pytest.mark.parametrize("name", GENERATE)
def test_a_step_of_images_from_noise(name: str) -> None:
    state = tiny_state(**settings(GENERATE[name]))
    for _ in range(STEPS):
        draws = draws_of(state)
        with nothing_waits():
            state.advance(draws)


@pytest.mark.parametrize("name", UPSCALE)
def test_a_step_of_super_resolution(name: str) -> None:
    state = make_state(**UPSCALE[name])
    for _ in range(STEPS):
        draws = pair_draws(state)
        with nothing_waits():
            state.advance(draws)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x * x.mean().item(), "item"),
        (lambda x: x if x.mean() < 9 else -x, "__bool__"),
        (lambda x: x + torch.zeros(1, dtype=x.dtype), "torch.zeros without a device"),
        (lambda x: x + torch.tensor(0.0, dtype=x.dtype), "torch.tensor without a device"),
        (
            lambda x: x + 0 * torch.randn(1, generator=torch.Generator(), device=x.device, dtype=x.dtype),
            "made without a device",
        ),
        (
            lambda x: x + 0 * torch.randn(1, generator=torch_generator(0, "init", 0), device=x.device, dtype=x.dtype),
            "made without a device",
        ),
        (lambda x: x * (x.nonzero().shape[0] > 0), "nonzero waits"),
        (lambda x: x * float(x.mean()) ** 0, "__float__"),
    ],
)
def test_what_a_gpu_would_wait_for_is_found(wrong: Any, words: str) -> None:
    """Put into the discriminator's forward."""
    state = tiny_state(**settings({}))
    advance(state)
    forward = state.task.discriminators[0].net.forward
    state.task.discriminators[0].net.forward = lambda image, *rest: forward(wrong(image), *rest)
    draws = draws_of(state)
    with pytest.raises(Refused, match=words), nothing_waits():
        state.advance(draws)
