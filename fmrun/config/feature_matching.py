"""`feature_matching`: the subject of the experiment."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import Section
from .tables import STATISTICS, StatisticName, listed

Layer = Annotated[str | int, BeforeValidator(lambda v: int(v) if re.fullmatch(r"-?\d+", str(v)) else v)]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1)]
LayerWeight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
LayerWeights = Annotated[tuple[LayerWeight, ...], Field(min_length=1)]


class FeatureMatchingConfig(Section):
    weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Lambda. 0 turns feature matching off, at no cost. Under `balance = "gradient"` it is the share of the
    adversarial gradient; under `none` it multiplies the raw distance."""

    layers: Layers = ("key",)
    """Discriminator layers: names, indices, negative indices, groups (`early`, `mid`, `key`, `all`), or `auto`
    (the last intermediate convolution). `fmrun probe-layers` lists them."""

    match: StatisticName = Field("mean", description=listed("Statistic compared at each layer", STATISTICS))

    criterion: Literal["l1", "l2", "charbonnier"] | None = None
    """Distance for `sample`, `mean` and `moments`; `none` means `l2`. The other statistics define their own."""

    elements: Literal["mean", "sum"] = "mean"
    """Average the distance over a layer's elements, or sum it (Salimans et al. 2016)."""

    balance: Literal["gradient", "none"] = "none"
    """`gradient` rescales lambda so that it is the ratio of the feature-matching gradient to the adversarial one
    at the generated images; `none` adds the raw sum."""

    reduction: Literal["mean", "sum"] = "mean"
    """Over layers."""

    eps: float = Field(default=1e-6, gt=0.0, allow_inf_nan=False)
    """Charbonnier: sqrt(d^2 + eps)."""

    start_step: int = Field(default=0, ge=0, le=10**9)
    """Feature matching acts from this step on; before it, it costs nothing."""

    ramp: int = Field(default=0, ge=0, le=10**9)
    """Steps over which the weight grows linearly from zero."""

    layer_weights: Literal["uniform"] | LayerWeights = "uniform"
    """One non-negative weight per layer, in the order of `fmrun probe-layers`, or `uniform` (all 1)."""

    estimator: Literal["batch", "unbiased", "running"] = "batch"
    """For `match = "mean"`: plain batch means; `unbiased` subtracts their sampling noise (`l2` only, may be
    negative; too much behind batch norm, where features of a batch are not independent); `running` compares with a running mean of the real features."""

    running_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay per step of the running mean of `estimator = "running"`."""

    kernel: Literal["rational_quadratic", "rbf"] = "rational_quadratic"
    """For `match = "mmd"`: rational quadratic (alpha 0.1, 1, 10) or a mixture of Gaussians whose bandwidths are
    1/4, 1/2, 1, 2 and 4 times the mean squared distance between real features."""

    directions: int = Field(default=64, ge=1, le=4096)
    """For `match = "sliced"`: random directions drawn each step."""

    measure_every: int = Field(default=8, ge=1, le=10**9)
    """Steps between measurements of the gradient share and updates of the balance; the first 32 are all measured."""

    balance_decay: float = Field(default=0.4, ge=0.0, lt=1.0)
    """Smoothing of the balance: weight of its past at each measurement, less where the error is large."""

    @model_validator(mode="after")
    def _options_apply(self) -> "FeatureMatchingConfig":
        if self.estimator == "unbiased" and self.criterion not in (None, "l2"):
            raise ValueError(f"estimator 'unbiased' exists for criterion 'l2' only, not '{self.criterion}'")
        if isinstance(self.layer_weights, tuple) and not any(self.layer_weights):
            raise ValueError("layer_weights are all zero; set weight to 0 to turn feature matching off")
        return self
