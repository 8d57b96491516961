"""How close an image is to its original, as super-resolution papers report it: on luma, without the border."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
"""Side of the window of `ssim_y` in pixels."""


def luma_bt601(image: Tensor) -> Tensor:
    """Luma (B, 1, H, W) in [16, 235] of images (B, C, H, W) in [0, 1], by ITU-R BT.601 as Matlab's `rgb2ycbcr` has it; of
    grey images that of three equal channels. Alpha is left out."""
    if image.shape[1] == 1:
        return 16 + 219 * image
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return 16 + (image[:, :3] * weights).sum(1, keepdim=True)


def _inside(image: Tensor, border: int) -> Tensor:
    return image[..., border : image.shape[-2] - border, border : image.shape[-1] - border] if border else image


def psnr_y(image: Tensor, original: Tensor, border: int) -> Tensor:
    """Peak signal-to-noise ratio of luma in dB, (B,), peak 255, leaving out `border` pixels on each side.

    Both (B, C, H, W) in [0, 1]. Equal images give infinity.
    """
    a, b = (_inside(luma_bt601(x.double()), border) for x in (image, original))
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))


def ssim_y(image: Tensor, original: Tensor, border: int) -> Tensor:
    """Structural similarity of luma, (B,), at most 1: Gaussian window of 11 px and sigma 1.5 (Wang et al. 2004).

    Both (B, C, H, W) in [0, 1], at least 11 px a side inside the border.
    """
    a, b = (_inside(luma_bt601(x.double()), border) for x in (image, original))
    offsets = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, WINDOW)), window.view(1, 1, WINDOW, 1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))
