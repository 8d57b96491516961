"""Images from noise: the DCGAN pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..augment import NUMBERS
from ..config import Config
from ..data.feed import Feed, Windows, order
from ..data.files import Progress
from ..data.sources import open_images
from ..data.store import Images, to_float, to_uint8
from ..dist import World
from ..feature_matching.discriminator import mean_logit
from ..feature_matching.frozen import frozen_running_stats
from ..grid import grid, save_png
from ..metrics.reals import share
from ..models.custom import custom_generator
from ..models.dcgan import DcganGenerator
from ..models.norm import restored_buffers
from ..models.weights import load_weights
from ..rng import torch_generator
from . import Batch
from .pair import PairTask

CALIBRATION_IMAGES = 512


def build_generator(config: Config, channels: int) -> nn.Module:
    """The generator with its first weights, on the CPU, without touching global random state."""
    c, size = config.generator, config.data.image_size
    with torch.random.fork_rng(devices=[]):
        rng = torch_generator(config.seed, "init", 0)
        net: nn.Module
        if c.target is not None:
            example = latents(config.seed, "sample", range(2), c.latent_dim)
            net = custom_generator(c.target, c.params, rng, [(example, (2, channels, size, size))])
        else:
            net = DcganGenerator(size, channels, c.width, c.latent_dim, rng)
    if c.init is not None:
        load_weights(net, c.init, ("ema", "generator"), "generator.init")
    return net


def latents(seed: int, stream: str, indices: Sequence[int], latent_dim: int) -> Tensor:
    """Latent vectors (n, latent_dim); vector i depends on the seed, the stream and i alone."""
    rows = [torch.randn(latent_dim, generator=torch_generator(seed, stream, i)) for i in indices]
    return torch.stack(rows)


class Generate(PairTask):
    """Generator and discriminator of images from noise, with everything they are trained by."""

    held_out_names = ("eval/d_train", "eval/d_valid", "eval/d_fake", "eval/overfit")
    image_loss_names: tuple[str, ...] = ()
    paired = False
    """Whether every generated image has an original."""
    batch_losses: tuple[str, ...] = ()
    sample_hint = ""

    def __init__(self, config: Config, device: torch.device, world: World):
        channels, size = config.data.channels, config.data.image_size
        assert channels is not None
        super().__init__(config, device, world, build_generator(config, channels), (channels, size, size))

    @staticmethod
    def open(config: Config, progress: Progress | None = None) -> tuple[Config, Images, Images | None]:
        """Training and held-out images, checked whole, and the config with what they settle."""
        train, valid = open_images(config.data, config.seed, progress)
        data = config.data.model_copy(update={"channels": train.channels})
        return config.model_copy(update={"data": data}), train, valid

    def feed(self, images: Images, *, cache: str, workers: int, start: int) -> Feed:
        """This process's share of the real images of each draw, from draw `start` on."""
        config = self.config
        part = self.world.local_slice(config.train.batch_size)
        windows = Windows(
            images, seed=config.seed, global_batch=config.train.batch_size, part=part, hflip=config.data.hflip
        )
        return Feed(windows, device=self.device, cache=cache, workers=workers, start=start)

    @staticmethod
    def draw_data(config: Config, images: Images, path: Path, rows: int) -> None:
        """Write a sheet of the first images that training sees, in its order."""
        shown = images.read(order(config.seed, len(images), 0, 8 * rows))
        save_png(grid(to_float(shown), 8), path)

    def blank(self) -> Tensor:
        """A batch in place of data, to see what fits in memory."""
        part = self.world.local_slice(self.config.train.batch_size)
        return torch.zeros(part.stop - part.start, *self.image, dtype=torch.uint8, device=self.device)

    @staticmethod
    def describe(train: Images, valid: Images | None) -> str:
        held = f" + {len(valid)} held out" if valid is not None else ""
        images = "image" if len(train) == 1 and valid is None else "images"
        return f"{len(train)}{held} {images}, {train.channels} × {train.size} × {train.size}"

    def prepare(self, raw: Tensor, draw: int) -> list[Batch]:
        """Latents and augmentation are drawn for the global batch and sliced."""
        config, world = self.config, self.world
        whole = config.train.batch_size
        part = world.local_slice(whole)
        noise_rng = torch_generator(config.seed, "latent", draw, device=self.device)
        noise = torch.randn(whole, config.generator.latent_dim, generator=noise_rng, device=self.device)
        numbers = None
        if config.train.augment:
            rng = torch_generator(config.seed, "augment", draw, device=self.device)
            numbers = torch.rand(2, whole, NUMBERS, generator=rng, device=self.device)[:, part]
        real = to_float(raw, self.dtype).contiguous(memory_format=torch.channels_last)
        noise = noise[part].to(self.dtype)
        count = config.train.accumulate
        return [
            Batch(real=r, noise=n, augment=None if a is None else a.to(self.dtype))
            for r, n, a in zip(
                real.chunk(count),
                noise.chunk(count),
                numbers.chunk(count, dim=1) if numbers is not None else [None] * count,
                strict=True,
            )
        ]

    def generate(self, batch: Batch) -> Tensor:
        assert batch.noise is not None
        return self.run(self.forward, batch.noise)

    def image_losses(
        self, batch: Batch, image: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        return {}

    def fit_average(self) -> None:
        """Fit the averaged generator's batch norm to its weights, on latents that are the same every time."""
        size = min(self.config.train.batch_size, CALIBRATION_IMAGES)

        def noises() -> Iterator[Tensor]:
            for i in range(-(-CALIBRATION_IMAGES // size)):
                rng = torch_generator(self.config.seed, "calibrate", i)
                yield torch.randn(size, self.config.generator.latent_dim, generator=rng).to(self.device, self.dtype)

        self.copy_buffers()
        with torch.random.fork_rng(enabled=self.own_nets):  # what a net of the user's own draws
            if self.own_nets:
                torch.manual_seed(0)
            with torch.no_grad(), self.autocast():
                update_bn(noises(), self.average)

    @torch.no_grad()
    def preview(self, images: Images, count: int) -> Tensor:
        """A sheet, uint8 (C, H', W'), of the averaged generator's images of latents that are the same every time."""
        noise = latents(self.config.seed, "preview", range(count), self.config.generator.latent_dim)
        self.average.eval()
        made = [self.run(self.average, part.to(self.device, self.dtype)) for part in noise.split(256)]
        return grid(torch.cat(made))

    @torch.no_grad()
    def generated(self, count: int) -> Iterator[Tensor]:
        """Images of the averaged generator, uint8 (n, C, H, W), a few hundred at a time, of latents that are the same
        every time."""
        noise = latents(self.config.seed, "preview", range(count), self.config.generator.latent_dim)
        self.average.eval()
        for part in noise.split(256):
            yield to_uint8(self.run(self.average, part.to(self.device, self.dtype)))

    @torch.no_grad()
    def held_out(self, train: Images, valid: Images, count: int) -> dict[str, float]:
        """Mean logits of training, held-out and generated images, and by how much the discriminator overfits:
        (train - valid) / (train - generated), 0 for a stranger to its training images, 1 for one who knows them by
        heart (Karras et al. 2020, StyleGAN2-ADA, eq. 1)."""
        role = self.discriminators[0]
        count = min(count, len(train), len(valid))
        size = min(
            count, self.config.train.batch_size
        )  # a net may take no other, as one that compares a batch's images
        rounds = count // size
        sums = torch.zeros(3, device=self.device, dtype=self.dtype)
        noise = latents(self.config.seed, "preview", range(size * rounds), self.config.generator.latent_dim)
        shares = [share(images, size * rounds) for images in (train, valid)]
        nets = self.generator, role.net
        with frozen_running_stats(*nets), restored_buffers(*nets):
            for i in range(rounds):
                part = slice(i * size, (i + 1) * size)
                looked = [chosen.images.read(chosen.indices[part]).to(self.device) for chosen in shares]
                real, held = (to_float(images, self.dtype) for images in looked)
                fake = self.run(self.generator, noise[part.start : part.stop].to(self.device, self.dtype))
                for k, images in enumerate((real, held, fake)):
                    images = images.contiguous(memory_format=torch.channels_last)
                    logits = role(images, role.mildest(images)).logits
                    assert logits is not None
                    sums[k] += mean_logit(logits) / rounds
        on_train, on_valid, on_fake = sums.tolist()
        gap = on_train - on_fake
        row = {"eval/d_train": on_train, "eval/d_valid": on_valid, "eval/d_fake": on_fake}
        if gap > 0:
            row["eval/overfit"] = (on_train - on_valid) / gap
        return row
