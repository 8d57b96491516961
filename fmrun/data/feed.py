"""Which windows of which images a draw consists of, and those windows on the device.

A draw is one global batch. Images from noise are learned from whole: their windows are the images. Of pairs, a window
is a patch of the low-resolution image, and comes with the same part of the high-resolution one.
"""

from __future__ import annotations

import itertools
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.errors import UserError
from ..runtime.rng import numpy_generator
from .degrade import Recipe
from .files import each
from .memory import available_on, gigabytes
from .store import Images, Window, channels_first

NO_ROOM = (
    "the processes that decode images failed, most likely for lack of (shared) memory ({}): use none with "
    "-s data.workers=0, or give it more room: docker run --shm-size=8g"
)


class PairBatch(NamedTuple):
    """Low- and high-resolution patches, uint8 `(b, C, h, w)` and `(b, C, scale · h, scale · w)`."""

    low: Tensor
    high: Tensor


def order(seed: int, count: int, position: int, n: int) -> np.ndarray:
    """Indices (int64) of the images at positions [position, position + n) of the endless sequence of epochs.

    Position p is in epoch p // count, which is a permutation of all `count` images drawn from (seed, epoch)
    alone: nothing is dropped at an epoch's end, and nothing needs saving to go on from anywhere.
    """
    chunks = [np.empty(0, np.int64)]
    while n > 0:
        epoch, first = divmod(position, count)
        chunks.append(_permutation(seed, count, epoch)[first : first + n])
        position += len(chunks[-1])
        n -= len(chunks[-1])
    return np.concatenate(chunks)


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(count)


def turned(patch: np.ndarray, turning: int) -> np.ndarray:
    """`(H, W, C)` by `turning % 4` quarter turns, then, from 4 on, mirrored left to right."""
    patch = np.rot90(patch, turning % 4)
    return patch[:, ::-1] if turning >= 4 else patch


class Windows:
    """The endless sequence of windows that a seed takes of images.

    Position p is in draw p // global_batch, and number p % global_batch there. The image follows `order`; where the
    window lies, how it is turned and how it is degraded follow from the seed, the draw and the number in it alone.

    `local_slice` selects this rank's images of the `global_batch`. Without `patch_size`, a multiple of the scale, windows
    are whole images, which all have one size. The other arguments are those of `DataConfig`.
    """

    def __init__(
        self,
        data: Images,
        *,
        seed: int,
        global_batch: int,
        local_slice: slice = slice(None),
        patch_size: int | None = None,
        hflip: bool = False,
        rotate: bool = False,
    ) -> None:
        assert patch_size is None or patch_size % data.scale == 0, (patch_size, data.scale)
        self.data, self.seed, self.global_batch, self.local_slice = data, seed, global_batch, local_slice
        self.side = data.size if patch_size is None else patch_size // data.scale
        self._whole, self._hflip, self._rotate = patch_size is None, hflip, rotate

    def rows(self, draw: int) -> np.ndarray:
        """int64 `(b, 4)`: image, top, left and turning (see `turned`) of each of this rank's windows of a draw, in
        low-resolution pixels."""
        rows = np.zeros((self.global_batch, 4), np.int64)
        rows[:, 0] = order(self.seed, len(self.data), draw * self.global_batch, self.global_batch)
        if self._whole:
            if self._hflip:
                rows[:, 3] = 4 * (numpy_generator(self.seed, "flip", draw).random(self.global_batch) < 0.5)
        else:
            u = numpy_generator(self.seed, "crop", draw).random((self.global_batch, 4))
            rows[:, 1:3] = u[:, :2] * (self.data.low_sizes[rows[:, 0]] - self.side + 1)
            if self._rotate:
                rows[:, 3] = 4 * u[:, 2]
            if self._hflip:
                rows[:, 3] += 4 * (u[:, 3] < 0.5)
        return rows[self.local_slice]

    def gathers(self, device: torch.device) -> list[Callable[[Tensor], Tensor]]:
        """For each side, a function from `rows` on `device` to windows there, of images that are kept, also there."""
        if self._whole:
            return [_whole_images(self.data, device)]
        sides = [(self.data, self.data.scale)]
        if self.data.low is not None:
            sides.insert(0, (self.data.low, 1))
        return [_patches(images, self.side, factor, device) for images, factor in sides]

    def recipes(self, draw: int) -> Sequence[Recipe | None]:
        """How each of this rank's windows of a draw is degraded, where that is random."""
        places = range(self.global_batch)[self.local_slice]
        if not self.data.random:
            return [None] * len(places)
        return [self.data.recipe(numpy_generator(self.seed, "degrade", draw, place)) for place in places]

    def read(self, draw: int) -> list[Tensor]:
        """This rank's windows of a draw, uint8 `(b, h, w, C)` for each side."""
        rows, recipes = self.rows(draw), self.recipes(draw)
        sides = [self.side * factor for factor in self.data.factors]
        batches = [torch.empty((len(rows), side, side, self.data.channels), dtype=torch.uint8) for side in sides]

        def one(k: int) -> None:
            image, top, left, turning = rows[k].tolist()
            cut = self.data.cut(image, Window(top, left, self.side, self.side), recipes[k])
            for batch, window in zip(batches, cut, strict=True):
                batch.numpy()[k] = turned(window, turning)

        each(one, len(rows))
        return batches


