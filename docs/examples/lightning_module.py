"""Feature matching in a LightningModule: manual optimisation, as GANs need it, in the precision and on the devices of
the Trainer. Needs `pip install lightning`.
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fmrun import FeatureMatching


class Gan(lightning.LightningModule):
    """A small DCGAN of images (B, 1, 16, 16) in [-1, 1]."""

    def __init__(self, width: int = 32, latent: int = 16) -> None:
        super().__init__()
        self.automatic_optimization, self.latent = False, latent
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * width, 4),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4),
            nn.Flatten(0),
        )
        # a module like any other: its balance moves to the device, and into the checkpoint
        self.matching = FeatureMatching(self.discriminator, (1, 16, 16), layers="key", match="mean", weight=1.0)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        nets = self.generator, self.discriminator
        return [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in nets], []

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        fake = self.generator(torch.randn(len(real), self.latent, 1, 1, device=self.device))
        loss_d = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()
        logits, distance = self.matching(real, fake, self.global_step // 2)  # two optimisers count a step each
        loss_g = self.matching.combine(F.softplus(-logits).mean(), distance, fake)
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        optimizer_g.step()
        self.log_dict({"loss/d": loss_d, "loss/g": loss_g, "fm/share": self.matching.strength.share}, prog_bar=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, for one")
    options = parser.parse_args()
    images = torch.tanh(8 * torch.rand(1024, 1, 16, 16).sub(0.5).cumsum(2).cumsum(3).div(8))  # smooth random fields
    trainer = lightning.Trainer(max_steps=2 * options.steps, max_epochs=-1, precision=options.precision)
    trainer.fit(Gan(), DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True))
