"""MUNet: a U-Net discriminator that judges every pixel by several branches.

                      image
        ┌───────────────┼────────────────────────────┐
    frequency         input ── enc1 … encN       gradient (optional)
        │               │      │      │              │
        │               │    patch  bottleneck       │
        │               │      │      │              │
        │               └──────┼── spatial           │
        └──────────────────────┴───┬──┴──────────────┘
                                fusion ── logits

Every branch ends in `width` channels at the image's size; a softmax over the branches, pixel by pixel, says how much
each counts. All convolutions have spectral norm (Miyato et al. 2018).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import DiscriminatorConfig
from ..feature_matching.discriminator import DiscriminatorOutput, Shape
from ..feature_matching.statistics import at_least_float32
from ..runtime.errors import UserError
from .base import Doubling, activate, init_normal
from .norm import spectral_norm

SMALLEST = 32
"""Pixels of the shorter side of an image, at least."""

PATCH_STAGE = 2
"""The encoder stage whose features the patch branch judges."""

HEAD_CHANNELS = 32
BINOMIAL = (1, 4, 6, 4, 1)
EPS = 1e-6


def _run(convolutions: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Convolutions, each with its activation and He's gain sqrt(2): under spectral norm alone every layer shrinks what
    it is given, and beside a skip connection nothing would be left of the deep features."""
    count = 0
    for conv in convolutions:
        x = activate(conv(x))
        count += 1
    return x * 2 ** (count / 2)


def luma(image: Tensor) -> Tensor:
    """(B, 1, H, W): BT.601 luma of RGB, the mean of any other channels."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    r, g, b = image.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def log_spectrum(x: Tensor) -> Tensor:
    """Spectrum F of x (B, 1, H, W) on a logarithmic scale, (B, 3, H, W), the mean in the middle:
    log(1 + |F|), and the real and imaginary parts scaled to that magnitude. At least float32, orthonormal."""
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.fftshift(torch.fft.fft2(at_least_float32(x), norm="ortho"), dim=(-2, -1))
        real, imaginary = spectrum.real, spectrum.imag
        magnitude = torch.sqrt(real.square() + imaginary.square() + EPS)
        logarithm = torch.log1p(magnitude)
        scale = logarithm / magnitude
        return torch.cat([logarithm, real * scale, imaginary * scale], 1)


def sobel(x: Tensor) -> Tensor:
    """Gradient magnitude sqrt(gx^2 + gy^2 + eps) of every channel of x (B, C, H, W), by Sobel's filter / 8."""
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    x = torch.cat([x[..., :1], x, x[..., -1:]], 3)
    across, down = x[..., 2:] - x[..., :-2], x[:, :, 2:] - x[:, :, :-2]
    gx = (across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]) / 8
    gy = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    with torch.autocast(x.device.type, enabled=False):
        return torch.sqrt(at_least_float32(gx).square() + at_least_float32(gy).square() + EPS)


class WindowAttention(nn.Module):
    """Self-attention within windows of at most `window` x `window` positions: cosine similarity, learned sharpness.

    Memory grows with the number of positions, not its square. Windows that reach over the border see only what is
    inside it. Written out because fused attention has no double backward, which R1 needs.
    """

    def __init__(self, channels: int, window: int):
        super().__init__()
        most = max(1, channels // HEAD_CHANNELS)
        self.heads = max(h for h in range(1, most + 1) if channels % h == 0)
        self.window = window
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.sharpness = nn.Parameter(torch.full((self.heads, 1, 1), math.log(10.0)))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = min(self.window, height), min(self.window, width)
        below, right = -height % rows, -width % columns
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)

        def windows(t: Tensor) -> Tensor:
            """(B, heads, d, H, W) -> (B, rows, columns, heads, positions, d)."""
            t = F.pad(t, (0, right, 0, below)).unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns))
            return t.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5)

        q, k, v = windows(_unit(q)), windows(_unit(k)), windows(v)
        scores = at_least_float32(q @ k.transpose(-2, -1)) * self.sharpness.clamp(max=math.log(100.0)).exp()
        if below or right:
            inside = x.new_ones(1, 1, 1, height, width, dtype=torch.bool)
            scores = scores.masked_fill(~windows(inside).transpose(-2, -1), -math.inf)
        y = scores.softmax(-1).to(v.dtype) @ v
        y = y.unflatten(4, (rows, columns)).permute(0, 3, 6, 1, 4, 2, 5)
        y = y.flatten(5, 6).flatten(3, 4)[..., :height, :width]
        return self.out(y.flatten(1, 2))


def _unit(t: Tensor) -> Tensor:
    """t (B, heads, d, H, W) at length 1 over d; smooth at 0, so that it has a second derivative there too."""
    wide = at_least_float32(t)
    return (wide * torch.rsqrt(wide.square().sum(2, keepdim=True) + EPS)).to(t.dtype)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


class Stage(nn.Module):
    """Half the size, rounded up."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.down = _conv(inputs, outputs, 2)
        self.conv = _conv(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return _run((self.down, self.conv), x)


class Bottleneck(nn.Module):
    """A residual of local attention, which begins small, and a convolution."""

    def __init__(self, channels: int, window: int):
        super().__init__()
        self.attention = WindowAttention(channels, window)
        self.gate = nn.Parameter(torch.full((channels, 1, 1), 0.1))
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _run((self.conv,), x + self.gate * self.attention(x))


class Lift(nn.Module):
    """Twice the size, joined by the encoder's features of that size."""

    def __init__(self, inputs: int, skip: int):
        super().__init__()
        self.narrow = nn.Conv2d(inputs, skip, 1)
        self.conv = _conv(2 * skip, skip)

    def forward(self, x: Tensor, skip: Tensor, upsample: Doubling) -> Tensor:
        x = upsample(self.narrow(x), (skip.shape[2], skip.shape[3]))
        return _run((self.conv,), torch.cat([x, skip], 1))


