"""The schema: every setting, its type, range, default and meaning. Imports pydantic only."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .base import Section
from .data import DataConfig
from .feature_matching import FeatureMatchingConfig
from .losses import GanLossConfig, ImageLossConfig, LossesConfig
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
    def _originals_exist(self) -> "Config":
        names = [f"losses.{name}" for name in self.losses.image]
        if names and self.task == "generate":
            verb = "compares" if len(names) == 1 else "compare"
            raise ValueError(
                f"{', '.join(names)} {verb} each image with its original, which exists in super-resolution only; "
                f"task 'generate' has none: remove with {names[0]}=none"
            )
        return self

    @model_validator(mode="after")
    def _generator_learns(self) -> "Config":
        terms: dict[str, GanLossConfig | FeatureMatchingConfig | ImageLossConfig] = {
            "losses.gan": self.losses.gan,
            "feature_matching": self.feature_matching,
        }
        terms |= {f"losses.{name}": config for name, config in self.losses.image.items()}
        starts = {name: config.start_step for name, config in terms.items() if config.weight > 0}
        if not starts:
            *others, last = (f"{name}.weight" for name in terms)
            raise ValueError(
                f"{', '.join(others)} and {last} are {'both' if len(terms) == 2 else 'all'} 0: "
                "the generator has nothing to learn from"
            )
        first = min(starts.values())
        if first > 0:
            *others, last = (f"{name}.start_step" for name in terms)
            raise ValueError(
                f"the generator has nothing to learn from before step {first}: {', '.join(others)} or {last} must be 0"
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
    "ImageLossConfig",
    "LogConfig",
    "LossesConfig",
    "OptimConfig",
    "ScheduleConfig",
    "Section",
    "TrainConfig",
]
