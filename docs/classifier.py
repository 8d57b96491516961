"""Trains the classifier of Fashion-MNIST by which `fmrun eval` counts kinds of clothing.

`python docs/classifier.py [IDX-FILE …]` trains it on the bundled training images (a few minutes on one core), prints its
accuracy on the bundled validation images, which it has not seen, and on the idx files named, and writes the weights
that travel with fmrun.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fmrun.data.sources import BUNDLED, read_bundled, read_idx
from fmrun.metrics.modes import SIDE, WEIGHTS, Classifier
from fmrun.runtime.rng import torch_generator

EPOCHS, BATCH, RATE = 40, 100, 3e-3
SHIFT = 2
"""Training images are mirrored and moved by so many pixels at random."""


def bundled(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) that come with fmrun, and their labels."""
    text = (BUNDLED["fashion-mnist"] / f"fashion-mnist-{split}.txt").read_text()
    labels = [int(digit) for digit in text if digit.isdigit()]
    return torch.from_numpy(read_bundled("fashion-mnist", split))[:, None], torch.tensor(labels)


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (N, 1, 28, 28) that are given their label."""
    with torch.no_grad():
        found = torch.cat([net(part.float() / 255).argmax(1) for part in images.split(500)])
    return float((found == labels).double().mean())


def train(images: Tensor, labels: Tensor) -> Classifier:
    """Adam with a cosine schedule and smoothed labels, on images moved and mirrored; always the same numbers."""
    rng = torch_generator(0, "init", 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier()
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * (len(images) // BATCH))
    padded = F.pad(images, [SHIFT] * 4)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=rng).split(BATCH):
            top, left = torch.randint(2 * SHIFT + 1, (2,), generator=rng).tolist()
            x = padded[chosen, :, top : top + SIDE, left : left + SIDE].float() / 255
            mirrored = torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5
            loss = F.cross_entropy(net(torch.where(mirrored, x.flip(-1), x)), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def main(tests: Sequence[str]) -> None:
    """Train, report, write."""
    sets = {"bundled validation images": bundled("valid")}
    for path in tests:
        labels = path.replace("images-idx3", "labels-idx1")
        sets[path] = torch.from_numpy(read_idx(Path(path)))[:, None], torch.from_numpy(read_idx(Path(labels))).long()
    net = train(*bundled("train"))
    halved = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    net.load_state_dict(halved)
    found = {Path(name).name: accuracy(net, *of) for name, of in sets.items()}
    facts = {"trained on": "bundled:fashion-mnist", "accuracy": found, "licence": "MIT, as fmrun and Fashion-MNIST"}
    save_file(halved, WEIGHTS, {"fmrun": json.dumps(facts)})
    WEIGHTS.chmod(0o644)  # safetensors makes files that nobody else may read
    for name, value in found.items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
