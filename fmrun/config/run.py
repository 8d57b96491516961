"""`train`, `checkpoint`, `log` and `eval`: the course of a run."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section


class TrainConfig(Section):
    steps: int = Field(default=2500, ge=1, le=10**9)
    """Steps to train: each updates the discriminator and the generator."""

    batch_size: int = Field(default=64, ge=2, le=2**20)
    """Images per update, over all processes and micro-batches."""

    accumulate: int = Field(default=1, ge=1, le=2**20)
    """Micro-batches an update is computed in, to save memory; batch norm sees each micro-batch by itself."""

    update: Literal["alternating", "simultaneous"] = "alternating"
    """`alternating` updates the discriminator, then the generator against it; `simultaneous` both at once from the same
    discriminator passes (Mescheder et al. 2017): another algorithm, and a cheaper one."""

    d_updates: int = Field(default=1, ge=1, le=1024)
    """Discriminator updates per step, each on fresh images."""

    g_updates: int = Field(default=1, ge=1, le=1024)
    """Generator updates per step, each on fresh latents."""

    augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Differentiable augmentation of all that the discriminator sees (Zhao et al. 2020)."""

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.batch_size // self.accumulate < 2:
            raise ValueError(f"accumulate {self.accumulate} leaves one image per micro-batch; at least 2 are needed")
        if self.update == "simultaneous" and (self.d_updates > 1 or self.g_updates > 1):
            raise ValueError(
                "update 'simultaneous' moves both nets once from the same passes; set d_updates and g_updates to 1, or "
                "update to alternating"
            )
        return self


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1, le=10**9)
    """Steps between checkpoints; one is always written at the end and when stopped by a signal."""

    keep_last: int = Field(default=2, ge=1, le=10**6)
    """Newest checkpoints kept."""

    keep_every: int = Field(default=0, ge=0, le=10**9)
    """Checkpoints at multiples of this step are kept for good; 0 keeps none."""

    best: str | None = "auto"
    """Metric (a key of metrics.jsonl) whose best checkpoint is kept as well; `none` keeps none. `auto` is the KID measured
    in training (`eval.kid_every`) where there is one."""

    best_mode: Literal["min", "max"] = "min"
    """Whether the best value of `best` is the smallest or the largest."""

    @model_validator(mode="after")
    def _auto_knows(self) -> "CheckpointConfig":
        if self.best == "auto" and self.best_mode == "max":
            raise ValueError("best_mode 'max' needs a metric of which more is better; name it with best")
        return self


class LogConfig(Section):
    every: int = Field(default=50, ge=1, le=10**9)
    """Steps between read-outs: one row of metrics.jsonl, averaged over the steps since the last."""

    sample_every: int = Field(default=250, ge=0, le=10**9)
    """Steps between sample grids from fixed latents; 0 draws one at the end only."""

    sample_count: int = Field(default=64, ge=1, le=1024)
    """Images in a sample grid."""

    tensorboard: bool = False
    """Also write TensorBoard files (extra `tensorboard`)."""


class EvalConfig(Section):
    every: int = Field(default=500, ge=0, le=10**9)
    """Steps between measurements on held-out images; 0 turns them off."""

    num: int = Field(default=500, ge=2, le=10**7)
    """Held-out images used."""

    kid_every: int = Field(default=1000, ge=0, le=10**9)
    """Images from noise: steps between quick measurements of KID against training images, with one more at the end of a
    run that is at least so long; 0 turns them off. They stand in metrics.jsonl as `eval/kid_mobilenet_v2`, or `eval/kid`
    with Inception."""

    kid_num: int = Field(default=500, ge=10, le=10**7)
    """Generated and real images in each of these measurements; `fmrun eval` takes more and is more exact."""

    kid_extractor: Literal["auto", "inception", "mobilenet_v2"] = "auto"
    """Net whose features are compared. `auto` takes one whose weights are on the machine (on a CPU first MobileNetV2, which
    is faster), or none; nothing is downloaded."""

    perceptual: Literal["auto", "dists", "lpips", "mobilenet", "none"] = "auto"
    """Super-resolution: perceptual distance measured beside PSNR and SSIM (`dists`, `lpips`: extra `perceptual`). `auto`
    takes the first whose weights are there, or none."""
