"""The schema: every setting, its type, range, default and meaning. Imports pydantic only."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from .base import Section
from .data import DataConfig
from .feature_matching import FeatureMatchingConfig
from .losses import GanLossConfig, ImageLossConfig, LossesConfig
from .models import DiscriminatorConfig, GeneratorConfig
from .optim import AdamConfig, EmaConfig, OptimConfig, ScheduleConfig
from .run import CheckpointConfig, EvalConfig, LogConfig, TrainConfig
from .tables import DISCRIMINATORS, GENERATORS, TASKS, TaskName


class Config(Section):
    """One experiment, whole. Two runs with equal configs on the same machine are equal to the bit."""

    task: TaskName = "generate"
    """What is learned: `generate` (images from noise) or `upscale` (super-resolution)."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random is a pure function of this seed, the step and the image's place in the batch."""

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        default="auto", examples=["auto", "cpu", "cuda", "cuda:0", "mps"]
    )
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; `none` leaves it to torch. With another number a run is not the same to the bit."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the nets: `auto` is bf16 on a GPU that has it, else fp32; fp16 scales its loss; fp64 is for
    exact comparisons on CPU. Statistics, logits and penalties are at least fp32."""

    compile: bool = False
    """Compile both nets with `torch.compile`: slow to start, faster after."""

    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """With `compile`: the mode of `torch.compile`; `reduce-overhead` replays CUDA graphs, for more memory."""

    cuda_graphs: bool = False
    """Record each kind of step as a CUDA graph and replay it: the same numbers, faster, for more memory. One NVIDIA GPU."""

    deterministic: bool = True
    """Use only deterministic GPU kernels, so that a resumed run equals an uninterrupted one to the bit."""

    data: DataConfig = DataConfig()
    """Where the images come from."""

    generator: GeneratorConfig = GeneratorConfig()
    """The net that makes images."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The net that judges them, and whose features are matched."""

    losses: LossesConfig = LossesConfig()
    """Every loss but feature matching. Those that compare an image with its original exist in super-resolution only. Each is a
    section of its own, there once one of its fields is set (`-s losses.l1.weight=1`) and gone with `-s losses.l1=none`. They
    see values in [0, 1]. Pretrained weights are read from torchvision's cache or the file named, never downloaded during a
    run."""

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

    @property
    def has_targets(self) -> bool:
        """Whether every generated image has an original."""
        return TASKS[self.task].has_targets

    @property
    def own_nets(self) -> bool:
        """Whether one of the nets is the user's own."""
        return self.generator.target is not None or self.discriminator.target is not None

    @property
    def full_step(self) -> int:
        """The first step at which everything acts, penalties included."""
        every = self.losses.gan.penalty_every
        terms: list[Any] = [self.losses.gan, self.feature_matching, *self.losses.image.values()]
        last = max(term.start_step + (1 if term.ramp else 0) for term in terms if term.weight > 0)
        return -(-last // every) * every

    @model_validator(mode="after")
    def _belongs_to_task(self) -> "Config":
        """A setting of the other task would be accepted and ignored."""
        g, d = self.generator, self.discriminator
        for name, net, table in (("generator", g, GENERATORS), ("discriminator", d, DISCRIMINATORS)):
            fits = [choice for choice, row in table.items() if self.task in row.tasks]
            if net.target is None and net.type not in fits:
                choices = f"choose {', '.join(fits)}, or a target"
                raise ValueError(f"{name}.type '{net.type}' is not for task '{self.task}'; {choices}")
        if not self.has_targets and self.data.channels == 4:
            raise ValueError("data.channels 4 is for task 'upscale'; choose 1 or 3")
        norms = DISCRIMINATORS[d.type].norms
        if d.norm not in (*norms, DiscriminatorConfig().norm):
            raise ValueError(f"discriminator.norm '{d.norm}' is not for {d.type}, which has {', '.join(norms)}")
        return self

    @model_validator(mode="after")
    def _rates_last(self) -> "Config":
        schedule, steps = self.optim.schedule, self.train.steps
        if schedule.decay != "none" and schedule.final_factor == 0 and steps > schedule.decay_end:
            raise ValueError(
                f"train.steps is {steps}, and the learning rate is 0 from step {schedule.decay_end} on: nothing would be "
                f"learned there; train at most {schedule.decay_end} steps, or set optim.schedule.decay_end to {steps} or "
                "optim.schedule.final_factor above 0 (of a run whose decay has begun neither can change: start a new one "
                "from its weights, with generator.init and discriminator.init)"
            )
        return self

    @model_validator(mode="after")
    def _balance_has_a_reference(self) -> "Config":
        fm = self.feature_matching
        if not self.has_targets and fm.weight > 0 and fm.balance == "gradient" and self.losses.gan.weight == 0:
            raise ValueError(
                "feature_matching.balance 'gradient' weighs against the adversarial loss, and losses.gan.weight is 0; "
                "set balance to none"
            )
        return self

    @model_validator(mode="after")
    def _generator_learns(self) -> "Config":
        terms: dict[str, GanLossConfig | FeatureMatchingConfig | ImageLossConfig] = {
            "losses.gan": self.losses.gan,
            "feature_matching": self.feature_matching,
            **{f"losses.{name}": config for name, config in self.losses.image.items()},
        }
        starts = [term.start_step for term in terms.values() if term.weight > 0]
        if not starts:
            raise ValueError(f"{_listed(terms, 'weight', 'and')} are 0: the generator has nothing to learn from")
        if (first := min(starts)) > 0:
            which = _listed(terms, "start_step", "or")
            raise ValueError(f"the generator has nothing to learn from before step {first}: {which} must be 0")
        return self


def _listed(sections: Iterable[str], field: str, word: str) -> str:
    *others, last = (f"{section}.{field}" for section in sections)
    return f"{', '.join(others)} {word} {last}"


__all__ = [
    "AdamConfig",
    "Config",
    "DiscriminatorConfig",
    "EmaConfig",
    "FeatureMatchingConfig",
    "GanLossConfig",
    "GeneratorConfig",
    "ImageLossConfig",
    "LossesConfig",
    "ScheduleConfig",
]
