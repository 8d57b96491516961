"""Memory that a step takes, known before the first one; and running out of it, in one sentence with what fits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import Config
from .data.memory import available_on, gigabytes
from .dist import World
from .errors import UserError
from .models.norm import restored_buffers
from .optim import Optimiser
from .precision import choose_device
from .state import UPDATES, State
from .tasks import Batch

T = TypeVar("T")

SMALL_BATCHES = (2, 4)
"""Images per micro-batch in the two steps that a line is drawn through."""

COPIES = 8
"""Times that a step holds an activation, at most: before and after norm and activation, their gradients, real and
generated images."""

PLANS_LOOKED_AT = 1000
"""First steps of a run among which all are looked for that differ in what they run."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in RAM."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def within_memory(config: Config, world: World, work: Callable[[], T]) -> T:
    """`work()`; if it runs out of memory, UserError with a batch size that was tried and fits."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # the failed state is held by frames that are gone only now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = config.train.batch_size
    fits = largest_batch(config, world) if world.size == 1 else None
    if fits is None:
        raise UserError(
            f"out of memory at batch size {size}; give a smaller --batch-size, or smaller {_widths(config)}"
        )
    raise UserError(f"out of memory at batch size {size}; {_remedy(config, fits)}")


def _widths(config: Config) -> str:
    smaller = "generator.width" if config.task == "generate" else "data.patch_size, generator.features"
    return f"{smaller} and discriminator.width"


def _remedy(config: Config, fits: int, processes: int = 1) -> str:
    """What to type, where a batch of `fits` images over all processes is one that fits."""
    size, parts = config.train.batch_size, config.train.accumulate
    # a micro-batch of one image is none
    ways = [n * parts for n in range(-(-size // fits), size // 2 + 1)]
    ways = [n for n in ways if size % (n * processes) == 0 and size // (n * processes) >= 2]
    said = f"{fits} fits: --batch-size {fits}"
    return f"{said}, or the same batch in parts: -s train.accumulate={ways[0]}" if ways else said


def largest_batch(config: Config, world: World) -> int | None:
    """The largest halving of the batch size at which a whole step was made, or None."""
    size = config.train.batch_size // 2
    while size >= 2 * config.train.accumulate:
        size -= size % config.train.accumulate
        train = config.train.model_copy(update={"batch_size": size})
        data = config.data.model_copy(update={"channels": config.data.channels or 3})
        smaller = config.model_copy(update={"train": train, "data": data})
        if _fits(smaller, world):
            return size
        gc.collect()
        size //= 2
    return None


def _fits(config: Config, world: World) -> bool:
    """Whether a whole step of a fresh state fits."""
    try:
        device = choose_device(config.device, world.local_rank)
        state = State(config, device, world, fresh=False)
        state.step = config.full_step
        state.advance([state.task.prepare(state.task.blank(), d) for d in range(state.draws_per_step)])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


# ---- before the first step


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside: `course` holds, after each operation, those that live then.

    `there` are those that exist already, whose views do not count.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.course: list[int] = []
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.course.append(self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


class _Still:
    """In place of an optimiser: takes the gradients and moves nothing."""

    def __init__(self, real: Optimiser):
        self.real, self.guard = real, real.guard

    def zero_grad(self) -> None:
        self.real.zero_grad()

    def step(self, *_: object) -> Tensor:
        return self.guard.scale


def step_bytes(state: State, images: int) -> list[int]:
    """Bytes that a step with everything acting holds after each of its operations, beside weights and moments, on blank
    micro-batches of `images` images. Leaves parameters, buffers and random streams as they were."""
    task, train = state.task, state.config.train
    at = state.config.full_step
    nets: list[nn.Module] = [task.generator, *(role.net for role in task.discriminators)]
    moved = [*nets, *(role.matching for role in task.discriminators)]
    draws = [[few(b, images) for b in task.prepare(task.blank(), d)] for d in range(state.draws_per_step)]
    state.set_scalars(at)
    with ExitStack() as kept:
        for module in moved:
            kept.enter_context(restored_buffers(module))
        kept.enter_context(task.eager())
        there = [t for net in [*task.nets(), task.average] for t in (*net.parameters(), *net.buffers())]
        live = kept.enter_context(LiveBytes(there))
        still: Any = {name: _Still(optimiser) for name, optimiser in state.optimisers.items()}
        UPDATES[train.update](task, draws, task.plan(at), state.scalars, still, state.world, train.d_updates)
    for net in nets:
        net.zero_grad(set_to_none=True)
    state.set_scalars(state.step)
    return live.course


def extrapolate(courses: dict[int, list[int]], images: int) -> float:
    """Most bytes at once with `images` images per micro-batch, from the courses at one or two smaller numbers.

    Every operation has a line of its own: where the peak is changes with their number, for what weights take stays
    the same and what images take grows. From one number, an upper bound.
    """
    few, many = min(courses), max(courses)
    if few == many or len(courses[few]) != len(courses[many]):
        return max(courses[many]) * max(1.0, images / many)
    slope = 1 / (many - few)
    return max(b + (b - a) * slope * (images - many) for a, b in zip(courses[few], courses[many], strict=True))


def few(batch: Batch, images: int) -> Batch:
    """The first images of a micro-batch, in memory of their own."""

    def first(x: Tensor | None, dim: int = 0) -> Tensor | None:
        return None if x is None else x.narrow(dim, 0, images).clone()

    return Batch(
        batch.real[:images].clone(),
        noise=first(batch.noise),
        condition=first(batch.condition),
        augment=first(batch.augment, 1),
    )


def _surely_small(state: State, room: int) -> bool:
    """Whether no measuring is needed to see that a step fits, as for every channel of every layer at the image's size."""
    task = state.task
    nets = task.nets()
    channels = sum(max(p.shape[:2]) for net in nets for p in net.parameters() if p.ndim > 1)
    weights = sum(p.numel() for net in nets for p in net.parameters())
    _, height, width = task.image
    pixels = state.config.train.batch_size // state.world.size * height * width
    return task.dtype.itemsize * COPIES * (channels * pixels + weights) < room


