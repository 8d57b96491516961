"""Several processes as one: what the loop, batch norm and batch statistics need of them, differentiable.

Every process computes its slice of the global batch; gradients are averaged once per update. A loss that is a mean
over images is therefore the mean over the slice. A loss of a batch statistic is computed whole by every process, from
`World.mean` or `World.gather`, whose backward passes make the averaged gradient that of the global loss.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import FmrunError, UserError

T = TypeVar("T")

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)
"""After which one process no longer waits for another."""


class _Sum(torch.autograd.Function):
    """Over processes, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def _check_devices(device: str, here: int) -> bool:
    """Whether `here` processes on this machine each take a GPU; UserError where they cannot have what was asked for."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "mps" or ":" in device:
        raise UserError(
            f"--device {device}: several processes cannot share one device; give cpu, or cuda for a GPU each"
        )
    if device == "cuda" and count == 0:
        raise UserError("--device: 'cuda' needs NVIDIA GPUs and torch sees none; use --device cpu")
    if device in ("auto", "cuda") and 0 < count < here:
        raise UserError(f"{here} processes on a machine with {count} GPUs: start at most {count}, or give --device cpu")
    return device != "cpu" and count > 0


def _number(name: str, default: int = 0) -> int:
    """A number that a launcher has put into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is '{text}', and must be a whole number: {_way_out()}")
    return int(text)


def _way_out() -> str:
    return (
        f"start fmrun with torchrun, or in one process after `unset {' '.join(v for v in LAUNCHER if v in os.environ)}`"
    )


def _job(store: dist.Store) -> str:
    return store.compare_set("fmrun/job", "", uuid.uuid4().hex).decode()


def _meet(rank: int, size: int, patience: int) -> dist.Store:
    """The store that all processes are connected to; UserError where they are not within `patience` seconds."""
    met: list[Any] = []

    def meet() -> None:
        try:
            met.append(next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))[0])
        except Exception as error:
            met.append(error)

    # torch's own timeout prints a stack trace, and misses some hangs
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(patience)
    if not met:
        variables = " ".join(f"{name}={os.environ[name]}" for name in LAUNCHER if name in os.environ)
        raise UserError(
            f"not all of {size} processes have met within {patience} s; if their variables ({variables}) are left over from a "
            f"launcher, {_way_out()}; if some start late, set FMRUN_RENDEZVOUS_TIMEOUT to more seconds"
        )
    if isinstance(met[0], Exception):
        if "EADDRINUSE" in str(met[0]):
            raise UserError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is in use by another program; give all processes a free port: torchrun --master-port N, "
                "or MASTER_PORT=N where they are started without torchrun"
            )
        raise UserError(f"the processes cannot find each other ({met[0]}); {_way_out()}")
    return met[0]


class World:
    """The processes that share a global batch. With `size` 1, every operation is the identity."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.job: str | None = None
        """Under torchrun, an id that this launch has to itself and that the processes it restarts share."""
        self._host_group: Any = None

    @classmethod
    def join(cls, device: str) -> World:
        """The world that torchrun describes in the environment, joined; a world of one outside torchrun."""
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return cls()
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if size == 1:
            world = cls()
            with suppress(UserError):  # variables left over are none of one process's business
                world.job = _job(_meet(0, 1, 10)) if elastic else None
            return world
        world = cls(rank, size, _number("LOCAL_RANK", 0))
        cuda = _check_devices(device, _number("LOCAL_WORLD_SIZE", size))
        if cuda:
            torch.cuda.set_device(world.local_rank)
        store = _meet(rank, size, _number("FMRUN_RENDEZVOUS_TIMEOUT", 60))
        if elastic:  # torchrun's store keeps the addresses of processes that died
            world.job = _job(store)
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        world._host_group = dist.new_group(backend="gloo") if cuda else None
        return world

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that names, writes and speaks."""
        return self.rank == 0

    def local_slice(self, count: int) -> slice:
        """This process's slice of `count` consecutive images of the global batch."""
        assert count % self.size == 0, (count, self.size)
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    # as `feature_matching.ranks`, which stands above this floor and imports nothing of it

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over processes, differentiable any number of times."""
        if self.size == 1:
            return x
        return _Sum.apply(x) / self.size

    def gather(self, x: Tensor) -> Tensor:
        """`x` (b, …) of all processes, concatenated to (b * size, …), differentiable."""
        if self.size == 1:
            return x
        blank = torch.zeros_like(x)
        return _Sum.apply(torch.cat([x if rank == self.rank else blank for rank in range(self.size)]))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, chunk in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(chunk.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process. Travels between hosts' memories; no GPU waits for it."""
        if self.size == 1:
            return flag
        word = torch.tensor(int(flag))
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._host_group)
        return bool(word)

    @contextmanager
    def on_first_rank(self) -> Iterator[bool]:
        """Around what the first process alone does: gives whether this is it. Every process raises its error."""
        error = None
        try:
            yield self.first
        except FmrunError as caught:
            error = caught
        if (shared := self.from_first(error)) is not None:
            shared.everywhere = True
            raise shared

    def from_first(self, value: T) -> T:
        """The first process's `value`, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every process's `value`, in order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values
