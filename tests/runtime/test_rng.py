"""Random streams: pure functions of seed, name and position."""

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrun.runtime.rng import numpy_generator, torch_generator

PLACE = st.tuples(st.integers(0, 2**62), st.sampled_from(["order", "latent", "own nets"]), st.integers(0, 2**40))


def draw(place: tuple[int, str, int]) -> list[float]:
    seed, stream, position = place
    return torch.rand(4, generator=torch_generator(seed, stream, position)).tolist()


@settings(max_examples=50, deadline=None)
@given(PLACE, PLACE)
def test_different_places_draw_different_numbers_and_equal_ones_the_same(a, b):
    assert draw(a) == draw(a)
    assert (draw(a) == draw(b)) == (a == b)


def test_positions_of_two_numbers_are_not_mixed_up():
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (10, 1), (1, 10), (0, 110)]
    values = [numpy_generator(0, "directions", *p).random() for p in places]
    values += [torch.rand((), generator=torch_generator(0, "directions", *p)).item() for p in places]
    assert len(set(values)) == len(values)


def test_neighbouring_streams_are_uncorrelated():
    rows = torch.stack([torch.randn(4000, generator=torch_generator(0, "latent", i)) for i in range(8)])
    off = torch.corrcoef(rows) - torch.eye(8)
    assert off.abs().max() < 0.08


def test_global_generators_are_neither_read_nor_moved():
    def drawn() -> list[float]:
        return [
            *torch.rand(3, generator=torch_generator(1, "latent", 2)).tolist(),
            numpy_generator(1, "flip", 2).random(),
        ]

    first = drawn()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert drawn() == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
