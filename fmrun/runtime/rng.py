"""Randomness as a pure function of (seed, stream, position): nothing to save, nothing to restore.

A stream is a name (`"order"`, `"latent"`, …); a position is one or more integers (a step, an epoch, an image index).
What is drawn for a batch is drawn for the *global* batch and sliced, so that numbers do not depend on how many
processes or micro-batches share it.
"""

import zlib

import numpy as np
import torch


def _sequence(seed: int, stream: str, position: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(stream.encode()), *position])


def numpy_generator(seed: int, stream: str, *position: int) -> np.random.Generator:
    """A numpy generator for this stream and position."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, stream, position)))


def torch_generator(seed: int, stream: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` for this stream and position; making one does not touch the global generators."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(_sequence(seed, stream, position).generate_state(1, np.uint64)[0]) & (2**63 - 1))
    return generator
