"""DCGAN (Radford, Metz & Chintala 2016, arXiv:1511.06434): a generator and a discriminator of strided convolutions.

Both nets pass through the same sizes: the image is halved (28, 32, 64 or 128 px) until 4 px are left. For 28 px the
innermost step is 7 -> 4, by a kernel of 3 instead of 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_matching.discriminator import DiscriminatorOutput
from .base import init_normal
from .norm import spectral_norm

KERNELS = {28: (4, 4, 3), 32: (4, 4, 4), 64: (4, 4, 4, 4), 128: (4, 4, 4, 4, 4)}
"""Kernel of each halving, from the image inwards; stride 2, padding 1."""


class DcganGenerator(nn.Module):
    """Images (B, channels, size, size) in (-1, 1) from latents (B, latent_dim)."""

    def __init__(self, size: int, channels: int, width: int, latent_dim: int, generator: torch.Generator):
        super().__init__()
        kernels = KERNELS[size][::-1]
        wide = width * 2 ** (len(kernels) - 1)
        self.latent_dim = latent_dim
        self.project = nn.ConvTranspose2d(latent_dim, wide, 4, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.blocks = nn.ModuleList()
        for kernel in kernels[:-1]:
            block = nn.ModuleDict(
                {
                    "conv": nn.ConvTranspose2d(wide, wide // 2, kernel, stride=2, padding=1, bias=False),
                    "norm": nn.BatchNorm2d(wide // 2),
                }
            )
            self.blocks.append(block)
            wide //= 2
        self.image = nn.ConvTranspose2d(wide, channels, kernels[-1], stride=2, padding=1)
        init_normal(self, generator)

    def forward(self, latent: Tensor) -> Tensor:
        x = F.relu(self.norm(self.project(latent[:, :, None, None])), inplace=True)
        for block in self.blocks:
            x = F.relu(block["norm"](block["conv"](x)), inplace=True)  # type: ignore[index]
        return torch.tanh(self.image(x))


class DcganDiscriminator(nn.Module):
    """Logits (B,) for images (B, channels, size, size); features `blockK.conv` (before the norm) and `blockK`."""

    def __init__(self, size: int, channels: int, width: int, norm: str, generator: torch.Generator):
        super().__init__()
        self.blocks = nn.ModuleList()
        kernels = KERNELS[size]
        inputs = channels
        for i, kernel in enumerate(kernels):
            outputs = width * 2**i
            normed = norm in ("batch", "group") and i > 0
            block = nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, kernel, stride=2, padding=1, bias=not normed)})
            if normed:
                block["norm"] = (
                    nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(math.gcd(outputs, 8), outputs)
                )
            self.blocks.append(block)
            inputs = outputs
        self.head = nn.Conv2d(inputs, 1, 4)
        init_normal(self, generator)
        if norm == "spectral":
            for conv in [block["conv"] for block in self.blocks] + [self.head]:  # type: ignore[index]
                spectral_norm(conv, generator)

        count = len(kernels)
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

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        assert set(layers) <= set(self.feature_names), layers
        features: dict[str, Tensor] = {}
        x = image
        for i, block in enumerate(self.blocks, 1):
            if not logits and len(features) == len(layers):
                return DiscriminatorOutput(None, features)
            x = block["conv"](x)  # type: ignore[index]
            if f"block{i}.conv" in layers:
                features[f"block{i}.conv"] = x
                if not logits and len(features) == len(layers):
                    return DiscriminatorOutput(None, features)
            normed = "norm" in block  # type: ignore[operator]
            if normed:
                x = block["norm"](x)  # type: ignore[index]
            x = F.leaky_relu(x, 0.2, inplace=normed)  # in place only where no tap holds the same memory
            if f"block{i}" in layers:
                features[f"block{i}"] = x
        if not logits:
            return DiscriminatorOutput(None, features)
        with torch.autocast(x.device.type, enabled=False):  # half precision would lose the differences between logits
            return DiscriminatorOutput(self.head(x.to(self.head.weight.dtype)).flatten(), features)
