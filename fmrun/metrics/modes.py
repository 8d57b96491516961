"""How many kinds of image a generator makes, and how evenly: the kinds are the labels that a classifier gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.store import Images
from ..errors import UserError
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


def choose_kinds(path: str, channels: int, size: int, asked: bool | None) -> Kinds | None:
    """The kinds of a run's images: where the last part of its data's path says that they are (stacked) Fashion-MNIST, or it is `asked`
    for. UserError where it cannot be had."""
    fits = size in (SIDE, 32) and channels in (1, 3)
    if asked and not fits:
        raise UserError(
            f"--modes counts kinds of clothing in grey images of 28 or 32 px, or in three such channels, not in "
            f"{channels} × {size} × {size}; leave it out"
        )
    last = path.lower().rstrip("/").rpartition("/")[2]
    named = "fashion" in last and (channels == 1) != ("stacked" in last)
    return Kinds(channels) if fits and (named if asked is None else asked) else None


def expected(images: Images, count: int) -> Tensor | None:
    """How likely each of `count` kinds is among real images, float64 (count,); None where all are equally likely, be it
    by construction or because nobody labelled them."""
    if images.labels is None or images.name.startswith("bundled:"):
        return None
    counts = torch.bincount(torch.from_numpy(images.labels), minlength=count).double()
    if len(counts) != count or bool((counts == counts[0]).all()):
        return None
    return counts / counts.sum()


def coverage(histogram: Tensor, likely: Tensor | None = None) -> dict[str, float]:
    """`modes`: kinds that occur at all. `modes_kl`: Kullback-Leibler divergence in nats of the generated kinds from
    `likely` (None: all kinds equally), Σ p log(p / q): 0 where they agree, log(kinds) where all are of one kind and
    `likely` is None; infinite where something is generated that `likely` excludes."""
    shares = histogram / histogram.sum()
    even = torch.full_like(shares, 1 / len(shares)) if likely is None else likely
    terms = torch.where(shares > 0, shares * (shares / even).log(), 0.0)
    return {"modes": float((histogram > 0).sum()), "modes_kl": float(terms.sum())}
