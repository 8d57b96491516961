"""From a high-resolution image to a low-resolution one.

What will be done is drawn first (`recipe`: a list of steps with all their numbers), then done (`degrade`). A recipe
takes the same random numbers whichever steps are switched on, so that switching one off changes nothing else.

The chain is that of Real-ESRGAN (Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure
Synthetic Data", figure 2): blur or ringing, change of size, noise, JPEG; a second time; then to the low-resolution
size with ringing, the last JPEG before or after that. It differs in that Gaussians are plain (no generalised or plateau
ones) and reach three standard deviations, and that Poisson noise counts 255 photons at full level.
"""

import io
import math
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..config import degradation as settings
from .filters import bicubic_down, filtered, gaussian, resized, sinc

T = TypeVar("T")

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SINC_RADII = range(3, 11)
BICUBIC_MARGIN = 2
"""Low-resolution pixels around a patch that make its bicubic downsampling equal to that of the whole image."""

MARGIN = 8
"""Low-resolution pixels around a patch that a chain degrades with it, so that a patch's border is no image's border.
Blur reaches farther than that only where the image is small in between."""


class Blur(NamedTuple):
    sigma: tuple[float, float]
    angle: float


class Sinc(NamedTuple):
    cutoff: float
    radius: int


class Resize(NamedTuple):
    """To `factor` times the original size, or the low-resolution size if `of_low`."""

    factor: float
    kernel: str
    of_low: bool


class Noise(NamedTuple):
    """`amount` is σ in levels of 255 (Gaussian), or a factor (Poisson)."""

    poisson: bool
    amount: float
    grey: bool
    seed: int


class Jpeg(NamedTuple):
    quality: int


Step = Blur | Sinc | Resize | Noise | Jpeg
Recipe = tuple[Step, ...]


def recipe(config: settings.DegradationConfig, rng: np.random.Generator) -> Recipe:
    """The steps that a chain and `rng` make of one image."""
    # all numbers are drawn whatever is switched on
    passes = [_pass(pass_config, rng, second) for second, pass_config in enumerate((config.first, config.second))]
    ringing = _sinc(config.sinc, rng.random(3))
    u = rng.random(2)
    to_low = [Resize(1.0, _choice(config.kernels, u[0]), True), *ringing]
    steps: list[Step] = []
    for filters, jpeg in passes[: config.passes]:
        steps += [*filters, *jpeg]
    last = passes[config.passes - 1][1]
    if last and u[1] < 0.5:
        return (*steps[: -len(last)], *to_low, *last)
    return (*steps, *to_low)


def degrade(image: np.ndarray, steps: Recipe | None, scale: int) -> np.ndarray:
    """uint8 `(H, W, C)`, its sides multiples of `scale`, to uint8 `(H / scale, W / scale, C)`; without steps it is made
    smaller by `filters.bicubic_down`.

    C is 1, 3 (RGB) or 4 (RGBA; transparency is neither noisy nor compressed).
    """
    if steps is None:
        return bicubic_down(image, scale)
    high = image.shape[:2]
    low = (high[0] // scale, high[1] // scale)
    pixels = image.astype(np.float32) / np.float32(255)
    for step in steps:
        match step:
            case Blur():
                pixels = filtered(pixels, gaussian(step.sigma, step.angle))
            case Sinc():
                pixels = filtered(pixels, sinc(step.cutoff, step.radius))
            case Resize():
                height, width = (max(1, round(step.factor * side)) for side in (low if step.of_low else high))
                pixels = resized(pixels, (height, width), step.kernel)
            case Noise():
                pixels = _noisy(pixels, step)
            case Jpeg():
                pixels = _through_jpeg(pixels, step.quality)
    assert pixels.shape[:2] == low
    return _to_bytes(pixels)


def _pass(config: settings.PassConfig, rng: np.random.Generator, second: int) -> tuple[list[Step], list[Step]]:
    """A pass's steps before its JPEG, and that."""
    blur, ringing = _blur(config.blur, rng.random(5)), _sinc(config.sinc, rng.random(3))
    size = _resize(config.resize, rng.random(3), bool(second))
    noise = _noise(config.noise, rng.random(3), int(rng.integers(2**63)))
    return [*(ringing or blur), *size, *noise], _jpeg(config.jpeg, rng.random(2))


def _blur(config: settings.BlurConfig, u: np.ndarray) -> list[Step]:
    if u[0] >= config.prob:
        return []
    first = _between(config.sigma, u[1])
    if u[2] >= config.anisotropic:
        return [Blur((first, first), 0.0)]
    return [Blur((first, _between(config.sigma, u[3])), math.pi * float(u[4]))]


def _sinc(config: settings.SincConfig, u: np.ndarray) -> list[Step]:
    if u[0] >= config.prob or config.cutoff[1] == 0:
        return []
    return [Sinc(max(_between(config.cutoff, u[1]), 0.01), _choice(tuple(SINC_RADII), u[2]))]


def _resize(config: settings.ResizeConfig, u: np.ndarray, of_low: bool) -> list[Step]:
    kernel = _choice(config.kernels, u[2])
    if u[0] < config.down:
        return [Resize(_between((config.factor[0], 1.0), u[1]), kernel, of_low)]
    if u[0] < config.down + config.up:
        return [Resize(_between((1.0, config.factor[1]), u[1]), kernel, of_low)]
    return []


def _noise(config: settings.NoiseConfig, u: np.ndarray, seed: int) -> list[Step]:
    grey = bool(u[2] < config.grey)
    if u[0] < config.gaussian:
        return [Noise(False, _between(config.sigma, u[1]), grey, seed)]
    if u[0] < config.gaussian + config.poisson:
        return [Noise(True, _between(config.strength, u[1]), grey, seed)]
    return []


def _jpeg(config: settings.JpegConfig, u: np.ndarray) -> list[Step]:
    if u[0] >= config.prob:
        return []
    low, high = config.quality
    return [Jpeg(low + int((high + 1 - low) * u[1]))]


def _between(ends: tuple[float, float], u: float) -> float:
    return float(ends[0] + (ends[1] - ends[0]) * u)


def _choice(options: tuple[T, ...], u: float) -> T:
    return options[int(len(options) * u)]


def _noisy(pixels: np.ndarray, step: Noise) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(step.seed))
    colour = pixels[..., :3]
    if step.poisson:
        clean = colour.clip(0, 1)
        if step.grey and colour.shape[2] == 3:
            clean = (clean @ LUMA)[..., None]
        noise = ((rng.poisson(clean * np.float32(255)) / np.float32(255)).astype(np.float32) - clean) * step.amount
    else:
        shape = (*colour.shape[:2], 1) if step.grey else colour.shape
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(step.amount / 255)
    noisy = (colour + noise).clip(0, 1).astype(np.float32)
    return np.concatenate([noisy, pixels[..., 3:]], axis=2)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    colour = _to_bytes(pixels[..., :3])
    file = io.BytesIO()
    Image.fromarray(colour[..., 0] if colour.shape[2] == 1 else colour).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=("JPEG",)) as image:
        back = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.concatenate([back.reshape(colour.shape), pixels[..., 3:]], axis=2)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * np.float32(255)).clip(0, 255).astype(np.uint8)
