"""Batches decoded ahead of time by worker processes."""

import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .source import Images

Indices = Callable[[int], np.ndarray]
"""The images this rank reads for a draw."""

NO_ROOM = (
    "the processes that decode images cannot hand them over in shared memory ({}); decode without them: "
    "-s data.workers=0, or give it more room: docker run --shm-size=8g"
)


class Stream:
    """`read(draw)` for draws in sequence from `start`; any other draw starts the workers anew from there."""

    def __init__(self, images: Images, indices: Indices, workers: int, start: int, pin: bool) -> None:
        self._images = images
        self._indices = indices
        self._workers = workers
        self._pin = pin
        self._next = start
        self._batches: Iterator[Any] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None

    def read(self, draw: int) -> torch.Tensor:
        """uint8 `(b, C, S, S)` on the CPU, pinned if the stream was asked to."""
        if draw != self._next:
            self.close()
            self._next = draw
        batch = self._decoded(draw)
        self._next += 1
        if isinstance(batch, str):
            self.close()
            raise UserError(batch)
        return batch

    def close(self) -> None:
        """Stop the workers."""
        if self._stop is not None:
            self._stop()
        self._batches = self._stop = None

    def _decoded(self, draw: int) -> torch.Tensor | str:
        if self._workers == 0:
            batch = self._images.read(self._indices(draw))
            return batch.pin_memory() if self._pin else batch
        if self._batches is None:
            loader = DataLoader(
                _Reader(self._images),
                sampler=_Draws(self._indices, draw),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=4,
                pin_memory=self._pin,
                worker_init_fn=_leave_signals_to_parent,
                generator=torch.Generator(),  # else it would draw from the global one
            )
            try:
                self._batches = iter(loader)
            except OSError as error:  # its locks lie in shared memory too
                raise UserError(NO_ROOM.format(error)) from error
            # Also when the interpreter exits: workers that ignore SIGTERM would outlive a plain exit.
            self._stop = weakref.finalize(self, _shut_down, self._batches)
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise UserError(
                "a process that decodes images died, most likely for lack of (shared) memory: "
                "use fewer with -s data.workers=N, or none with -s data.workers=0"
            ) from error


class _Reader(Dataset[Any]):
    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor | str:
        try:
            batch = self._images.read(indices)
        except UserError as error:  # raised here it would reach the parent with a traceback in its text
            return str(error)
        try:
            return batch.share_memory_()
        except RuntimeError as error:  # in the queue's thread, where it would happen otherwise, the batch is lost
            return NO_ROOM.format(str(error).splitlines()[0])


class _Draws:
    """The index arrays of draws `start`, `start + 1`, … without end."""

    def __init__(self, indices: Indices, start: int) -> None:
        self._indices = indices
        self._start = start

    def __iter__(self) -> Iterator[np.ndarray]:
        draw = self._start
        while True:
            yield self._indices(draw)
            draw += 1


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
