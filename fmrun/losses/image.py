"""All losses between a generated image and its original, as a config has them: when they act, and how strongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config.losses import ramped
from ..config.schema import ImageLossConfig, LossesConfig
from ..runtime.dist import World
from . import pixel
from .frequency import focal_frequency
from .perceptual import DistsLoss, FeatureLoss, LpipsLoss, feature_loss

LOG_NAMES = {"mobilenet": "mobilenetperceptualloss"}
"""What a loss is called in the log, where not as its section: it must not be taken for the usual perceptual loss."""

FUNCTIONS = {
    **{name: partial(pixel.distance, criterion=name) for name in ("l1", "l2", "charbonnier")},
    "frequency": partial(focal_frequency),
    "hfen": partial(pixel.hfen),
}
"""Of image and original; their options are called as in the config."""

NETS: dict[str, partial[FeatureLoss] | partial[DistsLoss] | partial[LpipsLoss]] = {
    "perceptual": partial(feature_loss, "vgg19", field="losses.perceptual"),
    "convnext": partial(feature_loss, "convnext_tiny", field="losses.convnext"),
    "mobilenet": partial(feature_loss, "mobilenet_v2", field="losses.mobilenet"),
    "dists": partial(DistsLoss, field="losses.dists"),
    "lpips": partial(LpipsLoss, field="losses.lpips"),
}
"""Of image and original, made from their section."""

FULL_PRECISION = frozenset({"dists", "lpips"})
"""Their variances and norms lose what they measure in half precision."""


class ImageLosses:
    """The weighted losses of `losses`, the adversarial one apart.

    Pretrained nets are loaded here, or UserError says what is missing; they are frozen, belong to no checkpoint, and
    compute in `precision`. Everything else is in at least float32.

    Args:
        config: the section; losses that are absent or of weight 0 cost nothing.
        device: where the images are.
        world: the processes that share the global batch.
        batch_size: images in the global batch, for `reduction = "sum"`.
        precision: of the run's nets.
    """

    def __init__(
        self,
        config: LossesConfig,
        device: torch.device,
        world: World,
        *,
        batch_size: int,
        precision: torch.dtype = torch.float32,
    ):
        self.config = config
        self.configs = {name: c for name, c in config.image.items() if c.weight > 0}
        self.device, self.world, self.batch_size, self.precision = device, world, batch_size, precision
        dtype = torch.float64 if precision == torch.float64 else torch.float32
        self.functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name, c in self.configs.items():
            if name in NETS:
                net = NETS[name](c).to(device=device, dtype=dtype)
                self.functions[name] = net.to(memory_format=torch.channels_last)
            else:
                options = c.model_dump(exclude={*ImageLossConfig.model_fields, "reduction"})
                shared = {"world": world} if name == "frequency" else {}
                self.functions[name] = partial(FUNCTIONS[name], **options, **shared)

    def weights(self, step: int) -> dict[str, float]:
        """Weight of every section's loss at `step`, with its start and ramp."""
        return {name: c.weight * ramped(c, step) for name, c in self.configs.items()}

    def __call__(
        self, image: Tensor, target: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        """The losses of the named sections, by their names in the log, times their weights.

        `image` and `target` are (B, C, H, W) in [-1, 1]. Each loss has a graph of its own from `image` on, so that they
        can be differentiated one after the other.
        """
        with torch.no_grad():
            target = _unit(target)
        with torch.autocast(image.device.type, enabled=False):
            return {LOG_NAMES.get(name, name): self._loss(name, _unit(image), target) * weights[name] for name in names}

    def _loss(self, name: str, image: Tensor, target: Tensor) -> Tensor:
        function, config = self.functions[name], self.configs[name]
        if name in NETS:
            half = self.precision in (torch.bfloat16, torch.float16) and name not in FULL_PRECISION
            with torch.autocast(image.device.type, dtype=self.precision if half else None, enabled=half):
                return function(image, target)
        loss = function(image, target)
        if getattr(config, "reduction", "mean") == "sum":
            # a slice's mean times the elements of the global batch: the average over slices is the sum over all of it
            return loss * (image[0].numel() * self.batch_size)
        return loss


def _unit(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], in which these losses, and the weights in use for them, are stated."""
    return image * 0.5 + 0.5
