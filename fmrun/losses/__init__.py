"""Losses: pure functions of tensors, each with the equation it computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """A scalar to differentiate and the named scalars it is made of, for the log."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
