"""PatchGAN, the discriminator of pix2pix (Isola et al. 2017, arXiv:1611.07004, sec. 6.1.2): a logit for each patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import DiscriminatorConfig
from ..feature_matching.discriminator import DiscriminatorOutput, Shape
from ..runtime.errors import UserError
from .base import ConvDiscriminator

WIDEST = 8
"""No block has more than this many times the first one's channels."""


class PatchGan(ConvDiscriminator):
    """Logits (B, 1, h, w) for images (B, channels, H, W); features `blockK.conv` (before the norm) and `blockK`.

    `blocks` - 1 convolutions of stride 2 and one of stride 1, kernel 4, each with twice the channels of the one
    before, up to 8 `width`; then the head. With 4 blocks a logit sees 70 x 70 px.

    Args:
        channels: of the images.
        width: channels of the first block.
        norm: `batch`, `instance`, `group` (none of them on the first block), `spectral` or `none`.
        generator: of the first weights.
        blocks: how many, at least 2.
    """

    def __init__(self, channels: int, width: int, norm: str, generator: torch.Generator, *, blocks: int = 4):
        assert blocks >= 2
        wide = [channels, *(width * min(2**i, WIDEST) for i in range(blocks))]
        head = nn.Conv2d(wide[-1], 1, 4, padding=1)
        super().__init__(wide, [4] * blocks, [2] * (blocks - 1) + [1], norm, head, generator)
        self.smallest = 3 * 2 ** (blocks - 1)

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if min(image.shape[2:]) < self.smallest:
            raise UserError(
                f"discriminator: patchgan with {len(self.blocks)} blocks judges images of at least {self.smallest} px, "
                f"not {image.shape[3]} x {image.shape[2]}; give it fewer blocks or larger images"
            )
        x, features = self.trunk(image, layers, logits)
        return DiscriminatorOutput(self.head(x) if logits else None, features)


def discriminator(config: DiscriminatorConfig, image: Shape, rng: torch.Generator) -> nn.Module:
    """The discriminator of images (C, H, W)."""
    return PatchGan(image[0], config.width, config.norm, rng, blocks=config.blocks)
