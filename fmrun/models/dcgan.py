"""DCGAN (Radford, Metz & Chintala 2016, arXiv:1511.06434): a generator and a discriminator of strided convolutions.

Both nets pass through the same sizes: the image is halved (28, 32, 64 or 128 px) until 4 px are left. For 28 px the
innermost step is 7 -> 4, by a kernel of 3 instead of 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import DiscriminatorConfig, GeneratorConfig
from ..feature_matching.discriminator import DiscriminatorOutput, Shape
from ..runtime.errors import UserError
from .base import ConvDiscriminator, blocks_of, init_normal

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
        for block in blocks_of(self.blocks):
            x = F.relu(block["norm"](block["conv"](x)), inplace=True)
        return torch.tanh(self.image(x))


class DcganDiscriminator(ConvDiscriminator):
    """Logits (B,) for images (B, channels, size, size); features `blockK.conv` (before the norm) and `blockK`."""

    def __init__(self, size: int, channels: int, width: int, norm: str, generator: torch.Generator):
        kernels = KERNELS[size]
        wide = [channels, *(width * 2**i for i in range(len(kernels)))]
        super().__init__(wide, kernels, [2] * len(kernels), norm, nn.Conv2d(wide[-1], 1, 4), generator)

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        assert set(layers) <= set(self.feature_names), layers
        x, features = self.trunk(image, layers, logits)
        if not logits:
            return DiscriminatorOutput(None, features)
        with torch.autocast(x.device.type, enabled=False):  # half precision would lose the differences between logits
            return DiscriminatorOutput(self.head(x.to(self.head.weight.dtype)).flatten(), features)


def generator(config: GeneratorConfig, image: Shape, rng: torch.Generator) -> nn.Module:
    """The generator of square images (C, H, W)."""
    return DcganGenerator(image[1], image[0], config.width, config.latent_dim, rng)


def discriminator(config: DiscriminatorConfig, image: Shape, rng: torch.Generator) -> nn.Module:
    """The discriminator of square images (C, H, W)."""
    if image[1] not in KERNELS:
        raise UserError(
            f"discriminator.type 'dcgan' judges images of {', '.join(map(str, KERNELS))} px, not {image[1]}"
        )
    return DcganDiscriminator(image[1], image[0], config.width, config.norm, rng)
