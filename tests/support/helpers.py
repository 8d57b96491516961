"""Tiny nets, made-up images and state snapshots that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fmrun.config.schema import Config
from fmrun.runs.checkpoint import Checkpoint, ImagesIdentity, Meta
from fmrun.runtime.dist import World
from fmrun.tasks import Batch
from fmrun.train.state import State

WORLD = World()


def tiny_config(**settings: Any) -> Config:
    """A float64 DCGAN of width 4 at 28 px on the CPU; `train__batch_size=8` sets `train.batch_size`."""
    tree: dict[str, Any] = {
        "precision": "fp64",
        "device": "cpu",
        "data": {"image_size": 28, "channels": 1},
        "generator": {"width": 4, "latent_dim": 6},
        "discriminator": {"width": 4},
        "train": {"batch_size": 4},
    }
    for key, value in settings.items():
        *path, last = key.split("__")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return Config.model_validate(tree)


def bundled_labels(split: str) -> np.ndarray:
    """Of the bundled images, which come with them."""
    folder = Path(__file__).parents[2] / "fmrun" / "data" / "bundled"
    text = (folder / f"fashion-mnist-{split}.txt").read_text()
    return np.array([int(digit) for digit in text if digit.isdigit()], dtype=np.int64)


def tiny_state(**settings: Any) -> State:
    return State(tiny_config(**settings), torch.device("cpu"), WORLD)


class Noise:
    """A feed of uniform noise; draw number d always has the same images."""

    def __init__(self, config: Config):
        size = config.data.image_size
        self.shape = (config.train.batch_size, config.data.channels, size, size)

    def batch(self, draw: int) -> Tensor:
        rng = torch.Generator().manual_seed(draw)
        return torch.randint(0, 256, self.shape, generator=rng, dtype=torch.uint8)


def draws_of(state: State, step: int | None = None) -> list[list[Batch]]:
    return state.prepare(Noise(state.config), state.step if step is None else step)


def advance(state: State, steps: int = 1) -> None:
    for _ in range(steps):
        state.advance(draws_of(state))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def everything(state: State) -> dict[str, Tensor]:
    """Copies of all that a step can change, the log's window left out."""
    parts = {"g": state.task.generator, "ema": state.task.average, "guard": state.guard}
    for role in state.task.discriminators:
        parts[role.name] = role.net
        if role.matching is not None:
            parts["matching." + role.name] = role.matching
    found = {f"{part}.{name}": value for part, net in parts.items() for name, value in tensors_of(net).items()}
    for name, optimiser in state.optimisers.items():
        found |= {f"adam.{name}.{key}": value.clone() for key, value in optimiser.state().items()}
    return found


def checkpoint_of(state: State) -> Checkpoint:
    """What a checkpoint of `state` would hold, in tensors of its own, contiguous as a file has them."""
    tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.tensors().items()}
    meta = Meta(
        step=state.step,
        config=state.config.model_dump(mode="json"),
        data="",
        held_out=None,
        images=ImagesIdentity({}, None),
        machine={},
        window=dict(state.window.counts),
    )
    return Checkpoint(meta, tensors)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal to the bit (not-a-number equals itself)."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name].nan_to_num(123.0), b[name].nan_to_num(123.0))]


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference between tensors of the same name."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel())


class Calls:
    """Counts forwards of a module and notes what each was asked for."""

    def __init__(self, net: nn.Module):
        self.asked: list[dict[str, Any]] = []
        forward = net.forward

        def counted(image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> Any:
            self.asked.append(
                {
                    "layers": layers,
                    "logits": logits,
                    "image": image.detach().clone(),
                    "grad": torch.is_grad_enabled() and image.requires_grad,
                    "weights": any(p.requires_grad for p in net.parameters()),
                }
            )
            return forward(image, layers, logits)

        net.forward = counted  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.asked)


class Flops(TorchDispatchMode):
    """Multiply-adds of all matrix products and convolutions. (`FlopCounterMode` cannot look into `autograd.grad`.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(work: Callable[[], object]) -> int:
    with Flops() as counter:
        work()
    return counter.total
