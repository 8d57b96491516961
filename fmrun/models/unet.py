"""U-Net discriminator with spectral norm (Wang et al. 2021, Real-ESRGAN, arXiv:2107.10833, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import DiscriminatorConfig
from ..feature_matching.discriminator import DiscriminatorOutput, Shape
from ..runtime.errors import UserError
from .base import Doubling, activate, init_normal
from .norm import spectral_norm

SMALLEST = 8
BILINEAR = (1, 3, 3, 1)
"""The weights of bilinear interpolation to twice the size."""


class UNet(nn.Module):
    """Logits (B, 1, H, W) for images (B, channels, H, W) of any size from 8 px.

    Features, in order, each after its activation: `input` (n, H, W); `down1` … `down3`, (2n, H/2, W/2) … (8n, H/8,
    W/8), rounded up; `up1` … `up3`, back to (n, H, W), each with the encoder's features of its size added; `refine1`
    and `refine2`. All convolutions but the first and the last have spectral norm.

    Args:
        channels: of the images.
        width: n.
        generator: of the first weights.
    """

    def __init__(self, channels: int, width: int, generator: torch.Generator):
        super().__init__()
        n = width

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

        self.input = nn.Conv2d(channels, n, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(n * 2**i, n * 2 ** (i + 1), 4, stride=2, padding=1, bias=False) for i in range(3)
        )
        self.up = nn.ModuleList(conv(n * 2**i, n * 2 ** (i - 1)) for i in (3, 2, 1))
        self.upsample = Doubling(BILINEAR)
        self.refine = nn.ModuleList([conv(n, n), conv(n, n)])
        self.head = nn.Conv2d(n, 1, 3, padding=1)
        init_normal(self, generator)
        for module in [*self.down, *self.up, *self.refine]:
            spectral_norm(module, generator)

        down, up = ("down1", "down2", "down3"), ("up1", "up2", "up3")
        self.feature_names = ("input", *down, *up, "refine1", "refine2")
        self.auto = "refine2"
        self.groups = {
            "early": ("input", "down1", "down2"),
            "mid": ("down3", "up1"),
            "key": ("down1", "down3", "up2", "refine2"),
            "all": self.feature_names,
        }

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if min(image.shape[2:]) < SMALLEST:
            raise UserError(
                f"discriminator: unet judges images of at least {SMALLEST} px, not {image.shape[3]} x {image.shape[2]}"
            )
        features: dict[str, Tensor] = {}
        skips: list[Tensor] = []
        x = image
        for name in self.feature_names:
            if not logits and len(features) == len(layers):
                return DiscriminatorOutput(None, features)
            x = self._layer(name, x, skips)
            if name in layers:
                features[name] = x
        return DiscriminatorOutput(self.head(x) if logits else None, features)

    def _layer(self, name: str, x: Tensor, skips: list[Tensor]) -> Tensor:
        if name == "input":
            return activate(self.input(x))
        kind, i = name[:-1], int(name[-1]) - 1
        if kind == "down":
            skips.append(x)
            return activate(self.down[i](_even(x)))
        if kind == "up":
            skip = skips.pop()
            x = self.upsample(x, (skip.shape[2], skip.shape[3]))
            return activate(self.up[i](x)) + skip
        return activate(self.refine[i](x))


def _even(x: Tensor) -> Tensor:
    """An odd side gets its last row or column twice, so that halving rounds up."""
    for dim in (2, 3):
        if x.shape[dim] % 2:
            x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
    return x


def discriminator(config: DiscriminatorConfig, image: Shape, rng: torch.Generator) -> nn.Module:
    """The discriminator of images (C, H, W)."""
    return UNet(image[0], config.width, rng)
