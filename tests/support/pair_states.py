"""Tiny super-resolution pairs and made-up patches, without a command or a file."""

from __future__ import annotations

from typing import Any

import torch
from support.helpers import WORLD
from torch import nn

from fmrun.config.schema import Config
from fmrun.data.feed import PairBatch
from fmrun.train.state import State

CPU = torch.device("cpu")


def make_state(**sections: Any) -> State:
    """A tiny pair in float64; `losses={...}` replaces the default, one pixel loss and the adversarial one."""
    tree: dict[str, Any] = {
        "task": "upscale",
        "precision": "fp64",
        "device": "cpu",
        "data": {"path": "photographs", "patch_size": 32, "channels": 3},
        "generator": {"type": "compact", "features": 4, "blocks": 1},
        "discriminator": {"type": "munet", "norm": "spectral", "width": 4},
        "losses": {"charbonnier": {"weight": 1.0}, "gan": {"weight": 0.1}},
        "feature_matching": {"weight": 0.1, "match": "sample", "criterion": "l1", "layers": ["key"]},
        "train": {"batch_size": 4},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) and name != "losses" else value
    return State(Config.model_validate(tree), CPU, WORLD)


class Patches:
    """A feed of smooth pairs; draw number d always has the same."""

    def __init__(self, state: State) -> None:
        self.data, self.size = state.config.data, state.config.train.batch_size

    def batch(self, draw: int) -> PairBatch:
        rng, n = torch.Generator().manual_seed(draw), self.data.patch_size
        coarse = torch.rand(self.size, self.data.channels, n // 8, n // 8, generator=rng)
        high = (255 * nn.functional.interpolate(coarse, size=(n, n), mode="bicubic").clamp(0, 1)).to(torch.uint8)
        scale = self.data.scale
        low = nn.functional.avg_pool2d(high.float(), scale).to(torch.uint8)
        return PairBatch(low, high)


def draws_of(state: State) -> list[list[Any]]:
    return state.prepare(Patches(state), state.step)


def advance(state: State, count: int = 1) -> None:
    for _ in range(count):
        state.advance(draws_of(state))
