"""The face every discriminator shows to the step, and small things all nets share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Out:
    """What a discriminator was asked for: logits, (B,) or (B, 1, h, w), or None; features by name, in order."""

    logits: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Discriminator(Protocol):
    """A net that judges images and can be read at any of its layers."""

    feature_names: tuple[str, ...]
    """In the order they are computed; an index into it names the same layer."""
    groups: Mapping[str, tuple[str, ...]]
    """`early`, `mid`, `key` and `all`."""
    auto: str
    """The last intermediate convolution: the one that feeds the head."""

    def __call__(self, image: Tensor, taps: tuple[str, ...] = (), logits: bool = True) -> Out:
        """Judge `image` (B, C, H, W) in [-1, 1], computing only what the taps and logits asked for depend on."""
        ...


@torch.no_grad()
def init_normal(net: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Radford et al. 2016: convolutions N(0, 0.02), batch-norm weights N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.normal_(0.0, std, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1.0, std, generator=generator)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()


def double(
    x: Tensor, even: Sequence[Tensor | float | None], odd: Sequence[Tensor | float | None], size: tuple[int, int]
) -> Tensor:
    """x (B, C, h, w) at twice its size, cropped to `size`, by a separable filter given phase by phase.

    Along each side, output 2i is `even` and output 2i + 1 is `odd` times (x[i - 1], x[i], x[i + 1]), None standing
    for 0; beyond the border x repeats itself. Written out in sums, which unlike interpolation are deterministic on
    every device, differentiable twice, and keep nothing for the backward pass. The result is channels_last.
    """
    x = x.permute(0, 2, 3, 1)
    for dim in (1, 2):
        n = x.shape[dim]
        edged = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, n - 1, 1)], dim)
        around = [edged.narrow(dim, k, n) for k in range(3)]
        phases = []
        for weights in (even, odd):
            terms = [near * weight for near, weight in zip(around, weights, strict=True) if weight is not None]
            phases.append(functools.reduce(torch.add, terms))
        x = torch.stack(phases, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, size[dim - 1])
    return x.permute(0, 3, 1, 2)


def parameter_count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
