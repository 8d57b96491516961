"""PatchGAN, the discriminator of pix2pix (Isola et al. 2017, arXiv:1611.07004, sec. 6.1.2): a logit for each patch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..feature_matching.discriminator import DiscriminatorOutput
from .base import init_normal
from .norm import spectral_norm

WIDEST = 8
"""No block has more than this many times the first one's channels."""

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(channels, 8), channels),
}


class PatchGan(nn.Module):
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
        super().__init__()
        assert blocks >= 2
        self.smallest = 3 * 2 ** (blocks - 1)
        self.blocks = nn.ModuleList()
        inputs = channels
        for i in range(blocks):
            outputs = width * min(2**i, WIDEST)
            normed = norm in NORMS and i > 0
            stride = 2 if i < blocks - 1 else 1
            block = nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=not normed)})
            if normed:
                block["norm"] = NORMS[norm](outputs)
            self.blocks.append(block)
            inputs = outputs
        self.head = nn.Conv2d(inputs, 1, 4, padding=1)
        init_normal(self, generator)
        if norm == "spectral":
            for conv in [block["conv"] for block in self.blocks] + [self.head]:  # type: ignore[index]
                spectral_norm(conv, generator)

        names = [f"block{i}" for i in range(1, blocks + 1)]
        middle = math.ceil(blocks / 2)
        self.feature_names = tuple(name + tail for name in names for tail in (".conv", ""))
        self.auto = f"{names[-1]}.conv"
        self.groups = {
            "early": tuple(names[: blocks // 2]),
            "mid": tuple(names[middle - 1 : middle + (blocks % 2 == 0)]),
            "key": tuple(names),
            "all": self.feature_names,
        }

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if min(image.shape[2:]) < self.smallest:
            raise UserError(
                f"discriminator: patchgan with {len(self.blocks)} blocks judges images of at least {self.smallest} px, "
                f"not {image.shape[3]} x {image.shape[2]}; give it fewer blocks or larger images"
            )
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
        return DiscriminatorOutput(self.head(x) if logits else None, features)
