"""Building blocks that several nets share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import spectral_norm


@torch.no_grad()
def init_normal(net: nn.Module, generator: torch.Generator) -> None:
    """Radford et al. 2016: convolutions N(0, 0.02), batch-norm weights N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.normal_(0.0, 0.02, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1.0, 0.02, generator=generator)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()


def activate(x: Tensor, inplace: bool = True) -> Tensor:
    """In place unless x itself is a feature that may have been asked for."""
    return F.leaky_relu(x, 0.2, inplace=inplace)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(channels, 8), channels),
}


def blocks_of(blocks: nn.ModuleList) -> Iterator[nn.ModuleDict]:
    """The blocks, each of which is a dict of modules."""
    for block in blocks:
        assert isinstance(block, nn.ModuleDict)
        yield block


class ConvDiscriminator(nn.Module):
    """Blocks of a convolution, a norm (but on the first block; or spectral norm on all) and a leaky ReLU, then `head`.

    Features: `blockK.conv` (before the norm) and `blockK`.

    Args:
        wide: channels of the image and of each block.
        kernels, strides: of each block's convolution.
        norm: a key of NORMS, `spectral` or `none`.
        head: the last convolution, without first weights.
        generator: of the first weights.
    """

    def __init__(
        self,
        wide: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        norm: str,
        head: nn.Conv2d,
        generator: torch.Generator,
    ):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(wide)):
            normed = norm in NORMS and i > 0
            conv = nn.Conv2d(inputs, outputs, kernels[i], strides[i], padding=1, bias=not normed)
            block = nn.ModuleDict({"conv": conv})
            if normed:
                block["norm"] = NORMS[norm](outputs)
            self.blocks.append(block)
        self.head = head
        init_normal(self, generator)
        if norm == "spectral":
            for layer in [*(block["conv"] for block in blocks_of(self.blocks)), self.head]:
                spectral_norm(layer, generator)

        count = len(self.blocks)
        names = [f"block{i}" for i in range(1, count + 1)]
        middle = math.ceil(count / 2)
        self.feature_names = tuple(name + tail for name in names for tail in (".conv", ""))
        self.auto = f"{names[-1]}.conv"
        self.groups = {
            "early": tuple(names[: count // 2]),
            "mid": tuple(names[middle - 1 : middle + (count % 2 == 0)]),
            "key": tuple(names),
            "all": self.feature_names,
        }

    def trunk(self, x: Tensor, layers: tuple[str, ...], logits: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """What feeds the head, and the features of `layers`; without `logits` no further than these need."""
        features: dict[str, Tensor] = {}
        for i, block in enumerate(blocks_of(self.blocks), 1):
            if not logits and len(features) == len(layers):
                break
            x = block["conv"](x)
            if f"block{i}.conv" in layers:
                features[f"block{i}.conv"] = x
                if not logits and len(features) == len(layers):
                    break
            normed = "norm" in block
            if normed:
                x = block["norm"](x)
            x = activate(x, inplace=normed)  # in place only where no feature holds the same memory
            if f"block{i}" in layers:
                features[f"block{i}"] = x
        return x, features


class Doubling(nn.Module):
    """(B, C, h, w) at twice its size, cropped to `size`: zeros between the pixels, then a fixed kernel along each side.

    With an odd number of weights output 2i lies on input i, which is where a strided 3 x 3 convolution took it from; with
    an even one, half a pixel before and behind. Beyond the border x repeats itself. Deterministic on every device and
    differentiable twice, which interpolation is not.

    Args:
        weights: in ratio, at least three; `kernel` holds them with sum 1, in a buffer that is not saved, so that
            neither first weights nor a file can change it.
    """

    kernel: Tensor

    def __init__(self, weights: Sequence[float]):
        super().__init__()
        self.register_buffer("kernel", torch.tensor(weights) / sum(weights), persistent=False)

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
