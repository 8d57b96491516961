"""N images, uint8, each of its own size: packed one after the other in one tensor, or decoded from files when read; by
themselves, or each with the low-resolution image that belongs to it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config.degradation import DegradationConfig
from ..runtime.errors import UserError
from ..runtime.rng import numpy_generator
from .degrade import BICUBIC_MARGIN, MARGIN, Recipe, degrade, recipe
from .files import BAD, BadImage, Entry, Middle, Square, converted, decode, each
from .memory import available_ram

PART = 1024
"""Images read at a time for a fingerprint."""


class Window(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    def times(self, scale: int) -> "Window":
        return Window(*(scale * side for side in self))

    def of(self, image: np.ndarray) -> np.ndarray:
        """That part of `image` (H, W, C), without copying it."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


class Files(NamedTuple):
    """The files of images: under `root`, each brought to its size by `shape`."""

    root: Path
    shape: Square | Middle
    entries: Sequence[Entry]


@dataclass(eq=False)
class Images:
    """N images, or N pairs of them: then each is exactly `scale` times one of low resolution.

    Attributes:
        name: what they are called.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        sizes: int64 `(N, 2)`, height and width.
        pixels: uint8 `(pixels in all, channels)`, or None if images are decoded when read.
        starts: int64 `(N,)`, the first row of each in `pixels`.
        files: what they are decoded from; None for images that came as an array.
        scale: factor between the images of a pair.
        low: low-resolution images, or None if there are none or they are made when read.
        degradation: how low-resolution images are, or were, made; None if they came as files, or there are none.
    """

    name: str
    channels: int
    sizes: np.ndarray
    pixels: torch.Tensor | None
    starts: np.ndarray
    files: Files | None = None
    scale: int = 1
    low: "Images | None" = None
    degradation: DegradationConfig | None = None
    _degraded: dict[int, np.ndarray] = field(default_factory=dict, init=False)

    @staticmethod
    def room(name: str, channels: int, sizes: np.ndarray, keep: bool = True, files: Files | None = None) -> "Images":
        """Images of these sizes, to be written by `view` where they are kept."""
        counts = sizes.prod(axis=1)
        pixels = torch.empty((int(counts.sum()), channels), dtype=torch.uint8) if keep else None
        return Images(name, channels, sizes, pixels, counts.cumsum() - counts, files)

    @staticmethod
    def of_array(name: str, images: np.ndarray) -> "Images":
        """Those of an array uint8 `(N, H, W, C)`."""
        assert images.dtype == np.uint8, images.dtype
        count, height, width, channels = images.shape
        # torch warns of arrays that cannot be written to
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).view(-1, channels)
        sizes = np.tile((height, width), (count, 1))
        return Images(name, channels, sizes, pixels, np.arange(count) * height * width)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def size(self) -> int:
        """The side of the images, where all are squares of one size."""
        return int(self.sizes[0, 0])

    @property
    def nbytes(self) -> int:
        """Size of all images decoded."""
        high = int(self.sizes.prod(axis=1).sum()) * self.channels
        return high + (self.low.nbytes if self.low is not None else 0)

    @property
    def names(self) -> list[str]:
        """Of the files, without their endings."""
        assert self.files is not None
        return [Path(entry.name).with_suffix("").as_posix() for entry in self.files.entries]

    @property
    def has_targets(self) -> bool:
        return self.low is not None or self.degradation is not None

    @property
    def made_by(self) -> str:
        """Where low-resolution images come from: `files`, `bicubic` or `chain`."""
        return "files" if self.degradation is None else self.degradation.kind

    @property
    def random(self) -> bool:
        """Whether a window is degraded anew each time."""
        return self.made_by == "chain"

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded and in RAM already."""
        return self.pixels is not None and (self.low is not None or self.degradation is None or self.random)

    @property
    def low_sizes(self) -> np.ndarray:
        """Heights and widths of the low-resolution images, int64 `(N, 2)`."""
        return self.sizes // self.scale

    @property
    def factors(self) -> tuple[int, ...]:
        """From low-resolution pixels to those of each side."""
        return (1, self.scale) if self.has_targets else (1,)

    def cut(self, index: int, window: Window, steps: Recipe | None) -> list[np.ndarray]:
        """Of each side of one pair, or of one image, the part `(h, w, C)` in a low-resolution window; `steps` are what a
        random degradation does to it."""
        if not self.has_targets:
            return [self.window(index, window)]
        scale = self.scale
        if self.low is not None:
            return [self.low.window(index, window), self.window(index, window.times(scale))]
        # what the degradation needs around it, as far as there is any
        margin = MARGIN if self.random else BICUBIC_MARGIN
        height, width = self.low_sizes[index].tolist()
        top, left = max(0, window.top - margin), max(0, window.left - margin)
        bottom = min(height, window.top + window.height + margin)
        right = min(width, window.left + window.width + margin)
        wide = self.window(index, Window(top, left, bottom - top, right - left).times(scale))
        inner = Window(window.top - top, window.left - left, window.height, window.width)
        return [inner.of(degrade(wide, steps, scale)), inner.times(scale).of(wide)]

    def recipe(self, rng: np.random.Generator) -> Recipe | None:
        """The steps from a high- to a low-resolution image, where they are random."""
        return recipe(self.degradation, rng) if self.degradation is not None and self.random else None

    def pair(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair of whole images for validation, uint8 `(C, h, w)` and `(C, scale · h, scale · w)`.

        A random degradation depends on `index` alone: it is the same in every run, whatever its seed. Its
        result is kept in RAM where those of all images fit.
        """
        high = self.whole(index)
        low = self._degraded.get(index) if self.low is None else self.low.whole(index)
        if low is None:
            low = degrade(high, self.recipe(numpy_generator(0, "degrade-valid", index)), self.scale)
            if self.nbytes // self.scale**2 <= available_ram() // 4:
                self._degraded[index] = low
        planes = (np.ascontiguousarray(image.transpose(2, 0, 1)) for image in (low, high))
        return torch.from_numpy(next(planes)), torch.from_numpy(next(planes))

    # reading

    def view(self, index: int) -> np.ndarray:
        """An image that is kept, `(H, W, C)`, without copying it."""
        assert self.pixels is not None
        height, width = self.sizes[index].tolist()
        start = int(self.starts[index])
        return self.pixels.numpy()[start : start + height * width].reshape(height, width, self.channels)

    def whole(self, index: int) -> np.ndarray:
        """All of an image, `(H, W, C)`."""
        return self.window(index, Window(0, 0, *self.sizes[index].tolist()))

    def window(self, index: int, window: Window) -> np.ndarray:
        """A part of one image, `(H, W, C)`."""
        if self.pixels is not None:
            image = self.view(index)
        else:
            assert self.files is not None
            path = self.files.root / self.files.entries[index].name
            try:
                image = np.asarray(self.files.shape(converted(decode(path), self.channels)))
                if image.shape[:2] != tuple(self.sizes[index].tolist()):
                    raise BadImage("size", f"{image.shape[1]}×{image.shape[0]}")
            except BadImage as problem:
                what = BAD[problem.kind][0] or f"{problem.detail} px"
                raise UserError(
                    f"'{path}' was fine before the first step and is now unusable ({what}): "
                    "restore it, then continue with `fmrun resume`"
                ) from problem
            image = image.reshape(*image.shape[:2], self.channels)
        return window.of(image)

    def read(self, indices: Any) -> torch.Tensor:
        """The images at `indices` (any sequence of integers), all of one size: uint8 `(B, C, S, S)` on the CPU."""
        rows = np.asarray(indices, dtype=np.int64)
        if self.pixels is not None:
            stacked = self.pixels.view(-1, self.size, self.size, self.channels)
            images = stacked.index_select(0, torch.from_numpy(self.starts[rows] // self.size**2))
        else:
            images = torch.empty((len(rows), self.size, self.size, self.channels), dtype=torch.uint8)

            def one(k: int) -> None:
                images.numpy()[k] = self.whole(int(rows[k]))

            each(one, len(rows))
        return channels_first(images).contiguous()

    def take(self, indices: np.ndarray) -> "Images":
        """These images, in this order."""
        files = self.files and self.files._replace(entries=[self.files.entries[i] for i in indices])
        low = self.low and self.low.take(indices)
        return replace(self, sizes=self.sizes[indices], starts=self.starts[indices], files=files, low=low)

    # which they are

    @property
    def _entries(self) -> list[tuple[Entry, ...]]:
        """The files of each image, or pair; none of an array."""
        sides = [images.files.entries for images in (self, self.low) if images is not None and images.files]
        return list(zip(*sides, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that changes when the data do, however they are kept: of names and contents of files, or of the
        shape and pixels of an array."""
        digest = hashlib.sha256()
        between = " " if self.has_targets else "\0"
        for files in self._entries:
            mark = between.join(f"{entry.name}{between}{entry.sha256}" for entry in files)
            digest.update(f"{mark}\0".encode(errors="surrogateescape"))
        if self.files is None:
            digest.update(repr((len(self), self.channels, *self.sizes[0].tolist())).encode())
            for start in range(0, len(self), PART):
                digest.update(self.read(range(start, min(start + PART, len(self)))).numpy().data)
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, int | str]:
        """What copying the images to another place does not change: their `number`, and digests of what they are."""
        if self.files is None:
            return {"number": len(self), "contents": self.fingerprint}
        names, sizes = hashlib.sha256(), hashlib.sha256()
        for entry in (entry for files in self._entries for entry in files):
            names.update(f"{entry.name}\0".encode(errors="surrogateescape"))
            sizes.update(f"{entry.size}\0".encode())
        return {"number": len(self), "names": names.hexdigest(), "sizes": sizes.hexdigest()}


def unlike(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """How images differ from those there were, by their identities: the second half of a sentence; None if they do not."""
    if then is None or now is None:
        counts = ["none" if one is None else str(one["number"]) for one in (now, then)]
        return None if then is now else " instead of ".join(counts)
    if then["number"] != now["number"]:
        return f"{now['number']} instead of {then['number']}"
    if then.keys() != now.keys():
        return "files instead of arrays" if "names" in now else "arrays instead of files"
    other = [key for key in then if then[key] != now[key]]
    return f"other {' and '.join(other)}" if other else None


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """`(B, H, W, C)` as `(B, C, H, W)`, without copying. Of one channel, the strides of a permuted tensor would make
    convolutions give channels-last memory, whatever `contiguous` says."""
    return images.permute(0, 3, 1, 2) if images.shape[3] > 1 else images.squeeze(3).unsqueeze(1)


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 images to [-1, 1]: x / 127.5 − 1, computed in at least fp32 and then rounded to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return images.to(wide).div_(127.5).sub_(1).to(dtype)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to uint8, rounded and clamped; not-a-number becomes grey. Inverse of `to_float`."""
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    return images.to(wide).nan_to_num(nan=0.0).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
