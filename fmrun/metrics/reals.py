"""The real images that generated ones are measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.store import Images
from ..runtime.errors import UserError
from ..runtime.rng import numpy_generator
from .distribution import LEAST

PART = 1024
"""Images decoded at a time."""


@dataclass(frozen=True)
class Share:
    """Some images of a set, in an order that depends on how many the set has and on nothing else."""

    images: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def parts(self) -> Iterator[Tensor]:
        """The images, uint8 (n, C, H, W), a few at a time."""
        for start in range(0, len(self), PART):
            yield self.images.read(self.indices[start : start + PART])

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of shape and pixels."""
        digest = hashlib.sha256()
        for chunk in self.parts():
            digest.update(repr(tuple(chunk.shape)).encode())
            digest.update(chunk.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reals:
    """What is measured against: `reference`, and two sets without a common image whose distance is the floor.

    Attributes:
        reference: as many images as will be generated, or all there are.
        floor: the two sets; the second is the reference where there are enough images.
        name: what the reference is, for a human: `bundled:fashion-mnist, held out`.
        floor_name: what the floor was measured on.
    """

    reference: Share
    floor: tuple[Share, Share]
    name: str
    floor_name: str


def choose_reals(name: str, train: Images, valid: Images | None, count: int) -> Reals:
    """The real images to measure `count` generated ones against: out of `valid` where there is such a set, else of
    `train`. Raises UserError where there are too few. `name` is what scores call them."""
    pool = valid if valid is not None else train
    if len(pool) < 2 * LEAST:
        raise UserError(
            f"{name}: {len(pool)} real images are too few to measure against, at least {2 * LEAST} are needed; give "
            "others with --data"
        )
    order = shuffled(len(pool))
    size = min(count, len(pool))
    reference = Share(pool, order[:size])
    if len(pool) >= 2 * size:
        rest = Share(pool, order[size : 2 * size])
        return Reals(reference, (rest, reference), name, f"{size} others of the same set")
    if valid is not None and len(train) >= size:
        learned = Share(train, shuffled(len(train))[:size])
        return Reals(reference, (learned, reference), name, f"{size} images of the training set")
    half = len(pool) // 2
    halves = Share(pool, order[:half]), Share(pool, order[half : 2 * half])
    return Reals(reference, halves, name, f"two halves of {half} images each")


def share(images: Images, count: int) -> Share:
    """`count` images of a set, or all there are: the same whatever they are asked for."""
    return Share(images, shuffled(len(images))[:count])


def apart(images: Images, count: int) -> Share:
    """`count` images of a set, as far as there are others than those that `share` and `choose_reals` take."""
    return Share(images, shuffled(len(images))[-count:])


def shown(path: str) -> str:
    """A path as scores name it: without the folders of this machine."""
    return path if path.startswith(("bundled:", "torchvision:")) else Path(path).name


def shuffled(count: int) -> np.ndarray:
    """The order in which images of a set of so many are taken to be measured: not that of their files, which are sorted."""
    return numpy_generator(0, "eval", count).permutation(count)
