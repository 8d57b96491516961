"""Images from noise: the DCGAN pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..config.schema import Config
from ..data.feed import order
from ..data.files import Progress
from ..data.grid import grid, save_png
from ..data.sources import open_images
from ..data.store import to_float, to_uint8
from ..feature_matching.discriminator import mean_logit
from ..feature_matching.frozen import frozen_running_stats
from ..metrics.reals import share
from ..models.custom import custom_generator
from ..models.norm import restored_buffers
from ..models.weights import load_weights
from ..runtime.dist import World
from ..runtime.rng import torch_generator
from . import Batch, Data, Kind, Raw, Task
from .pair import PairData, PairTask

CALIBRATION_IMAGES = 512


def build_generator(config: Config, channels: int) -> nn.Module:
    """The generator with its first weights, on the CPU, without touching global random state."""
    c, size = config.generator, config.data.image_size
    with torch.random.fork_rng(devices=[]):
        rng = torch_generator(config.seed, "init", 0)
        if c.target is not None:
            example = latents(config.seed, "sample", range(2), c.latent_dim)
            net = custom_generator(c.target, c.params, rng, [(example, (2, channels, size, size))])
        else:
            net = import_module(f"..models.{c.type}", __package__).generator(c, (channels, size, size), rng)
    if c.init is not None:
        load_weights(net, c.init, ("ema", "generator"), "generator.init", config)
    return net


def latents(seed: int, stream: str, indices: Sequence[int], latent_dim: int) -> Tensor:
    """Latent vectors (n, latent_dim); vector i depends on the seed, the stream and i alone."""
    rows = [torch.randn(latent_dim, generator=torch_generator(seed, stream, i)) for i in indices]
    return torch.stack(rows)


class Generate(PairTask):
    """Generator and discriminator of images from noise, with everything they are trained by."""

    def __init__(self, config: Config, device: torch.device, world: World):
        channels, size = config.data.channels, config.data.image_size
        assert channels is not None
        super().__init__(config, device, world, (channels, size, size))

    def prepare(self, raw: Raw, draw: int) -> list[Batch]:
        """Latents and augmentation are drawn for the global batch and sliced."""
        assert isinstance(raw, Tensor)
        config, world = self.config, self.world
        whole = config.train.batch_size
        part = world.local_slice(whole)
        noise_rng = torch_generator(config.seed, "latent", draw, device=self.device)
        noise = torch.randn(whole, config.generator.latent_dim, generator=noise_rng, device=self.device)
        real = to_float(raw, self.dtype).contiguous(memory_format=torch.channels_last)
        noise = noise[part].to(self.dtype)
        count = config.train.accumulate
        return [
            Batch(real=r, noise=n, augment=a)
            for r, n, a in zip(real.chunk(count), noise.chunk(count), self.augmentation(draw), strict=True)
        ]

    def generate(self, batch: Batch) -> Tensor:
        assert batch.noise is not None
        return self.run(self.forward, batch.noise)

    def fit_average(self) -> None:
        """Fit the averaged generator's batch norm to its weights, on latents that are the same every time."""
        size = min(self.config.train.batch_size, CALIBRATION_IMAGES)

        def noises() -> Iterator[Tensor]:
            for i in range(-(-CALIBRATION_IMAGES // size)):
                rng = torch_generator(self.config.seed, "calibrate", i)
                yield torch.randn(size, self.config.generator.latent_dim, generator=rng).to(self.device, self.dtype)

        self.copy_buffers()
        with torch.random.fork_rng(enabled=self.config.own_nets):  # what a net of the user's own draws
            if self.config.own_nets:
                torch.manual_seed(0)
            with torch.no_grad(), self.autocast():
                update_bn(noises(), self.average)

    @torch.no_grad()
    def images(self, noise: Tensor) -> Iterator[Tensor]:
        """Images of the averaged generator, a few hundred at a time."""
        self.average.eval()
        for part in noise.split(256):
            yield self.run(self.average, part.to(self.device, self.dtype))


class GenerateData(PairData):
    """Training and held-out images."""

    def __init__(self, config: Config, progress: Progress | None = None, *, trained: bool = True):
        self.train, self.valid = open_images(config.data, config.seed, progress)
        data = config.data.model_copy(update={"channels": self.train.channels})
        self.config = config.model_copy(update={"data": data})

    def describe(self) -> str:
        train, valid = self.train, self.valid
        held = f" + {len(valid)} held out" if valid is not None else ""
        images = "image" if len(train) == 1 and valid is None else "images"
        return f"{len(train)}{held} {images}, {train.channels} × {train.size} × {train.size}"

    def draw(self, path: Path, rows: int) -> None:
        images = self.train.read(order(self.config.seed, len(self.train), 0, 8 * rows))
        save_png(grid(to_float(images), 8), path)


class GenerateMonitor:
    """Images of the averaged generator, and what the discriminator says of held-out ones."""

    names: tuple[str, ...] = ("eval/d_train", "eval/d_valid", "eval/d_fake", "eval/overfit")

    def __init__(self, task: Task, data: Data):
        assert isinstance(task, Generate)
        self.task, self.data = task, data

    def _latents(self, count: int) -> Tensor:
        config = self.task.config
        return latents(config.seed, "preview", range(count), config.generator.latent_dim)

    def generated(self, count: int) -> Iterator[Tensor]:
        return (to_uint8(images) for images in self.task.images(self._latents(count)))

    def preview(self, count: int) -> Tensor:
        return grid(torch.cat(list(self.task.images(self._latents(count)))))

    @torch.no_grad()
    def held_out(self, count: int) -> dict[str, float]:
        """Mean logits of training, held-out and generated images, and by how much the discriminator overfits:
        (train - valid) / (train - generated), 0 for a stranger to its training images, 1 for one who knows them by
        heart (Karras et al. 2020, StyleGAN2-ADA, eq. 1)."""
        task, train, valid = self.task, self.data.train, self.data.valid
        assert valid is not None
        role = task.discriminators[0]
        count = min(count, len(train), len(valid))
        # a net may take no other, as one that compares a batch's images
        size = min(count, task.config.train.batch_size)
        rounds = count // size
        sums = torch.zeros(3, device=task.device, dtype=task.dtype)
        noise = self._latents(size * rounds)
        shares = [share(images, size * rounds) for images in (train, valid)]
        nets = task.generator, role.net
        with frozen_running_stats(*nets), restored_buffers(*nets):
            for i in range(rounds):
                part = slice(i * size, (i + 1) * size)
                looked = [chosen.images.read(chosen.indices[part]).to(task.device) for chosen in shares]
                real, held = (to_float(images, task.dtype) for images in looked)
                fake = task.run(task.generator, noise[part.start : part.stop].to(task.device, task.dtype))
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


def blank(config: Config, world: World, device: torch.device) -> Tensor:
    part = world.local_slice(config.train.batch_size)
    shape = (config.data.channels or 3, config.data.image_size, config.data.image_size)
    return torch.zeros(part.stop - part.start, *shape, dtype=torch.uint8, device=device)


KIND = Kind(Generate, build_generator, GenerateData, GenerateMonitor, blank)
