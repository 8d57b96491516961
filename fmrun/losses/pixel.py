"""Losses between an image and its original, pixel by pixel or in small windows.

Images (B, C, H, W), in [0, 1] where their weights are those in common use. Every loss is a mean over all elements of
the batch, a scalar of at least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feature_matching.statistics import at_least_float32, pointwise


def distance(image: Tensor, target: Tensor, *, criterion: str, eps: float = 1e-12) -> Tensor:
    """mean |d|, mean d^2 or mean sqrt(d^2 + eps) (Charbonnier et al. 1994; Lai et al. 2017, LapSRN: eps itself, not its
    square), d = image - target."""
    return pointwise(at_least_float32(image) - at_least_float32(target), criterion, eps).mean()


def laplacian_of_gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """The filter (r^2 - 2 s^2) / s^4 * exp(-r^2 / 2 s^2) on `size` x `size` pixels, less its mean, so that a flat image
    gives 0. Not divided by 2 pi s^2: weights in use were chosen without."""
    axis = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2
    r2 = axis[:, None].square() + axis[None].square()
    kernel = (r2 - 2 * sigma**2) / sigma**4 * (-r2 / (2 * sigma**2)).exp()
    return kernel - kernel.mean()


def hfen(
    image: Tensor,
    target: Tensor,
    *,
    kernel_size: int = 7,
    sigma: float = 1.0,
    criterion: str = "charbonnier",
    eps: float = 1e-12,
) -> Tensor:
    """Distance between the Laplacian-of-Gaussian responses of each channel (high-frequency error norm, Ravishankar &
    Bresler 2011), zero-padded. The filter is linear, so it is run once, on the difference."""
    difference = at_least_float32(image) - at_least_float32(target)
    channels = difference.shape[1]
    kernel = laplacian_of_gaussian(kernel_size, sigma, difference).expand(channels, 1, -1, -1)
    with torch.autocast(difference.device.type, enabled=False):
        response = F.conv2d(difference, kernel, padding=kernel_size // 2, groups=channels)
    return pointwise(response, criterion, eps).mean()
