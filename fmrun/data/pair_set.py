"""One split of a super-resolution data set: N pairs of a low- and a high-resolution image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..config.degradation import DegradationConfig
from ..rng import numpy_generator
from .degrade import BICUBIC_MARGIN, MARGIN, Step, degrade, recipe
from .memory import available_ram
from .shelf import Packed, Shelf, Window
from .source import files_identity


@dataclass(frozen=True)
class PairInfo:
    """What a plan prints of a split."""

    name: str
    count: int
    channels: int
    scale: int
    smallest: tuple[int, int]
    """Height and width of the high-resolution image with the fewest pixels."""
    largest: tuple[int, int]
    """And with the most."""
    low: str
    """Where low-resolution images come from: `files`, `bicubic` or `chain`."""
    bytes: int
    """Size of all images decoded."""
    in_memory: bool
    """Whether they are decoded and in RAM already."""


class Spot(NamedTuple):
    """Where a patch lies in the low-resolution image, how it is turned, and what is done to it.

    Mirrored left to right after `turns` quarter turns. `steps` are the degradation's, where it is random.
    """

    top: int
    left: int
    turns: int = 0
    mirror: bool = False
    steps: tuple[Step, ...] | None = None


class Pairs:
    """N pairs, uint8; the high-resolution image is `scale` times the other, exactly.

    Args:
        name: what the data are called.
        high: high-resolution images.
        low: low-resolution images, or `None` if they are made from `high`.
        scale: factor between them.
        degradation: how `low` is, or was, made, or `None` if it came as files.
        marks: what changes when a pair of files does.
        files: the names and sizes in bytes of the files of each pair.
        left_out: high-resolution files of the same folder that are not among them, by name.
    """

    def __init__(
        self,
        name: str,
        high: Shelf,
        low: Shelf | None,
        scale: int,
        degradation: DegradationConfig | None,
        marks: list[str],
        files: list[tuple[tuple[str, int], ...]],
        left_out: tuple[str, ...] = (),
    ) -> None:
        assert low is not None or degradation is not None
        self.name, self.high, self.low, self.scale, self.degradation = name, high, low, scale, degradation
        self.marks, self.files, self.left_out = marks, files, left_out
        self._degraded: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.high)

    @property
    def names(self) -> list[str]:
        return self.high.names

    @property
    def channels(self) -> int:
        return self.high.channels

    @property
    def low_sizes(self) -> np.ndarray:
        """Heights and widths of the low-resolution images, int64 `(N, 2)`."""
        return self.high.sizes // self.scale

    @property
    def random(self) -> bool:
        """Whether a patch is degraded anew each time."""
        return self.low is None and self.degradation is not None and self.degradation.kind == "chain"

    @property
    def in_memory(self) -> bool:
        return isinstance(self.high, Packed) and (self.random or isinstance(self.low, Packed))

    @property
    def nbytes(self) -> int:
        """Size of all images decoded."""
        return self.high.nbytes + (self.low.nbytes if self.low is not None else 0)

    def patches(self, index: int, spots: Sequence[Spot], side: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of patches `(side, side, C)` and `(scale · side, scale · side, C)` of one pair of images, which is
        decoded once for all of them."""
        scale = self.scale
        inner = [Window(spot.top, spot.left, side, side) for spot in spots]
        if self.low is not None:
            lows = self.low.read(index, inner)
            highs = self.high.read(index, [_times(w, scale) for w in inner])
        else:
            outer = [self._with_margin(index, w) for w in inner]
            lows, highs = [], []
            for spot, i, o, wide in zip(
                spots, inner, outer, self.high.read(index, [_times(w, scale) for w in outer]), strict=True
            ):
                top, left = i.top - o.top, i.left - o.left
                low = degrade(wide, spot.steps or self.recipe(None), scale)
                lows.append(low[top : top + side, left : left + side])
                top, left, whole = top * scale, left * scale, side * scale
                highs.append(wide[top : top + whole, left : left + whole])
        return [(_turned(a, s), _turned(b, s)) for a, b, s in zip(lows, highs, spots, strict=True)]

    def recipe(self, rng: np.random.Generator | None) -> tuple[Step, ...]:
        """The steps from a high- to a low-resolution image; only random ones need `rng`."""
        assert self.degradation is not None
        return recipe(self.degradation, rng if rng is not None else np.random.default_rng(0))

    def whole(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair of whole images for validation, uint8 `(C, h, w)` and `(C, scale · h, scale · w)`.

        A random degradation depends on `index` alone: it is the same in every run, whatever its seed. Its
        result is kept in RAM where those of all images fit.
        """
        high = self.high.whole(index)
        if self.low is not None:
            return _planes(self.low.whole(index)), _planes(high)
        low = self._degraded.get(index)
        if low is None:
            low = degrade(high, self.recipe(numpy_generator(0, "degrade-valid", index)), self.scale)
            if self.high.nbytes // self.scale**2 <= available_ram() // 4:
                self._degraded[index] = low
        return _planes(low), _planes(high)

    def take(self, indices: np.ndarray) -> "Pairs":
        """The split made of these pairs, in this order."""
        low = None if self.low is None else self.low.take(indices)
        marks, files = [self.marks[i] for i in indices], [self.files[i] for i in indices]
        return Pairs(self.name, self.high.take(indices), low, self.scale, self.degradation, marks, files, self.left_out)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that changes when the data do, however they are kept."""
        digest = hashlib.sha256()
        for mark in self.marks:
            digest.update(f"{mark}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, int | str]:
        """What copying the files to another place does not change, as `Images.identity`."""
        return files_identity(len(self), [file for pair in self.files for file in pair])

    @property
    def info(self) -> PairInfo:
        order = self.high.sizes.prod(axis=1).argsort(kind="stable")
        smallest, largest = (tuple(self.high.sizes[i].tolist()) for i in (order[0], order[-1]))
        return PairInfo(
            name=self.name,
            count=len(self),
            channels=self.channels,
            scale=self.scale,
            smallest=smallest,
            largest=largest,
            low="files" if self.degradation is None else self.degradation.kind,
            bytes=self.nbytes,
            in_memory=self.in_memory,
        )

    def _with_margin(self, index: int, window: Window) -> Window:
        """A low-resolution window and what its degradation needs around it, as far as there is any."""
        assert self.degradation is not None
        margin = BICUBIC_MARGIN if self.degradation.kind == "bicubic" else MARGIN
        height, width = self.low_sizes[index].tolist()
        top, left = max(0, window.top - margin), max(0, window.left - margin)
        bottom = min(height, window.top + window.height + margin)
        right = min(width, window.left + window.width + margin)
        return Window(top, left, bottom - top, right - left)


def _times(window: Window, scale: int) -> Window:
    return Window(*(scale * side for side in window))


def _turned(patch: np.ndarray, spot: Spot) -> np.ndarray:
    patch = np.rot90(patch, spot.turns)
    return patch[:, ::-1] if spot.mirror else patch


def _planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
