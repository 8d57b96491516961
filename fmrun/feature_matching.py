"""Feature matching: which layers of a discriminator, by which statistic, how strongly.

    L_G = L_adv + lambda * ramp * balance * reduce_k w_k d(S(f_k(r)), S(f_k(g)))

in this order: layer weights, reduction over layers, balance, lambda with its ramp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import FeatureMatchingConfig
from .config.losses import ramped
from .dist import World
from .errors import UserError, nearest
from .losses import Loss
from .losses.statistics import STATISTICS, batch_mean, random_directions
from .models.base import Discriminator
from .rng import torch_generator

DENSE_MEASUREMENTS = 32
"""The first steps are all measured: the ratio of the gradients changes most while the discriminator is new."""

FOLLOW = 0.35
"""Error of the balance, as a difference of logarithms, from which on it is corrected at once; batches differ by about half
of that."""

MOVED = 100.0
"""The balance may move by this factor before the statistic is looked at again."""

REVIEW_EVERY = 8
"""Measurements between two such looks, the only times at which training waits for the balance."""


def select_layers(layers: Sequence[str | int], net: Discriminator) -> tuple[str, ...]:
    """The names that `layers` (names, indices, groups, `auto`) stand for, in the net's order, each once.

    Raises UserError for a layer the net does not have; nothing is ever dropped.
    """
    names = net.feature_names
    calls: Sequence[str] = getattr(net, "calls", names)  # of a net of the user's own, more can be named than is listed
    aliases: Mapping[str, str] = getattr(net, "aliases", {})
    chosen: set[str] = set()
    for asked in layers:
        layer = aliases.get(asked, asked) if isinstance(asked, str) else asked
        if isinstance(layer, int):
            if not -len(names) <= layer < len(names):
                raise UserError(f"feature_matching.layers: there is no layer {layer}; {_listing(names)}")
            chosen.add(names[layer])
        elif layer == "auto":
            chosen.add(net.auto)
        elif layer in net.groups:
            chosen.update(net.groups[layer])
        elif layer in calls:
            chosen.add(layer)
        else:
            known = [*calls, *aliases, *net.groups, "auto"]
            raise UserError(
                f"feature_matching.layers: there is no layer '{layer}'{nearest(layer, known)}; {_listing(names)}; "
                f"groups: {', '.join(net.groups)}, auto"
            )
    return tuple(name for name in calls if name in chosen)


def _listing(names: Sequence[str]) -> str:
    return "layers: " + ", ".join(f"{i} {name}" for i, name in enumerate(names))


class FeatureMatching(nn.Module):
    """The feature-matching term of one discriminator. Its buffers are all the state it has.

    Args:
        config: the settings.
        shapes: shape (C, H, W) of every matched layer's features, by name in the net's order.
        seed: of the random directions of `match = "sliced"`.
    """

    balance: Tensor
    share: Tensor
    measured: Tensor
    held: Tensor
    reviewed: Tensor
    running_weight: Tensor

    def __init__(self, config: FeatureMatchingConfig, shapes: Mapping[str, torch.Size], seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        named = tuple(shapes)
        if config.layer_weights == "uniform":
            self.weights = dict.fromkeys(named, 1.0)
        elif len(config.layer_weights) != len(named):
            raise UserError(
                f"feature_matching.layer_weights has {len(config.layer_weights)} weights for {len(named)} layers "
                f"({', '.join(named)}); give one for each, in this order"
            )
        else:
            self.weights = dict(zip(named, config.layer_weights, strict=True))
        self.layers = tuple(name for name in named if self.weights[name])  # a layer of weight 0 costs nothing
        self.kept: dict[str, Tensor] | None = None
        """Random directions by layer, where they have to stay in their place in memory; `renew` draws new ones there."""
        shapes = {name: shapes[name] for name in self.layers}
        self.register_buffer("balance", torch.ones(()))
        self.register_buffer("share", torch.full((), math.nan))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self.register_buffer("held", torch.zeros((), dtype=torch.bool))  # the statistic is blind: the balance stays
        self.register_buffer("reviewed", torch.zeros(()))  # the balance at the last look; 0 before there was one
        if config.estimator == "running":
            for i, shape in enumerate(shapes.values()):
                self.register_buffer(f"running_{i}", torch.zeros(shape))
            self.register_buffer("running_weight", torch.zeros(()))

    @property
    def whole_batch(self) -> bool:
        """Whether the statistic is of the batch, so that it cannot be computed micro-batch by micro-batch."""
        return self.config.match != "sample"

    def active(self, step: int) -> bool:
        return self.config.weight * ramped(self.config, step) > 0

    def due(self, step: int, start: int = 0) -> bool:
        """Whether this step measures the gradient share, which both losses have from `start` on."""
        since = step - max(start, self.config.start_step)
        return since < DENSE_MEASUREMENTS or since % self.config.measure_every == 0

    def distance(
        self, layer: str, real: Tensor, fake: Tensor, *, world: World, step: int, real_mean: Tensor | None = None
    ) -> Tensor:
        """Unweighted distance between features (B, …) of one layer, averaged or summed over its elements."""
        c = self.config
        if real.shape != fake.shape:
            raise UserError(
                f"feature matching: layer '{layer}' has shape {tuple(real.shape)} for real and {tuple(fake.shape)} for "
                "generated images; both must enter the discriminator with the same batch and image size"
            )
        directions = None
        if c.match == "sliced":
            directions = self._directions(layer, real, step)
        return STATISTICS[c.match](
            real,
            fake,
            world=world,
            criterion=c.criterion or "l2",
            eps=c.eps,
            elements=c.elements,
            estimator=c.estimator,
            kernel=c.kernel,
            directions=directions,
            real_mean=real_mean,
        )

    def _draw(self, layer: str, step: int, dimension: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch_generator(self.seed, "directions", step, self.layers.index(layer), device=device)
        return random_directions(self.config.directions, dimension, generator, dtype)

    def _directions(self, layer: str, real: Tensor, step: int) -> Tensor:
        """Random directions of this layer and step, a function of both alone."""
        if self.kept is not None and layer in self.kept:
            return self.kept[layer]
        dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
        drawn = self._draw(layer, step, real[0].numel(), real.device, dtype)
        if self.kept is not None:
            self.kept[layer] = drawn
        return drawn

    def renew(self, step: int) -> None:
        """Draw this step's random directions in the place of those that are kept."""
        for layer, kept in (self.kept or {}).items():
            kept.copy_(self._draw(layer, step, kept.shape[1], kept.device, kept.dtype))

    def forward(self, real: Mapping[str, Tensor], fake: Mapping[str, Tensor], *, step: int, world: World) -> Loss:
        """reduce_k w_k d_k, before balance and lambda; `terms` are the distances d_k by layer."""
        terms, weighted = {}, []
        running = self._running_means(real, world)
        for layer in self.layers:
            terms[layer] = self.distance(
                layer, real[layer], fake[layer], world=world, step=step, real_mean=running.get(layer)
            )
            weighted.append(self.weights[layer] * terms[layer])
        total = torch.stack(weighted).sum()
        if self.config.reduction == "mean":
            total = total / len(self.weights)
        return Loss(total, {layer: term.detach() for layer, term in terms.items()})

    @torch.no_grad()
    def _running_means(self, real: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
        """Bias-corrected moving averages of E_b f(r), advanced by this batch."""
        if self.config.estimator != "running":
            return {}
        decay = self.config.running_decay
        self.running_weight.mul_(decay).add_(1 - decay)
        means = {}
        for i, layer in enumerate(self.layers):
            running = self.get_buffer(f"running_{i}")
            fresh = batch_mean(real[layer], world).to(running.dtype)
            running.copy_(torch.where(fresh.isfinite(), running.lerp(fresh, 1 - decay), running))
            means[layer] = running / self.running_weight
        return means

    def strength(self, ramped_weight: Tensor) -> Tensor:
        """lambda * ramp * balance: what the loss of `forward` is multiplied by."""
        return ramped_weight * self.balance

    @torch.no_grad()
    def measure(self, reference: Tensor, matching: Tensor, ramped_weight: Tensor) -> None:
        """Take in gradient norms at the generated images: of the weighted adversarial term, and of the loss of
        `forward` before balance and lambda. Sets the balance (`balance = "gradient"`) and the share.

            share = ||grad lambda balance L_FM|| / ||grad L_adv||

        The balance is one over a moving mean of ||grad L_FM|| / ||grad L_adv||, which follows at once where it is far off.
        """
        c = self.config
        ratio = matching / reference
        usable = torch.isfinite(ratio) & (ratio > 0)
        if c.balance == "gradient":
            # the mean of the ratio, not of its logarithm: so the mean of the share is lambda
            past = 1 / self.balance
            error = (ratio / past).log().abs()
            gain = (error / FOLLOW).clamp(1 - c.balance_decay, 1).where(self.measured, torch.ones_like(error))
            fresh = 1 / past.lerp(ratio, gain)
            lowest = self.reviewed / MOVED
            highest = torch.where(self.reviewed > 0, self.reviewed * MOVED, torch.full_like(lowest, math.inf))
            self.balance.copy_(torch.where(usable & ~self.held, fresh.clamp(lowest, highest), self.balance))
            self.reviewed.copy_(torch.where(self.measured | ~usable, self.reviewed, self.balance))
            self.measured.logical_or_(usable)
        share = self.strength(ramped_weight) * ratio
        self.share.copy_(torch.where(torch.isfinite(share), share, torch.full_like(share, math.nan)))

    def review_due(self, step: int, start: int = 0) -> bool:
        """Whether the balance is to be reviewed after `step`; `start` as for `due`."""
        since = step - max(start, self.config.start_step)
        every = REVIEW_EVERY * self.config.measure_every
        return self.config.balance == "gradient" and since >= 0 and since % every == 0

    def moved(self) -> bool:
        """Whether the balance has moved as far as it may without a look at the statistic. Waits for the device."""
        reviewed, balance = float(self.reviewed), float(self.balance)
        return reviewed > 0 and not reviewed / MOVED * 1.001 < balance < reviewed * MOVED / 1.001

    def review(self, blind: bool) -> None:
        """Take the outcome of a look at the statistic: where it is blind, the balance goes back to what it was at the last
        one and stays; else it may move on."""
        if blind:
            self.balance.copy_(torch.where(self.reviewed > 0, self.reviewed, torch.ones_like(self.balance)))
            self.held.fill_(True)
        else:
            self.reviewed.copy_(self.balance)
