"""The schema: every setting, its type, range, default and meaning. Imports pydantic only."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .base import Section
from .data import DataConfig
from .feature_matching import FeatureMatchingConfig
from .losses import GanLossConfig, LossesConfig
from .models import DiscriminatorConfig, GeneratorConfig
from .optim import AdamConfig, EmaConfig, OptimConfig, ScheduleConfig
from .run import CheckpointConfig, EvalConfig, LogConfig, TrainConfig


class Config(Section):
    """One experiment, whole. Two runs with equal configs on the same machine are equal to the bit."""

    task: Literal["generate"] = "generate"
    """What is learned: `generate` (images from noise)."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random is a pure function of this seed, the step and the image's place in the batch."""

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        default="auto", examples=["auto", "cpu", "cuda", "cuda:0", "mps"]
    )
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the nets: `auto` is bf16 on a GPU that has it, else fp32; fp16 scales its loss; fp64 is for
    exact comparisons on CPU. Statistics, logits and penalties are at least fp32."""

    compile: bool = False
    """Compile both nets with `torch.compile`: slow to start, faster after."""

    deterministic: bool = True
    """Use only deterministic GPU kernels, so that a resumed run equals an uninterrupted one to the bit. Always so on
    CPU."""

    data: DataConfig = DataConfig()
    """Where the images come from."""

    generator: GeneratorConfig = GeneratorConfig()
    """The net that makes images."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The net that judges them, and whose features are matched."""

    losses: LossesConfig = LossesConfig()
    """Every loss but feature matching."""

    feature_matching: FeatureMatchingConfig = FeatureMatchingConfig()
    """The subject of the experiment."""

    optim: OptimConfig = OptimConfig()
    """Optimisers."""

    ema: EmaConfig = EmaConfig()
    """Moving average of the generator's weights."""

    train: TrainConfig = TrainConfig()
    """Length and size of the training."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""

    log: LogConfig = LogConfig()
    """Metrics and sample grids."""

    eval: EvalConfig = EvalConfig()
    """Measurements on held-out images."""

    @model_validator(mode="after")
    def _balance_has_a_reference(self) -> "Config":
        fm = self.feature_matching
        if self.task == "generate" and fm.weight > 0 and fm.balance == "gradient" and self.losses.gan.weight == 0:
            raise ValueError(
                "feature_matching.balance 'gradient' weighs against the adversarial loss, and losses.gan.weight is 0; "
                "set balance to none"
            )
        return self

    @model_validator(mode="after")
    def _generator_learns(self) -> "Config":
        gan, fm = self.losses.gan, self.feature_matching
        if gan.weight == 0 and fm.weight == 0:
            raise ValueError(
                "losses.gan.weight and feature_matching.weight are both 0: the generator has nothing to learn from"
            )
        first_gan = gan.start_step if gan.weight else None
        first_fm = fm.start_step if fm.weight else None
        first = min(s for s in (first_gan, first_fm) if s is not None)
        if first > 0:
            raise ValueError(
                f"the generator has nothing to learn from before step {first}: "
                "losses.gan.start_step or feature_matching.start_step must be 0"
            )
        return self


__all__ = [
    "AdamConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EmaConfig",
    "EvalConfig",
    "FeatureMatchingConfig",
    "GanLossConfig",
    "GeneratorConfig",
    "LogConfig",
    "LossesConfig",
    "OptimConfig",
    "ScheduleConfig",
    "Section",
    "TrainConfig",
]
