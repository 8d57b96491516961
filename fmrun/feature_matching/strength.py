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

    def __init__(self, balanced: bool, measure_every: int, decay: float):
        super().__init__()
        self.balanced, self.measure_every, self.decay = balanced, measure_every, decay
        self.register_buffer("balance", torch.ones(()))
        self.register_buffer("share", torch.full((), math.nan))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self.register_buffer("held", torch.zeros((), dtype=torch.bool))  # the statistic is blind: the balance stays

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
            self.balance.copy_(torch.where(usable & ~self.held, fresh, self.balance))
            self.measured.logical_or_(usable)
        share = weight * self.balance * ratio
        self.share.copy_(torch.where(torch.isfinite(share), share, torch.full_like(share, math.nan)))

    def hold(self) -> None:
        """Keep the balance where it is: the statistic is blind, and there is nothing that the balance could weigh."""
        self.held.fill_(self.balanced)


def gradient_unit(loss: Tensor, ranks: Ranks) -> Tensor:
    """What a loss is divided by before it is differentiated to be measured, and its gradient multiplied by afterwards: its
    size. A small one's gradient would underflow half precision. The same for all processes, whose gradients meet on
    their way through a batch norm."""
    size = ranks.mean(loss.detach().abs())
    return torch.where(size > 0, size, torch.ones_like(size))
