"""Which images a draw consists of, and those images on the device."""

from functools import lru_cache

import numpy as np
import torch

from ..errors import UserError
from ..rng import numpy_generator
from .memory import available_on, available_ram, gigabytes
from .source import Images
from .stream import Stream


def order(seed: int, count: int, position: int, n: int) -> np.ndarray:
    """Indices (int64) of the images at positions [position, position + n) of the endless sequence of epochs.

    Position p is in epoch p // count, which is a permutation of all `count` images drawn from (seed, epoch)
    alone: nothing is dropped at an epoch's end, and nothing needs saving to go on from anywhere.
    """
    parts = []
    while n > 0:
        epoch, first = divmod(position, count)
        part = _permutation(seed, count, epoch)[first : first + n]
        parts.append(part)
        position += len(part)
        n -= len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    permutation = numpy_generator(seed, "order", epoch).permutation(count)
    permutation.flags.writeable = False
    return permutation


def flips(seed: int, draw: int, global_batch: int) -> np.ndarray:
    """Which images of a draw are mirrored: bool `(global_batch,)`."""
    return numpy_generator(seed, "flip", draw).random(global_batch) < 0.5


def placement(images: Images, cache: str, device: torch.device) -> str:
    """Where `images` will be kept: `device`, `ram` or `none` (streamed). See `DataConfig.cache`."""
    on_cpu = device.type == "cpu"
    if cache == "auto":
        if not on_cpu and images.nbytes <= available_on(device) // 4:
            return "device"
        if images.pixels is not None or images.nbytes <= available_ram() // 2:
            return "ram"
        return "none"
    if cache == "device" and not on_cpu:
        free = available_on(device)
        if images.nbytes > free:
            raise UserError(
                f"data.cache: the decoded images take {gigabytes(images.nbytes)} and {gigabytes(free)} is "
                f"free on {device}: keep them elsewhere with -s data.cache=auto"
            )
        return "device"
    if cache == "none" and images.pixels is None:
        return "none"
    return "ram"


class Feed:
    """The real images of each draw, for one rank.

    A draw is one global batch: number d covers positions [d · global_batch, (d + 1) · global_batch) of
    `order`, and `rank_slice` is this rank's part of it. The same draw always gives the same images, in any
    order of asking; ascending ones from `start` are decoded ahead when images are streamed.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        global_batch: int,
        rank_slice: slice,
        device: torch.device | str,
        cache: str,
        workers: int,
        hflip: bool,
        start: int,
    ) -> None:
        self.device = torch.device(device)
        self.placement = placement(images, cache, self.device)
        self._images = images
        self._seed = seed
        self._global_batch = global_batch
        self._slice = rank_slice
        self._hflip = hflip
        self._pin = self.device.type == "cuda"
        self._pixels: torch.Tensor | None = None
        self._stream: Stream | None = None
        if self.placement == "none":
            self._stream = Stream(images, self._indices, workers, start, self._pin)
        else:
            pixels = images.pixels if images.pixels is not None else images.read(range(len(images)))
            self._pixels = pixels.to(self.device) if self.placement == "device" else pixels

    def batch(self, draw: int) -> torch.Tensor:
        """This rank's images of global draw `draw`: uint8 `(b, C, S, S)` on the device, a copy."""
        images = self._read(draw)
        if not self._hflip:
            return images
        mirrored = self._to_device(torch.from_numpy(flips(self._seed, draw, self._global_batch)[self._slice]))
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def close(self) -> None:
        """Stop the workers, if there are any, and let go of the images."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._pixels = None

    def _indices(self, draw: int) -> np.ndarray:
        positions = draw * self._global_batch
        return order(self._seed, len(self._images), positions, self._global_batch)[self._slice]

    def _read(self, draw: int) -> torch.Tensor:
        if self._stream is not None:
            return self._stream.read(draw).to(self.device, non_blocking=self._pin)
        assert self._pixels is not None, "batch() after close()"
        indices = torch.from_numpy(self._indices(draw))
        if self.placement == "device":
            return self._pixels.index_select(0, self._to_device(indices))
        return self._to_device(self._pixels.index_select(0, indices))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Without waiting for the device: only a copy from pinned memory is asynchronous."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._pin else tensor.to(self.device)