@dataclass(frozen=True)
class Need:
    """What training takes beside weights, in bytes."""

    moments: int
    images: int
    """Those that will be kept on the device."""
    at_once: int
    """How many steps' tensors are there at once: see `steps_at_once`."""
    courses: dict[int, list[int]]
    """`step_bytes` by images per micro-batch."""

    def step(self, images: int) -> float:
        return extrapolate(self.courses, images)

    def total(self, images: int) -> float:
        """With `images` per micro-batch."""
        return self.moments + self.images + self.at_once * self.step(images)

    def parts(self, images: int) -> str:
        """What of it is neither weights nor the step, in brackets; nothing where that is nothing."""
        known = {"for images kept there": self.images, "for recorded steps": (self.at_once - 1) * self.step(images)}
        said = [f"{gigabytes(int(size))} {what}" for what, size in known.items() if size]
        return f" ({', '.join(said)})" if said else ""

    def other_ways(self, images: int, room: int) -> str:
        """What to give up instead of images per step, where that is enough."""
        ways = {
            "keep the images elsewhere: -s data.cache=ram": replace(self, images=0),
            "leave cuda_graphs out": replace(self, at_once=1),
        }
        return "".join(f", or {how}" for how, less in ways.items() if less != self and less.total(images) <= room)


def steps_at_once(state: State) -> int:
    """How many steps' tensors are in memory at the same time.

    A recorded step keeps the memory it was recorded in, which all recordings share; steps of another plan, which run
    unrecorded at first, find none of it free.
    """
    if state.graphs is None:
        return 1
    last = state.config.train.steps - 1
    looked_at = [*range(min(PLANS_LOOKED_AT, last + 1)), min(state.config.full_step, last), last]
    first = state.task.plan(0)
    return 1 if all(state.task.plan(step) == first for step in looked_at) else 2


def _moments(state: State) -> int:
    """Bytes of Adam's two moments of every trained weight."""
    trained = [p for optimiser in state.optimisers.values() for p in optimiser.parameters]
    return 2 * sum(p.numel() * p.element_size() for p in trained)


def memory_line(state: State, images: int = 0) -> str:
    """What training will take and what is free, measured on two small steps, for a human; `images` as in `check_fit`."""
    whole = state.config.train.batch_size // (state.world.size * state.config.train.accumulate)
    need = Need(_moments(state), images, steps_at_once(state), {})
    for size in sorted({min(size, whole) for size in SMALL_BATCHES}):
        need.courses[size] = step_bytes(state, size)
    total = int(need.total(whole))
    said = gigabytes(total) if total >= 1e9 else f"{total / 1e6:.0f} MB"
    free = gigabytes(available_on(state.device))
    return f"memory: a step takes about {said}{need.parts(whole)} beside the weights; {free} is free"


def check_fit(state: State, images: int = 0) -> None:
    """UserError, with the batch size that fits, if training will not fit into the memory that is free now.

    Found from two small steps, from one where that is enough to see that it fits, or from none. Each process needs as
    much as the others. Tensors are counted, not the scratch memory of single kernels. `images`: bytes of those that
    will be kept on the device.
    """
    config, world = state.config, state.world
    ways = world.size * config.train.accumulate
    whole = config.train.batch_size // ways
    here = 1 + max(world.all_gather_object(world.local_rank)) if state.device.type == "cpu" else 1
    room = min(world.all_gather_object(available_on(state.device))) // here
    images = max(world.all_gather_object(images))  # all have to go on alike
    at_once = steps_at_once(state)
    if images <= room // 4 and _surely_small(state, room // (4 * at_once)):
        return
    need = Need(_moments(state), images, at_once, {})
    for size in sorted({min(size, whole) for size in SMALL_BATCHES}):
        need.courses[size] = step_bytes(state, size)
        if need.total(whole) <= room // 2:
            return
    if need.total(whole) <= room:
        return
    said = f"batch size {config.train.batch_size} needs about {gigabytes(int(need.total(whole)) * here)} of memory"
    said += f"{need.parts(whole)} and {gigabytes(room * here)} is free on {state.device}; "
    others = need.other_ways(whole, room)
    fits = next((n for n in range(whole - 1, 1, -1) if need.total(n) <= room), None)
    if fits is not None:
        raise UserError(said + _remedy(config, fits * ways, world.size) + others)
    raise UserError(said + f"not even the smallest batch fits: give smaller {_widths(config)}" + others)
