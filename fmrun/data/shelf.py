"""Images of different sizes, of which windows are read: packed in one tensor, or decoded from files when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import UserError, reading
from .folder import Entry
from .pixels import BAD, GREY_16, BadImage, _flat, _opened, _upright, content

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Window(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Shelf:
    """N images, uint8 `(H, W, C)`, each of its own size.

    Attributes:
        names: what each is called.
        sizes: int64 `(N, 2)`, height and width.
        channels: C.
    """

    names: list[str]
    sizes: np.ndarray
    channels: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Size of all images decoded."""
        return int(self.sizes.prod(axis=1).sum()) * self.channels

    def whole(self, index: int) -> np.ndarray:
        """All of an image."""
        height, width = self.sizes[index].tolist()
        return self.read(index, [Window(0, 0, height, width)])[0]

    def read(self, index: int, windows: Sequence[Window]) -> list[np.ndarray]:
        """Windows of one image, which is decoded once for all of them."""
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> "Shelf":
        """The shelf of these images, in this order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Packed(Shelf):
    """Images one after the other in one tensor.

    Attributes:
        pixels: uint8 `(pixels in all, C)`.
        starts: int64 `(N,)`, the first row of each.
    """

    pixels: torch.Tensor
    starts: np.ndarray

    @staticmethod
    def empty(names: list[str], sizes: np.ndarray, channels: int) -> "Packed":
        """Room for images of these sizes."""
        counts = sizes.prod(axis=1)
        pixels = torch.empty((int(counts.sum()), channels), dtype=torch.uint8)
        return Packed(names, sizes, channels, pixels, np.concatenate([[0], counts.cumsum()[:-1]]))

    def view(self, index: int) -> np.ndarray:
        """An image, without copying it."""
        height, width = self.sizes[index].tolist()
        start = int(self.starts[index])
        return self.pixels.numpy()[start : start + height * width].reshape(height, width, self.channels)

    def read(self, index: int, windows: Sequence[Window]) -> list[np.ndarray]:
        image = self.view(index)
        return [image[w.top : w.top + w.height, w.left : w.left + w.width] for w in windows]

    def take(self, indices: np.ndarray) -> "Packed":
        return Packed(
            [self.names[i] for i in indices], self.sizes[indices], self.channels, self.pixels, self.starts[indices]
        )


@dataclass(frozen=True)
class Files(Shelf):
    """Image files under `root`; `sizes` may be less than theirs, and then means their middle.

    A file is decoded whole, once for all windows of a call: large photographs that do not fit in RAM are better cut
    into tiles beforehand, or read several windows at a time.
    """

    root: Path
    entries: list[Entry]

    def read(self, index: int, windows: Sequence[Window]) -> list[np.ndarray]:
        path = self.root / self.entries[index].name
        try:
            return decode_middle(path, self.channels, tuple(self.sizes[index].tolist()), windows)
        except BadImage as problem:
            what = BAD[problem.kind][0] or f"{problem.detail} px"
            raise UserError(
                f"'{path}' was fine before the first step and is now unusable ({what}): "
                "restore it, then continue with `fmrun resume`"
            ) from problem

    def take(self, indices: np.ndarray) -> "Files":
        names, entries = ([items[i] for i in indices] for items in (self.names, self.entries))
        return Files(names, self.sizes[indices], self.channels, self.root, entries)  # type: ignore[arg-type]


def middle(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Where the middle of this size begins; an odd pixel goes to the bottom or right."""
    return (height - size[0]) // 2, (width - size[1]) // 2


def decode_middle(path: Path, channels: int, size: tuple[int, int], windows: Sequence[Window]) -> list[np.ndarray]:
    """Windows, `(H, W, channels)` each, of the middle `size` of an image file: upright, without alpha (over white)
    unless `channels` is 4. Raises `BadImage`, also if the file is smaller than `size`."""
    image = decode_upright(path)
    if image.height < size[0] or image.width < size[1]:
        raise BadImage("size", f"{image.width}×{image.height}")
    top, left = middle(image.height, image.width, size)
    out = []
    for w in windows:
        box = (left + w.left, top + w.top, left + w.left + w.width, top + w.top + w.height)
        out.append(to_array(image.crop(box), channels))
    return out


def decode_upright(path: Path, data: bytes | None = None) -> Image.Image:
    """An image file, or its content `data` where that is read already, as it is to be seen, in its own mode. Raises
    `BadImage`."""
    with reading(path), _opened(BytesIO(content(path) if data is None else data)) as image:
        try:
            image.load()
            return _upright(image)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise BadImage("damaged") from error


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 `(H, W, channels)`."""
    if channels == 4 and image.mode not in GREY_16:
        return np.asarray(image.convert("RGBA"))
    flat = np.asarray(_flat(image, MODES[min(channels, 3)]))
    if channels == 4:
        return np.concatenate([flat, np.full_like(flat[..., :1], 255)], axis=2)
    return flat.reshape(*flat.shape[:2], channels)
