"""Images from noise: the DCGAN pair."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..augment import NUMBERS
from ..config import Config, DiscriminatorConfig, GeneratorConfig
from ..data.images import Images, to_float
from ..dist import World
from ..feature_matching import FeatureMatching, select_layers
from ..models.base import Discriminator
from ..models.dcgan import DcganDiscriminator, DcganGenerator
from ..models.norm import calibrate, globalise, held_averages
from ..models.weights import load_weights
from ..precision import choose_precision, storage_dtype
from ..rng import torch_generator
from . import Batch, Critic, Live, Plan

CALIBRATION_IMAGES = 512


def _dcgan_generator(c: GeneratorConfig, size: int, channels: int, rng: torch.Generator) -> nn.Module:
    return DcganGenerator(size, channels, c.width, c.latent_dim, rng)


def _dcgan_discriminator(c: DiscriminatorConfig, size: int, channels: int, rng: torch.Generator) -> nn.Module:
    return DcganDiscriminator(size, channels, c.width, c.norm, rng)


GENERATORS: dict[str, Callable[..., nn.Module]] = {"dcgan": _dcgan_generator}
DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {"dcgan": _dcgan_discriminator}


def build_generator(config: Config, channels: int) -> nn.Module:
    """The generator with its first weights, on the CPU, without touching global random state."""
    with torch.random.fork_rng(devices=[]):
        rng = torch_generator(config.seed, "init", 0)
        net = GENERATORS[config.generator.type](config.generator, config.data.image_size, channels, rng)
    if config.generator.init is not None:
        load_weights(net, config.generator.init, ("ema", "generator"), "generator.init")
    return net


def build_discriminator(config: Config, channels: int) -> nn.Module:
    """The discriminator with its first weights, on the CPU, without touching global random state."""
    with torch.random.fork_rng(devices=[]):
        rng = torch_generator(config.seed, "init", 1)
        net = DISCRIMINATORS[config.discriminator.type](config.discriminator, config.data.image_size, channels, rng)
    if config.discriminator.init is not None:
        load_weights(net, config.discriminator.init, ("discriminator",), "discriminator.init")
    return net


def latents(seed: int, stream: str, indices: Sequence[int], latent_dim: int) -> Tensor:
    """Latent vectors (n, latent_dim); vector i depends on the seed, the stream and i alone."""
    rows = [torch.randn(latent_dim, generator=torch_generator(seed, stream, i)) for i in indices]
    return torch.stack(rows)


@torch.no_grad()
def feature_shapes(net: nn.Module, image: tuple[int, int, int], names: tuple[str, ...]) -> dict[str, torch.Size]:
    """Shape (C, H, W) of each named feature for one image (C, H, W); leaves every buffer as it was."""
    weight = next(net.parameters())
    blank = torch.zeros(2, *image, device=weight.device, dtype=weight.dtype)
    with held_averages(net):
        features = net(blank, names, False).features
    return {name: features[name].shape[1:] for name in names}


class Generate:
    """Generator and discriminator of a run, with everything they are trained by.

    Args:
        config: the experiment; `data.channels` resolved.
        device: where to train.
        world: the processes that share the global batch.
    """

    def __init__(self, config: Config, device: torch.device, world: World):
        assert config.data.channels is not None
        self.config, self.device, self.world = config, device, world
        channels, size = config.data.channels, config.data.image_size
        self.precision = choose_precision(config.precision, device)
        self.dtype = storage_dtype(self.precision)

        def placed(net: nn.Module) -> nn.Module:
            return net.to(device=device, dtype=self.dtype).to(memory_format=torch.channels_last)

        self.generator = placed(build_generator(config, channels))
        self.average = copy.deepcopy(self.generator)
        net = placed(build_discriminator(config, channels))
        matching = None
        if config.feature_matching.weight > 0:
            layers = select_layers(config.feature_matching.layers, cast(Discriminator, net))
            shapes = feature_shapes(net, (channels, size, size), layers)
            matching = FeatureMatching(config.feature_matching, shapes, config.seed)
            matching = matching.to(device=device, dtype=self.dtype)
        gan = config.losses.gan
        globalise(self.generator, world, device, double_backward=False)
        net = globalise(net, world, device, double_backward=gan.r1 > 0 or gan.r2 > 0)
        critic = Critic(
            "discriminator",
            net,
            gan=gan,
            matching=matching,
            policy=config.train.augment,
            trained=config.discriminator.train,
            precision=self.precision,
        )
        self.critics: tuple[Critic, ...] = (critic,)
        self._forward: nn.Module = self.generator
        if config.compile:
            self._forward = torch.compile(self.generator)  # type: ignore[assignment]
            critic.fast = torch.compile(net)  # type: ignore[assignment]

    def plan(self, step: int) -> Plan:
        return Plan(
            tuple(critic.plan(step) for critic in self.critics),
            observe=(step + 1) % self.config.log.every == 0,
        )

    def live(self) -> Live:
        return Live(len(self.critics), self.device, self.dtype)

    def prepare(self, raw: Tensor, draw: int) -> list[Batch]:
        """Latents and augmentation are drawn for the global batch and sliced."""
        config, world = self.config, self.world
        whole = config.train.batch_size
        part = world.part(whole)
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
        return self._run(self._forward, batch.noise)

    def _run(self, net: nn.Module, noise: Tensor) -> Tensor:
        half = self.precision in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, dtype=self.precision if half else None, enabled=half):
            image = net(noise)
        return image.to(self.dtype)

    def image_losses(self, batch: Batch, image: Tensor) -> dict[str, Tensor]:
        return {}

    def fit_average(self) -> None:
        """Fit the averaged generator's batch norm to its weights, on latents that are the same every time."""
        size = min(self.config.train.batch_size, CALIBRATION_IMAGES)
        batches = -(-CALIBRATION_IMAGES // size)

        def forward(i: int) -> Callable[[], object]:
            rng = torch_generator(self.config.seed, "calibrate", i)
            noise = torch.randn(size, self.config.generator.latent_dim, generator=rng)
            return lambda: self._run(self.average, noise.to(self.device, self.dtype))

        calibrate(self.average, [forward(i) for i in range(batches)])

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Images (count, C, H, W) of the averaged generator from latents that are the same every time."""
        noise = latents(self.config.seed, "preview", range(count), self.config.generator.latent_dim)
        self.average.eval()
        images = [self._run(self.average, part.to(self.device, self.dtype)) for part in noise.split(256)]
        return torch.cat(images)

    @torch.no_grad()
    def held_out(self, train: Images, valid: Images, count: int) -> dict[str, float]:
        """Mean logits of training, held-out and generated images, and by how much the discriminator overfits:
        (train - valid) / (train - generated), 0 for a stranger to its training images, 1 for one who knows them by
        heart (Karras et al. 2020, StyleGAN2-ADA, eq. 1)."""
        critic = self.critics[0]
        count = min(count, len(train), len(valid))
        rounds = -(-count // self.config.train.batch_size)
        size = count // rounds
        sums = torch.zeros(3, device=self.device, dtype=self.dtype)
        noise = latents(self.config.seed, "preview", range(size * rounds), self.config.generator.latent_dim)
        with held_averages(self.generator, critic.net):
            for i in range(rounds):
                part = range(i * size, (i + 1) * size)
                real, held = (to_float(images.read(part).to(self.device), self.dtype) for images in (train, valid))
                fake = self._run(self.generator, noise[part.start : part.stop].to(self.device, self.dtype))
                for k, images in enumerate((real, held, fake)):
                    images = images.contiguous(memory_format=torch.channels_last)
                    logits = critic(images, critic.mildest(images)).logits
                    assert logits is not None
                    sums[k] += logits.mean() / rounds
        on_train, on_valid, on_fake = sums.tolist()
        gap = on_train - on_fake
        row = {"eval/d_train": on_train, "eval/d_valid": on_valid, "eval/d_fake": on_fake}
        if gap > 0:
            row["eval/overfit"] = (on_train - on_valid) / gap
        return row
