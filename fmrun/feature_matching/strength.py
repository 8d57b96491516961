"""How strongly features are matched: the share of the gradient, and the balance that holds it at lambda.

    share = ||grad lambda balance L_FM|| / ||grad L_adv||        gradients at the generated images

The balance is one over a moving mean of ||grad L_FM|| / ||grad L_adv||, so that the mean of the share is lambda. EnCodec
(Defossez et al. 2022, sec. 3.4) and VQGAN (Esser et al. 2021, eq. 7) balance losses by their gradients in this way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .ranks import Ranks

DENSE_MEASUREMENTS = 32
"""The first steps are all measured: the ratio of the gradients changes most while the discriminator is new."""

FOLLOW = 0.35
"""Error of the balance, as a difference of logarithms, from which on it is corrected at once; batches differ by about half
of that."""

MOVED = 100.0
"""The balance may move by this factor before the statistic is looked at again."""

REVIEW_EVERY = 8
"""Measurements between two such looks, the only times at which training waits for the balance."""


class Strength(nn.Module):
    """The balance and the share of one discriminator's feature matching. Its buffers are all the state it has.

    Args:
        balanced: whether lambda is the share that is held; else the balance stays 1, and the share is measured only.
        measure_every: steps between measurements, after the first `DENSE_MEASUREMENTS`.
        decay: weight of the moving mean's past at each measurement, less where the error is large.
    """

    balance: Tensor
    share: Tensor
    measured: Tensor
    held: Tensor
    reviewed: Tensor

    def __init__(self, balanced: bool, measure_every: int, decay: float):
        super().__init__()
        self.balanced, self.measure_every, self.decay = balanced, measure_every, decay
        self.register_buffer("balance", torch.ones(()))
        self.register_buffer("share", torch.full((), math.nan))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self.register_buffer("held", torch.zeros((), dtype=torch.bool))  # the statistic is blind: the balance stays
        self.register_buffer("reviewed", torch.zeros(()))  # the balance at the last look; 0 before there was one

    def due(self, since: int) -> bool:
        """Whether the share is measured, so many steps after matching and the adversarial term have both begun."""
        return since < DENSE_MEASUREMENTS or since % self.measure_every == 0

    @torch.no_grad()
    def measure(self, reference: Tensor, matching: Tensor, weight: Tensor | float) -> None:
        """Take in gradient norms at the generated images: of the weighted adversarial term, and of the matching distance
        before balance and `weight` (lambda with its ramp). Sets balance and share."""
        ratio = matching / reference
        if self.balanced:
            usable = torch.isfinite(ratio) & (ratio > 0)
            # the mean of the ratio, not of its logarithm: so the mean of the share is lambda
            past = 1 / self.balance
            error = (ratio / past).log().abs()
            gain = (error / FOLLOW).clamp(1 - self.decay, 1).where(self.measured, torch.ones_like(error))
            fresh = 1 / past.lerp(ratio, gain)
            lowest = self.reviewed / MOVED
            highest = torch.where(self.reviewed > 0, self.reviewed * MOVED, torch.full_like(lowest, math.inf))
            self.balance.copy_(torch.where(usable & ~self.held, fresh.clamp(lowest, highest), self.balance))
            self.reviewed.copy_(torch.where(self.measured | ~usable, self.reviewed, self.balance))
            self.measured.logical_or_(usable)
        share = weight * self.balance * ratio
        self.share.copy_(torch.where(torch.isfinite(share), share, torch.full_like(share, math.nan)))

    def review_due(self, since: int) -> bool:
        """Whether the balance is to be reviewed after the step for which `due` is asked with the same number."""
        return self.balanced and since >= 0 and since % (REVIEW_EVERY * self.measure_every) == 0

    def moved(self) -> bool:
        """Whether the balance has moved as far as it may without a look at the statistic. Waits for the device."""
        reviewed, balance = float(self.reviewed), float(self.balance)
        return reviewed > 0 and not reviewed / MOVED * 1.001 < balance < reviewed * MOVED / 1.001

    @torch.no_grad()
    def review(self, blind: bool) -> None:
        """Take the outcome of a look at the statistic: where it is blind, the balance goes back to what it was at the last
        one and stays; else it may move on."""
        if blind:
            self.balance.copy_(torch.where(self.reviewed > 0, self.reviewed, torch.ones_like(self.balance)))
            self.held.fill_(True)
        else:
            self.reviewed.copy_(self.balance)


def gradient_unit(loss: Tensor, ranks: Ranks) -> Tensor:
    """What a loss is divided by before it is differentiated to be measured, and its gradient multiplied by afterwards: its
    size. A small one's gradient would underflow half precision. The same for all processes, whose gradients meet on
    their way through a batch norm."""
    size = ranks.mean(loss.detach().abs())
    return torch.where(size > 0, size, torch.ones_like(size))
