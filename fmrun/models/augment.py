"""Differentiable augmentation of all that a discriminator sees (Zhao et al. 2020, arXiv:2006.10738).

One row of uniform random numbers per image says what happens to it, so that a real and a generated image with the
same row get the same augmentation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 7
"""Uniform numbers in [0, 1) per image: brightness, saturation, contrast, shift y and x, hole y and x."""


def color(image: Tensor, u: Tensor) -> Tensor:
    """Brightness by up to 0.5 either way, saturation by a factor in [0, 2), contrast by one in [0.5, 1.5)."""
    brightness, saturation, contrast = (u[:, i, None, None, None] for i in range(3))
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = (image - grey) * (saturation * 2) + grey
    mean = image.mean((1, 2, 3), keepdim=True)
    return (image - mean) * (contrast + 0.5) + mean


def _whole(u: Tensor, count: int) -> Tensor:
    """A whole number in [0, count) from a uniform one."""
    return (u * count).long().clamp_(max=count - 1)


def translation(image: Tensor, u: Tensor, ratio: float = 0.125) -> Tensor:
    """Shift by up to an eighth of the size in each direction; black (-1 is not assumed: zero) comes in."""
    b, _, h, w = image.shape
    reach_y, reach_x = round(h * ratio), round(w * ratio)
    rows = torch.arange(h, device=u.device) + _whole(u[:, 3, None], 2 * reach_y + 1)
    columns = torch.arange(w, device=u.device) + _whole(u[:, 4, None], 2 * reach_x + 1)
    padded = F.pad(image, (reach_x, reach_x, reach_y, reach_y))
    batch = torch.arange(b, device=u.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(image: Tensor, u: Tensor, ratio: float = 0.5) -> Tensor:
    """Set a square of half the size, centred anywhere, to zero."""
    _, _, h, w = image.shape
    size_y, size_x = int(h * ratio + 0.5), int(w * ratio + 0.5)
    top = _whole(u[:, 5, None], h + (1 - size_y % 2)) - size_y // 2
    left = _whole(u[:, 6, None], w + (1 - size_x % 2)) - size_x // 2
    y, x = torch.arange(h, device=u.device), torch.arange(w, device=u.device)
    in_rows, in_columns = (y >= top) & (y < top + size_y), (x >= left) & (x < left + size_x)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return image.masked_fill(hole, 0.0)


POLICIES = {"color": color, "translation": translation, "cutout": cutout}


def augment(image: Tensor, u: Tensor | None, policy: tuple[str, ...]) -> Tensor:
    """Augment `image` (B, C, H, W) in [-1, 1] by the parts of `policy`, with random numbers `u` (B, NUMBERS)."""
    for name in policy:
        assert u is not None
        image = POLICIES[name](image, u)
    return image
