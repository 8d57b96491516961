"""Tasks: what is learned. A task owns its nets and losses; the step owns the order in which they are called.

A task is a module of this folder with a `KIND`, and a row in `config/tables.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.losses import ramped
from ..config.schema import Config, GanLossConfig
from ..config.tables import ADVERSARIAL_LOSSES
from ..data.feed import Feed, PairBatch
from ..data.files import Progress
from ..data.store import Images
from ..feature_matching import FeatureMatching
from ..feature_matching.discriminator import Discriminator, DiscriminatorOutput, Shape, at_each_scale, truncated_forward
from ..feature_matching.statistics import at_least_float32
from ..models.augment import NUMBERS, augment
from ..runtime.dist import World

Raw = Tensor | PairBatch
"""What a feed gives: images, uint8 (b, C, H, W), or pairs of them."""


@dataclass(frozen=True)
class Batch:
    """What one update of one net sees: this process's slice of the global batch, or one micro-batch of it."""

    real: Tensor
    """Real images (b, C, H, W) in [-1, 1]."""
    noise: Tensor | None = None
    """Latents (b, latent_dim)."""
    condition: Tensor | None = None
    """What the generator starts from when it does not start from noise."""
    augment: Tensor | None = None
    """Uniform numbers (2, b, NUMBERS): the discriminator's augmentation in its own update and in the generator's."""


@dataclass(frozen=True)
class DiscriminatorPlan:
    """What one discriminator does in a step; a function of the step alone."""

    train: bool = False
    adversarial: bool = False
    layers: tuple[str, ...] = ()
    """Those that are matched."""
    penalty: bool = False
    measure: bool = False
    """Whether the share of the gradient is measured."""


@dataclass(frozen=True)
class StepPlan:
    """A step's shape. Steps with equal plans run the same kernels."""

    discriminators: tuple[DiscriminatorPlan, ...]
    log_diversity: bool = False
    image_losses: tuple[str, ...] = ()
    """The losses between generated images and their originals that act."""

    @property
    def measure(self) -> bool:
        return any(plan.measure for plan in self.discriminators)

    def trained(self, task: Task) -> Iterator[tuple[int, DiscriminatorRole, DiscriminatorPlan]]:
        """Discriminators that are updated, each with its place and its plan."""
        return ((i, d, plan) for i, d, plan in self._roles(task) if plan.train)

    def acting(self, task: Task) -> Iterator[tuple[int, DiscriminatorRole, DiscriminatorPlan]]:
        """Discriminators that the generator learns from, each with its place and its plan."""
        return ((i, d, plan) for i, d, plan in self._roles(task) if plan.adversarial or plan.layers)

    def _roles(self, task: Task) -> Iterator[tuple[int, DiscriminatorRole, DiscriminatorPlan]]:
        for i, (d, plan) in enumerate(zip(task.discriminators, self.discriminators, strict=True)):
            yield i, d, plan