def _whole_images(images: Images, device: torch.device) -> Callable[[Tensor], Tensor]:
    """As `_patches`, of windows that are whole images of one size: those lie in memory as they are wanted."""
    assert images.pixels is not None
    stacked = images.pixels.to(device).view(-1, images.size, images.size, images.channels)
    places = torch.from_numpy(images.starts // images.size**2).to(device)

    def gather(rows: Tensor) -> Tensor:
        batch = stacked.index_select(0, places[rows[:, 0]])
        if device.type != "cpu":  # what is mirrored is known there only
            return torch.where((rows[:, 3] >= 4)[:, None, None, None], batch.flip(2), batch)
        pixels = batch.numpy()
        for k in np.flatnonzero(rows[:, 3].numpy() >= 4):
            pixels[k] = pixels[k, :, ::-1]
        return batch

    return gather


def _patches(images: Images, side: int, factor: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    assert images.pixels is not None
    pixels = images.pixels.to(device)
    starts, widths = (torch.from_numpy(a.copy()).to(device) for a in (images.starts, images.sizes[:, 1]))
    side *= factor
    grid = np.indices((side, side)).transpose(1, 2, 0)
    # (8, side, side, 2): where each pixel of a turned patch comes from
    grids = torch.from_numpy(np.stack([turned(grid, turning) for turning in range(8)])).to(device)

    def gather(rows: Tensor) -> Tensor:
        image, top, left = (column[:, None, None] for column in rows[:, :3].unbind(1))
        y, x = grids[rows[:, 3]].unbind(3)
        index = starts[image] + (y + factor * top) * widths[image] + x + factor * left
        return pixels.index_select(0, index.view(-1)).view(*index.shape, -1)

    return gather


def placement(data: Images, cache: str, device: torch.device) -> str:
    """Where `data` will be kept: `device`, `ram` or `none` (streamed). See `DataConfig.cache`. What is degraded at random
    is so on the CPU."""
    if not data.in_memory:
        return "none"
    if data.random or device.type == "cpu" or cache not in ("auto", "device"):
        return "ram"
    free = available_on(device)
    if cache == "auto":
        return "device" if data.nbytes <= free // 4 else "ram"
    if data.nbytes > free:
        raise UserError(
            f"data.cache: the decoded images take {gigabytes(data.nbytes)} and {gigabytes(free)} is free on {device}: keep "
            "them elsewhere with -s data.cache=auto"
        )
    return "device"


class Feed:
    """The windows of each draw, for one rank: uint8 `(b, C, S, S)`, or a `PairBatch`, on the device.

    The same draw always gives the same windows, in any order of asking, wherever images are kept and however many workers
    there are; ascending draws from `start` are made ahead by workers when images are streamed or degraded at random.
    """

    def __init__(self, windows: Windows, *, device: torch.device | str, cache: str, workers: int, start: int) -> None:
        self.device = torch.device(device)
        self.placement = placement(windows.data, cache, self.device)
        self._windows = windows
        self._pin = self.device.type == "cuda"
        self._stream: Stream | None = None
        self._held: list[Callable[[Tensor], Tensor]] = []
        if self.placement == "none" or windows.data.random:
            self._stream = Stream(windows.read, workers, start, self._pin)
        else:
            self._held = windows.gathers(self.device if self.placement == "device" else torch.device("cpu"))

    def batch(self, draw: int) -> Tensor | PairBatch:
        """This rank's windows of global draw `draw`: a copy, in channels-last memory."""
        if self._stream is not None:
            windows = [side.to(self.device, non_blocking=self._pin) for side in self._stream.read(draw)]
        else:
            assert self._held, "batch() after close()"
            rows = torch.from_numpy(self._windows.rows(draw))
            rows = self._moved(rows) if self.placement == "device" else rows
            windows = [self._moved(gather(rows)) for gather in self._held]
        if len(windows) == 2:
            return PairBatch(*(side.permute(0, 3, 1, 2) for side in windows))
        return channels_first(windows[0])

    def close(self) -> None:
        """Stop the workers, if there are any, and let go of the images."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._held = None, []

    def _moved(self, tensor: Tensor) -> Tensor:
        """Without waiting for the device: only a copy from pinned memory is asynchronous."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._pin else tensor.to(self.device)


class Stream:
    """`read(draw)` for draws in sequence from `start`, made ahead by worker processes; any other draw starts them anew."""

    def __init__(self, made: Callable[[int], list[Tensor]], workers: int, start: int, pin: bool) -> None:
        self._made, self._workers, self._next, self._pin = made, workers, start, pin
        self._batches: Iterator[Any] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None

    def read(self, draw: int) -> list[Tensor]:
        """What `made(draw)` is, pinned if the stream was asked to."""
        if draw != self._next:
            self.close()
        self._next = draw + 1
        if self._workers == 0:
            batch = self._made(draw)
            return [tensor.pin_memory() for tensor in batch] if self._pin else batch
        try:
            if self._batches is None:
                self._batches = self._ahead(draw)
            made = next(self._batches)
        except (RuntimeError, OSError) as error:  # its locks lie in shared memory too
            if self._batches is not None and "DataLoader worker" not in str(error):
                raise
            made = NO_ROOM.format(" ".join(str(error).split()))
        if isinstance(made, str):
            self.close()
            raise UserError(made)
        return made

    def close(self) -> None:
        """Stop the workers."""
        if self._stop is not None:
            self._stop()
        self._batches = self._stop = None

    def _ahead(self, draw: int) -> Iterator[Any]:
        loader = DataLoader(
            _Reader(self._made),
            sampler=itertools.count(draw),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=4,
            pin_memory=self._pin,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        batches = iter(loader)
        # Also when the interpreter exits: workers that ignore SIGTERM would outlive a plain exit.
        self._stop = weakref.finalize(self, _shut_down, batches)
        return batches


class _Reader(Dataset[Any]):
    def __init__(self, made: Callable[[int], list[Tensor]]) -> None:
        self._made = made

    def __getitem__(self, draw: int) -> list[Tensor] | str:
        try:
            batch = self._made(draw)
        except UserError as error:  # raised here it would reach the parent with a traceback in its text
            return str(error)
        try:
            return [tensor.share_memory_() for tensor in batch]
        except RuntimeError as error:  # in the queue's thread, where it would happen otherwise, the batch is lost
            return NO_ROOM.format(str(error).splitlines()[0])


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and batch systems signal every process; the parent acts on it, and still needs its batches."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _shut_down(batches: Any) -> None:
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()
