"""`losses`: every term but feature matching, which has a section of its own."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from .base import Section

ALIASES = {"bce": "vanilla", "wasserstein": "wgan"}


def _canonical(name: object) -> object:
    return ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else name


class GanLossConfig(Section):
    type: Annotated[Literal["vanilla", "lsgan", "hinge", "wgan", "r3gan"], BeforeValidator(_canonical)] = "vanilla"
    """Adversarial loss: `vanilla` (binary cross-entropy on logits, also `bce`), `lsgan`, `hinge`, `wgan` (also
    `wasserstein`) or `r3gan` (relativistic, pairs real and generated images)."""

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Scales the generator's adversarial term only."""

    start_step: int = Field(default=0, ge=0)
    """The generator's adversarial term acts from this step on; the discriminator trains from the start."""

    ramp: int = Field(default=0, ge=0)
    """Steps over which the generator's adversarial term grows linearly to its weight."""

    r1: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Gamma of the R1 penalty, gamma/2 * E||grad D(real)||^2; 0 turns it off."""

    r2: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Gamma of the R2 penalty, gamma/2 * E||grad D(fake)||^2; 0 turns it off."""

    penalty_every: int = Field(default=1, ge=1)
    """R1 and R2 are computed every so many steps and scaled up by as much (lazy regularisation)."""


class LossesConfig(Section):
    gan: GanLossConfig = GanLossConfig()
    """The adversarial loss."""