class StepScalars:
    """A step's numbers, as scalars on the device that stay where they are: changing them recompiles and waits for nothing,
    and a step that was recorded reads the new ones."""

    def __init__(
        self, discriminators: int, device: torch.device, dtype: torch.dtype, image_losses: tuple[str, ...] = ()
    ):
        self.step = 0
        self.clock = torch.zeros((), device=device, dtype=torch.int64)
        """The step, for what only the device has to know."""
        self.image = {name: torch.zeros((), device=device, dtype=dtype) for name in image_losses}
        """Weights of losses that no discriminator judges."""
        self.adversarial = torch.zeros(discriminators, device=device, dtype=dtype)
        self.matching = torch.zeros(discriminators, device=device, dtype=dtype)

    def set(
        self,
        step: int,
        adversarial: Sequence[float],
        matching: Sequence[float],
        image: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.step = step
        self.clock.fill_(step)
        for name, weight in image.items():
            self.image[name].fill_(weight)
        for i, (a, m) in enumerate(zip(adversarial, matching, strict=True)):
            self.adversarial[i].fill_(a)
            self.matching[i].fill_(m)


class DiscriminatorRole:
    """A discriminator and all that belongs to it."""

    def __init__(
        self,
        name: str,
        net: nn.Module,
        image: Shape,
        *,
        gan: GanLossConfig,
        matching: FeatureMatching | None,
        policy: tuple[str, ...],
        trained: bool,
        precision: torch.dtype,
    ):
        assert isinstance(net, Discriminator)
        self.name, self.net, self.gan, self.matching = name, net, gan, matching
        self.image = image
        """Shape (C, H, W) of the images that it is trained on."""
        self.policy, self.trained, self.precision = policy, trained, precision
        self.compiled: nn.Module = net
        """Compiled, where the config asks for it; the same parameters as `net`."""

    def __call__(
        self,
        image: Tensor,
        numbers: Tensor | None,
        layers: tuple[str, ...] = (),
        *,
        logits: bool = True,
        exact: bool = False,
    ) -> DiscriminatorOutput:
        """Logits and features of augmented images. `exact` runs eagerly in at least float32, as double backward needs."""
        image = augment(image, numbers, self.policy)
        half = self.precision in (torch.bfloat16, torch.float16) and not exact
        with torch.autocast(image.device.type, dtype=self.precision if half else None, enabled=half):
            out = truncated_forward(self.net if exact else self.compiled, image, layers, logits)
        if out.logits is None or not half:
            return out
        return DiscriminatorOutput(at_each_scale(at_least_float32, out.logits), out.features)

    def mildest(self, image: Tensor) -> Tensor | None:
        """Numbers for the mildest augmentation of `image`, where there is any: for looking, not for training."""
        if not self.policy:
            return None
        numbers = image.new_full((len(image), NUMBERS), 0.5)
        numbers[:, 5:] = 0.0  # the hole in the corner
        return numbers

    @property
    def suffix(self) -> str:
        """What tells this one's metrics from those of the first, which is called `discriminator`."""
        return "" if self.name == "discriminator" else f".{self.name}"

    @property
    def relativistic(self) -> bool:
        return ADVERSARIAL_LOSSES[self.gan.type].relativistic

    def adversarial_weight(self, step: int) -> float:
        """Weight of the generator's adversarial term at `step`, with its start and ramp."""
        return self.gan.weight * ramped(self.gan, step)

    def matching_weight(self, step: int) -> float:
        """lambda with its start and ramp."""
        return self.matching.ramped(step) if self.matching is not None else 0.0

    def plan(self, step: int, has_other_losses: bool = False) -> DiscriminatorPlan:
        """What it does at `step`; `has_other_losses`: whether the generator has some, to compare the matching with."""
        matching = self.matching if self.matching is not None and self.matching.active(step) else None
        adversarial = self.adversarial_weight(step) > 0
        return DiscriminatorPlan(
            train=self.trained and (adversarial or matching is not None),
            adversarial=adversarial,
            layers=matching.layers if matching is not None else (),
            penalty=(self.gan.r1 > 0 or self.gan.r2 > 0) and step % self.gan.penalty_every == 0,
            measure=matching is not None
            and (adversarial or has_other_losses)
            and matching.due(step, self.gan.start_step if adversarial else 0),
        )


class Task(Protocol):
    """What the step and the loop need of a task."""

    generator: nn.Module
    average: nn.Module
    """The moving average of the generator."""
    discriminators: tuple[DiscriminatorRole, ...]
    precision: torch.dtype

    def plan(self, step: int) -> StepPlan: ...

    def scalars(self) -> StepScalars: ...

    def prepare(self, raw: Raw, draw: int) -> list[Batch]:
        """Micro-batches of global draw number `draw` from this process's images as its feed gives them."""
        ...

    def generate(self, batch: Batch) -> Tensor:
        """Images (b, C, H, W) in [-1, 1], at least float32, with a graph where gradients are on."""
        ...

    def image_weights(self, step: int) -> dict[str, float]:
        """Weight at `step` of every generator loss that reads the image itself, 0 where it does not act."""
        ...

    def image_losses(
        self, batch: Batch, image: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        """Those of `image_weights` that are named, times their weights. Each has a graph of its own, so that they can be
        differentiated one after the other."""
        ...

    def fit_average(self) -> None:
        """Fit the batch norm of the averaged generator to its weights."""
        ...

    def eager(self) -> AbstractContextManager[None]:
        """Inside, nets run uncompiled: what happens once is not worth compiling, and hooks are seen."""
        ...


class Data(Protocol):
    """A run's images, opened and checked."""

    @property
    def config(self) -> Config:
        """With what the images settle, as `data.channels`."""
        ...

    @property
    def train(self) -> Images: ...

    @property
    def valid(self) -> Images | None:
        """Those held out of training."""
        ...

    def feed(self, world: World, device: torch.device, start: int, *, cache: str = "auto", workers: int = 0) -> Feed:
        """This process's share of the images of each draw, from draw `start` on."""
        ...

    def describe(self) -> str: ...

    def draw(self, path: Path, rows: int) -> None:
        """Write a sheet of the first images that training sees, in its order."""
        ...


class Monitor(Protocol):
    """What is seen of the averaged generator while it is trained."""

    names: tuple[str, ...]
    """The keys of `held_out`."""

    @property
    def generated(self) -> Callable[[int], Iterator[Tensor]] | None:
        """Makes so many images, uint8 (n, C, H, W), a few hundred at a time, the same latents every time; None where
        images are not made from latents."""
        ...

    def held_out(self, count: int) -> dict[str, float]:
        """Measurements on `count` held-out images."""
        ...

    def preview(self, count: int) -> Tensor:
        """A sheet, uint8 (C, H, W), of `count` images that are the same every time."""
        ...


class Open(Protocol):
    def __call__(self, config: Config, progress: Progress | None = None, *, trained: bool = True) -> Data:
        """Open and check the images. Without `trained` they are only measured on, and may be too small to train on."""
        ...


@dataclass(frozen=True)
class Kind:
    """The parts of a task, each made when it is needed."""

    task: Callable[[Config, torch.device, World], Task]
    generator: Callable[[Config, int], nn.Module]
    """The generator of images of so many channels with its first weights, on the CPU."""
    open: Open
    monitor: Callable[[Task, Data], Monitor]
    blank: Callable[[Config, World, torch.device], Raw]
    """A batch in place of data, to see what fits in memory."""


def kind(name: str) -> Kind:
    """The parts of the task of this name, one of `config.tables.TASKS`."""
    parts: Kind = import_module(f".{name}", __name__).KIND
    return parts
