"""The face every discriminator shows to the step, and small things all nets share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Logits = Tensor | tuple[Tensor, ...]
"""(B,) or (B, 1, h, w); several such where a discriminator judges at several scales, which count alike."""


def scales(logits: Logits) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def at_each_scale(work: Callable[[Tensor], Tensor], logits: Logits) -> Logits:
    return tuple(map(work, logits)) if isinstance(logits, tuple) else work(logits)


def mean_logit(logits: Logits) -> Tensor:
    """Mean over the elements of each scale, and over scales."""
    return torch.stack([scale.mean() for scale in scales(logits)]).mean()


@dataclass(frozen=True)
class Out:
    """What a discriminator was asked for: logits or None; features by name, in order."""

    logits: Logits | None
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


class Doubling(nn.Module):
    """(B, C, h, w) at twice its size, cropped to `size`: zeros between the pixels, then a fixed kernel along each side.

    With an odd number of taps output 2i lies on input i, which is where a strided 3 x 3 convolution took it from; with
    an even one, half a pixel before and behind. Beyond the border x repeats itself. Deterministic on every device and
    differentiable twice, which interpolation is not.

    Args:
        taps: weights in ratio, at least three; `kernel` holds them with sum 1, in a buffer that is not saved, so that
            neither first weights nor a file can change it.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float]):
        super().__init__()
        self.register_buffer("kernel", torch.tensor(taps) / sum(taps), persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        # on a CPU sums take two to three times as long (docs/performance.md); elsewhere compilers fuse them
        x = self._convolved(x) if x.device.type == "cpu" else self._summed(x)
        return x if x.shape[2:] == size else x[:, :, : size[0], : size[1]]

    def _convolved(self, x: Tensor) -> Tensor:
        count, channels = len(self.kernel), x.shape[1]
        return F.conv_transpose2d(
            F.pad(x, (1, 1, 1, 1), mode="replicate"),
            (4 * self.kernel[:, None] * self.kernel).to(x.dtype).expand(channels, 1, count, count),
            stride=2,
            padding=(count - 1) // 2 + 2,
            output_padding=count % 2,
            groups=channels,
        )

    def _summed(self, x: Tensor) -> Tensor:
        """The same, phase by phase: outputs 2i and 2i + 1 are sums of x[i - 1], x[i] and x[i + 1]."""
        weights, middle = (2 * self.kernel).unbind(), (len(self.kernel) - 1) // 2
        x = x.permute(0, 2, 3, 1)
        for dim in (1, 2):
            n = x.shape[dim]
            edged = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, n - 1, 1)], dim)
            phases = []
            for phase in (0, 1):
                places = ((k, middle + phase - 2 * (k - 1)) for k in range(3))
                terms = [edged.narrow(dim, k, n) * weights[at] for k, at in places if 0 <= at < len(weights)]
                phases.append(functools.reduce(torch.add, terms))
            x = torch.stack(phases, dim + 1).flatten(dim, dim + 1)
        return x.permute(0, 3, 1, 2)


def parameter_count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
