"""Tasks: what is learned. A task owns its nets and losses; the step owns the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..augment import NUMBERS, augment
from ..config import GanLossConfig
from ..config.losses import ramped
from ..feature_matching import FeatureMatching
from ..feature_matching.discriminator import Discriminator, DiscriminatorOutput, at_each_scale, read
from ..feature_matching.statistics import at_least_float32
from ..losses.adversarial import PAIRED


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
        *,
        gan: GanLossConfig,
        matching: FeatureMatching | None,
        policy: tuple[str, ...],
        trained: bool,
        precision: torch.dtype,
    ):
        assert isinstance(net, Discriminator)
        self.name, self.net, self.gan, self.matching = name, net, gan, matching
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
            out = read(self.net if exact else self.compiled, image, layers, logits)
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
        return self.gan.type in PAIRED

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
    discriminators: tuple[DiscriminatorRole, ...]

    def plan(self, step: int) -> StepPlan: ...

    def prepare(self, raw: Any, draw: int) -> list[Batch]:
        """Micro-batches of global draw number `draw` from this process's uint8 images (b, C, H, W)."""
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
        """Those of `image_weights` that are named, by what the log calls them, times their weights. Each has a graph of its
        own, so that they can be differentiated one after the other."""
        ...
