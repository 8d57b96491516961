"""`generator` and `discriminator`: the two nets."""

from typing import Literal

from pydantic import Field

from .base import Section


class GeneratorConfig(Section):
    type: Literal["dcgan"] = "dcgan"
    """Architecture: `dcgan` (Radford et al. 2016)."""

    width: int = Field(default=32, ge=1, le=1024)
    """Channels of the last hidden layer; each layer before it has twice as many."""

    latent_dim: int = Field(default=100, ge=1, le=4096)
    """Length of the standard normal latent vector."""

    init: str | None = None
    """Start from these weights: a `.safetensors` file or an fmrun checkpoint (its EMA weights)."""


class DiscriminatorConfig(Section):
    type: Literal["dcgan"] = "dcgan"
    """Architecture: `dcgan` (Radford et al. 2016)."""

    width: int = Field(default=32, ge=1, le=1024)
    """Channels of the first layer; each layer after it has twice as many."""

    norm: Literal["batch", "spectral", "group", "none"] = "batch"
    """Normalisation: batch norm, spectral norm of the weights, group norm, or none."""

    init: str | None = None
    """Start from these weights: a `.safetensors` file or an fmrun checkpoint."""

    train: bool = True
    """`false` never updates the discriminator: features are matched in it as it is."""
