"""How to implement feature matching in a DCGAN in PyTorch: the usual training script, with three lines changed.

    python docs/examples/dcgan_howto.py [--data FOLDER] [--steps 500]

FOLDER has images in folders of their own, one per class. Without it, the Fashion-MNIST images that come with fmrun.
"""

import argparse
from collections.abc import Iterable
from itertools import count, islice

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms, utils

from fmrun import FeatureMatching
from fmrun.data.sources import read_bundled


def generator(channels: int, width: int, latent: int) -> nn.Sequential:
    """Images (B, channels, 32, 32) from latents (B, latent, 1, 1)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(latent, 4 * width), (4 * width, 2 * width), (2 * width, width)]):
        convolution = nn.ConvTranspose2d(inputs, outputs, 4, 2 if i else 1, 1 if i else 0, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


def discriminator(channels: int, width: int) -> nn.Sequential:
    """Logits (B,) of images (B, channels, 32, 32)."""
    layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for inputs in (width, 2 * width):
        convolution = nn.Conv2d(inputs, 2 * inputs, 4, 2, 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(2 * inputs), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4), nn.Flatten(0))


def train(netG: nn.Module, netD: nn.Module, matching: FeatureMatching, batches: Iterable, lr: float) -> None:
    """Train on batches of real images (B, C, 32, 32) in [-1, 1] and latents (B, latent, 1, 1)."""
    criterion = nn.BCEWithLogitsLoss()
    optimizerD = torch.optim.Adam(netD.parameters(), lr=lr, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=lr, betas=(0.5, 0.999))
    for step, (real, noise) in enumerate(batches):
        fake, ones, zeros = netG(noise), real.new_ones(len(real)), real.new_zeros(len(real))
        netD.zero_grad()
        lossD = criterion(netD(real), ones) + criterion(netD(fake.detach()), zeros)
        lossD.backward()
        optimizerD.step()
        netG.zero_grad()
        logits, distance = matching(real, fake, step)  # 2: was logits = netD(fake)
        lossG = matching.combine(criterion(logits, ones), distance, fake)  # 3: was lossG = criterion(logits, ones)
        lossG.backward()
        optimizerG.step()
        if step % 50 == 0:
            print(
                f"step {step}: D {lossD.item():.3f}, G {lossG.item():.3f}, share {matching.strength.share.item():.2f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    defaults = {"data": "", "out": "fake.png", "steps": 500, "batch": 64, "width": 32, "latent": 100, "lr": 2e-4}
    for flag, default in defaults.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    options = parser.parse_args()
    if options.data:
        view = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
        images = torch.stack([image for image, _ in datasets.ImageFolder(options.data, view)])
    else:
        images = torch.from_numpy(read_bundled("fashion-mnist", "train"))[:, None] / 255
        images = nn.functional.pad(images, (2, 2, 2, 2))
    loader = DataLoader(TensorDataset(images * 2 - 1), options.batch, shuffle=True, drop_last=True)
    reals = islice((real for epoch in count() for (real,) in loader), options.steps)
    batches = ((real, torch.randn(len(real), options.latent, 1, 1)) for real in reals)
    channels, height, width = images.shape[1:]
    netG, netD = generator(channels, options.width, options.latent), discriminator(channels, options.width)
    matching = FeatureMatching(netD, (channels, height, width), layers="key", match="mean", weight=1.0)  # 1: new
    train(netG, netD, matching, batches, options.lr)
    utils.save_image(netG(torch.randn(64, options.latent, 1, 1)), options.out, normalize=True, value_range=(-1, 1))
