"""Running out of memory, in one sentence with the batch size that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ..config.schema import Config
from ..config.tables import TASKS
from ..runtime.dist import World
from ..runtime.errors import UserError
from ..runtime.precision import choose_device
from ..tasks import kind
from .state import State

T = TypeVar("T")


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
    size, parts = config.train.batch_size, config.train.accumulate
    fits = largest_batch(config, world) if world.size == 1 else None
    if fits is None:
        raise UserError(
            f"out of memory at batch size {size}; give a smaller --batch-size, or smaller {TASKS[config.task].sizes} and discriminator.width"
        )
    said = f"out of memory at batch size {size}; {fits} fits: --batch-size {fits}"
    # a micro-batch of one image is none
    ways = [
        n * parts for n in range(-(-size // fits), size // 2 + 1) if size % (n * parts) == 0 and size >= 2 * n * parts
    ]
    raise UserError(f"{said}, or the same batch in parts: -s train.accumulate={ways[0]}" if ways else said)


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
        blank = kind(config.task).blank(config, world, device)
        state.advance([state.task.prepare(blank, d) for d in range(state.batches_per_step)])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
