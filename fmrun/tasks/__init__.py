"""Tasks: what is learned. A task owns its nets and losses; the step owns the order in which they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..augment import NUMBERS, augment
from ..config import GanLossConfig
from ..config.losses import ramped
from ..feature_matching import FeatureMatching
from ..losses.adversarial import PAIRED
from ..losses.statistics import widen
from ..models.base import Discriminator, Out, at_each_scale


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
class CriticPlan:
    """What one discriminator does in a step; a function of the step alone."""

    train: bool
    adversarial: bool
    taps: tuple[str, ...]
    penalty: bool
    measure: bool


@dataclass(frozen=True)
class Plan:
    """A step's shape. Steps with equal plans run the same kernels."""

    critics: tuple[CriticPlan, ...]
    observe: bool = False
    """Whether the generated images are themselves looked at, for the log."""
    image_losses: tuple[str, ...] = ()
    """The losses that act and no discriminator judges."""


class Live:
    """A step's numbers, as scalars on the device that stay where they are: changing them recompiles and waits for nothing,
    and a step that was recorded reads the new ones."""

    def __init__(self, critics: int, device: torch.device, dtype: torch.dtype, image_losses: tuple[str, ...] = ()):
        self.step = 0
        self.clock = torch.zeros((), device=device, dtype=torch.int64)
        """The step, for what only the device has to know."""
        self.image = {name: torch.zeros((), device=device, dtype=dtype) for name in image_losses}
        """Weights of losses that no discriminator judges."""
        self.adversarial = torch.zeros(critics, device=device, dtype=dtype)
        self.matching = torch.zeros(critics, device=device, dtype=dtype)

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


class Critic:
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
        self.fast: nn.Module = net
        """Compiled, where the config asks for it; the same parameters as `net`."""

    def __call__(
        self,
        image: Tensor,
        numbers: Tensor | None,
        taps: tuple[str, ...] = (),
        *,
        logits: bool = True,
        exact: bool = False,
    ) -> Out:
        """Judge augmented images. `exact` runs eagerly in at least float32, as double backward needs."""
        image = augment(image, numbers, self.policy)
        half = self.precision in (torch.bfloat16, torch.float16) and not exact
        with torch.autocast(image.device.type, dtype=self.precision if half else None, enabled=half):
            out = (self.net if exact else self.fast)(image, taps, logits)
        return out if out.logits is None or not half else Out(at_each_scale(widen, out.logits), out.features)

    def mildest(self, image: Tensor) -> Tensor | None:
        """Numbers for the mildest augmentation of `image`, where there is any: for looking, not for training."""
        if not self.policy:
            return None
        numbers = image.new_full((len(image), NUMBERS), 0.5)
        numbers[:, 5:] = 0.0  # the hole in the corner
        return numbers

    @property
    def suffix(self) -> str:
        """What tells this critic's metrics from those of the first, which is called `discriminator`."""
        return "" if self.name == "discriminator" else f".{self.name}"

    @property
    def paired(self) -> bool:
        return self.gan.type in PAIRED

    def adversarial_weight(self, step: int) -> float:
        """Weight of the generator's adversarial term at `step`, with its start and ramp."""
        return self.gan.weight * ramped(self.gan, step)

    def matching_weight(self, step: int) -> float:
        """lambda with its start and ramp."""
        return self.matching.config.weight * ramped(self.matching.config, step) if self.matching is not None else 0.0

    def plan(self, step: int, others: bool = False) -> CriticPlan:
        """What it does at `step`; `others`: whether the generator has losses besides, to compare the matching with."""
        matching = self.matching is not None and self.matching.active(step)
        adversarial = self.adversarial_weight(step) > 0
        penalised = (self.gan.r1 > 0 or self.gan.r2 > 0) and step % self.gan.penalty_every == 0
        return CriticPlan(
            train=self.trained and (adversarial or matching),
            adversarial=adversarial,
            taps=self.matching.layers if matching and self.matching is not None else (),
            penalty=penalised,
            measure=matching
            and (adversarial or others)
            and self.matching is not None
            and self.matching.due(step, self.gan.start_step if adversarial else 0),
        )


class Task(Protocol):
    """What the step and the loop need of a task."""

    generator: nn.Module
    critics: tuple[Critic, ...]

    def plan(self, step: int) -> Plan: ...

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
        self, batch: Batch, image: Tensor, step: int, weights: Mapping[str, Tensor | float] | None = None
    ) -> dict[str, Tensor]:
        """Those that act at `step`, by their names in the log, times `weights` (else: those of `image_weights`)."""
        ...
