"""Focal frequency loss (Jiang et al. 2021): the spectra of an image and its original, the hard frequencies first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..feature_matching.statistics import at_least_float32
from ..runtime.dist import World
from ..runtime.errors import UserError

FACTOR = 50.0
"""Weights in use were chosen with it."""


def _patches(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) to (B, factor^2, C, H / factor, W / factor)."""
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise UserError(
            f"losses.frequency.patch_factor is {factor}, which does not divide the images' height and width, "
            f"{height} x {width}"
        )
    x = x.unflatten(3, (factor, width // factor)).unflatten(2, (factor, height // factor))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def focal_frequency(
    image: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    patch_factor: int = 1,
    average_spectrum: bool = True,
    log_weights: bool = False,
    batch_weights: bool = False,
    world: World | None = None,
) -> Tensor:
    """50 * mean(w |F(image) - F(target)|^2), w = |F(image) - F(target)|^alpha / max, w without gradient.

    F is the orthonormal Fourier transform of each channel of each of `patch_factor`^2 patches, max is over its
    frequencies (over everything under `batch_weights`), and `log_weights` takes log(1 + w) before dividing. Under
    `average_spectrum` the spectra are averaged over the global batch first, which `world` makes of this process's
    slice. Images (B, C, H, W); computed in at least float32, whatever the autocast.
    """
    world = world or World()
    difference = at_least_float32(image) - at_least_float32(target)
    if average_spectrum:  # the transform is linear: one of the mean difference is the difference of the mean spectra
        difference = world.mean(difference.mean(0, keepdim=True))
    with torch.autocast(difference.device.type, enabled=False):
        spectrum = torch.fft.fft2(_patches(difference, patch_factor), norm="ortho")
    distance = spectrum.real.square() + spectrum.imag.square()
    with torch.no_grad():
        weight = distance.sqrt() ** alpha
        if log_weights:
            weight = weight.log1p()
        if batch_weights:
            peak = world.gather(weight.amax().reshape(1)).amax()
        else:
            peak = weight.amax((-2, -1), keepdim=True)
        weight = weight / peak.clamp(min=torch.finfo(weight.dtype).tiny)
    loss: Tensor = FACTOR * (weight * distance).mean()
    return loss
