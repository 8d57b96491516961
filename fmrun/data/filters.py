"""Kernels and resampling for degradations: images are arrays `(H, W, C)`, one at a time, on the CPU.

Everything here gives the same numbers whatever the number of threads: no sum is split between them.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

STRIP = 2**21
"""Pixels that are downsampled at a time, so that a photograph of 40 megapixels takes no gigabytes."""

TIE = 1e-6
"""Sums within this of a half round up, so that a tie does not depend on the order of summation."""


def bicubic_down(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8 `(H, W, C)` to uint8 `(H / scale, W / scale, C)`, as MATLAB's `imresize` does with a double image.

    Cubic convolution with a = −1/2 (Keys 1981), widened by `scale` against aliasing, the image mirrored at its borders
    (edge pixels repeated). Computed in float64, rounded half up.
    """
    if scale == 1:
        return image
    height, width = image.shape[:2]
    assert height % scale == 0, (image.shape, scale)
    assert width % scale == 0, (image.shape, scale)
    border = 2 * scale  # a kernel reaches 2 · scale from its centre
    rows = np.pad(np.arange(height), border, mode="symmetric")
    step = max(1, STRIP // (scale * (width + 2 * border)))
    out = np.empty((height // scale, width // scale, image.shape[2]), dtype=np.uint8)
    for top in range(0, len(out), step):
        bottom = min(top + step, len(out))
        strip = image[rows[scale * top : scale * (bottom + 4)]]
        strip = np.pad(strip, ((0, 0), (border, border), (0, 0)), mode="symmetric").astype(np.float64)
        small = resized(strip, (bottom - top + 4, out.shape[1] + 4), "bicubic", antialias=True)[2:-2, 2:-2]
        out[top:bottom] = np.floor(small + (0.5 + TIE)).clip(0, 255)
    return out


def bicubic_up(images: torch.Tensor, scale: int) -> torch.Tensor:
    """`(B, C, h, w)` floats to `(B, C, scale h, scale w)`, as MATLAB's `imresize` does and the literature reports: cubic
    convolution with a = −1/2 (Keys 1981), the image mirrored at its borders (edge pixels repeated)."""
    border = 3
    for dim in (-2, -1):
        mirrored = np.pad(np.arange(images.shape[dim]), border, mode="symmetric")
        images = images.index_select(dim, torch.from_numpy(mirrored).to(images.device))
    made = F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)  # without, PyTorch's a is −3/4
    inside = slice(border * scale, -border * scale)
    return made[..., inside, inside]


def resized(image: np.ndarray, size: tuple[int, int], kernel: str, antialias: bool = False) -> np.ndarray:
    """`(H, W, C)` floats to `(*size, C)`; corners stay where they are, so nothing is shifted.

    `kernel` is `area` (means over the pixels covered), `bilinear` or `bicubic`, as in PyTorch's `interpolate`.
    """
    if image.shape[:2] == size:
        return image
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    planes = F.interpolate(planes, size, mode=kernel, antialias=antialias)
    return planes[0].permute(1, 2, 0).numpy()


def gaussian(sigma: tuple[float, float], angle: float) -> np.ndarray:
    """A kernel `(2r + 1, 2r + 1)` of sum 1, r = ⌈3 max σ⌉: exp(−½ (u² / σ₀² + v² / σ₁²)), where u and v are x and y
    turned by `angle`."""
    y, x = _grid(math.ceil(3 * max(sigma)))
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    kernel = np.exp(-0.5 * ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2))
    return kernel / kernel.sum()


def sinc(cutoff: float, radius: int) -> np.ndarray:
    """A kernel `(2 radius + 1, 2 radius + 1)` of sum 1: the ideal circular low-pass filter, cut off.

    k(r) = ω J₁(ω r) / (2π r), k(0) = ω² / 4π, where ω = π · `cutoff` (Wang et al. 2021, eq. 5).
    """
    y, x = _grid(radius)
    r = np.hypot(x, y)
    omega = math.pi * cutoff
    r[radius, radius] = 1.0
    kernel = omega * torch.special.bessel_j1(torch.from_numpy(omega * r)).numpy() / (2 * math.pi * r)
    kernel[radius, radius] = omega**2 / (4 * math.pi)
    return kernel / kernel.sum()


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`image` convolved with a square kernel of odd side, mirrored at its borders; dtype kept."""
    radius = len(kernel) // 2
    out = np.empty_like(image)
    height, width = (side + 2 * radius for side in image.shape[:2])
    size = (_fast(height), _fast(width))
    response = np.fft.rfft2(kernel.astype(image.dtype), size)
    for channel in range(image.shape[2]):
        plane = np.pad(image[..., channel], radius, mode="reflect")
        whole = np.fft.irfft2(np.fft.rfft2(plane, size) * response, size)
        # a circular convolution is wrong only in its first 2 · radius rows and columns
        out[..., channel] = whole[2 * radius : height, 2 * radius : width]
    return out


def _grid(radius: int) -> tuple[np.ndarray, np.ndarray]:
    side = np.arange(-radius, radius + 1, dtype=np.float64)
    y, x = np.meshgrid(side, side, indexing="ij")
    return y, x


def _fast(side: int) -> int:
    """The next number without prime factors above 5."""
    while 30**32 % side:
        side += 1
    return side
