"""How many kinds of image a generator makes, and how evenly: the kinds are the labels that a classifier gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import CLASSES, SIDE, Classifier

STACKED_NUM = 26_000
"""Images that the kinds of stacked ones are counted among, as published (Metz et al. 2017; Lin et al. 2018, PacGAN)."""

PARTS = 500


@dataclass(frozen=True)
class Kinds:
    """The kinds there are to be made: 10 of grey images, 1,000 of stacked ones."""

    channels: int

    @property
    def count(self) -> int:
        return CLASSES**self.channels

    def labels(self, net: Classifier, images: Tensor) -> Tensor:
        """The kind of each image (B, channels, 28 or 32, 28 or 32), uint8: int64 (B,), the first channel's class in the
        highest digit."""
        edge = (images.shape[-1] - SIDE) // 2
        inner = images[..., edge : edge + SIDE, edge : edge + SIDE].reshape(-1, 1, SIDE, SIDE)
        with torch.no_grad():
            found = torch.cat([net(part.float() / 255).argmax(1) for part in inner.split(PARTS)])
        digits = CLASSES ** torch.arange(self.channels - 1, -1, -1, device=found.device)
        return (found.view(-1, self.channels) * digits).sum(1)

    def histogram(self, net: Classifier, parts: Iterable[Tensor], device: torch.device) -> Tensor:
        """How many images of each kind: float64 (count,)."""
        counts = torch.zeros(self.count, dtype=torch.float64)
        for part in parts:
            counts += torch.bincount(self.labels(net, part.to(device)).cpu(), minlength=self.count)
        return counts


def choose_kinds(path: str, channels: int, size: int) -> Kinds | None:
    """The kinds of a run's images where the last part of its data's path says that they are (stacked) Fashion-MNIST."""
    last = path.lower().rstrip("/").rpartition("/")[2]
    named = "fashion" in last and channels == (3 if "stacked" in last else 1)
    return Kinds(channels) if named and size in (SIDE, 32) else None


def coverage(histogram: Tensor) -> dict[str, float]:
    """`modes`: kinds that occur at all. `modes_kl`: Kullback-Leibler divergence in nats of the kinds from equal shares,
    Σ p log(p · kinds): 0 where all occur equally often, log(kinds) where all images are of one kind."""
    shares = histogram / histogram.sum()
    terms = torch.where(shares > 0, shares * (shares * len(shares)).log(), 0.0)
    return {"modes": float((histogram > 0).sum()), "modes_kl": float(terms.sum())}
