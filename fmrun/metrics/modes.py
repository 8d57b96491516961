"""How many modes of the data a generator covers, and how evenly: the modes are the labels that a small classifier of
Fashion-MNIST gives, which docs/classifier.py trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 10
SIDE = 28
WEIGHTS = Path(__file__).with_name("fashion-mnist-classifier.safetensors")

STACKED_NUM = 26_000
"""Images among which the modes of stacked ones are counted, as published (Metz et al. 2017; Lin et al. 2018, PacGAN)."""

PARTS = 500


class Classifier(nn.Module):
    """Logits (B, 10) of grey images (B, 1, 28, 28) in [0, 1]; 130,000 weights, 4 million multiplications per image."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, 32, 5, 2), *block(32, 64, 3, 2), *block(64, 64, 3, 1), *block(64, 128, 3, 2)
        )
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


def load_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The trained classifier, frozen, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        net = Classifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class Modes:
    """The modes of a data set: 10 of grey images, 1,000 of stacked ones."""

    channels: int

    @property
    def count(self) -> int:
        return CLASSES**self.channels

    def labels(self, net: Classifier, images: Tensor) -> Tensor:
        """The mode of each image (B, channels, 28 or 32, 28 or 32), uint8: int64 (B,), the first channel's class in the
        highest digit."""
        edge = (images.shape[-1] - SIDE) // 2
        inner = images[..., edge : edge + SIDE, edge : edge + SIDE].reshape(-1, 1, SIDE, SIDE)
        with torch.no_grad():
            classes = torch.cat([net(chunk.float() / 255).argmax(1) for chunk in inner.split(PARTS)])
        digits = CLASSES ** torch.arange(self.channels - 1, -1, -1, device=classes.device)
        return (classes.view(-1, self.channels) * digits).sum(1)

    def histogram(self, net: Classifier, parts: Iterable[Tensor], device: torch.device) -> Tensor:
        """How many images of each mode: float64 (count,)."""
        counts = torch.zeros(self.count, dtype=torch.float64)
        for chunk in parts:
            counts += torch.bincount(self.labels(net, chunk.to(device)).cpu(), minlength=self.count)
        return counts


def choose_modes(path: str, channels: int, size: int) -> Modes | None:
    """The modes of a run's images where the last part of its data's path says that they are (stacked) Fashion-MNIST."""
    last = path.lower().rstrip("/").rpartition("/")[2]
    named = "fashion" in last and channels == (3 if "stacked" in last else 1)
    return Modes(channels) if named and size in (SIDE, 32) else None


def coverage(histogram: Tensor) -> dict[str, float]:
    """`modes`: how many modes occur at all. `modes_kl`: Kullback-Leibler divergence in nats of the modes from equal
    fractions, Σ p log(p · modes): 0 where all occur equally often, log(modes) where all images are of one mode."""
    fractions = histogram / histogram.sum()
    terms = torch.where(fractions > 0, fractions * (fractions * len(fractions)).log(), 0.0)
    return {"modes": float((histogram > 0).sum()), "modes_kl": float(terms.sum())}
