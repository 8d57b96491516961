"""Which images are measured: drawn, for files lie sorted, and others than those that a choice was made by."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import tiny_state

from fmrun.data.store import Images
from fmrun.metrics.reals import apart, choose_reals, share
from fmrun.tasks.generate import GenerateMonitor
from fmrun.tasks.upscale import restored


class Watched(Images):
    """Remembers which images were asked for."""

    def __init__(self, count: int, size: int = 28) -> None:
        blank = Images.of_array("watched", np.zeros((count, size, size, 1), np.uint8))
        super().__init__(**{field.name: getattr(blank, field.name) for field in fields(blank) if field.init})
        self.asked: list[int] = []

    def read(self, indices: Any) -> torch.Tensor:
        self.asked += [int(i) for i in indices]
        return super().read(indices)


def test_the_discriminators_logits_are_measured_on_drawn_images() -> None:
    """Not on the first files: a folder with a sub-folder a class begins with one class."""
    state = tiny_state(train__batch_size=8)
    size = state.config.data.image_size
    train, valid = Watched(300, size), Watched(60, size)
    data = SimpleNamespace(train=train, valid=valid)
    GenerateMonitor(state.task, data).held_out(24)  # type: ignore[arg-type]
    for images in (train, valid):
        assert len(images.asked) == len(set(images.asked)) == 24
        assert images.asked == share(images, 24).indices.tolist()
        assert max(images.asked) > 24


@pytest.mark.parametrize("held_out", [True, False])
def test_what_chooses_the_best_checkpoint_is_not_what_it_is_scored_on(held_out: bool) -> None:
    train, valid = Watched(3000), Watched(600) if held_out else None
    quick = apart(train, 500)
    reals = choose_reals("images", train, valid, 1000)
    for scored in (reals.reference, *reals.floor):
        if scored.images is train:
            assert not set(quick.indices.tolist()) & set(scored.indices.tolist())
    assert len(quick) == 500


def test_photographs_are_drawn_too() -> None:
    asked = []

    class Pairs:
        scale = 2

        def __len__(self) -> int:
            return 40

        def pair(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(index)
            rng = np.random.default_rng(index)
            high = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))
            return high[:, ::2, ::2], high

    told: list[tuple[int, int]] = []

    def enlarged(low: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(low[None] / 255, scale_factor=2)

    restored(enlarged, Pairs(), 5, {}, lambda done, total: told.append((done, total)))  # type: ignore[arg-type]
    assert asked == sorted(asked)
    assert len(set(asked)) == 5
    assert max(asked) > 5
    assert told == [(i, 5) for i in range(1, 6)]
