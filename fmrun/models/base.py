"""Small things that all nets share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
