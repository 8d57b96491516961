"""The feature-matching term of one discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discriminator import Discriminator, Logits, Shape, truncated_forward
from .errors import FeatureMatchingError
from .frozen import frozen
from .given import discriminator_of
from .layers import select_layers
from .ranks import Processes, Ranks
from .statistics import STATISTICS, at_least_float32, batch_mean, random_directions
from .strength import Strength, gradient_unit

CHOICES: dict[str, tuple[str | None, ...]] = {
    "match": tuple(STATISTICS),
    "criterion": (None, "l1", "l2", "charbonnier"),
    "elements": ("mean", "sum"),
    "balance": ("gradient", "none"),
    "reduction": ("mean", "sum"),
    "estimator": ("batch", "unbiased", "running"),
    "kernel": ("rational_quadratic", "rbf"),
    "resize": (None, "area"),
}


@dataclass
class Distance:
    """How far apart the features of a batch are: `total` to differentiate, `terms` layer by layer for the log, both before
    balance and lambda."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0


class FeatureMatching(nn.Module):
    """reduce_k w_k d(S(f_k(r)), S(f_k(g))) over layers of a discriminator, and lambda times its balance.

    In a loop of one's own::

        matching = FeatureMatching(discriminator, image=(3, 64, 64), layers="key", match="mean", weight=0.1)
        ...
        logits, distance = matching(real, fake, step)              # instead of discriminator(fake)
        loss = matching.combine(adversarial(logits), distance, fake)
        loss.backward()

    The discriminator is no part of the module: `state_dict` has the state of the balance and of running means alone. In
    half precision call it inside `torch.autocast`. Where torch.distributed is initialised, statistics are of the global
    batch, for gradients that are averaged over processes, as DistributedDataParallel does.

    Args:
        discriminator: any module from images (B, C, H, W) to logits; with `forward_with_features`, which returns
            (logits, features), its features are those, else what its modules give.
        image: shape (C, H, W) of the images.
        layers: names, indices, negative indices, groups (`early`, `mid`, `key`, `all`), `auto` (the last convolution
            before the head) or `head` (the logits).
        weight: lambda. Under `balance = "gradient"` the ratio of the matching gradient to the adversarial one at the
            generated images; under `"none"` a factor on the distance.
        match: `sample`, `mean`, `moments`, `coral`, `mmd` or `sliced`: see `statistics`.
        criterion: `l1`, `l2` or `charbonnier` (with `eps`), of `sample`, `mean` and `moments`; None is `l2`.
        elements, reduction: `mean` or `sum` over a layer's elements, and over layers.
        layer_weights: w_k in the order of the layers, or `uniform`.
        start_step, ramp: the step from which on it acts, and steps over which lambda then grows linearly to its value.
        estimator, running_decay: of `mean`; kernel: of `mmd`; directions: of `sliced`.
        measure_every, balance_decay: see `Strength`.
        resize: `"area"` averages larger maps down to the size of smaller ones, where real and generated images differ in
            size; None makes that an error.
        directions_generator: of step, layer's place and device, what the directions of `sliced` are drawn from.

    Raises FeatureMatchingError for layers the discriminator does not have, and for options that do not fit them.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        image: Shape,
        *,
        layers: Sequence[str | int] | str | int = "key",
        weight: float = 0.1,
        match: str = "mean",
        criterion: str | None = None,
        elements: str = "mean",
        balance: str = "gradient",
        reduction: str = "mean",
        eps: float = 1e-6,
        start_step: int = 0,
        ramp: int = 0,
        layer_weights: Sequence[float] | str = "uniform",
        estimator: str = "batch",
        running_decay: float = 0.9,
        kernel: str = "rational_quadratic",
        directions: int = 64,
        measure_every: int = 8,
        balance_decay: float = 0.4,
        resize: Literal["area"] | None = None,
        directions_generator: Callable[[int, int, torch.device], torch.Generator] | None = None,
    ):
        super().__init__()
        _check_options(
            match=match,
            criterion=criterion,
            elements=elements,
            balance=balance,
            reduction=reduction,
            estimator=estimator,
            kernel=kernel,
            resize=resize,
        )
        net = discriminator_of(discriminator, image)
        assert isinstance(net, Discriminator)
        self._unregistered: tuple[nn.Module] = (net,)  # in a tuple: its weights are no part of this module's state
        named = select_layers([layers] if isinstance(layers, str | int) else layers, net)
        self.weights = _layer_weights(named, layer_weights)
        self.layers = tuple(name for name in named if self.weights[name])  # a layer of weight 0 costs nothing
        self.weight, self.start_step, self.ramp = weight, start_step, ramp
        self.match, self.estimator, self.running_decay = match, estimator, running_decay
        self.reduction, self.resize, self.directions = reduction, resize, directions
        self.criterion, self.eps, self.elements, self.kernel = criterion or "l2", eps, elements, kernel
        self._generator = directions_generator or _generator
        self.fixed_directions: dict[str, Tensor] | None = None
        """Random directions by layer, where they have to stay in their place in memory; `resample` draws new ones there."""
        self.strength = Strength(balance == "gradient", measure_every, balance_decay)
        if estimator == "running":
            for i, shape in enumerate(feature_shapes(net, image, self.layers).values()):
                self.register_buffer(f"running_{i}", torch.zeros(shape))
            self.register_buffer("running_weight", torch.zeros(()))
        where = next(discriminator.parameters(), torch.empty(()))
        self.to(device=where.device, dtype=where.dtype if where.dtype == torch.float64 else None)

    # ---- in a loop of one's own

    def forward(self, real: Tensor, fake: Tensor, step: int = 0) -> tuple[Logits, Distance]:
        """What the discriminator makes of `fake` (B, C, H, W), and how far its features are from those of `real`.

        One pass over each: that of the real images ends at the last layer and keeps no graph. The discriminator is frozen
        meanwhile. Before `start_step` the distance is zero, and real images are not looked at.
        """
        net = self._unregistered[0]
        layers = self.layers if self.ramped(step) > 0 else ()
        with frozen(net):
            generated = truncated_forward(net, fake, layers)
            with torch.no_grad():
                features = truncated_forward(net, real, layers, logits=False).features if layers else {}
        assert generated.logits is not None
        if not layers:
            return generated.logits, Distance(fake.new_zeros(()))
        with torch.autocast(fake.device.type, enabled=False):  # statistics in half precision lose what they measure
            distance = self.distance(features, generated.features, step=step, ranks=Processes())
        return generated.logits, distance

    def combine(self, adversarial: Tensor, distance: Distance, fake: Tensor) -> Tensor:
        """The generator's loss: `adversarial` plus lambda times balance times the distance. On measuring steps it
        differentiates both down to `fake` first, to set balance and share."""
        if not distance.terms:
            return adversarial
        weight = self.ramped(distance.step)
        if fake.requires_grad and self.due(distance.step):
            ranks, norms = Processes(), []
            for loss in (adversarial, distance.total):
                unit = gradient_unit(loss, ranks)
                (gradient,) = torch.autograd.grad(loss / unit, fake, retain_graph=True)
                norms.append(unit * ranks.mean(at_least_float32(gradient).square().sum()).sqrt())
            self.strength.measure(norms[0], norms[1], weight)
        return adversarial + weight * self.strength.balance * distance.total

    # ---- its parts

    def ramped(self, step: int) -> float:
        """lambda at `step`, with its start and ramp."""
        if step < self.start_step:
            return 0.0
        return self.weight * (min(1.0, (step - self.start_step) / self.ramp) if self.ramp else 1.0)

    def active(self, step: int) -> bool:
        return self.ramped(step) > 0

    def due(self, step: int, start: int = 0) -> bool:
        """Whether `step` measures the gradient share, which both losses have from `start` on."""
        return self.strength.due(step - max(start, self.start_step))

    def review_due(self, step: int, start: int = 0) -> bool:
        """Whether the balance is to be reviewed after `step`; `start` as for `due`."""
        return self.strength.review_due(step - max(start, self.start_step))

    def distance(self, real: Mapping[str, Tensor], fake: Mapping[str, Tensor], *, step: int, ranks: Ranks) -> Distance:
        """The distance between features (B, …) by layer; running means take in those of the real images."""
        means = self._running_means(real, ranks)
        terms = {
            layer: self.layer_distance(
                layer, real[layer], fake[layer], step=step, ranks=ranks, real_mean=means.get(layer)
            )
            for layer in self.layers
        }
        total = torch.stack([self.weights[layer] * term for layer, term in terms.items()]).sum()
        if self.reduction == "mean":
            total = total / len(self.weights)
        return Distance(total, {layer: term.detach() for layer, term in terms.items()}, step)

    def layer_distance(
        self, layer: str, real: Tensor, fake: Tensor, *, step: int, ranks: Ranks, real_mean: Tensor | None = None
    ) -> Tensor:
        """Unweighted distance between features (B, …) of one layer, averaged or summed over its elements."""
        if real.shape != fake.shape and self.resize == "area" and real.ndim == fake.ndim == 4:
            side = min(real.shape[2], fake.shape[2]), min(real.shape[3], fake.shape[3])
            real, fake = F.adaptive_avg_pool2d(real, side), F.adaptive_avg_pool2d(fake, side)
        if real.shape != fake.shape:
            raise FeatureMatchingError(
                f"feature matching: layer '{layer}' has shape {tuple(real.shape)} for real and {tuple(fake.shape)} for "
                "generated images; both must enter the discriminator with the same batch and image size"
            )
        directions = self._directions(layer, real, step) if self.match == "sliced" else None
        return STATISTICS[self.match](
            real,
            fake,
            ranks=ranks,
            estimator=self.estimator,
            directions=directions,
            real_mean=real_mean,
            criterion=self.criterion,
            eps=self.eps,
            elements=self.elements,
            kernel=self.kernel,
        )

    def _draw(self, layer: str, step: int, dimension: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = self._generator(step, self.layers.index(layer), device)
        return random_directions(self.directions, dimension, generator, dtype)

    def _directions(self, layer: str, real: Tensor, step: int) -> Tensor:
        """Random directions of this layer and step, a function of both alone."""
        if self.fixed_directions is not None and layer in self.fixed_directions:
            return self.fixed_directions[layer]
        dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
        drawn = self._draw(layer, step, real[0].numel(), real.device, dtype)
        if self.fixed_directions is not None:
            self.fixed_directions[layer] = drawn
        return drawn

    def resample(self, step: int) -> None:
        """Draw this step's random directions in the place of those that are fixed."""
        for layer, fixed in (self.fixed_directions or {}).items():
            fixed.copy_(self._draw(layer, step, fixed.shape[1], fixed.device, fixed.dtype))

    running_weight: Tensor

    @torch.no_grad()
    def _running_means(self, real: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """Bias-corrected moving averages of E_b f(r), advanced by this batch."""
        if self.estimator != "running":
            return {}
        decay = self.running_decay
        self.running_weight.mul_(decay).add_(1 - decay)
        means = {}
        for i, layer in enumerate(self.layers):
            running = self.get_buffer(f"running_{i}")
            fresh = batch_mean(real[layer], ranks).to(running.dtype)
            running.copy_(torch.where(fresh.isfinite(), running.lerp(fresh, 1 - decay), running))
            means[layer] = running / self.running_weight
        return means


def _check_options(**options: str | None) -> None:
    """FeatureMatchingError for a value that an option does not have, or that the statistic makes nothing of."""
    for option, value in options.items():
        if value not in CHOICES[option]:
            known = ", ".join(map(repr, CHOICES[option]))
            raise FeatureMatchingError(f"{option} must be one of {known}, not {value!r}")
    match, criterion, estimator = options["match"], options["criterion"], options["estimator"]
    takes = signature(STATISTICS[str(match)]).parameters
    if criterion is not None and "criterion" not in takes:
        raise FeatureMatchingError(f"match '{match}' defines its own distance; leave criterion out")
    if estimator != "batch" and "estimator" not in takes:
        raise FeatureMatchingError(f"estimator '{estimator}' is for match 'mean', not '{match}'; leave it out")
    if estimator == "unbiased" and criterion not in (None, "l2"):
        raise FeatureMatchingError(f"estimator 'unbiased' is for criterion 'l2', not '{criterion}'")
    if estimator == "running" and options["resize"] is not None:
        raise FeatureMatchingError("estimator 'running' keeps a mean of one size; leave out resize, or estimator")


def _generator(step: int, place: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(1_000_003 * step + place)


def _layer_weights(layers: Sequence[str], weights: Sequence[float] | str) -> dict[str, float]:
    if isinstance(weights, str):
        return dict.fromkeys(layers, 1.0)
    if len(weights) != len(layers):
        raise FeatureMatchingError(
            f"feature_matching.layer_weights has {len(weights)} weights for {len(layers)} layers ({', '.join(layers)}); "
            "give one for each, in this order"
        )
    return dict(zip(layers, weights, strict=True))


@torch.no_grad()
def feature_shapes(net: nn.Module, image: Shape, layers: tuple[str, ...]) -> dict[str, torch.Size]:
    """Shape (C, H, W) of each layer's features for one image (C, H, W); leaves every buffer as it was."""
    weight = next(net.parameters())
    blank = torch.zeros(2, *image, device=weight.device, dtype=weight.dtype)
    with frozen(net):
        features = truncated_forward(net, blank, layers, logits=False).features
    return {name: features[name].shape[1:] for name in layers}
