"""`optim` and `ema`: how weights move, and how they are averaged."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamConfig(Section):
    lr: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    """Learning rate."""

    betas: tuple[Beta, Beta] = (0.5, 0.999)
    """Adam's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Adam's denominator offset."""


class ScheduleConfig(Section):
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps over which the learning rates grow linearly from zero."""

    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the decay between `decay_start` and `decay_end`."""

    decay_start: int = Field(default=0, ge=0, le=10**9)
    """Absolute step at which the decay begins."""

    decay_end: int = Field(default=0, ge=0, le=10**9)
    """Absolute step at which the decay ends; it never follows from `train.steps`, so that extending a run changes
    nothing before."""

    final_factor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Factor on the learning rates from `decay_end` on."""

    @model_validator(mode="after")
    def _horizon(self) -> "ScheduleConfig":
        if self.decay != "none" and self.decay_end <= self.decay_start:
            raise ValueError(
                f"decay '{self.decay}' needs decay_end after decay_start, not {self.decay_end} after {self.decay_start}"
            )
        return self


class OptimConfig(Section):
    generator: AdamConfig = AdamConfig()
    """Adam for the generator."""

    discriminator: AdamConfig = AdamConfig()
    """Adam for the discriminator."""

    clip_grad_norm: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Largest gradient norm of a net; a larger gradient is scaled down to it. `none` leaves gradients as they are."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule of both nets."""


class EmaConfig(Section):
    decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay per step of the generator's weight average; 0 makes it the raw weights."""

    warmup: float = Field(default=10.0, ge=1.0, allow_inf_nan=False)
    """The decay at step t is at most (1 + t) / (warmup + t), so that short runs average recent weights only."""