class MUNet(nn.Module):
    """Logits (B, 1, H, W) for images (B, channels, H, W) of any size from 32 px.

    Features, in order: `input`, `enc1` … `encN`, `bottleneck`, `spatial`, `frequency`, `patch`, `fusion`, and with
    `gradient` that branch. `input` and `fusion` are the convolutions themselves, all others come after an activation.

    Args:
        channels: of the images.
        width: n; the features are (n, H, W), those of stage i (n * ch_mult[i], H / 2^i, W / 2^i), rounded up.
        generator: of the first weights.
        ch_mult: one encoder stage for each entry.
        window: side of the attention's windows.
        gradient: whether to add the branch on Sobel's gradient magnitudes.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        generator: torch.Generator,
        *,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        window: int = 8,
        gradient: bool = False,
    ):
        super().__init__()
        assert ch_mult
        n, depth = width, len(ch_mult)
        wide = [n, *(n * m for m in ch_mult)]
        self.patch_stage = min(PATCH_STAGE, depth)
        self.upsample = Doubling(BINOMIAL)
        self.input = _conv(channels, n)
        self.encoder = nn.ModuleList(Stage(a, b) for a, b in itertools.pairwise(wide))
        self.bottleneck = Bottleneck(wide[-1], window)
        self.decoder = nn.ModuleList(Lift(a, b) for a, b in zip(wide[:0:-1], wide[-2::-1], strict=True))
        self.frequency = nn.ModuleList([_conv(3, n, 2), _conv(n, n, 2), _conv(n, n)])
        self.patch = nn.ModuleList([_conv(wide[self.patch_stage], n), _conv(n, n)])
        self.gradient = nn.ModuleList([_conv(channels, n), _conv(n, n)] if gradient else [])
        branches = 4 if gradient else 3
        self.weigh = _conv(branches * n, branches)
        self.fusion = _conv(n, n)
        self.head = _conv(n, 1)
        init_normal(self, generator)
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d):
                spectral_norm(module, generator)

        stages = tuple(f"enc{i}" for i in range(1, depth + 1))
        self.branches = ("spatial", "frequency", "patch") + ("gradient",) * gradient
        self.feature_names = (
            *("input", *stages, "bottleneck", "spatial", "frequency", "patch", "fusion"),
            *(("gradient",) if gradient else ()),
        )
        self.auto = "fusion"
        self.groups = {
            "early": stages[:3],
            "mid": (*stages[3:], "bottleneck", "spatial"),
            "key": (*stages[0:3:2], "bottleneck", "fusion"),
            "all": self.feature_names,
        }
        last = self._stages = {name: i for i, name in enumerate(("input", *stages))}
        last |= {"bottleneck": depth, "spatial": depth, "patch": self.patch_stage}

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if min(image.shape[2:]) < SMALLEST:
            raise UserError(
                f"discriminator: munet judges images of at least {SMALLEST} px, not {image.shape[3]} x {image.shape[2]}"
            )
        computed = self.feature_names if logits or "fusion" in layers else layers
        stages = max((self._stages.get(name, -1) for name in computed), default=-1)
        features: dict[str, Tensor] = {}
        sizes = [(image.shape[2], image.shape[3])]
        skips: list[Tensor] = []
        if stages >= 0:
            features["input"] = self.input(image)
            skips.append(activate(features["input"], inplace=False))
        for i, stage in enumerate(self.encoder[:stages] if stages > 0 else (), 1):
            skips.append(stage(skips[-1]))
            features[f"enc{i}"] = skips[-1]
            sizes.append((skips[-1].shape[2], skips[-1].shape[3]))
        if "bottleneck" in computed or "spatial" in computed:
            x = features["bottleneck"] = self.bottleneck(skips[-1])
            if "spatial" in computed:
                for lift, skip in zip(self.decoder, skips[-2::-1], strict=True):
                    x = lift(x, skip, self.upsample)
                features["spatial"] = x
        if "frequency" in computed:
            features["frequency"] = self._frequency(image)
        if "patch" in computed:
            features["patch"] = self._patch(skips[self.patch_stage], sizes[: self.patch_stage][::-1])
        if "gradient" in computed:
            features["gradient"] = _run(self.gradient, sobel(image))
        judged = None
        if logits or "fusion" in computed:
            features["fusion"] = self._fuse(*(features[name] for name in self.branches))
            judged = self.head(activate(features["fusion"], inplace=False)) if logits else None
        return DiscriminatorOutput(judged, {name: features[name] for name in self.feature_names if name in layers})

    def _frequency(self, image: Tensor) -> Tensor:
        x = log_spectrum(luma(image))
        whole = (x.shape[2], x.shape[3])
        half = (-(-whole[0] // 2), -(-whole[1] // 2))
        return self.upsample(self.upsample(_run(self.frequency, x), half), whole)

    def _patch(self, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        x = _run(self.patch, x)
        for size in sizes:
            x = self.upsample(x, size)
        return x

    def _fuse(self, *branches: Tensor) -> Tensor:
        weights = self.weigh(torch.cat(branches, 1)).softmax(1).split(1, 1)
        mixed = branches[0] * weights[0]
        for branch, weight in zip(branches[1:], weights[1:], strict=True):
            mixed = mixed + branch * weight
        return self.fusion(mixed)


def discriminator(config: DiscriminatorConfig, image: Shape, rng: torch.Generator) -> nn.Module:
    """The discriminator of images (C, H, W)."""
    return MUNet(
        image[0], config.width, rng, ch_mult=config.ch_mult, window=config.window, gradient=config.gradient_branch
    )
