"""A small classifier of Fashion-MNIST, to count which kinds of image a generator makes; docs/classifier.py trained it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 10
SIDE = 28
WEIGHTS = Path(__file__).with_name("fashion-mnist-classifier.safetensors")


class Classifier(nn.Module):
    """Logits (B, 10) of grey images (B, 1, 28, 28) in [0, 1]; 130,000 weights, 4 million multiplications an image."""

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
