"""A training loop of one's own against a discriminator of one's own that says itself what its features are.

`forward_with_features` returns (logits, features); layers are called by the keys that it gives them.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrun import FeatureMatching


class TwoBranches(nn.Module):
    """Judges images (B, 1, 16, 16) by their shapes and by their spectrum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(1, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.spectrum = nn.Linear(16 * 9, width)
        self.head = nn.Linear(2 * width * 4 * 4 + width, 1)

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        coarse = F.leaky_relu(self.coarse(images), 0.2)
        fine = F.leaky_relu(self.fine(coarse), 0.2)
        spectrum = F.leaky_relu(self.spectrum(torch.fft.rfft2(images).abs().log1p().flatten(1)), 0.2)
        logits = self.head(torch.cat([fine.flatten(1), spectrum], 1)).flatten()
        return logits, {"coarse": coarse, "fine": fine, "spectrum": spectrum}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images)[0]


def circles(count: int) -> Tensor:
    """Real images (count, 1, 16, 16) in [-1, 1]: bright discs of many sizes and places."""
    axis = torch.linspace(-1, 1, 16)
    x, y = (torch.rand(count, 1, 1) - 0.5 for _ in range(2))
    radius = 0.2 + 0.4 * torch.rand(count, 1, 1)
    distance = ((axis[None, :, None] - y).square() + (axis[None, None, :] - x).square()).sqrt()
    return torch.tanh(10 * (radius - distance))[:, None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    netG = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16)))
    netD = TwoBranches(options.width)
    matching = FeatureMatching(netD, (1, 16, 16), layers=["fine", "spectrum"], match="moments", weight=0.5)
    optimizerG, optimizerD = (torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.99)) for net in (netG, netD))
    for step in range(options.steps):
        real, fake = circles(64), netG(torch.randn(64, 8))
        lossD = F.relu(1 - netD(real)).mean() + F.relu(1 + netD(fake.detach())).mean()
        optimizerD.zero_grad()
        lossD.backward()
        optimizerD.step()
        logits, distance = matching(real, fake, step)
        lossG = matching.combine(-logits.mean(), distance, fake)
        optimizerG.zero_grad()
        lossG.backward()
        optimizerG.step()
        if step % 100 == 0:
            terms = ", ".join(f"{layer} {term.item():.3g}" for layer, term in distance.terms.items())
            print(f"step {step}: D {lossD.item():.3f}, G {lossG.item():.3f}; distances: {terms}")
    torch.save({"generator": netG.state_dict(), "matching": matching.state_dict()}, "own_network.pt")


if __name__ == "__main__":
    main()
